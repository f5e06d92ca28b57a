import math

import pytest
import torch

from kernels import backend
from kernels.camera import Camera
from kernels.gaussian import blend
from kernels.gaussian import project as projection
from kernels.gaussian.project import project
from kernels.gaussian.project_cpu import project_torch
from kernels.gaussian.records import Projected
from kernels.gaussian.reference import splat_reference
from kernels.gaussian.splat import _pack, splat
from kernels.views import make_view_table
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.gaussians import both, camera, colors, grads, scene
from tests.helpers.golden import golden
from tests.helpers.hardware import with_long_cases

CASES = [
    "gs_a_init_64",
    "gs_a_trained_64",
    "gs_af_trained_k03_50",
    "gs_b_needles_48",
    "gs_c_opaque_48",
    "gs_d_equal_depth_48",
    "gs_e_outside_64",
    "gs_g_all_culled_32",
    "gs_h_straddle_64",
    "gs_i_shell16_72",  # the largest
]
INPUTS = ["means3D", "scales", "rotations", "opacities", "shs"]
BACKWARD = {
    "_project": 1,
    "_emit": 1,
    "_divide": 1,
    "_blend": 1,
    "_blend_backward": 1,
    "_project_backward": 1,
}


def golden_scene(case: str, device) -> tuple[dict, dict, list[torch.Tensor], Camera]:
    note, tensors = golden(case)
    inputs = [tensors[name].to(device).requires_grad_() for name in INPUTS]
    view = Camera(tensors["extrinsics"][None], tensors["intrinsics"][None], note["W"], note["H"])
    return note, tensors, inputs, view.to(device)


@pytest.mark.parametrize(
    ("device", "case"), with_long_cases(CASES[:-1], CASES[-1:]), indirect=["device"]
)
def test_published_images_and_gradients(device, case):
    note, tensors, inputs, view = golden_scene(case, device)
    image = splat(
        *inputs, [0, note["N"]], view, [0], tensors["bg"][None].to(device), note["kernel_size"]
    )
    gradients = torch.autograd.grad(
        (image.color[0] * tensors["dL_dimage"].to(device)).sum(), inputs
    )
    got = {"image": image.color[0], "final_T": 1 - image.alpha[0, 0]}
    got |= {f"dL_d{name}": g for name, g in zip(INPUTS, gradients, strict=True)}
    for name, value in got.items():
        want = tensors.get(f"f64_{name}", tensors[name]).double()
        difference = value.detach().cpu().double() - want
        limit = note["tolerance"][name]
        relative = limit["rel_l2_if_exact_derivative"]
        largest = limit["max_abs_if_exact_derivative"]
        assert difference.norm() <= relative * want.norm() + 1e-12, (
            f"{name}: {difference.norm() / want.norm():.2e}"
        )
        assert difference.abs().max() <= largest, (
            f"{name}: {difference.abs().max():.2e} > {largest:.2e}"
        )


