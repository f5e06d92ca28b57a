import math

import pytest
import torch

from kernels import backend
from kernels.camera import Camera
from kernels.radiance.raymarch import raymarch
from kernels.radiance.reference import raymarch_reference
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.radiance import camera, colors, grads, outputs, safe_offset, simple, voxels

LAUNCHES = {"_segments": 2, "_march": 1, "_march_backward": 1}


@pytest.mark.parametrize(
    "resolution, rank, dim, sizes, view_scene, density, half",
    [
        (16, 8, 4, [7], [0], 0.0, False),
        (16, 1, 4, [4, 0, 5], [2, 0, 2, 1], 60.0, False),
        (32, 1, 4, [6], [0], 900.0, True),
        (64, 16, 8, [5], [0, 0], 5.0, False),
        (8, 3, 5, [6], [0], 0.0, False),  # neither a power of two
        # the least taps; a resolution that is no power of two
        (20, 2, 2, [6, 0], [0, 1], 0.0, False),
    ],
    ids=str,
)
def test_matches_the_reference(device, resolution, rank, dim, sizes, view_scene, density, half):
    torch.manual_seed(0)  # of the upstream gradients
    position, inputs, starts = voxels(sizes, resolution, rank, dim, device, density=density)
    V = len(view_scene)
    view = camera(V, 19, 14, resolution)
    light = colors(V)
    offset = safe_offset(position, starts, view, view_scene, resolution, dim)
    if half:
        offset = torch.full_like(offset, 0.5)
    on = lambda t: t.to(device)
    run = lambda *x: outputs(
        raymarch(position, *x, starts, on(view), view_scene, on(light), resolution, on(offset))
    )
    slow = lambda *x: outputs(
        raymarch_reference(
            position.cpu().double(), *x, starts, view, view_scene, light, resolution, offset
        )
    )
    rounding = 2.4e-7 * resolution * dim  # of a sample's place, in taps
    assert_same(run, slow, *inputs, tolerance=max(2e-5, 2 * rounding))


