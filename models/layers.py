"""The sparse transformer shared by the encoder and the decoders: N voxels, C channels, H heads.

Parameter names are those of the published models (microsoft/TRELLIS), so their checkpoints load
unchanged. A block is x + attention(norm(x)), then x + mlp(norm(x)). The last products of attention
and MLP add to the residual stream in place. They have no room for a bias beside it, so the stream
goes without biases: their sum, a vector, is handed on, and every norm adds it to what it reads.
Parameters stay fp32; the trunk computes in `activation_dtype`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import (
    CURVES,
    SpatialCache,
    Windows,
    full_windows,
    gelu,
    serialized_windows,
    stream_norm,
    window_attention,
    window_partition,
)
from kernels.checks import check_whole
from kernels.norm.layer import alterable
from models.graphs import Graphs

BLOCK_EPS = 1e-6  # of the norms inside a block; the norm before an output layer has 1e-5
CURVE_SHIFT = 16  # voxels by which "shift_window" moves every other block's curve
ATTENTION_MODES = ("full", "swin", "shift_window", "shift_sequence", "shift_order")
POSITION_MODES = ("ape", "rope")


def position_embedding(cache: SpatialCache, channels: int) -> Tensor:  # [N, C] fp32
    """Absolute sine embedding of raw voxel coordinates: per axis [sin | cos], axes x, y, z, zeros
    at the end to C.
    """
    frequencies = channels // 3 // 2
    k = torch.arange(frequencies, dtype=torch.float32, device=cache.coords.device)
    phases = cache.coords[:, 1:, None].float() * (1.0 / 10000 ** (k / frequencies))
    embedding = torch.cat([phases.sin(), phases.cos()], dim=-1).flatten(1)
    return F.pad(embedding, (0, channels - embedding.shape[1]))


def rotary_phases(cache: SpatialCache, channels: int) -> Tensor:  # [N, C / 2] complex64
    """Rotations of the C channels of a head by raw voxel coordinates, axes x, y, z; channels that
    are left over stay.
    """
    frequencies = channels // 3 // 2
    k = torch.arange(frequencies, dtype=torch.float32, device=cache.coords.device)
    angles = (cache.coords[:, 1:, None].float() * (1.0 / 10000 ** (k / frequencies))).flatten(1)
    angles = F.pad(angles, (0, channels // 2 - angles.shape[1]))
    return torch.polar(torch.ones_like(angles), angles)


def shifted_windows(cache: SpatialCache, window: int, shift: int) -> Windows:
    """Cubic windows of `window` voxels a side, moved by `shift` along every axis."""
    return window_partition(cache, cache.batch_size, window, shift)


def whole_samples(cache: SpatialCache) -> Windows:
    return full_windows(cache)


def curve_windows(
    cache: SpatialCache, window: int, curve: str, shift_sequence: int, shift_window: int
) -> Windows:
    """Overlapping runs of `window` voxels along a space-filling curve."""
    return serialized_windows(cache, cache.batch_size, window, curve, shift_sequence, shift_window)


def block_windows(attn_mode: str, window_size: int, i: int) -> tuple:
    """How block i gets its windows from a SpatialCache: a function and its arguments after the
    cache.
    """
    odd = i % 2
    if attn_mode == "full":
        return (whole_samples,)
    if attn_mode == "swin":
        return shifted_windows, window_size, window_size // 2 * odd
    if attn_mode == "shift_window":
        return curve_windows, window_size, CURVES[0], 0, CURVE_SHIFT * odd
    if attn_mode == "shift_sequence":
        return curve_windows, window_size, CURVES[0], window_size // 2 * odd, 0
    return curve_windows, window_size, CURVES[i % len(CURVES)], 0, 0  # shift_order


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with weights rounded to x's dtype."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        # few CPUs multiply 16-bit matrices: the same operands, summed in fp32 as a GPU does, many
        # times faster
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(
            x.dtype
        )
    return F.linear(x, weight, bias)


def add_product(stream: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """stream [N, C] + x weight^T, rounded once; in the stream's memory if that is `alterable`, and
    not for 16 bits on a CPU.

    Under torch.autocast the product is rounded first, and added to a new stream.
    """
    if torch.is_autocast_enabled(stream.device.type):
        return stream + linear(x, weight, None)
    weight = weight.to(stream.dtype).t()
    if stream.device.type == "cpu" and stream.dtype in (torch.float16, torch.bfloat16):
        return torch.addmm(stream.float(), x.float(), weight.float()).to(stream.dtype)
    return stream.addmm_(x, weight) if alterable(stream) else torch.addmm(stream, x, weight)


class Linear(nn.Linear):
    """A linear layer whose fp32 weights are rounded to its input's dtype at use."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class HeadRMSNorm(nn.Module):
    """The scale of an RMS norm over each head's channels; the norm itself is fused into the
    attention.
    """

    def __init__(self, heads: int, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, channels))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows of voxels, which `windows` (see `block_windows`)
    makes.
    """

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
        """What is derived from coordinates: the windows, and with use_rope the phases."""
        channels = self.to_out.in_features // self.heads
        return cache.get(*self.windows), cache.get(
            rotary_phases, channels
        ) if self.use_rope else None

    def forward(self, stream: Tensor, x: Tensor, cache: SpatialCache) -> Tensor:
        """Add attention of x [N, C] to the stream, but for the bias of to_out."""
        qkv = self.to_qkv(x).view(len(x), 3, self.heads, x.shape[1] // self.heads)
        gammas = (
            {"q_gamma": self.q_rms_norm.gamma, "k_gamma": self.k_rms_norm.gamma}
            if self.qk_rms_norm
            else {}
        )
        windows, phases = self.look_up(cache)
        out = window_attention(qkv, windows, **gammas, phases=phases)
        return add_product(stream, out.flatten(1), self.to_out.weight)


class MLP(nn.Module):
    """Two linear layers around a GELU, which adds the first one's bias."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        hidden = int(channels * ratio)
        # the published names
        self.mlp = nn.ModuleDict({"0": Linear(channels, hidden), "2": Linear(hidden, channels)})

    def forward(self, stream: Tensor, x: Tensor) -> Tensor:
        """Add the MLP of x [N, C] to the stream, but for the second layer's bias."""
        up, down = self.mlp.values()
        return add_product(stream, gelu(linear(x, up.weight, None), up.bias), down.weight)


