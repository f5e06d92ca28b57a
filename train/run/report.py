"""Reports of a run: header, progress notes, log.jsonl, sample pictures and curves."""

import gc
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path

import torch
from einops import repeat
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from torch import Tensor, nn

from kernels import backend
from models.files import whole
from models.reading import check_file, entry, parse_json, shown
from train.config import OPTIMIZERS, Config
from train.run.machine import Machine

POINTS = 2000  # of a curve; longer histories are thinned
NUMBERS = {int, float}
# of sample pictures, in pixels: font, distance of lines, room for the names of rows
TEXT = 11
LINE = 15
MARGIN = 58
LEAST = 96  # pixels of an image there, so that its caption fits


def formula(weights: Mapping[str, float], off: Mapping[str, str]) -> str:
    """Write the loss as a sum, then the terms that are off and why."""
    total = " + ".join(
        name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items()
    )
    return "; ".join([total, *(f"{name} off: {reason}" for name, reason in off.items())])


def header(
    script: str, config: Config, here: Machine, model: nn.Module, loss: str, data: str, folder: Path
) -> str:
    """Everything that says what runs, one fact a line."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "absent"
    device = here.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parts = {
        part: sum(p.numel() for p in child.parameters()) for part, child in model.named_children()
    }
    schedule = f"{config.lr:g} constant"
    if config.final_lr < 1:
        schedule = f"{config.lr:g}, cosine to {config.lr * config.final_lr:g}"
    lines = {
        "run": f"{script}, preset {config.preset}, seed {config.seed}"
        + (", deterministic" if config.deterministic else ""),
        "device": f"{name} x {here.world}" if here.world > 1 else name,
        "threads": str(here.threads or torch.get_num_threads()),
        "backend": f"{backend.name(torch.empty(0, device=device))} kernels, {config.precision} "
        f"activations, fp32 weights",
        "versions": f"torch {torch.__version__}, triton {triton}, python "
        f"{platform.python_version()}",
        "parameters": ", ".join(f"{part} {count:,}" for part, count in parts.items()),
        "data": data,
        "loss": loss,
        "optimiser": f"{OPTIMIZERS[config.optimizer]}, lr {schedule}, weight decay "
        f"{config.weight_decay:g}, "
        f"clip {config.max_norm:g}, EMA {config.ema:g}",
        "steps": f"{config.steps:,} of {config.batch_size} objects x {config.views} views at "
        f"{config.image_size} px"
        f", {config.micro_batches(here.world)} micro-batches a rank"
        + (f"; the first {config.direct:,} render nothing" if config.direct else ""),
        "out": str(folder),
    }
    return "\n".join(f"{key:<11}{value}" for key, value in lines.items())


def jsonable(row: Mapping) -> dict:
    """Replace numbers that are not finite by None, for JSON cannot hold them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def note(row: Mapping[str, float]) -> str:
    """Note for the progress line: loss, PSNR, voxels per second, skipped steps."""
    parts = [f"loss {row['loss']:.4f}"]
    if "psnr" in row:  # not of steps that render nothing
        parts.append(f"psnr {row['psnr']:.2f}")
    parts.append(f"{row['voxels_per_second']:,.0f} voxels/s")
    return "  ".join(parts + ([f"{row['skipped']} skipped"] if row["skipped"] else []))


def _plain(values: Iterable) -> bool:
    """Tell whether all are finite numbers."""
    try:
        return NUMBERS.issuperset(map(type, values)) and math.isfinite(sum(values))
    except OverflowError:  # a whole number that no float holds
        return False


def _row(line: str, before: int, where: str) -> dict:
    """A row of log.jsonl; ValueError where it is none, or of no later step than `before`."""
    try:
        row = parse_json(line, where)
        if (step := entry(row, "step", int, where)) <= before:
            raise ValueError(f"step {shown(step)} follows step {before}")
        if entry(row, "seconds", float, where) < 0:
            raise ValueError("it took less than no time")
        if _plain(row.values()):  # of a million rows, nearly all are such
            return row
        for name in row.keys() - {"step", "seconds"}:
            if row[name] is not None:
                entry(row, name, float, where)
    except ValueError as error:
        raise ValueError(f"{where} is not a row of a run: {line[:80].rstrip()}") from error
    return row


