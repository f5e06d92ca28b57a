"""Pooling and unpooling of features between two scales.

N fine voxels, S coarse voxels that each hold some of them, C channels. Pooling averages the
children of a coarse voxel, unpooling hands every child its parent's row. Each one's gradient is the
other one's pass with other weights, so two kernels serve both directions: a sum over children,
walked in row order (no atomics: the same bits every time), and a look-up. The mean is the true one;
microsoft/TRELLIS divides by one child more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.checks import check_tensors, wide_dtype
from kernels.voxels.cache import SpatialCache

TILE = 2048  # elements per program; not yet measured on a GPU (both passes are memory-bound)
TILE_C = 256  # channels per program at most; not yet measured on a GPU


@dataclass(frozen=True, eq=False)
class Pooling:
    """The coarse row of each of N fine rows, and the fine rows of each of S coarse ones."""

    index: Tensor  # [N] int32: the coarse row of each fine one
    order: Tensor  # [N] int32: the fine rows, coarse row by coarse row, ascending within each
    starts: Tensor  # [S + 1] int32: coarse row s holds order[starts[s] : starts[s + 1]]

    def __len__(self) -> int:
        return len(self.starts) - 1


def pooling(cache: SpatialCache, factor: int) -> Pooling:
    """Group the rows as cache.pool(factor) does; `cache.get(pooling, factor)` makes it once.

    Raises ValueError where cache.pool does.
    """
    coarse, index = cache.pool(factor)
    grouped, order = index.sort(stable=True)
    rows = torch.arange(len(coarse) + 1, dtype=torch.int32, device=index.device)
    return Pooling(index, order.int(), torch.searchsorted(grouped, rows, out_int32=True))


def _tiles(C: int) -> dict[str, int]:
    channels = min(TILE_C, triton.next_power_of_2(C))
    return {"ROWS": TILE // channels, "TILE_C": channels}


@triton.jit(do_not_specialize=["S"])
def _pool_sum(
    x_ptr,
    order_ptr,
    starts_ptr,
    y_ptr,
    S,
    C,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    begin = tl.load(starts_ptr + s, mask=s < S, other=0)  # [ROWS]
    count = tl.load(starts_ptr + s + 1, mask=s < S, other=0) - begin
    total = tl.zeros([ROWS, TILE_C], tl.float32)
    for k in range(0, tl.max(count)):
        row = tl.load(order_ptr + begin + k, mask=k < count, other=0).to(tl.int64)
        live = (k < count)[:, None] & (c < C)[None, :]
        total += tl.load(x_ptr + row[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
    if MEAN:
        total = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    live = (s < S)[:, None] & (c < C)[None, :]
    tl.store(y_ptr + s[:, None] * C + c[None, :], total.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["N"])
def _pool_copy(
    x_ptr,
    index_ptr,
    starts_ptr,
    y_ptr,
    N,
    C,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    live = (n < N)[:, None] & (c < C)[None, :]  # [ROWS, TILE_C]
    s = tl.load(index_ptr + n, mask=n < N, other=0).to(tl.int64)  # [ROWS]
    value = tl.load(x_ptr + s[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
    if MEAN:
        begin = tl.load(starts_ptr + s, mask=n < N, other=0)
        count = tl.load(starts_ptr + s + 1, mask=n < N, other=1) - begin
        value = value / count.to(tl.float32)[:, None]
    tl.store(y_ptr + n[:, None] * C + c[None, :], value.to(y_ptr.dtype.element_ty), mask=live)


def _launch(kernel, x: Tensor, place: Tensor, starts: Tensor, rows: int, mean: bool) -> Tensor:
    y = x.new_empty(rows, x.shape[1])
    tiles = _tiles(x.shape[1])
    grid = triton.cdiv(rows, tiles["ROWS"]), triton.cdiv(x.shape[1], tiles["TILE_C"])
    backend.launch(
        kernel, grid, x, place, starts, y, rows, x.shape[1], MEAN=mean, **tiles, num_warps=4
    )
    return y


@torch.library.custom_op("trislat::pool_sum", mutates_args=())
def _sum_children(x: Tensor, index: Tensor, order: Tensor, starts: Tensor, mean: bool) -> Tensor:
    S = len(starts) - 1
    if not backend.is_torch(x):
        return _launch(_pool_sum, x, order, starts, S, mean)
    total = x.new_zeros(S, x.shape[1], dtype=wide_dtype(x))
    total.index_add_(0, index, x.to(wide_dtype(x)))
    if mean:
        total = total / starts.diff().clamp_min(1)[:, None]
    return total.to(x.dtype)


@torch.library.custom_op("trislat::pool_copy", mutates_args=())
def _copy_parents(x: Tensor, index: Tensor, order: Tensor, starts: Tensor, mean: bool) -> Tensor:
    if not backend.is_torch(x):
        return _launch(_pool_copy, x, index, starts, len(index), mean)
    if mean:
        x = (x.to(wide_dtype(x)) / starts.diff().clamp_min(1)[:, None]).to(x.dtype)
    return x[index]


@_sum_children.register_fake
def _(x, index, order, starts, mean):
    return x.new_empty(starts.shape[0] - 1, x.shape[1])


@_copy_parents.register_fake
def _(x, index, order, starts, mean):
    return x.new_empty(index.shape[0], x.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:4])
    ctx.mean = inputs[4]


def _backward_of_sum(ctx, dy):
    return _copy_parents(dy.contiguous(), *ctx.saved_tensors, ctx.mean), None, None, None, None


def _backward_of_copy(ctx, dy):
    return _sum_children(dy.contiguous(), *ctx.saved_tensors, ctx.mean), None, None, None, None


_sum_children.register_autograd(_backward_of_sum, setup_context=_save)
_copy_parents.register_autograd(_backward_of_copy, setup_context=_save)


def _check(x: Tensor, rows: int, what: str) -> None:
    check_tensors(x=x)
    if x.ndim != 2 or len(x) != rows:
        raise ValueError(
            f"x must be [{what}, C] with a row for each of {rows} {what}, got {list(x.shape)}"
        )
    known = (torch.float16, torch.bfloat16, torch.float32)
    if x.dtype not in known and not (x.dtype == torch.float64 and backend.is_torch(x)):
        raise ValueError(
            f"x must be fp16, bf16 or fp32 (fp64: on the torch path), got {x.dtype} on "
            f"{backend.name(x)}"
        )


def pool(
    x: Tensor,  # [N, C] fp16, bf16 or fp32
    pooling: Pooling,
) -> Tensor:  # [S, C], as x
    """Average each coarse voxel's children, summed in fp32; zeros for a voxel without children.

    The gradient needs no atomics. Raises ValueError for another rank or dtype and for a row count
    that is not the pooling's.
    """
    _check(x, len(pooling.index), "fine voxels")
    return torch.ops.trislat.pool_sum(
        x.contiguous(), pooling.index, pooling.order, pooling.starts, True
    )


def unpool(
    x: Tensor,  # [S, C] fp16, bf16 or fp32
    pooling: Pooling,
) -> Tensor:  # [N, C], as x
    """Copy to every fine voxel the row of the coarse one that holds it.

    The gradient sums children in fp32, in row order. Raises ValueError for another rank or dtype
    and for a row count that is not the pooling's.
    """
    _check(x, len(pooling), "coarse voxels")
    return torch.ops.trislat.pool_copy(
        x.contiguous(), pooling.index, pooling.order, pooling.starts, False
    )


def pool_reference(x: Tensor, index: Tensor, S: int) -> Tensor:
    """`pool`, coarse row by coarse row."""
    groups = [x[(index == s).to(x.device)] for s in range(S)]
    if not S:
        return x[:0]
    return torch.stack([rows.sum(0) / max(len(rows), 1) for rows in groups])


def unpool_reference(x: Tensor, index: Tensor, S: int) -> Tensor:
    """`unpool`, fine row by fine row."""
    return torch.stack([x[s] for s in index.tolist()]) if len(index) else x[:0]
