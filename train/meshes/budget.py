"""The memory that reading a file may take: 500 MB, and 50 bytes for each byte of the file.

Small files can ask for much: a picture of one colour, a mesh at ten thousand places, an array of
which the file says the length alone. Each is weighed before it is made.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.meshes.files import read_file

FREE = 500_000_000  # bytes
A_BYTE = 50  # so many more for each byte of the file and of those that it names
FACE = 400  # bytes that a triangle takes while it is read, drawn and made voxels
VERTEX = 150
KIB = 1024


class Budget:
    """The memory that the reading of one file and those that it names may take."""

    def __init__(self):
        self.size = 0  # bytes of the files
        self.taken = 0
        self._known: set[str] = set()

    @property
    def limit(self) -> int:
        """Bytes in all."""
        return FREE + A_BYTE * self.size

    def read(self, path: Path) -> bytes:
        """Read a file; its size adds to the limit, once."""
        self.count(path)
        return read_file(path)

    def count(self, path: Path) -> None:
        """Add the size of a file to the limit, once."""
        place = os.path.realpath(path)
        if place not in self._known:
            self._known.add(place)
            self.size += path.stat().st_size

    def check(self, size: int, what: str) -> None:
        """Raise ValueError, naming `what`, where so many bytes more are too many."""
        if self.taken + size > self.limit:
            raise ValueError(
                f"{what} would take {_megabytes(self.taken + size)} MB of memory, over the limit "
                f"of {_megabytes(self.limit)} MB for files of {self.size} bytes"
            )

    def take(self, size: int, what: str) -> None:
        """Count bytes that stay in use; ValueError as `check`."""
        self.check(size, what)
        self.taken += size

    def take_faces(self, faces: int, vertices: int) -> None:
        """Count triangles and vertices; ValueError for too many."""
        size = faces * FACE + vertices * VERTEX
        self.take(size, f"a mesh of {faces} faces and {vertices} vertices")


def _megabytes(size: int) -> int:
    return -(-size // 1_000_000)


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Let this process take at most so many bytes more than it has; beyond is a MemoryError.

    For what no check foresees. Only Linux does so; elsewhere, and under a lower limit of the
    user's, nothing changes.
    """
    used = _private()
    if used is None:
        yield
        return
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [used + size, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _private() -> int | None:
    """The bytes of this process that RLIMIT_DATA counts; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = (line.split() for line in status.read_text().splitlines())
    return next((int(words[1]) * KIB for words in lines if words[:1] == ["VmData:"]), None)