def projected(inputs, view: Camera, kernel_size: float = 0.1, starts=None, view_scene=(0,)):
    """The projection stage of the implementation under test."""
    packed = torch.cat([t.detach().flatten(1) for t in inputs], 1)
    layout = make_view_table(starts or [0, len(packed)], list(view_scene), packed.device)
    scene = packed, _pack(view, packed.dtype), layout, view.width, view.height, kernel_size
    if backend.is_torch(packed):
        return project_torch(*scene)
    p = project(*scene)
    mx, my, across, shear, down, strength, r, g, b = p.record[:, :9].unbind(1)
    rect = p.record.view(torch.int32)[:, 9:13]
    rect = torch.cat([rect[:, :2] // p.parts, -(-rect[:, 2:] // p.parts)], 1)
    across, down = (-2 * math.log(2) * t for t in (across, down))
    conic = across + down * shear**2, down * shear, down
    record = torch.stack([mx, my, *conic, torch.exp2(strength), r, g, b], 1)
    assert torch.equal(p.tiles, (rect[:, 2:] - rect[:, :2]).prod(1, dtype=torch.int32))
    return Projected(record, p.depth, rect, p.record.view(torch.int32)[:, 13])


@pytest.mark.parametrize("case", CASES)
def test_rectangles_are_the_published_ones_less_what_cannot_be_seen(device, case):
    note, tensors, inputs, view = golden_scene(case, device)
    p = projected(inputs, view, note["kernel_size"])
    mean, conic, opacity = p.record.cpu().split_with_sizes([2, 3, 4], 1)[:3]
    opacity = opacity[:, 0]
    rect = p.rect.cpu()
    radii = tensors["radii"].float()
    grid = torch.tensor([-(-note["W"] // 16), -(-note["H"] // 16)])
    low = ((mean - radii[:, None]) / 16).trunc().int().clamp(min=0)
    high = torch.minimum(((mean + radii[:, None] + 15) / 16).trunc().int().clamp(min=0), grid)
    drawn = rect[:, 2] > rect[:, 0]
    assert not drawn[(radii == 0) | (opacity < 1 / 255)].any()
    assert (rect[drawn, :2] >= low[drawn]).all() and (rect[drawn, 2:] <= high[drawn]).all()
    smaller = (radii > 0) & (torch.cat([low, high], 1) != rect).any(1)
    y, x = torch.meshgrid(torch.arange(grid[1] * 16), torch.arange(grid[0] * 16), indexing="ij")
    for i in smaller.nonzero()[:, 0].tolist():
        dx, dy = mean[i, 0] - x, mean[i, 1] - y
        e = -0.5 * (conic[i, 0] * dx * dx + conic[i, 2] * dy * dy) - conic[i, 1] * dx * dy
        inside = lambda a, b: (
            (x // 16 >= a[0]) & (y // 16 >= a[1]) & (x // 16 < b[0]) & (y // 16 < b[1])
        )
        lost = inside(low[i], high[i]) & ~inside(rect[i, :2], rect[i, 2:])
        assert not (lost & (e <= 0) & (opacity[i] * e.exp() >= 1 / 255)).any()


def test_pinned_numbers(device):
    inputs = [
        torch.zeros(1, 3),
        torch.full((1, 3), 0.0041),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.full((1, 1), 0.1),
    ]
    inputs = [t.to(device) for t in [*inputs, torch.zeros(1, 1, 3)]]
    p = projected(inputs, Camera.orbit(0.0, 0.0, 2.0, math.radians(40), 512, device=device))
    want = torch.tensor([[255.5, 255.5, 0.4589247, 0, 0.4589247, 0.0954108, 0.5, 0.5, 0.5]])
    assert torch.allclose(p.record.cpu(), want, rtol=2e-6, atol=1e-7)
    assert_close(p.depth, torch.tensor([2.0]), 1e-6)
    assert p.rect.tolist() == [[15, 15, 17, 17]]  # radius 5


@pytest.mark.parametrize(
    "width, height, sizes, view_scene",
    [
        (37, 20, [60], [0]),
        (16, 50, [25, 0, 40], [2, 0, 2, 1]),
        (1, 1, [5], [0]),
        (33, 17, [1], [0, 0]),
        (30, 30, [0, 0], [1]),
    ],
    ids=str,
)
def test_matches_the_reference(device, width, height, sizes, view_scene):
    starts = torch.tensor([0, *sizes]).cumsum(0)
    inputs = scene(sum(sizes), device)
    V = len(view_scene)
    run = lambda *x: both(
        splat(*x, starts, camera(V, width, height, device), view_scene, colors(V, device), 0.3)
    )
    slow = lambda *x: both(
        splat_reference(*x, starts, camera(V, width, height), view_scene, colors(V), 0.3)
    )
    assert_same(run, slow, *inputs)


def test_opaque_stacks_match_the_reference(device):
    """Tiles that stop before their list ends, and alpha at its clamp, whose gradient passes.

    It divides by 1 - alpha, which is 0.01, so rounding counts a hundredfold, and differs between
    processors.
    """
    inputs = scene(24, device)
    with torch.no_grad():
        inputs[1].fill_(0.5)
        inputs[3].fill_(0.9999)
    run = lambda *x: both(splat(*x, [0, 24], camera(1, 34, 20, device), [0], colors(1, device)))
    slow = lambda *x: both(splat_reference(*x, [0, 24], camera(1, 34, 20), [0], colors(1)))
    assert_same(run, slow, *inputs, tolerance=5e-5)


def test_float64_matches_the_reference_to_rounding():
    inputs = scene(80, "cpu", dtype=torch.float64)
    with torch.no_grad():
        inputs[3][:10] = 0.999  # beyond the clamp of alpha
        inputs[1][:20] *= 4
        inputs[0][20:30] *= 4  # beyond the clamp of the frustum
    view = camera(3, 40, 25)
    light = colors(3)
    assert_same(
        lambda *x: both(splat(*x, [0, 30, 80], view, [1, 0, 1], light)),
        lambda *x: both(splat_reference(*x, [0, 30, 80], view, [1, 0, 1], light)),
        *inputs,
    )


def test_batched_equals_looped(device):
    inputs = scene(45, device)
    starts = [0, 20, 45]
    view = camera(6, 20, 16, device)
    light = colors(6, device)
    view_scene = [0, 1, 1, 0, 1, 0]
    image = splat(*inputs, starts, view, view_scene, light)
    total = [torch.zeros_like(t) for t in inputs]
    upstream = torch.randn(image.color.shape, generator=torch.Generator().manual_seed(1)).to(device)
    tolerance = 2e-5 if backend.is_torch(image.color) else 2e-6
    for v, s in enumerate(view_scene):
        mine = slice(starts[s], starts[s + 1])
        alone = splat(
            *(t[mine] for t in inputs), [0, mine.stop - mine.start], view[v], [0], light[v : v + 1]
        )
        for a, b in zip(both(alone), both(image), strict=True):
            if backend.is_torch(a):  # matrix products of other sizes round differently
                assert_close(a[0], b[v], 1e-6)
            else:
                assert torch.equal(a[0], b[v])
        for t, g in zip(
            total, torch.autograd.grad(alone.color, inputs, upstream[v : v + 1]), strict=True
        ):
            t += g
    for a, b in zip(torch.autograd.grad(image.color, inputs, upstream), total, strict=True):
        assert_close(a, b, tolerance)


def test_views_and_scenes_of_a_batch_share_their_launches(kernel_device):
    counts = []
    for B in (1, 4):
        inputs = scene(5 * B, kernel_device)
        view = camera(B, 16, 16, kernel_device)
        with backend.count_launches() as count:
            grads(
                splat(*inputs, range(0, 5 * B + 1, 5), view, range(B), colors(B, kernel_device)),
                inputs,
            )
        counts.append(dict(count))
    assert counts == [BACKWARD, BACKWARD]


@pytest.mark.parametrize(
    "G, away", [(0, 0.0), (30, 9.0), (30, -9.0)], ids=["none", "behind or aside", "other side"]
)
def test_nothing_to_see_shows_the_background(device, G, away):
    inputs = scene(G, device)
    with torch.no_grad():
        inputs[0] += away
    light = colors(2, device)
    image = splat(*inputs, [0, G], camera(2, 20, 18, device), [0, 0], light)
    assert torch.equal(image.color, light[:, :, None, None].expand(2, 3, 18, 20))
    assert torch.equal(image.alpha, torch.zeros(2, 1, 18, 20, device=device))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads(image, inputs))


def test_no_views(device):
    inputs = scene(3, device)
    image = splat(*inputs, [0, 3], camera(1, 8, 8, device)[:0], [], colors(1, device)[:0])
    assert image.color.shape == (0, 3, 8, 8) and image.alpha.shape == (0, 1, 8, 8)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads(image, inputs))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's numpy
def test_a_gaussian_that_is_not_finite_is_not_drawn(device):
    inputs = scene(20, device)
    view = camera(1, 20, 20, device)
    light = colors(1, device)
    rest = [torch.cat([t[7:]]).detach().requires_grad_() for t in inputs]
    want = splat(*rest, [0, 13], view, [0], light)
    with torch.no_grad():
        inputs[0][0, 1] = float("nan")
        inputs[1][1, 0] = float("inf")
        inputs[2][2] = float("nan")
        inputs[3][3] = float("nan")
        inputs[0][4] = float("inf")
        inputs[4][5, 0, 1] = float("nan")
        inputs[4][6, 0, 2] = float("-inf")
    image = splat(*inputs, [0, 20], view, [0], light)
    assert torch.equal(image.color, want.color)
    for got, expected in zip(grads(image, inputs), grads(want, rest), strict=True):
        assert torch.equal(got[:7], torch.zeros_like(got[:7])) and torch.equal(got[7:], expected)


def test_twice_the_same_bits_and_linear_in_the_upstream_gradient(device):
    inputs, light = scene(40, device), colors(2, device)
    run = lambda: splat(*inputs, [0, 40], camera(2, 20, 17, device), [0, 0], light)
    first, second = run(), run()
    assert torch.equal(first.color, second.color) and torch.equal(first.alpha, second.alpha)
    once = grads(first, inputs)
    again = grads(second, inputs)
    scaled = grads(run(), inputs, 2.0**20)
    for a, b, c in zip(once, again, scaled, strict=True):
        assert torch.equal(a, b) and torch.equal(a * 2**20, c) and a.abs().max() > 0


@pytest.mark.parametrize("opaque", [False, True])
def test_chunk_size_changes_only_rounding(kernel_device, monkeypatch, opaque):
    inputs = scene(30, kernel_device)
    view = camera(1, 20, 20, kernel_device)
    light = colors(1, kernel_device)
    if opaque:
        with torch.no_grad():
            inputs[1].fill_(0.5)
            inputs[3].fill_(0.9999)
    images, gradients = [], []
    # whole tiles in scans, then parts of them with one Gaussian after the other
    for parts, ROWS in ((1, 16), (2, 1)):
        step = {"K": 16, "ROWS": ROWS, "num_warps": 1}
        monkeypatch.setattr(projection, "parts", lambda target, parts=parts: parts)
        monkeypatch.setattr(
            blend,
            "_tiles",
            lambda target, backward, step=step: step | ({"STEP": 16} if backward else {}),
        )
        images.append(splat(*inputs, [0, 30], view, [0], light))
        gradients.append(grads(images[-1], inputs))
    assert_close(images[0].color, images[1].color, 1e-6)
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, 2e-5)


def test_gradient_of_one_output_alone(device):
    inputs = scene(20, device)
    view = camera(1, 20, 20, device)
    light = colors(1, device)
    color, alpha = both(splat(*inputs, [0, 20], view, [0], light))
    g, h = torch.ones_like(color), torch.ones_like(alpha)
    a = torch.autograd.grad(color, inputs, g, retain_graph=True)
    b = torch.autograd.grad(alpha, inputs, h, retain_graph=True)
    for x, y, z in zip(a, b, torch.autograd.grad((color, alpha), inputs, (g, h)), strict=True):
        assert_close(x + y, z, 1e-5)
    assert torch.equal(b[4], torch.zeros_like(b[4])) and b[0].abs().max() > 0


def test_no_gradient_for_camera_and_background(device):
    inputs = scene(10, device)
    view = camera(1, 16, 16, device)
    view.extrinsics.requires_grad_()
    light = colors(1, device).requires_grad_()
    splat(*inputs, [0, 10], view, [0], light).color.sum().backward()
    assert view.extrinsics.grad is None and light.grad is None and inputs[0].grad is not None
