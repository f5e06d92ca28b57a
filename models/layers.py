"""The sparse transformer shared by the encoder and the decoders: N voxels, C channels, H heads.

Parameter names are those of the published models (microsoft/TRELLIS), so their checkpoints load
unchanged. A block is x = x + attention(norm(x)); x = x + mlp(norm(x)). Parameters stay fp32; the
transformer computes in `activation_dtype`.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import (
    CURVES,
    SpatialCache,
    Windows,
    add_layer_norm,
    full_windows,
    gelu,
    layer_norm,
    serialized_windows,
    window_attention,
    window_partition,
)

BLOCK_EPS = 1e-6  # of the norms inside a block; the norm before an output layer has 1e-5
CURVE_SHIFT = 16  # voxels by which "shift_window" moves every other block's curve
ATTENTION_MODES = ("full", "swin", "shift_window", "shift_sequence", "shift_order")
POSITION_MODES = ("ape", "rope")


def _angles(cache: SpatialCache, frequencies: int) -> Tensor:  # [N, 3, frequencies] fp32
    """Voxel coordinates times the frequencies 10000 ** (-k / frequencies), for axes x, y, z."""
    k = torch.arange(frequencies, dtype=torch.float32, device=cache.coords.device)
    return cache.coords[:, 1:, None].float() * (1.0 / 10000 ** (k / frequencies))


def position_embedding(cache: SpatialCache, channels: int) -> Tensor:  # [N, C] fp32
    """Absolute sine embedding of voxel coordinates.

    Channels are [sin | cos] of axis x, then y, then z; zeros fill up to C.
    """
    angles = _angles(cache, channels // 3 // 2)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(embedding, (0, channels - embedding.shape[1]))


def rotary_phases(cache: SpatialCache, channels: int) -> Tensor:  # [N, C / 2] complex64
    """Rotations of a head's C channels by voxel coordinates.

    Pairs of channels turn by axis x, then y, then z; pairs that are left over do not turn.
    """
    angles = _angles(cache, channels // 3 // 2).flatten(1)
    angles = F.pad(angles, (0, channels // 2 - angles.shape[1]))
    return torch.polar(torch.ones_like(angles), angles)


def shifted_windows(cache: SpatialCache, window: int, shift: int) -> Windows:
    """Cubic windows of `window` voxels a side, moved by `shift` voxels along every axis."""
    return window_partition(cache, cache.batch_size, window, shift)


def curve_windows(
    cache: SpatialCache, window: int, curve: str, shift_sequence: int, shift_window: int
) -> Windows:
    """Overlapping runs of `window` voxels along a space-filling curve."""
    return serialized_windows(cache, cache.batch_size, window, curve, shift_sequence, shift_window)


def block_windows(attn_mode: str, window_size: int, i: int) -> tuple:
    """The recipe for the windows of block i.

    It is a function whose first argument is a SpatialCache, followed by its other arguments.
    """
    odd = i % 2
    if attn_mode == "full":
        return (full_windows,)
    if attn_mode == "swin":
        return shifted_windows, window_size, window_size // 2 * odd
    if attn_mode == "shift_window":
        return curve_windows, window_size, CURVES[0], 0, CURVE_SHIFT * odd
    if attn_mode == "shift_sequence":
        return curve_windows, window_size, CURVES[0], window_size // 2 * odd, 0
    return curve_windows, window_size, CURVES[i % len(CURVES)], 0, 0  # shift_order


class _WideLinear(torch.autograd.Function):
    """A linear layer of 16-bit operands whose products and sums are fp32, as a GPU's are.

    For CPUs, few of which multiply 16-bit matrices: on the others fp32 is many times faster. It
    keeps the 16-bit operands for its gradients.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), bias).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        wide = grad.float()
        rows = wide.flatten(0, -2)
        dx = (wide @ weight.float()).to(x.dtype) if wanted[0] else None
        dw = (rows.T @ x.float().flatten(0, -2)).to(weight.dtype) if wanted[1] else None
        db = rows.sum(0).to(weight.dtype) if wanted[2] else None
        return dx, dw, db


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear with weight and bias rounded to x's dtype."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        return _WideLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer whose fp32 weights are rounded to its input's dtype at use."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LinearGELU(Linear):
    """A linear layer and a GELU.

    The GELU adds the bias: its gradient is then summed in the pass that makes the GELU's.
    """

    def forward(self, x: Tensor) -> Tensor:
        return gelu(linear(x, self.weight), self.bias)


