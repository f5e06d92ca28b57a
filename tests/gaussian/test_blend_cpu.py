"""The compositing stage on CPU tensors against a loop over pairs."""

import math

import pytest
import torch

from kernels.gaussian import blend_cpu
from kernels.gaussian.binning_cpu import bin_torch
from kernels.gaussian.blend_cpu import composite_torch, composite_torch_backward
from tests.helpers.compare import TOLERANCE, assert_close


class Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, conic, opacity, color, *rest):
        image, final_T, saved = composite_torch(mean, conic, opacity, color, *rest, keep=True)
        ctx.everything = saved, (mean, conic, opacity, color, *rest, image, final_T)
        return image, final_T

    @staticmethod
    def backward(ctx, grad_image, grad_final_T):
        saved, arguments = ctx.everything
        return *composite_torch_backward(saved, *arguments, grad_image, grad_final_T), *[None] * 7


def reference(
    mean, conic, opacity, color, depth, rect, view, V, H, W, background, decide=torch.float64
):
    """One pair after the other on whole images in float64; what is skipped is decided in the
    precision `decide`.
    """
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    images, finals = [], []
    for v in range(V):
        image = torch.zeros(3, H, W).double()
        T = torch.ones(H, W).double()
        T_decide = torch.ones(H, W, dtype=decide)
        finished = torch.zeros(H, W, dtype=torch.bool)
        for p in sorted(
            (view == v).nonzero().flatten().tolist(), key=lambda p: (depth[p].item(), p)
        ):
            inside = (
                (x // 16 >= rect[p, 0])
                & (x // 16 < rect[p, 2])
                & (y // 16 >= rect[p, 1])
                & (y // 16 < rect[p, 3])
            )

            def alpha(dtype, p=p):
                dx, dy = mean[p, 0].to(dtype) - x, mean[p, 1].to(dtype) - y
                c11, c12, c22 = conic[p].to(dtype)
                e = -0.5 * (c11 * dx * dx + c22 * dy * dy) - c12 * dx * dy
                return e, opacity[p].to(dtype) * e.clamp(max=0).exp()

            e, a = (t.detach() for t in alpha(decide))
            a = a.clamp(max=0.99)
            below = T_decide * (1 - a)
            taken = inside & (e <= 0) & (a >= 1 / 255) & ~finished
            finished = finished | (taken & (below < 1e-4))
            taken = taken & ~finished
            T_decide = torch.where(taken, below, T_decide)
            a = alpha(torch.float64)[1]
            a = torch.where(taken, a - (a - 0.99).clamp(min=0).detach(), 0)
            image = image + color[p].double()[:, None, None] * a * T
            T = T * (1 - a)
        images.append(image + T * background[v].double()[:, None, None])
        finals.append(T)
    return torch.stack(images), torch.stack(finals)


def pairs(P, V, H, W, dtype, sigma=(0.4, 3.0), opacity=(0.05, 0.95), seed=0, reach=3.0):
    """Random pairs: ellipses with standard deviations in `sigma` pixels, rectangles of `reach`
    standard deviations.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    mean = uniform(P, 2) * torch.tensor([W + 8.0, H + 8.0]) - 4
    s = uniform(P, 2, low=math.log(sigma[0]), high=math.log(sigma[1])).exp()
    turn = uniform(P, high=math.pi)
    R = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(P, 2, 2)
    A, B, C = (R @ torch.diag_embed(s * s) @ R.transpose(1, 2)).flatten(1)[:, [0, 1, 3]].unbind(1)
    conic = torch.stack([C, -B, A], 1) / (A * C - B * B)[:, None]
    radius = (reach * s.amax(1)).ceil()[:, None]
    size = torch.tensor([-(-W // 16), -(-H // 16)])
    rect = (
        torch.cat([(mean - radius) / 16, (mean + radius + 15) / 16], 1)
        .int()
        .clamp(min=0)
        .minimum(size.repeat(2))
        .int()
    )
    view = torch.arange(P) * V // max(P, 1)
    floats = (
        mean,
        conic,
        uniform(P, low=opacity[0], high=opacity[1]),
        uniform(P, 3),
        uniform(P, low=1, high=3),
    )
    return [t.to(dtype) for t in floats] + [rect, view, V, H, W, uniform(V, 3).to(dtype)]


def opaque(dtype):
    case = pairs(60, 1, 20, 23, dtype, sigma=(3, 8), opacity=(0.9, 1.0))
    case[2][::3] = 1.0  # alpha passes 0.99 near the middle: two of these finish a pixel
    return case


def ties(dtype):
    case = pairs(80, 2, 33, 30, dtype)
    case[4] = (case[4] * 2).round() / 2
    return case


def truncated(dtype):
    return pairs(80, 2, 50, 37, dtype, sigma=(2, 6), reach=1.2)


def indefinite(dtype):
    case = pairs(40, 1, 32, 32, dtype, sigma=(1, 6))
    case[1][::2, 1] *= 1.3
    case[1][::4, 1] += 0.2
    return case


def culled(dtype):
    case = pairs(50, 2, 24, 40, dtype)
    case[5][::3, 2] = case[5][::3, 0]
    case[5][1::3, 3] = 0
    case[2][2::6] = 0.003
    return case


CASES = {
    "random": lambda dtype: pairs(120, 3, 37, 50, dtype),
    "opaque": opaque,
    "ties": ties,
    "needles": lambda dtype: pairs(60, 1, 40, 48, dtype, sigma=(0.32, 80.0)),
    "covering": lambda dtype: pairs(30, 1, 70, 65, dtype, sigma=(40, 300), opacity=(0.02, 0.3)),
    "truncated": truncated,
    "deep": lambda dtype: pairs(400, 1, 6, 9, dtype, opacity=(0.005, 0.1), seed=1),
    "indefinite": indefinite,
    "culled": culled,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_image_transmittance_and_gradients(name, dtype, monkeypatch):
    torch.manual_seed(0)
    arguments = CASES[name](dtype)
    inputs = [t.requires_grad_() for t in arguments[:4]]
    want = reference(*arguments, decide=dtype)
    assert (want[1] < 0.6).any()
    upstream = [torch.randn(t.shape, dtype=torch.float64) for t in want]
    exact = torch.autograd.grad(want, inputs, upstream)
    # the sizes in use, then small ones: many segments, ragged chunks, of which some and then none
    # are kept
    for segment, columns, kept in ((128, 8192, 1 << 26), (5, 37, 20_000), (5, 37, 0)):
        monkeypatch.setattr(blend_cpu, "SEGMENT", segment)
        monkeypatch.setattr(blend_cpu, "COLUMNS", columns)
        monkeypatch.setattr(blend_cpu, "KEPT", kept)
        got = Composite.apply(*arguments)
        for a, b in zip(got, want, strict=True):
            assert (
                a.dtype == dtype
                and (a - b).abs().max() <= {torch.float32: 2e-6, torch.float64: 1e-14}[dtype]
            )
        ours = torch.autograd.grad(got, inputs, [g.to(dtype) for g in upstream])
        for a, b, what in zip(ours, exact, ("mean", "conic", "opacity", "color"), strict=True):
            # fp32: terms of a needle's position cancel, and how they round depends on the CPU
            # (1.2e-5 on one)
            assert_close(a, b, {torch.float32: TOLERANCE[dtype], torch.float64: 1e-11}[dtype], what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_pixel_is_lost_and_none_is_gained(dtype):
    """One pair per view, so that the color counts: a pixel is touched exactly where opacity exp(e)
    >= 1/255.
    """
    V, H, W = 1500, 40, 40
    mean, conic, opacity, color, depth, rect, view, *_ = pairs(
        V, V, H, W, dtype, sigma=(0.32, 40), opacity=(0.004, 1), seed=3
    )
    opacity = torch.where(torch.arange(V) % 2 == 0, 0.1, opacity)
    image, final_T, _ = composite_torch(
        mean,
        conic,
        opacity,
        torch.ones_like(color),
        depth,
        rect,
        view,
        V,
        H,
        W,
        torch.zeros_like(color),
    )
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    dx, dy = mean[:, 0, None, None] - x, mean[:, 1, None, None] - y
    c11, c12, c22 = conic[:, :, None, None].unbind(1)
    e = -0.5 * (c11 * dx * dx + c22 * dy * dy) - c12 * dx * dy
    a = opacity[:, None, None] * e.exp()
    x0, y0, x1, y1 = rect[:, :, None, None].unbind(1)
    # of thin ellipses, whose exponent is a small difference of large terms
    limit = 1000 * torch.finfo(dtype).eps
    sure = (a * 255 - 1).abs() > limit
    a = a.clamp(max=0.99) * (
        (a >= 1 / 255)
        & (e <= 0)
        & (x // 16 >= x0)
        & (x // 16 < x1)
        & (y // 16 >= y0)
        & (y // 16 < y1)
    )
    assert (a > 0).sum() > 100_000 and (~sure).sum() < 100
    assert torch.equal((image[:, 0] > 0)[sure], (a > 0)[sure])
    assert (image[:, 0] - a)[sure].abs().max() < limit
    assert (1 - final_T - a)[sure].abs().max() < limit


def test_linear_in_the_upstream_gradient_and_the_same_twice():
    arguments = pairs(3000, 2, 64, 64, torch.float32)
    inputs = [t.requires_grad_() for t in arguments[:4]]
    was = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)  # raises where an operation has no deterministic form
    try:
        images, gradients = [], []
        for scale in (1.0, 1.0, 2.0**20):
            image, final_T = Composite.apply(*arguments)
            g = torch.linspace(-1, 1, image.numel()).view_as(image) * scale
            images.append(image)
            gradients.append(torch.autograd.grad([image, final_T], inputs, [g, g[:, 0]]))
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
    assert torch.equal(images[0], images[1])
    for once, twice, large in zip(*gradients, strict=True):
        assert (
            once.abs().max() > 0 and torch.equal(once, twice) and torch.equal(once * 2.0**20, large)
        )


@pytest.mark.parametrize("P", [0, 1, 7])
def test_nothing_on_screen_is_the_background(P):
    arguments = pairs(P, 2, 19, 33, torch.float32)
    arguments[5].zero_()
    inputs = [t.requires_grad_() for t in arguments[:4]]
    image, final_T = Composite.apply(*arguments)
    assert torch.equal(final_T, torch.ones(2, 19, 33))
    assert torch.equal(image, arguments[-1][:, :, None, None].expand_as(image))
    for gradient, t in zip(
        torch.autograd.grad([image.sum() + final_T.sum()], inputs), inputs, strict=True
    ):
        assert gradient.shape == t.shape and not gradient.any()


def test_not_a_number_is_shown_and_does_no_harm():
    for k in range(3):
        arguments = pairs(20, 1, 32, 32, torch.float32)
        arguments[5][:] = torch.tensor([0, 0, 2, 2])
        arguments[k][5] = torch.nan
        image, final_T = Composite.apply(*arguments)
        assert image.isnan().all(), k


@pytest.mark.parametrize("dense", [False, True], ids=["faint", "opaque"])
def test_work_is_bounded(dense, monkeypatch):
    """A chunk holds at most COLUMNS instances whatever the length of a list; what lies behind
    opaque pixels is not computed.
    """
    sizes = []
    shade = blend_cpu._Shader.__call__

    def spy(self, pair, *rest):
        sizes.append(pair.numel())
        return shade(self, pair, *rest)

    monkeypatch.setattr(blend_cpu._Shader, "__call__", spy)
    case = pairs(20_000, 1, 32, 32, torch.float32, opacity=(0.9, 0.95) if dense else (0.005, 0.007))
    instances = len(bin_torch(*case[:3], *case[4:10], 0).pair)
    composite_torch(*case)
    assert max(sizes) <= blend_cpu.COLUMNS and instances > 20_000
    assert sum(sizes) < 0.3 * instances if dense else sum(sizes) >= instances


def test_too_many_instances_are_refused():
    big = pairs(1100, 1, 8192, 8192, torch.float32, sigma=(4000, 5000), opacity=(0.9, 1))
    with pytest.raises(ValueError, match=r"touch \d+ tiles of 4 x 4 pixels, more than 2\^31"):
        composite_torch(*big)
