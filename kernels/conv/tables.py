"""Tables that are made once of a map of voxels: rows in order, and pairs of rows.

R rows in G groups, T taps a group: M = G * T matrices of the weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import triton
from kernels.conv import tiles as kernel
from kernels.conv.order import child_rows, octant_order, octants, plane_order, tap_order, taps_of

PAIRED = 128  # rows of which a program lists the pairs
PLANES = 1 << 14  # rows that go plane by plane: their fp32 sums stay in a GPU's L2 cache


class TapRows(NamedTuple):
    """Rows in Q lists, each in its own order: what a product reads.

    A group has one list or several of a part of its taps each.
    """

    order: Tensor | None  # [Q, R] int32: rows of the group; None: as they are
    rows: Tensor  # [Q, T, R] int32: the row of the other side under each tap, -1 for none


class TapPairs(NamedTuple):
    """Pairs of rows for each of M matrices: what a weight gradient reads."""

    rows: Tensor  # [2, M, R] int32: rows under the tap, and rows r * G + g that have it, in order
    count: Tensor  # [M] int32: how many; what follows in `rows` is undefined


class ConvTables(NamedTuple):
    """Everything that a convolution and its gradients read of a map of voxels."""

    forward: TapRows
    backward: TapRows | None
    pairs: TapPairs | None


def sort_rows(taps: Tensor, order: Tensor | None, parts: int = 1) -> TapRows:
    """The rows of a map [R, G, T] in an order [G * parts, R], for each part of its taps."""
    R, G, T = taps.shape
    rows = taps.view(R, G * parts, T // parts).permute(1, 2, 0)
    if order is None:
        return TapRows(None, rows.contiguous())
    order = order.view(G * parts, R)
    at = order.long()[:, None].expand(rows.shape)
    return TapRows(order, rows.gather(2, at))


def list_pairs(taps: Tensor) -> TapPairs:
    """The pairs of rows of each tap of a map [R, G, T] int32."""
    R, G, T = taps.shape
    tiles = triton.cdiv(R, PAIRED)
    some = torch.nn.functional.pad(taps.view(R, G * T) >= 0, (0, 0, 0, tiles * PAIRED - R))
    upto = some.view(tiles, PAIRED, G * T).sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    before = torch.nn.functional.pad(upto, (0, 0, 1, 0))
    pairs = taps.new_empty(2, G * T, R)
    pad = triton.next_power_of_2(T)
    args = (taps, before, pairs, R)
    backend.launch(
        kernel._list_pairs, (tiles, G), *args, G=G, T=T, PAD_T=pad, ROWS=PAIRED, num_warps=4
    )
    return TapPairs(pairs, before[-1])


def conv_tables(
    cache,  # a SpatialCache
    kernel_size: int = 3,
    gradients: bool = True,
) -> ConvTables:
    """Make the tables of `sparse_conv`; without `gradients` only those of its forward pass.

    `cache.get(conv_tables, 3)` makes it once. Few rows go plane by plane of the taps: that skips
    more of those that a row has not, and costs a sum more for each plane.
    """
    if gradients:
        forward = cache.get(conv_tables, kernel_size, False).forward
        return ConvTables(forward, forward, list_pairs(taps_of(cache, kernel_size)[:, None]))
    taps = taps_of(cache, kernel_size)
    if kernel_size > 1 and len(taps) <= PLANES:
        order = plane_order(taps, kernel_size)
    else:
        order = cache.get(tap_order, kernel_size)[None]
    return ConvTables(sort_rows(taps[:, None], order, len(order)), None, None)


def octant_tables(
    cache,  # a SpatialCache: the parents
    gradients: bool = True,
) -> ConvTables:
    """Make the tables of `subdivide_conv`; without `gradients` only those of its forward pass.

    `cache.get(octant_tables)` makes it once.
    """
    taps = taps_of(cache, 3)
    order = cache.get(octant_order)
    if gradients:
        forward = cache.get(octant_tables, False).forward
        backward = sort_rows(child_rows(taps), order[:1])
        return ConvTables(forward, backward, list_pairs(octants(taps)))
    return ConvTables(sort_rows(octants(taps), order[1:]), None, None)
