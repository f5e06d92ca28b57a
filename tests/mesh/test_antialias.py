import pytest
import torch

from kernels.mesh.antialias import antialias, opposite_vertices
from kernels.mesh.rasterize import rasterize
from kernels.mesh.reference import antialias_reference
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.meshes import ball, batch, positions, soup


def scene(mesh, width: int, height: int, C: int, device, dtype=torch.float32):
    """Image and clip positions that require gradients, picture, faces."""
    vertices, faces, _ = mesh
    clip = positions(vertices, width, height)
    rast = rasterize(clip, faces, height, width)
    image = torch.rand(1, height, width, C, generator=torch.Generator().manual_seed(3))
    return (
        image.to(device, dtype).requires_grad_(),
        clip.to(device, dtype).requires_grad_(),
        rast.to(device, dtype),
        faces.to(device),
    )


@pytest.mark.parametrize(
    "mesh, width, height",
    [(soup(14), 17, 13), (ball(4), 13, 17), (soup(4, 2), 1, 9), (soup(4, 2), 9, 1)],
    ids=["soup", "closed", "column", "row"],
)
def test_matches_the_reference(device, mesh, width, height):
    image, clip, rast, faces = scene(mesh, width, height, 3, device)
    assert_same(
        lambda i, c: antialias(i, rast.to(i), c, faces.to(i.device)),
        lambda i, c: antialias_reference(i, rast.cpu().to(i), c, faces.cpu()),
        image,
        clip,
        tolerance=1e-4,
    )


def test_float64_matches_the_reference_to_rounding():
    image, clip, rast, faces = scene(soup(14), 17, 13, 2, "cpu", torch.float64)
    assert_same(
        lambda i, c: antialias(i, rast, c, faces),
        lambda i, c: antialias_reference(i, rast, c, faces),
        image,
        clip,
    )


def strip(edge: float, device, dtype=torch.float32):
    """Clip positions and faces: a triangle fills a picture of 8 x 4 left of x = `edge` px."""
    x = edge / 4 - 1
    clip = torch.tensor([[x, -3, 0, 1], [x, 3, 0, 1], [-5, 0, 0, 1]], dtype=dtype, device=device)
    return clip, torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device)


@pytest.mark.parametrize("edge", [3.8, 4.2, 3.55, 4.45])
def test_a_vertical_edge_covers_by_area(device, edge):
    clip, faces = strip(edge, device)
    rast = rasterize(clip, faces, 4, 8)
    mask = antialias((rast[..., 3:] > 0).float(), rast, clip, faces)[0, ..., 0]
    want = (edge - torch.arange(8)).clamp(0, 1).expand(4, 8)
    assert_close(mask, want, 1e-6)


def test_pinned_blend(device):
    """An edge at 0.3 px from a pixel's centre gives it 0.2 of the neighbour, which stays."""
    clip, faces = strip(3.8, device)
    rast = rasterize(clip, faces, 4, 8)
    image = torch.rand(1, 4, 8, 2, device=device)
    got = antialias(image, rast, clip, faces)
    assert_close(got[:, :, 3], 0.8 * image[:, :, 3] + 0.2 * image[:, :, 4], 1e-6)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(got[:, :, others], image[:, :, others])


def test_silhouette_gradients_are_finite_differences():
    """Coverage grows by the length of the edge that moves: a vertical edge, a tilted triangle."""
    clip, faces = strip(3.8, "cpu", torch.float64)

    def coverage(c, f, H, W):
        rast = rasterize(c, f, H, W)
        return antialias((rast[..., 3:] > 0).to(c.dtype), rast, c, f).sum()

    (g,) = torch.autograd.grad(coverage(clip.requires_grad_(), faces, 4, 8), clip)
    assert_close(g[:, 0], torch.tensor([8, 8, 0]), 5e-3)  # 2 px of edge each, 4 px per unit of x
    clip = torch.tensor(
        [[-0.62, -0.71, 0, 1.1], [0.93, -0.33, 0.1, 1.4], [0.07, 0.9, 0.2, 1.3]],
        dtype=torch.float64,
    )
    faces = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    step = 1e-6
    (g,) = torch.autograd.grad(coverage(clip.requires_grad_(), faces, 24, 20), clip)
    for i in range(3):
        for j in (0, 1, 3):
            moved = []
            for sign in (1, -1):
                c = clip.detach().clone()
                c[i, j] += sign * step
                moved.append(coverage(c, faces, 24, 20))
            assert abs((moved[0] - moved[1]) / (2 * step) - g[i, j]) <= 5e-3 * g.abs().max()
    assert not g[:, 2].any() and g.abs().max() > 1


