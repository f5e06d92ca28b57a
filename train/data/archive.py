"""Read arrays of an npz file from elsewhere: what a header announces is checked before it is made.

numpy.load makes an array as large as its header says, and unpacks a megabyte to ten gigabytes.
"""

import math
import tokenize
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from models.reading import check_file, shown
from train.meshes.budget import Budget
from train.meshes.untrusted import MALFORMED, reason

PREFIX = 10  # bytes before the header of an array: magic, version, length of the header
KINDS = "biuf"  # booleans, integers, numbers of floating point
BLOCK = 1 << 20  # bytes that are unpacked at once
READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes


@dataclass(frozen=True)
class Header:
    """The type and shape that an array in a file has."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool  # the first axis is the fastest
    start: int  # bytes before its numbers

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {shown(list(self.shape))}"


class Archive:
    """The arrays of an npz file, read one by one; ValueError, with its name, for what is none."""

    def __init__(self, file: Path):
        self.file = file
        self.budget = Budget()
        check_file(file)
        self.budget.count(file)

    def __enter__(self) -> "Archive":
        try:
            self._zip = zipfile.ZipFile(self.file)
        except (zipfile.BadZipFile, OSError, *MALFORMED) as error:
            raise self._refusal(f"truncated, or not an npz archive ({reason(error)})") from error
        self._members = {one.filename.removesuffix(".npy"): one for one in self._zip.infolist()}
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    def _refusal(self, text: str) -> ValueError:
        return ValueError(f"{self.file} cannot be read: {text}")

    @property
    def comment(self) -> bytes:
        """The remark at the end of the archive, empty where there is none."""
        return self._zip.comment

    def expect(self, names: set[str]) -> None:
        """Raise ValueError where an array is absent."""
        if missing := names - self._members.keys():
            held = ", ".join(shown(name)[1:-1] for name in list(self._members)[:9])
            raise self._refusal(
                f"no array {' and '.join(sorted(missing))}, only {held or 'nothing'}"
            )

    def check(self, size: int) -> None:
        """Raise ValueError where a file of this size may not take so many bytes of memory."""
        try:
            self.budget.check(size, "its arrays")
        except ValueError as error:
            raise self._refusal(str(error)) from error

    def header(self, name: str) -> Header:
        """Read the header of an array; ValueError where its member holds another number of bytes.

        Only numbers are taken, as numpy writes them: no objects, which are pickles.
        """
        member = self._members[name]
        if member.flag_bits & 1:
            raise self._refusal(f"{member.filename} is encrypted")
        if member.compress_type not in READABLE:
            raise self._refusal(f"{member.filename} is compressed in a way that numpy does not use")
        try:
            with self._zip.open(member) as stream:
                header = _header(stream)
        # the second: numpy looks for the numbers of Python 2 in a header that it cannot parse
        except (zipfile.BadZipFile, tokenize.TokenError, OSError, *MALFORMED) as error:
            raise self._refusal(f"{shown(member.filename)}: {reason(error)}") from error
        if header.start + header.size != member.file_size:
            raise self._refusal(
                f"{member.filename} announces {header}, {header.size} bytes, but has "
                f"{member.file_size - header.start}"
            )
        return header

    def read(self, name: str) -> np.ndarray:
        """Read an array; ValueError where it is damaged. `check` is asked before."""
        header = self.header(name)
        flat = np.empty(math.prod(header.shape), header.dtype)
        place = memoryview(flat).cast("B") if flat.size else memoryview(b"")
        done = 0
        try:
            with self._zip.open(self._members[name]) as stream:
                stream.read(header.start)
                while done < len(place):
                    block = stream.read(min(BLOCK, len(place) - done))
                    if not block:
                        raise EOFError(f"it ends after {done} of {len(place)} bytes")
                    place[done : done + len(block)] = block
                    done += len(block)
        except (zipfile.BadZipFile, OSError, *MALFORMED) as error:
            raise self._refusal(f"{name}: {reason(error)}") from error
        return flat.reshape(header.shape, order="F" if header.fortran else "C")


def _header(stream: BinaryIO) -> Header:
    """The header of a .npy; ValueError for one of objects, of structures or of a later version.

    Those have names in it that need a longer one; numpy writes the first version for numbers.
    """
    head = stream.read(PREFIX)
    if np.lib.format.read_magic(BytesIO(head)) != (1, 0):
        raise ValueError("it is of a version of .npy that no array of numbers needs")
    length = int.from_bytes(head[8:], "little")
    text = head[8:] + stream.read(length)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(BytesIO(text))
    if dtype.kind not in KINDS:
        raise ValueError(f"it holds {dtype}, not numbers")
    if any(side < 0 for side in shape):
        raise ValueError(f"it has the shape {shown(list(shape))}")
    return Header(dtype, shape, fortran, PREFIX + length)
