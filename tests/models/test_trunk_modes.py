"""The trunk's other published modes: windows along curves and rotary embedding.

No published numbers cover them whole.
"""

import pytest
import torch

import models
from kernels.attention.op import window_attention
from kernels.attention.reference import rotate_reference, window_attention_reference
from kernels.voxels.cache import SpatialCache
from kernels.voxels.curves import serialized_windows
from kernels.voxels.window import full_windows
from models.layers import WindowAttention, block_windows, curve_windows, rotary_phases
from tests.helpers.compare import assert_close
from tests.helpers.golden import golden
from tests.helpers.models import batch, randomize


def encoder(device, **kwargs):
    kwargs = {"num_heads": 2, "window_size": 12} | kwargs
    return randomize(models.Encoder(16, 5, 32, 4, 2, **kwargs)).to(device)


def test_published_rotation(device):
    """The rotation alone, and attention that rotates against attention over rotated rows."""
    _, tensors = golden("ops_sparse")
    tensors = {k: v.to(device) for k, v in tensors.items()}
    coords = torch.nn.functional.pad(tensors["ape/pos"], (1, 0)).int()
    coords[:, 0] = torch.arange(len(coords))  # one voxel a sample: positions may repeat
    phases = rotary_phases(SpatialCache(coords, None), 48)
    q = tensors["rope/q"][:, None]
    k = tensors["rope/k"][:, None]
    rotated = tensors["rope/q_out"][:, None], tensors["rope/k_out"][:, None]
    assert_close(rotate_reference(q, phases), rotated[0], 1e-5, "q")
    assert_close(rotate_reference(k, phases), rotated[1], 1e-5, "k")
    windows = full_windows(torch.tensor([0, 64], dtype=torch.int32, device=device), 64)
    v = torch.randn_like(q)
    out = window_attention(torch.stack([q, k, v], 1), windows, phases=phases)
    assert_close(out, window_attention(torch.stack([*rotated, v], 1), windows), 1e-5, "attention")


