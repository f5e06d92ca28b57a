"""Antialiasing of silhouettes on a GPU (the method: kernels.mesh.antialias).

V views, N = V H W pixels, C channels. Pointers as in kernels.mesh.pixels_gpu. Three kernels:

    _silhouette_pairs     each pixel with its right (d = 0) and its lower (d = 1) neighbour: alpha
                          and code, [2, N] each
    _silhouette_blend     a pixel's up to four pairs, gathered: no two programs write one pixel
    _silhouette_backward  the same pairs, for the gradient of the image. The edge of a pair belongs
                          to the face of its nearer pixel; so each pixel also writes the gradient of
                          its own face's three corners, from all of its pairs

`code` is 0 for a pair that does not blend; else 1 + edge, and 3 more where the nearer face is that
of the second pixel.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.mesh.pixels_gpu import clip_gradient, face_rows, pixel_block, store_keys

# how far beyond the two centres an edge may cross the line between them
MARGIN = tl.constexpr(0.0625)
FAR = tl.constexpr(-3.4028234663852886e38)
STEEP = tl.constexpr(1e-3)  # added to the magnitude of dy where its inverse is differentiated


@triton.jit
def _is_negative(x):
    return x.to(tl.int32, bitcast=True) < 0  # the sign bit, which -0.0 has too


@triton.jit
def _screen(clip_ptr, row, ox, oy, W, H, live):
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
    crosses = (_is_negative(py) != _is_negative(qy)) & (dy != 0)
    r = ds * (px * dy - py * dx) / tl.where(crosses, dy, 1.0)
    return tl.where(crosses, r, FAR), dx, dy


@triton.jit
def _third(clip_ptr, opposite_ptr, base, ox, oy, W, H, live):
    """The vertex across an edge, and whether there is one."""
    o = tl.load(opposite_ptr, live, -1)
    x, y, _, _, _ = _screen(clip_ptr, base + tl.maximum(o, 0), ox, oy, W, H, live & (o >= 0))
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
        x0, y0, _, _, _ = _screen(clip_ptr, row0, ox, oy, W, H, pair)
        x1, y1, _, _, _ = _screen(clip_ptr, row1, ox, oy, W, H, pair)
        x2, y2, _, _, _ = _screen(clip_ptr, row2, ox, oy, W, H, pair)
        u0, v0, there0 = _third(clip_ptr, opposite_ptr + f, base, ox, oy, W, H, pair)
        u1, v1, there1 = _third(clip_ptr, opposite_ptr + f + 1, base, ox, oy, W, H, pair)
        u2, v2, there2 = _third(clip_ptr, opposite_ptr + f + 2, base, ox, oy, W, H, pair)
        turn = _is_negative(_area(x0, y0, x1, y1, x2, y2))
        # an open edge, or both faces on one side
        fold0 = ~there0 | (_is_negative(_area(u0, v0, x1, y1, x2, y2)) == turn)
        fold1 = ~there1 | (_is_negative(_area(x0, y0, u1, v1, x2, y2)) == turn)
        fold2 = ~there2 | (_is_negative(_area(x0, y0, x1, y1, u2, v2)) == turn)
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
        hit = hit & ((alpha != 0) | _is_negative(alpha))
        alpha = tl.where(hit, alpha, 0.0)
        edge = tl.where(two, 2, tl.where(one, 1, 0))
        code = tl.where(hit, 1 + edge + tl.where(second, 3, 0), 0)
    at = d.to(tl.int64) * N + n
    tl.store(alpha_ptr + at, alpha, inside)
    tl.store(code_ptr + at, code.to(tl.int8), inside)


@triton.jit
def _around(n, N, W, H):
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
    pair, other, there = _around(n, N, W, H)
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


@triton.jit
def _pair_upstream(grad_ptr, image_ptr, g, own, other, alpha, used, C, c, FIRST: tl.constexpr):
    """The gradient at the pixel that a pair blends, and that times the difference of its pixels.

    For one channel. FIRST: this pixel is the first of the pair. The difference is the second pixel
    minus the first.
    """
    blended = (alpha > 0) if FIRST else ~(alpha > 0)  # this pixel, not the other
    y = tl.where(blended, g, tl.load(grad_ptr + other * C + c, used, 0.0))
    y = tl.where(used, y, 0.0)
    difference = tl.load(image_ptr + other * C + c, used, 0.0) - own
    return y, y * (difference if FIRST else -difference)


@triton.jit
def _pick(m, a0, a1, a2):
    return tl.where(m == 0, a0, tl.where(m == 1, a1, a2))


@triton.jit
def _for_corner(k, p, q, at_p, at_q):
    return tl.where(p == k, at_p, tl.where(q == k, at_q, 0.0))


@triton.jit
def _edge_gradient(
    code, alpha, delta, place, corner, W, H, FIRST: tl.constexpr, DOWN: tl.constexpr
):
    """The gradient of one pair by x, y, w of the three corners of this pixel's face: 9 numbers.

    0 where the edge is not one of this face, or the blend is saturated.
    """
    mine = (code > 0) & ((code <= 3) if FIRST else (code > 3)) & (tl.abs(alpha) < 0.5)
    m = (code - 1) % 3
    # the edge runs from P to Q
    p = tl.where(mine, (m + 1) % 3, -1)
    q = tl.where(mine, (m + 2) % 3, -1)
    px = _pick(p, place[0][0], place[1][0], place[2][0])
    py = _pick(p, place[0][1], place[1][1], place[2][1])
    qx = _pick(q, place[0][0], place[1][0], place[2][0])
    qy = _pick(q, place[0][1], place[1][1], place[2][1])
    hx = W * 0.5
    hy = H * 0.5
    if DOWN:
        px, py, qx, qy = py, px, qy, qx
        hx, hy = hy, hx
    dx = qx - px
    dy = qy - py
    inverse = 1 / (dy + tl.where(_is_negative(dy), -STEEP, STEEP))
    at = (px * dy - py * dx) * inverse
    wp = _pick(p, corner[0][2], corner[1][2], corner[2][2])
    wq = _pick(q, corner[0][2], corner[1][2], corner[2][2])
    gp = delta * inverse / wp
    gq = delta * inverse / wq
    gxp = -gp * hx * qy
    gyp = -gp * hy * (at - qx)
    gxq = gq * hx * py
    gyq = gq * hy * (at - px)
    if DOWN:
        gxp, gyp, gxq, gyq = gyp, gxp, gyq, gxq
    xp = _pick(p, corner[0][0], corner[1][0], corner[2][0])
    yp = _pick(p, corner[0][1], corner[1][1], corner[2][1])
    xq = _pick(q, corner[0][0], corner[1][0], corner[2][0])
    yq = _pick(q, corner[0][1], corner[1][1], corner[2][1])
    gwp = -(xp * gxp + yp * gyp) / wp
    gwq = -(xq * gxq + yq * gyq) / wq
    return (
        _for_corner(0, p, q, gxp, gxq),
        _for_corner(0, p, q, gyp, gyq),
        _for_corner(0, p, q, gwp, gwq),
        _for_corner(1, p, q, gxp, gxq),
        _for_corner(1, p, q, gyp, gyq),
        _for_corner(1, p, q, gwp, gwq),
        _for_corner(2, p, q, gxp, gxq),
        _for_corner(2, p, q, gyp, gyq),
        _for_corner(2, p, q, gwp, gwq),
    )


@triton.jit(do_not_specialize=["N", "C", "W", "H"])
def _silhouette_backward(
    grad_ptr,
    image_ptr,
    alpha_ptr,
    code_ptr,
    rast_ptr,
    clip_ptr,
    faces_ptr,
    table_ptr,
    grad_image_ptr,
    rows_ptr,
    key_ptr,
    N,
    C,
    W,
    H,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    pair, other, there = _around(n, N, W, H)
    a0 = tl.load(alpha_ptr + pair[0], there[0], 0.0)
    a1 = tl.load(alpha_ptr + pair[1], there[1], 0.0)
    a2 = tl.load(alpha_ptr + pair[2], there[2], 0.0)
    a3 = tl.load(alpha_ptr + pair[3], there[3], 0.0)
    c0 = tl.load(code_ptr + pair[0], there[0], 0).to(tl.int32)
    c1 = tl.load(code_ptr + pair[1], there[1], 0).to(tl.int32)
    c2 = tl.load(code_ptr + pair[2], there[2], 0).to(tl.int32)
    c3 = tl.load(code_ptr + pair[3], there[3], 0).to(tl.int32)
    d0 = tl.zeros([BLOCK], tl.float32)
    d1 = tl.zeros([BLOCK], tl.float32)
    d2 = tl.zeros([BLOCK], tl.float32)
    d3 = tl.zeros([BLOCK], tl.float32)
    for c in range(0, C):
        g = tl.load(grad_ptr + n * C + c, inside, 0.0)
        own = tl.load(image_ptr + n * C + c, inside, 0.0)
        y0, e0 = _pair_upstream(grad_ptr, image_ptr, g, own, other[0], a0, c0 > 0, C, c, True)
        y1, e1 = _pair_upstream(grad_ptr, image_ptr, g, own, other[1], a1, c1 > 0, C, c, True)
        y2, e2 = _pair_upstream(grad_ptr, image_ptr, g, own, other[2], a2, c2 > 0, C, c, False)
        y3, e3 = _pair_upstream(grad_ptr, image_ptr, g, own, other[3], a3, c3 > 0, C, c, False)
        tl.store(grad_image_ptr + n * C + c, g - a0 * y0 - a1 * y1 + a2 * y2 + a3 * y3, inside)
        d0 = d0 + e0
        d1 = d1 + e1
        d2 = d2 + e2
        d3 = d3 + e3

    mine = ((c0 > 0) & (c0 <= 3)) | ((c1 > 0) & (c1 <= 3)) | (c2 > 3) | (c3 > 3)
    i, j, k, live = face_rows(rast_ptr, faces_ptr, table_ptr, n, W * H, inside)
    ox = (n % W).to(tl.float32) + 0.5 - W * 0.5
    oy = (n // W % H).to(tl.float32) + 0.5 - H * 0.5
    sx0, sy0, x0, y0, w0 = _screen(clip_ptr, i, ox, oy, W, H, mine)
    sx1, sy1, x1, y1, w1 = _screen(clip_ptr, j, ox, oy, W, H, mine)
    sx2, sy2, x2, y2, w2 = _screen(clip_ptr, k, ox, oy, W, H, mine)
    place = ((sx0, sy0), (sx1, sy1), (sx2, sy2))
    corner = ((x0, y0, w0), (x1, y1, w1), (x2, y2, w2))
    g0 = _edge_gradient(c0, a0, d0, place, corner, W, H, True, False)
    g1 = _edge_gradient(c1, a1, d1, place, corner, W, H, True, True)
    g2 = _edge_gradient(c2, a2, d2, place, corner, W, H, False, False)
    g3 = _edge_gradient(c3, a3, d3, place, corner, W, H, False, True)
    for e in tl.static_range(9):
        tl.store(rows_ptr + n * 9 + e, g0[e] + g1[e] + g2[e] + g3[e], inside)
    store_keys(key_ptr + n * 3, i, j, k, live, inside)


def antialias_triton_backward(
    grad: Tensor,
    image: Tensor,
    alpha: Tensor,
    code: Tensor,
    rast: Tensor,
    clip: Tensor,
    faces: Tensor,
    table: Tensor,
    order: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the image [V, H, W, C] and of the clip positions [P, 4]."""
    V, H, W, C = image.shape
    N = V * H * W
    block = pixel_block(backend.target(image))
    grad_image = torch.empty_like(image)
    rows = image.new_empty(N * 3, 3)
    key = torch.empty(N * 3, dtype=torch.int32, device=image.device)
    grid = (triton.cdiv(N, block["BLOCK"]),)
    inputs = (grad, image, alpha, code, rast, clip, faces, table)
    outputs = (grad_image, rows, key)
    backend.launch(_silhouette_backward, grid, *inputs, *outputs, N, C, W, H, **block)
    return grad_image, clip_gradient(rows, key, order, len(clip))
