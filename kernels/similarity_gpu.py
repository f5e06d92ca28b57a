"""Kernels of kernels.similarity: structural similarity on a GPU and its gradient.

A lane is one column of a strip of ROWS rows; it walks down. A row is filtered horizontally from
eleven shifted loads (the first misses the cache, ten hit it) and added to the eleven output rows
that it reaches, whose sums live in registers until they are complete. So the filter is separable,
with no shared memory and no second pass; a strip pays for ten extra rows.
"""

import math

from kernels.backend import tl, triton

RADIUS = 5  # of the window


def _taps() -> list[float]:
    """Return the weights of the window by distance from its centre, 0 to RADIUS.

    All eleven sum to one.
    """
    raw = [math.exp(-(d * d) / (2 * 1.5**2)) for d in range(RADIUS + 1)]
    return [w / (2 * sum(raw) - raw[0]) for w in raw]


TAPS = _taps()
STABILISERS = 0.01**2, 0.03**2
T0, T1, T2, T3, T4, T5 = (tl.constexpr(w) for w in TAPS)
# in kernels a constant stands to the right: the interpreter needs it
C1, C2 = (tl.constexpr(c) for c in STABILISERS)


@triton.jit
def _place(programs, C, H, W, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Return the column, the strip's first row and the start of the plane of each lane [LANES].

    The rows of an idle lane are below the image. The last result is the stride of the saved maps.
    """
    strips = tl.cdiv(H, ROWS)
    lane = tl.program_id(0) % programs * LANES + tl.arange(0, LANES)
    image = (tl.program_id(0) // programs).to(tl.int64)
    channel = lane // W // strips
    first = tl.where(channel < C, lane // W % strips * ROWS, H + 5)
    # elements of the batch
    size = (tl.num_programs(0) // programs).to(tl.int64) * C * H * W
    return lane % W, first, (image * C + channel) * H * W, size


@triton.jit
def _add_images(ha, hb, hsq, hab, a_ptr, b_ptr, x, end, D: tl.constexpr, TAP: tl.constexpr):
    """Add the pixels D columns to the left and right of x to the four sums of a row.

    They are zero outside 0 <= column < end.
    """
    left = (x >= D) & (end > 0)
    right = x < end - D
    a0 = tl.load(a_ptr - D, mask=left, other=0.0).to(tl.float32)
    a1 = tl.load(a_ptr + D, mask=right, other=0.0).to(tl.float32)
    b0 = tl.load(b_ptr - D, mask=left, other=0.0).to(tl.float32)
    b1 = tl.load(b_ptr + D, mask=right, other=0.0).to(tl.float32)
    ha += (a0 + a1) * TAP
    hb += (b0 + b1) * TAP
    hsq += (a0 * a0 + a1 * a1 + b0 * b0 + b1 * b1) * TAP
    hab += (a0 * b0 + a1 * b1) * TAP
    return ha, hb, hsq, hab


@triton.jit
def _add_maps(
    ha, hb, hsq, hab, ptr, size, x, end, D: tl.constexpr, TAP: tl.constexpr, BOTH: tl.constexpr
):
    """Add pixels of the saved maps, as `_add_images` does."""
    left = (x >= D) & (end > 0)
    right = x < end - D
    ha += (tl.load(ptr - D, mask=left, other=0.0) + tl.load(ptr + D, mask=right, other=0.0)) * TAP
    ptr += size
    hsq += (tl.load(ptr - D, mask=left, other=0.0) + tl.load(ptr + D, mask=right, other=0.0)) * TAP
    ptr += size
    hab += (tl.load(ptr - D, mask=left, other=0.0) + tl.load(ptr + D, mask=right, other=0.0)) * TAP
    if BOTH:
        ptr += size
        hb += (
            tl.load(ptr - D, mask=left, other=0.0) + tl.load(ptr + D, mask=right, other=0.0)
        ) * TAP
    return ha, hb, hsq, hab


@triton.jit
def _ring(LANES: tl.constexpr):
    """Return zeros for the ten output rows under way; the first is the one completed next."""
    z = tl.zeros([LANES], tl.float32)
    return z, z, z, z, z, z, z, z, z, z


@triton.jit
def _push(r, h):
    """Add row h to the eleven output rows that it reaches.

    Returns the row that it completes and the ten under way.
    """
    h0 = h * T0
    h1 = h * T1
    h2 = h * T2
    h3 = h * T3
    h4 = h * T4
    h5 = h * T5
    return r[0] + h5, (
        r[1] + h4,
        r[2] + h3,
        r[3] + h2,
        r[4] + h1,
        r[5] + h0,
        r[6] + h1,
        r[7] + h2,
        r[8] + h3,
        r[9] + h4,
        h5,
    )


@triton.jit(do_not_specialize=["programs", "C", "H", "W"])
def _ssim_fwd(
    a_ptr,
    b_ptr,
    partial_ptr,
    maps_ptr,
    programs,
    C,
    H,
    W,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    MAPS: tl.constexpr,
):
    x, first, plane, size = _place(programs, C, H, W, LANES, ROWS)
    ring_a = _ring(LANES)
    ring_b = _ring(LANES)
    ring_sq = _ring(LANES)
    ring_ab = _ring(LANES)
    total = tl.zeros([LANES], tl.float32)
    for i in range(ROWS + 10):
        y = first - 5 + i
        end = tl.where((y >= 0) & (y < H), W, 0)  # a row outside the image has no columns
        at = plane + y * W + x
        a = tl.load(a_ptr + at, mask=x < end, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + at, mask=x < end, other=0.0).to(tl.float32)
        ha = a * T0
        hb = b * T0
        hsq = (a * a + b * b) * T0
        hab = a * b * T0
        ha, hb, hsq, hab = _add_images(ha, hb, hsq, hab, a_ptr + at, b_ptr + at, x, end, 1, T1)
        ha, hb, hsq, hab = _add_images(ha, hb, hsq, hab, a_ptr + at, b_ptr + at, x, end, 2, T2)
        ha, hb, hsq, hab = _add_images(ha, hb, hsq, hab, a_ptr + at, b_ptr + at, x, end, 3, T3)
        ha, hb, hsq, hab = _add_images(ha, hb, hsq, hab, a_ptr + at, b_ptr + at, x, end, 4, T4)
        ha, hb, hsq, hab = _add_images(ha, hb, hsq, hab, a_ptr + at, b_ptr + at, x, end, 5, T5)
        ma, ring_a = _push(ring_a, ha)
        mb, ring_b = _push(ring_b, hb)
        sq, ring_sq = _push(ring_sq, hsq)
        ab, ring_ab = _push(ring_ab, hab)
        # the completed row; before `first` it is the strip above's
        live = (y - 5 >= first) & (y - 5 < H)
        square = ma * ma + mb * mb
        cross = 2 * ma * mb
        A1 = cross + C1
        A2 = 2 * ab - cross + C2
        B1 = square + C1
        B2 = sq - square + C2
        value = A1 * A2 / (B1 * B2)
        total += tl.where(live, value, 0.0)
        if MAPS > 0:
            to = maps_ptr + at - 5 * W
            u = 2 * (A2 - A1) / (B1 * B2)
            v = 2 * value * (1 / B2 - 1 / B1)
            tl.store(to, mb * u + ma * v, mask=live)
            tl.store(to + size, -value / B2, mask=live)
            tl.store(to + 2 * size, 2 * A1 / (B1 * B2), mask=live)
            if MAPS > 3:
                tl.store(to + 3 * size, ma * u + mb * v, mask=live)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["programs", "C", "H", "W"])
def _ssim_bwd(
    a_ptr,
    b_ptr,
    maps_ptr,
    grad_ptr,
    da_ptr,
    db_ptr,
    programs,
    C,
    H,
    W,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BOTH: tl.constexpr,
):
    x, first, plane, size = _place(programs, C, H, W, LANES, ROWS)
    scale = tl.load(grad_ptr + tl.program_id(0) // programs).to(tl.float32)
    ring_a = _ring(LANES)
    ring_b = _ring(LANES)
    ring_sq = _ring(LANES)
    ring_ab = _ring(LANES)
    for i in range(ROWS + 10):
        y = first - 5 + i
        end = tl.where((y >= 0) & (y < H), W, 0)
        at = plane + y * W + x
        row = maps_ptr + at
        ha = tl.load(row, mask=x < end, other=0.0) * T0
        hsq = tl.load(row + size, mask=x < end, other=0.0) * T0
        hab = tl.load(row + 2 * size, mask=x < end, other=0.0) * T0
        hb = tl.load(row + 3 * size, mask=x < end, other=0.0) * T0 if BOTH else hab
        ha, hb, hsq, hab = _add_maps(ha, hb, hsq, hab, row, size, x, end, 1, T1, BOTH)
        ha, hb, hsq, hab = _add_maps(ha, hb, hsq, hab, row, size, x, end, 2, T2, BOTH)
        ha, hb, hsq, hab = _add_maps(ha, hb, hsq, hab, row, size, x, end, 3, T3, BOTH)
        ha, hb, hsq, hab = _add_maps(ha, hb, hsq, hab, row, size, x, end, 4, T4, BOTH)
        ha, hb, hsq, hab = _add_maps(ha, hb, hsq, hab, row, size, x, end, 5, T5, BOTH)
        ma, ring_a = _push(ring_a, ha)
        sq, ring_sq = _push(ring_sq, hsq)
        ab, ring_ab = _push(ring_ab, hab)
        live = (y - 5 >= first) & (y - 5 < H)
        to = at - 5 * W
        a = tl.load(a_ptr + to, mask=live, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + to, mask=live, other=0.0).to(tl.float32)
        tl.store(da_ptr + to, scale * (ma + 2 * a * sq + b * ab), mask=live)
        if BOTH:
            mb, ring_b = _push(ring_b, hb)
            tl.store(db_ptr + to, scale * (mb + 2 * b * sq + a * ab), mask=live)
