"""Front-to-back compositing and its backward, one program per part of a tile of 16 x 16 pixels.

I instances, lists and parts: see kernels.gaussian.binning. For each pixel and Gaussian:
    e = -(c11 dx^2 + c22 dy^2) / 2 - c12 dx dy
    alpha = min(0.99, opacity exp(e)), skipped where alpha < 1/255
    stop (exclusive) where the transmittance T would fall below 1e-4
    image = sum color alpha T + T_final background.
(Kerbl et al. 2023.) With a, b, c of the filtered covariance and its determinant D,
    -2 e = dx^2 / a + a/D (dy - b/a dx)^2,
which is never negative (theirs may round to e > 0, and is skipped there) and cancels least.

A part is a square of 8 x 8 pixels in one warp, 2 of a thread, so that a
program waits for nobody, a Gaussian costs few idle pixels, and what it loads serves them all.
Gaussians are taken ROWS at a time as [ROWS, pixels]: 1 on a GPU, in an unrolled loop whose few live
registers leave room for many warps; as many as there are in the interpreter, where products and
sums along them are scans.

Backward, with a = <color, g>, w = alpha T, and B what arrives from behind (the sum of w a there,
and of the background): gradient of e = o exp(e) (T a - B / (1 - alpha)), also where alpha was
clamped to 0.99. B needs no second walk from the back: it is <image, g> less the running sum. A
pixel stops where it did: alpha is 1/255 at least, so the transmittance of what it did not take is
below 0.998 times the final one, however it rounds. The nine sums over the part's pixels that the
projection's backward needs, of
    ge, ge dx, ge dy, ge dx^2, ge dx dy, ge dy^2, w g_r, w g_g, w g_b,
are products of matrices: ge, ge dx, ge dy and w of K Gaussians, [K, pixels], times 1 and the
pixel's place about the middle of the part, and times g. The places are exact in TF32 and the other
factors are split into two of its numbers, which leaves 23 bits. The sums go to the entry's own
slot: no atomics, and everything is linear in g, to the bit for powers of two.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.gaussian.columns import columns8, store_rows8
from kernels.gaussian.products import halves, powers, product
from kernels.gaussian.records import Bins

OPAQUE = tl.constexpr(0.99)
LEAST = tl.constexpr(1.0 / 255.0)
STOP = tl.constexpr(1e-4)
STOP_BITS = tl.constexpr(0x38D1B717)
TAKEN = tl.constexpr(0.998)


def _tiles(target: str, backward: bool) -> dict:
    """Return the Gaussians per chunk and per step (not yet measured on a GPU).

    The backward's chunk is the rows of a tensor core's product.
    """
    if target == "interpreter":
        tiles = {"K": 32, "ROWS": 32, "num_warps": 1}
        return tiles | {"STEP": 32} if backward else tiles
    tiles = {"ROWS": 1, "num_warps": 1}
    if not backward:
        return tiles | {"K": 4}
    # Triton 3.6 cannot build it for AMD's one wavefront of 64 lanes
    warps = 2 if target.startswith("gfx9") else 1
    return tiles | {"K": 16, "STEP": 4, "num_warps": warps}


@triton.jit
def _pixels(part, W, H, SIDE: tl.constexpr):
    """Return a part's tile, view and corner; x of its pixels [SIDE^2], y from the corner, their
    place in a plane, and which are inside.

    Parts of a tile are neighbours: they read the same records.
    """
    PARTS: tl.constexpr = 16 // SIDE
    TX = tl.cdiv(W, 16)
    TY = tl.cdiv(H, 16)
    tile = part // (PARTS * PARTS)
    left = tile % TX * 16 + part % PARTS * SIDE
    top = tile // TX % TY * 16 + part // PARTS % PARTS * SIDE
    lane = tl.arange(0, SIDE * SIDE)
    x = left + lane % SIDE
    y = lane // SIDE
    view = (tile // TX // TY).to(tl.int64)
    return tile, view, left, top, x, y, (top + y) * W + x, (x < W) & (top + y < H)


@triton.jit
def _entries(bounds_ptr, tile, part, Q: tl.constexpr):
    """Return the first entry of a part's list."""
    begin = tl.load(bounds_ptr + tile).to(tl.int64)
    n = tl.load(bounds_ptr + tile + 1) - begin
    return Q * begin + part % Q * n


