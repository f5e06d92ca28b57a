"""Lists of the Gaussians that each part of a tile sees, near to far.

P pairs, I instances (a pair in one tile), T tiles of all views, Q parts of a tile.

Pairs are sorted by depth first (P keys of 32 bits), emit their instances in that order, and a
second stable sort by tile (I keys of 16 bits where the tiles allow it) keeps it: ties in depth stay
in the order of the Gaussians. Both are torch.sort, a radix sort on a GPU; one sort of I 64-bit keys
(tile, depth) would move about eight times the bytes of the second.

A tile is cut into square parts, one program of the blend each, because most Gaussians are smaller
than a tile. An instance is marked with the parts in which its alpha reaches 1/255, from the least
exponent over a part's square, and goes to their lists alone. Each of its entries has a slot for the
sums of the backward pass. Slots are counted before the second sort, where a pair's instances are
neighbours: the blend writes there and the projection reads once. How many there are the host does
not know; the parts in the rectangles of all pairs, 1.7 to 2.7 times I on shells of Gaussians, are
room enough.
"""

import math

import torch

from kernels import backend
from kernels.backend import tl, triton
from kernels.gaussian.columns import load_columns
from kernels.gaussian.records import TILE, Bins, Packed

PAIRS = 1 << 28  # an instance's parts are the bits above
PAIR = tl.constexpr(PAIRS - 1)
LEAST = tl.constexpr(-math.log2(255))  # log2 of the least alpha that is blended
SHORT = 1 << 15  # tiles that keys of 16 bits count


def _tiles() -> dict:
    """Return the instances of a program of both kernels (not yet measured on a GPU)."""
    return {"BLOCK": 128, "num_warps": 4}


@triton.jit
def _touches(mx, my, shape, faint, left, top, SIDE: tl.constexpr):
    """Tell whether alpha may reach 1/255 in the square of SIDE pixels at (left, top).

    The exponent of 2, p u^2 + q (v + r u)^2, is greatest at its centre, or on an edge of the square
    that faces it, and `faint` where alpha is 1/255. What rounds is allowed for.
    """
    p, r, q = shape
    ua = left - mx
    va = top - my
    ub = ua + (SIDE - 1)
    vb = va + (SIDE - 1)
    u = tl.minimum(tl.maximum(ua, 0.0), ub)
    v = tl.minimum(tl.maximum(va, 0.0), vb)
    along = tl.minimum(tl.maximum(-r * u, va), vb) + r * u
    across = tl.minimum(tl.maximum(-v * (q * r / (p + q * r * r)), ua), ub)
    slope = v + r * across
    most = tl.maximum(p * u * u + q * along * along, p * across * across + q * slope * slope)
    u = tl.maximum(tl.abs(ua), tl.abs(ub))
    v = tl.maximum(tl.abs(va), tl.abs(vb)) + tl.abs(r) * u
    slack = 1e-3 - 4e-6 * (p * u * u + q * v * v)
    return ~(most < faint - slack)


