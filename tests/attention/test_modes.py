"""Attention with lists of keys in which rows repeat, with rotary phases, and both with the norm."""

import pytest
import torch

from kernels import backend
from kernels.attention.op import segment_attention, window_attention
from kernels.attention.reference import rotate_reference, window_attention_reference
from kernels.voxels.curves import serialized_windows
from kernels.voxels.window import Windows
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.golden import golden, load_weights
from tests.helpers.hardware import GPU
from tests.helpers.voxels import voxels


def listed(counts, window, device, shift=0):
    return serialized_windows(voxels(counts).to(device), len(counts), window, "hilbert", shift)


def make(windows, H, D, dtype, device, norm=False, rope=False):
    """qkv, and the gammas and phases that are asked for."""
    random = torch.Generator().manual_seed(D)
    N = len(windows.order)
    qkv = torch.randn(N, 3, H, D, generator=random).to(device, dtype).requires_grad_()
    extra = {}
    if norm:
        names = ("q_gamma", "k_gamma")
        extra |= {
            name: torch.randn(H, D, generator=random).to(device).requires_grad_() for name in names
        }
    if rope:
        angle = torch.randn(N, D // 2, generator=random) * 3
        extra["phases"] = torch.polar(torch.ones_like(angle), angle).to(device)
    return qkv, extra


def compare(windows, qkv, extra, **kwargs):
    """Outputs and all gradients agree with the reference."""
    names = list(extra)

    def op(qkv, *values):
        return window_attention(qkv, windows, **dict(zip(names, values, strict=True)))

    def reference(qkv, *values):
        return window_attention_reference(qkv, windows, **dict(zip(names, values, strict=True)))

    assert_same(op, reference, qkv, *extra.values(), **kwargs)


def plain(lengths, device):
    """Windows of these lengths over shuffled rows."""
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(0)).int()
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return Windows(order.to(device), starts.to(device), max(lengths, default=0))


@pytest.mark.parametrize(
    "counts, window, H, D, dtype",
    [
        ([168, 0, 110, 5], 40, 1, 16, torch.float32),
        ([300, 1], 280, 1, 64, torch.float16),
        ([7], 1, 1, 16, torch.float32),
        ([90, 33], 32, 2, 8, torch.float16),
    ],
    ids=str,
)
def test_keys_that_repeat(device, counts, window, H, D, dtype):
    windows = listed(counts, window, device, shift=window // 2)
    compare(windows, *make(windows, H, D, dtype, device))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("D, dtype", [(24, torch.float32), (64, torch.float16)], ids=str)
def test_rotation(device, D, dtype, norm):
    windows = plain([3, 0, 64, 130, 300, 1], device)
    # rounded after the rotation and after the norm, as published
    tolerance = 6e-3 if dtype == torch.float16 else None
    compare(windows, *make(windows, 2, D, dtype, device, norm, rope=True), tolerance=tolerance)


@pytest.mark.parametrize("rope", [False, True])
def test_keys_that_repeat_normed_and_rotated(device, rope):
    windows = listed([150, 0, 40], 64, device, shift=32)
    compare(windows, *make(windows, 1, 16, torch.float32, device, norm=True, rope=rope))


@pytest.mark.parametrize("counts", [[], [0, 0], [1], [0, 1, 0]], ids=str)
def test_nothing_and_single_rows(device, counts):
    windows = listed(counts, 4, device)
    qkv, extra = make(windows, 1, 16, torch.float32, device, norm=True, rope=True)
    out = window_attention(qkv, windows, **extra)
    assert torch.equal(out, qkv[:, 2])  # a row alone attends to itself
    grads = torch.autograd.grad(out.sum(), [qkv, extra["q_gamma"], extra["k_gamma"]])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, 2] == 1).all()


