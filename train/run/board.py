"""Scalars and sample pictures of a run for TensorBoard, where that package is installed."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image as Picture


def check_installed() -> None:
    """Raise ValueError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package: pip install -e '.[tensorboard]'")


class Board:
    """Event files in FOLDER: every number of a step's row, and the sample pictures.

    Without a folder, nothing is written. Opened at `step`, it hides later events: a resumed run
    repeats those steps.
    """

    def __init__(self, folder: Path | None, step: int = 0):
        self.writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # an optional package, slow to import

            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def row(self, row: Mapping[str, float]) -> None:
        """Add the numbers of a row of the log at its step."""
        if self.writer is None:
            return
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, row["step"])

    def picture(self, file: Path, step: int) -> None:
        """Add a sample picture, a PNG file."""
        if self.writer is None:
            return
        with Picture.open(file, formats=["PNG"]) as image:
            pixels = np.asarray(image)
        self.writer.add_image("samples", pixels, step, dataformats="HWC")

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_) -> None:
        if self.writer is not None:
            self.writer.close()
