"""Lists of small tiles for the compositing of projected Gaussians on a CPU.

A pair contributes to the pixels of its rectangle of 16 x 16 tiles where alpha >= 1/255, so there
the size of the tiles at work is free: an instance is a 4 x 4 tile inside the rectangle which the
ellipse alpha = 1/255 reaches. A tile too many costs time, a tile too few would be wrong; the
threshold itself is applied per pixel, later. The pairs of a view are sorted by depth, emit their
rows of tiles and these their tiles in that order, and a stable sort by tile keeps it: ties in depth
stay in the order of the pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gaussian.records import TILE as BLOCK

TILE = 4  # pixels along a side; a divisor of BLOCK, the tiles that a rectangle counts
MARGIN = 0.01  # pixels added to the extent of an ellipse
ALPHA_MIN = 1 / 255


class Lists(NamedTuple):
    """The instances of every tile, near to far."""

    pair: Tensor  # [N + padding] int32; the last entries are P, a pair that touches nothing
    tile: Tensor  # [S] int64, view-major: the tiles with at least one instance
    start: Tensor  # [S] int32
    count: Tensor  # [S] int32


def bin_torch(
    mean: Tensor,  # [P, 2] pixels
    conic: Tensor,  # [P, 3] (c11, c12, c22)
    opacity: Tensor,  # [P]
    depth: Tensor,  # [P]
    rect: Tensor,  # [P, 4] int32 (x0, y0, x1, y1) in 16 x 16 tiles, end exclusive
    view: Tensor,  # [P] int
    V: int,
    H: int,
    W: int,
    padding: int,
) -> Lists:
    """The lists of all tiles of V views. Raises ValueError for 2^31 instances or more.

    The extent of the ellipse in every row of tiles is computed in float64, with a margin for the
    rounding of the exponent (relative to the terms that cancel in it, hence product / det). Where
    that says nothing (needles thinner than rounding, NaN) the rectangle counts.
    """
    P = len(mean)
    rows = -(-H // TILE)
    columns = -(-W // TILE)
    x0, y0, x1, y1 = (rect * BLOCK).unbind(1)
    x1, y1 = x1.clamp(max=W) - 1, y1.clamp(max=H) - 1  # pixels, the last one included
    mx, my = mean.double().unbind(1)
    c11, c12, c22 = conic.double().unbind(1)
    product = c11 * c22
    det = product - c12 * c12
    cut = torch.log(opacity.double() * 255)
    sound = (
        (c11 > 0)
        & (c22 > 0)
        & (det > 1e-5 * product)
        & (mx.abs() + my.abs() + product + cut.abs() < torch.inf)
    )
    # the ellipse: c11 dx^2 + 2 c12 dx dy + c22 dy^2 <= level
    level = 2 * (cut + 1e-5) * (1 + 4e-6 * product / det)

    def known(value: Tensor, otherwise: float) -> Tensor:
        return torch.where(sound, value, otherwise)

    mx, my = known(mx, 0), known(my, 0)
    reach = known((level * c11 / det).sqrt(), torch.inf) + MARGIN  # furthest dy
    top = torch.maximum((my - reach).ceil_(), y0).int() // TILE
    bottom = torch.minimum((my + reach).floor_(), y1).int() // TILE
    count = (
        (bottom - top + 1)
        .masked_fill_((x1 < x0) | (y1 < y0) | (opacity < ALPHA_MIN * (1 - 1e-6)), 0)
        .clamp_(min=0)
    )

    # pair -> rows of tiles, near to far
    order = _ascending(depth)
    # by view too: the sort by tile then finds its keys nearly in order, and its memory in the cache
    order = _of(order, _of(view.int(), order).sort(stable=True).indices)
    count = _of(count, order)
    run, offset = _runs(count)
    pair = _of(order, run)
    row = _of(_of(top, order) - offset, run) + torch.arange(
        len(run), dtype=torch.int32, device=run.device
    )
    # dy of the rightmost point; leftmost: -dy
    lean = _of(known(-c12 / c22 * (level * c22 / det).sqrt(), 0), pair)
    square = _of(known(level / c11, torch.inf), pair)
    bend = _of(known(det / (c11 * c11), 0), pair)
    skew = _of(known(c12 / c11, 0), pair)
    middle = _of(mx, pair)
    first = row * TILE - _of(my, pair)
    last = first + (TILE - 1)
    # dy at which the ellipse reaches furthest inside the row
    right = torch.clamp(lean, first, last)
    left = torch.clamp(lean.neg_(), first, last)
    lowest = middle - (square - bend * left * left).clamp_(min=0).sqrt_() - skew * left
    highest = middle + (square - bend * right * right).clamp_(min=0).sqrt_() - skew * right
    begin = torch.maximum(lowest.sub_(MARGIN).ceil_(), _of(x0, pair)).int() // TILE
    end = torch.minimum(highest.add_(MARGIN).floor_(), _of(x1, pair)).int() // TILE
    count = (end - begin + 1).clamp_(min=0)

    # rows -> tiles, then by tile
    run, offset = _runs(count)
    tile = _of((_of(view.int(), pair) * rows + row) * columns + begin - offset, run)
    tile += torch.arange(len(run), dtype=torch.int32, device=run.device)
    tiles = V * rows * columns
    short = torch.int16 if tiles < 1 << 15 else torch.int32  # half the keys, half the time
    permutation = tile.to(short).sort(stable=True).indices
    pair = _of(_of(pair.int(), run), permutation)
    length = torch.bincount(tile, minlength=tiles)
    start = (length.cumsum(0) - length).int()
    tile = length.nonzero().squeeze(1)
    return Lists(
        torch.nn.functional.pad(pair, (0, padding), value=P), tile, start[tile], length[tile].int()
    )


def _of(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index)


def _runs(count: Tensor) -> tuple[Tensor, Tensor]:
    """0 repeated count[0] times, 1 repeated count[1] times ...; and where each run begins."""
    total = int(count.sum())
    if total >= 2**31:
        raise ValueError(
            f"the Gaussians touch {total} tiles of {TILE} x {TILE} pixels, more than 2^31: "
            "render fewer at once"
        )
    return torch.repeat_interleave(count, output_size=total), count.cumsum(
        0, dtype=torch.int32
    ) - count


def _ascending(depth: Tensor) -> Tensor:
    """Order `depth` stably, by its bits.

    An integer radix sort is many times faster than the sort of floats.
    """
    bits = (depth + 0.0).view(torch.int32 if depth.dtype == torch.float32 else torch.int64)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits).sort(stable=True).indices
