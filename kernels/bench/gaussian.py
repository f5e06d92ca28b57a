"""Gaussian splatting of a decoded object: G Gaussians on V views of H x W pixels.

Compulsory bytes: 14 floats of every Gaussian and the 4 floats (colour, transmittance) of every
pixel; backward both again, with the gradient of the picture and of the Gaussians. Tile lists and
what lies between the stages are choices of an implementation, and its arithmetic is not matrix
products: the floor is far below what any rasteriser reaches.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import Camera, splat
from kernels.bench.case import Case, Impl, Work, optional
from kernels.bench.shells import shell
from kernels.gaussian.records import GAUSSIAN
from kernels.gaussian.reference import splat_reference

KERNEL_SIZE = 0.1
SH = 0.28209479177387814


def gaussians(size: str, seed: int) -> list[Tensor]:
    """Draw the Gaussians of an object in training.

    They are 32 in each voxel of a shell, small, half transparent, turned at random.
    """
    field, per_voxel, resolution = (
        ("sphere", 2, 12) if size == "small" else ("noisy sphere", 32, 64)
    )
    xyz = shell(field, resolution)
    G = len(xyz) * per_voxel
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(G, *shape, generator=generator)
    voxel = xyz.repeat_interleave(per_voxel, 0) + 0.5 + 1.5 * (uniform(3) - 0.5)
    rotation = torch.nn.functional.normalize(torch.randn(G, 4, generator=generator))
    scale = (0.2 + 0.4 * uniform(3)) / resolution
    return [
        voxel / resolution - 0.5,
        scale,
        rotation,
        0.1 + 0.8 * uniform(1),
        2 * uniform(1, 3) - 1,
    ]


def across_rotation(inputs: tuple, grads: list[Tensor]) -> list[Tensor]:
    """Remove the part of the gradients along the quaternion, 0 where that is normalised.

    `inputs` and `grads` are center, scale, rotation, opacity and colour.
    """
    rotation = inputs[2].detach()
    grad = grads[2]
    unit = torch.nn.functional.normalize(rotation)
    return [*grads[:2], grad - (grad * unit).sum(1, keepdim=True) * unit, *grads[3:]]


def gsplat(camera: Camera, background: Tensor) -> Impl | str:
    """Render with gsplat: the low-pass filter and opacity compensation of Mip-Splatting.

    It clamps opacities at 0.999 where ours clamps at 0.99, and cuts Gaussians off elsewhere:
    compared to a few percent. It normalises quaternions, ours does not.
    """
    module = optional("gsplat")
    if isinstance(module, str):
        return module
    pixels = torch.tensor([camera.width, camera.height, 1.0], device=camera.device)
    intrinsics = camera.intrinsics * pixels[:, None]

    def run(center, scale, rotation, opacity, sh):
        color, alpha, _ = module.rasterization(
            center,
            rotation,
            scale,
            opacity[:, 0],
            (0.5 + SH * sh[:, 0]).clamp(min=0),
            camera.extrinsics,
            intrinsics,
            camera.width,
            camera.height,
            near_plane=0.2,
            eps2d=KERNEL_SIZE,
            backgrounds=background,
            rasterize_mode="antialiased",
        )
        return color, alpha

    first = lambda out: tuple(t.permute(0, 3, 1, 2) for t in out)
    return Impl(run, restore=first, tolerance=5e-2, compared=across_rotation)


def splat_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure one view, as a training step renders of each object; fp32 in any case."""
    edge = 64 if size == "small" else 512
    camera = Camera.orbit([0.3], [0.2], 2.0, math.radians(40), edge).to(device)
    background = torch.ones(1, 3, device=device)

    def inputs(seed: int) -> tuple:
        return tuple(t.to(device).requires_grad_() for t in gaussians(size, seed))

    G = len(inputs(0)[0])
    scene = 4 * GAUSSIAN * G
    picture = 4 * 4 * edge * edge

    def pictures(render, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        image = render(
            *tensors, [0, len(tensors[0])], camera, [0], background.to(tensors[0]), KERNEL_SIZE
        )
        return image.color, image.alpha

    yield Case(
        op="splat",
        size=f"{G} Gaussians, {edge}^2",
        dtype="fp32",
        inputs=inputs,
        forward=[Work(scene + picture)],
        backward=[Work(2 * scene + 2 * picture)],
        ours=lambda *tensors: pictures(splat, *tensors),
        naive=size == "small",
        reference=lambda *tensors: pictures(splat_reference, *tensors),
        baselines={"gsplat": gsplat(camera, background)},
    )
