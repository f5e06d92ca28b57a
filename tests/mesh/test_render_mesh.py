from contextlib import nullcontext

import pytest
import torch

from kernels import backend
from kernels.camera import Camera
from kernels.mesh.clip import projection, to_clip
from kernels.mesh.packing import make_mesh_layout
from kernels.mesh.render import face_camera, render_mesh
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.meshes import VIEWS, ball, cameras, gradients, pictures, scenes


@pytest.mark.sanitizer
def test_batched_equals_looped(device):
    vertices, faces, colors, starts, face_starts = scenes(device)
    view = cameras(4, 19, 11).to(device)
    image = render_mesh(vertices, faces, colors, starts, face_starts, view, VIEWS)
    assert [p.shape[1:] for p in pictures(image)] == [(c, 11, 19) for c in (1, 1, 3, 3, 3)]
    total = gradients(image, (vertices, colors))
    rng = torch.Generator().manual_seed(5)
    upstream = [torch.randn(t.shape, generator=rng).to(t) for t in pictures(image)]
    looped = [torch.zeros_like(t) for t in (vertices, colors)]
    for v, s in enumerate(VIEWS):
        mine = slice(starts[s], starts[s + 1])
        own = slice(face_starts[s], face_starts[s + 1])
        parts = [t[mine].detach().requires_grad_() for t in (vertices, colors)]
        alone = render_mesh(
            parts[0], faces[own], parts[1], [0, len(parts[0])], [0, len(faces[own])], view[v], [0]
        )
        for a, b in zip(pictures(alone), pictures(image), strict=True):
            assert torch.equal(a[0], b[v])
        for whole, g in zip(
            looped,
            torch.autograd.grad(pictures(alone), parts, [u[v : v + 1] for u in upstream]),
            strict=True,
        ):
            whole[mine] += g
    for a, b in zip(total, looped, strict=True):
        assert_close(a, b, 5e-6)
    assert (image.alpha[1] == 0).all() and (image.normal[1] == 0.5).all() and image.alpha[0].any()


def test_scenes_and_views_share_their_launches(kernel_device):
    """Two scenes of one face, which a GPU, too, draws as a large one."""
    triangle = torch.tensor(
        [[-0.5, 0.0, -0.5], [0.5, 0.0, -0.5], [0.0, 0.0, 0.5]], device=kernel_device
    )
    vertices = triangle.repeat(2, 1).requires_grad_()
    colors = torch.rand(6, 6, device=kernel_device, requires_grad=True)
    faces = torch.tensor([[0, 1, 2]] * 2, device=kernel_device)
    counts = []
    for views in (1, 2):
        view = cameras(1, 8, 8, 1.2)[[0] * views].to(kernel_device)
        with backend.count_launches() as count:
            image = render_mesh(vertices, faces, colors, [0, 3, 6], [0, 1, 2], view, [1, 0][:views])
            gradients(image, (vertices, colors))
        counts.append({kernel: n for kernel, n in count.items() if kernel != "_sum_runs"})
    once = (
        "_to_clip",
        "_raster_snap",
        "_raster_small",
        "_raster_large",
        "_raster_resolve",
        "_corner_rows",
        "_normals",
        "_silhouette_pairs",
        "_silhouette_blend",
        "_silhouette_backward",
        "_normals_backward",
        "_raster_backward",
        "_to_clip_backward",
    )
    assert counts == [dict.fromkeys(once, 1) | {"_interpolate": 2, "_interpolate_backward": 2}] * 2


def test_twice_the_same_bits_and_linear_in_the_upstream_gradient(device):
    vertices, faces, colors, starts, face_starts = scenes(device)
    run = lambda: render_mesh(
        vertices, faces, colors, starts, face_starts, cameras(2, 16, 13).to(device), [0, 2]
    )
    first = run()
    second = run()
    assert all(torch.equal(a, b) for a, b in zip(pictures(first), pictures(second), strict=True))
    inputs = (vertices, colors)
    once = gradients(first, inputs)
    again = gradients(second, inputs)
    scaled = gradients(first, inputs, 2.0**20)
    for a, b, c in zip(once, again, scaled, strict=True):
        assert torch.equal(a, b) and torch.equal(a * 2**20, c) and a.abs().max() > 0