@triton.jit
def _two(ptr):
    """Load two numbers of fp32 at once."""
    both = tl.load(ptr)
    low = both.to(tl.int32).to(tl.float32, bitcast=True)
    return low, (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _records(record_ptr, pair_ptr, i, size, ROWS: tl.constexpr):
    """Load the numbers of Gaussians, scalars or [ROWS, 1]; past the end alpha is 0."""
    n = i if ROWS == 1 else (i + tl.arange(0, ROWS))[:, None]
    live = n < size
    r = record_ptr + tl.load(pair_ptr + n, live, 0).to(tl.int64) * 8
    mx, my = _two(r)
    across, shear = _two(r + 1)
    down, strength = _two(r + 2)
    red, green = _two(r + 3)
    blue, _ = _two(r + 4)
    strength = tl.where(live, strength, -float("inf"))
    return mx, my, (across, shear, down, strength), red, green, blue


@triton.jit
def _opacity(mx, my, shape, x, y, top):
    """Return opacity exp(e), 0 where skipped: [ROWS, pixels].

    Pixels of a thread lie in one column, where all but y is the same. y and the mean are taken from
    the part's first row, so that the sum rounds little.
    """
    across, shear, down, strength = shape
    dx = mx - x[None, :]
    t = shear * dx + (my - top) - y[None, :]
    raw = tl.exp2(down * t * t + (across * dx * dx + strength))
    return tl.where(raw >= LEAST, raw, 0.0)


@triton.jit(do_not_specialize=["H"])
def _blend(
    record_ptr,  # [P, 8] int64: two numbers each, see PACKED
    # see Bins
    pair_ptr,
    bounds_ptr,
    size_ptr,
    background_ptr,  # [V, 3]
    # results, see `blend`
    image_ptr,
    final_ptr,
    seen_ptr,
    W,
    H,
    SIDE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    part = tl.program_id(0)
    Q: tl.constexpr = (16 // SIDE) * (16 // SIDE)
    tile, v, _, top, x, y, at, inside = _pixels(part, W, H, SIDE)
    pair_ptr += _entries(bounds_ptr, tile, part, Q)
    size = tl.load(size_ptr + part)
    x = x.to(tl.float32)
    y = y.to(tl.float32)
    # transmittance; below STOP for good once the pixel has stopped
    light = tl.where(inside, 1.0, 0.0)
    final = tl.full([SIDE * SIDE], 1.0, tl.float32)
    red = tl.zeros([SIDE * SIDE], tl.float32)
    green = tl.zeros([SIDE * SIDE], tl.float32)
    blue = tl.zeros([SIDE * SIDE], tl.float32)
    i = 0
    seen = 0
    while i < size:
        # of these K alone, for fewer roundings: the backward subtracts from the pixel
        new_red = tl.zeros([SIDE * SIDE], tl.float32)
        new_green = tl.zeros([SIDE * SIDE], tl.float32)
        new_blue = tl.zeros([SIDE * SIDE], tl.float32)
        for k in tl.static_range(0, K, ROWS):
            mx, my, shape, r, g, b = _records(record_ptr, pair_ptr, i + k, size, ROWS)
            raw = _opacity(mx, my, shape, x, y, top)
            alpha = tl.minimum(raw, OPAQUE)
            # (ROWS, pixels) transmittance behind each
            through = light[None, :] * tl.cumprod(1 - alpha, 0)
            kept = through >= STOP
            if ROWS == 1:
                behind = tl.where(kept, through, final[None, :])
                weight = final[None, :] - behind
                final = tl.sum(behind, 0)
                light = tl.sum(tl.where(kept, through, 0.0), 0)
            else:
                weight = tl.where(kept, alpha * (through / (1 - alpha)), 0.0)
                final = tl.minimum(final, tl.min(tl.where(kept, through, 1.0), 0))
                light = tl.min(through, 0)
            new_red += tl.sum(weight * r, 0)
            new_green += tl.sum(weight * g, 0)
            new_blue += tl.sum(weight * b, 0)
        red += new_red
        green += new_green
        blue += new_blue
        seen = tl.minimum(i + K, size)
        # numbers from 0 on are ordered as their bits are
        lightest = tl.max(light.to(tl.int32, bitcast=True), 0)
        i = tl.where(lightest >= STOP_BITS, i + K, size)
    tl.store(seen_ptr + part, seen)
    plane = H * W
    background = background_ptr + v * 3
    image = image_ptr + v * 3 * plane
    tl.store(image + at, red + final * tl.load(background), inside)
    tl.store(image + plane + at, green + final * tl.load(background + 1), inside)
    tl.store(image + 2 * plane + at, blue + final * tl.load(background + 2), inside)
    tl.store(final_ptr + v * plane + at, final, inside)


@triton.jit(do_not_specialize=["H"])
def _blend_backward(
    record_ptr,  # [P, 8] int64: two numbers each, see PACKED
    # see Bins
    pair_ptr,
    slot_ptr,
    bounds_ptr,
    size_ptr,
    # results of the forward pass, and gradients of the first two
    image_ptr,
    final_ptr,
    seen_ptr,
    grad_image_ptr,
    grad_final_ptr,
    # results [slots, 8] and [slots], see `blend_backward`
    moments_ptr,
    last_ptr,
    W,
    H,
    SIDE: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
):
    part = tl.program_id(0)
    Q: tl.constexpr = (16 // SIDE) * (16 // SIDE)
    PIXELS: tl.constexpr = SIDE * SIDE
    tile, v, left, top, x, y, at, inside = _pixels(part, W, H, SIDE)
    first = _entries(bounds_ptr, tile, part, Q)
    pair_ptr += first
    slot_ptr += first
    size = tl.load(size_ptr + part)
    seen = tl.load(seen_ptr + part)
    x = x.to(tl.float32)
    y = y.to(tl.float32)
    plane = H * W
    image = image_ptr + v * 3 * plane
    grad = grad_image_ptr + v * 3 * plane
    gr = -tl.load(grad + at, inside, 0.0)
    gg = -tl.load(grad + plane + at, inside, 0.0)
    gb = -tl.load(grad + 2 * plane + at, inside, 0.0)
    # (pixels,) what arrives from behind, of the whole pixel at first; signs are turned below
    behind = gr * tl.load(image + at, inside, 0.0) + gg * tl.load(image + plane + at, inside, 0.0)
    behind = -(behind + gb * tl.load(image + 2 * plane + at, inside, 0.0))
    final = tl.load(final_ptr + v * plane + at, inside, 0.0)
    behind += tl.load(grad_final_ptr + v * plane + at, inside, 0.0) * final
    least = TAKEN * final
    light = tl.full([PIXELS], 1.0, tl.float32)
    half: tl.constexpr = 0.5 * (SIDE - 1)
    column = tl.arange(0, 8)[None, :]
    places = powers((x - left)[:, None] - half, y[:, None] - half, column)
    colors = halves(-gr[:, None], -gg[:, None], -gb[:, None], column)
    row = tl.arange(0, K)[:, None]
    for i in range(0, seen, K):
        slopes = tl.zeros([K, PIXELS], tl.float32)
        slopes_x = tl.zeros([K, PIXELS], tl.float32)
        slopes_y = tl.zeros([K, PIXELS], tl.float32)
        weights = tl.zeros([K, PIXELS], tl.float32)
        for j in tl.static_range(0, K, STEP):
            if i + j < seen:
                for k in tl.static_range(j, j + STEP, ROWS):
                    mx, my, shape, r, g, b = _records(record_ptr, pair_ptr, i + k, seen, ROWS)
                    raw = _opacity(mx, my, shape, x, y, top)
                    alpha = tl.minimum(raw, OPAQUE)
                    through = light[None, :] * tl.cumprod(1 - alpha, 0)
                    kept = through >= least[None, :]
                    root = tl.rsqrt(1 - alpha)
                    inverse = root * root
                    before = light[None, :] if ROWS == 1 else through * inverse
                    weight = tl.where(kept, alpha * before, 0.0)
                    a = r * gr[None, :] + g * gg[None, :] + b * gb[None, :]
                    if ROWS == 1:
                        rest = behind[None, :] + weight * a
                        behind = tl.sum(rest, 0)
                        light = tl.sum(through, 0)
                    else:
                        rest = behind[None, :] + tl.cumsum(weight * a, 0)
                        behind += tl.sum(weight * a, 0)
                        light = tl.min(through, 0)
                    # minus the gradient of e
                    slope = tl.where(kept, raw * inverse * (through * a + rest), 0.0)
                    slope_x = slope * (mx - x[None, :])
                    slope_y = slope * (my - top - y[None, :])
                    slopes = tl.where(row // ROWS == k // ROWS, slope, slopes)
                    slopes_x = tl.where(row // ROWS == k // ROWS, slope_x, slopes_x)
                    slopes_y = tl.where(row // ROWS == k // ROWS, slope_y, slopes_y)
                    weights = tl.where(row // ROWS == k // ROWS, weight, weights)
        n = i + tl.arange(0, K)
        live = n < seen
        mx, my = _two(record_ptr + tl.load(pair_ptr + n, live, 0).to(tl.int64) * 8)
        ux = mx - left - half
        uy = my - top - half
        slot = tl.load(slot_ptr + n, live, 0).to(tl.int64)
        total, _, _, _, _, _, _, _ = columns8(tl.reshape(product(slopes, places), [K, 2, 2, 2]))
        gx, gxx, gxy, _, _, _, _, _ = columns8(tl.reshape(product(slopes_x, places), [K, 2, 2, 2]))
        gy, _, gyy, _, _, _, _, _ = columns8(tl.reshape(product(slopes_y, places), [K, 2, 2, 2]))
        # from the middle of the part to the Gaussian's centre, where second moments about the
        # middle would lose twice as many digits
        gxx = ux * gx - gxx
        gxy = uy * gx - gxy
        gyy = uy * gy - gyy
        r0, g0, b0, r1, g1, b1, _, _ = columns8(tl.reshape(product(weights, colors), [K, 2, 2, 2]))
        red = r0 + r1
        green = g0 + g1
        store_rows8(moments_ptr, slot, live, total, gx, gy, gxx, gxy, gyy, red, green, K)
        tl.store(last_ptr + slot, b0 + b1, live)
    for i in range(seen, size, 32):  # no pixel saw these
        n = i + tl.arange(0, 32)
        slot = tl.load(slot_ptr + n, n < size, 0).to(tl.int64)
        rows = moments_ptr + slot[:, None] * 8 + column
        tl.store(rows, tl.zeros([32, 8], tl.float32), (n < size)[:, None])
        tl.store(last_ptr + slot, tl.zeros([32], tl.float32), n < size)


def blend(
    record: Tensor, bins: Bins, background: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image [V, 3, H, W], the final transmittance [V, H, W] and what was seen.

    That is the number of a part's entries [T, Q] int32 that were walked until all its pixels had
    stopped, which the backward needs.
    """
    V = len(background)
    image = background.new_empty(V, 3, height, width)
    final = background.new_empty(V, height, width)
    seen = torch.empty_like(bins.size)
    backend.launch(
        _blend,
        (bins.size.numel(),),
        record.view(torch.int64),
        bins.pair,
        bins.bounds,
        bins.size,
        background,
        image,
        final,
        seen,
        width,
        height,
        SIDE=bins.side,
        **_tiles(backend.target(record), backward=False),
    )
    return image, final, seen


def blend_backward(
    record: Tensor,  # [P, PACKED]
    bins: Bins,
    image: Tensor,  # [V, 3, H, W]
    final: Tensor,  # [V, H, W]
    seen: Tensor,  # [T, Q] int32
    grad_image: Tensor,  # [V, 3, H, W]
    grad_final: Tensor,  # [V, H, W]
) -> tuple[Tensor, Tensor]:
    """Return the first eight sums of every entry [slots, 8], at its slot, and the last [slots].

    Eight are a whole sector of memory.
    """
    _, _, height, width = image.shape
    moments = record.new_empty(bins.slots, 8)
    last = record.new_empty(bins.slots)
    backend.launch(
        _blend_backward,
        (bins.size.numel(),),
        record.view(torch.int64),
        bins.pair,
        bins.slot,
        bins.bounds,
        bins.size,
        image,
        final,
        seen,
        grad_image,
        grad_final,
        moments,
        last,
        width,
        height,
        SIDE=bins.side,
        **_tiles(backend.target(record), backward=True),
    )
    return moments, last
