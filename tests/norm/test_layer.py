"""Layer norm, alone and of a residual sum, against its formula."""

import pytest
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.norm.layer import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.tensors import normal

SIZES = [(0, 8), (1, 1), (5, 33), (300, 48), (2, 4096)]  # several tiles, one row a tile, none
# each is compiled for: a type for all sizes
SIZED = [*((*size, torch.float32) for size in SIZES), (300, 48, torch.float16)]


@pytest.mark.parametrize("N, C, dtype", [*SIZED, (7, 1030, torch.float16)], ids=str)
def test_layer_norm(device, N, C, dtype):
    assert_same(
        layer_norm, layer_norm_reference, normal(N, C, dtype=dtype, device=device, spread=3)
    )


@pytest.mark.parametrize("N, C, dtype", SIZED, ids=str)
def test_add_layer_norm(device, N, C, dtype):
    x, h = (normal(N, C, dtype=dtype, device=device, seed=s) for s in (0, 1))
    assert_same(add_layer_norm, add_layer_norm_reference, x, h, 1e-5)


@pytest.mark.parametrize("N, C, dtype", SIZED, ids=str)
def test_layer_norm_of_a_sum_with_a_bias(device, N, C, dtype):
    x = normal(N, C, dtype=dtype, device=device)
    bias = normal(C, device=device, seed=1)
    assert_same(
        lambda x, b: layer_norm(x, bias=b), lambda x, b: layer_norm_reference(x, bias=b), x, bias
    )


def test_the_programs_of_layer_norm_share_more_tiles_than_there_are_programs(device, monkeypatch):
    monkeypatch.setattr(backend, "multiprocessors", lambda tensor: 1)
    x = normal(9, 4096, device=device)
    bias = normal(4096, device=device, seed=1)
    assert_same(
        lambda x, b: layer_norm(x, bias=b), lambda x, b: layer_norm_reference(x, bias=b), x, bias
    )


def test_a_row_of_equal_values_is_not_divided_by_zero(device):
    x = torch.full((3, 33), 7.0, device=device, requires_grad=True)
    layer_norm(x).sum().backward()
    assert torch.equal(layer_norm(x), torch.zeros_like(x)) and x.grad.isfinite().all()


# sums of 3.3 round, and 1 / 100 times a sum of 7 is not 7
EQUAL = [7.0, 0.1, 1e3, 3.3, 1e-3, -12345.678, 1e15]


