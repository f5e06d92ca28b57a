"""Launches of the attention programs: N rows, M segments, H heads, D channels.

The tiles of all segments are listed on the device, once for the same windows; nothing waits for it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.attention import long, short
from kernels.attention.rows import _list_tiles, padded
from kernels.attention.sizes import Tile, tile_sizes
from kernels.backend import triton

KEPT = 16  # how many plans and tile lists are kept
# A product fused into a sum across lanes is exact in its own lane and rounded in the others: copies
# of one delta or gradient of gamma would differ, and which is stored would be the hardware's
# choice. Products of matrices stay fused all the same.
UNFUSED = {"enable_fp_fusion": False}
LISTED = 1024  # segments that are listed at a time; not yet measured on a GPU
# of a program that sums over the uses of keys; not yet measured on a GPU
SUM_ROWS = 16
SUM_CHANNELS = 256

_kept: dict[tuple, tuple] = {}


def keep(tensors: tuple[Tensor | None, ...], make: Callable, *args):
    """Return make(*tensors, *args), kept for the next call with the same tensors and arguments.

    Tensors are the same if they have the same memory and version: checkpointing and torch.compile
    hand over other objects. An entry keeps its tensors, so their memory is not used again.
    """
    key = [make, args]
    for t in tensors:
        if t is not None:
            key.append((t.data_ptr(), t.shape, 0 if t.is_inference() else t._version))
    key = tuple(key)
    made = _kept.pop(key, None) or (make(*tensors, *args), tensors)
    _kept[key] = made  # the most recent last
    for old in list(_kept)[:-KEPT]:
        _kept.pop(old, None)
    return made[0]


def _tile_list(
    starts: Tensor, other_starts: Tensor, K: int, N: int, low: int, high: int, rows: int
) -> Tensor:
    """The list [1 + most, 4] int32 of the tiles of K positions, as `rows._list_tiles` makes it.

    It has space for as many tiles as there can be; how many there are only the device knows. N is
    the number of queries, which the kernels read there too.
    """
    M = len(starts) - 1
    most = min(M, K // (low + 1)) + (0 if high <= rows else K // rows)
    work = starts.new_empty(1 + most, 4)
    args = (starts, other_starts, work, M, N, low, high, rows)
    backend.launch(_list_tiles, (1,), *args, BLOCK=LISTED, num_warps=4)
    return work


def _programs(tiles: int, tensor: Tensor) -> int:
    """Programs along the tiles: more than run at once would start only to find nothing left."""
    return min(tiles, 8 * backend.multiprocessors(tensor))


class Segments(NamedTuple):
    """The rows of every segment: queries and the keys they attend to.

    Segment m has the positions starts[m] : starts[m + 1] of the queries, key_starts[m] :
    key_starts[m + 1] of the keys. Without `order`, positions are rows.
    """

    order: Tensor | None  # [N] int32: the query at each position
    starts: Tensor  # [M + 1] int32
    keys: Tensor | None  # [K] int32: the key at each position; None: the queries' rows
    key_starts: Tensor  # [M + 1] int32; `starts` itself where segments attend to themselves
    bound: int | None = None  # no segment has more rows; None: keys are separate
    # where each row is among the keys, if more than once: `Windows.uses`
    uses: tuple[Tensor, Tensor] | None = None


def _constants(D: int, tile: Tile) -> dict[str, int]:
    """The constants of every launch."""
    stages = tile.num_stages
    return dict(D=D, ROWS=tile.rows, STAGES=stages, num_warps=tile.num_warps, num_stages=stages)


def _classes(
    q: Tensor, bound: int | None, normed: bool, rotated: bool
) -> tuple[list[Tile], list[Tile]]:
    """Size classes, forward and backward, of segments of up to `bound` rows.

    Without a bound, queries and keys are separate, and all tiles loop.
    """
    pad_d = padded(q.shape[2])
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
        size = (tile.low, tile.high, tile.rows)
        work = keep((starts, key_starts), _tile_list, N, N, *size)
        programs = _programs(len(work) - 1, q)
        constants = _constants(D, tile)
        if tile.high <= tile.rows:
            heads = min(H, 4)
            grid = (triton.cdiv(H, heads), programs)
            args = (q, gamma, phases, order, work, out, lse, scale)  # q: where qkv begins
            backend.launch(short._attention_short, grid, *args, H=H, HEADS=heads, **constants)
        else:
            args = (q, k, v, gamma, phases, order, keys, work, out, lse, scale)
            backend.launch(long._attention_long, (H, programs), *args, STEP=tile.step, **constants)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor | None,
    phases: Tensor | None,
    out: Tensor,
    lse: Tensor,
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
    K = len(k) if keys is None else len(keys)
    lists = []  # (tiles of queries, tiles of keys) of each class
    for tile in classes:
        size = (tile.low, tile.high, tile.rows)
        work = keep((starts, key_starts), _tile_list, N, N, *size)
        key_work = keep((key_starts, starts), _tile_list, K, N, *size)
        lists.append((work, key_work))
    parts = None  # of dgamma, one for each tile
    if gamma is not None:
        tiles = sum(max(map(len, pair)) - 1 for pair in lists)
        parts = gamma.new_zeros(tiles, 2, H, D)
    dk_to, dv_to = (dk, dv) if uses is None else dk.new_empty(2, K, H, D, dtype=torch.float32)
    first = 0
    for tile, (work, key_work) in zip(classes, lists, strict=True):
        tiles = max(len(work), len(key_work)) - 1
        part = None if parts is None else parts[first : first + tiles]
        first += tiles
        constants = _constants(D, tile) | UNFUSED | {"STEP": tile.step}
        grid = (H, _programs(len(work) - 1, q))
        if tile.high <= tile.rows:
            # q and dq: where qkv and dqkv begin
            args = (q, gamma, phases, order, work, out, lse, grad, dq, part, scale)
            backend.launch(short._attention_short_backward, grid, *args, **constants)
            continue
        delta = torch.empty_like(lse)
        operands = (q, k, v, gamma, phases, order, keys)
        args = (*operands, work, out, lse, grad, dq, delta, part, scale)
        backend.launch(long._attention_long_dq, grid, *args, **constants)
        grid = (H, _programs(len(key_work) - 1, q))
        args = (*operands, key_work, lse, delta, grad, dk_to, dv_to, part, scale)
        backend.launch(long._attention_long_dkv, grid, *args, **constants)
    if uses is not None:
        _sum_over_uses(dk_to, dv_to, *uses, dk, dv)
    return q.new_empty(0) if parts is None else parts.sum(0)


def _sum_over_uses(
    dk_uses: Tensor, dv_uses: Tensor, uses: Tensor, use_starts: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Fill dk and dv, parts of dqkv, with the sums over the uses of each row as a key."""
    N, H, D = dk.shape
    grid = (triton.cdiv(N, SUM_ROWS), triton.cdiv(H * D, SUM_CHANNELS))
    sizes = dict(C=H * D, STRIDE=3 * H * D, ROWS=SUM_ROWS, BLOCK=SUM_CHANNELS)
    args = (dk_uses, dv_uses, uses, use_starts, dk, dv, N)
    backend.launch(long._sum_uses, grid, *args, **sizes, num_warps=4)
