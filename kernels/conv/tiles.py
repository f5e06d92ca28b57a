"""The Triton programs of `kernels.conv.launch`: products of gathered rows with a weight, gradients.

R rows in G groups, M matrices of the weight [CO, M, CI]. A group's taps are in PARTS parts of T: a
part is a list of rows in an order of its own. Of list q = g * PARTS + part, order [Q, R] says which
row of the group is where, rows [Q * T, R] which row of the other side is under its tap t, -1 for
none, and list [Q, tiles, 1 + T] which taps a tile of ROWS rows has. Both products keep up to 192
channels in a program, as a wide and a narrow accumulator (a tile's width is a power of two, 192 is
none): the gathered rows, which are most of the traffic, are read once.
"""

from kernels.backend import tl, triton


@triton.jit(do_not_specialize=["R"])
def _list_taps(
    rows_ptr,
    list_ptr,
    R,
    T: tl.constexpr,
    PAD_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program: the taps that any of ROWS rows of a list has.

    list [Q, tiles, 1 + T]: how many, and which.
    """
    tile = tl.program_id(0)
    q = tl.program_id(1)
    at = tile * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, PAD_T)
    near = rows_ptr + (q * T + t).to(tl.int64)[:, None] * R + at[None, :]
    near = tl.load(near, mask=(t < T)[:, None] & (at < R)[None, :], other=-1)  # [PAD_T, ROWS]
    some = (tl.max(near, 1) >= 0).to(tl.int32)  # [PAD_T]
    entries = list_ptr + (q * tl.num_programs(0) + tile).to(tl.int64) * (1 + T)
    tl.store(entries, tl.sum(some, 0))
    tl.store(entries + tl.cumsum(some, 0), t, mask=some > 0)


@triton.jit(do_not_specialize=["R"])
def _list_pairs(
    taps_ptr,
    before_ptr,
    pairs_ptr,
    R,
    G: tl.constexpr,
    T: tl.constexpr,
    PAD_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program: the pairs of ROWS rows of a group and the rows under their taps.

    before [tiles, G * T]: how many pairs of a tap the tiles before have; pairs [2, G * T, R]: the
    rows under a tap, and the rows r * G + g that have it, in order.
    """
    tile = tl.program_id(0)
    g = tl.program_id(1)
    at = tile * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, PAD_T)
    row = at.to(tl.int64) * G + g
    mask = (at < R)[:, None] & (t < T)[None, :]
    near = tl.load(taps_ptr + row[:, None] * T + t[None, :], mask=mask, other=-1)  # [ROWS, PAD_T]
    some = (near >= 0).to(tl.int32)
    before = tl.load(before_ptr + tile.to(tl.int64) * (G * T) + g * T + t, mask=t < T, other=0)
    place = before[None, :] + tl.cumsum(some, 0) - some
    pair = pairs_ptr + (g * T + t).to(tl.int64)[None, :] * R + place
    other = row[:, None].to(tl.int32) + tl.zeros_like(near)
    tl.store(pair, near, mask=near >= 0)
    tl.store(pair + tl.full([], G * T, tl.int64) * R, other, mask=near >= 0)


