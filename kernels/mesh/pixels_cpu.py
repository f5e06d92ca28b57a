"""The pixels that show a face, and its corners' rows, on a CPU."""

from typing import NamedTuple

import torch
from torch import Tensor


class Shown(NamedTuple):
    """The M covered pixels."""

    at: Tensor  # [M] where they lie in [V, H, W]
    rows: Tensor  # [M, 3] of their faces' corners


def shown(rast: Tensor, faces: Tensor, table: Tensor) -> Shown:
    """Of a picture [V, H, W, 4]."""
    V, H, W, _ = rast.shape
    return shown_faces(rast[..., 3].reshape(-1).long() - 1, faces, table, H * W)


def shown_faces(face: Tensor, faces: Tensor, table: Tensor, size: int) -> Shown:
    at = (face >= 0).nonzero()[:, 0]
    of = table[torch.div(at, size, rounding_mode="floor")]
    return Shown(at, faces[of[:, 0] + face[at]].long() + of[:, 2:3])
