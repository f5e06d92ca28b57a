"""Gaussians -> screen, for every pair of a view and a Gaussian of its scene. V views, B scenes, G
Gaussians, P pairs.

The ellipse is the first-order (EWA) projection of Zwicker et al. 2001; the fixed low-pass filter of
kernel_size px^2 with the opacity compensation rho is that of Mip-Splatting (Yu et al. 2024), as
TRELLIS trains with it:
    p = R m + t
    J = first-order projection at p (x/z and y/z clamped to 1.3 times the field of view)
    [a b; b c] = J R Q S^2 Q^T R^T J^T
    D = (a + kernel)(c + kernel) - b^2
    rho = sqrt(D0 / (D + 1e-6) + 1e-6), D0 = a c - b^2
    blended opacity = opacity * rho
    conic = inverse covariance.
With n0, n1 the rows of J R Q S: D0 = |n0 x n1|^2 and D = D0 + kernel (a + c) + kernel^2, sums of
squares. The textbook a c - b^2 loses every digit of a needle in fp32; these lose none, and the
backward differentiates the same forms.

Gradients are exact but for one published rule: where x/z is clamped, its gradient goes to z as if z
times the clamped value were constant (twice the true term), and not to x. Thresholds, rectangles
and cameras get none.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.gaussian.ellipse import (
    EPS,
    add3,
    axis_row,
    clamped_ratio,
    compensated,
    cross3,
    dot3,
    filtered,
    load3,
    load_camera,
    masked3,
    quaternion_gradient,
    rotate_back,
    rotated,
    scaled3,
    tile_range,
    times3,
)
from kernels.gaussian.records import Projected
from kernels.views import Layout

NEAR = tl.constexpr(0.2)  # a centre this close is not drawn
SH0 = tl.constexpr(0.28209479177387814)
VISIBLE = tl.constexpr(1.0 / 255.0)  # the least alpha that is blended


def _tiles() -> dict:
    """One Gaussian per thread (not yet measured on a GPU); few, as a block loops as often as its
    largest needs.
    """
    return {"BLOCK": 64, "num_warps": 2}


@triton.jit(do_not_specialize=["W", "H"])
def _project(
    gaussians_ptr,
    cameras_ptr,
    views_ptr,
    record_ptr,
    depth_ptr,
    rect_ptr,
    view_ptr,
    W,
    H,
    kernel_size,
    BLOCK: tl.constexpr,
):
    v = tl.program_id(1)
    first = tl.load(views_ptr + v * 3)
    count = tl.load(views_ptr + v * 3 + 1)
    pair = tl.load(views_ptr + v * 3 + 2)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < count
    g = gaussians_ptr + (first + n) * 14
    r, t, focal, centre = load_camera(cameras_ptr, v)
    m = load3(g, live)
    s = load3(g + 3, live)
    f = load3(g + 11, live)
    q = (
        tl.load(g + 6, live, 0.0),
        tl.load(g + 7, live, 0.0),
        tl.load(g + 8, live, 0.0),
        tl.load(g + 9, live, 0.0),
    )
    opacity = tl.load(g + 10, live, 0.0)

    x, y, z = dot3(r[0], m) + t[0], dot3(r[1], m) + t[1], dot3(r[2], m) + t[2]
    in_front = z > NEAR
    safe = tl.where(in_front, z, 1.0)
    o = rotated(r, q)
    tx, _ = clamped_ratio(x, safe, focal[0], centre[0], W)
    ty, _ = clamped_ratio(y, safe, focal[1], centre[1], H)
    n0 = scaled3(axis_row(o[0], o[2], tx, focal[0] / safe), s)
    n1 = scaled3(axis_row(o[1], o[2], ty, focal[1] / safe), s)
    a, b, c, _, before, after = filtered(n0, n1, kernel_size)
    seen = in_front & (after > 0) & (after < float("inf"))
    after = tl.where(seen, after, 1.0)
    blended = opacity * compensated(before, after)
    w = 1 / (safe + 1e-7)
    mx = (focal[0] * x + (centre[0] - 0.5 * W) * safe) * w + 0.5 * (W - 1)
    my = (focal[1] * y + (centre[1] - 0.5 * H) * safe) * w + 0.5 * (H - 1)

    a, c = a + kernel_size, c + kernel_size
    half = 0.5 * (a - c)
    radius = tl.ceil(3 * tl.sqrt(0.5 * (a + c) + tl.sqrt(tl.maximum(0.1, half * half + b * b))))
    # alpha = 1/255 where the exponent is -fading / 2
    fading = 2 * tl.log(tl.maximum(blended * 255, 1.0))
    x0, x1 = tile_range(mx, radius, 1.001 * tl.sqrt(fading * a) + 0.01, tl.cdiv(W, 16))
    y0, y1 = tile_range(my, radius, 1.001 * tl.sqrt(fading * c) + 0.01, tl.cdiv(H, 16))
    drawn = seen & (blended >= VISIBLE) & (x1 > x0) & (y1 > y0)

    p = pair + n
    out = record_ptr + p * 9
    tl.store(out, mx, live)
    tl.store(out + 1, my, live)
    tl.store(out + 2, c / after, live)
    tl.store(out + 3, -b / after, live)
    tl.store(out + 4, a / after, live)
    tl.store(out + 5, blended, live)
    tl.store(out + 6, tl.maximum(f[0] * SH0 + 0.5, 0.0), live)
    tl.store(out + 7, tl.maximum(f[1] * SH0 + 0.5, 0.0), live)
    tl.store(out + 8, tl.maximum(f[2] * SH0 + 0.5, 0.0), live)
    tl.store(depth_ptr + p, z, live)
    tl.store(view_ptr + p, tl.zeros_like(x0) + v, live)
    tl.store(rect_ptr + p * 4, tl.where(drawn, x0, 0), live)
    tl.store(rect_ptr + p * 4 + 1, tl.where(drawn, y0, 0), live)
    tl.store(rect_ptr + p * 4 + 2, tl.where(drawn, x1, 0), live)
    tl.store(rect_ptr + p * 4 + 3, tl.where(drawn, y1, 0), live)


@triton.jit
def _moments(moments_ptr, first_ptr, rect_ptr, p, live):
    """The nine sums of kernels.gaussian.blend over all tiles of each pair, in tile order. A loop,
    since pairs differ in tiles.
    """
    at = tl.load(first_ptr + p, live, 0)
    rect = rect_ptr + p * 4
    across = tl.load(rect + 2, live, 0) - tl.load(rect, live, 0)
    count = across * (tl.load(rect + 3, live, 0) - tl.load(rect + 1, live, 0))
    zero = tl.zeros(count.shape, tl.float32)
    c = (zero, zero, zero)
    d = (zero, zero, zero)
    e = (zero, zero, zero)
    f = count > 0
    for k in range(0, tl.max(count, 0)):
        here = moments_ptr + (at + k) * 9
        mask = k < count
        c = add3(c, load3(here, mask))
        d = add3(d, load3(here + 3, mask))
        e = add3(e, load3(here + 6, mask))
    return c, d, e, f


@triton.jit(do_not_specialize=["W", "H"])
def _project_backward(
    gaussians_ptr,
    cameras_ptr,
    views_ptr,
    scenes_ptr,
    by_scene_ptr,
    rect_ptr,
    first_ptr,
    moments_ptr,
    grad_ptr,
    W,
    H,
    kernel_size,
    BLOCK: tl.constexpr,
):
    scene = scenes_ptr + tl.program_id(1) * 4
    first = tl.load(scene)
    count = tl.load(scene + 1)
    mine = tl.load(scene + 2)
    views = tl.load(scene + 3)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < count
    g = gaussians_ptr + (first + n) * 14
    m = load3(g, live)
    s = load3(g + 3, live)
    f = load3(g + 11, live)
    q = (
        tl.load(g + 6, live, 0.0),
        tl.load(g + 7, live, 0.0),
        tl.load(g + 8, live, 0.0),
        tl.load(g + 9, live, 0.0),
    )
    opacity = tl.load(g + 10, live, 0.0)
    zero = tl.zeros([BLOCK], tl.float32)
    gm = (zero, zero, zero)
    gs = (zero, zero, zero)
    gf = (zero, zero, zero)
    go = zero
    gw = zero
    gx = zero
    gy = zero
    gz = zero
    for i in range(0, views):
        v = tl.load(by_scene_ptr + mine + i)
        p = tl.load(views_ptr + v * 3 + 2) + n
        first_order, second_order, colour, drawn = _moments(
            moments_ptr, first_ptr, rect_ptr, p, live
        )
        total, sx, sy = first_order  # not nested in the line above: Triton 3.6 cannot read that
        sxx, sxy, syy = second_order
        r, t, focal, centre = load_camera(cameras_ptr, v)
        x, y, z = dot3(r[0], m) + t[0], dot3(r[1], m) + t[1], dot3(r[2], m) + t[2]
        z = tl.where(drawn, z, 1.0)
        o = rotated(r, q)
        tx, free_x = clamped_ratio(x, z, focal[0], centre[0], W)
        ty, free_y = clamped_ratio(y, z, focal[1], centre[1], H)
        fx, fy = focal[0] / z, focal[1] / z
        k0, k1 = axis_row(o[0], o[2], tx, fx), axis_row(o[1], o[2], ty, fy)
        n0, n1 = scaled3(k0, s), scaled3(k1, s)
        a, b, c, cross, before, after = filtered(n0, n1, kernel_size)
        after = tl.where(drawn, after, 1.0)
        rho = compensated(before, after)
        safe = tl.where(drawn, rho, 1.0)

        # opacity * rho, then the conic: an entry's gradient is minus half (once for the
        # off-diagonal) its moment
        per_opacity = tl.where(drawn, total / tl.where(drawn, opacity * safe, 1.0), 0.0)
        go += tl.where(drawn, per_opacity * rho, 0.0)
        g_rho2 = per_opacity * opacity * 0.5 / safe
        inverse = 1 / after
        c11 = (c + kernel_size) * inverse
        c12 = -b * inverse
        c22 = (a + kernel_size) * inverse
        g_after = (0.5 * sxx * c11 + sxy * c12 + 0.5 * syy * c22) * inverse - g_rho2 * before / (
            (after + EPS) * (after + EPS)
        )
        g_before = g_after + g_rho2 / (after + EPS)
        ga = -0.5 * syy * inverse + kernel_size * g_after
        gc = -0.5 * sxx * inverse + kernel_size * g_after
        gb = sxy * inverse
        g0 = add3(add3(times3(n0, 2 * ga), times3(n1, gb)), times3(cross3(n1, cross), 2 * g_before))
        g1 = add3(add3(times3(n1, 2 * gc), times3(n0, gb)), times3(cross3(cross, n0), 2 * g_before))
        gs = add3(gs, masked3(drawn, add3(scaled3(g0, k0), scaled3(g1, k1))))

        # rows of J R Q
        g0, g1 = scaled3(g0, s), scaled3(g1, s)
        gtx, gty = -fx * dot3(g0, o[2]), -fy * dot3(g1, o[2])
        z_grad = -(dot3(g0, k0) + dot3(g1, k1) + gtx * tx + gty * ty) / z
        o0, o1 = times3(g0, fx), times3(g1, fy)
        o2 = -(tx * o0[0] + ty * o1[0]), -(tx * o0[1] + ty * o1[1]), -(tx * o0[2] + ty * o1[2])
        h0 = rotate_back(r, (o0[0], o1[0], o2[0]))
        h1 = rotate_back(r, (o0[1], o1[1], o2[1]))
        h2 = rotate_back(r, (o0[2], o1[2], o2[2]))
        dw, dx, dy, dz = quaternion_gradient(
            q, (h0[0], h1[0], h2[0]), (h0[1], h1[1], h2[1]), (h0[2], h1[2], h2[2])
        )
        dx, dy, dz = masked3(drawn, (dx, dy, dz))
        gw = gw + tl.where(drawn, dw, 0.0)
        gx = gx + dx
        gy = gy + dy
        gz = gz + dz

        # mean: its gradient is minus the conic times the first moments
        w = 1 / (z + 1e-7)
        gmx, gmy = -(c11 * sx + c12 * sy) * w, -(c12 * sx + c22 * sy) * w
        ox, oy = centre[0] - 0.5 * W, centre[1] - 0.5 * H
        z_grad += gmx * (ox - (focal[0] * x + ox * z) * w) + gmy * (
            oy - (focal[1] * y + oy * z) * w
        )
        x_grad = tl.where(free_x, gtx / z, 0.0) + gmx * focal[0]
        y_grad = tl.where(free_y, gty / z, 0.0) + gmy * focal[1]
        gm = add3(gm, masked3(drawn, rotate_back(r, (x_grad, y_grad, z_grad))))
        gf = add3(gf, colour)

    out = grad_ptr + (first + n) * 14
    tl.store(out, gm[0], live)
    tl.store(out + 1, gm[1], live)
    tl.store(out + 2, gm[2], live)
    tl.store(out + 3, gs[0], live)
    tl.store(out + 4, gs[1], live)
    tl.store(out + 5, gs[2], live)
    tl.store(out + 6, gw, live)
    tl.store(out + 7, gx, live)
    tl.store(out + 8, gy, live)
    tl.store(out + 9, gz, live)
    tl.store(out + 10, go, live)
    tl.store(out + 11, tl.where(f[0] * SH0 + 0.5 >= 0, gf[0] * SH0, 0.0), live)
    tl.store(out + 12, tl.where(f[1] * SH0 + 0.5 >= 0, gf[1] * SH0, 0.0), live)
    tl.store(out + 13, tl.where(f[2] * SH0 + 0.5 >= 0, gf[2] * SH0, 0.0), live)


def project(
    gaussians: Tensor,  # [G, 14] fp32
    # [V, 16] fp32: rotation 9, translation 3, focal lengths 2 (px), principal point 2 (px)
    cameras: Tensor,
    layout: Layout,
    width: int,
    height: int,
    kernel_size: float,
) -> Projected:
    """All pairs in one launch."""
    P = layout.pair_start[-1]
    record = gaussians.new_empty(P, 9)
    depth = gaussians.new_empty(P)
    rect, view = (gaussians.new_empty(*size, dtype=torch.int32) for size in ((P, 4), (P,)))
    tiles = _tiles()
    backend.launch(
        _project,
        (triton.cdiv(layout.most, tiles["BLOCK"]), len(layout.view_scene)),
        gaussians,
        cameras,
        layout.views,
        record,
        depth,
        rect,
        view,
        width,
        height,
        kernel_size,
        **tiles,
    )
    return Projected(record, depth, rect, view)


def project_backward(
    gaussians: Tensor,  # [G, 14]
    cameras: Tensor,  # [V, 16]
    layout: Layout,
    width: int,
    height: int,
    kernel_size: float,
    rect: Tensor,  # [P, 4] int32
    first: Tensor,  # [P] int64: the first of a pair's instances
    moments: Tensor,  # [I, 9] sums over the pixels of each instance, see kernels.gaussian.blend
) -> Tensor:
    """The gradient of the Gaussians [G, 14], each written once: no atomics, the same bits every
    time.
    """
    grad = torch.empty_like(gaussians)
    tiles = _tiles()
    backend.launch(
        _project_backward,
        (triton.cdiv(layout.most, tiles["BLOCK"]), len(layout.scenes)),
        gaussians,
        cameras,
        layout.views,
        layout.scenes,
        layout.by_scene,
        rect,
        first,
        moments,
        grad,
        width,
        height,
        kernel_size,
        **tiles,
    )
    return grad
