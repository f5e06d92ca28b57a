"""Attention in windows and segments against a loop over them in float64 and published numbers."""

from collections import Counter

import pytest
import torch

from kernels import backend
from kernels.attention import cpu, sizes
from kernels.attention import launch as launches
from kernels.attention.op import segment_attention, window_attention
from kernels.attention.reference import segment_attention_reference, window_attention_reference
from kernels.voxels.window import Windows, window_partition
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.golden import golden
from tests.helpers.hardware import GPU

EDGES = [0, 1, 15, 16, 17, 0, 63, 64, 65, 127, 128, 129, 255, 256, 257, 0]  # at the size classes
TARGETS = ["interpreter", "sm_80", "sm_86", "sm_90", "sm_120", "gfx942", "gfx1100"]
FEW = [3, 0, 64, 17, 130, 300, 1]  # one or two of every class


def make(lengths, H, D, dtype, device, norm=False):
    """qkv, windows over shuffled rows, and the two gammas."""
    random = torch.Generator().manual_seed(sum(lengths) + D)
    N = sum(lengths)
    qkv = torch.randn(N, 3, H, D, generator=random).to(device, dtype).requires_grad_()
    order = torch.randperm(N, generator=random).int()
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    windows = Windows(order.to(device), starts.to(device), max(lengths, default=0))
    gammas = [
        torch.randn(H, D, generator=random).to(device).requires_grad_()
        for _ in range(2 if norm else 0)
    ]
    return qkv, windows, gammas


def compare(qkv, windows, gammas=(), scale=None, **kwargs):
    """Outputs and all gradients agree with the reference."""
    keys = ("q_gamma", "k_gamma")

    def op(qkv, *g):
        return window_attention(qkv, windows, scale=scale, **dict(zip(keys, g, strict=False)))

    def reference(qkv, *g):
        return window_attention_reference(qkv, windows, scale, *g)

    assert_same(op, reference, qkv, *gammas, **kwargs)


@pytest.mark.parametrize(
    "D, dtype, lengths, H",
    [
        (16, torch.float32, EDGES, 1),
        (64, torch.float16, EDGES, 1),
        (8, torch.float32, FEW, 2),
        (24, torch.float32, [600, 16, 513], 1),
        (24, torch.float16, FEW, 2),
        (64, torch.float32, FEW, 1),
        (128, torch.float32, FEW, 1),
        (128, torch.float16, FEW, 2),
    ],
    ids=str,
)
def test_window_attention(device, D, dtype, lengths, H):
    compare(*make(lengths, H, D, dtype, device))


@pytest.mark.parametrize("D, dtype", [(24, torch.float32), (64, torch.float16)], ids=str)
def test_norm_of_queries_and_keys(device, D, dtype):
    compare(
        *make(FEW, 2, D, dtype, device, norm=True),
        tolerance=5e-3 if dtype == torch.float16 else None,
    )


def test_norm_of_rows_that_are_zero_or_tiny(device):
    """Rows shorter than 1e-12 are divided by that constant, which changes output and gradient."""
    qkv, windows, gammas = make([5, 70], 1, 16, torch.float32, device, norm=True)
    with torch.no_grad():
        qkv[3, :2] = 0
        qkv[20, :2] = 1e-13
        qkv[40, :2] = 1e-20
    compare(qkv, windows, gammas)


@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_far_from_zero(device, sign):
    """exp of any score alone would overflow or vanish, of padded keys too."""
    qkv, windows, _ = make([5, 70, 300], 1, 16, torch.float32, device)
    with torch.no_grad():
        qkv[:, 0] = qkv[:, 0].abs() + 8
        qkv[:, 1] = sign * (qkv[:, 1] * 0.01 + 8)
    # scores near 300 carry an error of 2e-5 into the exponent
    compare(qkv, windows, tolerance=2e-4)
    with backend.assume("sm_90"):
        compare(qkv, windows, tolerance=2e-4)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(device, scale):
    compare(*make([3, 20], 1, 16, torch.float32, device), scale=scale)


@pytest.mark.parametrize("N, lengths", [(0, []), (0, [0, 0]), (1, [1]), (2, [1, 1])], ids=str)
def test_nothing_and_single_rows(device, N, lengths):
    qkv, windows, gammas = make(lengths, 1, 16, torch.float32, device, norm=True)
    out = window_attention(qkv, windows, q_gamma=gammas[0], k_gamma=gammas[1])
    assert out.shape == (N, 1, 16)
    assert torch.equal(out, qkv[:, 2])  # a row alone attends to itself
    grads = torch.autograd.grad(out.sum(), [qkv, *gammas])
    assert all(g.isfinite().all() for g in grads) and grads[1].abs().max() < 1e-5


