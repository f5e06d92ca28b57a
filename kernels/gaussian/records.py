"""Tensors that the stages of the splat hand on: projected Gaussians, instances by tile."""

import math
from dataclasses import dataclass

from torch import Tensor

# floats of a packed Gaussian: center 3, scale 3, rotation wxyz 4, opacity 1, colour coefficients 3
GAUSSIAN = 14
# floats of a projected one: mean 2 (px), conic 3 (11, 12, 22), blended opacity 1, colour 3
RECORD = 9
# the same for the kernels, two whole sectors of memory: mean 2, exponent of 2 as
# across dx^2 + down (dy + shear dx)^2 in the order across, shear, down, log2 of the opacity,
# colour 3; then as int32 the rectangle x0, y0, x1, y1 in parts of tiles, view, and 2 unused
PACKED = 16
TILE = 16  # pixels along a side of a tile


def parts(target: str) -> int:
    """Return the parts along a side of a tile (not yet measured on a GPU).

    Parts of 8 x 8 pixels, 2 of a thread: half the pixels of the listed ones are touched, for a
    quarter in whole tiles, and smaller parts would load each Gaussian for too few. The interpreter
    takes time by the program.
    """
    return 1 if target == "interpreter" else 2


@dataclass(frozen=True, eq=False)
class Projected:
    """P Gaussians on the screens of their views."""

    record: Tensor  # [P, RECORD]
    depth: Tensor  # [P] camera z
    rect: Tensor  # [P, 4] int32: tiles x0, y0, x1, y1; x1 <= x0 or y1 <= y0: not drawn
    view: Tensor  # [P] int32


@dataclass(frozen=True, eq=False)
class Packed:
    """The same for the kernels."""

    record: Tensor  # [P, PACKED]
    depth: Tensor  # [P] camera z
    # [P] int32: tiles in the rectangle, parts of tiles in it; 0: not drawn
    tiles: Tensor
    cells: Tensor
    parts: int  # along a side of a tile


@dataclass(frozen=True, eq=False)
class Bins:
    """Instances (a pair in a tile), and the lists of the Gaussians that each part of a tile sees.

    Q parts of a tile, row after row. Part q of tile t owns the entries
    Q bounds[t] + q n : Q bounds[t] + q n + size[t, q], n = bounds[t + 1] - bounds[t], near to far.
    """

    pair: Tensor  # [Q I] int32, of an entry
    slot: Tensor  # [Q I] int32: where an entry's sums go; those of a pair are neighbours
    bounds: Tensor  # [T + 1] int32: tile t owns the instances bounds[t] : bounds[t + 1]
    size: Tensor  # [T, Q] int32
    first: Tensor  # [P] int64: a pair's first instance before the sort by tile
    start: Tensor  # [I + 1] int32: first slot of an instance before that sort
    slots: int  # room for all slots

    @property
    def side(self) -> int:
        """Pixels along a side of a part."""
        return TILE // math.isqrt(self.size.shape[1])