def test_kernels_and_torch_agree(kernel_device):
    got = []
    want = []
    for results, here in ((got, kernel_device), (want, torch.device("cpu"))):
        with backend.use("torch") if results is want else nullcontext():
            vertices, faces, colors, starts, face_starts = scenes(here)
            image = render_mesh(
                vertices, faces, colors, starts, face_starts, cameras(2, 23, 14).to(here), [2, 0]
            )
            results += [*pictures(image), *gradients(image, (vertices, colors))]
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 2e-5)


def test_gradients_are_finite_differences_of_a_smooth_loss():
    """Depth, normals and colours inside the silhouettes under every motion of a vertex, float64."""
    vertices, faces, colors = (t.double() if t.is_floating_point() else t for t in ball(4))
    vertices.requires_grad_()
    weight = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)).double()
    weight[:, :, :6] = weight[:, :, 14:] = weight[:, :6] = weight[:, 14:] = 0

    def loss(v):
        image = render_mesh(v, faces, colors, [0, len(v)], [0, len(faces)], cameras(1, 20, 20), [0])
        return ((image.normal[0] ** 2 + image.color[0] + image.depth[0]) * weight).sum()

    (g,) = torch.autograd.grad(loss(vertices), vertices)
    step = 1e-7
    seen = g.abs().max(1).values.argsort(descending=True)[:4].tolist()
    for i in seen:
        for j in range(3):
            values = []
            for sign in (1, -1):
                moved = vertices.detach().clone()
                moved[i, j] += sign * step
                values.append(loss(moved))
            assert abs((values[0] - values[1]) / (2 * step) - g[i, j]) <= 1e-3 * g.abs().max()


def test_to_clip_matches_the_textbook(device):
    """Off-centre principal points and three scenes of different sizes, the middle one empty."""
    view = cameras(4, 16, 12)
    view.intrinsics[:, 0, 2] += 0.06
    view.intrinsics[:, 1, 2] -= 0.04
    starts = [0, 7, 7, 10]
    view_scene = [2, 0, 1, 0]
    N = 10
    layout = make_mesh_layout(starts, [0, 0, 0, 0], view_scene, device)
    vertices = torch.rand(N, 3, generator=torch.Generator().manual_seed(0)) - 0.5

    def reference(v):
        parts = []
        for i, s in enumerate(view_scene):
            uv, z = view[i].project(v.float())
            one = lambda x, s=s: x[0, starts[s] : starts[s + 1]].double()
            xy = (2 * one(uv) - 1) * one(z)[:, None]
            parts.append(torch.cat([xy, (3 / 2 * one(z) - 3 / 2)[:, None], one(z)[:, None]], 1))
        return torch.cat(parts)

    matrix = projection(view, 1.0, 3.0).to(device)
    assert_close(to_clip(vertices.to(device), matrix, layout.vertices), reference(vertices), 2e-6)
    rows = lambda v: torch.cat([v[starts[s] : starts[s + 1]] for s in view_scene])
    many = torch.cat(
        [
            matrix.cpu().double()[i].expand(starts[s + 1] - starts[s], 4, 4)
            for i, s in enumerate(view_scene)
        ]
    )
    exact = lambda v: (many[..., :3] @ rows(v)[..., None])[..., 0] + many[..., 3]
    assert_same(
        lambda v: to_clip(v, matrix, layout.vertices), exact, vertices.to(device).requires_grad_()
    )


def test_an_off_centre_principal_point_shifts_the_picture(device):
    vertices, faces, _ = (t.to(device) for t in ball(4))
    view = cameras(1, 24, 24).to(device)
    moved = Camera(view.extrinsics, view.intrinsics.clone(), 24, 24)
    moved.intrinsics[:, 0, 2] += 3 / 24
    moved.intrinsics[:, 1, 2] -= 2 / 24
    run = lambda camera: (
        render_mesh(vertices, faces, None, [0, len(vertices)], [0, len(faces)], camera, [0]).alpha
    )
    assert_close(run(moved)[..., :-2, 3:], run(view)[..., 2:, :-3], 1e-4)


@pytest.mark.parametrize("V", [0, 2])
def test_nothing_to_see_shows_the_background(device, V):
    vertices = torch.zeros(0, 3, device=device, requires_grad=True)
    colors = torch.zeros(0, 3, device=device, requires_grad=True)
    faces = torch.zeros(0, 3, dtype=torch.int32, device=device)
    image = render_mesh(
        vertices, faces, colors, [0, 0], [0, 0], cameras(V, 6, 5).to(device), [0] * V, ssaa=2
    )
    for name, value, channels in (
        ("alpha", 0, 1),
        ("depth", 0, 1),
        ("normal", 0.5, 3),
        ("color", 0, 3),
    ):
        assert torch.equal(
            getattr(image, name), torch.full((V, channels, 5, 6), float(value), device=device)
        )
    assert image.normal_map is None
    assert torch.autograd.grad(image.alpha.sum() + image.color.sum(), vertices)[0].shape == (0, 3)


