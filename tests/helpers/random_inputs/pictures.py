"""Random inputs of ops that make or compare pictures, and of those that make meshes."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import backend
from kernels.gaussian.reference import splat_reference
from kernels.gaussian.splat import splat
from kernels.mesh.antialias import antialias
from kernels.mesh.attributes import flat_normals, interpolate
from kernels.mesh.clip import projection, to_clip
from kernels.mesh.packing import make_mesh_layout
from kernels.mesh.rasterize import rasterize
from kernels.mesh.reference import (
    antialias_reference,
    flat_normals_reference,
    interpolate_reference,
    rasterize_reference,
    render_mesh_reference,
    to_clip_reference,
)
from kernels.mesh.render import render_mesh
from kernels.radiance.raymarch import raymarch
from kernels.radiance.reference import raymarch_reference
from kernels.similarity import ssim, ssim_reference
from kernels.surface.isosurface import isosurface
from kernels.surface.reference import isosurface_reference
from tests.helpers import gaussians as small_scenes
from tests.helpers import meshes
from tests.helpers import radiance as small_fields
from tests.helpers.random_inputs.choices import RENDERED, Case, Draw


def similarity(d: Draw) -> Case:
    side = 24 if d.fast else 9
    shape = d.number(0, 2), d.number(1, 3), d.number(1, side), d.number(1, side)
    # a variance of 16-bit numbers is not one of their roundings: 8 bits are too few
    dtype = d.pick(torch.float32, torch.float16)
    a = d.uniform(*shape, dtype=dtype)
    b = (a.detach() + 0.2 * d.normal(*shape, dtype=dtype).detach()).clamp(0, 1).requires_grad_()
    # sums instead of means, so that the tolerance sees the gradients
    pixels = a[0].numel() if len(a) else 1
    return Case(
        lambda a, b: ssim(a, b) * pixels, lambda a, b: ssim_reference(a, b) * pixels, [a, b]
    )


def surfaces(d: Draw) -> Case:
    R, channels, training = d.number(1, 6), d.pick(53, 101), d.pick(False, True)
    cache = d.cache(40, R)
    coords = cache.coords.cpu()
    B = cache.batch_size
    tensors = [d.normal(len(cache), channels, dtype=d.exact())]
    return Case(
        lambda f: isosurface(cache, f, R, training),
        lambda f: isosurface_reference(coords, f, R, training, B),
        tensors,
    )


def _mesh(d: Draw) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Vertices, faces, clip positions, height, width of one view of one mesh."""
    F = d.number(0, 16)
    height = d.number(1, 14)
    width = d.number(1, 14)
    vertices, faces, _ = meshes.soup(F, d.seed)
    clip = meshes.positions(vertices, width, height, d.pick(2.0, 1.2, 0.5))
    return vertices, faces, clip, height, width


def _picture(clip: Tensor, faces: Tensor, height: int, width: int, d: Draw) -> Tensor:
    dtype = d.exact()
    with backend.use("torch"):
        return rasterize(clip, faces, height, width).to(d.device, dtype)


def rasters(d: Draw) -> Case:
    _, faces, clip, height, width = _mesh(d)
    tensor = clip.to(d.device, d.exact()).requires_grad_()
    there = faces.to(d.device)
    return Case(
        lambda c: rasterize(c, there, height, width),
        lambda c: rasterize_reference(c, faces, height, width),
        [tensor],
        1e-4,
    )


def attributes(d: Draw) -> Case:
    """Interpolated values, and normals of faces."""
    vertices, faces, *rest = _mesh(d)
    rast = _picture(rest[0], faces, *rest[1:], d)
    there = faces.to(d.device)
    exact = rast.cpu().double()
    if d.pick(0, 1):
        tensor = vertices.to(rast).requires_grad_()
        return Case(
            lambda v: flat_normals(v, rast, there),
            lambda v: flat_normals_reference(v, exact, faces),
            [tensor],
            1e-4,
        )
    tensor = d.normal(len(vertices), d.number(1, 7), dtype=rast.dtype)
    return Case(
        lambda a: interpolate(a, rast, there),
        lambda a: interpolate_reference(a, exact, faces),
        [tensor],
    )


def silhouettes(d: Draw) -> Case:
    _, faces, clip, height, width = _mesh(d)
    rast = _picture(clip, faces, height, width, d)
    there = faces.to(d.device)
    exact = rast.cpu().double()
    tensors = [
        d.normal(1, height, width, d.number(1, 4), dtype=rast.dtype),
        clip.to(rast).requires_grad_(),
    ]
    return Case(
        lambda i, c: antialias(i, rast, c, there),
        lambda i, c: antialias_reference(i, exact, c, faces),
        tensors,
        1e-4,
    )


