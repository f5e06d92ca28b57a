import math

import pytest
import torch

from kernels import backend
from kernels.camera import Camera
from kernels.radiance.raymarch import _pack, raymarch
from kernels.radiance.reference import raymarch_reference
from tests.conftest import assert_close, assert_same

LAUNCHES = {"_segments": 2, "_march": 1, "_march_backward": 1}


def voxels(sizes, resolution, rank, dim, device="cpu", seed=0, density=0.0, dtype=torch.float32):
    """Position, and trivec, density, sh that require gradients, of scenes of a few voxels around
    the middle; starts.
    """
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=rng, dtype=torch.float64)
    N = sum(sizes)
    block = torch.cartesian_prod(*[torch.arange(4)] * 3) + resolution // 2 - 2
    cells = [block[torch.randperm(64, generator=rng)[:n]] for n in sizes]
    position = (torch.cat([block[:0], *cells]) + 0.5) / resolution
    tensors = [
        1 + 0.3 * normal(N, rank, 3, dim),
        density + (1 + abs(density)) * normal(N, rank),
        normal(N, rank, 1, 3),
    ]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return (
        position.to(device, dtype),
        [t.to(device, dtype).requires_grad_() for t in tensors],
        starts,
    )


def camera(V: int, width: int, height: int, resolution: int, device="cpu") -> Camera:
    """Views of the block of `voxels`, which fills most of them."""
    views = Camera.orbit(
        torch.arange(V) * 2.0 + 0.3,
        torch.arange(V) * 0.4 - 0.5,
        2.0,
        3.4 / resolution,
        width,
        height,
    )
    views.intrinsics[:, 0, 2] += 0.06  # an off-centre principal point
    views.intrinsics[:, 1, 2] -= 0.04
    return views.to(device)


def colors(V: int, device="cpu") -> torch.Tensor:
    return torch.linspace(0, 1, 3 * V, device=device).view(V, 3)


def safe_offset(
    position, starts, view: Camera, view_scene, resolution: int, dim: int
) -> torch.Tensor:
    """Random offsets [V, H, W] that keep every sample away from the faces of voxels, where fp32 and
    float64 may disagree.
    """
    view = view.to("cpu", torch.float64)
    position = position.detach().cpu().double()
    rng = torch.Generator().manual_seed(3)
    chosen = []
    origins, directions = view.rays()
    for v, s in enumerate(view_scene):
        low = position[starts[s] : starts[s + 1]] - 0.5 - 0.5 / resolution
        d = torch.nn.functional.normalize(directions[v].reshape(-1, 3), dim=1)
        a, b = (
            (low + side - origins[v]) / d[:, None] * (2 * dim * resolution)
            for side in (0, 1 / resolution)
        )
        near, far = torch.minimum(a, b).amax(2, True), torch.maximum(a, b).amin(2, True)
        t = torch.where(far > near - 0.1, torch.cat([near, far], 2), 0.0).flatten(1)
        t = torch.nn.functional.pad(t, (0, 1))
        candidates = torch.rand(100, len(d), generator=rng, dtype=torch.float64) * 0.9 + 0.05
        distance = ((t - candidates[..., None] + 0.5) % 1 - 0.5).abs().amin(2)
        chosen.append(candidates.gather(0, distance.argmax(0)[None]).view(view.height, view.width))
        assert distance.amax(0).min() > 2e-3
    return torch.stack(chosen).float() if chosen else torch.zeros(0, view.height, view.width)


def outputs(image) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert image.normal is None
    return image.color, image.alpha, image.depth


