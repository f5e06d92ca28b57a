"""Antialiasing of silhouettes on a GPU, backward (the method: kernels.mesh.antialias).

V views, N = V H W pixels, C channels. Pointers as in kernels.mesh.pixels_gpu. One kernel goes
through the up to four pairs of each pixel, for the gradient of the image. The edge of a pair
belongs to the face of its nearer pixel; so each pixel also writes the gradient of its own face's
three corners, from all of its pairs.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.mesh.antialias_gpu import around, is_negative, screen
from kernels.mesh.pixels_gpu import clip_gradient, face_rows, pixel_block, store_keys

STEEP = tl.constexpr(1e-3)  # added to the magnitude of dy where its inverse is differentiated


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
    inverse = 1 / (dy + tl.where(is_negative(dy), -STEEP, STEEP))
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
    pair, other, there = around(n, N, W, H)
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
    sx0, sy0, x0, y0, w0 = screen(clip_ptr, i, ox, oy, W, H, mine)
    sx1, sy1, x1, y1, w1 = screen(clip_ptr, j, ox, oy, W, H, mine)
    sx2, sy2, x2, y2, w2 = screen(clip_ptr, k, ox, oy, W, H, mine)
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