class Log:
    """log.jsonl, a row a step, and the thinned rows that curves are drawn from.

    Opened at `step`, it drops later rows: a resumed run repeats those steps. Raises ValueError for
    a file with a row that is none, OSError where it cannot be written, both with the file's name.
    """

    def __init__(self, file: Path, step: int = 0):
        self.file = file
        self.rows: list[dict] = []
        self.stride = 1
        self.seconds = 0.0
        self.step = -1  # of the last row
        self._unwritten = b""
        # a link that leads nowhere is there too: it is refused by name
        kept = self._read(step) if os.path.lexists(file) else 0
        self.stream = FileIO(file, "ab")
        try:
            self.stream.truncate(kept)
        except OSError as error:
            self.stream.close()
            raise OSError(f"could not write {file}: {error}") from error

    def _read(self, step: int) -> int:
        """Read the rows up to a step; returns how many bytes they are."""
        check_file(self.file)
        kept = 0
        with self.file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break  # half a row, where the run was killed while writing it
                text = line.decode(errors="backslashreplace")
                row = _row(text, self.step, f"{self.file}, line {number}")
                if row["step"] > step:
                    break  # after the checkpoint
                kept += len(line)
                self._remember(row)
                self.seconds = row["seconds"]
        return kept

    def _remember(self, row: dict) -> None:
        self.step = row["step"]
        if row["step"] % self.stride == 0 or not self.rows:
            self.rows.append(row)
        if len(self.rows) >= 2 * POINTS:
            self.stride *= 2
            self.rows = [row for row in self.rows if row["step"] % self.stride == 0]

    def write(self, row: dict) -> None:
        """Append a row; what is not a finite number is written as null.

        Where that fails, the same call goes on where it stopped, in the middle of the row too.
        """
        if row["step"] > self.step:
            clean = jsonable(row)
            self._unwritten += f"{json.dumps(clean)}\n".encode()
            self._remember(clean)
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self.stream.write(self._unwritten) :]
        except OSError as error:
            raise OSError(f"could not write {self.file}: {error}") from error

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.stream.close()
        except OSError:
            if kind is None:  # else it is the row again that could not be written
                raise


def picture(rows: Mapping[str, Tensor], columns: Sequence[str], title: str, file: Path) -> None:
    """Write named rows of images, each [V, 3, H, W] in [0, 1], as one PNG with V captions.

    Small images are enlarged.
    """
    zoom = -(-LEAST // next(iter(rows.values())).shape[-1])
    grid = torch.stack([row.detach().float().cpu() for row in rows.values()])
    grid = (grid.clamp(0, 1) * 255).round().byte()
    pixels = repeat(
        grid, "rows v c h w -> (rows h tall) (v w wide) c", tall=zoom, wide=zoom
    ).numpy()
    height = pixels.shape[0] // len(rows)
    width = pixels.shape[1] // len(columns)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), TEXT)
    least = MARGIN + int(font.getlength(title))
    sheet = Picture.new(
        "RGB", (max(MARGIN + pixels.shape[1], least), 4 * LINE + pixels.shape[0]), "white"
    )
    sheet.paste(Picture.fromarray(pixels), (MARGIN, 4 * LINE))
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 2), title, "black", font)
    for i, caption in enumerate(columns):
        lines = "\n".join(line[: width // TEXT + 6] for line in caption.split("\n"))
        draw.multiline_text(
            (MARGIN + (i + 0.5) * width, 4 * LINE - 3), lines, "black", font, "md", align="center"
        )
    for i, name in enumerate(rows):
        draw.multiline_text((4, 4 * LINE + (i + 0.5) * height), name, "black", font, "lm")
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file, sync=False) as partial:
        sheet.save(partial, format="PNG", optimize=True)


def _smoothed(values: Sequence[float | None], width: int) -> list[float]:
    """The mean of the last `width` values that are there, nan where none is."""
    means = []
    window = []
    for value in values:
        if value is not None:
            window = [*window, value][-width:]
        means.append(sum(window) / len(window) if window else float("nan"))
    return means


def curves(rows: Sequence[Mapping], weights: Mapping[str, float], file: Path) -> None:
    """Draw loss and PSNR of the training views against the step.

    The loss has its weighted terms beside it, on a log scale.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    width = max(1, len(rows) // 50)
    marker = "." if len(rows) == 1 else ""
    for i, (name, weight) in enumerate({"loss": 1.0, **weights}.items()):
        values = [None if row.get(name) is None else weight * row[name] for row in rows]
        style = "-" if i < 10 else "--"
        left.plot(
            steps,
            _smoothed(values, width),
            style,
            marker=marker,
            label=name,
            linewidth=2 if name == "loss" else 1,
        )
    left.set(xlabel="step", yscale="log", title="loss and its weighted terms")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=6
    )
    psnr = [row.get("psnr") for row in rows]
    right.plot(steps, [float("nan") if p is None else p for p in psnr], alpha=0.25, linewidth=0.7)
    right.plot(steps, _smoothed(psnr, width), color="C0", marker=marker)
    right.set(xlabel="step", ylabel="dB", title="PSNR of the training views")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(0, 1.02 * max(steps, default=1))
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    with whole(file, sync=False) as partial:
        figure.savefig(partial, format="png", dpi=110)
    figure.clear()
    del figure, left, right, axes
    gc.collect()  # parts of a figure hold each other: Python would free their pixels much later