def test_backward_is_repeatable(device):
    windows = listed([150, 90], 64, device, shift=32)
    qkv, extra = make(windows, 1, 16, torch.float32, device, norm=True, rope=True)

    def run():
        out = window_attention(qkv, windows, **extra)
        return [
            out,
            *torch.autograd.grad(out.square().sum(), [qkv, extra["q_gamma"], extra["k_gamma"]]),
        ]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_batched_equals_looped(device):
    counts = [70, 0, 33]
    windows = listed(counts, 32, device, shift=16)
    qkv, extra = make(windows, 1, 16, torch.float32, device, rope=True)
    upstream = torch.randn(len(qkv), 1, 16, device=device)
    out = window_attention(qkv, windows, **extra)
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    coords = voxels(counts)
    first = 0
    for b, n in enumerate(counts):
        rows = slice(first, first + n)
        part = coords[coords[:, 0] == b].clone()
        part[:, 0] = 0
        alone = qkv[rows].detach().requires_grad_()
        one = serialized_windows(part.to(device), 1, 32, "hilbert", 16)
        out_alone = window_attention(alone, one, phases=extra["phases"][rows])
        (grad_alone,) = torch.autograd.grad(out_alone, alone, upstream[rows])
        assert_close(out[rows], out_alone, 2e-6)
        assert_close(grad[rows], grad_alone, 2e-6)
        first += n


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value encountered")
def test_nan_stays_in_the_windows_that_read_it(device):
    windows = listed([100, 60], 32, device)
    qkv, _ = make(windows, 1, 16, torch.float32, device)
    row = int(windows.order[0])
    with torch.no_grad():
        qkv[row] = torch.nan
    starts = windows.starts.tolist()
    key_starts = windows.key_starts.tolist()
    order = windows.order.tolist()
    keys = windows.keys.tolist()
    readers = [m for m in range(len(windows)) if row in keys[key_starts[m] : key_starts[m + 1]]]
    expected = sorted(r for m in readers for r in order[starts[m] : starts[m + 1]])
    bad = window_attention(qkv, windows).isnan().flatten(1).any(1)
    assert bad.nonzero()[:, 0].tolist() == expected and len(expected) < 100


def test_published_norm_of_queries_and_keys(device):
    """Attention that norms gives what attention over published normed rows gives."""
    tensors = golden("ops_sparse")[1]
    x, gamma, normed = (tensors[f"rms/{k}"].to(device).float() for k in ("in", "gamma", "out"))
    N = len(x)
    starts = torch.tensor([0, N], dtype=torch.int32, device=device)
    windows = Windows(torch.arange(N, dtype=torch.int32, device=device), starts, N)
    v = torch.randn_like(x)
    out = window_attention(torch.stack([x, x, v], 1), windows, q_gamma=gamma, k_gamma=gamma)
    expected = window_attention(torch.stack([normed, normed, v], 1), windows)
    assert_close(out, expected, 1e-5)


@pytest.mark.parametrize("case", range(5))
def test_published_serialized_attention(device, case):
    meta, tensors = golden("ops_serialized")
    config = meta["configs"][f"cfg{case}"]
    coords = tensors["coords"].to(device)
    qkv = tensors["attn_qkv"].float().to(device)
    shift = config["shift_sequence"], config["shift_window"]
    windows = serialized_windows(coords, 3, config["window_size"], config["mode"].lower(), *shift)
    assert_close(window_attention(qkv, windows), tensors[f"cfg{case}/out"], 1e-5)


@pytest.mark.skipif(GPU, reason="a GPU has its own tiles")
@pytest.mark.parametrize(
    "target, dtype", [("sm_90", torch.float16), ("gfx942", torch.float16)], ids=str
)
def test_tiles_of_gpus(kernel_device, target, dtype):
    windows = listed([140], 100, kernel_device)
    with backend.assume(target):
        tolerance = 6e-3 if dtype == torch.float16 else None
        compare(
            windows,
            *make(windows, 1, 16, dtype, kernel_device, norm=True, rope=True),
            tolerance=tolerance,
        )


def test_launches(kernel_device):
    """Every window of a batch is in one launch a pass; one more sums gradients of repeated keys."""
    windows = listed([40, 30, 64], 16, kernel_device)
    qkv, extra = make(windows, 1, 16, torch.float32, kernel_device, rope=True)
    windows.uses  # noqa: B018 made here, not counted below
    with backend.count_launches() as counts:
        torch.autograd.grad(window_attention(qkv, windows, **extra).sum(), qkv)
    names = ("_attention_long", "_attention_long_dq", "_attention_long_dkv", "_sum_uses")
    assert (
        counts == dict.fromkeys(names, 1) | {"_list_tiles": counts["_list_tiles"]}
        and counts["_list_tiles"] <= 3
    )


