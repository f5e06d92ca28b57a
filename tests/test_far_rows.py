"""Rows beyond 2^31 elements: every op that takes rows of features gives the same numbers there.

Each op runs on a tensor whose last rows start beyond 2^31 elements, and apart on those rows alone.
A 32-bit product of a row number and a width would wrap to a negative offset: the numbers differ, or
the process ends with a fault. See tests.helpers.far for how that runs without a GPU.
"""

import pytest
import torch

from kernels import backend
from kernels.attention.op import segment_attention, window_attention
from kernels.conv.op import sparse_conv
from kernels.norm import gelu as gelu_module
from kernels.norm import layer as layer_module
from kernels.norm.gelu import gelu
from kernels.norm.group import group_norm
from kernels.norm.layer import add_layer_norm, layer_norm
from kernels.similarity import ssim
from kernels.voxels.hash import build_table
from kernels.voxels.pool import Pooling, pool, unpool
from kernels.voxels.window import Windows
from tests.helpers.far import FAR, far_memory, far_tensor, zeros

FEW = 5  # rows that are looked at


@pytest.fixture
def far(kernel_device):
    with far_memory(kernel_device):
        yield kernel_device


@pytest.fixture
def large_tiles(far, monkeypatch):
    """In the interpreter, few large tiles and a program for each: the last takes the last rows."""
    if far.type == "cpu":
        monkeypatch.setattr(layer_module, "TILE", 1 << 20)
        monkeypatch.setattr(gelu_module, "TILE", 1 << 17)  # times 8 there
        monkeypatch.setattr(backend, "multiprocessors", lambda tensor: 1 << 20)


def rows(device, *shape: int, dtype=torch.float16) -> torch.Tensor:
    return torch.randn(FEW, *shape).to(device, dtype)


def same_rows(op, *ends: torch.Tensor) -> None:
    """`op` of tensors that end with `ends` agrees with `op` of `ends`, and so do its gradients.

    op: tensors -> a list of tensors, all of as many rows.
    """
    long = [far_tensor(end).requires_grad_() for end in ends]
    short = [end.clone().requires_grad_() for end in ends]
    got = op(*long)
    expected = op(*short)
    grads = [torch.randn(out.shape).to(out) for out in expected]
    far_grads = torch.autograd.grad(got, long, [far_tensor(grad) for grad in grads])
    near_grads = torch.autograd.grad(expected, short, grads)
    for found, wanted in zip([*got, *far_grads], [*expected, *near_grads], strict=True):
        assert wanted.any() and torch.equal(found[-FEW:], wanted)


def test_layer_norm(large_tiles, far):
    same_rows(lambda x: [layer_norm(x)], rows(far, 1024))


def test_add_layer_norm(large_tiles, far):
    same_rows(lambda x, h: add_layer_norm(x, h), rows(far, 1024), rows(far, 1024))


@pytest.mark.parametrize("biased", [True, False])
def test_gelu(large_tiles, far, biased):
    bias = torch.randn(1024, device=far) if biased else None
    same_rows(lambda x: [gelu(x, bias)], rows(far, 1024))


def test_group_norm(far):
    """Only the last rows belong to a sample."""
    weight, bias = torch.randn(2, 64, device=far)

    def norm(x):
        starts = torch.tensor([len(x) - FEW, len(x) - 2, len(x)], dtype=torch.int32, device=far)
        return [group_norm(x, weight, bias, starts, 32, silu=True)]

    same_rows(norm, rows(far, 64))


def far_windows(N: int, device, listed: bool) -> Windows:
    """Two windows, which hold the last rows alone; listed: keys are the last of a long list."""
    like = torch.empty(0, dtype=torch.int32, device=device)
    order = zeros(N, like=like)
    order[:FEW] = torch.arange(N - FEW, N)
    starts = torch.tensor([0, 2, FEW], dtype=torch.int32, device=device)
    if not listed:
        return Windows(order, starts, bound=FEW)
    keys = zeros(N, like=like)
    keys[-FEW:] = order[:FEW].flip(0)
    windows = Windows(order, starts, bound=FEW, keys=keys, key_starts=starts + (N - FEW))
    # sorting the list, of which nothing but the end is used, would take seconds
    use = zeros(N, like=like)
    use[:FEW] = order[:FEW].flip(0)
    use_starts = zeros(N + 1, like=like)
    use_starts[-FEW:] = torch.arange(1, FEW + 1)
    vars(windows)["uses"] = (use, use_starts)
    return windows


