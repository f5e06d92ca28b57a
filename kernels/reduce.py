"""Sums of the rows that share a key, without atomics: M rows, C channels, N sums. The gradient of a gather.

The rows are read in an order that puts equal keys side by side (a stable sort, so each sum has one fixed order). A program
adds up the runs among its B rows, all at once: the [B, B] matrix of equal keys times the rows. A run that lies inside the
program is finished; one that reaches across its ends leaves a partial sum, and the 2 partial sums of every program are the
rows of the next launch, B / 2 times fewer each time, until one program holds them all.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels import backend


def _tiles(target: str) -> dict:
    """Rows per program (not yet measured on a GPU): B additions per row and channel, few of them beside the traffic. On AMD
    the matrix of equal keys lies in scalar registers, which are few."""
    if target == "interpreter":
        return {"B": 512, "num_warps": 2}
    return {"B": 32, "num_warps": 4} if target.startswith("gfx") else {"B": 64, "num_warps": 2}


@triton.jit
def _key(key_ptr, order_ptr, i, live, SORTED: tl.constexpr):
    n = i.to(tl.int64)
    if not SORTED:
        n = tl.load(order_ptr + i, live, 0).to(tl.int64)
    return n, tl.load(key_ptr + n, live, -1)


@triton.jit(do_not_specialize=["M", "C"])
def _sum_runs(
    rows_ptr, weight_ptr, order_ptr, key_ptr, out_ptr, part_ptr, part_key_ptr, M, C, SHARE: tl.constexpr,
    SORTED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    lane = tl.arange(0, B)
    i = b * B + lane
    n, key = _key(key_ptr, order_ptr, i, i < M, SORTED)
    _, following = _key(key_ptr, order_ptr, i + 1, i + 1 < M, SORTED)
    _, left = _key(key_ptr, order_ptr, b * B - 1, b > 0, SORTED)
    _, right = _key(key_ptr, order_ptr, (b + 1) * B, (b + 1) * B < M, SORTED)
    used = key >= 0
    last = used & ((lane == B - 1) | (following != key))  # one lane of each run writes for it
    head, tail = last & (key == left), last & (key == right)
    starts = tl.max(head.to(tl.int32), 0) > 0
    continues = tl.max(tail.to(tl.int32), 0) > 0
    same = key[:, None] == key[None, :]
    to = key.to(tl.int64) * C
    part = b.to(tl.int64) * 2
    for c in range(0, C):
        value = tl.load(rows_ptr + n // SHARE * C + c, used, 0.0)
        if weight_ptr is not None:
            value *= tl.load(weight_ptr + n, used, 0.0)
        total = tl.sum(tl.where(same, value[:, None], 0.0), 0)  # (B,)
        tl.store(out_ptr + to + c, total, last & (key != left) & (key != right))
        tl.store(part_ptr + part * C + c + tl.zeros_like(lane), total, head)
        tl.store(part_ptr + (part + 1) * C + c + tl.zeros_like(lane), tl.where(head, 0.0, total), tail)
    # a run through the whole program is its head, and a tail of zero: runs of partial sums have no gaps
    tl.store(part_key_ptr + part, tl.where(starts, left, -1))
    tl.store(part_key_ptr + part + 1, tl.where(continues, right, -1))


def sum_rows(
    rows: Tensor,  # [M / share, C] fp32
    key: Tensor,  # [M] int32: which sum a row goes to; below 0: none
    order: Tensor,  # [M] int64: a permutation of the rows after which equal keys are neighbours
    N: int,
    weight: Tensor | None = None,  # [M] fp32: row m counts weight[m] times
    share: int = 1,  # row m is rows[m // share]
) -> Tensor:  # [N, C]
    """The sum of the rows of each key 0 .. N - 1, 0 for a key without rows. The same bits each time."""
    M, C = len(key), rows.shape[1]
    out = rows.new_zeros(N, C)
    rows, weight = rows.contiguous(), None if weight is None else weight.contiguous()
    tiles, ordered = _tiles(backend.target(rows)), False
    while M and C:
        blocks = triton.cdiv(M, tiles["B"])
        part, part_key = rows.new_empty(2 * blocks, C), key.new_empty(2 * blocks)
        backend.launch(
            _sum_runs, (blocks,), rows, weight, order, key, out, part, part_key, M, C, SHARE=share, SORTED=ordered, **tiles
        )
        if blocks == 1:
            break
        rows, key, weight, share, ordered, M = part, part_key, None, 1, True, 2 * blocks
    return out
