"""Folders of results: how they are made, and held, so that one process alone writes into each."""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from models.files import PARTIAL
from train.data.metadata import inside

try:
    import fcntl
except ImportError:  # Windows has another module
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

LOCK = ".lock"
# of a file system that knows no locks
WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Hold a folder to the end or the death of this process, rid of what a killed run left there.

    Where the system or the file system knows no locks, a line says so, and nothing is held. Raises
    ValueError where another process holds it.
    """
    with _lock_file(folder / LOCK) as file:
        try:
            held = _lock(file)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"run folder {folder} is in use by another process") from error
        if not held:
            print(f"{folder} cannot be locked here: start no second run in it")
        try:
            sweep(folder)
            yield folder
        finally:
            # closing is not enough where data workers still have it open
            if held:
                _unlock(file)


def _lock(file: BinaryIO) -> bool:
    """Take a lock that ends with this process; returns False where there are none.

    Raises BlockingIOError, on Windows PermissionError, where another process has it.
    """
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            # the first byte, which an empty file need not have
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return bool(fcntl or msvcrt)
    except OSError as error:
        if error.errno in WITHOUT:
            return False
        raise


def _unlock(file: BinaryIO) -> None:
    with suppress(OSError):
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_UN)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


def _lock_file(path: Path) -> BinaryIO:
    """Open a lock for writing; ValueError where it is no file: a pipe would wait for its reader.

    What a link leads to is left alone.
    """
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK"):  # where the system has them
        flags |= getattr(os, name, 0)
    try:
        opened = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP or path.is_dir():
            raise ValueError(f"{path} is no file: delete it, it is the lock of a run") from error
        raise
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise ValueError(f"{path} is no file: delete it, it is the lock of a run")
    return os.fdopen(opened, "rb+")


@contextmanager
def made(folder: Path) -> Iterator[Path]:
    """Make a folder with its parents; those that are empty at the end are deleted again.

    Only what was made here is deleted. Raises OSError where it cannot be made.
    """
    absent = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        _make(folder)
        yield folder
    finally:
        for one in absent:
            with suppress(OSError):  # it holds something
                one.rmdir()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be made: {error.strerror}") from error


def free_folders(out: Path, titles: Sequence[str]) -> list[Path]:
    """Choose a folder in OUT for each title; ValueError where one is taken, or OUT is a file."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is no folder")
    chosen = []
    for title in titles:
        folder = inside(out, title)
        number = 2
        while folder in chosen:
            folder = inside(out, f"{title}-{number}")
            number += 1
        if folder.exists():
            raise ValueError(f"{folder} is there already: choose another --out")
        chosen.append(folder)
    return chosen


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `folder` at the end of the block.

    Where the block raises, it is deleted with what is in it.
    """
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    with made(partial):
        try:
            yield partial
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_folder(script: str, out: str | None) -> Iterator[Path]:
    """Make the folder of a run and hold it: OUT, new or empty, or the next free runs/SCRIPT-NNN.

    Of runs that start at once with one OUT, one gets it, and the others write nothing. Raises
    ValueError for a folder that is in use, not empty or cannot be written.
    """
    folder = Path("runs" if out is None else out)
    if out is not None:
        _check_empty(folder)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if out is None:
                folder = _numbered(folder, script)
            stack.enter_context(locked(folder))
        except OSError as error:
            raise ValueError(f"run folder {folder} cannot be written: {error}") from error
        _check_empty(folder)  # again: another run may have had it in between
        yield folder


def _check_empty(folder: Path) -> None:
    if not folder.is_dir():
        return
    others = (file.name for file in folder.iterdir() if file.name != LOCK)
    if not all(LEFTOVERS.fullmatch(name) for name in others):
        raise ValueError(
            f"--out {folder} is not empty: choose another folder, or continue that run with "
            f"--resume {folder}"
        )


def _numbered(parent: Path, script: str) -> Path:
    """Make the next PARENT/SCRIPT-NNN: of runs that start at once, each gets its own."""
    names = (path.name for path in parent.glob(f"{script}-*"))
    matches = (re.fullmatch(rf"{script}-(\d+)", name) for name in names)
    taken = [int(match[1]) for match in matches if match]
    for number in count(max(taken, default=0) + 1):
        folder = parent / f"{script}-{number:03d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


# of what a run writes, by the path in its folder; the last line are names of earlier versions
LEFTOVERS = re.compile(
    r"(config\.json|memory\.json|log\.jsonl|curves\.png|evaluation\.json|samples/step_\d+\.png"
    r"|checkpoints/(step_\d+|encoder|decoder)\.(safetensors|json)"
    r"|latents/\w+/[^/]+\.safetensors\.\d+"
    r"|config|log|evaluation|checkpoints/step_\d+|latents/\w+/[^/]+\.\d+)\.partial"
)


def sweep(folder: Path) -> None:
    """Delete what a run that was killed while it wrote has left in its folder, and nothing else.

    This process must hold the folder: another run's are files in the making.
    """
    for file in folder.rglob(f"*{PARTIAL}"):
        if LEFTOVERS.fullmatch(file.relative_to(folder).as_posix()) and file.is_file():
            file.unlink(missing_ok=True)
