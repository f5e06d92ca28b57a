"""Antialiasing of silhouettes on a GPU, forward (the method: kernels.mesh.antialias).

V views, N = V H W pixels, C channels. Pointers as in kernels.mesh.pixels_gpu. Two kernels:

    _silhouette_pairs  each pixel with its right (d = 0) and its lower (d = 1) neighbour: alpha and
                       code, [2, N] each
    _silhouette_blend  a pixel's up to four pairs, gathered: no two programs write one pixel

`code` is 0 for a pair that does not blend; else 1 + edge, and 3 more where the nearer face is that
of the second pixel.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.mesh.pixels_gpu import pixel_block

# how far beyond the two centres an edge may cross the line between them
MARGIN = tl.constexpr(0.0625)
FAR = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def is_negative(x):
    return x.to(tl.int32, bitcast=True) < 0  # the sign bit, which -0.0 has too


@triton.jit
def screen(clip_ptr, row, ox, oy, W, H, live):
    """A clip position in pixels from (ox, oy), and its x, y, w.

    (ox, oy) is a pixel's centre, counted from the middle of the picture.
    """
    c = clip_ptr + row * 4
    x = tl.load(c, live, 0.0)
    y = tl.load(c + 1, live, 0.0)
    w = tl.load(c + 3, live, 1.0)
    return x / w * (W * 0.5) - ox, y / w * (H * 0.5) - oy, x, y, w


@triton.jit
def _area(x0, y0, x1, y1, x2, y2):
    return (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)


@triton.jit
def _crossing(px, py, qx, qy, ds):
    """Where the edge P -> Q crosses the line to the neighbour, in pixels towards it."""
    dx = qx - px
    dy = qy - py
    crosses = (is_negative(py) != is_negative(qy)) & (dy != 0)
    r = ds * (px * dy - py * dx) / tl.where(crosses, dy, 1.0)
    return tl.where(crosses, r, FAR), dx, dy


@triton.jit
def _third(clip_ptr, opposite_ptr, base, ox, oy, W, H, live):
    """The vertex across an edge, and whether there is one."""
    o = tl.load(opposite_ptr, live, -1)
    x, y, _, _, _ = screen(clip_ptr, base + tl.maximum(o, 0), ox, oy, W, H, live & (o >= 0))
    return x, y, o >= 0


@triton.jit(do_not_specialize=["N", "W", "H"])
def _silhouette_pairs(
    rast_ptr,
    clip_ptr,
    faces_ptr,
    table_ptr,
    opposite_ptr,
    alpha_ptr,
    code_ptr,
    N,
    W,
    H,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.program_id(1)
    inside = n < N
    x = n % W
    y = n // W % H
    down = d == 1
    pair = inside & tl.where(down, y + 1 < H, x + 1 < W)
    other = n + tl.where(down, W, 1)
    f0 = tl.load(rast_ptr + n * 4 + 3, pair, 0.0)
    f1 = tl.load(rast_ptr + other * 4 + 3, pair, 0.0)
    pair = pair & (f0 != f1)
    alpha = tl.zeros([BLOCK], tl.float32)
    code = tl.zeros([BLOCK], tl.int32)
    if tl.max(pair.to(tl.int32), 0) > 0:
        z0 = tl.load(rast_ptr + n * 4 + 2, pair, 0.0)
        z1 = tl.load(rast_ptr + other * 4 + 2, pair, 0.0)
        second = (f0 == 0) | ((f1 != 0) & (z1 <= z0))  # whose face is the nearer one
        ds = tl.where(second, -1.0, 1.0)
        face = tl.where(second, f1, f0).to(tl.int64) - 1
        ox = (x + tl.where(second & (d == 0), 1, 0)).to(tl.float32) + 0.5 - W * 0.5
        oy = (y + tl.where(second & down, 1, 0)).to(tl.float32) + 0.5 - H * 0.5
        t = table_ptr + n // W // H * 4
        f = (tl.load(t, pair, 0) + face) * 3
        base = tl.load(t + 2, pair, 0)
        row0 = base + tl.load(faces_ptr + f, pair, 0)
        row1 = base + tl.load(faces_ptr + f + 1, pair, 0)
        row2 = base + tl.load(faces_ptr + f + 2, pair, 0)
        x0, y0, _, _, _ = screen(clip_ptr, row0, ox, oy, W, H, pair)
        x1, y1, _, _, _ = screen(clip_ptr, row1, ox, oy, W, H, pair)
        x2, y2, _, _, _ = screen(clip_ptr, row2, ox, oy, W, H, pair)
        u0, v0, there0 = _third(clip_ptr, opposite_ptr + f, base, ox, oy, W, H, pair)
        u1, v1, there1 = _third(clip_ptr, opposite_ptr + f + 1, base, ox, oy, W, H, pair)
        u2, v2, there2 = _third(clip_ptr, opposite_ptr + f + 2, base, ox, oy, W, H, pair)
        turn = is_negative(_area(x0, y0, x1, y1, x2, y2))
        # an open edge, or both faces on one side
        fold0 = ~there0 | (is_negative(_area(u0, v0, x1, y1, x2, y2)) == turn)
        fold1 = ~there1 | (is_negative(_area(x0, y0, u1, v1, x2, y2)) == turn)
        fold2 = ~there2 | (is_negative(_area(x0, y0, x1, y1, u2, v2)) == turn)
        # along and across the line to the neighbour
        a0 = tl.where(down, y0, x0)
        b0 = tl.where(down, x0, y0)
        a1 = tl.where(down, y1, x1)
        b1 = tl.where(down, x1, y1)
        a2 = tl.where(down, y2, x2)
        b2 = tl.where(down, x2, y2)
        r0, dx0, dy0 = _crossing(a1, b1, a2, b2, ds)
        r1, dx1, dy1 = _crossing(a2, b2, a0, b0, ds)
        r2, dx2, dy2 = _crossing(a0, b0, a1, b1, ds)
        two = (r2 > r0) & (r2 > r1)
        one = r1 > r0
        r = tl.where(two, r2, tl.where(one, r1, r0))
        fold = tl.where(two, fold2, tl.where(one, fold1, fold0))
        dx = tl.where(two, dx2, tl.where(one, dx1, dx0))
        dy = tl.where(two, dy2, tl.where(one, dy1, dy0))
        alpha = ds * (0.5 - tl.minimum(tl.maximum(r, 0.0), 1.0))
        hit = pair & fold & (tl.abs(dy) >= tl.abs(dx))
        hit = hit & (r > -MARGIN) & (r < 1 + MARGIN)
        hit = hit & ((alpha != 0) | is_negative(alpha))
        alpha = tl.where(hit, alpha, 0.0)
        edge = tl.where(two, 2, tl.where(one, 1, 0))
        code = tl.where(hit, 1 + edge + tl.where(second, 3, 0), 0)
    at = d.to(tl.int64) * N + n
    tl.store(alpha_ptr + at, alpha, inside)
    tl.store(code_ptr + at, code.to(tl.int8), inside)


@triton.jit
def around(n, N, W, H):
    """The four pairs of a pixel: to the right, below, to the left, above.

    For each: the index of the pair, the neighbour, and whether it is there.
    """
    x = n % W
    y = n // W % H
    inside = n < N
    return (
        (n, N + n, n - 1, N + n - W),
        (n + 1, n + W, n - 1, n - W),
        (inside & (x + 1 < W), inside & (y + 1 < H), inside & (x > 0), inside & (y > 0)),
    )


@triton.jit(do_not_specialize=["N", "C", "W", "H"])
def _silhouette_blend(image_ptr, alpha_ptr, out_ptr, N, C, W, H, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    pair, other, there = around(n, N, W, H)
    a0 = tl.load(alpha_ptr + pair[0], there[0], 0.0)
    a1 = tl.load(alpha_ptr + pair[1], there[1], 0.0)
    a2 = tl.load(alpha_ptr + pair[2], there[2], 0.0)
    a3 = tl.load(alpha_ptr + pair[3], there[3], 0.0)
    a0 = tl.maximum(a0, 0.0)
    a1 = tl.maximum(a1, 0.0)
    a2 = tl.maximum(-a2, 0.0)
    a3 = tl.maximum(-a3, 0.0)
    for c in range(0, C):
        own = tl.load(image_ptr + n * C + c, inside, 0.0)
        value = own + a0 * (tl.load(image_ptr + other[0] * C + c, a0 > 0, 0.0) - own)
        value += a1 * (tl.load(image_ptr + other[1] * C + c, a1 > 0, 0.0) - own)
        value += a2 * (tl.load(image_ptr + other[2] * C + c, a2 > 0, 0.0) - own)
        value += a3 * (tl.load(image_ptr + other[3] * C + c, a3 > 0, 0.0) - own)
        tl.store(out_ptr + n * C + c, value, inside)


def antialias_triton(
    image: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, table: Tensor, opposite: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Blend the image [V, H, W, C]; also returns alpha and code of the pairs, [2, V, H, W]."""
    V, H, W, C = image.shape
    N = V * H * W
    block = pixel_block(backend.target(image))
    out = torch.empty_like(image)
    alpha = image.new_empty(2, V, H, W)
    code = torch.empty(2, V, H, W, dtype=torch.int8, device=image.device)
    grid = (triton.cdiv(N, block["BLOCK"]),)
    mesh = (rast, clip, faces, table, opposite)
    backend.launch(_silhouette_pairs, (*grid, 2), *mesh, alpha, code, N, W, H, **block)
    backend.launch(_silhouette_blend, grid, image, alpha, out, N, C, W, H, **block)
    return out, alpha, code