@pytest.mark.parametrize("channels", [8, 16, 24, 32, 64])
def test_phases_of_every_head_size(channels):
    """Angles are 10000 ** (-k / n) per step along an axis, n = channels // 3 // 2 for each axis.

    Channels that are left over do not turn.
    """
    cache = SpatialCache(torch.tensor([[0, 3, 0, 7]], dtype=torch.int32))
    n = channels // 3 // 2
    angles = [c * 10000 ** (-k / n) for c in (3, 0, 7) for k in range(n)]
    angles = torch.tensor(angles + [0.0] * (channels // 2 - 3 * n), dtype=torch.float64)
    assert_close(
        torch.view_as_real(rotary_phases(cache, channels)[0]),
        torch.stack([angles.cos(), angles.sin()], 1),
        1e-6,
    )


def test_blocks_of_each_mode():
    def of(mode, window):
        model = models.Encoder(16, 5, 32, 4, 5, num_heads=2, window_size=window, attn_mode=mode)
        return [block.attn.windows for block in model.blocks]

    assert of("shift_window", 7) == [
        (curve_windows, 7, "z_order", 0, 16 * (i % 2)) for i in range(5)
    ]
    assert of("shift_sequence", 7) == [
        (curve_windows, 7, "z_order", 3 * (i % 2), 0) for i in range(5)
    ]
    orders = ["z_order", "z_order_transposed", "hilbert", "hilbert_transposed", "z_order"]
    assert of("shift_order", 7) == [(curve_windows, 7, order, 0, 0) for order in orders]
    assert len(of("full", None)) == 5  # needs no window size


@pytest.mark.parametrize(
    "mode, i", [("shift_window", 1), ("shift_sequence", 1), ("shift_order", 3)]
)
def test_attention_layer_equals_its_parts(device, mode, i):
    x = batch([40, 0, 15], device, channels=32)
    layer = randomize(
        WindowAttention(32, 2, block_windows(mode, 12, i), use_rope=True, qk_rms_norm=True)
    ).to(device)
    arguments = {
        "shift_window": ("z_order", 0, 16),
        "shift_sequence": ("z_order", 6),
        "shift_order": ("hilbert_transposed",),
    }
    windows = serialized_windows(x.coords, 3, 12, *arguments[mode])
    gammas = layer.q_rms_norm.gamma, layer.k_rms_norm.gamma
    qkv = torch.nn.functional.linear(x.feats, layer.to_qkv.weight, layer.to_qkv.bias).view(
        -1, 3, 2, 16
    )
    out = window_attention_reference(
        qkv, windows, None, *gammas, phases=rotary_phases(x.cache, 16)
    ).flatten(1)
    expected = torch.nn.functional.linear(out, layer.to_out.weight, layer.to_out.bias)
    assert_close(layer(x.feats, x.cache), expected, 2e-5)


def test_hooks_of_every_layer_run_and_inputs_stay(device):
    """Forward and backward hooks of a block's layers, and the same numbers with them as without."""
    block = encoder(device).blocks[0]
    x = batch([25, 0, 9], device, channels=32)
    upstream = torch.randn(len(x), 32, device=device)

    def gradients() -> list[torch.Tensor]:
        feats = x.feats.detach().requires_grad_()
        out = block(feats, x.cache)
        return [out, *torch.autograd.grad(out, [feats, *block.parameters()], upstream)]

    plain = gradients()
    before = x.feats.clone()
    layers = dict(block.named_modules())
    forward = []
    backward = []
    for name, layer in layers.items():
        note = lambda module, args, out, name=name: forward.append(name)
        layer.register_forward_hook(note)
        note = lambda module, grads, ups, name=name: backward.append(name)
        layer.register_full_backward_hook(note)
    for ours, expected in zip(gradients(), plain, strict=True):
        assert torch.equal(ours, expected)
    assert sorted(forward) == sorted(backward) == sorted(layers)
    assert torch.equal(x.feats, before)


@pytest.mark.parametrize("mode, position", [("shift_sequence", "rope"), ("swin", "rope")])
def test_batched_equals_looped_with_empty_samples(device, mode, position):
    model = encoder(device, attn_mode=mode, pe_mode=position)
    x = batch([25, 0, 1, 9, 0], device)
    together = model(x).mean
    for sample, rows in enumerate(x.split()):
        coords = x.coords[x.coords[:, 0] == sample].clone()
        coords[:, 0] = 0
        if len(rows):
            alone = model(models.SparseTensor(rows, coords)).mean
            assert_close(together[x.coords[:, 0] == sample], alone, 2e-6, f"sample {sample}")


def test_rotary_embedding_is_relative(device):
    """Moving the whole object changes nothing: scores depend on differences of rotations."""
    model = encoder(device, attn_mode="full", pe_mode="rope")
    x = batch([30], device)
    moved = models.SparseTensor(
        x.feats, x.coords + torch.tensor([0, 5, 1, 2], dtype=torch.int32, device=device)
    )
    assert_close(model(moved).mean, model(x).mean, 1e-5)
    absolute = encoder(device, attn_mode="full")
    assert (absolute(moved).mean - absolute(x).mean).abs().max() > 1e-2


def test_checkpointed_training_step():
    """Gradients of every parameter, the same with and without recomputing the blocks."""
    x = batch([30, 9], "cpu")
    grads = []
    for use in (False, True):
        model = encoder(
            "cpu", attn_mode="shift_order", pe_mode="rope", qk_rms_norm=True, use_checkpoint=use
        ).train()
        model(x).mean.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def test_windows_and_phases_are_made_once(device):
    model = encoder(device, attn_mode="shift_sequence", pe_mode="rope")
    x = batch([30], device)
    model(x)
    made = x.cache.misses
    model(x)
    assert made == 3 and x.cache.misses == made  # two kinds of windows, and the phases