def test_batched_equals_looped(device):
    """A window's result does not depend on the other windows, but for rounding.

    The other windows decide on tiles and padding.
    """
    qkv, windows, _ = make([40, 0, 100, 9], 1, 16, torch.float32, device)
    upstream = torch.randn(qkv.shape[0], 1, 16, device=device)
    out = window_attention(qkv, windows)
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    starts = windows.starts.tolist()
    for a, b in zip(starts, starts[1:], strict=False):
        rows = windows.order[a:b].long()
        one = Windows(
            torch.arange(b - a, device=device).int(),
            torch.tensor([0, b - a], device=device).int(),
            b - a,
        )
        alone = qkv[rows].detach().requires_grad_()
        out_alone = window_attention(alone, one)
        (grad_alone,) = torch.autograd.grad(out_alone, alone, upstream[rows])
        assert_close(out[rows], out_alone, 2e-6)
        assert_close(grad[rows], grad_alone, 2e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value encountered")
@pytest.mark.parametrize("n", [64, 300])
def test_nan_stays_in_its_window(device, n):
    qkv, windows, _ = make([n, 40, 100], 1, 16, torch.float32, device)
    inside = windows.order[:n].long()
    with torch.no_grad():
        qkv[inside[0]] = torch.nan
    out = window_attention(qkv, windows)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    for tensor in (out, grad):
        bad = tensor.isnan().flatten(1).any(1)
        assert bad[inside].all() and bad.sum() == n


def test_backward_is_linear_and_repeatable(device):
    qkv, windows, gammas = make(FEW, 1, 16, torch.float32, device, norm=True)
    upstream = torch.randn(qkv.shape[0], 1, 16, device=device)

    def run(scale):
        out = window_attention(qkv, windows, q_gamma=gammas[0], k_gamma=gammas[1])
        return [out, *torch.autograd.grad(out, [qkv, *gammas], upstream * scale)]

    once = run(1.0)
    twice = run(1.0)
    large = run(2.0**20)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert all(torch.equal(a * 2.0**20, b) for a, b in zip(once[1:], large[1:], strict=True))


@pytest.mark.parametrize("case", ["attn0", "attn1"])
def test_published_window_attention(device, case):
    config, tensors = golden("ops_window_partition")
    config = config["attn"][case]
    coords = tensors["coords"].to(device)
    windows = window_partition(
        coords, int(coords[:, 0].max()) + 1, config["window_size"], config["shift_window"]
    )
    qkv = tensors["attn_qkv"].float().to(device).requires_grad_()
    out = window_attention(qkv, windows)
    assert_close(out, tensors[f"{case}/out"], 1e-5)
    if f"{case}/grad_qkv" in tensors:
        (grad,) = torch.autograd.grad(out, qkv, tensors[f"{case}/grad_out"].float().to(device))
        assert_close(grad, tensors[f"{case}/grad_qkv"], 2e-5)


@pytest.mark.skipif(GPU, reason="a GPU has its own tiles")
@pytest.mark.parametrize(
    "target, dtype, lengths",
    [
        ("sm_80", torch.float16, [70, 40, 140]),
        ("sm_90", torch.float16, [40, 140, 300]),
        ("gfx942", torch.float16, [40, 100]),
        ("sm_90", torch.float32, [70, 20]),
    ],
    ids=str,
)
def test_tiles_of_gpus(kernel_device, target, dtype, lengths):
    with backend.assume(target):
        compare(*make(lengths, 1, 16, dtype, kernel_device))


@pytest.mark.parametrize(
    "normed, rotated", [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_cover_every_length_once(target, dtype, normed, rotated):
    for pad_d in (16, 32, 64, 128):
        for classes in sizes.tile_sizes(dtype, pad_d, target, normed, rotated):
            assert [c.low for c in classes] == [0, *(c.high for c in classes[:-1])] and classes[
                -1
            ].high == sizes.ANY
            assert classes[-1].high > classes[-1].rows  # loops: it also serves segment_attention


def test_listed_tiles(kernel_device):
    """Of each tile its first position, the end of its segment, and the segment's other side."""
    starts = torch.tensor([0, *EDGES, *[0] * 1100, 33]).cumsum(0).int().to(kernel_device)
    lengths = starts.diff().tolist()
    others = starts * 3 + 1
    begin = starts.tolist()
    other = others.tolist()
    for low, high, rows in [(0, 64, 64), (64, 128, 128), (100, sizes.ANY, 64)]:
        work = launches._tile_list(starts, others, begin[-1], 7, low, high, rows)
        expected = [
            [begin[m] + t, begin[m + 1], other[m], other[m + 1]]
            for m, n in enumerate(lengths)
            if low < n <= high
            for t in range(0, n, rows)
        ]
        assert work[0, :2].tolist() == [len(expected), 7] and len(expected) < len(work)
        assert work[1 : len(expected) + 1].tolist() == expected


def test_impossible_classes_are_not_launched(kernel_device):
    """Only size classes within the windows' bound are launched, each listed once for all passes."""
    qkv, windows, _ = make([4, 3], 1, 16, torch.float32, kernel_device)
    windows = Windows(windows.order, windows.starts, 64)
    for target in TARGETS:
        with backend.assume(target), backend.count_launches() as counts:
            launches._kept.clear()
            out = window_attention(qkv, windows)
            torch.autograd.grad(out.sum(), qkv)
            window_attention(qkv, windows)
            tiles = sizes.tile_sizes(
                torch.float32, 16, backend.target(qkv), normed=False, rotated=False
            )
        forward, backward = ([t for t in tiles if t.low < 64] for tiles in tiles)
        short, short_backward = (
            sum(t.high <= t.rows for t in tiles) for tiles in (forward, backward)
        )
        long_backward = len(backward) - short_backward
        expected = {
            "_attention_short": 2 * short,
            "_attention_long": 2 * (len(forward) - short),
            "_attention_short_backward": short_backward,
            "_attention_long_dq": long_backward,
            "_attention_long_dkv": long_backward,
            "_list_tiles": len({(t.low, t.high, t.rows) for t in forward + backward}),
        }
        assert counts == Counter(expected), target


def test_plans_follow_the_windows(device):
    """Kept plans are found through aliases, and not after the windows have changed in place."""
    qkv, windows, _ = make([20, 12], 1, 16, torch.float32, device)
    window_attention(qkv, windows)
    kept = len(launches._kept)
    alias = Windows(windows.order.detach(), windows.starts.detach(), windows.bound)
    window_attention(qkv, alias)
    assert len(launches._kept) == kept
    windows.starts[1] = 5
    compare(qkv, Windows(windows.order, windows.starts, 32))
    for n in range(1, 40):
        launches.keep((torch.zeros(n),), len)
    assert len(launches._kept) == launches.KEPT


@pytest.mark.parametrize("H, D, dtype", [(1, 16, torch.float32), (2, 24, torch.float16)], ids=str)
def test_segment_attention(device, H, D, dtype):
    random = torch.Generator().manual_seed(0)
    queries = [3, 0, 70, 130, 9, 0, 300]
    keys = [5, 4, 300, 17, 0, 0, 64]
    q_starts, k_starts = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (queries, keys))
    sizes = (sum(queries), sum(keys), sum(keys))
    q, k, v = (
        torch.randn(n, H, D, generator=random).to(device, dtype).requires_grad_() for n in sizes
    )
    assert_same(segment_attention, segment_attention_reference, q, k, v, q_starts, k_starts)
    out = segment_attention(q, k, v, q_starts, k_starts)
    assert (out[3 + 70 + 130 :][:9] == 0).all()  # queries of a segment without keys
    again = segment_attention(q, k, v, q_starts, k_starts)
    assert torch.equal(out, again)


@pytest.mark.parametrize("Nq, Nk", [(0, 0), (0, 3), (3, 0)])
def test_segments_of_nothing(device, Nq, Nk):
    q, k, v = (torch.randn(n, 1, 16, device=device, requires_grad=True) for n in (Nq, Nk, Nk))
    q_starts, k_starts = (torch.tensor([0, n], device=device).int() for n in (Nq, Nk))
    out = segment_attention(q, k, v, q_starts, k_starts)
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    assert all((t == 0).all() for t in (out, *grads))


def test_no_segments(device):
    q, k, v = (torch.randn(0, 1, 16, device=device, requires_grad=True) for _ in range(3))
    none = torch.zeros(1, dtype=torch.int32, device=device)
    out = segment_attention(q, k, v, none, none)
    assert [t.shape for t in (out, *torch.autograd.grad(out.sum(), [q, k, v]))] == [(0, 1, 16)] * 4
    windows = Windows(none[:0], none, 0)
    assert window_attention(torch.stack([q, k, v], 1), windows).shape == (0, 1, 16)


@pytest.mark.parametrize("Nq, Nk", [(0, 9), (1, 9), (9, 1)])
def test_strides_of_single_rows(device, Nq, Nk):
    """A single row is contiguous whatever its stride: that says nothing of the other tensors."""
    wide = [torch.randn(n, 5, 16, device=device)[:, 2:3] for n in (Nq, Nk, Nk)]
    starts = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (Nq, Nk)]
    plain = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in wide]
    wide = [t.requires_grad_() for t in wide]
    a = segment_attention(*wide, *starts)
    b = segment_attention(*plain, *starts)
    assert torch.equal(a, b)
    for x, y in zip(
        torch.autograd.grad(a.sum(), wide), torch.autograd.grad(b.sum(), plain), strict=True
    ):
        assert torch.equal(x, y)


