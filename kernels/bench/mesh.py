"""Surfaces of the mesh decoder and their pictures: extraction and rendering.

Compulsory bytes: every input once, every output once; no matrix products.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels import Camera, SpatialCache, isosurface, render_mesh
from kernels.bench.case import Case, Impl, Work, optional
from kernels.bench.shells import batch, shell
from kernels.mesh.reference import render_mesh_reference
from kernels.mesh.render import projection, to_clip
from kernels.surface.reference import isosurface_reference
from kernels.views import make_view_table


def _normal(shape: tuple, seed: int, scale: float) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def _surface(size: str, device: torch.device) -> tuple[SpatialCache, Tensor, int]:
    """Make cubes around a ball, their fields, and the resolution of the grid."""
    xyz, resolution = (shell("sphere", 4), 16) if size == "small" else (shell("noisy sphere"), 256)
    cache = SpatialCache(batch(xyz).to(device)).subdivide().subdivide()
    corner = torch.tensor([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(8)], device=device)
    at = (cache.coords[:, None, 1:] + corner) / resolution - 0.5
    fields = _normal((len(cache), 101), 0, 0.1).to(device)
    fields[:, :8] = at.norm(dim=2) - 0.4
    return cache, fields, resolution


def isosurface_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure a training surface with colours.

    Forward reads the fields and writes the surface; backward the other way round.
    """
    cache, fields, resolution = _surface(size, device)
    out = isosurface(cache, fields, resolution, True)
    surface = 4 * (
        out.vertices.numel() + out.faces.numel() + out.attributes.numel() + 4 * len(out.tsdf_value)
    )
    moved = 4 * fields.numel() + surface

    def inputs(seed: int) -> tuple:
        noise = _normal(tuple(fields.shape), seed, 1e-3).to(device)
        return ((fields + noise).requires_grad_(),)

    pick = lambda s: (s.vertices, s.attributes, s.regularizer)
    yield Case(
        op="isosurface",
        size=f"{len(cache)} cubes of {resolution}^3, {len(out.faces)} faces",
        dtype="fp32",
        inputs=inputs,
        forward=[Work(moved)],
        backward=[Work(moved)],
        ours=lambda f: pick(isosurface(cache, f, resolution, True)),
        reference=lambda f: pick(isosurface_reference(cache.coords, f, resolution, True)),
        naive=size == "small",
    )


def nvdiffrast(vertices: int, faces: Tensor, camera: Camera) -> Impl | str:
    """Draw the same picture with nvdiffrast: rasterize, interpolate, antialias.

    Clip positions are made by our kernel, whose tables and matrix are not timed, in its favour.
    """
    module = optional("nvdiffrast.torch")
    if isinstance(module, str):
        return module
    context = module.RasterizeCudaContext(device=faces.device)
    layout = make_view_table([0, vertices], [0], faces.device)
    matrix = projection(camera, 1.0, 3.0)
    faces = faces.int().contiguous()

    def run(vertices: Tensor, colors: Tensor) -> tuple[Tensor, Tensor]:
        clip = to_clip(vertices, matrix, layout)[None]
        rast, _ = module.rasterize(context, clip, faces, (camera.height, camera.width))
        color, _ = module.interpolate(colors[None].contiguous(), rast, faces)
        both = torch.cat([color, (rast[..., 3:] > 0).float()], -1)
        out = module.antialias(both, rast, clip, faces).permute(0, 3, 1, 2)
        return out[:, :3], out[:, 3:]

    return Impl(run, tolerance=5e-2)


def render_mesh_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure one view of a training surface.

    Compulsory are vertices, colours, faces and 11 floats a pixel; backward both again, with
    gradients.
    """
    cache, fields, resolution = _surface(size, device)
    out = isosurface(cache, fields, resolution, True)
    edge = 48 if size == "small" else 512
    camera = Camera.orbit([0.3], [0.2], 2.0, math.radians(40), edge).to(device)
    faces = out.faces
    P = len(out.vertices)
    F = len(faces)
    moved = 4 * (6 * P + 3 * F + 11 * edge * edge)

    def pictures(render: Callable, vertices: Tensor, colors: Tensor) -> tuple[Tensor, Tensor]:
        image = render(vertices, faces, colors, [0, P], [0, F], camera, [0])
        return image.color, image.alpha

    yield Case(
        op="render_mesh",
        size=f"{F} faces, {edge}^2",
        dtype="fp32",
        forward=[Work(moved)],
        backward=[Work(2 * moved)],
        inputs=lambda seed: (
            out.vertices.clone().requires_grad_(),
            out.attributes[:, :3].clone().requires_grad_(),
        ),
        ours=lambda *x: pictures(render_mesh, *x),
        reference=lambda *x: pictures(render_mesh_reference, *x),
        naive=size == "small",
        baselines={"nvdiffrast": nvdiffrast(P, faces, camera)},
    )
