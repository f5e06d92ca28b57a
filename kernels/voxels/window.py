"""Windows of voxels that attend to themselves, without sort, atomics or waiting.

N rows (batch, x, y, z), M windows. Occupancy is scattered into a dense grid whose cells are
numbered window by window; one scan of it gives every row its position (rank = occupied cells before
its own) and, read once per window, the window starts. The order is canonical: it does not depend on
the order of the input rows. The window of a voxel is floor((c + shift) / w) per axis, counted from
the origin, never from the object's corner; nothing rolls or wraps, so windows at the border are
smaller (Swin without masks). A grid too large to scan is replaced by a stable sort of the same cell
numbers, with the same result.

Numbers that travel together through the kernels: wx, wy, wz are a window's size, sx, sy, sz the
shift, nx, ny, nz the windows along each axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.checks import host_list
from kernels.voxels.cache import SpatialCache

TILE = 512  # rows per program; not yet measured on a GPU (the kernels are launch-bound)
# grid cells up to which the scan is taken (128 MB of int32); above it, sorting N keys is cheaper
DENSE_CELLS = 1 << 25
MOST_WINDOWS = 1 << 28  # starts is written for every window, empty ones included


class lazy:
    """functools.cached_property without its lock (Python 3.11): torch.compile cannot trace it."""

    def __init__(self, make: Callable[[Any], Any]):
        self.make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.make(instance)
        return value


@dataclass(frozen=True, eq=False)
class Windows:
    """Rows grouped into segments: M windows over N rows, empty windows included, each row in one.

    The rows of a window attend to themselves, or, where `keys` says so, to a list of rows that may
    be in other windows too.
    """

    order: Tensor  # [N] int32: the row at each window-sorted position
    starts: Tensor  # [M + 1] int32: window m owns the sorted positions starts[m] : starts[m + 1]
    # no window has more rows than this (its volume, or N for full attention); known without waiting
    bound: int
    keys: Tensor | None = None  # [K] int32: rows attended to
    # [M + 1] int32: window m attends to keys[key_starts[m] : key_starts[m + 1]]
    key_starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @lazy
    def lengths(self) -> Tensor:
        """Rows of each window, [M] int32."""
        return self.starts.diff()

    @lazy
    def segment(self) -> Tensor:
        """The window of each sorted position, [N] int32."""
        position = torch.arange(len(self.order), dtype=torch.int32, device=self.order.device)
        return torch.searchsorted(self.starts[1:], position, right=True, out_int32=True)

    @lazy
    def uses(self) -> tuple[Tensor, Tensor]:
        """The positions of each row in `keys`, ascending.

        Returns the positions [K] int32, row after row, and where each row's positions begin,
        [N + 1] int32.
        """
        rows, slots = self.keys.sort(stable=True)
        edges = torch.arange(len(self.order) + 1, dtype=torch.int32, device=rows.device)
        return slots.int(), torch.searchsorted(rows, edges, out_int32=True)


@triton.jit
def _cell(coords_ptr, row, live, wx, wy, wz, sx, sy, sz, nx, ny, nz):
    """The cell of each row, numbered window by window.

    A row outside the grid gets the number of cells or more, or -1.
    """
    c = coords_ptr + row.to(tl.int64) * 4
    b = tl.load(c, mask=live, other=0)  # [TILE]
    x = tl.load(c + 1, mask=live, other=0) + sx
    y = tl.load(c + 2, mask=live, other=0) + sy
    z = tl.load(c + 3, mask=live, other=0) + sz
    window = ((b * nx + x // wx) * ny + y // wy) * nz + z // wz
    local = (x % wx * wy + y % wy) * wz + z % wz
    inside = (
        (x >= sx) & (x < nx * wx) & (y >= sy) & (y < ny * wy) & (z >= sz) & (z < nz * wz) & (b >= 0)
    )
    return tl.where(inside, window * (wx * wy * wz) + local, -1)


# these vary with the data: no specialised variants
GEOMETRY = ["N", "wx", "wy", "wz", "sx", "sy", "sz", "nx", "ny", "nz", "cells"]


@triton.jit(do_not_specialize=GEOMETRY)
def _occupy(
    coords_ptr, occupied_ptr, N, wx, wy, wz, sx, sy, sz, nx, ny, nz, cells, TILE: tl.constexpr
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = row < N
    cell = _cell(coords_ptr, row, live, wx, wy, wz, sx, sy, sz, nx, ny, nz)
    tl.store(occupied_ptr + cell + 1, 1, mask=live & (cell >= 0) & (cell < cells))


@triton.jit(do_not_specialize=GEOMETRY)
def _rank(
    coords_ptr,
    before_ptr,
    order_ptr,
    N,
    wx,
    wy,
    wz,
    sx,
    sy,
    sz,
    nx,
    ny,
    nz,
    cells,
    TILE: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = row < N
    cell = _cell(coords_ptr, row, live, wx, wy, wz, sx, sy, sz, nx, ny, nz)
    live = live & (cell >= 0) & (cell < cells)
    rank = tl.load(before_ptr + cell, mask=live, other=0)
    tl.store(order_ptr + rank, row, mask=live)


def _grid(extent: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> list[int]:
    """Windows along each axis, for a shift below the window.

    A larger shift would add empty windows below the origin.
    """
    return [(e - 1 + s) // w + 1 for e, w, s in zip(extent, window, shift, strict=True)]


def _cells(
    coords: Tensor, samples: int, window: Sequence[int], shift: Sequence[int], grid: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The window and the cell of each row, [N] int64, as `_cell` numbers them.

    A row outside the grid gets the number of windows and of cells.
    """
    b = coords[:, 0].long()
    c = [coords[:, a + 1].long() + shift[a] for a in range(3)]
    inside = (coords >= 0).all(1) & (b < samples)
    for a in range(3):
        inside &= c[a] < grid[a] * window[a]
    inner = [c[a] % window[a] for a in range(3)]
    c = [c[a] // window[a] for a in range(3)]
    number = ((b * grid[0] + c[0]) * grid[1] + c[1]) * grid[2] + c[2]
    volume = window[0] * window[1] * window[2]
    M = samples * grid[0] * grid[1] * grid[2]
    cell = number * volume + (inner[0] * window[1] + inner[1]) * window[2] + inner[2]
    return torch.where(inside, number, M), torch.where(inside, cell, M * volume)


def _refuse(coords: Tensor, samples: int, extent: Sequence[int]) -> None:
    """ValueError naming a row that the promised extent or number of samples excludes."""
    limit = coords.new_tensor([samples, *extent])
    wrong = ((coords < 0) | (coords >= limit)).any(1)
    if wrong.any():
        row = int(wrong.byte().argmax())
        what = f"outside the extent {list(extent)} of {samples} samples"
        raise ValueError(f"row {row} of coords is {coords[row].tolist()}: {what}")


@torch.library.custom_op("trislat::window_partition", mutates_args=())
def _partition(
    coords: Tensor,
    batch_size: int,
    extent: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
) -> tuple[Tensor, Tensor]:
    grid = _grid(extent, window, shift)
    N = len(coords)
    M = batch_size * grid[0] * grid[1] * grid[2]
    volume = window[0] * window[1] * window[2]
    cells = M * volume
    if backend.is_torch(coords):  # reading them makes no GPU wait
        _refuse(coords, batch_size, extent)
    if cells > DENSE_CELLS:
        number, cell = _cells(coords, batch_size, window, shift, grid)
        order = cell.argsort(stable=True)
        number = number[order]
        edges = torch.arange(M + 1, device=coords.device)
        order = torch.where(number < M, order, -1)
        return order.int(), torch.searchsorted(number, edges, out_int32=True)
    # cell k at k + 1, so that the running sum counts the cells before k
    occupied = coords.new_zeros(cells + 1)
    order = coords.new_full((N,), -1)
    if backend.is_torch(coords):
        cell = _cells(coords, batch_size, window, shift, grid)[1]
        occupied[cell + 1] = 1
        before = occupied.cumsum(0, dtype=torch.int32)
        if int(before[-1]) < N:
            raise ValueError(
                f"{N} rows of coords name {int(before[-1])} voxels: some stand there twice"
            )
        order[before[cell].long()] = torch.arange(N, dtype=torch.int32, device=coords.device)
    else:
        launch = (triton.cdiv(N, TILE),)
        geometry = (*window, *shift, *grid, cells)
        backend.launch(_occupy, launch, coords, occupied, N, *geometry, TILE=TILE, num_warps=4)
        before = occupied.cumsum(0, dtype=torch.int32)
        backend.launch(_rank, launch, coords, before, order, N, *geometry, TILE=TILE, num_warps=4)
    return order, before[::volume].contiguous()


@_partition.register_fake
def _(coords, batch_size, extent, window, shift):
    grid = _grid(extent, window, shift)
    M = batch_size * grid[0] * grid[1] * grid[2]
    return coords.new_empty(coords.shape[0]), coords.new_empty(M + 1)


def per_axis(value: int | Sequence[int], what: str, least: int | None) -> list[int]:
    """One number per axis from one or three; ValueError for another count, and below `least`."""
    values = [value] * 3 if isinstance(value, int) else host_list(what, value)
    if len(values) != 3:
        raise ValueError(f"{what} needs 1 or 3 numbers, one per axis, got {len(values)}")
    if least is not None and min(values) < least:
        raise ValueError(f"{what} {value} must be at least {least} on every axis")
    return values


def window_partition(
    voxels: Tensor | SpatialCache,  # coords [N, 4] int32 (batch, x, y, z), or a cache over them
    batch_size: int,
    window: int | Sequence[int],  # voxels per axis
    shift: int | Sequence[int] = 0,  # voxels per axis, any sign
    extent: int | Sequence[int] | None = None,  # every coordinate is below it, per axis
) -> Windows:
    """Group voxels into cubic windows.

    Windows are in the order ((b NX + wx) NY + wy) NZ + wz, the rows inside one in the order of x,
    y, z. Given a cache nothing waits for the device. Given coords they are checked, which waits
    once, as a SpatialCache does; with `extent` they are not checked, and nothing waits.

    Raises ValueError for a window below 1, for wrong coords and batch sizes, for a window too small
    for the extent (more windows than can be listed), and for an extent below the cache's; on the
    torch path also for coords beyond the extent or given twice. The kernels, where a check would
    wait for the device, leave such a row out: the last positions of `order` are -1.
    """
    window = per_axis(window, "window", 1)
    shift = per_axis(shift, "shift", None)
    if isinstance(voxels, Tensor) and extent is None:
        voxels = SpatialCache(voxels, batch_size)
    coords = voxels if isinstance(voxels, Tensor) else voxels.coords
    if isinstance(voxels, SpatialCache):
        extent = voxels.extent if extent is None else extent
        if batch_size != voxels.batch_size:
            raise ValueError(f"batch_size {batch_size} of a cache over {voxels.batch_size} samples")
        pairs = zip(per_axis(extent, "extent", 1), voxels.extent, strict=True)
        if any(given < known for given, known in pairs):
            raise ValueError(f"extent {extent} is below {list(voxels.extent)}, that of the voxels")
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype != torch.int32:
        raise ValueError(f"coords must be [N, 4] int32, got {list(coords.shape)} {coords.dtype}")
    extent = per_axis(extent, "extent", 1)
    shift = [s % w for s, w in zip(shift, window, strict=True)]
    grid = _grid(extent, window, shift)
    windows = batch_size * grid[0] * grid[1] * grid[2]
    if windows > MOST_WINDOWS:
        what = f"window {window} over extent {extent} and {batch_size} samples"
        raise ValueError(f"{what} gives {windows} windows, above {MOST_WINDOWS}")
    order, starts = torch.ops.trislat.window_partition(
        coords.contiguous(), batch_size, extent, window, shift
    )
    return Windows(order, starts, min(window[0] * window[1] * window[2], len(coords)))


def full_windows(
    # starts [B + 1] int32: sample b owns rows starts[b] : starts[b + 1]; or a cache
    voxels: Tensor | SpatialCache,
    N: int | None = None,  # rows in all; with starts alone
) -> Windows:
    """One window per sample, rows in their own order: attention among all its voxels."""
    if isinstance(voxels, SpatialCache):
        starts = voxels.starts
        N = len(voxels)
        bound = max(voxels.counts, default=0)
    elif N is None:
        raise ValueError(f"full_windows of starts {list(voxels.shape)} needs N, the number of rows")
    else:
        starts = voxels
        bound = N
    return Windows(torch.arange(N, dtype=torch.int32, device=starts.device), starts, bound)


def window_partition_reference(
    coords, batch_size, window, shift=0
) -> list[tuple[tuple[int, ...], list[int]]]:
    """`window_partition` by a dictionary: (window, rows) of the non-empty windows in order."""
    window = (window,) * 3 if isinstance(window, int) else window
    shift = (shift,) * 3 if isinstance(shift, int) else shift
    found: dict[tuple[int, ...], list[tuple[list[int], int]]] = {}
    for row, (b, *c) in enumerate(coords.tolist()):
        key = (b, *((c[a] + shift[a]) // window[a] for a in range(3)))
        found.setdefault(key, []).append((c, row))
    return [(key, [row for _, row in sorted(found[key])]) for key in sorted(found)]
