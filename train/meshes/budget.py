"""The memory that reading a file may take: 500 MB, and 50 bytes for each byte of the file.

Small files can ask for much: a picture of one colour, a mesh at ten thousand places, an array of
which the file says the length alone. Each is weighed before it is made.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.meshes.files import read_file

try:
    import resource
except ImportError:  # Windows has none, and no /proc either
    resource = None

FREE = 500_000_000  # bytes
A_BYTE = 50  # so many more for each byte of the file and of those that it names
FACE = 250  # bytes that a triangle takes while it is read, drawn and made voxels
VERTEX = 120
KIB = 1024


class Budget:
    """The memory that the reading of one file and those that it names may take."""

    def __init__(self):
        self.size = 0  # bytes of the files
        self.taken = 0
        self._held: int | None = None  # what the process had when the limit began to be enforced
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
            self._hold()

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

    def take_faces(self, faces: int, vertices: int, face: int = FACE) -> None:
        """Count triangles, of `face` bytes each, and vertices; ValueError for too many."""
        size = faces * face + vertices * VERTEX
        self.take(size, f"a mesh of {faces} faces and {vertices} vertices")

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Let this process take no more than the limit: what no check foresaw is a MemoryError.

        Only Linux does so; elsewhere, and below a lower limit of the user's, nothing changes.
        """
        self._held = _private()
        before = resource.getrlimit(resource.RLIMIT_DATA) if self._held else None
        try:
            self._hold()
            yield
        finally:
            self._held = None
            if before:
                resource.setrlimit(resource.RLIMIT_DATA, before)

    def _hold(self) -> None:
        if self._held is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            most = self._held + self.limit
            if hard == resource.RLIM_INFINITY or most < hard:
                resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _megabytes(size: int) -> int:
    return -(-size // 1_000_000)


def _private() -> int | None:
    """The bytes of this process that RLIMIT_DATA counts; None where the system does not tell."""
    status = Path("/proc/self/status")
    if resource is None or not status.is_file():
        return None
    lines = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
    return next((int(words[1]) * KIB for words in lines if words[:1] == ["VmData:"]), None)