@pytest.mark.parametrize(
    "resolution, rank, dim, density",
    [(16, 8, 4, 300.0), (32, 1, 8, 9e3), (64, 16, 8, 0.0), (8, 3, 5, 20.0)],
)
@pytest.mark.parametrize("half", [False, True])
def test_float64_matches_the_reference_to_rounding(resolution, rank, dim, density, half):
    torch.manual_seed(0)  # of the upstream gradients
    position, inputs, starts = voxels(
        [20, 0, 9], resolution, rank, dim, density=density, dtype=torch.float64
    )
    view = camera(3, 21, 16, resolution)
    light = colors(3)
    view_scene = [2, 0, 0]
    offset = torch.rand(3, 16, 21, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if half:
        offset.fill_(0.5)
    args = starts, view, view_scene, light, resolution, offset
    assert_same(
        lambda *x: outputs(raymarch(position, *x, *args)),
        lambda *x: outputs(raymarch_reference(position, *x, *args)),
        *inputs,
        # a sample's place is rounded to 1e-13 taps, and the density times that adds up
        tolerance=1e-9,
    )


def test_a_constant_voxel_is_analytic(device):
    """Transmittance exp(-rho h m) with m = floor(L / h) or one more samples on a chord L."""
    resolution, dim, density = 16, 4, 2.0
    step = 0.5 / dim / resolution
    position = torch.tensor([[8.5, 8.5, 8.5]]) / 16
    view = camera(1, 24, 20, resolution)
    offset = torch.rand(1, 20, 24, generator=torch.Generator().manual_seed(0))
    inputs = (
        t.to(device)
        for t in (torch.ones(1, 2, 3, dim), torch.full((1, 2), density), torch.zeros(1, 2, 1, 3))
    )
    light = torch.zeros(1, 3, device=device)
    image = raymarch(
        position.to(device),
        *inputs,
        [0, 1],
        view.to(device),
        [0],
        light,
        resolution,
        offset.to(device),
    )
    (o,), (d,) = view.to(torch.float64).rays()
    d = torch.nn.functional.normalize(d, dim=-1)
    low = position[0].double() - 0.5 - 0.5 / resolution
    a = (low - o) / d
    b = (low + 1 / resolution - o) / d
    chord = (torch.maximum(a, b).amin(-1) - torch.minimum(a, b).amax(-1)).clamp(min=0)
    rho = math.log1p(math.exp(2 * density))
    m = -torch.log1p(-image.alpha[0, 0].cpu().double()) / (rho * step)
    assert (m - m.round()).abs().max() < 2e-3
    assert ((m.round() - (chord / step).floor()).abs() <= 1).all() and (
        m.round() >= (chord / step - 1e-3).floor()
    ).all()
    assert (m > 0.5).sum() > 10


def test_a_ray_inside_a_face_belongs_to_the_voxel_on_the_positive_side(device):
    """The middle column of an odd picture looks along the plane x = 0, exactly."""
    position = torch.tensor([[3.5, 4.5, 4.5], [4.5, 4.5, 4.5]], device=device) / 8
    inputs = [
        t.to(device)
        for t in (torch.ones(2, 2, 3, 4), torch.full((2, 2), 20.0), torch.zeros(2, 2, 1, 3))
    ]
    view = Camera.orbit(0.0, 0.0, 2.0, 0.04, 9, 9)
    view.extrinsics[:, :3, :3] = view.extrinsics[:, :3, :3].round()
    view.extrinsics[:, :3, 3] = -(view.extrinsics[:, :3, :3] @ torch.tensor([0.0, 2.0, 0.06]))
    assert (view.rays()[1][0, :, 4, 0] == 0).all()
    offset = torch.full((1, 9, 9), 0.37, device=device)
    light = colors(1, device)
    run = lambda keep: raymarch(
        position[keep],
        *(t[keep] for t in inputs),
        [0, len(keep)],
        view.to(device),
        [0],
        light,
        8,
        offset,
    ).alpha[0, 0]
    both = run([0, 1])
    negative = run([0])
    positive = run([1])
    assert torch.equal(both[:, 4], positive[:, 4]) and both[:, 4].min() > 0.9
    assert torch.equal(negative[:, 4], torch.zeros_like(negative[:, 4])) and negative.max() > 0.9


def test_batched_equals_looped(device):
    resolution = 16
    view_scene = [0, 2, 2, 0]
    position, inputs, starts = voxels([4, 0, 5], resolution, 2, 4, device, density=30.0)
    view = camera(4, 16, 13, resolution, device)
    light = colors(4, device)
    offset = torch.rand(4, 13, 16, generator=torch.Generator().manual_seed(2)).to(device)
    image = raymarch(position, *inputs, starts, view, view_scene, light, resolution, offset)
    upstream = torch.randn(image.color.shape, generator=torch.Generator().manual_seed(1)).to(device)
    total = [torch.zeros_like(t) for t in inputs]
    for v, s in enumerate(view_scene):
        mine = slice(starts[s], starts[s + 1])
        own = [t[mine] for t in inputs]
        alone = (view[v], [0], light[v : v + 1], resolution, offset[v : v + 1])
        one = raymarch(position[mine], *own, [0, len(own[0])], *alone)
        for a, b in zip(outputs(one), outputs(image), strict=True):
            if backend.is_torch(a):  # matrix products of other sizes round differently
                assert_close(a[0], b[v], 1e-6)
            else:
                assert torch.equal(a[0], b[v])
        for t, g in zip(
            total, torch.autograd.grad(one.color, inputs, upstream[v : v + 1]), strict=True
        ):
            t += g
    for a, b in zip(torch.autograd.grad(image.color, inputs, upstream), total, strict=True):
        assert_close(a, b, 1e-5)


def test_views_and_scenes_of_a_batch_share_their_launches(kernel_device):
    counts = []
    for B in (1, 3):
        position, inputs, starts = voxels([2] * B, 16, 1, 4, kernel_device)
        view = camera(B, 8, 8, 16, kernel_device)
        light = colors(B, kernel_device)
        with backend.count_launches() as count:
            grads(raymarch(position, *inputs, starts, view, range(B), light, 16), inputs)
        counts.append(dict(count))
    assert counts == [LAUNCHES, LAUNCHES]


@pytest.mark.parametrize(
    "N, away", [(0, 0.0), (7, 9.0), (7, -9.0)], ids=["none", "behind", "aside"]
)
def test_nothing_to_see_shows_the_background(device, N, away):
    position, inputs, starts = voxels([N], 16, 2, 4, device)
    view = camera(2, 12, 9, 16, device)
    light = colors(2, device)
    view.extrinsics[:, 2 if away > 0 else 0, 3] -= away
    image = raymarch(position, *inputs, starts, view, [0, 0], light, 16)
    assert torch.equal(image.color, light[:, :, None, None].expand(2, 3, 9, 12))
    assert (
        not image.alpha.any()
        and not image.depth.any()
        and image.alpha.shape == image.depth.shape == (2, 1, 9, 12)
    )
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads(image, inputs))


