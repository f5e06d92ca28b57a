"""Orders of rows in which a convolution's tiles have few taps."""

import torch
from torch import Tensor

from kernels import backend
from kernels.voxels.hash import neighbours


def _ranks(sides: tuple[int, ...]) -> list[int]:
    """The rank of each tap of a box: from the middle outwards, opposite taps beside each other."""
    cells = torch.cartesian_prod(*(torch.arange(n) for n in sides)).view(-1, len(sides))
    away = (2 * cells - torch.tensor(sides) + 1).abs().sum(1).tolist()
    last = len(away) - 1
    nearest = sorted(range(last + 1), key=lambda t: (away[t], min(t, last - t), t))
    return [nearest.index(t) for t in range(last + 1)]


def _sorted_rows(present: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Rows of present [N, ..., T], T taps of a box, with the same taps together: [..., N] int32.

    In the order of a Gray code, so that one set of taps and the next differ in few. The first bits
    are of the taps that most rows have.
    """
    # more taps share bits: only neighbourhoods of rows suffer
    bit = 1 << 61 - backend.make_index(_ranks(sides), present.device) % 62
    code = (present * bit).sum(-1)
    for shift in (1, 2, 4, 8, 16, 32):  # from a Gray code to its place
        code ^= code >> shift
    return code.argsort(dim=0, stable=True).movedim(0, -1).int().contiguous()


def tap_order(
    voxels,  # coords [N, 4] int32, or a SpatialCache over them
    kernel_size: int = 3,
) -> Tensor:  # [N] int32
    """An order of the rows that brings those with the same neighbours together.

    `cache.get(tap_order, 3)` makes it once. Tiles of rows skip taps that none of them has: on
    surfaces a convolution then executes hardly more than the products it needs. Raises ValueError
    as `neighbours`.
    """
    return _sorted_rows(taps_of(voxels, kernel_size) >= 0, (kernel_size,) * 3)


def octant_order(
    voxels,  # coords [N, 4] int32, or a SpatialCache over them: the parents
) -> Tensor:  # [9, N] int32
    """`tap_order` of the parents, then an order for each octant of children.

    `cache.get(octant_order)` makes it once.
    """
    taps = taps_of(voxels, 3)
    whole = _sorted_rows(taps >= 0, (3, 3, 3))
    return torch.cat([whole[None], _sorted_rows(octants(taps) >= 0, (2, 2, 2))])


def plane_order(
    neighbours: Tensor,  # [N, k^3] int32
    kernel_size: int,
) -> Tensor:  # [k, N] int32
    """An order for each of the k planes of taps along x.

    Rows have many sets of 27 taps, but few sets of 9.
    """
    planes = (neighbours >= 0).view(-1, kernel_size, kernel_size**2)
    return _sorted_rows(planes, (kernel_size,) * 2)


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


def taps_of(voxels, kernel_size: int) -> Tensor:
    if isinstance(voxels, Tensor):
        return neighbours(voxels, kernel_size)
    return voxels.get(neighbours, kernel_size)
