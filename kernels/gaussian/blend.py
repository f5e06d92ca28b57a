"""Front-to-back compositing and its backward, one program per tile of 16 x 16 pixels.

I instances, see kernels.gaussian.binning. For each pixel and Gaussian:
    e = -(c11 dx^2 + c22 dy^2) / 2 - c12 dx dy
    alpha = min(0.99, opacity exp(e)), skipped where e > 0 or alpha < 1/255
    stop (exclusive) where the transmittance T would fall below 1e-4
    image = sum color alpha T + T_final background.
(Kerbl et al. 2023.) A chunk is [K Gaussians, 256 pixels] with the K of a pixel in one thread, so
the running products and sums along K are plain serial ones in registers (products of 1 - alpha, no
logarithms: exact to rounding) while the loads of K records are in flight together and the
reductions over pixels are shared by K Gaussians.

Backward, with a = <color, g>, w = alpha T, and B what arrives from behind (the sum of w a there,
and of the background): gradient of e = o exp(e) (T a - B / (1 - alpha)), also where alpha was
clamped to 0.99. B needs no second walk from the back: it is <image, g> less the running sum. The
nine sums over a tile's pixels that the projection's backward needs, of
    ge, ge dx, ge dy, ge dx^2, ge dx dy, ge dy^2, w g_r, w g_g, w g_b,
go to the instance's own slot: no atomics, and everything is linear in g, to the bit for powers of
two.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.gaussian.records import TILE, Bins

OPAQUE = tl.constexpr(0.99)
LEAST = tl.constexpr(1.0 / 255.0)
STOP = tl.constexpr(1e-4)
LOG2E = tl.constexpr(1.4426950408889634)


def _tiles(target: str) -> dict:
    """Return the Gaussians per chunk (not yet measured on a GPU).

    Two warps give a thread 4 pixels, so that few threads load the same record. With K = 8 the
    instructions per Gaussian are the same, but the backward has no registers left.
    """
    return {"K": 32 if target == "interpreter" else 4, "num_warps": 2}


@triton.jit
def _pixels(tile, W, H):
    """Return a tile's view, its pixels x, y [256], their place in a plane, and which are inside."""
    TX = tl.cdiv(W, 16)
    TY = tl.cdiv(H, 16)
    lane = tl.arange(0, 256)
    x = tile % TX * 16 + lane % 16
    y = tile // TX % TY * 16 + lane // 16
    return (tile // TX // TY).to(tl.int64), x, y, y * W + x, (x < W) & (y < H)


@triton.jit
def _records(record_ptr, pair_ptr, n, live):
    """Load the nine numbers of K Gaussians; those past the end have opacity 0."""
    r = record_ptr + tl.load(pair_ptr + n, live, 0).to(tl.int64) * 9
    return (
        tl.load(r, live, 0.0),
        tl.load(r + 1, live, 0.0),
        tl.load(r + 2, live, 0.0),
        tl.load(r + 3, live, 0.0),
        tl.load(r + 4, live, 0.0),
        tl.load(r + 5, live, 0.0),
        tl.load(r + 6, live, 0.0),
        tl.load(r + 7, live, 0.0),
        tl.load(r + 8, live, 0.0),
    )


@triton.jit
def _alpha(mx, my, c11, c12, c22, opacity, x, y):
    """Return offsets, opacity exp(e) and the alpha that is blended, 0 where skipped: [K, 256]."""
    dx = mx[:, None] - x.to(tl.float32)[None, :]
    dy = my[:, None] - y.to(tl.float32)[None, :]
    # [K]: cheaper here than per pixel
    h11 = c11 * (-0.5 * LOG2E)
    h12 = c12 * LOG2E
    h22 = c22 * (-0.5 * LOG2E)
    e = dx * (h11[:, None] * dx - h12[:, None] * dy) + h22[:, None] * dy * dy  # exponent of 2
    raw = opacity[:, None] * tl.exp2(e)
    alpha = tl.minimum(raw, OPAQUE)
    return dx, dy, raw, tl.where((e <= 0) & (alpha >= LEAST), alpha, 0.0)


@triton.jit(do_not_specialize=["H"])
def _blend(
    record_ptr,  # [P, 9]
    # see Bins
    pair_ptr,
    bounds_ptr,
    background_ptr,  # [V, 3]
    # results, see `blend`
    image_ptr,
    final_ptr,
    reach_ptr,
    W,
    H,
    K: tl.constexpr,
):
    tile = tl.program_id(0)
    v, x, y, at, inside = _pixels(tile, W, H)
    begin = tl.load(bounds_ptr + tile)
    end = tl.load(bounds_ptr + tile + 1)
    # (256,) transmittance; below STOP for good once the pixel has stopped
    light = tl.where(inside, 1.0, 0.0)
    final = tl.full([256], 1.0, tl.float32)
    reach = tl.zeros([256], tl.int32)  # instances before the stop
    red = tl.zeros([256], tl.float32)
    green = tl.zeros([256], tl.float32)
    blue = tl.zeros([256], tl.float32)
    i = begin
    while i < end:
        n = i + tl.arange(0, K)
        live = n < end
        mx, my, c11, c12, c22, opacity, r, g, b = _records(record_ptr, pair_ptr, n, live)
        _, _, _, alpha = _alpha(mx, my, c11, c12, c22, opacity, x, y)
        through = light[None, :] * tl.cumprod(1 - alpha, 0)  # (K, 256) transmittance behind each
        kept = through >= STOP
        weight = tl.where(kept, alpha * (through / (1 - alpha)), 0.0)
        red += tl.sum(weight * r[:, None], 0)
        green += tl.sum(weight * g[:, None], 0)
        blue += tl.sum(weight * b[:, None], 0)
        final = tl.minimum(final, tl.min(tl.where(kept, through, 1.0), 0))
        reach += tl.sum((kept & live[:, None]).to(tl.int32), 0)
        light = tl.min(through, 0)
        i = tl.where(tl.max(light, 0) >= STOP, i + K, end)
    size = H * W
    background = background_ptr + v * 3
    image = image_ptr + v * 3 * size
    tl.store(image + at, red + final * tl.load(background), inside)
    tl.store(image + size + at, green + final * tl.load(background + 1), inside)
    tl.store(image + 2 * size + at, blue + final * tl.load(background + 2), inside)
    tl.store(final_ptr + v * size + at, final, inside)
    tl.store(reach_ptr + v * size + at, reach, inside)


@triton.jit(do_not_specialize=["H"])
def _blend_backward(
    record_ptr,  # [P, 9]
    # see Bins
    pair_ptr,
    slot_ptr,
    bounds_ptr,
    # results of the forward pass, and gradients of the first two
    image_ptr,
    final_ptr,
    reach_ptr,
    grad_image_ptr,
    grad_final_ptr,
    moments_ptr,  # result [I, 9]
    W,
    H,
    K: tl.constexpr,
):
    tile = tl.program_id(0)
    v, x, y, at, inside = _pixels(tile, W, H)
    begin = tl.load(bounds_ptr + tile)
    end = tl.load(bounds_ptr + tile + 1)
    size = H * W
    image = image_ptr + v * 3 * size
    grad = grad_image_ptr + v * 3 * size
    gr = tl.load(grad + at, inside, 0.0)
    gg = tl.load(grad + size + at, inside, 0.0)
    gb = tl.load(grad + 2 * size + at, inside, 0.0)
    # (256,) what arrives from behind, of the whole pixel at first
    behind = gr * tl.load(image + at, inside, 0.0) + gg * tl.load(image + size + at, inside, 0.0)
    behind += gb * tl.load(image + 2 * size + at, inside, 0.0)
    grad_final = tl.load(grad_final_ptr + v * size + at, inside, 0.0)
    behind += grad_final * tl.load(final_ptr + v * size + at, inside, 0.0)
    reach = begin + tl.load(reach_ptr + v * size + at, inside, 0)
    light = tl.full([256], 1.0, tl.float32)
    seen = tl.max(reach, 0)
    for i in range(begin, seen, K):
        n = i + tl.arange(0, K)
        live = n < seen
        mx, my, c11, c12, c22, opacity, r, g, b = _records(record_ptr, pair_ptr, n, live)
        dx, dy, raw, alpha = _alpha(mx, my, c11, c12, c22, opacity, x, y)
        # the stop of the forward pass, whatever rounds
        alpha = tl.where(n[:, None] < reach[None, :], alpha, 0.0)
        inverse = 1 / (1 - alpha)
        through = light[None, :] * tl.cumprod(1 - alpha, 0)
        before = through * inverse
        weight = alpha * before
        a = r[:, None] * gr[None, :] + g[:, None] * gg[None, :] + b[:, None] * gb[None, :]
        arriving = weight * a
        rest = behind[None, :] - tl.cumsum(arriving, 0)
        behind -= tl.sum(arriving, 0)
        ge = tl.where(alpha > 0, raw * (before * a - rest * inverse), 0.0)
        light = tl.min(through, 0)
        gx = ge * dx
        gy = ge * dy
        m = moments_ptr + tl.load(slot_ptr + n, live, 0) * 9
        tl.store(m, tl.sum(ge, 1), live)
        tl.store(m + 1, tl.sum(gx, 1), live)
        tl.store(m + 2, tl.sum(gy, 1), live)
        tl.store(m + 3, tl.sum(gx * dx, 1), live)
        tl.store(m + 4, tl.sum(gx * dy, 1), live)
        tl.store(m + 5, tl.sum(gy * dy, 1), live)
        tl.store(m + 6, tl.sum(weight * gr[None, :], 1), live)
        tl.store(m + 7, tl.sum(weight * gg[None, :], 1), live)
        tl.store(m + 8, tl.sum(weight * gb[None, :], 1), live)
    zero = tl.zeros([256], tl.float32)
    for i in range(seen, end, 256):  # no pixel saw these
        n = i + tl.arange(0, 256)
        m = moments_ptr + tl.load(slot_ptr + n, n < end, 0) * 9
        for j in tl.static_range(9):
            tl.store(m + j, zero, n < end)


def _tiles_of(width: int, height: int) -> int:
    return triton.cdiv(width, TILE) * triton.cdiv(height, TILE)


def blend(
    record: Tensor, bins: Bins, background: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image [V, 3, H, W], the final transmittance [V, H, W] and the reach.

    The reach [V, H, W] int32 is the number of a tile's instances that a pixel takes before it
    stops, which the backward needs.
    """
    V = len(background)
    image = background.new_empty(V, 3, height, width)
    final = background.new_empty(V, height, width)
    reach = torch.empty_like(final, dtype=torch.int32)
    backend.launch(
        _blend,
        (V * _tiles_of(width, height),),
        record,
        bins.pair,
        bins.bounds,
        background,
        image,
        final,
        reach,
        width,
        height,
        **_tiles(backend.target(record)),
    )
    return image, final, reach


def blend_backward(
    record: Tensor,  # [P, 9]
    bins: Bins,
    image: Tensor,  # [V, 3, H, W]
    final: Tensor,  # [V, H, W]
    reach: Tensor,  # [V, H, W] int32
    grad_image: Tensor,  # [V, 3, H, W]
    grad_final: Tensor,  # [V, H, W]
) -> Tensor:
    """Return the nine sums of every instance [I, 9], at its slot."""
    V, _, height, width = image.shape
    moments = record.new_empty(len(bins.pair), 9)
    backend.launch(
        _blend_backward,
        (V * _tiles_of(width, height),),
        record,
        bins.pair,
        bins.slot,
        bins.bounds,
        image,
        final,
        reach,
        grad_image,
        grad_final,
        moments,
        width,
        height,
        **_tiles(backend.target(record)),
    )
    return moments
