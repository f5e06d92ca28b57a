"""Lose nothing to an error: wait while a disk is full, save a run that ends, say how it resumes."""

import errno
import sys
import time
from collections.abc import Callable
from pathlib import Path

from models.finite import NotFinite
from train.run import checkpoint

PATIENCE = 600.0  # seconds until a run ends; half of what the other ranks wait for
PAUSE = 5.0  # seconds between two attempts
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


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


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or what it was raised from, is that of a full disk or quota."""
    while error is not None:
        # safetensors gives the number in words alone
        words = any(f"os error {number})" in str(error) for number in FULL)
        if words or isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__
    return False


def retried(write: Callable[[], object], stopped: Callable[[], bool] = lambda: False) -> None:
    """Call `write`, again and again while the disk is full, for at most PATIENCE seconds.

    What it did before it failed must not matter. Raises its OSError at the end, and at once where
    `stopped()` or where the disk is not full.
    """
    begin = time.monotonic()
    told = False
    while True:
        try:
            write()
        except OSError as error:
            if not is_full(error) or stopped() or time.monotonic() - begin >= PATIENCE:
                raise
            if not told:
                wait = f"waiting for room, for {PATIENCE / 60:.0f} minutes at most"
                print(f"\n{error}: {wait}", file=sys.stderr, flush=True)
                told = True
            time.sleep(PAUSE)
            continue
        if told:
            print("there is room again: the run goes on", file=sys.stderr, flush=True)
        return


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
