"""Neighbour maps of subdivided voxels, by arithmetic on the maps of their parents.

N parents, K = k^3 taps. All 8 children of a voxel exist, so a tap of a child holds a voxel where
the parents' map holds the parent it falls into, and its row is 8 * that parent + octant: no table,
no search.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton

TILE = 1024  # entries per program; not yet measured on a GPU


def parent_size(kernel_size: int) -> int:
    """The kernel size of the parents' map that holds every tap of the children's map.

    1 for 1, 3 for 3 and 5, 5 for 7 and 9.
    """
    return 2 * ((kernel_size // 2 + 1) // 2) + 1


@triton.jit(do_not_specialize=["entries"])
def _child_neighbours(
    parents_ptr, out_ptr, entries, k: tl.constexpr, PARENT_K: tl.constexpr, TILE: tl.constexpr
):
    # one (child, tap) a thread: stores are contiguous
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    child = entry // (k * k * k)
    tap = (entry % (k * k * k)).to(tl.int32)
    octant = (child % 8).to(tl.int32)
    # the tap's place, counted in children from the corner of the parents' kernel
    x = octant // 4 + tap // (k * k) + (PARENT_K - 1 - k // 2)
    y = octant // 2 % 2 + tap // k % k + (PARENT_K - 1 - k // 2)
    z = octant % 2 + tap % k + (PARENT_K - 1 - k // 2)
    parent_tap = (x // 2 * PARENT_K + y // 2) * PARENT_K + z // 2
    at = child // 8 * (PARENT_K * PARENT_K * PARENT_K) + parent_tap
    parent = tl.load(parents_ptr + at, mask=entry < entries, other=-1)  # [TILE]
    near = parent * 8 + x % 2 * 4 + y % 2 * 2 + z % 2
    tl.store(out_ptr + entry, tl.where(parent >= 0, near, -1), mask=entry < entries)


@torch.library.custom_op("trislat::child_neighbours", mutates_args=())
def child_neighbours_op(parents: Tensor, k: int) -> Tensor:
    """`child_neighbours` without checks."""
    N = len(parents)
    parent_k = parent_size(k)
    if backend.is_torch(parents):
        axis = torch.arange(2)[:, None] + torch.arange(k) + (parent_k - 1 - k // 2)  # [2, k]
        x = axis.view(2, 1, 1, k, 1, 1)
        y = axis.view(1, 2, 1, 1, k, 1)
        z = axis.view(1, 1, 2, 1, 1, k)
        # for every (octant, tap)
        column = ((x // 2 * parent_k + y // 2) * parent_k + z // 2).flatten()
        octant = (x % 2 * 4 + y % 2 * 2 + z % 2).flatten().int()
        near = parents[:, column]
        return torch.where(near >= 0, near * 8 + octant, -1).view(8 * N, k**3)
    out = parents.new_empty(8 * N, k**3)
    entries = out.numel()
    grid = (triton.cdiv(entries, TILE),)
    constants = {"k": k, "PARENT_K": parent_k, "TILE": TILE, "num_warps": 4}
    backend.launch(_child_neighbours, grid, parents, out, entries, **constants)
    return out


@child_neighbours_op.register_fake
def _(parents, k):
    return parents.new_empty(8 * parents.shape[0], k**3)


def child_neighbours(
    parents: Tensor,  # [N, parent_size(kernel_size)^3] int32: `neighbours` of the parents
    kernel_size: int = 3,
) -> Tensor:  # [8N, K] int32
    """Find `neighbours` of the children that `SpatialCache.subdivide` makes, without a table.

    Raises ValueError for an even or non-positive kernel size, and for a map of the parents of
    another width.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size {kernel_size} must be odd and at least 1")
    taps = parent_size(kernel_size) ** 3
    if parents.ndim != 2 or parents.shape[1] != taps or parents.dtype != torch.int32:
        shape = f"[N, {taps}] int32 for children's taps of kernel size {kernel_size}"
        raise ValueError(
            f"the parents' neighbours must be {shape}, got {list(parents.shape)} {parents.dtype}"
        )
    return child_neighbours_op(parents.contiguous(), kernel_size)
