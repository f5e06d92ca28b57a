"""Segments of rays inside voxels, which the marches on a GPU and on a CPU read."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RaySegments:
    """S segments in the order of the pairs, and the list of each ray."""

    ray: Tensor  # [S] int32: pixel (view * H + y) * W + x
    facts: Tensor  # [S, 2] int32: voxel, number of samples
    # [S, 8]: the first sample's place in taps (3) and camera depth, and their increments per sample
    path: Tensor
    start: Tensor  # [P + 1] int64: pair p owns the segments start[p] : start[p + 1]
    order: Tensor  # [S] int64: segments, ray after ray, near to far
    bounds: Tensor  # [rays + 1] int32: ray i has order[bounds[i] : bounds[i + 1]]

    @property
    def voxel(self) -> Tensor:
        """The voxel of each segment: [S] int32."""
        return self.facts[:, 0]

    @property
    def samples(self) -> Tensor:
        """The number of samples of each segment: [S] int32."""
        return self.facts[:, 1]


def by_ray(key: Tensor, rays: int) -> tuple[Tensor, Tensor]:
    """Return the order of the segments by ray, then by first sample, and the bounds of each ray.

    The key is ray * 2^32 + sample. A first sample is negative only for a voxel behind the eye but
    not near it, which takes a resolution below 8.
    """
    key, order = torch.sort(key, stable=True)
    edges = (torch.arange(rays + 1, device=key.device) << 32) - 2**31
    return order, torch.searchsorted(key, edges, out_int32=True)
