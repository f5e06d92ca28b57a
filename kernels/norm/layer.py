"""The norms of a transformer block, each one pass over memory: N rows, C channels, H heads, D head
channels.

Layer norm without affine, fused with the residual sum or the bias before it, and RMS norm over
heads. Inputs are fp16, bf16 or fp32; arithmetic is fp32. A program holds whole rows, so statistics
need no second read; gradients of shared parameters are per-program partial sums, added in a fixed
order. The gradient of a layer norm is made from its output, which the product after it keeps
anyway: the residual stream need not be kept, and products may add to it in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.checks import check_eps, check_tensors

TILE = 4096  # elements per program; not yet measured on a GPU
MOST_CHANNELS = 4096  # a row must fit in a program
PROGRAMS = 512  # that share the gradient of a bias; not yet measured on a GPU
PARTIALS = 128  # programs per head that share the gradient of gamma; not yet measured on a GPU
TINY = 1e-12  # the smallest norm that F.normalize divides by


def _tiles(C: int) -> dict[str, int]:
    """Rows and padded channels of a program."""
    TILE_C = triton.next_power_of_2(C)
    return {"ROWS": max(1, TILE // TILE_C), "TILE_C": TILE_C}


@triton.jit
def _centred(x, live, C: tl.constexpr):
    """Rows [ROWS, TILE_C] less their means, exactly 0 for a row of equal values; 0 where not live.

    The mean of what a first mean leaves is subtracted too: of equal values that is the rounding of
    the first, the same few units in the last place everywhere, whose sum is exact. A quotient of
    div_rn fuses with no sum, on any GPU.
    """
    x = tl.where(live, x - tl.div_rn(tl.sum(x, 1), C * 1.0)[:, None], 0.0)
    return tl.where(live, x - tl.div_rn(tl.sum(x, 1), C * 1.0)[:, None], 0.0)


@triton.jit(do_not_specialize=["N"])
def _layer_norm_fwd(
    x_ptr,
    h_ptr,
    bias_ptr,
    sum_ptr,
    y_ptr,
    rstd_ptr,
    N,
    eps,
    C: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, TILE_C)
    live = (n < N)[:, None] & (c < C)[None, :]  # [ROWS, TILE_C]
    at = n[:, None] * C + c[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if ADD:  # the norm is that of the sum as it is stored, rounded
        x += tl.load(h_ptr + at, mask=live, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=live)
        x = rounded.to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    centred = _centred(x, live, C)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) * (1.0 / C) + eps)  # [ROWS]
    tl.store(y_ptr + at, (centred * rstd[:, None]).to(y_ptr.dtype.element_ty), mask=live)
    tl.store(rstd_ptr + n, rstd, mask=n < N)


@triton.jit(do_not_specialize=["N"])
def _layer_norm_bwd(
    y_ptr,
    rstd_ptr,
    dy_ptr,
    dsum_ptr,
    dx_ptr,
    partial_ptr,
    N,
    C: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """The bias is added before the norm alone: its gradient is the sum over the rows of what the
    norm passes on, without dsum.
    """
    c = tl.arange(0, TILE_C)
    dbias = tl.zeros([ROWS, TILE_C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        n = tile * ROWS + tl.arange(0, ROWS)
        n = n.to(tl.int64)
        live = (n < N)[:, None] & (c < C)[None, :]  # [ROWS, TILE_C]
        at = n[:, None] * C + c[None, :]
        rstd = tl.load(rstd_ptr + n, mask=n < N, other=0.0)  # [ROWS]
        y = tl.load(y_ptr + at, mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        # [ROWS]
        mean = tl.sum(dy, 1) * (1.0 / C)
        along = tl.sum(dy * y, 1) * (1.0 / C)
        dx = (dy - mean[:, None] - y * along[:, None]) * rstd[:, None]
        if BIAS:
            dbias += dx
        if ADD:
            dx += tl.load(dsum_ptr + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
    if BIAS:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(dbias, 0), mask=c < C)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_fwd(
    x_ptr,
    gamma_ptr,
    y_ptr,
    M,
    root,
    tiny,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_D: tl.constexpr,
):
    # row m is head m % H of voxel m // H
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, TILE_D)
    live = (m < M)[:, None] & (d < D)[None, :]  # [ROWS, TILE_D]
    at = m[:, None] * D + d[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + (m % H)[:, None] * D + d[None, :], mask=live, other=0.0).to(
        tl.float32
    )
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), tiny)  # [ROWS]
    tl.store(
        y_ptr + at, (x * inverse[:, None] * gamma * root).to(y_ptr.dtype.element_ty), mask=live
    )


@triton.jit(do_not_specialize=["N"])
def _rms_norm_bwd(
    x_ptr,
    gamma_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    N,
    root,
    tiny,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_D: tl.constexpr,
):
    h = tl.program_id(1)
    d = tl.arange(0, TILE_D)
    gamma = tl.load(gamma_ptr + h * D + d, mask=d < D, other=0.0).to(tl.float32)  # [TILE_D]
    dgamma = tl.zeros([TILE_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        n = tile * ROWS + tl.arange(0, ROWS)
        live = (n < N)[:, None] & (d < D)[None, :]  # [ROWS, TILE_D]
        at = (n.to(tl.int64)[:, None] * H + h) * D + d[None, :]
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(x * x, 1))  # [ROWS]
        inverse = 1.0 / tl.maximum(length, tiny)
        y = x * inverse[:, None]
        dgamma += tl.sum(dy * y, 0) * root
        g = dy * gamma[None, :] * root
        # below it the divisor is a constant
        along = tl.where(length >= tiny, tl.sum(g * y, 1), 0.0)
        tl.store(
            dx_ptr + at,
            ((g - y * along[:, None]) * inverse[:, None]).to(dx_ptr.dtype.element_ty),
            mask=live,
        )
    tl.store(partial_ptr + (tl.program_id(0) * H + h) * D + d, dgamma, mask=d < D)


def wide(x: Tensor) -> Tensor:
    """Sixteen bits to fp32; fp32 and fp64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _deviations(x: Tensor) -> Tensor:
    """For a number per row: [N] fp32, fp64 for fp64."""
    return x.new_empty(
        x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    )