def _scenes(
    d: Draw, most: int, views: int
) -> tuple[list[int], list[int], Tensor, Tensor, list[int]]:
    """Starts of vertices and of faces of 1 to 3 scenes of up to `most` faces, vertices, faces, the
    scene of each view.
    """
    soups = [meshes.soup(d.number(0, most), d.seed + i) for i in range(d.number(1, 3))]
    starts = [d.starts([len(part[i]) for part in soups]).tolist() for i in (0, 1)]
    vertices, faces = (torch.cat([part[i] for part in soups]) for i in (0, 1))
    return (
        *starts,
        vertices,
        faces,
        [d.number(0, len(soups) - 1) for _ in range(d.number(0, views))],
    )


def projections(d: Draw) -> Case:
    starts, face_starts, vertices, _, view_scene = _scenes(d, 60, 4)
    view = meshes.cameras(len(view_scene), 1, 1, d.pick(2.0, 0.5))
    layout = make_mesh_layout(starts, face_starts, view_scene, d.device)
    matrix = projection(view, 1.0, d.pick(3.0, 100.0), torch.float64)
    tensor = vertices.to(d.device, d.exact()).requires_grad_()
    there = matrix.to(d.device, d.exact())

    def reference(v: Tensor) -> Tensor:
        rows = [
            to_clip_reference(v[starts[s] : starts[s + 1]], m)
            for m, s in zip(matrix, view_scene, strict=True)
        ]
        return torch.cat([v.new_zeros(0, 4) + 0 * v.sum(), *rows])

    return Case(lambda v: to_clip(v, there, layout.vertices), reference, [tensor])


def mesh_pictures(d: Draw) -> Case:
    """All pictures of several scenes and views at once."""
    starts, face_starts, vertices, faces, view_scene = _scenes(d, 10, 2)
    view = meshes.cameras(len(view_scene), d.number(1, 11), d.number(1, 11), d.pick(2.0, 1.2, 0.5))
    tensors = [vertices.to(d.device, d.exact()).requires_grad_()]
    if channels := d.pick(0, 3, 6):
        tensors.append(d.normal(len(vertices), channels, dtype=d.exact()))
    there = (view.to(d.device), view_scene)
    index = faces.to(d.device, d.pick(torch.int32, torch.int64))

    def outputs(render: Callable, triangles: Tensor, *rest) -> Callable:
        def run(v: Tensor, a: Tensor | None = None) -> list[Tensor]:
            image = render(v, triangles, a, starts, face_starts, *rest)
            known = (image.alpha, image.depth, image.normal, image.color, image.normal_map)
            return [t for t in known if t is not None]

        return run

    return Case(
        outputs(render_mesh, index, *there),
        outputs(render_mesh_reference, faces, view, view_scene),
        tensors,
        1e-4,
    )


def gaussians(d: Draw) -> Case:
    sizes = [d.number(0, 12) for _ in range(d.number(1, 3))]
    V = d.number(1, 3)
    size = d.number(1, 33), d.number(1, 33)
    view_scene = [d.number(0, len(sizes) - 1) for _ in range(V)]
    starts = d.starts(sizes).tolist()
    tensors = small_scenes.scene(sum(sizes), d.device, d.seed, d.exact())
    view = small_scenes.camera(V, *size)
    light = small_scenes.colors(V)
    there = view.to(d.device), view_scene, light.to(d.device)
    return Case(
        lambda *x: small_scenes.both(splat(*x, starts, *there, 0.3)),
        lambda *x: small_scenes.both(splat_reference(*x, starts, view, view_scene, light, 0.3)),
        tensors,
        RENDERED,
    )


def radiance(d: Draw) -> Case:
    sizes = [d.number(0, 6) for _ in range(d.number(1, 3))]
    V = d.number(1, 2)
    resolution = d.pick(8, 16, 20, 32)
    rank, dim = d.width((d.number(1, 4), d.number(2, 5)), (1, 4), (2, 4), (3, 5))
    density = d.pick(0.0, 60.0)
    view_scene = [d.number(0, len(sizes) - 1) for _ in range(V)]
    position, tensors, starts = small_fields.voxels(
        sizes, resolution, rank, dim, d.device, d.seed, density, d.exact()
    )
    view = small_fields.camera(V, d.number(1, 17), d.number(1, 17), resolution)
    light = small_fields.colors(V)
    offset = small_fields.safe_offset(position, starts, view, view_scene, resolution, dim)
    there = [t.to(d.device) for t in (view, light, offset)]
    at = position.cpu().double()
    return Case(
        lambda *x: small_fields.outputs(
            raymarch(position, *x, starts, there[0], view_scene, there[1], resolution, there[2])
        ),
        lambda *x: small_fields.outputs(
            raymarch_reference(at, *x, starts, view, view_scene, light, resolution, offset)
        ),
        tensors,
        max(RENDERED, 5e-7 * resolution * dim),
    )