def test_normals_turn_to_the_camera(device):
    """Normals of faces that turn inwards, seen from outside, become those of the outward faces."""
    vertices, faces, _ = (t.to(device) for t in ball(5))
    view = cameras(2, 20, 20).to(device)
    run = lambda f: render_mesh(vertices, f, None, [0, len(vertices)], [0, len(f)], view, [0, 0])
    outwards = run(faces)
    inwards = run(faces[:, [0, 2, 1]])
    inside = outwards.alpha == 1
    both = [
        torch.where(inside, face_camera(image.normal, view), 0) for image in (outwards, inwards)
    ]
    assert_close(both[0], both[1], 1e-5)
    assert_close(both[0], torch.where(inside, outwards.normal, 0), 1e-5)
    background = torch.full((2, 3, 20, 20), 0.5, device=device)
    assert torch.equal(face_camera(background, view), background)


def test_sixteen_bit_inputs_are_converted_and_autocast_changes_nothing(device):
    vertices, faces, colors = (t.to(device) for t in ball(3))
    starts = ([0, len(vertices)], [0, len(faces)])
    view = cameras(1, 16, 16).to(device)
    want = render_mesh(
        vertices.half().float(), faces.long(), colors.half().float(), *starts, view, [0]
    )
    with torch.autocast(device.type, torch.bfloat16):
        got = render_mesh(vertices.half(), faces, colors.half(), *starts, view, [0])
    assert all(
        a.dtype == torch.float32 and torch.equal(a, b)
        for a, b in zip(pictures(got), pictures(want), strict=True)
    )


def test_torch_compile_keeps_one_graph(device):
    vertices, faces, colors, starts, face_starts = scenes(device)
    starts = starts.tolist()
    view = cameras(2, 12, 9).to(device)
    run = lambda v, c: pictures(render_mesh(v, faces, c, starts, face_starts, view, [0, 2]))
    torch._dynamo.reset()  # a graph remembers which implementation it was traced for
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(vertices, colors)
    plain = run(vertices, colors)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))
    upstream = [torch.ones_like(t) for t in plain]
    got, want = (
        torch.autograd.grad(out, (vertices, colors), upstream) for out in (compiled, plain)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vertices": torch.zeros(4, 2)}, r"vertices must be \[N, 3\], not \[4, 2\]"),
        (
            {"attributes": torch.zeros(4, 4)},
            r"attributes must be \[4, 3\] or \[4, 6\], not \[4, 4\]",
        ),
        (
            {"faces": torch.tensor([[0, 1, 4], [0, 1, 2]])},
            "2 of 4 faces .* name a vertex that their mesh does not have",
        ),
        ({"vertex_starts": [0, 3]}, r"vertex_starts must rise from 0 to 4, not be \[0, 3\]"),
        ({"face_starts": []}, r"face_starts must rise from 0 to 2, not be \[\]"),
        ({"face_starts": [0, 1, 2]}, "vertex_starts are of 1 scenes, face_starts of 2"),
        ({"view_scene": [0]}, "view_scene names 1 scenes for 2 views"),
        ({"view_scene": [0, 1]}, "view_scene names scene 1 of 1"),
        ({"near": 0.0}, "near and far must be 0 < near < far, not 0.0 and 3.0"),
        ({"far": 0.5}, "near and far must be 0 < near < far, not 1.0 and 0.5"),
        ({"ssaa": 0}, "ssaa must be a whole number, at least 1, not 0"),
        ({"ssaa": 512}, "4096 x 4096 has 16777216 pixels"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_says_what_is_wrong(change, message):
    args = {
        "vertices": torch.rand(4, 3),
        "faces": torch.tensor([[0, 1, 2], [1, 2, 3]]),
        "attributes": torch.rand(4, 3),
    }
    args |= {
        "vertex_starts": [0, 4],
        "face_starts": [0, 2],
        "camera": cameras(2, 8, 8),
        "view_scene": [0, 0],
    }
    with pytest.raises(ValueError, match=message):
        render_mesh(**(args | change))
