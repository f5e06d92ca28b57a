"""Launches of the attention programs: tile sizes, tile lists, forward and backward. N rows, M
segments, H heads, D channels.

Which tiles of which segments exist is listed on the device, once per windows: nothing waits for it.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels import backend
from kernels.attention import tiles as kernel

ANY = 2**31 - 1
KEPT = 16  # how many plans and tile lists are kept
# A product fused into a sum across lanes is exact in its own lane and rounded in the others: copies
# of one delta or gradient of gamma would differ, and which is stored would be the hardware's
# choice. Products of matrices stay fused all the same.
UNFUSED = {"enable_fp_fusion": False}
LISTED = 1024  # segments that are listed at a time; not yet measured on a GPU
# of a program that sums over the uses of keys; not yet measured on a GPU
SUM_ROWS, SUM_CHANNELS = 16, 256


class Tile(NamedTuple):
    """How segments of `low` < length <= `high` are computed: `rows` of them by a program, `step` of
    the other side at a time.
    """

    low: int
    high: int
    rows: int
    step: int
    num_warps: int
    num_stages: int


def _tiles(
    dtype: torch.dtype, pad_d: int, target: str, normed: bool, rotated: bool, separate: bool = False
) -> tuple[list[Tile], list[Tile]]:
    """Size classes, forward and backward. Not yet measured on a GPU: chosen so that nothing spills
    and shared memory suffices.

    The q/k norm holds more of a row in registers, and so does its rotation. The last class loops,
    from any length, and is the only one where keys are `separate` from the queries.
    """
    treated = normed or rotated
    if target == "interpreter":  # a program costs milliseconds whatever its size
        forward = [
            Tile(0, 64, 64, 64, 4, 1),
            Tile(64, 256, 256, 256, 4, 1),
            Tile(256, ANY, 128, 256, 4, 1),
        ]
        backward = [
            Tile(0, 64, 64, 64, 4, 1),
            Tile(64, 256, 256, 128, 4, 1),
            Tile(256, ANY, 128, 256, 4, 1),
        ]
    # no tensor cores on NVIDIA: full fp32 products hold their operands in registers
    elif dtype == torch.float32:
        forward = [Tile(0, ANY, 32, 16, 4, 1)]
        step = 32 if pad_d <= 32 and not treated else 16
        backward = [Tile(0, ANY, 32, step, 8, 1)] if pad_d <= 64 else [Tile(0, ANY, 16, 16, 4, 1)]
        if pad_d <= 64 and not treated:
            backward = [
                Tile(0, 64, 64, 16, 8, 2 if target.startswith("sm_8") else 1),
                backward[0]._replace(low=64),
            ]
        # ptxas spills steps of 16 at 80 registers
        if pad_d == 64 and normed and rotated and target.startswith("sm_10"):
            forward = [Tile(0, ANY, 32, 32, 4, 1)]
        if pad_d == 64 and target.startswith("sm_8") and rotated and not normed:
            backward = [Tile(0, ANY, 16, 16, 4, 1)]
        if pad_d == 64 and target.startswith("sm_8") and separate and not treated:
            backward[-1] = backward[-1]._replace(num_warps=4)
    elif pad_d > 64:
        forward, backward = (
            [Tile(0, ANY, 64, 32, 4, 2)],
            [Tile(0, 64, 64, 16, 4, 1), Tile(64, ANY, 64, 16, 4, 1)],
        )
        if treated:
            forward, backward = [Tile(0, ANY, 64, 32, 8, 2)], [Tile(0, ANY, 32, 16, 8, 1)]
    elif target.startswith("gfx1"):  # 256 registers a thread, half of what gfx9 has
        forward, backward = (
            [Tile(0, ANY, 64, 32, 8, 1)],
            [Tile(0, ANY, 16 if treated else 32, 16, 4, 1)],
        )
    elif rotated:
        warps = 8 if target.startswith("sm_10") and pad_d <= 32 else 4  # bf16 spills there with 4
        forward = [Tile(0, 64, 64, 64, warps, 1), Tile(64, ANY, 64, 32, 4, 1)]
        backward = [Tile(0, 64, 64, 16, 8, 1), Tile(64, ANY, 64, 16, 8, 1)]
        # products from registers: a short segment's tile spills
        if not target.startswith(("sm_9", "sm_10")):
            forward = [Tile(0, ANY, 64, 32, 4, 1)]
        if target.startswith(("sm_8", "sm_12")):
            backward = [Tile(0, ANY, 32, 16, 8, 1)]
    elif target.startswith("gfx"):
        forward = [Tile(0, ANY, 64, 32, 4, 2)]
        backward = [
            Tile(0, 64, 64, 16, 4, 2),
            Tile(64, 128, 128, 16, 8, 1),
            Tile(128, ANY, 64, 16, 4, 2),
        ]
        if not normed:
            backward[2:] = [Tile(128, 256, 256, 16, 8, 1), Tile(256, ANY, 64, 16, 4, 2)]
    # 227 KB of shared memory, and products from it
    elif 90 <= int(target.removeprefix("sm_")) < 120:
        step = 64 if target == "sm_90" else 32
        forward = [
            Tile(0, 64, 64, 64, 4, 2),
            Tile(64, 128, 128, 128, 8, 2),
            Tile(128, ANY, 64, step, 4, 3),
        ]
        backward = [
            Tile(0, 64, 64, 32, 4, 2),
            Tile(64, 128, 128, 32, 8, 2),
            Tile(128, ANY, 64, 32, 4, 2),
        ]
        if not normed:
            backward[2:] = [Tile(128, 256, 256, 32, 8, 1), Tile(256, ANY, 64, 32, 4, 2)]
    elif normed:
        forward = [Tile(0, 64, 64, 64, 4, 3), Tile(64, ANY, 64, 64, 4, 3)]
        backward = [Tile(0, ANY, 64, 16, 4, 2)]
    else:
        forward = [
            Tile(0, 64, 64, 64, 4, 3),
            Tile(64, 128, 128, 128, 8, 2),
            Tile(128, ANY, 64, 64, 4, 3),
        ]
        backward = [
            Tile(0, 64, 64, 32, 4, 1),
            Tile(64, 128, 128, 32, 8, 2),
            Tile(128, ANY, 64, 32, 4, 3),
        ]
    return forward, backward


_kept: dict[tuple, tuple] = {}


def keep(tensors: tuple[Tensor | None, ...], make, *args):
    """make(*args), kept for the next call with the same memory in `tensors`, which the entry keeps
    alive.

    By memory and version, not by object: checkpointing and torch.compile hand over aliases of the
    same tensors.
    """
    key = (
        make,
        args,
        *(
            (t.data_ptr(), t.shape, 0 if t.is_inference() else t._version)
            for t in tensors
            if t is not None
        ),
    )
    made = _kept.pop(key, None) or (make(*tensors, *args), tensors)
    _kept[key] = made  # the most recent last
    for old in list(_kept)[:-KEPT]:
        _kept.pop(old, None)
    return made[0]


def _list_tiles(starts: Tensor, N: int, low: int, high: int, rows: int) -> Tensor:
    """[1 + tiles, 2] int32, as many as there can be: how many there are, then (segment, first
    position) of each.
    """
    M = len(starts) - 1
    most = min(M, N // (low + 1)) + (0 if high <= rows else N // rows)
    work = starts.new_empty(1 + most, 2)
    backend.launch(
        kernel._list_tiles, (1,), starts, work, M, low, high, rows, BLOCK=LISTED, num_warps=4
    )
    return work


def _programs(tiles: int, tensor: Tensor) -> int:
    """Programs along the tiles: more than run at once would start only to find nothing left."""
    units = (
        torch.cuda.get_device_properties(tensor.device).multi_processor_count
        if tensor.is_cuda
        else 1
    )
    return min(tiles, 8 * units)


class Segments(NamedTuple):
    """Which rows attend to which: queries [starts], keys [key_starts], per segment. Without lists,
    positions are rows.
    """

    order: Tensor | None  # [N] int32: the query at each position
    starts: Tensor  # [M + 1] int32
    keys: Tensor | None  # [K] int32: the key at each position
    key_starts: Tensor  # [M + 1] int32; `starts` itself where segments attend to themselves
    bound: int | None = None  # no segment has more rows; None: keys are separate
    # where each row is among the keys, if more than once: `Windows.uses`
    uses: tuple[Tensor, Tensor] | None = None


def _constants(q: Tensor, segments: Segments, tile: Tile) -> dict[str, int]:
    """The stride of rows is that of the op's contiguous tensors, not q.stride(0): with one row or
    none that may be any number, and q, k and v have it in common.
    """
    H, D = q.shape[1:]
    stride = H * D if segments.order is None else 3 * H * D  # separate tensors, or parts of qkv
    return dict(
        H=H,
        D=D,
        PAD_D=max(16, triton.next_power_of_2(D)),
        STRIDE=stride,
        ROWS=tile.rows,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _classes(
    q: Tensor, bound: int | None, normed: bool, rotated: bool
) -> tuple[list[Tile], list[Tile]]:
    """Those that a segment of up to `bound` rows can be in; None: queries and keys are separate,
    all tiles loop.
    """
    pad_d = max(16, triton.next_power_of_2(q.shape[2]))
    forward, backward = _tiles(
        q.dtype, pad_d, backend.target(q), normed, rotated, separate=bound is None
    )
    if bound is None:
        return [forward[-1]._replace(low=0)], [backward[-1]._replace(low=0)]
    return [t for t in forward if t.low < bound], [t for t in backward if t.low < bound]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor | None,
    phases: Tensor | None,
    segments: Segments,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [N, H, D], and lse [H, N] by position: log sum exp of the scores."""
    N, H, D = q.shape
    order, starts, keys, key_starts, bound, _ = segments
    out, lse = q.new_empty(N, H, D), q.new_empty(H, N, dtype=torch.float32)
    for tile in _classes(q, bound, gamma is not None, phases is not None)[0]:
        work = keep((starts,), _list_tiles, N, tile.low, tile.high, tile.rows)
        programs, constants = _programs(len(work) - 1, q), _constants(q, segments, tile)
        if tile.high <= tile.rows:
            heads = min(H, 4)
            backend.launch(
                kernel._attention_short,
                (triton.cdiv(H, heads), programs),
                q,
                k,
                v,
                gamma,
                phases,
                order,
                starts,
                work,
                out,
                lse,
                N,
                scale,
                HEADS=heads,
                **constants,
            )
        else:
            backend.launch(
                kernel._attention_long,
                (H, programs),
                q,
                k,
                v,
                gamma,
                phases,
                order,
                keys,
                starts,
                key_starts,
                work,
                out,
                lse,
                N,
                scale,
                STEP=tile.step,
                **constants,
            )
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gamma: Tensor | None,
    phases: Tensor | None,
    segments: Segments,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Fill dq, dk, dv; return dgamma [2, H, D], or nothing [0] without gamma."""
    N, H, D = q.shape
    order, starts, keys, key_starts, bound, uses = segments
    classes = _classes(q, bound, gamma is not None, phases is not None)[1]
    K = len(k) if uses is None else len(keys)
    lists = [
        [
            keep((edges,), _list_tiles, n, tile.low, tile.high, tile.rows)
            for edges, n in ((starts, N), (key_starts, K))
        ]
        for tile in classes
    ]
    parts = (
        None
        if gamma is None
        else gamma.new_zeros(sum(max(map(len, pair)) - 1 for pair in lists), 2, H, D)
    )
    dk_to, dv_to = (dk, dv) if uses is None else dk.new_empty(2, K, H, D, dtype=torch.float32)
    first = 0
    for tile, (work, key_work) in zip(classes, lists, strict=True):
        tiles, constants = (
            max(len(work), len(key_work)) - 1,
            _constants(q, segments, tile) | UNFUSED | {"STEP": tile.step},
        )
        grid, part = (
            (H, _programs(len(work) - 1, q)),
            None if parts is None else parts[first : first + tiles],
        )
        if tile.high <= tile.rows:
            backend.launch(
                kernel._attention_short_backward,
                grid,
                q,
                k,
                v,
                gamma,
                phases,
                order,
                starts,
                work,
                out,
                lse,
                grad,
                dq,
                dk,
                dv,
                part,
                N,
                scale,
                **constants,
            )
        else:
            delta = torch.empty_like(lse)
            backend.launch(
                kernel._attention_long_dq,
                grid,
                q,
                k,
                v,
                gamma,
                phases,
                order,
                keys,
                starts,
                key_starts,
                work,
                out,
                lse,
                grad,
                dq,
                delta,
                part,
                N,
                scale,
                **constants,
            )
            grid = H, _programs(len(key_work) - 1, q)
            backend.launch(
                kernel._attention_long_dkv,
                grid,
                q,
                k,
                v,
                gamma,
                phases,
                order,
                keys,
                starts,
                key_starts,
                key_work,
                lse,
                delta,
                grad,
                dk_to,
                dv_to,
                part,
                N,
                scale,
                BY_POSITION=uses is not None,
                **constants,
            )
        first += tiles
    if uses is not None:
        grid = triton.cdiv(len(dk), SUM_ROWS), triton.cdiv(H * D, SUM_CHANNELS)
        backend.launch(
            kernel._sum_uses,
            grid,
            dk_to,
            dv_to,
            *uses,
            dk,
            dv,
            len(dk),
            C=H * D,
            STRIDE=3 * H * D,
            ROWS=SUM_ROWS,
            BLOCK=SUM_CHANNELS,
            num_warps=4,
        )
    return q.new_empty(0) if parts is None else parts.sum(0)