def test_batched_equals_looped_and_twice_the_same_bits(device):
    clip, faces, layout = batch(device)
    rast = rasterize(clip, faces, 12, 18, layout.clip_table).detach()
    opposite = opposite_vertices(faces, layout.scene_table, layout.vertices.starts[-1])
    image = (
        torch.rand(5, 12, 18, 2, generator=torch.Generator().manual_seed(3))
        .to(device)
        .requires_grad_()
    )
    run = lambda: antialias(image, rast, clip, faces, layout.clip_table, opposite)
    out = run()
    upstream = torch.randn(5, 12, 18, 2, generator=torch.Generator().manual_seed(4)).to(device)
    grads, again = (torch.autograd.grad(o, (image, clip), upstream) for o in (out, run()))
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    for v, (f, n, row, rows) in enumerate(layout.clip_table.tolist()):
        i = image[v : v + 1].detach().requires_grad_()
        c = clip[row : row + rows].detach().requires_grad_()
        alone = antialias(i, rast[v : v + 1], c, faces[f : f + n])
        assert torch.equal(alone[0], out[v])
        g = torch.autograd.grad(alone, (i, c), upstream[v : v + 1])
        assert torch.equal(g[0][0], grads[0][v])
        assert_close(grads[1][row : row + rows], g[1], 2e-6)


def test_linear_in_the_upstream_gradient(device):
    image, clip, rast, faces = scene(soup(10), 12, 12, 2, device)
    out = antialias(image, rast, clip, faces)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(device)
    once, scaled = (
        torch.autograd.grad(out, (image, clip), upstream * s, retain_graph=True)
        for s in (1, 2.0**20)
    )
    assert all(
        torch.equal(a * 2**20, b) and a.abs().max() > 0 for a, b in zip(once, scaled, strict=True)
    )


def test_one_pixel_has_no_neighbour(device):
    image, clip, rast, faces = scene(soup(4), 1, 1, 3, device)
    out = antialias(image, rast, clip, faces)
    assert torch.equal(out, image) and not torch.autograd.grad(out.sum(), clip)[0].any()


def test_no_faces_leave_the_image(device):
    image = torch.rand(1, 3, 4, 2, device=device, requires_grad=True)
    clip = torch.zeros(0, 4, device=device, requires_grad=True)
    rast = torch.zeros(1, 3, 4, 4, device=device)
    faces = torch.zeros(0, 3, dtype=torch.int32, device=device)
    out = antialias(image, rast, clip, faces)
    assert torch.equal(out, image)
    grads = torch.autograd.grad(out.sum(), (image, clip))
    assert torch.equal(grads[0], torch.ones_like(image)) and grads[1].shape == (0, 4)


def test_registered_with_torch(device):
    clip, faces, layout = batch(device)
    rast = rasterize(clip, faces, 12, 18, layout.clip_table).detach()
    opposite = opposite_vertices(faces, layout.scene_table, layout.vertices.starts[-1])
    image = torch.rand(5, 12, 18, 2, device=device, requires_grad=True)
    args = (
        image,
        rast,
        clip,
        faces,
        layout.clip_table,
        opposite,
        torch.empty(0, dtype=torch.int64, device=device),
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.trislat.antialias.default, args, test_utils=checks)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"image": torch.zeros(1, 4, 5, 2)},
            r"image must be \[1, 4, 4\] pixels of C channels, not \[1, 4, 5, 2\]",
        ),
        ({"clip": torch.zeros(5, 3)}, r"clip must be \[P, 4\], not \[5, 3\]"),
        ({"rast": torch.zeros(1, 4, 4, 3)}, r"rast must be \[V, H, W, 4\], not \[1, 4, 4, 3\]"),
        ({"table": torch.zeros(1, 4, dtype=torch.int64)}, "a table needs `opposite` beside it"),
        (
            {"opposite": torch.zeros(1, 3, dtype=torch.int32)},
            r"opposite must be \[2, 3\], not \[1, 3\]",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_says_what_is_wrong(change, message):
    args = {
        "image": torch.zeros(1, 4, 4, 2),
        "rast": torch.zeros(1, 4, 4, 4),
        "clip": torch.zeros(5, 4),
    }
    with pytest.raises(ValueError, match=message):
        antialias(**(args | {"faces": torch.zeros(2, 3, dtype=torch.int32)} | change))
