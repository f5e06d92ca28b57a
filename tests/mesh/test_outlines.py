"""Outlines moved by pixels: against a reference, areas of spheres, and the published rule."""

import math

import pytest
import torch

from kernels.camera import Camera
from kernels.mesh.outlines import move_outlines
from kernels.mesh.packing import single_table
from kernels.mesh.rasterize import rasterize
from kernels.mesh.reference import move_outlines_reference
from kernels.mesh.render import render_mesh
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.meshes import VIEWS, cameras, gradients, pictures, positions, scenes, soup


@pytest.mark.parametrize(
    "width, height, F", [(17, 12, 20), (1, 9, 9), (9, 1, 9), (1, 1, 3), (8, 8, 0)]
)
def test_gradients_match_the_reference(device, width, height, F):
    vertices, faces, _ = soup(F)
    clip = positions(vertices, width, height).to(device)
    rast = rasterize(clip, faces.to(device), height, width)
    picture = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0)).to(device)
    table = single_table(F, len(clip), device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    mesh = (faces.to(device).int(), table, none)
    run = lambda c: move_outlines(picture.to(c), rast.to(c), c, *mesh) + 0 * c.sum()
    slow = lambda c: move_outlines_reference(picture.to(c), rast.to(c), c, faces) + 0 * c.sum()
    assert_same(run, slow, clip.requires_grad_())


def sphere(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit sphere, closed but for doubled vertices: n x 2 n quads between the poles."""
    theta = torch.linspace(0, math.pi, n + 1)
    phi = torch.linspace(0, 2 * math.pi, 2 * n + 1)
    t, p = (x.flatten() for x in torch.meshgrid(theta, phi, indexing="ij"))
    i = torch.arange(n * (2 * n + 1)).view(n, -1)[:, :-1].flatten()
    a = i
    b = i + 1
    c = i + 2 * n + 1
    d = i + 2 * n + 2
    return torch.stack([t.sin() * p.cos(), t.sin() * p.sin(), t.cos()], 1), torch.cat(
        [
            torch.stack([a, c, b], 1),
            torch.stack([b, c, d], 1),
        ]
    )


def growth(n: int, silhouettes: str, edge: int = 64) -> float:
    """The derivative of the covered area by the radius, over that of a perfect sphere's disc."""
    vertices, faces = sphere(n)
    camera = Camera.orbit([0.3], [0.4], 2.0, math.radians(40), edge)
    size = torch.tensor(0.35, requires_grad=True)
    image = render_mesh(
        vertices * size,
        faces,
        None,
        [0, len(vertices)],
        [0, len(faces)],
        camera,
        [0],
        silhouettes=silhouettes,
    )
    focal = edge / (2 * math.tan(math.radians(20)))
    r = 0.35
    # of the disc pi focal^2 r^2 / (d^2 - r^2), d = 2
    exact = 2 * math.pi * r * 4 / (4 - r * r) ** 2 * focal**2
    return torch.autograd.grad(image.alpha.sum(), size)[0].item() / exact


def test_an_outline_grows_as_the_surface_does_whatever_its_triangles():
    """6 pixels a triangle, and a tenth of one."""
    assert [growth(n, "pixels") for n in (8, 70)] == pytest.approx([0.97, 1.0], abs=0.02)
    # as published: of so small triangles hardly any silhouette moves
    assert growth(70, "edges") < 0.02


def test_a_shifted_surface_takes_its_coverage_along():
    """The first moment of the coverage moves by its area, in both axes, each its own way."""
    vertices, faces = sphere(40)
    for axis in (0, 1):
        camera = Camera.orbit([0.0], [0.0], 2.0, 0.7, 96, 96)
        shift = torch.zeros(3, requires_grad=True)
        moved = 0.3 * vertices + camera.extrinsics[0, axis, :3] * shift[0]
        image = render_mesh(
            moved,
            faces,
            None,
            [0, len(vertices)],
            [0, len(faces)],
            camera,
            [0],
            silhouettes="pixels",
        )
        place = torch.arange(96.0) + 0.5
        moment = (image.alpha[0, 0] * (place[None, :] if axis == 0 else place[:, None])).sum()
        focal = 48 / math.tan(0.35)
        speed = torch.autograd.grad(moment, shift)[0][0].item() / image.alpha.sum().item()
        # nearer than the rim, so faster
        assert speed == pytest.approx(focal * 2 / (4 - 0.09), rel=0.04)


def test_the_picture_is_the_published_one_and_batches_are_loops(device):
    vertices, faces, colors, starts, face_starts = scenes(device)
    view = cameras(4, 19, 11).to(device)
    by_edges, by_pixels = (
        render_mesh(vertices, faces, colors, starts, face_starts, view, VIEWS, silhouettes=s)
        for s in ("edges", "pixels")
    )
    assert all(
        torch.equal(a, b) for a, b in zip(pictures(by_edges), pictures(by_pixels), strict=True)
    )
    a, b, again = (
        gradients(image, (vertices, colors)) for image in (by_edges, by_pixels, by_pixels)
    )
    assert (
        torch.equal(a[1], b[1]) and not torch.allclose(a[0], b[0]) and torch.equal(b[0], again[0])
    )
    total = torch.zeros_like(vertices)
    rng = torch.Generator().manual_seed(5)
    upstream = [torch.randn(t.shape, generator=rng).to(t) for t in pictures(by_pixels)]
    for v in range(4):
        image = render_mesh(
            vertices,
            faces,
            colors,
            starts,
            face_starts,
            view[v],
            VIEWS[v : v + 1],
            silhouettes="pixels",
        )
        total += torch.autograd.grad(pictures(image), vertices, [u[v : v + 1] for u in upstream])[0]
    assert_close(b[0], total, 5e-6)


def test_unknown_silhouettes_are_refused():
    vertices, faces = sphere(2)
    with pytest.raises(ValueError, match="silhouettes 'pixel' is not one of edges, pixels"):
        render_mesh(
            vertices, faces, None, [0, 15], [0, 16], cameras(1, 4, 4), [0], silhouettes="pixel"
        )