def test_no_views(device):
    position, inputs, starts = voxels([3], 16, 2, 4, device)
    image = raymarch(
        position, *inputs, starts, camera(1, 8, 8, 16, device)[:0], [], colors(1, device)[:0], 16
    )
    assert image.color.shape == (0, 3, 8, 8) and image.alpha.shape == image.depth.shape == (
        0,
        1,
        8,
        8,
    )
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads(image, inputs))


def test_twice_the_same_bits_and_linear_in_the_upstream_gradient(device):
    position, inputs, args = simple(device)
    first, second = (raymarch(position, *inputs, *args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(outputs(first), outputs(second), strict=True))
    once = grads(first, inputs)
    again = grads(second, inputs)
    scaled = grads(raymarch(position, *inputs, *args), inputs, 2.0**20)
    for a, b, c in zip(once, again, scaled, strict=True):
        assert torch.equal(a, b) and torch.equal(a * 2**20, c) and a.abs().max() > 0


def test_a_drawn_offset_follows_the_seed_and_serves_the_backward(device):
    position, inputs, (*args, _) = simple(device)
    images = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        images.append(raymarch(position, *inputs, *args))
    torch.manual_seed(0)
    given = raymarch(position, *inputs, *args, torch.rand(2, 12, 15, device=device))
    assert torch.equal(images[0].color, images[1].color) and not torch.equal(
        images[0].color, images[2].color
    )
    assert torch.equal(images[0].color, given.color)
    assert all(
        torch.equal(a, b)
        for a, b in zip(grads(images[0], inputs), grads(given, inputs), strict=True)
    )


def test_gradient_of_one_output_alone(device):
    position, inputs, args = simple(device)
    out = outputs(raymarch(position, *inputs, *args))
    ones = [torch.ones_like(t) for t in out]
    single = [
        torch.autograd.grad(t, inputs, g, retain_graph=True) for t, g in zip(out, ones, strict=True)
    ]
    for *parts, whole in zip(*single, torch.autograd.grad(out, inputs, ones), strict=True):
        assert_close(sum(parts), whole, 1e-5)
    assert torch.equal(single[1][2], torch.zeros_like(inputs[2])) and all(
        g[0].abs().max() > 0 for g in single
    )


def test_no_gradient_for_camera_position_and_background(device):
    position, inputs, (starts, view, view_scene, light, *rest) = simple(device)
    others = [position.requires_grad_(), light.requires_grad_(), view.extrinsics.requires_grad_()]
    raymarch(position, *inputs, starts, view, view_scene, light, *rest).color.sum().backward()
    assert all(t.grad is None for t in others) and inputs[0].grad is not None


def test_a_voxel_of_another_view_or_scene_gets_no_gradient(device):
    position, inputs, (starts, view, _, light, *rest) = simple(device)
    image = raymarch(position, *inputs, starts, view, [1, 1], light, *rest)
    for g in grads(image, inputs):
        assert not g[: starts[1]].any() and g[starts[1] :].any()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's numpy
def test_voxels_that_are_not_finite_show(device):
    position, inputs, args = simple(device)
    with torch.no_grad():
        inputs[0][: args[0][1]] = float("nan")  # of scene 0
    image = raymarch(position, *inputs, *args)
    assert image.color.isnan().any() and any(g.isnan().any() for g in grads(image, inputs))
