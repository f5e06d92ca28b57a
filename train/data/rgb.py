"""The channels of `rgb` features by name (train.prepare.voxelize has their table)."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

# the halves of a voxel ("sub-cells"), in the features' order, 4 x + 2 y + z: [8, 3]
HALVES = torch.tensor(list(product((-1, 1), repeat=3)))


class Rgb(NamedTuple):
    """Named channels of the `rgb` features of N voxels."""

    color: Tensor  # [N, 3]
    normal: Tensor  # [N, 3]
    offset: Tensor  # [N, 3]
    seen: Tensor  # [N, 1]
    sub_color: Tensor  # [N, 24]
    sub_seen: Tensor  # [N, 8]
    occupied: Tensor  # [N, 8]


WIDTHS = (3, 3, 3, 1, 24, 8, 8)


def split_rgb(features: Tensor) -> Rgb:
    """Split `rgb` features [N, 50] into what they say.

    Raises ValueError for another number of channels.
    """
    if features.shape[1] != sum(WIDTHS):
        raise ValueError(
            f"{features.shape[1]} channels of features are not the {sum(WIDTHS)} of rgb features"
        )
    return Rgb(*features.split(WIDTHS, 1))
