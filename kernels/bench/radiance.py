"""Ray marching of a decoded radiance field: N voxels of rank R and n taps, a view of H x W pixels.

Compulsory bytes: the 3 R n + 4 R floats of every voxel and the 5 floats (colour, alpha, depth) of
every pixel; backward both again, with the gradients of the picture and of the voxels. Its
arithmetic is not matrix products, and taps are read many times from the cache: the floor is far
below what any ray marcher reaches.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import Camera, raymarch
from kernels.bench.case import Case, Work
from kernels.bench.shells import shell
from kernels.radiance.reference import raymarch_reference

# of training: mean density of a rank; half transparent, and opaque within two samples
STAGES = {"early": 0.0, "late": 10.0}


def fields(size: str, stage: str, seed: int) -> tuple[Tensor, list[Tensor], int]:
    """Draw an object early or late in training.

    Returns positions, (trivec, density, colours) and the resolution.
    """
    resolution, rank, taps = (8, 2, 4) if size == "small" else (64, 16, 8)
    xyz = shell("sphere", resolution)
    N = len(xyz)
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(N, rank, *shape, generator=generator)
    tensors = [1 + 0.1 * normal(3, taps), STAGES[stage] + 0.1 * normal(), normal(1, 3)]
    return (xyz + 0.5) / resolution, tensors, resolution


def raymarch_work(N: int, floats: int, pixels: int) -> tuple[Work, Work]:
    """Count the work of both passes for N voxels of `floats` numbers."""
    scene = 4 * N * floats
    picture = 4 * 5 * pixels
    return Work(scene + picture), Work(2 * scene + 2 * picture)


def raymarch_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure one view early and one late in training; fp32 whatever the network computes in.

    No other implementation can be imported.
    """
    edge = 24 if size == "small" else 512
    camera = Camera.orbit([0.3], [0.2], 2.0, math.radians(40), edge).to(device)
    for stage in STAGES:
        position, tensors, resolution = fields(size, stage, 0)
        position = position.to(device)
        N = len(position)
        rank, _, taps = tensors[0].shape[1:]
        offset = torch.rand(1, edge, edge, generator=torch.Generator().manual_seed(0)).to(device)

        def pictures(
            render, *values: Tensor, position=position, resolution=resolution, offset=offset
        ):
            like = values[0]
            image = render(
                position.to(like),
                *values,
                [0, len(position)],
                camera.to(like.dtype),
                [0],
                like.new_ones(1, 3),
                resolution,
                offset.to(like),
            )
            return image.color, image.alpha

        def inputs(seed: int, stage=stage) -> tuple:
            return tuple(t.to(device).requires_grad_() for t in fields(size, stage, seed)[1])

        forward, backward = raymarch_work(N, rank * (3 * taps + 4), edge * edge)
        yield Case(
            op="raymarch",
            size=f"{stage}, {N} voxels, rank {rank}, {taps} taps, {edge}^2",
            dtype="fp32",
            inputs=inputs,
            forward=[forward],
            backward=[backward],
            ours=lambda *v, p=pictures: p(raymarch, *v),
            reference=lambda *v, p=pictures: p(raymarch_reference, *v),
            naive=size == "small",
            baselines={"diffoctreerast": "not importable as a library"},
        )
