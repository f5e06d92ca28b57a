"""GELU in its tanh form, fused with the bias before it.

One pass over memory forward and one backward; arithmetic in fp32.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.checks import check_dtype, wide

TILE = 2048  # elements of a program's step; not yet measured on a GPU
TILE_CHANNELS = 1024  # at most, of a step with a bias; not yet measured on a GPU
BLOCKS = 4  # programs a multiprocessor with a bias; not yet measured on a GPU


@triton.jit
def _gelu_parts(x):
    """s, ds/dv and dv/dx of gelu(x) = x s.

    Here s = sigmoid(v) and v = 2 sqrt(2 / pi) (x + 0.044715 x^3).
    """
    v = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
    e = tl.exp(-tl.abs(v))  # never overflows
    s = tl.where(v >= 0, 1.0, e) / (1.0 + e)
    ds = e / ((1.0 + e) * (1.0 + e))
    dv = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return s, ds, dv


@triton.jit
def _share(M, C, TILE_C: tl.constexpr):
    """Return a program's rows first : end and its channels, of the chunks of all channels.

    The rows are shared out evenly, once: every program runs from the launch to its end.
    """
    chunks = tl.cdiv(C, TILE_C)
    program = (tl.program_id(0) // chunks).to(tl.int64)
    programs = tl.num_programs(0) // chunks
    rows = M.to(tl.int64)
    c = (tl.program_id(0) % chunks).to(tl.int64) * TILE_C + tl.arange(0, TILE_C)
    return rows * program // programs, rows * (program + 1) // programs, c


@triton.jit(do_not_specialize=["M"])
def _gelu_fwd(
    x_ptr, bias_ptr, y_ptr, M, C, BIAS: tl.constexpr, ROWS: tl.constexpr, TILE_C: tl.constexpr
):
    """A program: its share of the rows of TILE_C channels."""
    first, end, c = _share(M, C, TILE_C)
    bias = tl.zeros([TILE_C], tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    for row in range(first, end, ROWS):
        m = row + tl.arange(0, ROWS)
        at = m[:, None] * C + c[None, :]
        live = (m < end)[:, None] & (c < C)[None, :]  # [ROWS, TILE_C]
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) + bias[None, :]
        s, _, _ = _gelu_parts(x)
        tl.store(y_ptr + at, (x * s).to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M"])
def _gelu_bwd(
    x_ptr,
    bias_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    M,
    C,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """A program: its share, as in `_gelu_fwd`. partial [programs, C]: its sums of dx."""
    first, end, c = _share(M, C, TILE_C)
    bias = tl.zeros([TILE_C], tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, TILE_C], tl.float32)  # each lane's own: added up at the end
    for row in range(first, end, ROWS):
        m = row + tl.arange(0, ROWS)
        at = m[:, None] * C + c[None, :]
        live = (m < end)[:, None] & (c < C)[None, :]  # [ROWS, TILE_C]
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        s, ds, dv = _gelu_parts(x)
        dx = dy * (s + x * ds * dv)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
        dbias += dx
    if BIAS:
        program = (tl.program_id(0) // tl.cdiv(C, TILE_C)).to(tl.int64)
        tl.store(partial_ptr + program * C + c, tl.sum(dbias, 0), mask=c < C)


def _tiles(x: Tensor, bias: Tensor | None) -> tuple[int, int, dict[str, int], int, int]:
    """Return M rows of C channels, a step's tile of them, chunks of channels, programs of each.

    Without a bias x is one row, and a program takes one step.
    """
    tile = 8 * TILE if backend.target(x) == "interpreter" else TILE
    if bias is None:
        return 1, x.numel(), {"ROWS": 1, "TILE_C": tile}, triton.cdiv(x.numel(), tile), 1
    C = x.shape[-1]
    M = x.numel() // C
    TILE_C = min(TILE_CHANNELS, triton.next_power_of_2(C))
    ROWS = tile // TILE_C
    chunks = triton.cdiv(C, TILE_C)
    programs = max(1, BLOCKS * backend.multiprocessors(x) // chunks)
    return M, C, {"ROWS": ROWS, "TILE_C": TILE_C}, chunks, min(programs, triton.cdiv(M, ROWS))


def _gelu_torch(x: Tensor) -> Tensor:
    """x s, as in `_gelu_parts`: F.gelu takes almost twice as long, for its tanh."""
    slope = 1.5957691216057308
    v = (x * x).mul_(slope * 0.044715).add_(slope).mul_(x)
    return v.sigmoid_().mul_(x)


@torch.library.custom_op("trislat::gelu", mutates_args=())
def _gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    if backend.is_torch(x):
        u = wide(x) if bias is None else wide(x) + wide(bias)
        return _gelu_torch(u).to(x.dtype)
    y = torch.empty_like(x)
    M, C, tiles, chunks, programs = _tiles(x, bias)
    args = (x, bias, y, M, C)
    constants = dict(BIAS=bias is not None, **tiles, num_warps=8)
    backend.launch(_gelu_fwd, (programs * chunks,), *args, **constants)
    return y


@torch.library.custom_op("trislat::gelu_backward", mutates_args=())
def _gelu_backward(x: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and that of the bias (empty without one)."""
    if backend.is_torch(x):
        if bias is None:
            return torch.ops.aten.gelu_backward(dy, x, approximate="tanh"), x.new_empty(0)
        dx = torch.ops.aten.gelu_backward(wide(dy), wide(x) + wide(bias), approximate="tanh")
        return dx.to(x.dtype), dx.view(-1, dx.shape[-1]).sum(0).to(bias.dtype)
    dx = torch.empty_like(x)
    M, C, tiles, chunks, programs = _tiles(x, bias)
    partial = x.new_empty(0 if bias is None else programs, C, dtype=torch.float32)
    args = (x, bias, dy, dx, partial, M, C)
    constants = dict(BIAS=bias is not None, **tiles, num_warps=8)
    backend.launch(_gelu_bwd, (programs * chunks,), *args, **constants)
    return dx, x.new_empty(0) if bias is None else partial.sum(0).to(bias.dtype)


@_gelu.register_fake
def _(x, bias):
    return torch.empty_like(x)


@_gelu_backward.register_fake
def _(x, bias, dy):
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grad_gelu(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.trislat.gelu_backward(x, bias, dy.contiguous())
    return dx, None if bias is None else dbias


_gelu.register_autograd(_grad_gelu, setup_context=_save_inputs)


def gelu(
    x: Tensor,  # any shape; with a bias [..., C]; fp16, bf16 or fp32
    bias: Tensor | None = None,  # [C], fp16, bf16 or fp32
) -> Tensor:  # as x
    """0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))), u = x + bias, computed in fp32.

    The bias is that of the linear layer before: added here, its gradient is summed in the pass that
    makes x's, in a fixed order, where a linear layer of its own reads [..., C] once more. Raises
    ValueError for another dtype or shape.
    """
    check_dtype(x)
    if bias is not None:
        check_dtype(bias)
        if bias.ndim != 1 or x.ndim < 1 or bias.shape != x.shape[-1:] or not len(bias):
            raise ValueError(
                f"bias {list(bias.shape)} must be [C] with the C >= 1 channels of x {list(x.shape)}"
            )
        bias = bias.contiguous()
    return torch.ops.trislat.gelu(x.contiguous(), bias)


def gelu_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula of `gelu`."""
    x = x if bias is None else x + bias
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
