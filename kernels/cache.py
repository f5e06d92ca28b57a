"""SpatialCache: what is derived from one coordinate set, made once: row ranges, table, neighbours, windows.

It belongs to the coordinates, not to a tensor: tensors over the same voxels share it. Building it reads the device once;
nothing made from it does.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from kernels.hash import check_coords

T = TypeVar("T")


class SpatialCache:
    """One checked coordinate set and what was made from it.

    coords [N, 4] int32 (batch, x, y, z): samples in order, no duplicates, 0 to 1023; B samples, of which any may be empty.
    Raises ValueError, naming the row, where `check_coords` does. Building it is the one read of the device.
    """

    def __init__(self, coords: Tensor, batch_size: int | None = None):
        known, self.starts = check_coords(coords, batch_size)  # starts: [B + 1] int32, row ranges of the samples
        self.coords = coords.contiguous()
        self.counts = known.counts  # rows of each sample, on the host
        self.extent = known.size  # every coordinate is below it, per axis, on the host
        self.batch_size = len(known.counts)
        self._made: dict = {}
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self.coords)

    def get(self, make: Callable[..., T], *args) -> T:
        """make(self, *args), made once for every function and arguments."""
        if (make, args) in self._made:
            self.hits += 1
        else:
            self.misses += 1
            self._made[make, args] = make(self, *args)
        return self._made[make, args]
