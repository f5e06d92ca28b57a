"""Write files whole: a file is written under another name, then renamed.

A crash or a full disk leaves the file as it was. The one place for this: `models` and `train` save
files, and `models` may not import `train`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

PARTIAL = ".partial"  # the suffix of a file that is being written


@contextmanager
def whole(file: Path, sync: bool = True, tag: str = "") -> Iterator[Path]:
    """Give the name to write `file` under, which becomes `file` at the end of the block.

    Where the block raises, `file` is what it was. Its permissions are those of the umask, whatever
    writes it. With `sync` the data are on the disk before the file has its name, so that no loss of
    power leaves half of it. `tag` tells writers apart that may meet at one file. Raises OSError
    that names the file where the disk is full or cannot be written.
    """
    name = f"{file.name}.{tag}" if tag else file.name
    partial = file.with_name(name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        # safetensors makes a file of its own, which only its owner may read
        if partial.stat().st_mode != mode:
            partial.chmod(mode)
        if sync:
            _to_disk(partial, os.O_RDWR)
        partial.replace(file)
        if sync and hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
            _to_disk(file.parent, os.O_RDONLY)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {file}: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_whole(file: Path, content: str | bytes, sync: bool = True) -> None:
    """Write a text or bytes as `whole` does; OSError that names the file."""
    with whole(file, sync) as partial:
        # not as text: Windows would write other ends of lines
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def _to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
