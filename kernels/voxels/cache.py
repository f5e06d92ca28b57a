"""A cache of everything that is derived from one coordinate set.

It holds row ranges, the table, neighbours, windows and other scales, each made once. It belongs to
the coordinates, not to a tensor: tensors over the same voxels share it. Building one waits for the
device once. Deriving from it does not wait, except for pooling, which builds a coordinate set too.

Coordinate sets made from one another form a family: going down, up and down again arrives at the
set that was there before. Scales refer to each other by number, so a family is no reference cycle,
and its memory is freed with its last cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kernels.checks import check_whole
from kernels.voxels.coords import LIMIT, check_coords, pack, unpack

T = TypeVar("T")


@dataclass(eq=False)
class _Scale:
    """One coordinate set of a family, and everything made from it."""

    coords: Tensor  # [N, 4] int32: batch, x, y, z
    starts: Tensor  # [B + 1] int32
    counts: list[int] | None
    extent: tuple[int, int, int]
    made: dict = field(default_factory=dict)
    # ("pool", 2) -> (scale number, index)
    links: dict[tuple[str, int], tuple[int, Tensor]] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0


@dataclass(eq=False)
class _Family:
    """Coordinate sets made from one another."""

    scales: list[_Scale] = field(default_factory=list)
    # scale number -> its cache
    caches: WeakValueDictionary = field(default_factory=WeakValueDictionary)

    def add(self, scale: _Scale) -> int:
        self.scales.append(scale)
        return len(self.scales) - 1


class SpatialCache:
    """One checked coordinate set and everything made from it.

    coords [N, 4] int32 (batch, x, y, z): samples in order, no duplicates, 0 to 1023; B samples, of
    which any may be empty. Building it waits once for the device. Raises ValueError, naming the
    row, where `check_coords` does.
    """

    coords: Tensor  # [N, 4] int32
    starts: Tensor  # [B + 1] int32, on the device: sample b owns rows starts[b] : starts[b + 1]
    counts: list[int] | None  # rows of each sample, on the host; None where they were not read
    extent: tuple[int, int, int]  # every coordinate is below it, per axis, on the host
    batch_size: int

    def __init__(self, coords: Tensor, batch_size: int | None = None):
        known, starts = check_coords(coords, batch_size)
        family = _Family()
        scale = _Scale(coords.contiguous(), starts, known.counts, known.size)
        self._join(family, family.add(scale))

    @classmethod
    def unread(
        cls, coords: Tensor, batch_size: int, extent: tuple[int, int, int]
    ) -> "SpatialCache":
        """A cache over coordinates that nobody checks or reads; its `counts` is None."""
        samples = torch.arange(batch_size + 1, dtype=torch.int32, device=coords.device)
        starts = torch.searchsorted(coords[:, 0].contiguous(), samples, out_int32=True)
        cache = cls.__new__(cls)
        family = _Family()
        cache._join(family, family.add(_Scale(coords, starts, None, extent)))
        return cache

    def _join(self, family: _Family, number: int) -> None:
        self._family = family
        self._number = number
        self._scale = family.scales[number]
        self.coords = self._scale.coords
        self.starts = self._scale.starts
        self.counts = self._scale.counts
        self.extent = self._scale.extent
        self.batch_size = len(self.starts) - 1
        family.caches[number] = self

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def hits(self) -> int:
        return self._scale.hits

    @property
    def misses(self) -> int:
        return self._scale.misses

    def get(self, make: Callable[..., T], *args) -> T:
        """The result of make(self, *args), computed once for each function and arguments."""
        made = self._scale.made
        if (make, args) in made:
            if not torch.compiler.is_compiling():  # which allows no side effects everywhere
                self._scale.hits += 1
        else:
            self._scale.misses += 1
            made[make, args] = make(self, *args)
        return made[make, args]

    def subdivide(self) -> "SpatialCache":
        """Divide every voxel into its 8 children at twice the resolution.

        The children of row n are rows 8n to 8n + 7, z fastest. `pool(2)` of the result is this
        cache again. Raises ValueError where a child would lie beyond 1023.
        """
        cache, _ = self._follow("subdivide", 2, self._make_children)
        return cache

    @property
    def parent(self) -> "SpatialCache | None":
        """The cache whose `subdivide` made this one; None for any other."""
        if ("pool", 2) not in self._scale.links:
            return None
        number, _ = self._scale.links["pool", 2]
        child = self._family.scales[number].links.get(("subdivide", 2))
        if child is None or child[0] != self._number:
            return None
        return self.pool(2)[0]

    def pool(self, factor: int = 2) -> tuple["SpatialCache", Tensor]:
        """Find the coarser voxels that hold these; also returns each one's coarse row, [N] int32.

        The coarse voxels are in order of (batch, x, y, z). Waits for the device once to build them
        (their number is not known before), never again. Pooling by 2 what `subdivide` made gives
        the parent back, in the parent's own row order. Raises ValueError for a factor that is not
        whole or below 1.
        """
        check_whole("pool factor", factor)
        return self._follow("pool", factor, lambda: self._make_pool(factor))

    def unpool(self, factor: int = 2) -> tuple["SpatialCache", Tensor]:
        """Return to the voxels that were pooled into these by that factor.

        Also returns the row here of each of them, as `pool` did. Raises ValueError for a cache that
        no `pool(factor)` made.
        """
        if ("unpool", factor) not in self._scale.links:
            known = sorted(f for kind, f in self._scale.links if kind == "unpool")
            raise ValueError(
                f"these voxels were not pooled by {factor}; factors that made them: "
                f"{known or 'none'}"
            )
        return self._follow("unpool", factor, None)

    def _follow(
        self, kind: str, factor: int, make: Callable | None
    ) -> tuple["SpatialCache", Tensor]:
        """Go to another scale of the family, and `make` it if it is not there yet."""
        links = self._scale.links
        if (kind, factor) in links:
            self._scale.hits += 1
        else:
            self._scale.misses += 1
            scale, index = make()
            number = self._family.add(scale)
            links[kind, factor] = number, index
            scale.links["pool" if kind == "subdivide" else "unpool", factor] = self._number, index
        number, index = links[kind, factor]
        cache = self._family.caches.get(number)
        if cache is None:
            cache = SpatialCache.__new__(SpatialCache)
            cache._join(self._family, number)
        return cache, index

    def _make_children(self) -> tuple[_Scale, Tensor]:
        if 2 * max(self.extent) > LIMIT and len(self):
            raise ValueError(
                f"children of coordinate {max(self.extent) - 1} lie beyond {LIMIT - 1}, the "
                "largest coordinate"
            )
        octant = torch.arange(8, dtype=torch.int32, device=self.coords.device)
        offset = torch.stack([octant * 0, octant >> 2, octant >> 1 & 1, octant & 1], 1)  # [8, 4]
        corner = torch.cat([self.coords[:, :1], 2 * self.coords[:, 1:]], 1)
        coords = (corner[:, None] + offset).view(-1, 4)
        parent = torch.arange(len(coords), dtype=torch.int32, device=coords.device) // 8
        extent = tuple(2 * e for e in self.extent)
        return _Scale(coords, self.starts * 8, [8 * n for n in self.counts], extent), parent

    def _make_pool(self, factor: int) -> tuple[_Scale, Tensor]:
        coarse = torch.cat([self.coords[:, :1], self.coords[:, 1:] // factor], 1)
        keys, order = pack(coarse).sort(stable=True)
        begins = torch.ones_like(keys, dtype=torch.int32)
        begins[1:] = keys[1:] != keys[:-1]
        # coarse voxels before each sorted position
        rank = torch.cat([begins.new_zeros(1), begins.cumsum(0, dtype=torch.int32)])
        starts = rank[self.starts.long()]
        edges = starts.tolist()  # the one wait for the device
        index = torch.empty_like(begins).scatter_(0, order, rank[1:] - 1)
        # equal keys are written to one place
        distinct = keys.new_empty(edges[-1]).scatter_(0, rank[1:].long() - 1, keys)
        extent = tuple((e - 1) // factor + 1 for e in self.extent)
        counts = [b - a for a, b in pairwise(edges)]
        return _Scale(unpack(distinct), starts, counts, extent), index
