"""How a run ends before its last step: what it saves then, and what it says."""

import sys
from collections.abc import Callable
from pathlib import Path

from models.finite import NotFinite
from train.run import checkpoint


class Rescue:
    """Saves what an error in its block would lose: `save()`, where `unsaved()`.

    A second Ctrl-C is no error: it stops at once. What cannot be saved is said, and does not hide
    the error.
    """

    def __init__(self, unsaved: Callable[[], bool], save: Callable[[], None]):
        self.unsaved = unsaved
        self.save = save

    def __enter__(self) -> "Rescue":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if (
            kind is None
            or issubclass(kind, KeyboardInterrupt | SystemExit | NotFinite)
            or not self.unsaved()
        ):
            return
        try:
            self.save()
            said = "an error ends the run; it is saved as it was after the last whole step"
        except (OSError, ValueError, RuntimeError) as error:
            said = f"an error ends the run, and it cannot be saved: {error}"
        print(f"\n{said}", file=sys.stderr)


def way_on(script: str, folder: Path) -> str:
    """The command that continues a run."""
    return f"continue with: python -m train.{script} --resume {folder}"


def way_back(script: str, folder: Path) -> str:
    """How a run that numbers stopped which are not finite can go on from before that."""
    sound = checkpoint.newest_sound(folder / "checkpoints")
    if sound is None:
        return f"{folder} has no checkpoint from before that"
    newer = [file.name for file in checkpoint.files(folder / "checkpoints") if file > sound]
    first = f"delete {' and '.join(newer)}, then " if newer else ""
    return f"the newest checkpoint from before that is {sound}\n{first}{way_on(script, folder)}"
