"""The Triton programs of `kernels.conv.op`: products of gathered rows with a weight, and gradients.

R rows in G groups, T taps a group, M = G * T matrices of the weight [CO, M, CI]; taps [R, G, T]
holds the row of the other side under each tap, -1 for none. Both products keep up to 192 output
channels in a program, as a wide and a narrow accumulator (a tile's width is a power of two, 192 is
none): the gathered rows, which are most of the traffic, are read once.
"""

from kernels.backend import tl, triton


@triton.jit(do_not_specialize=["R"])
def _list_taps(
    taps_ptr,
    order_ptr,
    list_ptr,
    some_ptr,
    R,
    G: tl.constexpr,
    T: tl.constexpr,
    PAD_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program: the taps that any of ROWS rows of a group has.

    list [G, tiles, 1 + T]: how many, and which; some [G * T, tiles]: 1 where a tile has a tap.
    """
    tile = tl.program_id(0)
    g = tl.program_id(1)
    tiles = tl.num_programs(0)
    at = tile * ROWS + tl.arange(0, ROWS)
    live = at < R
    row = at
    if order_ptr is not None:
        row = tl.load(order_ptr + g.to(tl.int64) * R + at, mask=live, other=0)
    t = tl.arange(0, PAD_T)
    near = taps_ptr + (row.to(tl.int64) * G + g)[:, None] * T + t[None, :]
    near = tl.load(near, mask=live[:, None] & (t < T)[None, :], other=-1)  # [ROWS, PAD_T]
    some = (tl.max(near, 0) >= 0).to(tl.int32)  # [PAD_T]
    entries = list_ptr + (g * tiles + tile).to(tl.int64) * (1 + T)
    tl.store(entries, tl.sum(some, 0))
    tl.store(entries + tl.cumsum(some, 0), t, mask=some > 0)
    tl.store(some_ptr + (g * T + t).to(tl.int64) * tiles + tile, some.to(tl.int8), mask=t < T)


@triton.jit(do_not_specialize=["R"])
def _conv_product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    taps_ptr,
    order_ptr,
    list_ptr,
    out_ptr,
    R,
    G: tl.constexpr,
    T: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    BACK: tl.constexpr,
    MIRROR: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: ROWS rows of a group, WIDE + NARROW channels.

    BACK: from CO to CI channels; MIRROR: matrix t belongs to tap T - 1 - t.
    """
    IN: tl.constexpr = CO if BACK else CI
    OUT: tl.constexpr = CI if BACK else CO
    IN_STRIDE: tl.constexpr = G * T * CI if BACK else 1
    OUT_STRIDE: tl.constexpr = 1 if BACK else G * T * CI
    BLOCKS: tl.constexpr = (OUT + WIDE + NARROW - 1) // (WIDE + NARROW)
    STEPS: tl.constexpr = (IN + STEP - 1) // STEP
    tile = tl.program_id(0) // BLOCKS
    g = tl.program_id(1)
    tiles = tl.num_programs(0) // BLOCKS
    at = tile * ROWS + tl.arange(0, ROWS)
    live = at < R
    row = at
    if order_ptr is not None:
        row = tl.load(order_ptr + g.to(tl.int64) * R + at, mask=live, other=0)
    row = row.to(tl.int64) * G + g
    taps = taps_ptr + row * T
    entries = list_ptr + (g * tiles + tile).to(tl.int64) * (1 + T)
    c = tl.program_id(0) % BLOCKS * (WIDE + NARROW) + tl.arange(0, WIDE)
    total = tl.zeros([ROWS, WIDE], tl.float32)
    if NARROW > 0:
        c2 = tl.program_id(0) % BLOCKS * (WIDE + NARROW) + WIDE + tl.arange(0, NARROW)
        total2 = tl.zeros([ROWS, NARROW], tl.float32)
    for i in tl.range(0, tl.load(entries) * STEPS, num_stages=STAGES):
        t = tl.load(entries + 1 + i // STEPS)
        near = tl.load(taps + t, mask=live, other=-1)  # [ROWS]
        a = i % STEPS * STEP + tl.arange(0, STEP)
        in_mask = a < IN
        x_at = x_ptr + near.to(tl.int64)[:, None] * IN + a[None, :]
        x = tl.load(x_at, mask=(near >= 0)[:, None] & in_mask[None, :], other=0.0)
        matrix = weight_ptr + (g * T + (T - 1 - t if MIRROR else t)) * CI
        at_a = matrix + a[:, None] * IN_STRIDE
        w_mask = in_mask[:, None] & (c < OUT)[None, :]
        w = tl.load(at_a + c[None, :] * OUT_STRIDE, mask=w_mask, other=0.0)  # [STEP, WIDE]
        total = tl.dot(x, w, total, input_precision="ieee")
        if NARROW > 0:
            w2_mask = in_mask[:, None] & (c2 < OUT)[None, :]
            w2 = tl.load(at_a + c2[None, :] * OUT_STRIDE, mask=w2_mask, other=0.0)
            total2 = tl.dot(x, w2, total2, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, mask=c < OUT, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row[:, None] * OUT
    out_mask = live[:, None] & (c < OUT)[None, :]
    tl.store(out + c[None, :], total.to(out_ptr.dtype.element_ty), mask=out_mask)
    if NARROW > 0:
        if bias_ptr is not None:
            total2 += tl.load(bias_ptr + c2, mask=c2 < OUT, other=0.0).to(tl.float32)[None, :]
        out2_mask = live[:, None] & (c2 < OUT)[None, :]
        tl.store(out + c2[None, :], total2.to(out_ptr.dtype.element_ty), mask=out2_mask)


@triton.jit(do_not_specialize=["R", "tiles"])
def _conv_weight_gradient(
    x_ptr,
    grad_ptr,
    taps_ptr,
    order_ptr,
    count_ptr,
    list_ptr,
    part_ptr,
    R,
    tiles,
    G: tl.constexpr,
    T: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    TILE_A: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: its share of the rows that have a tap, TILE_A x (WIDE + NARROW) channels.

    count [M] and list [M, tiles] int32 name the tiles of ROWS rows that have the tap of a matrix;
    part [shares, M, CI, CO] fp32 is summed over shares afterwards.
    """
    BLOCKS: tl.constexpr = (CO + WIDE + NARROW - 1) // (WIDE + NARROW)
    m = tl.program_id(1)
    share = tl.program_id(2)
    g = m // T
    t = m % T
    a = tl.program_id(0) // BLOCKS * TILE_A + tl.arange(0, TILE_A)
    c = tl.program_id(0) % BLOCKS * (WIDE + NARROW) + tl.arange(0, WIDE)
    total = tl.zeros([TILE_A, WIDE], tl.float32)
    if NARROW > 0:
        c2 = tl.program_id(0) % BLOCKS * (WIDE + NARROW) + WIDE + tl.arange(0, NARROW)
        total2 = tl.zeros([TILE_A, NARROW], tl.float32)
    PIECES: tl.constexpr = ROWS // STEP  # of a listed tile
    count = tl.load(count_ptr + m) * PIECES
    each = (count + tl.num_programs(2) - 1) // tl.num_programs(2)
    for i in tl.range(share * each, tl.minimum(share * each + each, count), num_stages=STAGES):
        tile = tl.load(list_ptr + m.to(tl.int64) * tiles + i // PIECES)
        at = tile * ROWS + i % PIECES * STEP + tl.arange(0, STEP)
        live = at < R
        row = at
        if order_ptr is not None:
            row = tl.load(order_ptr + g.to(tl.int64) * R + at, mask=live, other=0)
        row = row.to(tl.int64) * G + g
        near = tl.load(taps_ptr + row * T + t, mask=live, other=-1)  # [STEP]
        live = near >= 0
        x_at = x_ptr + near.to(tl.int64)[:, None] * CI + a[None, :]
        x = tl.load(x_at, mask=live[:, None] & (a < CI)[None, :], other=0.0)
        up_at = grad_ptr + row[:, None] * CO
        up = tl.load(up_at + c[None, :], mask=live[:, None] & (c < CO)[None, :], other=0.0)
        total = tl.dot(tl.trans(x), up, total, input_precision="ieee")
        if NARROW > 0:
            up2_mask = live[:, None] & (c2 < CO)[None, :]
            up2 = tl.load(up_at + c2[None, :], mask=up2_mask, other=0.0)
            total2 = tl.dot(tl.trans(x), up2, total2, input_precision="ieee")
    part = part_ptr + ((share * tl.num_programs(1) + m).to(tl.int64) * CI + a)[:, None] * CO
    tl.store(part + c[None, :], total, mask=(a < CI)[:, None] & (c < CO)[None, :])
    if NARROW > 0:
        tl.store(part + c2[None, :], total2, mask=(a < CI)[:, None] & (c2 < CO)[None, :])
