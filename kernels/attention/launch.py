"""Launches of the attention programs: tile sizes, tile lists, forward and backward. N rows, M
segments, H heads, D channels.

Which tiles of which segments exist is listed on the device, once per windows: nothing waits for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.attention import long, short
from kernels.attention.rows import _list_tiles
from kernels.attention.sizes import Tile, tile_sizes
from kernels.backend import triton

KEPT = 16  # how many plans and tile lists are kept
# A product fused into a sum across lanes is exact in its own lane and rounded in the others: copies
# of one delta or gradient of gamma would differ, and which is stored would be the hardware's
# choice. Products of matrices stay fused all the same.
UNFUSED = {"enable_fp_fusion": False}
LISTED = 1024  # segments that are listed at a time; not yet measured on a GPU
# of a program that sums over the uses of keys; not yet measured on a GPU
SUM_ROWS, SUM_CHANNELS = 16, 256


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


def _tile_list(starts: Tensor, N: int, low: int, high: int, rows: int) -> Tensor:
    """[1 + tiles, 2] int32, as many as there can be: how many there are, then (segment, first
    position) of each.
    """
    M = len(starts) - 1
    most = min(M, N // (low + 1)) + (0 if high <= rows else N // rows)
    work = starts.new_empty(1 + most, 2)
    backend.launch(_list_tiles, (1,), starts, work, M, low, high, rows, BLOCK=LISTED, num_warps=4)
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
    forward, backward = tile_sizes(
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
    out = q.new_empty(N, H, D)
    lse = q.new_empty(H, N, dtype=torch.float32)
    for tile in _classes(q, bound, gamma is not None, phases is not None)[0]:
        work = keep((starts,), _tile_list, N, tile.low, tile.high, tile.rows)
        programs = _programs(len(work) - 1, q)
        constants = _constants(q, segments, tile)
        if tile.high <= tile.rows:
            heads = min(H, 4)
            backend.launch(
                short._attention_short,
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
                long._attention_long,
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
            keep((edges,), _tile_list, n, tile.low, tile.high, tile.rows)
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
        tiles = max(len(work), len(key_work)) - 1
        constants = _constants(q, segments, tile) | UNFUSED | {"STEP": tile.step}
        grid = (H, _programs(len(work) - 1, q))
        part = None if parts is None else parts[first : first + tiles]
        if tile.high <= tile.rows:
            backend.launch(
                short._attention_short_backward,
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
                long._attention_long_dq,
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
                long._attention_long_dkv,
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
            long._sum_uses,
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
