"""SSIM against its reference and published numbers."""

import importlib

import pytest
import torch
import triton

from kernels import backend
from kernels.similarity import ssim, ssim_reference
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.golden import golden

module = importlib.import_module(
    "kernels.similarity"
)  # the package's attribute of that name is the op


def pair(shape, device, grad=(True, True), dtype=torch.float32):
    a = torch.rand(shape, device=device)
    b = (a + 0.2 * torch.randn(shape, device=device)).clamp(0, 1)
    return a.to(dtype).requires_grad_(grad[0]), b.to(dtype).requires_grad_(grad[1])


def total(f):
    """Sums over pixels, not their mean: gradients of order one, which the tolerance can see."""
    return lambda a, b: f(a, b) * a[0].numel() if a.numel() else f(a, b)


@pytest.mark.parametrize(
    "shape", [(2, 3, 37, 20), (1, 1, 1, 1), (0, 3, 8, 8), (1, 2, 3, 19)], ids=str
)
def test_ssim_and_both_gradients(device, few_programs, shape):
    assert_same(total(ssim), total(ssim_reference), *pair(shape, device))


def test_ssim_at_the_shipped_tile_size(device):
    """An image of two programs: the last lanes idle, strips and channels straddle programs."""
    shape = (1, 3, 18, 40)  # 240 lanes
    tiles = module._tiles()
    assert 1 < module._programs(*shape[1:], tiles) * tiles["LANES"] / 240 < 2, (
        "choose a shape that leaves lanes idle"
    )
    assert triton.cdiv(shape[2], tiles["ROWS"]) > 1
    assert_same(total(ssim), total(ssim_reference), *pair(shape, device))


def test_ssim_fp16(device, few_programs):
    assert_same(
        total(ssim), total(ssim_reference), *pair((1, 3, 17, 23), device, dtype=torch.float16)
    )


@pytest.mark.parametrize(
    "grad", [(True, False), (False, True), (False, False)], ids=["first", "second", "neither"]
)
def test_only_what_needs_a_gradient_is_computed(kernel_device, few_programs, grad):
    seen = []
    with backend.observe(lambda kernel, grid, args, constants: seen.append(constants)):
        assert_same(total(ssim), total(ssim_reference), *pair((1, 1, 7, 9), kernel_device, grad))
    assert [c["MAPS"] for c in seen if "MAPS" in c] == [3 if any(grad) else 0]
    assert [c["BOTH"] for c in seen if "BOTH" in c] == [False] * any(grad)


def test_ssim_gradcheck():
    a, b = pair((2, 2, 6, 13), "cpu", dtype=torch.float64)
    torch.autograd.gradcheck(ssim, (a, b))
    assert_same(ssim, ssim_reference, a, b)


@pytest.mark.parametrize("images", [0, 1, 2], ids=["smaller than one", "one", "two"])
def test_a_few_images_at_a_time_on_a_cpu(images, monkeypatch):
    monkeypatch.setattr(module, "CACHED", images * 2 * 6 * 13)
    assert_same(total(ssim), total(ssim_reference), *pair((5, 2, 6, 13), "cpu"))


def test_ssim_agrees_with_the_published_loss(device, few_programs):
    _, t = golden("loss_image")
    a = t["img1"].float().to(device).requires_grad_()
    b = t["img2"].float().to(device)
    values = ssim(a, b)
    torch.testing.assert_close(values.cpu(), t["ssim_per_image"], atol=2e-6, rtol=0)
    torch.testing.assert_close(values.mean().cpu(), t["ssim"], atol=2e-6, rtol=0)
    values.mean().backward()
    assert a.grad.abs().max() > 0
    difference = (a.grad.cpu() - t["ssim_grad_img1"]).abs().max()
    assert difference <= 2e-5 * t["ssim_grad_img1"].abs().max()


def test_batched_is_looped_and_repeats_to_the_bit(device, few_programs):
    a, b = pair((2, 1, 12, 20), device, grad=(True, False))
    both, alone, again = (
        (value.detach(), *torch.autograd.grad(value.sum(), [a]))
        for value in (ssim(a, b), ssim(a[1:], b[1:]), ssim(a[1:], b[1:]))
    )
    for batched, looped, repeated in zip(both, alone, again, strict=True):
        assert torch.equal(looped, repeated)
        assert_close(looped[-1], batched[-1], 1e-6)


def test_transposed_views_are_read_as_they_look(device, few_programs):
    a, b = pair((1, 10, 14, 3), device)
    assert_same(
        total(lambda a, b: ssim(a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2))),
        total(lambda a, b: ssim_reference(a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2))),
        a,
        b,
    )


def test_equal_images_have_ssim_one_and_no_gradient(device, few_programs):
    a, _ = pair((1, 3, 9, 12), device)
    value = ssim(a, a.detach())
    value.sum().backward()
    torch.testing.assert_close(value.detach(), torch.ones_like(value), atol=1e-6, rtol=0)
    assert a.grad.abs().max() < 1e-5


def test_library_registration():
    a, b = pair((1, 1, 6, 7), "cpu")
    torch.library.opcheck(torch.ops.trislat.ssim.default, (a, b, 4))


@pytest.mark.parametrize(
    "a, b, message",
    [
        ((1, 3, 8, 8), (1, 3, 8, 9), r"\(1, 3, 8, 8\) with \(1, 3, 8, 9\)"),
        ((3, 8, 8), (3, 8, 8), r"\[V, C, H, W\]"),
        ((1, 3, 0, 8), (1, 3, 0, 8), "at least one pixel"),
    ],
)
def test_wrong_shapes_are_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        ssim(torch.zeros(a), torch.zeros(b))


def test_kernels_refuse_the_float64_that_they_would_round(kernel_device):
    with pytest.raises(ValueError, match="torch.float64"):
        ssim(*pair((1, 1, 4, 4), kernel_device, dtype=torch.float64))


def test_mixed_dtypes_are_named():
    with pytest.raises(ValueError, match="torch.float32 on cpu with torch.float16"):
        ssim(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4).half())
