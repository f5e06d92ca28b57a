"""Sums of rows in a fixed order, without atomics: by key, and of runs of neighbouring rows.

`sum_rows` is the gradient of a gather: M rows, C channels, N sums. The rows are read in an order
that puts equal keys side by side (a stable sort, so each sum has one fixed order). A program adds
up the runs among its B rows, all at once: the [B, B] matrix of equal keys times the rows. A run
that lies inside the program is finished; one that reaches across its ends leaves a partial sum, and
the 2 partial sums of every program are the rows of the next launch, B / 2 times fewer each time,
until one program holds them all.

`sum_segments`: a million numbers added one after the other in fp32 are off by percents, so programs
add up pieces of a segment, and the next launch the pieces. Pieces are counted from the segment's
own start, so what stands before and after it in the memory changes no bit of its sum.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, to_device, triton


def _tiles(target: str) -> dict:
    """Return the rows of a program (not yet measured on a GPU).

    It makes B additions per row and channel, few beside the traffic. On AMD the matrix of equal
    keys lies in scalar registers, which are few.
    """
    if target == "interpreter":
        return {"B": 512, "num_warps": 2}
    if target.startswith("gfx"):
        return {"B": 32, "num_warps": 4}
    return {"B": 64, "num_warps": 2}


@triton.jit
def _key(key_ptr, order_ptr, i, live, SORTED: tl.constexpr):
    """Return row i of the order and its key; -1 where not live."""
    n = i.to(tl.int64)
    if not SORTED:
        n = tl.load(order_ptr + i, live, 0).to(tl.int64)
    return n, tl.load(key_ptr + n, live, -1)


@triton.jit(do_not_specialize=["M", "C"])
def _sum_runs(
    # see sum_rows
    rows_ptr,
    weight_ptr,
    order_ptr,
    key_ptr,
    # results: finished sums; partial sums and their keys, two a program
    out_ptr,
    part_ptr,
    part_key_ptr,
    M,
    C,
    SHARE: tl.constexpr,
    SORTED: tl.constexpr,
    B: tl.constexpr,
):
    b = tl.program_id(0)
    lane = tl.arange(0, B)
    i = b * B + lane
    n, key = _key(key_ptr, order_ptr, i, i < M, SORTED)
    _, following = _key(key_ptr, order_ptr, i + 1, i + 1 < M, SORTED)
    _, left = _key(key_ptr, order_ptr, b * B - 1, b > 0, SORTED)
    _, right = _key(key_ptr, order_ptr, (b + 1) * B, (b + 1) * B < M, SORTED)
    used = key >= 0
    last = used & ((lane == B - 1) | (following != key))  # one lane of each run writes for it
    head = last & (key == left)
    tail = last & (key == right)
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
        tl.store(
            part_ptr + (part + 1) * C + c + tl.zeros_like(lane), tl.where(head, 0.0, total), tail
        )
    # a run through the whole program is its head, and a tail of zero: runs of partial sums have no
    # gaps
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
    """Sum the rows of each key 0 .. N - 1; 0 for a key without rows. The same bits each time."""
    M = len(key)
    C = rows.shape[1]
    out = rows.new_zeros(N, C)
    rows = rows.contiguous()
    weight = None if weight is None else weight.contiguous()
    tiles = _tiles(backend.target(rows))
    ordered = False
    while M and C:
        blocks = triton.cdiv(M, tiles["B"])
        part = rows.new_empty(2 * blocks, C)
        part_key = key.new_empty(2 * blocks)
        backend.launch(
            _sum_runs,
            (blocks,),
            rows,
            weight,
            order,
            key,
            out,
            part,
            part_key,
            M,
            C,
            SHARE=share,
            SORTED=ordered,
            **tiles,
        )
        if blocks == 1:
            break
        rows = part
        key = part_key
        weight = None
        share = 1
        ordered = True
        M = 2 * blocks
    return out


def _piece(target: str, K: int) -> dict[str, int]:
    """Return the rows and the padded columns of a program; not yet measured on a GPU."""
    TILE_K = triton.next_power_of_2(K)
    elements = 1 << 16 if target == "interpreter" else 4096
    return {"ROWS": max(1, elements // TILE_K), "TILE_K": TILE_K}


@triton.jit
def _sum_pieces(
    values_ptr,  # [M, K], a row every `stride` numbers
    starts_ptr,  # [B + 1]
    out_ptr,  # [B, pieces]
    stride,
    K: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_K: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1).to(tl.int64)
    begin = tl.load(starts_ptr + segment)
    end = tl.load(starts_ptr + segment + 1)
    n = begin + piece * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, TILE_K)
    live = (n < end)[:, None] & (k < K)[None, :]  # [ROWS, TILE_K]
    value = tl.load(values_ptr + n[:, None] * stride + k[None, :], live, 0.0)
    if MAGNITUDES:
        value = tl.abs(value)
    tl.store(out_ptr + segment * tl.num_programs(0) + piece, tl.sum(tl.sum(value, 1), 0))


def sum_segments(
    values: Tensor,  # [M, K] fp32 (float64: on the torch path), rows may lie apart
    starts: list[int],  # [B + 1]: segment b owns the rows starts[b] : starts[b + 1]
    magnitudes: bool = False,  # sum the absolute values
) -> Tensor:  # [B]
    """Sum all values of each segment; 0 for an empty one. Does not wait for the device.

    The same bits each time, and for a segment alone as for the same segment in a batch.
    """
    B = len(starts) - 1
    if backend.is_torch(values):
        parts = [values[begin:end] for begin, end in zip(starts, starts[1:], strict=False)]
        sums = [_pairwise(part.abs() if magnitudes else part) for part in parts]
        return torch.stack(sums) if sums else values.new_zeros(0)
    longest = max((end - begin for begin, end in zip(starts, starts[1:], strict=False)), default=0)
    rows = to_device(torch.tensor(starts), values.device)
    while B and longest:
        tiles = _piece(backend.target(values), values.shape[1])
        pieces = triton.cdiv(longest, tiles["ROWS"])
        out = values.new_empty(B * pieces, 1)
        args = (values, rows, out, values.stride(0))
        constants = dict(K=values.shape[1], MAGNITUDES=magnitudes, **tiles, num_warps=4)
        backend.launch(_sum_pieces, (pieces, B), *args, **constants)
        if pieces == 1:
            return out.view(B)
        values = out
        magnitudes = False
        longest = pieces
        rows = torch.arange(0, len(out) + 1, pieces, device=out.device)
    return values.new_zeros(B)


def _pairwise(values: Tensor) -> Tensor:
    """Sum all values: add neighbours to each other until one is left."""
    values = values.flatten()
    while len(values) > 1:
        odd = values[len(values) - len(values) % 2 :]
        values = torch.cat([values[:-1:2] + values[1::2], odd])
    return values.sum()
