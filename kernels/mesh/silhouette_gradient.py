"""The gradient of one blended pair of pixels, as Triton functions."""

from kernels.backend import tl, triton


@triton.jit
def pair_upstream(grad_ptr, image_ptr, g, own, other, alpha, used, C, c, FIRST: tl.constexpr):
    """Of one channel of one pair: the gradient at the pixel that it blends, times the second pixel
    less the first.
    """
    its = (alpha > 0) if FIRST else ~(alpha > 0)  # whether this pixel is the one that is blended
    y = tl.where(its, g, tl.load(grad_ptr + other * C + c, used, 0.0))
    y = tl.where(used, y, 0.0)
    difference = tl.load(image_ptr + other * C + c, used, 0.0) - own
    return y, y * (difference if FIRST else -difference)


@triton.jit
def _pick(m, a0, a1, a2):
    return tl.where(m == 0, a0, tl.where(m == 1, a1, a2))


@triton.jit
def _give(k, p, q, at_p, at_q):
    return tl.where(p == k, at_p, tl.where(q == k, at_q, 0.0))


@triton.jit
def edge_gradient(
    code, alpha, delta, screen, corner, W, H, FIRST: tl.constexpr, DOWN: tl.constexpr
):
    """One pair's gradient of x, y, w of the corners of this pixel's face: 9 numbers, 0 where the
    edge is not of this face or the blend is saturated.
    """
    mine = (code > 0) & ((code <= 3) if FIRST else (code > 3)) & (tl.abs(alpha) < 0.5)
    m = (code - 1) % 3
    # the edge runs from P to Q
    p, q = tl.where(mine, (m + 1) % 3, -1), tl.where(mine, (m + 2) % 3, -1)
    px = _pick(p, screen[0][0], screen[1][0], screen[2][0])
    py = _pick(p, screen[0][1], screen[1][1], screen[2][1])
    qx = _pick(q, screen[0][0], screen[1][0], screen[2][0])
    qy = _pick(q, screen[0][1], screen[1][1], screen[2][1])
    hx, hy = W * 0.5, H * 0.5
    if DOWN:
        px, py, qx, qy = py, px, qy, qx
        hx, hy = H * 0.5, W * 0.5
    dx, dy = qx - px, qy - py
    inverse = 1 / (dy + tl.where(is_negative(dy), -STEEP, STEEP))
    at = (px * dy - py * dx) * inverse
    wp = _pick(p, corner[0][2], corner[1][2], corner[2][2])
    wq = _pick(q, corner[0][2], corner[1][2], corner[2][2])
    gp, gq = delta * inverse / wp, delta * inverse / wq
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
    gwp, gwq = -(xp * gxp + yp * gyp) / wp, -(xq * gxq + yq * gyq) / wq
    return (
        _give(0, p, q, gxp, gxq),
        _give(0, p, q, gyp, gyq),
        _give(0, p, q, gwp, gwq),
        _give(1, p, q, gxp, gxq),
        _give(1, p, q, gyp, gyq),
        _give(1, p, q, gwp, gwq),
        _give(2, p, q, gxp, gxq),
        _give(2, p, q, gyp, gyq),
        _give(2, p, q, gwp, gwq),
    )


STEEP = tl.constexpr(1e-3)  # added to the magnitude of dy where its inverse is differentiated


@triton.jit
def is_negative(x):
    return x.to(tl.int32, bitcast=True) < 0  # the sign bit, that of -0.0 too
