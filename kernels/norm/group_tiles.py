"""The Triton programs of `kernels.norm.group`: N rows, C channels in GROUPS groups, B samples.

P programs share the rows of a sample evenly: of N rows program p walks N p / P : N (p + 1) / P,
ROWS at a time. Channels are padded to TILE_C, a power of two. What a program sums up stays in each
lane's registers until its last row, so that no warp waits for another on the way.

Pointers that travel together: x and dy [N, C], starts [B + 1] int32 (sample b has the rows
starts[b] : starts[b + 1]); weight and bias [C]; mean and rstd [B, GROUPS] fp32, the statistics of
each group. `part` [B, P, 2, C] fp32 holds two numbers per channel of each program, which the next
pass adds up in a fixed order.
"""

from kernels.backend import tl, triton


@triton.jit
def _share(starts_ptr, p, b, P):
    """Return the rows first : end of sample b that are program p's."""
    begin = tl.load(starts_ptr + b).to(tl.int64)
    rows = tl.load(starts_ptr + b + 1) - begin
    return begin + rows * p // P, begin + rows * (p + 1) // P


@triton.jit
def _partial_statistics(
    x_ptr,
    starts_ptr,
    part_ptr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
    P: tl.constexpr,
):
    """A program: mean and sum of squared deviations of each channel over its rows of a sample.

    Every lane keeps those of the rows that it sees (Welford, Note on a Method for Calculating
    Corrected Sums of Squares and Products, 1962); they are merged at the end.
    """
    p = tl.program_id(0)
    b = tl.program_id(1)
    begin, end = _share(starts_ptr, p, b, P)
    c = tl.arange(0, TILE_C)
    # means start from the program's first row, so that the mean of equal values is that value
    own_mask = c < tl.where(begin < end, C, 0)
    own = tl.load(x_ptr + begin * C + c, mask=own_mask, other=0.0).to(tl.float32)
    mean = own[None, :] + tl.zeros([ROWS, TILE_C], tl.float32)
    squares = tl.zeros([ROWS, TILE_C], tl.float32)
    seen = 0.0
    for first in range(begin, end, ROWS):
        n = first + tl.arange(0, ROWS)
        live = (n < end)[:, None] & (c < C)[None, :]  # [ROWS, TILE_C]
        x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
        seen += 1.0
        deviation = tl.where(live, x - mean, 0.0)
        mean += deviation * (1.0 / seen)
        squares += deviation * (x - mean)
    rows = (end - begin).to(tl.int32)
    count = ((rows - tl.arange(0, ROWS) + ROWS - 1) // ROWS).to(tl.float32)[:, None]
    offset = mean - own[None, :]
    step = tl.sum(count * offset, 0) * (1.0 / tl.maximum(rows, 1).to(tl.float32))
    offset -= step[None, :]
    squares = tl.sum(squares + count * offset * offset, 0)
    mean = own + step
    part = part_ptr + (b * P + p) * 2 * C + c
    tl.store(part, mean, mask=c < C)
    tl.store(part + C, squares, mask=c < C)


@triton.jit
def _merge_statistics(
    part_ptr,
    starts_ptr,
    mean_ptr,
    rstd_ptr,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_W: tl.constexpr,
    P: tl.constexpr,
):
    """A program: mean and reciprocal deviation of one group of one sample."""
    g = tl.program_id(0)
    b = tl.program_id(1)
    W: tl.constexpr = C // GROUPS
    rows = tl.load(starts_ptr + b + 1) - tl.load(starts_ptr + b)
    p = tl.arange(0, triton.next_power_of_2(P))
    w = tl.arange(0, TILE_W)
    count = rows.to(tl.int64) * (p + 1) // P - rows.to(tl.int64) * p // P  # rows of program p
    count = count.to(tl.float32)[:, None]  # [P, 1]
    part = part_ptr + (b * P + p)[:, None] * 2 * C + g * W + w[None, :]
    live = (p < P)[:, None] & (w < W)[None, :]
    means = tl.load(part, mask=live, other=0.0)  # [P, TILE_W]
    squares = tl.load(part + C, mask=live, other=0.0)
    elements = tl.maximum(rows, 1).to(tl.float32) * W
    # a mean of the last program, which has rows if any has; from it that of equal values is exact
    some = tl.load(part_ptr + (b * P + P - 1) * 2 * C + g * W)
    offsets = tl.where(live, count * (means - some), 0.0)
    mean = some + tl.div_rn(tl.sum(tl.sum(offsets, 1), 0), elements)
    squares += tl.where(live, count * (means - mean) * (means - mean), 0.0)
    variance = tl.div_rn(tl.sum(tl.sum(squares, 1), 0), elements)
    tl.store(mean_ptr + b * GROUPS + g, mean)
    tl.store(rstd_ptr + b * GROUPS + g, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _group_norm_fwd(
    x_ptr,
    weight_ptr,
    bias_ptr,
    starts_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
    P: tl.constexpr,
):
    """A program: norm, affine and SiLU of its rows of a sample."""
    p = tl.program_id(0)
    b = tl.program_id(1)
    begin, end = _share(starts_ptr, p, b, P)
    c = tl.arange(0, TILE_C)
    group = b * GROUPS + c // (C // GROUPS)
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)  # [TILE_C]
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    for first in range(begin, end, ROWS):
        n = first + tl.arange(0, ROWS)
        live = (n < end)[:, None] & (c < C)[None, :]  # [ROWS, TILE_C]
        x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
        if SILU:
            y = y * _sigmoid(y)
        tl.store(y_ptr + n[:, None] * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _inner_gradient(x_ptr, dy_ptr, at, live, weight, bias, mean, rstd, SILU: tl.constexpr):
    """The normed rows, and the gradient of the affine result before the SiLU."""
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    normed = (x - mean[None, :]) * rstd[None, :]
    dz = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)  # zero where not live
    if SILU:
        z = normed * weight[None, :] + bias[None, :]
        s = _sigmoid(z)
        dz *= s * (1.0 + z * (1.0 - s))
    return normed, dz


@triton.jit
def _partial_gradients(
    x_ptr,
    weight_ptr,
    bias_ptr,
    starts_ptr,
    mean_ptr,
    rstd_ptr,
    dy_ptr,
    part_ptr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
    P: tl.constexpr,
):
    """A program: the sums over its rows of a sample of dz * normed and of dz."""
    p = tl.program_id(0)
    b = tl.program_id(1)
    begin, end = _share(starts_ptr, p, b, P)
    c = tl.arange(0, TILE_C)
    group = b * GROUPS + c // (C // GROUPS)
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, TILE_C], tl.float32)
    dbias = tl.zeros([ROWS, TILE_C], tl.float32)
    for first in range(begin, end, ROWS):
        n = first + tl.arange(0, ROWS)
        live = (n < end)[:, None] & (c < C)[None, :]
        normed, dz = _inner_gradient(
            x_ptr, dy_ptr, n[:, None] * C + c[None, :], live, weight, bias, mean, rstd, SILU
        )
        dweight += dz * normed
        dbias += dz
    part = part_ptr + (b * P + p) * 2 * C + c
    tl.store(part, tl.sum(dweight, 0), mask=c < C)
    tl.store(part + C, tl.sum(dbias, 0), mask=c < C)