def grads(image, inputs, scale: float = 1.0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    upstream = [scale * torch.randn(t.shape, generator=rng).to(t) for t in outputs(image)]
    return list(torch.autograd.grad(outputs(image), inputs, upstream))


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


def simple(device, density: float = 30.0, dtype=torch.float32, sizes=(3, 4)):
    """Two scenes, two views and their arguments."""
    position, inputs, starts = voxels(sizes, 16, 2, 4, device, density=density, dtype=dtype)
    offset = torch.rand(2, 12, 15, generator=torch.Generator().manual_seed(4)).to(device)
    return (
        position,
        inputs,
        (starts, camera(2, 15, 12, 16, device), [1, 0], colors(2, device), 16, offset),
    )


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


def test_sixteen_bit_inputs_are_converted(device):
    position, half, args = simple(device, dtype=torch.float16)
    full = [t.detach().float().requires_grad_() for t in half]
    a = raymarch(position, *half, *args)
    b = raymarch(position.float(), *full, *args)
    assert a.color.dtype == torch.float32 and torch.equal(a.color, b.color)
    for g, h in zip(grads(a, half), grads(b, full), strict=True):
        assert g.dtype == torch.float16 and torch.equal(g, h.half())


def test_autocast_changes_nothing(device):
    position, inputs, args = simple(device)
    image = raymarch(position, *inputs, *args)
    want = grads(image, inputs)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = raymarch(position, *inputs, *args)
        got = grads(mixed, inputs)
    assert torch.equal(mixed.color, image.color) and all(
        torch.equal(a, b) for a, b in zip(got, want, strict=True)
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


def test_registered_with_torch(device):
    position, inputs, (starts, view, view_scene, light, resolution, offset) = simple(device)
    packed = (
        torch.cat([inputs[0].permute(0, 2, 3, 1).flatten(1), inputs[1], inputs[2].flatten(1)], 1)
        .detach()
        .requires_grad_()
    )
    args = (
        packed,
        position,
        _pack(view).float(),
        offset,
        light,
        starts,
        view_scene,
        resolution,
        2,
        4,
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.trislat.raymarch.default, args, test_utils=checks)


def test_torch_compile_keeps_one_graph(device):
    position, inputs, args = simple(device, sizes=(2, 1))
    run = lambda *x: outputs(raymarch(position, *x, *args))
    torch._dynamo.reset()  # a graph remembers which implementation it was traced for
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(*inputs), strict=True))
    upstream = [torch.ones_like(t) for t in compiled]
    got, want = (torch.autograd.grad(out, inputs, upstream) for out in (compiled, run(*inputs)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"position": torch.zeros(4, 2)}, r"position must be \[N, 3\], not \[4, 2\]"),
        ({"trivec": torch.zeros(5, 2, 3, 4)}, r"trivec must be \[4, R, 3, n\], not \[5, 2, 3, 4\]"),
        ({"trivec": torch.zeros(4, 2, 4, 4)}, r"trivec must be \[4, R, 3, n\], not \[4, 2, 4, 4\]"),
        ({"trivec": torch.zeros(4, 2, 3, 1)}, "at least 2 taps, not 2 and 1"),
        ({"density": torch.zeros(4, 3)}, r"density must be \[4, 2\], not \[4, 3\]"),
        ({"sh": torch.zeros(4, 2, 3)}, r"sh must be \[4, 2, 1, 3\], not \[4, 2, 3\]"),
        (
            {"sh": torch.zeros(4, 2, 4, 3)},
            "sh has 4 coefficients per channel: only degree 0, 1 coefficient",
        ),
        ({"starts": [0, 3]}, r"from 0 to the 4 voxels, not be \[0, 3\]"),
        ({"starts": torch.tensor([1, 4])}, r"from 0 to the 4 voxels, not be \[1, 4\]"),
        ({"starts": [0, 3, 2, 4]}, r"from 0 to the 4 voxels, not be \[0, 3, 2, 4\]"),
        ({"view_scene": [0]}, "view_scene names 1 scenes for 2 views"),
        ({"view_scene": [0, 1]}, "view_scene names scene 1 of 1"),
        ({"view_scene": [0, -1]}, "view_scene names scene -1 of 1"),
        ({"background": torch.zeros(3)}, r"background must be \[2, 3\], not \[3\]"),
        ({"resolution": -8}, "resolution must be a whole number, at least 1, not -8"),
        ({"resolution": 16.0}, "resolution must be a whole number, at least 1, not 16.0"),
        (
            {"resolution": 20},
            r"position 0 of 4 is \[.*\], not \(whole number \+ 0.5\) / resolution 20",
        ),
        (
            {"position": torch.tensor([[0.53125] * 3] * 3 + [[0.53125, 1.53125, 0.53125]])},
            r"position 3 of 4 is .*1.53125.*outside",
        ),
        (
            {"position": torch.tensor([[0.53125] * 3] * 3 + [[-0.03125] * 3])},
            r"position 3 of 4 is .*-0.03125.*outside \[0, 1\]",
        ),
        ({"position": torch.full((4, 3), float("nan"))}, "position 0 of 4 is .*nan.*outside"),
        ({"offset": torch.zeros(2, 8, 9)}, r"offset must be \[2, 8, 8\], not \[2, 8, 9\]"),
        (
            {"offset": torch.eye(8).expand(2, 8, 8)},
            r"offset must lie in \[0, 1\), not be 1.0 at view 0, row 0, column 0",
        ),
        ({"offset": -torch.eye(8).expand(2, 8, 8)}, r"offset must lie in \[0, 1\), not be -1.0"),
        ({"density": torch.zeros(4, 2, dtype=torch.int32)}, "floating point, not torch.int32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_says_what_is_wrong(device, change, message):
    position, inputs, starts = voxels([4], 16, 2, 4, device)
    args = dict(zip(("trivec", "density", "sh"), inputs, strict=True)) | {
        "position": position,
        "starts": starts,
    }
    args |= {
        "camera": camera(2, 8, 8, 16, device),
        "view_scene": [0, 0],
        "background": colors(2, device),
        "resolution": 16,
    }
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        raymarch(**(args | change))


def test_kernels_take_no_float64(kernel_device):
    position, inputs, args = simple(kernel_device, dtype=torch.float64)
    with pytest.raises(ValueError, match="fp32: float64 is for the torch path only"):
        raymarch(position, *inputs, *args)
