"""Lists of the Gaussians in each tile, near to far.

P pairs, I instances (a pair in one tile), T tiles of all views.

Pairs are sorted by depth first (P keys of 32 bits), emit their instances in that order, and a
second stable sort by tile (I keys of 32 bits) keeps it: ties in depth stay in the order of the
Gaussians. Both are torch.sort, a radix sort on a GPU; one sort of I 64-bit keys (tile, depth) would
move about four times the bytes of the second. An instance's slot is its position before the second
sort, where a pair's instances are neighbours: the backward pass writes there and reads once.
"""

import torch

from kernels import backend
from kernels.backend import tl, triton
from kernels.gaussian.records import TILE, Bins, Projected


def _tiles() -> dict:
    """Return the pairs of a program, one per thread (not yet measured on a GPU).

    A program loops as often as its largest rectangle has tiles.
    """
    return {"BLOCK": 128, "num_warps": 4}


@triton.jit(do_not_specialize=["P", "TX", "TY"])
def _emit(
    # of the pairs: order by depth, end of the instances in that order; see Projected
    order_ptr,
    end_ptr,
    rect_ptr,
    view_ptr,
    # results: first instance of a pair, tile and pair of an instance
    first_ptr,
    tile_ptr,
    pair_ptr,
    P,
    TX,
    TY,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < P
    p = tl.load(order_ptr + n, live, 0)
    rect = rect_ptr + p * 4
    x0 = tl.load(rect, live, 0)
    y0 = tl.load(rect + 1, live, 0)
    across = tl.load(rect + 2, live, 0) - x0
    down = tl.load(rect + 3, live, 0) - y0
    count = across * down
    at = tl.load(end_ptr + n, live, 0) - count
    tl.store(first_ptr + p, at, live)
    corner = (tl.load(view_ptr + p, live, 0) * TY + y0) * TX + x0
    across = tl.maximum(across, 1)
    for k in range(0, tl.max(count, 0)):
        here = k < count
        tl.store(tile_ptr + at + k, corner + k // across * TX + k % across, here)
        tl.store(pair_ptr + at + k, p.to(tl.int32), here)


def bin_tiles(projected: Projected, views: int, width: int, height: int) -> Bins:
    """Return the instances of all tiles.

    Reads one number from the device, the number of instances, and waits for it: the only wait of
    `splat`. Raises ValueError where that is more than an int32 counts.
    """
    rect = projected.rect
    depth = projected.depth
    TX = triton.cdiv(width, TILE)
    TY = triton.cdiv(height, TILE)
    P = len(depth)
    order = torch.sort(depth, stable=True).indices
    end = ((rect[:, 2] - rect[:, 0]) * (rect[:, 3] - rect[:, 1]))[order].cumsum(0)
    total = int(end[-1]) if P else 0
    if total >= 2**31:
        raise ValueError(
            f"{total} instances (a Gaussian in a tile) are more than {2**31 - 1}: render fewer "
            "views at once"
        )
    tile = torch.empty(total, dtype=torch.int32, device=rect.device)
    pair = torch.empty_like(tile)
    first = torch.empty_like(order)
    tiles = _tiles()
    backend.launch(
        _emit,
        (triton.cdiv(P, tiles["BLOCK"]),),
        order,
        end,
        rect,
        projected.view,
        first,
        tile,
        pair,
        P,
        TX,
        TY,
        **tiles,
    )
    tile, slot = torch.sort(tile, stable=True)
    edges = torch.arange(views * TX * TY + 1, dtype=torch.int32, device=rect.device)
    return Bins(pair[slot], slot, torch.searchsorted(tile, edges, out_int32=True), first)
