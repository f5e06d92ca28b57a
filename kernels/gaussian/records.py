"""Layout of packed and of projected Gaussians, which every stage of the splat reads."""

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