def test_published_segment_attention(device):
    config, tensors = golden("ops_sparse")
    q, k, v = (tensors[f"varlen/{x}"].float().to(device) for x in "qkv")
    counts = config["counts"], tensors["varlen/kv_counts"]
    q_starts, k_starts = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in counts)
    assert_close(segment_attention(q, k, v, q_starts, k_starts), tensors["varlen/out"], 1e-5)


def test_float64_gradients():
    qkv, windows, gammas = make([5, 0, 9], 1, 8, torch.float64, torch.device("cpu"), norm=True)
    gammas = [g.detach().double().requires_grad_() for g in gammas]
    assert torch.autograd.gradcheck(
        lambda x, a, b: window_attention(x, windows, q_gamma=a, k_gamma=b), [qkv, *gammas]
    )


def test_long_windows_in_pieces(monkeypatch):
    """The torch path cuts batches of windows, and the queries of a long one, into pieces."""
    monkeypatch.setattr(cpu, "SCORES", 1000)
    # all probabilities are kept for the backward pass, then none
    for most in (cpu.KEPT, 0):
        monkeypatch.setattr(cpu, "KEPT", most)
        compare(*make([100, 20, 20, 7], 2, 16, torch.float32, torch.device("cpu")))


def test_compiles(device):
    qkv, windows, _ = make([5, 20], 1, 16, torch.float32, device)

    def loss(x):
        return (window_attention(x, windows) ** 2).sum()

    (expected,) = torch.autograd.grad(loss(qkv), qkv)
    (grad,) = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(qkv), qkv
    )
    assert_close(grad, expected, 1e-6)