class HeadRMSNorm(nn.Module):
    """The scale of an RMS norm over each head's channels; attention computes the norm itself."""

    def __init__(self, heads: int, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, channels))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows of voxels; `windows` comes from `block_windows`."""

    def __init__(
        self, channels: int, heads: int, windows: tuple, use_rope: bool, qk_rms_norm: bool
    ):
        super().__init__()
        self.heads = heads
        self.windows = windows
        self.use_rope = use_rope
        self.to_qkv = Linear(channels, 3 * channels)
        self.to_out = Linear(channels, channels)
        if qk_rms_norm:
            self.q_rms_norm = HeadRMSNorm(heads, channels // heads)
            self.k_rms_norm = HeadRMSNorm(heads, channels // heads)
        self.qk_rms_norm = qk_rms_norm

    def look_up(self, cache: SpatialCache) -> tuple[Windows, Tensor | None]:
        """The windows and, with use_rope, the rotary phases of the cache's voxels."""
        windows = cache.get(*self.windows)
        if not self.use_rope:
            return windows, None
        return windows, cache.get(rotary_phases, self.to_out.in_features // self.heads)

    def forward(self, x: Tensor, cache: SpatialCache) -> Tensor:  # [N, C] -> [N, C]
        windows, phases = self.look_up(cache)
        gammas = {}
        if self.qk_rms_norm:
            gammas = {"q_gamma": self.q_rms_norm.gamma, "k_gamma": self.k_rms_norm.gamma}
        qkv = rearrange(self.to_qkv(x), "n (three h d) -> n three h d", three=3, h=self.heads)
        out = window_attention(qkv, windows, **gammas, phases=phases)
        return self.to_out(rearrange(out, "n h d -> n (h d)"))


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        hidden = int(channels * ratio)
        # the names under which published weights are stored
        layers = {"0": LinearGELU(channels, hidden), "2": Linear(hidden, channels)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:  # [N, C] -> [N, C]
        return self.mlp(x)


class Block(nn.Module):
    """Pre-norm transformer block: x = x + attention(norm(x)); x = x + mlp(norm(x))."""

    def __init__(
        self,
        channels: int,
        heads: int,
        mlp_ratio: float,
        windows: tuple,
        use_rope: bool,
        qk_rms_norm: bool,
    ):
        super().__init__()
        self.attn = WindowAttention(channels, heads, windows, use_rope, qk_rms_norm)
        self.mlp = MLP(channels, mlp_ratio)

    def forward(self, x: Tensor, cache: SpatialCache) -> Tensor:  # [N, C] -> [N, C]
        h = self.attn(layer_norm(x, BLOCK_EPS), cache)
        x, normed = add_layer_norm(x, h, BLOCK_EPS)  # x + h and its norm, in one pass
        return x + self.mlp(normed)


class Trunk(nn.Module):
    """Input layer, position embedding and blocks: [N, in_channels] -> [N, C] in the input's dtype.

    attn_mode   windows of the blocks
      swin              cubes of window_size voxels a side, shifted by 0 and half a side in turn
      full              the whole sample
      shift_window      window_size voxels along the z-order curve, which moves by 0 and 16 voxels
      shift_sequence    the same, windows moved along it by 0 and half a window in turn
      shift_order       the same along z-order, transposed z-order, Hilbert and transposed Hilbert
                        curves in turn
    pe_mode     "ape" adds a sine embedding to the features; "rope" rotates each head's queries and
                keys (the published code rotates by phases of all heads' channels, and fails)

    Raises ValueError for heads that do not divide the channels, sizes that are too small and
    unknown modes.
    """

    resolution: int | None = None  # voxels along a side of the model's grid; None: any

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        num_blocks: int,
        num_heads: int | None = None,
        num_head_channels: int = 64,
        mlp_ratio: float = 4.0,
        attn_mode: str = "swin",
        window_size: int = 8,
        pe_mode: str = "ape",
        use_fp16: bool = False,
        use_checkpoint: bool = False,
        qk_rms_norm: bool = False,
    ):
        super().__init__()
        heads = num_heads or model_channels // num_head_channels
        if heads < 1 or model_channels % heads:
            raise ValueError(
                f"model_channels {model_channels} is not a multiple of num_heads {heads}"
            )
        if attn_mode not in ATTENTION_MODES:
            raise ValueError(f"attn_mode {attn_mode!r} is not one of {', '.join(ATTENTION_MODES)}")
        if pe_mode not in POSITION_MODES:
            raise ValueError(f"pe_mode {pe_mode!r} is not one of {', '.join(POSITION_MODES)}")
        if attn_mode != "full" and (window_size is None or window_size < 1):
            raise ValueError(f"window_size {window_size} must be at least 1")
        if num_blocks < 1 or model_channels < 6:
            raise ValueError(
                f"num_blocks {num_blocks} must be at least 1 and model_channels "
                f"{model_channels} at least 6"
            )
        self.model_channels = model_channels
        self.use_checkpoint = use_checkpoint
        self.pe_mode = pe_mode
        self.activation_dtype = torch.float16 if use_fp16 else torch.float32
        self.input_layer = nn.Linear(in_channels, model_channels)
        self.blocks = nn.ModuleList(
            Block(
                model_channels,
                heads,
                mlp_ratio,
                block_windows(attn_mode, window_size, i),
                pe_mode == "rope",
                qk_rms_norm,
            )
            for i in range(num_blocks)
        )

    def initialize(self) -> None:
        """Set Xavier weights and zero biases in every linear layer, and a zero output layer.

        This is the published initialisation.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.out_layer.weight)

    @torch.no_grad()
    def rescale(self, inputs: float, branches: float) -> None:
        """Scale the weights of the input layer, and of the layers that end a block's branches.

        Of an untrained model it says how much the features count beside the position embedding,
        and how much every block adds at first: with 0 it is the identity (Goyal et al., 2017,
        arXiv 1706.02677, did so with the last norm of a residual block).
        """
        self.input_layer.weight.mul_(inputs)
        for block in self.blocks:
            block.attn.to_out.weight.mul_(branches)
            block.mlp.mlp[-1].weight.mul_(branches)

    def set_activation_dtype(self, dtype: torch.dtype) -> None:
        """Compute the blocks in fp32, fp16 or bf16; weights, input and output layers stay fp32."""
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"activation dtype {dtype} is not one of float32, float16, bfloat16")
        self.activation_dtype = dtype

    def compute_dtype(self, feats: Tensor) -> torch.dtype:
        """The dtype between input and output layer: activation_dtype; for fp32 that of feats."""
        return feats.dtype if self.activation_dtype == torch.float32 else self.activation_dtype

    def trunk(self, feats: Tensor, cache: SpatialCache) -> Tensor:  # [N, in_channels] -> [N, C]
        """Compute the features before the output layer's norm.

        Raises ValueError for features whose channels or dtype are not the model's, and for voxels
        outside its grid.
        """
        self._check(feats, cache)
        x = self.input_layer(feats)
        if self.pe_mode == "ape":
            x = x + cache.get(position_embedding, self.model_channels)
        x = x.to(self.compute_dtype(feats))
        recompute = self.use_checkpoint and self.training and torch.is_grad_enabled()
        if recompute:
            # torch.compile allows no side effect, such as a cache that fills, in what is
            # computed again
            for block in self.blocks:
                block.attn.look_up(cache)
        for block in self.blocks:
            if recompute:
                x = checkpoint(block, x, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cache)
        return x.to(feats.dtype)

    def _check(self, feats: Tensor, cache: SpatialCache) -> None:
        if feats.shape[1] != self.input_layer.in_features:
            raise ValueError(
                f"features have {feats.shape[1]} channels, the model takes "
                f"{self.input_layer.in_features}"
            )
        expected = self.input_layer.weight.dtype
        # autocast converts features itself
        if feats.dtype != expected and not torch.is_autocast_enabled(feats.device.type):
            raise ValueError(
                f"features are {feats.dtype}, the model takes {expected}: convert them with "
                f".to({expected})"
            )
        if self.resolution is not None and max(cache.extent) > self.resolution:
            raise ValueError(
                f"a voxel has the coordinate {max(cache.extent) - 1}, the model's resolution is "
                f"{self.resolution}: its voxels have 0 to {self.resolution - 1}"
            )