@triton.jit(do_not_specialize=["R", "part"])
def _conv_product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    order_ptr,
    list_ptr,
    before_ptr,
    out_ptr,
    R,
    part,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    T: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    BACK: tl.constexpr,
    MIRROR: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: ROWS rows of a group, WIDE + NARROW channels, the taps of one of PARTS parts.

    The sum goes on from before, that of the parts before. BACK: from CO to CI channels; MIRROR:
    matrix m belongs to tap M - 1 - m. A turn of the loop: STEPS products of STEP channels.
    """
    IN: tl.constexpr = CO if BACK else CI
    OUT: tl.constexpr = CI if BACK else CO
    M: tl.constexpr = G * PARTS * T
    IN_STRIDE: tl.constexpr = M * CI if BACK else 1
    OUT_STRIDE: tl.constexpr = 1 if BACK else M * CI
    BLOCKS: tl.constexpr = (OUT + WIDE + NARROW - 1) // (WIDE + NARROW)
    TURNS: tl.constexpr = (IN + STEP * STEPS - 1) // (STEP * STEPS)
    tile = tl.program_id(0) // BLOCKS
    g = tl.program_id(1)
    q = g * PARTS + part
    at = tile * ROWS + tl.arange(0, ROWS)
    live = at < R
    row = at
    if order_ptr is not None:
        row = tl.load(order_ptr + q.to(tl.int64) * R + at, mask=live, other=0)
    row = row.to(tl.int64) * G + g
    entries = list_ptr + (q * (tl.num_programs(0) // BLOCKS) + tile).to(tl.int64) * (1 + T)
    c = tl.program_id(0) % BLOCKS * (WIDE + NARROW) + tl.arange(0, WIDE)
    fits = (c < OUT) | (OUT % (WIDE + NARROW) == 0)  # compiled away where all channels fit
    mask = live[:, None] & fits[None, :]
    if before_ptr is None:
        total = tl.zeros([ROWS, WIDE], tl.float32)
    else:
        total = tl.load(before_ptr + row[:, None] * OUT + c[None, :], mask=mask, other=0.0)
    if NARROW > 0:
        c2 = tl.program_id(0) % BLOCKS * (WIDE + NARROW) + WIDE + tl.arange(0, NARROW)
        fits2 = (c2 < OUT) | (OUT % (WIDE + NARROW) == 0)
        mask2 = live[:, None] & fits2[None, :]
        if before_ptr is None:
            total2 = tl.zeros([ROWS, NARROW], tl.float32)
        else:
            total2 = tl.load(before_ptr + row[:, None] * OUT + c2[None, :], mask=mask2, other=0.0)
    for i in tl.range(0, tl.load(entries) * TURNS, num_stages=STAGES):
        m = q * T + tl.load(entries + 1 + i // TURNS)
        near = tl.load(rows_ptr + m.to(tl.int64) * R + at, mask=live, other=-1)  # [ROWS]
        some = (near >= 0)[:, None]
        x_row = x_ptr + near.to(tl.int64)[:, None] * IN
        w_m = weight_ptr + (M - 1 - m if MIRROR else m) * CI
        for s in tl.static_range(STEPS):  # the row is found once for all of them
            a = (i % TURNS * STEPS + s) * STEP + tl.arange(0, STEP)
            inside = (a < IN) | (IN % STEP == 0)
            x = tl.load(x_row + a[None, :], mask=some & inside[None, :], other=0.0)
            w_a = w_m + a[:, None] * IN_STRIDE
            w_mask = inside[:, None] & fits[None, :]
            w = tl.load(w_a + c[None, :] * OUT_STRIDE, mask=w_mask, other=0.0)  # [STEP, WIDE]
            total = tl.dot(x, w, total, input_precision="ieee")
            if NARROW > 0:
                w2_mask = inside[:, None] & fits2[None, :]
                w2 = tl.load(w_a + c2[None, :] * OUT_STRIDE, mask=w2_mask, other=0.0)
                total2 = tl.dot(x, w2, total2, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, mask=c < OUT, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row[:, None] * OUT
    tl.store(out + c[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)
    if NARROW > 0:
        if bias_ptr is not None:
            total2 += tl.load(bias_ptr + c2, mask=c2 < OUT, other=0.0).to(tl.float32)[None, :]
        tl.store(out + c2[None, :], total2.to(out_ptr.dtype.element_ty), mask=mask2)


@triton.jit(do_not_specialize=["R"])
def _conv_weight_gradient(
    x_ptr,
    grad_ptr,
    pairs_ptr,
    count_ptr,
    part_ptr,
    R,
    CI: tl.constexpr,
    CO: tl.constexpr,
    TILE_C: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: its share of the pairs of rows of a matrix, TILE_C x (WIDE + NARROW) channels.

    pairs [2, M, R]: rows of x, and rows of grad; of a matrix the first count [M] are pairs. part
    [shares, CO, M, CI] fp32 is summed over shares afterwards.
    """
    BLOCKS: tl.constexpr = (CI + WIDE + NARROW - 1) // (WIDE + NARROW)
    m = tl.program_id(1)
    M = tl.num_programs(1)
    share = tl.program_id(2)
    c = tl.program_id(0) // BLOCKS * TILE_C + tl.arange(0, TILE_C)
    a = tl.program_id(0) % BLOCKS * (WIDE + NARROW) + tl.arange(0, WIDE)
    total = tl.zeros([TILE_C, WIDE], tl.float32)
    if NARROW > 0:
        a2 = tl.program_id(0) % BLOCKS * (WIDE + NARROW) + WIDE + tl.arange(0, NARROW)
        total2 = tl.zeros([TILE_C, NARROW], tl.float32)
    count = tl.load(count_ptr + m)
    steps = (count + STEP - 1) // STEP
    each = (steps + tl.num_programs(2) - 1) // tl.num_programs(2)
    rows = pairs_ptr + m.to(tl.int64) * R
    others = rows + M.to(tl.int64) * R
    for i in tl.range(share * each, tl.minimum(share * each + each, steps), num_stages=STAGES):
        at = i * STEP + tl.arange(0, STEP)
        live = at < count
        row = tl.load(rows + at, mask=live, other=0).to(tl.int64)  # [STEP]
        other = tl.load(others + at, mask=live, other=0).to(tl.int64)
        up_mask = live[:, None] & (c < CO)[None, :]
        up = tl.load(grad_ptr + other[:, None] * CO + c[None, :], mask=up_mask, other=0.0)
        x_at = x_ptr + row[:, None] * CI
        x = tl.load(x_at + a[None, :], mask=live[:, None] & (a < CI)[None, :], other=0.0)
        total = tl.dot(tl.trans(up), x, total, input_precision="ieee")
        if NARROW > 0:
            x2_mask = live[:, None] & (a2 < CI)[None, :]
            x2 = tl.load(x_at + a2[None, :], mask=x2_mask, other=0.0)
            total2 = tl.dot(tl.trans(up), x2, total2, input_precision="ieee")
    part = part_ptr + (((share * CO + c) * M + m).to(tl.int64) * CI)[:, None]
    tl.store(part + a[None, :], total, mask=(c < CO)[:, None] & (a < CI)[None, :])
    if NARROW > 0:
        tl.store(part + a2[None, :], total2, mask=(c < CO)[:, None] & (a2 < CI)[None, :])