@pytest.mark.parametrize("C", [1, 100, 1030])
def test_rows_of_equal_values_are_exactly_zero(device, C):
    x = torch.tensor(EQUAL, device=device)[:, None].repeat(1, C)
    assert not layer_norm(x).any()
    if C == 100:
        assert not add_layer_norm(x, x)[1].any()
        assert not layer_norm(x, bias=torch.full((C,), 0.7, device=device)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_widened_before_anything_is_computed(device, dtype):
    """fp32 arithmetic on the same sixteen-bit inputs gives the same but for the last rounding.

    The norm is that of the stored sum.
    """
    x, h = (normal(9, 48, dtype=dtype, device=device, seed=s) for s in (0, 1))
    if dtype == torch.bfloat16 and backend.name(x) == "interpreter":
        pytest.skip("the interpreter truncates where a GPU rounds to bf16")
    up = [normal(9, 48, dtype=dtype, device=device, seed=s).detach() for s in (2, 3)]
    total, y = add_layer_norm(x, h)
    stored = (x.float() + h.float()).to(dtype)
    assert total.dtype == y.dtype == dtype and torch.equal(total, stored)
    wide = stored.detach().float().requires_grad_()
    normed = F.layer_norm(wide, [48], eps=1e-6)
    last_bit = torch.finfo(dtype).eps
    assert_close(y, normed, last_bit)
    grads = torch.autograd.grad([total, y], [x, h], up)
    expected = torch.autograd.grad(normed, wide, up[1].float())[0] + up[0].float()
    assert torch.equal(*grads)
    assert_close(grads[0], expected, last_bit)


def test_layer_norm_of_rows_far_from_zero(device):
    """The variance is of the centred row: E[x^2] - E[x]^2 would have no digits left here."""
    x = (normal(4, 4096, device=device).detach() + 1000).requires_grad_()
    assert_same(layer_norm, layer_norm_reference, x, tolerance=2e-4)


def test_the_eps_of_blocks_and_of_the_output(device):
    x = torch.tensor([[1e-3, -1e-3]], device=device)
    assert_close(layer_norm(x, 1e-6), x / (2e-6**0.5), 1e-6)
    assert_close(layer_norm(x, 1e-5), x / (1.1e-5**0.5), 1e-6)
    assert torch.equal(layer_norm(x), layer_norm(x, 1e-6))


def test_only_one_output_used(device):
    for used in (0, 1):
        x = normal(5, 48, device=device)
        h = normal(5, 48, device=device, seed=1)
        assert_same(
            lambda x, h, i=used: add_layer_norm(x, h)[i],
            lambda x, h, i=used: add_layer_norm_reference(x, h)[i],
            x,
            h,
        )


def test_strided_inputs_and_gradients(device):
    x = normal(6, 96, device=device)
    assert_same(
        lambda x: layer_norm(x[:, ::2]).t(), lambda x: layer_norm_reference(x[:, ::2]).t(), x
    )


def test_the_same_bits_twice(kernel_device):
    x = normal(700, 64, device=kernel_device)
    bias = normal(64, device=kernel_device, seed=1)
    runs = [torch.autograd.grad(layer_norm(x, bias=bias).pow(3).sum(), [x, bias]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_one_launch_a_direction(kernel_device):
    x = normal(5, 48, device=kernel_device)
    h = normal(5, 48, device=kernel_device, seed=1)
    with backend.count_launches() as launches:
        total, y = add_layer_norm(x, h)
        (total + y).sum().backward()
    assert launches == {"_layer_norm_fwd": 1, "_layer_norm_bwd": 1}


def test_gradients_in_double_precision():
    x = normal(3, 7, dtype=torch.float64)
    h = normal(3, 7, dtype=torch.float64, seed=1)
    bias = normal(7, dtype=torch.float64, seed=2)
    assert torch.autograd.gradcheck(add_layer_norm, (x, h))
    assert torch.autograd.gradcheck(layer_norm, (x,))
    assert torch.autograd.gradcheck(lambda x, b: layer_norm(x, bias=b), (x, bias))


def test_compiles_without_breaking_the_graph(device):
    def block(x, h, bias):
        total, y = add_layer_norm(x, h)
        return total + layer_norm(y, bias=bias)

    x = normal(5, 48, device=device)
    h = normal(5, 48, device=device, seed=1)
    bias = normal(48, device=device, seed=2)
    y = block(x, h, bias)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x, h, bias)
    assert torch.equal(y, compiled)
    grads, compiled_grads = (
        torch.autograd.grad(out.square().sum(), [x, h, bias]) for out in (y, compiled)
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, compiled_grads, strict=True))


def test_registered_as_torch_asks(device):
    x = normal(3, 48, device=device)
    h = normal(3, 48, device=device, seed=1)
    bias = normal(48, device=device, seed=2)
    ops = torch.ops.trislat
    for op, args in [
        (ops.layer_norm, (x, None, 1e-6)),
        (ops.layer_norm, (x, bias, 1e-6)),
        (ops.add_layer_norm, (x, h, 1e-6)),
    ]:
        torch.library.opcheck(op, args)


def test_wrong_input_is_refused(device):
    with pytest.raises(ValueError, match=r"\[N, C\], got \[2, 3, 4\]"):
        layer_norm(torch.zeros(2, 3, 4, device=device))
    with pytest.raises(ValueError, match="4097 channels: at least 1 and at most 4096"):
        layer_norm(torch.zeros(2, 4097, device=device))
    with pytest.raises(ValueError, match=r"x \[2, 3\] and h \[2, 4\]"):
        add_layer_norm(torch.zeros(2, 3, device=device), torch.zeros(2, 4, device=device))
    with pytest.raises(ValueError, match="torch.int32"):
        layer_norm(torch.zeros(2, 3, dtype=torch.int32, device=device))
    x = torch.zeros(2, 3, device=device)
    fits = r"bias \[4\] must be \[C\] with the channels of x \[2, 3\]"
    with pytest.raises(ValueError, match=fits):
        layer_norm(x, bias=torch.zeros(4, device=device))
    with pytest.raises(TypeError, match="bias must be a tensor, not float"):
        layer_norm(x, bias=1.0)


def test_the_kernels_refuse_double_precision(kernel_device):
    with pytest.raises(ValueError, match="torch path.*torch.float64"):
        layer_norm(torch.zeros(2, 3, dtype=torch.float64, device=kernel_device))
