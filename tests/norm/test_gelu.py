"""GELU, alone and fused with a bias, against its formula."""

import pytest
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.norm.gelu import gelu, gelu_reference
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.tensors import DTYPES, normal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 7), (130, 65)], ids=str)
def test_gelu(device, shape, dtype):
    assert_same(gelu, gelu_reference, normal(*shape, dtype=dtype, device=device, spread=3))


@pytest.mark.parametrize(
    "shape, dtype",
    [
        *((s, torch.float32) for s in [(0, 3), (1, 1), (7, 1030), (300, 96), (2, 3, 5), (5,)]),
        ((300, 96), torch.float16),
    ],
    ids=str,
)
def test_gelu_of_a_sum_with_a_bias(device, shape, dtype):
    """Several chunks of columns, several tiles of rows, none."""
    x = normal(*shape, dtype=dtype, device=device)
    bias = normal(shape[-1], device=device, seed=1)
    assert_same(gelu, gelu_reference, x, bias)


def test_the_programs_of_gelu_share_more_tiles_than_there_are_programs(device, monkeypatch):
    monkeypatch.setattr(backend, "multiprocessors", lambda tensor: 1)
    assert_same(
        gelu, gelu_reference, normal(23, 1030, device=device), normal(1030, device=device, seed=1)
    )
    assert_same(
        gelu, gelu_reference, normal(700, 96, device=device), normal(96, device=device, seed=1)
    )


def test_gelu_far_from_zero(device):
    x = torch.tensor(
        [-60000.0, -300.0, -12.0, -0.0, 12.0, 300.0, 60000.0], device=device, requires_grad=True
    )
    y = gelu(x)
    y.sum().backward()
    assert y.tolist() == [0, 0, 0, 0, 12, 300, 60000] and x.grad.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


def test_gelu_near_zero_to_the_last_digits(device):
    x = torch.linspace(-2, 2, 101, device=device, requires_grad=True)
    assert_same(gelu, gelu_reference, x, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_widened_before_anything_is_computed(device, dtype):
    """Equal, but for the last rounding, to fp32 arithmetic on the same sixteen-bit inputs."""
    x, up = (normal(9, 96, dtype=dtype, device=device, seed=s) for s in (0, 1))
    bias = normal(96, device=device, seed=2)
    if dtype == torch.bfloat16 and backend.name(x) == "interpreter":
        pytest.skip("the interpreter truncates where a GPU rounds to bf16")
    wide = x.detach().float().requires_grad_()
    last_bit = torch.finfo(dtype).eps
    y = gelu(x, bias)
    exact = F.gelu(wide + bias, approximate="tanh")
    assert y.dtype == dtype
    assert_close(y, exact, last_bit)
    dx, dbias = torch.autograd.grad(y, [x, bias], up.detach())
    exact_dx, exact_dbias = torch.autograd.grad(exact, [wide, bias], up.detach().float())
    assert_close(dx, exact_dx, last_bit)
    assert_close(dbias, exact_dbias, 1e-5)  # summed before anything is rounded to sixteen bits


def test_strided_inputs_and_gradients(device):
    x = normal(6, 40, device=device)
    bias = normal(12, device=device, seed=1)
    assert_same(lambda x: gelu(x.t()).t(), gelu_reference, x)
    assert_same(
        lambda x, b: gelu(x.t(), b[::2]).t(),
        lambda x, b: gelu_reference(x.t(), b[::2]).t(),
        x,
        bias,
    )


def test_the_same_bits_twice(kernel_device):
    x = normal(700, 96, device=kernel_device)
    bias = normal(96, device=kernel_device, seed=1)
    runs = [torch.autograd.grad(gelu(x, bias).square().sum(), [x, bias]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_one_launch_a_direction(kernel_device):
    x = normal(5, 96, device=kernel_device)
    bias = normal(96, device=kernel_device, seed=1)
    with backend.count_launches() as launches:
        gelu(x, bias).sum().backward()
    assert launches == {"_gelu_fwd": 1, "_gelu_bwd": 1}


def test_gradients_in_double_precision():
    x = normal(3, 7, dtype=torch.float64)
    bias = normal(7, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(gelu, (x,))
    assert torch.autograd.gradcheck(gelu, (x, bias))


def test_compiles_without_breaking_the_graph(device):
    x = normal(5, 96, device=device)
    bias = normal(96, device=device, seed=1)
    compiled = torch.compile(gelu, fullgraph=True, backend="aot_eager")(x, bias)
    assert torch.equal(gelu(x, bias), compiled)
    grads, compiled_grads = (
        torch.autograd.grad(y.square().sum(), [x, bias]) for y in (gelu(x, bias), compiled)
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, compiled_grads, strict=True))


def test_registered_as_torch_asks(device):
    x = normal(3, 96, device=device)
    bias = normal(96, device=device, seed=1)
    torch.library.opcheck(torch.ops.trislat.gelu, (x, None))
    torch.library.opcheck(torch.ops.trislat.gelu, (x, bias))


def test_wrong_input_is_refused(device):
    with pytest.raises(ValueError, match="torch.int32"):
        gelu(torch.zeros(2, dtype=torch.int32, device=device))
    for x, bias in (((5, 4), (3,)), ((5, 4), (5, 4)), ((), (1,)), ((5, 0), (0,))):
        with pytest.raises(
            ValueError, match=r"bias \[.*\] must be \[C\] with the C >= 1 channels of x \["
        ):
            gelu(torch.zeros(x, device=device), torch.zeros(bias, device=device))