@pytest.mark.parametrize("kind", ["plain", "treated", "listed"])
def test_window_attention(far, kind):
    """qkv has three times 2^31 elements: rows of the output are beyond 2^31 too.

    treated: q and k are rotated and normed. listed: keys are a list of rows.
    """
    D = 128
    end = rows(far, 3, 1, D)
    gamma = torch.randn(2, 1, D, device=far)
    phase = torch.polar(torch.ones(FEW, D // 2), torch.randn(FEW, D // 2)).to(far)
    grad = rows(far, 1, D)
    found = []
    for N in (FEW, FAR // D + FEW):
        qkv = zeros(N, 3, 1, D, like=end)
        qkv[-FEW:] = end
        more = {}
        if kind == "treated":
            phases = zeros(N, D // 2, like=phase)
            phases[-FEW:] = phase
            more = dict(q_gamma=gamma[0], k_gamma=gamma[1], phases=phases)
        qkv.requires_grad_()
        out = window_attention(qkv, far_windows(N, far, kind == "listed"), **more)
        up = zeros(N, 1, D, like=grad)
        up[-FEW:] = grad
        (dqkv,) = torch.autograd.grad(out, qkv, up)
        found.append((out[-FEW:].detach().clone(), dqkv[-FEW:].clone()))
    assert all(map(torch.equal, *found))
    assert all(numbers.any() for numbers in found[0])


def test_segment_attention(far):
    def attend(q, k, v):
        starts = torch.tensor([len(q) - FEW, len(q) - 2, len(q)], dtype=torch.int32, device=far)
        return [segment_attention(q, k, v, starts, starts)]

    same_rows(attend, *(rows(far, 1, 64) for _ in range(3)))


def far_pooling(N: int, device) -> Pooling:
    """Three coarse voxels, whose children are the last rows of N alone."""
    like = torch.empty(0, dtype=torch.int32, device=device)
    index = zeros(N, like=like)
    index[-FEW:] = torch.tensor([0, 0, 1, 2, 2])
    order = zeros(N, like=like)
    order[:FEW] = torch.arange(N - FEW, N)
    starts = torch.tensor([0, 2, 3, 5], dtype=torch.int32, device=device)
    return Pooling(index, order, starts)


def test_pool_and_unpool(far):
    """Pooling reads the last rows, unpooling writes them; gradients the other way round."""

    def there_and_back(x):
        groups = far_pooling(len(x), far)
        return [unpool(pool(x, groups), groups)]

    same_rows(there_and_back, rows(far, 256))


def test_sparse_conv(far):
    """Only the last rows have neighbours among each other."""
    C = 64
    weight = torch.randn(C, 3, 3, 3, C, device=far)
    bias = torch.randn(C, device=far)
    near = torch.randint(-1, FEW, (FEW, 27), dtype=torch.int32).to(far)

    def conv(x):
        neighbours = zeros(len(x), 27, like=near)
        neighbours[-FEW:] = torch.where(near < 0, -1, near + len(x) - FEW)
        return [sparse_conv(x, weight, bias, neighbours)]

    same_rows(conv, rows(far, C))


def test_lookup_and_neighbours(far):
    """2^31 numbers of coordinates, then 2^31 numbers of neighbours."""
    coords = torch.tensor([[0, 1, 1, x] for x in range(FEW)], dtype=torch.int32, device=far)
    table = build_table(coords)
    args = table.keys, table.rows, table.size, table.kind
    found = torch.ops.trislat.lookup(far_tensor(coords), *args)
    assert found[-FEW:].tolist() == list(range(FEW))
    queries = zeros(FAR // 27 + FEW, 4, like=coords)
    queries[-FEW:] = coords
    found = torch.ops.trislat.neighbours(queries, *args, 3)
    assert torch.equal(found[-FEW:], torch.ops.trislat.neighbours(coords, *args, 3))


@pytest.mark.parametrize(
    "differentiated", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["value", "gradient"]
)
def test_ssim(far, few_programs, differentiated):
    """Pictures beyond 2^31 pixels; with a gradient, saved maps beyond 2^31."""
    a, b = torch.rand(2, 2, 3, 64, 64).to(far)
    count = (FAR // 2 if differentiated else FAR) // a[0].numel() + 2
    found = []
    for V in (2, count):
        pictures = [zeros(V, 3, 64, 64, like=a) for _ in range(2)]
        for whole, end in zip(pictures, (a, b), strict=True):
            whole[-2:] = end
        pictures[0].requires_grad_(differentiated)
        value = ssim(*pictures)
        found.append([value[-2:].detach()])
        if differentiated:
            (grad,) = torch.autograd.grad(value, pictures[0], torch.ones_like(value))
            found[-1].append(grad[-2:].clone())
    assert all(map(torch.equal, *found))
