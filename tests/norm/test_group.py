"""Group norm over each sample, with and without SiLU, against its formula and published numbers."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.norm.group import group_norm, group_norm_reference
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.golden import golden

norm_silu = partial(group_norm, silu=True)


def inputs(counts, C, dtype=torch.float32, device=None, seed=0):
    """x, weight, bias and starts."""
    generator = torch.Generator().manual_seed(seed + sum(counts) + C)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((sum(counts), C), (C,), (C,))
    )
    starts = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    x = (2 * x + 1).to(device, dtype)
    return [
        x.requires_grad_(),
        weight.to(device).requires_grad_(),
        bias.to(device).requires_grad_(),
        starts,
    ]


@pytest.mark.parametrize(
    "counts, C, groups, dtype",
    [
        # channels that are no power of two; several turns a program
        ([70, 0, 1, 190, 0], 40, 5, torch.float32),
        ([], 32, 32, torch.float32),
        ([0, 0], 16, 4, torch.float32),
        ([5], 6, 3, torch.float32),
        ([33, 2], 96, 32, torch.float16),
    ],
    ids=str,
)
def test_group_norm(device, counts, C, groups, dtype):
    args = inputs(counts, C, dtype, device)
    assert_same(group_norm, group_norm_reference, *args, groups)
    assert_same(norm_silu, lambda *a: group_norm_reference(*a, silu=True), *args, groups)


def test_published_group_norm(device):
    tensors = {
        k: t.to(device).float()
        for k, t in golden("ops_sparse")[1].items()
        if k.startswith(("gn/", "feats"))
    }
    scale, shift = tensors["gn/in_scale_shift"]
    x = tensors["feats"] * scale + shift
    weight = tensors["gn/weight"]
    bias = tensors["gn/bias"]
    wrt = [t.requires_grad_() for t in (x, weight, bias)]
    y = group_norm(*wrt, torch.tensor([0, 104, 158, 236], dtype=torch.int32, device=device), 8)
    assert_close(y, tensors["gn/out"], 1e-5)
    for grad, name in zip(
        torch.autograd.grad(y, wrt, tensors["gn/grad_out"]), ("in", "weight", "bias"), strict=True
    ):
        assert_close(grad, tensors[f"gn/grad_{name}"], 2e-5, name)


def test_batched_equals_looped(device):
    counts = [20, 0, 9, 41]
    x, weight, bias, starts = inputs(counts, 16, device=device)
    whole = norm_silu(x, weight, bias, starts, 4)
    ends = starts[1:].tolist()
    for n, end in zip(counts, ends, strict=True):
        alone = norm_silu(
            x[end - n : end],
            weight,
            bias,
            torch.tensor([0, n], dtype=torch.int32, device=device),
            4,
        )
        assert_close(whole[end - n : end], alone, 1e-6)


def test_voxels_far_from_zero(device):
    """Squares are of deviations: E[x^2] - E[x]^2 would have no digits left here."""
    x, weight, bias, starts = inputs([130, 40], 16, device=device)
    x = (x.detach() + 1000).requires_grad_()
    assert_same(group_norm, group_norm_reference, x, weight, bias, starts, 4, tolerance=2e-4)


@pytest.mark.parametrize("C, groups, counts", [(16, 4, [20, 0, 9, 41]), (40, 5, [70, 190])])
def test_equal_voxels_are_exactly_the_bias(device, C, groups, counts):
    _, weight, bias, starts = inputs(counts, C, device=device)
    for value in 7.0, 0.1, 1e3, 3.3:  # sums of 3.3 round
        y = group_norm(
            torch.full((sum(counts), C), value, device=device), weight, bias, starts, groups
        )
        assert torch.equal(y, bias.expand_as(y))


def test_a_first_voxel_far_from_the_others(device):
    x, weight, bias, starts = inputs([70, 190], 16, device=device)
    x.data[[0, 70]] = 1e4
    assert_same(group_norm, group_norm_reference, x, weight, bias, starts, 4)


def test_equal_voxels_are_not_divided_by_zero(device):
    _, weight, bias, starts = inputs([7], 16, device=device)
    x = torch.full((7, 16), 3.0, device=device, requires_grad=True)
    y = group_norm(x, weight, bias, starts, 4)
    assert_close(y, bias.expand(7, 16), 1e-6)
    assert torch.autograd.grad(y.square().sum(), x)[0].isfinite().all()


def test_the_silu_far_from_zero(device):
    x, weight, _, starts = inputs([6], 16, device=device)
    for far, expected in ((-200.0, 0.0), (200.0, 200.0)):
        y = norm_silu(
            x, weight * 0, torch.full((16,), far, device=device, requires_grad=True), starts, 4
        )
        assert_close(y, torch.full((6, 16), expected), 1e-6)
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_widened_before_anything_is_computed(device, dtype):
    x, weight, bias, starts = inputs([19], 16, dtype, device)
    if dtype == torch.bfloat16 and backend.name(x) == "interpreter":
        pytest.skip("the interpreter truncates where a GPU rounds to bf16")
    y = norm_silu(x, weight, bias, starts, 4)
    wide = F.silu(F.group_norm(x.float().T[None], 4, weight, bias, 1e-5)[0].T)
    assert y.dtype == dtype
    assert_close(y, wide, torch.finfo(dtype).eps)
    grads = [torch.autograd.grad(out, [x, weight, bias], torch.ones_like(out)) for out in (y, wide)]
    assert [g.dtype for g in grads[0]] == [dtype, torch.float32, torch.float32]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, torch.finfo(dtype).eps)


def test_the_same_bits_twice_in_one_launch_a_pass(kernel_device):
    x, weight, bias, starts = inputs([60, 0, 31], 16, device=kernel_device)
    runs = []
    for _ in range(2):
        with backend.count_launches() as launches:
            runs.append(
                torch.autograd.grad(
                    norm_silu(x, weight, bias, starts, 4).square().sum(), [x, weight, bias]
                )
            )
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    passes = [
        "_partial_statistics",
        "_merge_statistics",
        "_group_norm_fwd",
        "_partial_gradients",
        "_group_norm_bwd",
    ]
    assert launches == dict.fromkeys(passes, 1)


def test_gradients_in_double_precision():
    x, weight, bias, starts = inputs([4, 0, 3], 6, torch.float64)
    weight = weight.detach().double().requires_grad_()
    bias = bias.detach().double().requires_grad_()
    for silu in (False, True):
        op = lambda x, weight, bias, silu=silu: group_norm(x, weight, bias, starts, 2, silu=silu)
        assert torch.autograd.gradcheck(op, (x, weight, bias))


def test_registered_as_torch_asks_and_compiles(device):
    x, weight, bias, starts = inputs([5, 3], 16, device=device)
    torch.library.opcheck(torch.ops.trislat.group_norm, (x, weight, bias, starts, 4, 1e-5, True))
    compiled = torch.compile(norm_silu, fullgraph=True, backend="aot_eager")(
        x, weight, bias, starts, 4
    )
    assert torch.equal(compiled, norm_silu(x, weight, bias, starts, 4))
    compiled.square().sum().backward()


def test_wrong_input_is_refused(device):
    x, weight, bias, starts = inputs([5], 12, device=device)
    with pytest.raises(ValueError, match="12 channels are not a multiple of 5 groups"):
        group_norm(x, weight, bias, starts, 5)
    with pytest.raises(ValueError, match=r"weight \[11\] and bias \[12\] must be \[12\]"):
        group_norm(x, weight[1:], bias, starts, 4)
    with pytest.raises(ValueError, match=r"x must be \[N, C\], got \[1, 5, 12\]"):
        group_norm(x[None], weight, bias, starts, 4)
    with pytest.raises(ValueError, match=r"starts must be \[B \+ 1\] int32, got \[2\] torch.int64"):
        group_norm(x, weight, bias, starts.long(), 4)
    with pytest.raises(ValueError, match="4100 channels: at most 4096"):
        group_norm(x.new_zeros(2, 4100), weight, bias, starts, 4)
    with pytest.raises(ValueError, match="torch.int32"):
        group_norm(x.int(), weight, bias, starts, 4)