def test_wrong_input(device):
    qkv, windows, _ = make([5, 20], 2, 16, torch.float32, device)

    def bad(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    with pytest.raises(ValueError, match="12 channels per head"):
        window_attention(bad(25, 3, 2, 12), windows)
    with pytest.raises(ValueError, match="136 channels per head"):
        window_attention(bad(25, 3, 2, 136), windows)
    with pytest.raises(ValueError, match=r"\[N, 3, H, D\], got \[25, 96\]"):
        window_attention(bad(25, 96), windows)
    with pytest.raises(ValueError, match=r"\[N, 3, H, D\], got \[25, 2, 3, 16\]"):
        window_attention(bad(25, 2, 3, 16), windows)
    with pytest.raises(ValueError, match="torch.int32"):
        window_attention(bad(25, 3, 2, 16, dtype=torch.int32), windows)
    with pytest.raises(ValueError, match="24 rows and the windows have 25"):
        window_attention(bad(24, 3, 2, 16), windows)
    with pytest.raises(ValueError, match=r"k_gamma must be \[H, D\] = \[2, 16\], got \[16\]"):
        window_attention(qkv, windows, q_gamma=bad(2, 16), k_gamma=bad(16))
    with pytest.raises(ValueError, match="go together"):
        window_attention(qkv, windows, q_gamma=bad(2, 16))
    if not backend.is_torch(qkv):
        with pytest.raises(ValueError, match="torch.float64"):
            window_attention(qkv.double(), windows)
    starts = windows.starts
    with pytest.raises(ValueError, match=r"k must be .* got \[25, 1, 16\]"):
        segment_attention(bad(25, 2, 16), bad(25, 1, 16), bad(25, 1, 16), starts, starts)
    with pytest.raises(ValueError, match="k has 25 rows and v has 24"):
        segment_attention(bad(25, 2, 16), bad(25, 2, 16), bad(24, 2, 16), starts, starts)
    with pytest.raises(ValueError, match=r"q_starts \[3\] and k_starts \[2\]"):
        segment_attention(bad(25, 2, 16), bad(25, 2, 16), bad(25, 2, 16), starts, starts[1:])