@triton.jit(do_not_specialize=["P", "total", "bits", "TX", "TY"])
def _emit(
    # of the pairs: order by depth, end of the instances in that order; see Packed
    order_ptr,
    end_ptr,
    record_ptr,
    # results: first instance of a pair; tile, marked pair and number of parts of an instance
    first_ptr,
    tile_ptr,
    pair_ptr,
    count_ptr,
    P,
    total,
    bits,
    TX,
    TY,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < total
    # the first pair whose instances end behind n: how many do not, bit after bit from the highest
    at = tl.zeros([BLOCK], tl.int32)
    for i in range(0, bits):
        next = at + (1 << (bits - 1 - i))
        before = tl.load(end_ptr + next - 1, live & (next <= P), total) <= n
        at = tl.where(before, next, at)
    end = tl.load(end_ptr + at, live, 0)
    p = tl.load(order_ptr + at, live, 0)
    mx, my, wide, shear, high, strength, _, _, _, x0, y0, x1, y1, view, _, _ = load_columns(
        record_ptr, p, live, BLOCK, 16
    )
    x0 = x0.to(tl.int32, bitcast=True)
    y0 = y0.to(tl.int32, bitcast=True)
    x1 = x1.to(tl.int32, bitcast=True)
    y1 = y1.to(tl.int32, bitcast=True)
    left = x0 // PARTS
    top = y0 // PARTS
    across = tl.maximum(tl.cdiv(x1, PARTS) - left, 1)
    down = tl.cdiv(y1, PARTS) - top
    k = (n - end).to(tl.int32) + across * down
    tl.store(first_ptr + p, n, live & (k == 0))
    x = left + k % across
    y = top + k // across
    tl.store(tile_ptr + n, (view.to(tl.int32, bitcast=True) * TY + y) * TX + x, live)

    # past the end any shape that is one
    shape = tl.where(live, wide, -1.0), shear, tl.where(live, high, -1.0)
    faint = LEAST - strength
    marked = p.to(tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    SIDE: tl.constexpr = 16 // PARTS
    for q in tl.static_range(PARTS * PARTS):
        column = x * PARTS + q % PARTS
        row = y * PARTS + q // PARTS
        inside = (column >= x0) & (column < x1) & (row >= y0) & (row < y1)
        seen = inside & _touches(mx, my, shape, faint, column * SIDE, row * SIDE, SIDE)
        marked |= tl.where(seen, 1 << (28 + q), 0)
        count += seen.to(tl.int32)
    tl.store(pair_ptr + n, marked, live)
    tl.store(count_ptr + n, count, live)


@triton.jit
def _divide(
    # of an instance: its place before the sort by tile, and what is there
    place_ptr,
    marked_ptr,
    start_ptr,
    bounds_ptr,
    # results, see Bins
    pair_ptr,
    slot_ptr,
    size_ptr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    begin = tl.load(bounds_ptr + tile).to(tl.int64)
    end = tl.load(bounds_ptr + tile + 1).to(tl.int64)
    q = tl.arange(0, Q)
    size = tl.zeros([Q], tl.int32)
    list_at = Q * begin + q * (end - begin)
    for i in range(begin, end, BLOCK):
        n = i + tl.arange(0, BLOCK)
        live = n < end
        place = tl.load(place_ptr + n, live, 0)
        marked = tl.load(marked_ptr + place, live, 0)
        start = tl.load(start_ptr + place, live, 0)
        seen = (marked[:, None] >> (28 + q)[None, :]) & 1  # (BLOCK, Q)
        at = (list_at + size)[None, :] + tl.cumsum(seen, 0) - seen
        slot = start[:, None] + tl.cumsum(seen, 1) - seen
        tl.store(pair_ptr + at, (marked & PAIR)[:, None] + tl.zeros_like(seen), seen > 0)
        tl.store(slot_ptr + at, slot, seen > 0)
        size += tl.sum(seen, 0)
    tl.store(size_ptr + tile * Q + q, size)


def bin_tiles(packed: Packed, views: int, width: int, height: int) -> Bins:
    """Return the lists of all tiles.

    Reads two numbers from the device, the instances and the parts in all rectangles, and waits for
    them: the only wait of `splat`. Raises ValueError where the latter are more than an int32
    counts, and for too many pairs.
    """
    depth = packed.depth
    device = depth.device
    TX = triton.cdiv(width, TILE)
    TY = triton.cdiv(height, TILE)
    P = len(depth)
    T = views * TX * TY
    if P > PAIRS:
        raise ValueError(
            f"{P} pairs (a Gaussian in a view) are more than {PAIRS}: render fewer views at once"
        )
    order = torch.sort(depth, stable=True).indices
    end = packed.tiles[order].cumsum(0)
    total, slots = torch.stack([end[-1], packed.cells.sum()]).tolist() if P else (0, 0)
    if slots >= 2**31:
        raise ValueError(
            f"{slots} instances (a Gaussian in a part of a tile) are more than {2**31 - 1}: render "
            "fewer views at once"
        )
    Q = packed.parts**2
    tile = torch.empty(total, dtype=torch.int16 if T < SHORT else torch.int32, device=device)
    marked = torch.empty(total, dtype=torch.int32, device=device)
    count = torch.empty(total, dtype=torch.int8, device=device)
    first = torch.empty_like(order)
    tiles = _tiles()
    backend.launch(
        _emit,
        (triton.cdiv(total, tiles["BLOCK"]),),
        order,
        end,
        packed.record,
        first,
        tile,
        marked,
        count,
        P,
        total,
        P.bit_length(),
        TX,
        TY,
        PARTS=packed.parts,
        **tiles,
    )
    tile, place = torch.sort(tile, stable=True)
    bounds = torch.searchsorted(
        tile, torch.arange(T + 1, dtype=tile.dtype, device=device), out_int32=True
    )
    start = torch.zeros(total + 1, dtype=torch.int32, device=device)
    torch.cumsum(count, 0, dtype=torch.int32, out=start[1:])
    pair = torch.empty(Q * total, dtype=torch.int32, device=device)
    slot = torch.empty_like(pair)
    size = torch.empty(T, Q, dtype=torch.int32, device=device)
    backend.launch(_divide, (T,), place, marked, start, bounds, pair, slot, size, Q=Q, **tiles)
    return Bins(pair, slot, bounds, size, first, start, slots)
