"""Files that are whole or as they were: each is written under another name, then takes its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

PARTIAL = ".partial"  # the end of such another name


@contextmanager
def whole(file: Path, sync: bool = True, tag: str = "") -> Iterator[Path]:
    """Give the name to write `file` under; at the end of the block it becomes `file`.

    Where the block raises, `file` is what it was. Its permissions are those of the umask, whatever
    writes it. With `sync` the data are on the disk before the file has its name, so that no loss of
    power leaves half of it. `tag` tells writers apart that may meet at one file. Raises OSError
    that names the file where the disk is full or cannot be written.
    """
    partial = file.with_name(".".join([file.name, *([tag] if tag else [])]) + PARTIAL)
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        if (
            partial.stat().st_mode != mode
        ):  # safetensors makes a file of its own, which only its owner may read
            partial.chmod(mode)
        if sync:
            _to_disk(partial)
        partial.replace(file)
        if sync:
            _to_disk(file.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {file}: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_whole(file: Path, content: str | bytes, sync: bool = True) -> None:
    """Write a text or bytes as `whole` does; OSError that names the file."""
    with whole(file, sync) as partial:
        if isinstance(content, str):
            partial.write_text(content, encoding="utf-8")
        else:
            partial.write_bytes(content)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
