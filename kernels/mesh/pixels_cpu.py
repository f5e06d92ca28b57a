"""The covered pixels of a picture and the vertices of their faces, on a CPU."""

from typing import NamedTuple

import torch
from torch import Tensor


class Covered(NamedTuple):
    """The M pixels that show a face."""

    at: Tensor  # [M] index in [V, H, W]
    rows: Tensor  # [M, 3] rows of the face's corners


def covered_pixels(rast: Tensor, faces: Tensor, table: Tensor) -> Covered:
    """The covered pixels of a picture of `rasterize`, [V, H, W, 4]."""
    _, H, W, _ = rast.shape
    return covered_by(rast[..., 3].reshape(-1).long() - 1, faces, table, H * W)


def covered_by(face: Tensor, faces: Tensor, table: Tensor, size: int) -> Covered:
    """The covered pixels, given the face of each pixel, below 0 for none: [V size]."""
    at = (face >= 0).nonzero()[:, 0]
    view = table[torch.div(at, size, rounding_mode="floor")]
    return Covered(at, faces[view[:, 0] + face[at]].long() + view[:, 2:3])
