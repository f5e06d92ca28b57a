"""Tables from voxel coordinates to rows, and the neighbours of every voxel.

N rows (batch, x, y, z), M queries, K = k^3 taps of a convolution kernel. Two tables behind one
interface, chosen by arithmetic. Where the extent allows, a dense volume holds the row of every
cell: one load per query, no probing. Otherwise an open-addressing hash table: the 64-bit packed
key, mixed by splitmix64, linear probing, at most half full; inserted with compare-and-swap, so
slots depend on timing but answers do not. On the torch path the second one is a sorted list of the
same keys, searched by bisection.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.voxels.children import child_neighbours_op, parent_size
from kernels.voxels.coords import Extent, check_coords, pack

TILE = 1024  # rows, queries or taps per program; not yet measured on a GPU
DENSE_EXTENT = 256  # a dense volume is at most this wide,
DENSE_CELLS = 1 << 26  # has at most this many cells (256 MB),
DENSE_PER_ROW = 128  # and at most this many per row, unless it is small anyway:
DENSE_SMALL = 1 << 22


@dataclass(frozen=True, eq=False)
class Table:
    """A table from coordinates to rows, made by `build_table`."""

    kind: str  # "dense", "hash" or "sorted"
    rows: Tensor  # int32: the row of each cell, slot or sorted key; -1 for none
    # int64: the key of each slot (-1: free) or the sorted keys; empty for a dense volume
    keys: Tensor
    size: list[int]  # samples and extent: x, y, z


@triton.jit
def _slot(key, mask):
    """The first slot to probe: splitmix64 of the key, modulo the table."""
    h = key.to(tl.uint64) + 0x9E3779B97F4A7C15
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB
    return (h ^ (h >> 31)).to(tl.int64) & mask


@triton.jit(do_not_specialize=["N", "slots"])
def _insert(coords_ptr, keys_ptr, rows_ptr, N, slots, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = row < N
    c = coords_ptr + row.to(tl.int64) * 4
    b = tl.load(c, mask=live, other=0).to(tl.int64)  # [TILE]
    x = tl.load(c + 1, mask=live, other=0)
    y = tl.load(c + 2, mask=live, other=0)
    z = tl.load(c + 3, mask=live, other=0)
    key = ((b * 1024 + x) * 1024 + y) * 1024 + z
    slot = _slot(key, slots - 1)
    # compare-and-swap takes no mask: a finished thread swaps its key for itself, one beyond N asks
    # for a key that is never there
    free = tl.where(live, tl.full([TILE], -1, tl.int64), tl.full([TILE], -2, tl.int64))
    pending = live.to(tl.int32)
    while tl.max(pending, 0) > 0:
        found = tl.atomic_cas(keys_ptr + slot, free, key)
        mine = (found == -1) | (found == key)
        pending = tl.where(mine, 0, pending)
        free = tl.where(mine & live, key, free)
        slot = tl.where(pending > 0, (slot + 1) & (slots - 1), slot)
    tl.store(rows_ptr + slot, row, mask=live)


@triton.jit
def _find(
    b, x, y, z, live, keys_ptr, rows_ptr, B, X, Y, Z, slots, DENSE: tl.constexpr, TILE: tl.constexpr
):
    """The row of each coordinate, -1 where there is none or where it is outside."""
    live = live & (b >= 0) & (b < B) & (x >= 0) & (x < X) & (y >= 0) & (y < Y) & (z >= 0) & (z < Z)
    if DENSE:
        return tl.load(rows_ptr + ((b.to(tl.int64) * X + x) * Y + y) * Z + z, mask=live, other=-1)
    key = ((b.to(tl.int64) * 1024 + x) * 1024 + y) * 1024 + z
    slot = _slot(key, slots - 1)
    row = tl.full([TILE], -1, tl.int32)
    pending = live.to(tl.int32)
    while tl.max(pending, 0) > 0:
        found = tl.load(keys_ptr + slot, mask=pending > 0, other=-1)
        hit = (pending > 0) & (found == key)
        row = tl.where(hit, tl.load(rows_ptr + slot, mask=hit, other=-1), row)
        pending = tl.where(hit | (found == -1), 0, pending)
        slot = (slot + 1) & (slots - 1)
    return row


SIZES = ["M", "N", "B", "X", "Y", "Z", "slots"]  # vary with the data: no specialised variants


@triton.jit(do_not_specialize=SIZES)
def _lookup(
    q_ptr,
    keys_ptr,
    rows_ptr,
    out_ptr,
    M,
    B,
    X,
    Y,
    Z,
    slots,
    DENSE: tl.constexpr,
    TILE: tl.constexpr,
):
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = m < M
    q = q_ptr + m.to(tl.int64) * 4
    b = tl.load(q, mask=live, other=0)
    x = tl.load(q + 1, mask=live, other=0)
    y = tl.load(q + 2, mask=live, other=0)
    z = tl.load(q + 3, mask=live, other=0)
    found = _find(b, x, y, z, live, keys_ptr, rows_ptr, B, X, Y, Z, slots, DENSE, TILE)
    tl.store(out_ptr + m, found, mask=live)


@triton.jit(do_not_specialize=SIZES)
def _neighbours(
    coords_ptr,
    keys_ptr,
    rows_ptr,
    out_ptr,
    N,
    B,
    X,
    Y,
    Z,
    slots,
    k: tl.constexpr,
    DENSE: tl.constexpr,
    TILE: tl.constexpr,
):
    # one (row, tap) a thread: stores are contiguous
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = entry // (k * k * k)
    tap = (entry % (k * k * k)).to(tl.int32)
    live = row < N
    c = coords_ptr + row * 4
    b = tl.load(c, mask=live, other=0)
    x = tl.load(c + 1, mask=live, other=0) + tap // (k * k) - k // 2
    y = tl.load(c + 2, mask=live, other=0) + tap // k % k - k // 2
    z = tl.load(c + 3, mask=live, other=0) + tap % k - k // 2
    found = _find(b, x, y, z, live, keys_ptr, rows_ptr, B, X, Y, Z, slots, DENSE, TILE)
    tl.store(out_ptr + entry, found, mask=live)


def _insert_tiles(target: str) -> dict[str, int]:
    """One key a thread, as Triton 3.6 for AMD compiles no wider compare-and-swap."""
    if target == "interpreter":
        return {"TILE": TILE, "num_warps": 4}
    return {"TILE": 256, "num_warps": 4 if target.startswith("gfx9") else 8}


def _is_dense(N: int, size: Sequence[int]) -> bool:
    """Decide if N voxels get a dense volume."""
    cells = size[0] * size[1] * size[2] * size[3]
    most = min(DENSE_CELLS, max(DENSE_SMALL, DENSE_PER_ROW * N))
    return max(size[1:]) <= DENSE_EXTENT and cells <= most


def _slots(N: int) -> int:
    """The size of a hash table for N keys: at most half of its slots are used."""
    return 1 << max(1, (2 * N - 1).bit_length())


def _flat(coords: Tensor, size: Sequence[int]) -> Tensor:
    """The cell of each coordinate in a dense volume."""
    b, x, y, z = coords.long().unbind(-1)
    return ((b * size[1] + x) * size[2] + y) * size[3] + z


@torch.library.custom_op("trislat::build_table", mutates_args=())
def _build(coords: Tensor, size: Sequence[int], kind: str) -> tuple[Tensor, Tensor]:
    N = len(coords)
    keys = torch.empty(0, dtype=torch.int64, device=coords.device)
    if kind == "dense":
        rows = coords.new_full((size[0] * size[1] * size[2] * size[3],), -1)
        rows[_flat(coords, size)] = torch.arange(N, dtype=torch.int32, device=coords.device)
    elif kind == "sorted":
        keys, rows = pack(coords).sort()
        rows = rows.int()
    else:
        slots = _slots(N)
        keys = keys.new_full((slots,), -1)
        rows = coords.new_full((slots,), -1)
        tiles = _insert_tiles(backend.target(coords))
        grid = (triton.cdiv(N, tiles["TILE"]),)
        backend.launch(_insert, grid, coords, keys, rows, N, slots, **tiles)
    return rows, keys


@_build.register_fake
def _(coords, size, kind):
    if kind == "dense":
        cells = size[0] * size[1] * size[2] * size[3]
        return coords.new_empty(cells), coords.new_empty(0, dtype=torch.int64)
    entries = _slots(coords.shape[0]) if kind == "hash" else coords.shape[0]
    return coords.new_empty(entries), coords.new_empty(entries, dtype=torch.int64)


def build_table(
    voxels,  # coords [N, 4] int32, or a SpatialCache over them
) -> Table:
    """Build the table that `lookup` and `neighbours` read.

    Given coords, they are checked, which waits once for the device (`check_coords`); given a cache,
    nothing waits. `cache.get(build_table)` makes the table once.
    """
    if isinstance(voxels, Tensor):
        coords = voxels
        extent = check_coords(voxels)[0]
    else:
        coords = voxels.coords
        extent = Extent(voxels.counts, voxels.extent)
    N = len(coords)
    size = [len(extent.counts), *extent.size]
    if _is_dense(N, size):
        kind = "dense"
    else:
        kind = "sorted" if backend.is_torch(coords) else "hash"
    return Table(kind, *torch.ops.trislat.build_table(coords.contiguous(), size, kind), size)


def _search(q: Tensor, keys: Tensor, rows: Tensor, size: Sequence[int], kind: str) -> Tensor:
    """The row of each query [..., 4] on the torch path, -1 where the table has none."""
    limit = torch.tensor(size, dtype=q.dtype, device=q.device)
    inside = ((q >= 0) & (q < limit)).all(-1)
    if len(rows) == 0:
        return torch.full_like(q[..., 0], -1)
    if kind == "dense":
        return torch.where(inside, rows[torch.where(inside, _flat(q, size), 0)], -1)
    key = torch.where(inside, pack(q), -1)
    slot = torch.searchsorted(keys, key).clamp_max(len(keys) - 1)
    return torch.where(keys[slot] == key, rows[slot], -1)


def _check_kind(kind: str, where: Tensor) -> None:
    """Raises ValueError for a hash table on the torch path."""
    if kind == "hash" and backend.is_torch(where):
        raise ValueError(
            "a hash table made by the kernels cannot be read on the torch path: build it there"
        )


@torch.library.custom_op("trislat::lookup", mutates_args=())
def _lookup_op(q: Tensor, keys: Tensor, rows: Tensor, size: Sequence[int], kind: str) -> Tensor:
    _check_kind(kind, q)
    if backend.is_torch(q) or kind == "sorted":
        return _search(q, keys, rows, size, kind)
    out = q.new_empty(len(q))
    grid = (triton.cdiv(len(q), TILE),)
    args = (q, keys, rows, out, len(q), *size, len(keys))
    backend.launch(_lookup, grid, *args, DENSE=kind == "dense", TILE=TILE, num_warps=4)
    return out


@torch.library.custom_op("trislat::neighbours", mutates_args=())
def _neighbours_op(
    coords: Tensor, keys: Tensor, rows: Tensor, size: Sequence[int], kind: str, k: int
) -> Tensor:
    _check_kind(kind, coords)
    N = len(coords)
    r = k // 2
    if backend.is_torch(coords) or kind == "sorted":
        axis = torch.arange(-r, r + 1, dtype=torch.int32, device=coords.device)
        taps = torch.cartesian_prod(axis.new_zeros(1), axis, axis, axis)  # [K, 4], x slowest
        return _search(coords[:, None] + taps, keys, rows, size, kind)
    out = coords.new_empty(N, k**3)
    grid = (triton.cdiv(N * k**3, TILE),)
    args = (coords, keys, rows, out, N, *size, len(keys))
    backend.launch(_neighbours, grid, *args, k=k, DENSE=kind == "dense", TILE=TILE, num_warps=4)
    return out


@_lookup_op.register_fake
def _(q, keys, rows, size, kind):
    return q.new_empty(q.shape[0])


@_neighbours_op.register_fake
def _(coords, keys, rows, size, kind, k):
    return coords.new_empty(coords.shape[0], k**3)


def lookup(
    table: Table,
    coords: Tensor,  # [M, 4] int32: any values
) -> Tensor:  # [M] int32
    """Find the row of each queried voxel, -1 where the table has none.

    Coordinates outside the extent are allowed; the table has none of them. Raises ValueError for
    another shape or dtype.
    """
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype != torch.int32:
        raise ValueError(f"queries must be [M, 4] int32, got {list(coords.shape)} {coords.dtype}")
    return torch.ops.trislat.lookup(
        coords.contiguous(), table.keys, table.rows, table.size, table.kind
    )


def neighbours(
    voxels,  # coords [N, 4] int32, or a SpatialCache over them
    kernel_size: int = 3,
) -> Tensor:  # [N, K] int32
    """Find the row under each tap of a kernel centred on each voxel, -1 where there is no voxel.

    Never a row of another sample. Taps (i, j, k) count along x, y, z, x slowest; tap (i, j, k)
    reads coord + (i - r, j - r, k - r) with r = kernel_size // 2. `cache.get(neighbours, 3)` makes
    the map and its table once. Voxels that `cache.subdivide()` made need no table: their map
    follows from their parents'.

    Raises ValueError for an even or non-positive kernel size.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size {kernel_size} must be odd and at least 1")
    if isinstance(voxels, Tensor):
        coords = voxels.contiguous()
        table = build_table(voxels)
    elif voxels.parent is not None:
        of_parents = voxels.parent.get(neighbours, parent_size(kernel_size))
        return child_neighbours_op(of_parents, kernel_size)
    else:
        coords = voxels.coords
        table = voxels.get(build_table)
    return torch.ops.trislat.neighbours(
        coords, table.keys, table.rows, table.size, table.kind, kernel_size
    )


def lookup_reference(coords: Tensor, queries: Tensor) -> Tensor:
    """`lookup` by a dictionary."""
    row = {tuple(c): n for n, c in enumerate(coords.tolist())}
    return torch.tensor([row.get(tuple(q), -1) for q in queries.tolist()], dtype=torch.int32)


def neighbours_reference(coords: Tensor, kernel_size: int = 3) -> Tensor:
    """`neighbours` by a dictionary, tap after tap."""
    r = kernel_size // 2
    span = range(-r, r + 1)
    taps = [(i, j, k) for i in span for j in span for k in span]
    queries = [[b, x + i, y + j, z + k] for b, x, y, z in coords.tolist() for i, j, k in taps]
    queries = torch.tensor(queries, dtype=torch.int32).reshape(-1, 4)
    return lookup_reference(coords, queries).reshape(len(coords), len(taps))