@triton.jit
def _group_norm_bwd(
    x_ptr,
    weight_ptr,
    bias_ptr,
    starts_ptr,
    mean_ptr,
    rstd_ptr,
    dy_ptr,
    along_ptr,
    dx_ptr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
    P: tl.constexpr,
):
    """A program: dx of its rows of a sample.

    `along` [B, 2, GROUPS] holds each group's means of weight * dz * normed and of weight * dz.
    """
    p = tl.program_id(0)
    b = tl.program_id(1)
    begin, end = _share(starts_ptr, p, b, P)
    c = tl.arange(0, TILE_C)
    group = c // (C // GROUPS)
    mean = tl.load(mean_ptr + b * GROUPS + group, mask=c < C, other=0.0)  # [TILE_C]
    rstd = tl.load(rstd_ptr + b * GROUPS + group, mask=c < C, other=0.0)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    along = tl.load(along_ptr + 2 * b * GROUPS + group, mask=c < C, other=0.0)
    offset = tl.load(along_ptr + (2 * b + 1) * GROUPS + group, mask=c < C, other=0.0)
    for first in range(begin, end, ROWS):
        n = first + tl.arange(0, ROWS)
        live = (n < end)[:, None] & (c < C)[None, :]
        at = n[:, None] * C + c[None, :]
        normed, dz = _inner_gradient(x_ptr, dy_ptr, at, live, weight, bias, mean, rstd, SILU)
        dx = (dz * weight[None, :] - normed * along[None, :] - offset[None, :]) * rstd[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
