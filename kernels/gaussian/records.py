"""Tensors that the stages of the splat hand on: projected Gaussians, instances by tile."""

from dataclasses import dataclass

from torch import Tensor

# floats of a packed Gaussian: center 3, scale 3, rotation wxyz 4, opacity 1, colour coefficients 3
GAUSSIAN = 14
# floats of a projected one: mean 2 (px), conic 3 (11, 12, 22), blended opacity 1, colour 3
RECORD = 9
TILE = 16  # pixels along a side of a tile


@dataclass(frozen=True, eq=False)
class Projected:
    """P Gaussians on the screens of their views."""

    record: Tensor  # [P, 9]: mean (px), conic, blended opacity, colour
    depth: Tensor  # [P] camera z
    rect: Tensor  # [P, 4] int32: tiles x0, y0, x1, y1; x1 <= x0 or y1 <= y0: not drawn
    view: Tensor  # [P] int32


@dataclass(frozen=True, eq=False)
class Bins:
    """Instances (a pair in a tile), tile after tile."""

    pair: Tensor  # [I] int32
    slot: Tensor  # [I] int64: position before the sort by tile
    bounds: Tensor  # [T + 1] int32: tile t owns the instances bounds[t] : bounds[t + 1]
    first: Tensor  # [P] int64: the slot of a pair's first instance