def test_compiles(device):
    windows = listed([40, 20], 16, device)
    qkv, extra = make(windows, 1, 16, torch.float32, device, norm=True, rope=True)

    def loss(x):
        return (window_attention(x, windows, **extra) ** 2).sum()

    (expected,) = torch.autograd.grad(loss(qkv), qkv)
    (grad,) = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(qkv), qkv
    )
    assert_close(grad, expected, 1e-6)
    gamma = torch.stack([extra["q_gamma"], extra["k_gamma"]]).detach()
    lists = windows.order, windows.starts, windows.keys, windows.key_starts, *windows.uses
    args = (
        qkv.detach().requires_grad_(),
        *lists,
        gamma.requires_grad_(),
        torch.view_as_real(extra["phases"]),
        16,
        0.25,
        True,
    )
    torch.library.opcheck(torch.ops.trislat.window_attention, args)


def test_float64_gradients():
    windows = listed([14], 6, torch.device("cpu"), shift=3)
    qkv, extra = make(windows, 1, 8, torch.float64, torch.device("cpu"), norm=True, rope=True)
    phases = extra.pop("phases").to(torch.complex128)
    inputs = [qkv, *(g.detach().double().requires_grad_() for g in extra.values())]
    assert torch.autograd.gradcheck(
        lambda x, a, b: window_attention(x, windows, q_gamma=a, k_gamma=b, phases=phases), inputs
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_rotates_sixteen_bits(device, dtype):
    """Through fp32, without torch's warning of complex fp16."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 16, generator=random).to(device, dtype)
    angle = torch.randn(5, 8, generator=random).to(device)
    phases = torch.polar(torch.ones_like(angle), angle)
    assert torch.equal(rotate_reference(x, phases), rotate_reference(x.float(), phases).to(dtype))


def test_published_cross_attention(device):
    """Queries of every voxel, keys and values of a dense context, as in a published layer."""
    meta, tensors = golden("ops_sparse")
    tensors = {k: v.to(device) for k, v in tensors.items()}
    weights = load_weights(tensors, "cross/sd/")
    context = tensors["cross/context"].float()
    feats = tensors["feats"].float()
    linear = {
        name: (weights[f"{name}.weight"], weights[f"{name}.bias"])
        for name in ("to_q", "to_kv", "to_out")
    }
    q = torch.nn.functional.linear(feats, *linear["to_q"]).view(len(feats), 2, 16)
    k, v = torch.nn.functional.linear(context, *linear["to_kv"]).view(-1, 2, 2, 16).unbind(1)
    counts = meta["counts"], [context.shape[1]] * 3
    q_starts, k_starts = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in counts)
    out = segment_attention(q, k, v, q_starts, k_starts).flatten(1)
    assert_close(torch.nn.functional.linear(out, *linear["to_out"]), tensors["cross/out"], 1e-5)


def test_rotation_at_an_odd_storage_offset(device):
    N = 5
    windows = Windows(
        *(torch.tensor(t, dtype=torch.int32, device=device) for t in ([4, 2, 0, 1, 3], [0, 5])),
        5,
    )
    qkv = torch.randn(1 + N * 3 * 16, device=device)[1:].view(N, 3, 1, 16)
    angles = torch.randn(N, 8, device=device)
    phases = torch.polar(torch.ones_like(angles), angles)
    assert torch.equal(
        window_attention(qkv, windows, phases=phases),
        window_attention(qkv.clone(), windows, phases=phases),
    )


def test_wrong_phases(device):
    windows = plain([5, 20], device)
    qkv, extra = make(windows, 2, 16, torch.float32, device, rope=True)
    for wrong in (extra["phases"][:24], extra["phases"][:, :7], extra["phases"].real):
        with pytest.raises(
            ValueError,
            match=r"phases must be \[N, D / 2\] = \[25, 8\] complex, got \[2[45], [78]\]",
        ):
            window_attention(qkv, windows, phases=wrong)