class Block(nn.Module):
    """Pre-norm transformer block on a residual stream x [N, C], which it adds to in place: a hook
    that keeps it sees it change.

    Of attn.to_out and mlp.mlp["2"] it takes the weights and biases and does not call them, so their
    own hooks do not run.
    """

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

    def forward(self, x: Tensor, bias: Tensor | None, cache: SpatialCache) -> tuple[Tensor, Tensor]:
        """Take the stream and the sum [C] of the biases that it lacks, None for no bias; return the
        same pair.
        """
        x, normed = stream_norm(x, BLOCK_EPS, bias)
        x = self.attn(x, normed, cache)
        own = self.attn.to_out.bias
        bias = own if bias is None else bias + own
        x, normed = stream_norm(x, BLOCK_EPS, bias)
        return self.mlp(x, normed), bias + self.mlp.mlp["2"].bias

    def on_a_copy(
        self, x: Tensor, bias: Tensor | None, cache: SpatialCache
    ) -> tuple[Tensor, Tensor]:
        """The same, and x stays as it is: what is computed again needs the input that it had."""
        return self(x.clone(), bias, cache)


class Trunk(nn.Module):
    """Input layer, position embedding and blocks: [N, in_channels] -> [N, C] in the input's dtype.

    `attn_mode`: "swin" alternates cubes of window_size voxels a side at shift 0 and window_size //
    2; "full" attends within the whole sample. The others attend to window_size voxels along a curve
    and alternate what is in them: "shift_window" moves the z-order curve by 16 voxels,
    "shift_sequence" the windows along it by half of one, "shift_order" takes z-order, transposed
    z-order, Hilbert and transposed Hilbert curves in turn. `pe_mode`: "ape" adds a sine embedding
    to the features, "rope" rotates each head's queries and keys instead (where the published code
    rotates by phases of all heads' channels together, and fails). Raises ValueError for heads that
    do not divide the channels, window_size < 1 and unknown modes.
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
        self.num_heads = heads
        self.use_checkpoint = use_checkpoint
        self.attn_mode = attn_mode
        self.pe_mode = pe_mode
        self.graphs: Graphs | None = None
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
        """Xavier weights and zero biases in every linear layer, a zero output layer (the published
        initialisation).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.out_layer.weight)

    def set_activation_dtype(self, dtype: torch.dtype) -> None:
        """Compute the blocks in fp32, fp16 or bf16; weights, input and output layers stay fp32."""
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"activation dtype {dtype} is not one of float32, float16, bfloat16")
        self.activation_dtype = dtype

    def use_graphs(self, most: int) -> None:
        """Run the layers before the output layer as CUDA graphs where there are at most that many
        voxels; 0: nowhere.

        A pass must then be differentiated before the model runs again, hooks on what is inside run
        only while a size is recorded, and where modules inside are replaced, this is to be called
        again (see models.graphs). Raises ValueError for a model that is not on a GPU, for attention
        other than "swin" (whose windows alone have sizes that follow from the number of voxels) and
        below 0.
        """
        check_whole("graphs of at most so many voxels", most, 0)
        if most and (self.attn_mode != "swin" or self.resolution is None):
            raise ValueError(
                f"graphs need attn_mode swin and a resolution, not {self.attn_mode!r} and "
                f"{self.resolution}"
            )
        self.graphs = Graphs(self, most) if most else None

    def compute_dtype(self, feats: Tensor) -> torch.dtype:
        """What the layers between input and output layer compute in: activation_dtype, or the
        features' own dtype for fp32.
        """
        return feats.dtype if self.activation_dtype == torch.float32 else self.activation_dtype

    def trunk(self, feats: Tensor, cache: SpatialCache) -> Tensor:
        """The features before the output layer's norm. Raises ValueError for features and voxels
        that are not the model's.
        """
        if feats.shape[1] != self.input_layer.in_features:
            raise ValueError(
                f"features have {feats.shape[1]} channels, the model takes "
                f"{self.input_layer.in_features}"
            )
        expected = self.input_layer.weight.dtype
        # which converts them itself
        if feats.dtype != expected and not torch.is_autocast_enabled(feats.device.type):
            raise ValueError(
                f"features are {feats.dtype}, the model takes {expected}: convert them with "
                f".to({expected})"
            )
        if self.resolution is not None and max(cache.extent) > self.resolution:
            raise ValueError(
                f"a voxel has the coordinate {max(cache.extent) - 1}, the model's resolution is "
                f"{self.resolution}: its voxels "
                f"have 0 to {self.resolution - 1}"
            )
        if self.graphs is not None and 0 < len(feats) <= self.graphs.most:
            return self.graphs(
                feats, cache, self.activation_dtype, self.use_checkpoint and self.training
            )
        return self.compute(feats, cache)

    def compute(self, feats: Tensor, cache: SpatialCache) -> Tensor:
        """`trunk` without its checks."""
        x = self.input_layer(feats)
        if self.pe_mode == "ape":
            x = x + cache.get(position_embedding, self.model_channels)
        x = x.to(self.compute_dtype(feats))
        bias = None
        recompute = self.use_checkpoint and self.training and torch.is_grad_enabled()
        # torch.compile allows no side effects, as a cache that fills, in what is computed again
        if recompute:
            for block in self.blocks:
                block.attn.look_up(cache)
        for block in self.blocks:
            if recompute:
                x, bias = checkpoint(
                    block.on_a_copy, x, bias, cache, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, bias = block(x, bias, cache)
        return (x + bias).to(feats.dtype)
