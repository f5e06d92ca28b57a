"""Folders of results: made, held so that one process alone writes into each, and found again.

A run's is found by ranks that torchrun starts again, as after the death of one (--max-restarts):
the command is the same each time. So a run records who launched it, and goes on where it finds its
own launch.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import BinaryIO

from models.files import PARTIAL, write_whole
from train.config import Config, read_config
from train.data.metadata import inside
from train.run.machine import Machine
from train.run.ranks import RESTARTS

try:
    import fcntl
except ImportError:  # Windows has another module
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

LOCK = ".lock"
LAUNCH = ".launch"  # who launched the ranks of a run
RUNS = Path("runs")  # where a run without --out gets its folder
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
def new_folder(script: str, out: str | None, launches: Sequence[str | None] = ()) -> Iterator[Path]:
    """Make the folder of a run and hold it: OUT, new or empty, or the next free runs/SCRIPT-NNN.

    It records who launched the ranks. Of runs that start at once with one OUT, one gets it, and the
    others write nothing. Raises ValueError for a folder that is in use, not empty or cannot be
    written.
    """
    folder = RUNS if out is None else Path(out)
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
        if names := sorted({name for name in launches if name}):
            write_whole(folder / LAUNCH, "\n".join(names) + "\n")
        yield folder


def _check_empty(folder: Path) -> None:
    if not folder.is_dir():
        return
    others = (file.name for file in folder.iterdir() if file.name not in (LOCK, LAUNCH))
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


# of what a run writes, by the path in its folder; the last line has names of earlier versions
LEFTOVERS = re.compile(
    r"(config\.json|memory\.json|log\.jsonl|curves\.png|evaluation\.json|samples/step_\d+\.png"
    r"|checkpoints/(step_\d+|encoder|decoder)\.(safetensors|json)"
    r"|latents/\w+/[^/]+\.safetensors\.\d+"
    r"|\.launch|config|log|evaluation|checkpoints/step_\d+|latents/\w+/[^/]+\.\d+)\.partial"
)


def sweep(folder: Path) -> None:
    """Delete what a run that was killed while it wrote has left in its folder, and nothing else.

    This process must hold the folder: another run's are files in the making.
    """
    for file in folder.rglob(f"*{PARTIAL}"):
        if LEFTOVERS.fullmatch(file.relative_to(folder).as_posix()) and file.is_file():
            file.unlink(missing_ok=True)


def launch() -> str | None:
    """Name this start of torchrun on this host, the same for all ranks that it starts; else None.

    An id that the user gave may be that of an earlier start too; torchrun's folder is new each
    time.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parts = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parts
    # FOLDER/attempt_N/RANK/error.json
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {'/'.join(parts[:-3])}"


def continued(
    script: str,
    presets: Mapping[str, Config],
    config: Config,
    here: Machine,
    launches: Sequence[str | None],
) -> Config:
    """Change the config of ranks that torchrun starts again to that of the run which they began.

    It is the given one where they had begun none.
    """
    again = max(here.gather(int(os.environ.get(RESTARTS, 0))))
    if not again or config.resume:
        return config
    folder = here.broadcast(_begun(script, config.out, launches) if here.is_main else None)
    if folder is None:
        return config
    if not (folder / "config.json").is_file():
        return replace(config, out=str(folder))
    if here.is_main:
        print(f"torchrun starts the ranks again (restart {again}): {folder} goes on")
    return replace(read_config(folder / "config.json", script, presets), resume=str(folder))


def _begun(script: str, out: str | None, launches: Sequence[str | None]) -> Path | None:
    """Find the folder of the run that these launches began; None where there is none."""
    folders = [Path(out)] if out else sorted(RUNS.glob(f"{script}-*"), reverse=True)
    for folder in folders:
        if (folder / LAUNCH).is_file():
            lines = (folder / LAUNCH).read_text(encoding="utf-8", errors="replace").splitlines()
            if set(lines) & set(launches):
                return folder
    return None
