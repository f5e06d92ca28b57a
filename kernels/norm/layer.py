"""Layer norm without affine, alone or fused with the sum before it: N rows, C channels.

Each pass reads and writes memory once. A program holds whole rows, so statistics need no second
read. The gradient is made from the norm's output, which the product after it keeps anyway: the
input need not be kept. Inputs are fp16, bf16 or fp32; arithmetic is fp32. The gradient of a bias is
the sum of one part from each program, added in a fixed order.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.checks import check_dtype, check_eps, check_tensors, wide, wide_dtype

TILE = 4096  # elements per program; not yet measured on a GPU
MOST_CHANNELS = 4096  # a row must fit in a program
WARP = 1024  # elements of a warp's step in the backward pass; not yet measured on a GPU
BLOCKS = {1: 12, 2: 8, 4: 4}  # backward programs a multiprocessor by warps; not yet measured
# lanes may hold copies of a row's sum of products, and a fused product rounds in one of them alone
UNFUSED = {"enable_fp_fusion": False}


def _tiles(C: int) -> dict[str, int]:
    """Rows and padded channels of a program."""
    TILE_C = triton.next_power_of_2(C)
    return {"ROWS": max(1, TILE // TILE_C), "TILE_C": TILE_C}


def _backward_tiles(x: Tensor) -> tuple[int, dict[str, int]]:
    """Programs of the backward pass, and a step's tile.

    A row of up to 1024 channels is one warp's, whose sums need no barrier.
    """
    N, C = x.shape
    TILE_C = triton.next_power_of_2(C)
    warps = triton.cdiv(TILE_C, WARP)
    tile = TILE if backend.target(x) == "interpreter" else WARP
    ROWS = max(1, tile // TILE_C)
    programs = min(triton.cdiv(N, ROWS), BLOCKS[warps] * backend.multiprocessors(x))
    return programs, {"ROWS": ROWS, "TILE_C": TILE_C, "num_warps": warps}


@triton.jit
def _centred(x, live, C: tl.constexpr):
    """Rows [ROWS, TILE_C] less their means; 0 where not live.

    A row of equal values becomes exactly 0. The mean of what the first mean leaves is subtracted
    too: of equal values it is the rounding of the first, the same few units in the last place
    everywhere, whose sum is exact. A quotient of div_rn fuses with no sum, on any GPU.
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
    """A program: the gradient dx of its share of the rows, and its part of the bias's gradient.

    The bias is added before the norm alone, so its gradient has no share of dsum.
    """
    program = tl.program_id(0).to(tl.int64)
    end = N * (program + 1) // tl.num_programs(0)
    c = tl.arange(0, TILE_C)
    dbias = tl.zeros([ROWS, TILE_C], tl.float32)
    for first in range(N * program // tl.num_programs(0), end, ROWS):
        n = first + tl.arange(0, ROWS)
        live = (n < end)[:, None] & (c < C)[None, :]  # [ROWS, TILE_C]
        at = n[:, None] * C + c[None, :]
        rstd = tl.load(rstd_ptr + n, mask=n < end, other=0.0)  # [ROWS]
        y = tl.load(y_ptr + at, mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        mean = tl.sum(dy, 1) * (1.0 / C)  # [ROWS]
        along = tl.sum(dy * y, 1) * (1.0 / C)
        dx = (dy - mean[:, None] - y * along[:, None]) * rstd[:, None]
        if BIAS:
            dbias += dx
        if ADD:
            dx += tl.load(dsum_ptr + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
    if BIAS:
        tl.store(partial_ptr + program * C + c, tl.sum(dbias, 0), mask=c < C)


def _empty_rstd(x: Tensor) -> Tensor:
    """Space for a number per row, [N] fp32 (fp64 for fp64)."""
    return x.new_empty(x.shape[0], dtype=wide_dtype(x))


def _forward(
    x: Tensor, h: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The sum x + h (None without h), its norm and the reciprocal deviation of each row."""
    N, C = x.shape
    if backend.is_torch(x):
        total = None if h is None else (wide(x) + wide(h)).to(x.dtype)
        rows = wide(x if h is None else total)
        if bias is not None:
            rows = rows + wide(bias)
        y, _, rstd = torch.native_layer_norm(rows, [C], None, None, eps)
        return total, y.to(x.dtype), rstd.view(N)
    total = None if h is None else torch.empty_like(x)
    y = torch.empty_like(x)
    rstd = _empty_rstd(x)
    tiles = _tiles(C)
    grid = (triton.cdiv(N, tiles["ROWS"]),)
    args = (x, h, bias, total, y, rstd, N, eps)
    flags = dict(ADD=h is not None, BIAS=bias is not None)
    backend.launch(_layer_norm_fwd, grid, *args, C=C, **flags, **tiles, num_warps=4, **UNFUSED)
    return total, y, rstd


@torch.library.custom_op("trislat::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(x, None, bias, eps)[1:]


@torch.library.custom_op("trislat::add_layer_norm", mutates_args=())
def _add_layer_norm(x: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, h, None, eps)


def _backward_torch(
    y: Tensor, rstd: Tensor, dy: Tensor, dsum: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The norm's gradient at y is that at x but for the factor rstd, because y is its own norm."""
    N, C = y.shape
    rstd = rstd.view(N, 1)
    mean_of_y = torch.zeros_like(rstd)
    rstd_of_y = torch.ones_like(rstd)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        wide(dy), wide(y), [C], mean_of_y, rstd_of_y, None, None, [True, False, False]
    )
    dx.mul_(rstd)
    dbias = y.new_empty(0) if bias is None else dx.sum(0).to(bias.dtype)
    if dsum is not None:
        dx.add_(dsum)
    return dx.to(y.dtype), dbias


@torch.library.custom_op("trislat::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    y: Tensor, rstd: Tensor, dy: Tensor, dsum: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of x, `dsum` added to it, and that of the bias (empty without one)."""
    if backend.is_torch(y):
        return _backward_torch(y, rstd, dy, dsum, bias)
    N, C = y.shape
    dx = torch.empty_like(y)
    programs, tiles = _backward_tiles(y)
    partial = y.new_empty(0 if bias is None else programs, C, dtype=torch.float32)
    args = (y, rstd, dy, dsum, dx, partial, N)
    flags = dict(ADD=dsum is not None, BIAS=bias is not None)
    backend.launch(_layer_norm_bwd, (programs,), *args, C=C, **flags, **tiles, **UNFUSED)
    return dx, y.new_empty(0) if bias is None else partial.sum(0).to(bias.dtype)


@_layer_norm.register_fake
def _(x, bias, eps):
    return torch.empty_like(x), _empty_rstd(x)


@_add_layer_norm.register_fake
def _(x, h, eps):
    return torch.empty_like(x), torch.empty_like(x), _empty_rstd(x)


@_layer_norm_backward.register_fake
def _(y, rstd, dy, dsum, bias):
    return torch.empty_like(y), y.new_empty(0) if bias is None else torch.empty_like(bias)


def _save_layer_norm(ctx, inputs, output):
    ctx.save_for_backward(*output, inputs[1])


def _grad_layer_norm(ctx, dy, _):
    y, rstd, bias = ctx.saved_tensors
    dx, dbias = torch.ops.trislat.layer_norm_backward(y, rstd, dy.contiguous(), None, bias)
    return dx, None if bias is None else dbias, None


def _save_add_layer_norm(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[1].dtype


def _grad_add_layer_norm(ctx, dsum, dy, _):
    y, rstd = ctx.saved_tensors
    dx, _ = torch.ops.trislat.layer_norm_backward(y, rstd, dy.contiguous(), dsum.contiguous(), None)
    return dx, dx.to(ctx.dtype), None


_layer_norm.register_autograd(_grad_layer_norm, setup_context=_save_layer_norm)
_add_layer_norm.register_autograd(_grad_add_layer_norm, setup_context=_save_add_layer_norm)


def _check(x: Tensor, eps: float) -> None:
    check_tensors(x=x)
    if x.ndim != 2:
        raise ValueError(f"x must be [N, C], got {list(x.shape)}")
    check_dtype(x)
    if not 1 <= x.shape[-1] <= MOST_CHANNELS:
        raise ValueError(
            f"{x.shape[-1]} channels: at least 1 and at most {MOST_CHANNELS} fit in a program"
        )
    check_eps(eps)


def layer_norm(
    x: Tensor,  # [N, C] fp16, bf16 or fp32
    eps: float = 1e-6,
    bias: Tensor | None = None,  # [C] fp16, bf16 or fp32
) -> Tensor:  # [N, C], as x
    """Layer norm of each row of x + bias, without affine, computed in fp32.

    The bias's gradient is summed in a fixed order. Raises ValueError for another rank, shape or
    dtype, more than 4096 channels and an eps that is negative or not finite; TypeError for what is
    no tensor.
    """
    _check(x, eps)
    if bias is not None:
        check_tensors(bias=bias)
        check_dtype(bias)
        if bias.shape != x.shape[1:]:
            raise ValueError(
                f"bias {list(bias.shape)} must be [C] with the channels of x {list(x.shape)}"
            )
        bias = bias.contiguous()
    return torch.ops.trislat.layer_norm(x.contiguous(), bias, eps)[0]


def add_layer_norm(
    x: Tensor,  # [N, C] fp16, bf16 or fp32: the residual stream
    h: Tensor,  # [N, C]: what a branch adds to it
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # both [N, C], as x
    """The sum x + h and its layer norm, in one pass.

    The sum is rounded to x's dtype; the norm is that of the rounded sum. Errors as layer_norm.
    """
    _check(x, eps)
    check_tensors(h=h)
    check_dtype(h)
    if h.shape != x.shape:
        raise ValueError(f"x {list(x.shape)} and h {list(h.shape)} must have the same shape")
    total, y, _ = torch.ops.trislat.add_layer_norm(x.contiguous(), h.contiguous(), eps)
    return total, y


def layer_norm_reference(x: Tensor, eps: float = 1e-6, bias: Tensor | None = None) -> Tensor:
    """Layer norm from the mean and the variance of each row."""
    x = x if bias is None else x + bias
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def add_layer_norm_reference(x: Tensor, h: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The sum, then its layer norm."""
    return x + h, layer_norm_reference(x + h, eps)
