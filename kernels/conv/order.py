"""Orders of rows in which a convolution's tiles have few taps."""

import torch
from torch import Tensor

from kernels.voxels.hash import neighbours


def _sorted_rows(present: Tensor) -> Tensor:
    """Rows of present [N, ..., T] with the same taps beside each other: [..., N] int32."""
    T = present.shape[-1]
    # more taps share bits: only neighbourhoods of rows suffer
    bit = 1 << torch.arange(T, device=present.device) % 62
    return (present * bit).sum(-1).argsort(dim=0, stable=True).movedim(0, -1).int().contiguous()


def tap_order(
    voxels,  # coords [N, 4] int32, or a SpatialCache over them
    kernel_size: int = 3,
) -> Tensor:  # [N] int32
    """An order of the rows that brings those with the same neighbours together.

    `cache.get(tap_order, 3)` makes it once. Tiles of rows skip taps that none of them has: on
    surfaces a convolution then executes hardly more than the products it needs. Raises ValueError
    as `neighbours`.
    """
    return _sorted_rows(_neighbours(voxels, kernel_size) >= 0)


def octant_order(
    voxels,  # coords [N, 4] int32, or a SpatialCache over them: the parents
) -> Tensor:  # [9, N] int32
    """`tap_order` of the parents, then an order for each octant of children.

    `cache.get(octant_order)` makes it once.
    """
    taps = _neighbours(voxels, 3)
    return torch.cat([_sorted_rows(taps >= 0)[None], _sorted_rows(octants(taps) >= 0)])


def octants(neighbours: Tensor) -> Tensor:
    """Parents under the 2x2x2 taps of each child, [N, 8, 8] int32, from their map [N, 27]."""
    # child (i, j, k) reads parents i to i + 1, j to j + 1, k to k + 1 of it
    cube = neighbours.view(-1, 3, 3, 3)
    return cube.unfold(1, 2, 1).unfold(2, 2, 1).unfold(3, 2, 1).reshape(-1, 8, 8)


def child_rows(neighbours: Tensor) -> Tensor:
    """The children that read a parent, by octant and tap, [N, 1, 64] int32: `octants` backwards."""
    # a parent is under tap t of those that are under its opposite tap
    parents = octants(neighbours.flip(1))
    octant = torch.arange(8, dtype=torch.int32, device=neighbours.device)[:, None]
    return torch.where(parents >= 0, parents * 8 + octant, -1).view(-1, 1, 64)


def _neighbours(voxels, kernel_size: int) -> Tensor:
    if isinstance(voxels, Tensor):
        return neighbours(voxels, kernel_size)
    return voxels.get(neighbours, kernel_size)