def _forward(
    x: Tensor, h: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Sum (None without h), norm and reciprocal deviation of each row."""
    N, C = x.shape
    if backend.is_torch(x):
        total = None if h is None else (wide(x) + wide(h)).to(x.dtype)
        rows = wide(x if h is None else total)
        y, _, rstd = torch.native_layer_norm(
            rows if bias is None else rows + wide(bias), [C], None, None, eps
        )
        return total, y.to(x.dtype), rstd.view(N)
    total = None if h is None else torch.empty_like(x)
    y = torch.empty_like(x)
    rstd = _deviations(x)
    tiles = _tiles(C)
    args = (x, h, bias, total, y, rstd, N, eps)
    constants = dict(C=C, ADD=h is not None, BIAS=bias is not None, **tiles, num_warps=4)
    backend.launch(_layer_norm_fwd, (triton.cdiv(N, tiles["ROWS"]),), *args, **constants)
    return total, y, rstd


@torch.library.custom_op("trislat::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(x, None, bias, eps)[1:]


@torch.library.custom_op("trislat::add_layer_norm", mutates_args=())
def _add_layer_norm(x: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, h, None, eps)


@torch.library.custom_op("trislat::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    y: Tensor, rstd: Tensor, dy: Tensor, dsum: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of x, `dsum` added to it, and that of the bias (empty without one)."""
    N, C = y.shape
    if backend.is_torch(y):
        still = (torch.zeros_like(rstd).view(N, 1), torch.ones_like(rstd).view(N, 1))
        keep = [True, False, False]
        # y is its own norm
        dx = torch.ops.aten.native_layer_norm_backward(
            wide(dy), wide(y), [C], *still, None, None, keep
        )[0]
        dx.mul_(rstd.view(N, 1))
        dbias = y.new_empty(0) if bias is None else dx.sum(0).to(bias.dtype)
        return (dx if dsum is None else dx.add_(dsum)).to(y.dtype), dbias
    dx = torch.empty_like(y)
    tiles = _tiles(C)
    programs = triton.cdiv(N, tiles["ROWS"])
    programs = programs if bias is None else min(programs, PROGRAMS)
    partial = y.new_empty(0 if bias is None else programs, C, dtype=torch.float32)
    constants = dict(
        C=C,
        ADD=dsum is not None,
        BIAS=bias is not None,
        **tiles,
        num_warps=4 if bias is None else 8,
    )
    backend.launch(_layer_norm_bwd, (programs,), y, rstd, dy, dsum, dx, partial, N, **constants)
    return dx, y.new_empty(0) if bias is None else partial.sum(0).to(bias.dtype)


@torch.library.custom_op("trislat::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    N, H, D = x.shape
    if backend.is_torch(x):
        return (F.normalize(wide(x), dim=-1, eps=TINY) * wide(gamma) * D**0.5).to(x.dtype)
    y, TILE_D = torch.empty_like(x), triton.next_power_of_2(D)
    ROWS = max(1, TILE // TILE_D)
    args = (x, gamma, y, N * H, D**0.5, TINY)
    backend.launch(
        _rms_norm_fwd,
        (triton.cdiv(N * H, ROWS),),
        *args,
        H=H,
        D=D,
        ROWS=ROWS,
        TILE_D=TILE_D,
        num_warps=4,
    )
    return y


@torch.library.custom_op("trislat::rms_norm_backward", mutates_args=())
def _rms_norm_backward(x: Tensor, gamma: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    N, H, D = x.shape
    if backend.is_torch(x):
        rows, up = wide(x), wide(dy)
        length = rows.norm(dim=-1, keepdim=True)
        norm = length.clamp_min(TINY)
        y = rows / norm
        g = up * wide(gamma) * D**0.5
        along = torch.where(length >= TINY, (g * y).sum(-1, keepdim=True), 0)
        return ((g - y * along) / norm).to(x.dtype), ((up * y).sum(0) * D**0.5).to(gamma.dtype)
    TILE_D = triton.next_power_of_2(D)
    ROWS = max(1, TILE // TILE_D)
    programs = min(PARTIALS, triton.cdiv(N, ROWS))
    dx = torch.empty_like(x)
    partial = x.new_empty(programs, H, D, dtype=torch.float32)
    args = (x, gamma, dy, dx, partial, N, D**0.5, TINY)
    backend.launch(
        _rms_norm_bwd, (programs, H), *args, H=H, D=D, ROWS=ROWS, TILE_D=TILE_D, num_warps=4
    )
    return dx, partial.sum(0).to(gamma.dtype)


_layer_norm.register_fake(lambda x, bias, eps: (torch.empty_like(x), _deviations(x)))
_add_layer_norm.register_fake(
    lambda x, h, eps: (torch.empty_like(x), torch.empty_like(x), _deviations(x))
)
_layer_norm_backward.register_fake(
    lambda y, rstd, dy, dsum, bias: (
        torch.empty_like(y),
        y.new_empty(0) if bias is None else torch.empty_like(bias),
    )
)
_rms_norm.register_fake(lambda x, gamma: torch.empty_like(x))
_rms_norm_backward.register_fake(
    lambda x, gamma, dy: (torch.empty_like(x), torch.empty_like(gamma))
)


def _save_layer_norm(ctx, inputs, output):
    ctx.save_for_backward(*output, inputs[1])


def _save_add_layer_norm(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[1].dtype


def _grad_layer_norm(ctx, dy, _):
    y, rstd, bias = ctx.saved_tensors
    dx, dbias = torch.ops.trislat.layer_norm_backward(y, rstd, dy.contiguous(), None, bias)
    return dx, None if bias is None else dbias, None


def _grad_add_layer_norm(ctx, dsum, dy, *_):
    dx, _ = torch.ops.trislat.layer_norm_backward(
        *ctx.saved_tensors, dy.contiguous(), dsum.contiguous(), None
    )
    return dx, dx.to(ctx.dtype), None


class _StreamNorm(torch.autograd.Function):
    """x goes through, so that its gradient and the norm's arrive together, and are summed in the
    pass of the norm's.
    """

    @staticmethod
    def forward(ctx, x, bias, eps):
        y, rstd = torch.ops.trislat.layer_norm(x, bias, eps)
        ctx.mark_dirty(x)  # not changed here, but by whom it is handed to
        ctx.save_for_backward(y, rstd, bias)
        return x, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dx, dy):
        y, rstd, bias = ctx.saved_tensors
        dx, dbias = torch.ops.trislat.layer_norm_backward(
            y, rstd, dy.contiguous(), dx.contiguous(), bias
        )
        return dx, None if bias is None else dbias, None


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_layer_norm.register_autograd(_grad_layer_norm, setup_context=_save_layer_norm)
_add_layer_norm.register_autograd(_grad_add_layer_norm, setup_context=_save_add_layer_norm)
_rms_norm.register_autograd(
    lambda ctx, dy: torch.ops.trislat.rms_norm_backward(*ctx.saved_tensors, dy.contiguous()),
    setup_context=_save_inputs,
)


def _check(x: Tensor, rank: int, shape: str) -> None:
    check_tensors(x=x)
    if x.ndim != rank:
        raise ValueError(f"x must be {shape}, got {list(x.shape)}")
    check_dtype(x)
    if not 1 <= x.shape[-1] <= MOST_CHANNELS:
        raise ValueError(
            f"{x.shape[-1]} channels: at least 1 and at most {MOST_CHANNELS} fit in a program"
        )


def check_dtype(x: Tensor) -> None:
    kernels = (torch.float16, torch.bfloat16, torch.float32)
    if x.dtype not in kernels and not (x.dtype == torch.float64 and backend.is_torch(x)):
        raise ValueError(
            f"x must be fp16, bf16 or fp32 (fp64: on the torch path), got {x.dtype} on "
            f"{backend.name(x)}"
        )


def _check_bias(bias: Tensor | None, x: Tensor) -> Tensor | None:
    if bias is None:
        return None
    check_tensors(bias=bias)
    check_dtype(bias)
    if bias.shape != x.shape[1:]:
        raise ValueError(
            f"bias {list(bias.shape)} must be [C] with the channels of x {list(x.shape)}"
        )
    return bias.contiguous()


def layer_norm(
    x: Tensor,  # [N, C] fp16, bf16 or fp32
    eps: float = 1e-6,
    bias: Tensor | None = None,  # [C] fp16, bf16 or fp32
) -> Tensor:  # [N, C], as x
    """Layer norm of each row of x + bias, without affine, computed in fp32. The bias's gradient is
    summed in a fixed order.

    Raises ValueError for another rank, shape or dtype, more than 4096 channels and an eps that is
    negative or not finite; TypeError for what is no tensor.
    """
    _check(x, 2, "[N, C]")
    check_eps(eps)
    return torch.ops.trislat.layer_norm(x.contiguous(), _check_bias(bias, x), eps)[0]


def alterable(x: Tensor) -> bool:
    """Whether autograd lets x be added to in place; a compiler plans memory itself."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not (x._is_view() or (x.is_leaf and x.requires_grad))


def stream_norm(
    x: Tensor,  # [N, C] fp16, bf16 or fp32, contiguous: the residual stream
    eps: float = 1e-6,
    bias: Tensor | None = None,  # [C]: what was not added to the stream
) -> tuple[Tensor, Tensor]:  # both [N, C], as x
    """(x itself, layer_norm(x + bias)); what follows may add to x in place, for neither keeps it
    for a backward pass.

    The gradients of both are summed in one pass where x is `alterable`, in two otherwise. Errors as
    layer_norm, and ValueError for an x that is not contiguous.
    """
    _check(x, 2, "[N, C]")
    check_eps(eps)
    if not x.is_contiguous():
        raise ValueError(
            f"the stream is added to in place and must be contiguous: x {list(x.shape)} has "
            f"strides {x.stride()}"
        )
    if not alterable(x):  # nor may it be marked so; torch 2.11 cannot compile the mark
        return x, layer_norm(x, eps, bias)
    return _StreamNorm.apply(x, _check_bias(bias, x), eps)


def add_layer_norm(
    x: Tensor,  # [N, C] fp16, bf16 or fp32: the residual stream
    h: Tensor,  # [N, C]: what a branch adds to it
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # both [N, C], as x
    """(x + h, layer_norm(x + h)): the sum in x's dtype, and the norm of the sum as stored. Errors
    as layer_norm.
    """
    _check(x, 2, "[N, C]")
    check_eps(eps)
    check_tensors(h=h)
    check_dtype(h)
    if h.shape != x.shape:
        raise ValueError(f"x {list(x.shape)} and h {list(h.shape)} must have the same shape")
    total, y, _ = torch.ops.trislat.add_layer_norm(x.contiguous(), h.contiguous(), eps)
    return total, y


def rms_norm(
    x: Tensor,  # [N, H, D] fp16, bf16 or fp32
    gamma: Tensor,  # [H, D]
) -> Tensor:  # [N, H, D], as x
    """F.normalize(x, dim=-1) * gamma * sqrt(D) of every head, in fp32. The gradient of gamma is
    summed in a fixed order.

    Raises ValueError for another rank or dtype, a gamma of another shape and more than 4096
    channels a head.
    """
    _check(x, 3, "[N, H, D]")
    if gamma.shape != x.shape[1:]:
        raise ValueError(
            f"gamma {list(gamma.shape)} must be {list(x.shape[1:])}, the heads and channels of x"
        )
    return torch.ops.trislat.rms_norm(x.contiguous(), gamma.contiguous())


def layer_norm_reference(x: Tensor, eps: float = 1e-6, bias: Tensor | None = None) -> Tensor:
    """Mean and variance, spelt out."""
    x = x if bias is None else x + bias
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def add_layer_norm_reference(x: Tensor, h: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    return x + h, layer_norm_reference(x + h, eps)


def rms_norm_reference(x: Tensor, gamma: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt() * gamma * x.shape[-1] ** 0.5
