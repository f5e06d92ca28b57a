"""Save a run that an error ends, and name the command that resumes it."""

import sys
from collections.abc import Callable
from pathlib import Path

from models.finite import NotFinite
from train.run import checkpoint


class SaveOnError:
    """Save what an error in the block would lose: call `save()`, where `unsaved()`.

    A second Ctrl-C is no error: it stops at once. Where saving fails, a message says so, and the
    error of the block is raised all the same.
    """

    def __init__(self, unsaved: Callable[[], bool], save: Callable[[], None]):
        self.unsaved = unsaved
        self.save = save

    def __enter__(self) -> "SaveOnError":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt | SystemExit | NotFinite):
            return
        if not self.unsaved():
            return
        try:
            self.save()
            message = "an error ends the run; it is saved as it was after the last whole step"
        except (OSError, ValueError, RuntimeError) as error:
            message = f"an error ends the run, and it cannot be saved: {error}"
        print(f"\n{message}", file=sys.stderr)


def resume_command(script: str, folder: Path) -> str:
    """Write the command that continues a run."""
    return f"continue with: python -m train.{script} --resume {folder}"


def recovery_hint(script: str, folder: Path) -> str:
    """Say how to go on from before a run's numbers stopped being finite."""
    sound = checkpoint.newest_sound(folder / "checkpoints")
    if sound is None:
        return f"{folder} has no checkpoint from before that"
    newer = [file.name for file in checkpoint.files(folder / "checkpoints") if file > sound]
    command = resume_command(script, folder)
    if newer:
        command = f"delete {' and '.join(newer)}, then {command}"
    return f"the newest checkpoint from before that is {sound}\n{command}"
