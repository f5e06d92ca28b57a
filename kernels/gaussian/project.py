"""Projection of Gaussians to the screen, and its backward.

G Gaussians of B scenes, V views, P pairs of a view and a Gaussian of its scene.

The ellipse is the first-order (EWA) projection of Zwicker et al. 2001. The fixed low-pass filter of
kernel_size px^2 with the opacity compensation rho is that of Mip-Splatting (Yu et al. 2024), which
TRELLIS trains with:
    p = R m + t
    J = first-order projection at p (x/z and y/z clamped to 1.3 times the field of view)
    [a b; b c] = J R Q S^2 Q^T R^T J^T
    D = (a + kernel)(c + kernel) - b^2
    rho = sqrt(D0 / (D + 1e-6) + 1e-6), D0 = a c - b^2
    blended opacity = opacity * rho
    conic = inverse covariance.
With n0, n1 the rows of J R Q S: D0 = |n0 x n1|^2 and D = D0 + kernel (a + c) + kernel^2, sums of
squares. For a needle the textbook a c - b^2 loses every digit in fp32; these forms lose none, and
the backward differentiates them.

Gradients are exact but for one published rule: where x/z is clamped, its gradient goes to z as if z
times the clamped value were constant (twice the true term), and not to x. Thresholds, rectangles
and cameras get none.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.gaussian.columns import columns8, store_rows16
from kernels.gaussian.ellipse import (
    add3,
    cell_range,
    compensated,
    covariance_gradient,
    cross3,
    dot3,
    filtered,
    linearised,
    load_camera,
    load_gaussian,
    masked3,
    mean_gradient,
    quaternion_gradient,
    rotate_back,
    rotated,
    rotation_gradient,
    scaled3,
    times3,
)
from kernels.gaussian.records import PACKED, Bins, Packed, parts
from kernels.views import SH0, ViewTable

NEAR = tl.constexpr(0.2)  # a Gaussian whose centre is nearer is not drawn
VISIBLE = tl.constexpr(1.0 / 255.0)  # the least alpha that is blended
SH_C0 = tl.constexpr(SH0)
FORM = tl.constexpr(-0.5 * 1.4426950408889634)  # a quadratic form as an exponent of 2


def _tiles(target: str) -> dict:
    """Return the Gaussians of a program, one per thread (not yet measured on a GPU).

    One warp: a program loops as often as its largest Gaussian needs, and rows go to columns
    without a barrier.
    """
    if target == "interpreter":
        return {"BLOCK": 256, "num_warps": 1}
    return {"BLOCK": 64 if target.startswith("gfx9") else 32, "num_warps": 1}


@triton.jit
def _bits(n):
    """Return whole numbers as floats of the same bits."""
    return n.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["W", "H"])
def _project(
    gaussians_ptr,  # [G, 14]
    cameras_ptr,  # [V, 16]
    views_ptr,  # [V, 3], see ViewTable
    # results, see Packed
    record_ptr,
    depth_ptr,
    tiles_ptr,
    cells_ptr,
    W,
    H,
    kernel_size,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    v = tl.program_id(1)
    first = tl.load(views_ptr + v * 3)
    count = tl.load(views_ptr + v * 3 + 1)
    pair = tl.load(views_ptr + v * 3 + 2)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < count
    r, t, focal, centre = load_camera(cameras_ptr, v)
    m, s, q, opacity, f = load_gaussian(gaussians_ptr, first + n, live, BLOCK)

    x = dot3(r[0], m) + t[0]
    y = dot3(r[1], m) + t[1]
    z = dot3(r[2], m) + t[2]
    in_front = z > NEAR
    safe = tl.where(in_front, z, 1.0)
    o = rotated(r, q)
    _, _, rows = linearised((x, y, safe), o, focal, centre, W, H)
    n0 = scaled3(rows[0], s)
    n1 = scaled3(rows[1], s)
    a, b, c, _, before, after = filtered(n0, n1, kernel_size)
    seen = in_front & (after > 0) & (after < float("inf"))
    after = tl.where(seen, after, 1.0)
    blended = opacity * compensated(before, after)
    w = 1 / (safe + 1e-7)
    mx = (focal[0] * x + (centre[0] - 0.5 * W) * safe) * w + 0.5 * (W - 1)
    my = (focal[1] * y + (centre[1] - 0.5 * H) * safe) * w + 0.5 * (H - 1)

    a = a + kernel_size
    c = c + kernel_size
    half = 0.5 * (a - c)
    radius = tl.ceil(3 * tl.sqrt(0.5 * (a + c) + tl.sqrt(tl.maximum(0.1, half * half + b * b))))
    # alpha = 1/255 where the exponent is -fading / 2
    fading = 2 * tl.log(tl.maximum(blended * 255, 1.0))
    x0, x1 = cell_range(mx, radius, 1.001 * tl.sqrt(fading * a) + 0.01, W, PARTS)
    y0, y1 = cell_range(my, radius, 1.001 * tl.sqrt(fading * c) + 0.01, H, PARTS)
    drawn = seen & (blended >= VISIBLE) & (x1 > x0) & (y1 > y0)
    # a colour that is not finite would spread over every pixel of its tiles
    most = float("inf")
    drawn = drawn & (tl.abs(f[0]) < most) & (tl.abs(f[1]) < most) & (tl.abs(f[2]) < most)

    p = pair + n
    red = tl.maximum(f[0] * SH_C0 + 0.5, 0.0)
    green = tl.maximum(f[1] * SH_C0 + 0.5, 0.0)
    blue = tl.maximum(f[2] * SH_C0 + 0.5, 0.0)
    shape = 1 / a * FORM, -b / a, a / after * FORM
    x0 = tl.where(drawn, x0, 0)
    y0 = tl.where(drawn, y0, 0)
    x1 = tl.where(drawn, x1, 0)
    y1 = tl.where(drawn, y1, 0)
    zero = tl.zeros_like(a)
    store_rows16(
        record_ptr,
        p,
        live,
        (mx, my, shape[0], shape[1]),
        (shape[2], tl.log2(tl.maximum(blended, VISIBLE)), red, green),
        (blue, _bits(x0), _bits(y0), _bits(x1)),
        (_bits(y1), _bits(tl.zeros_like(x0) + v), zero, zero),
        BLOCK,
        16,
    )
    tl.store(depth_ptr + p, z, live)
    across = tl.cdiv(x1, PARTS) - x0 // PARTS
    tiles = across * (tl.cdiv(y1, PARTS) - y0 // PARTS)
    tl.store(tiles_ptr + p, tiles, live)
    tl.store(cells_ptr + p, (x1 - x0) * (y1 - y0), live)


@triton.jit
def _moments(moments_ptr, last_ptr, first_ptr, start_ptr, tiles_ptr, p, live, N: tl.constexpr):
    """Add up the nine sums of kernels.gaussian.blend over the slots of each pair, in order.

    Returns sums 0 to 2, 3 to 5, 6 to 8, and whether the pair is in a part of a tile.
    """
    tiles = tl.load(tiles_ptr + p, live, 0)
    start = start_ptr + tl.load(first_ptr + p, tiles > 0, 0)
    at = tl.load(start, tiles > 0, 0)
    count = tl.load(start + tiles, tiles > 0, 0) - at
    at = at.to(tl.int64)
    rows = moments_ptr + at[:, None] * 8 + tl.arange(0, 8)[None, :]
    left = count[:, None]
    end = at + count
    sums = tl.zeros([N, 8], tl.float32)
    last = tl.zeros([N], tl.float32)
    for k in range(0, tl.max(count, 0)):
        sums += tl.load(rows + k * 8, k < left, 0.0)
        # a mask of its own: one in two layouts would pass through shared memory every time
        last += tl.load(last_ptr + at + k, at + k < end, 0.0)
    a0, a1, a2, a3, a4, a5, a6, a7 = columns8(tl.reshape(sums, [N, 2, 2, 2]))
    return (a0, a1, a2), (a3, a4, a5), (a6, a7, last), count > 0


@triton.jit(do_not_specialize=["W", "H"])
def _project_backward(
    gaussians_ptr,  # [G, 14]
    cameras_ptr,  # [V, 16]
    # see ViewTable
    views_ptr,
    scenes_ptr,
    by_scene_ptr,
    # of the pairs and their instances
    tiles_ptr,
    first_ptr,
    start_ptr,
    moments_ptr,
    last_ptr,
    grad_ptr,  # result [G, 14]
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
    m, s, q, opacity, f = load_gaussian(gaussians_ptr, first + n, live, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)
    g_center = (zero, zero, zero)
    g_scale = (zero, zero, zero)
    g_color = (zero, zero, zero)
    g_opacity = zero
    g_qw = zero
    g_q = (zero, zero, zero)
    for i in range(0, views):
        v = tl.load(by_scene_ptr + mine + i)
        p = tl.load(views_ptr + v * 3 + 2) + n
        first_order, second_order, color, drawn = _moments(
            moments_ptr, last_ptr, first_ptr, start_ptr, tiles_ptr, p, live, BLOCK
        )
        total, sx, sy = first_order  # not nested in the line above: Triton 3.6 cannot read that

        # the forward pass again
        r, t, focal, centre = load_camera(cameras_ptr, v)
        x = dot3(r[0], m) + t[0]
        y = dot3(r[1], m) + t[1]
        z = dot3(r[2], m) + t[2]
        z = tl.where(drawn, z, 1.0)
        o = rotated(r, q)
        ratio, free, rows = linearised((x, y, z), o, focal, centre, W, H)
        n0 = scaled3(rows[0], s)
        n1 = scaled3(rows[1], s)
        a, b, c, cross, before, after = filtered(n0, n1, kernel_size)
        after = tl.where(drawn, after, 1.0)
        rho = compensated(before, after)
        safe = tl.where(drawn, rho, 1.0)

        # opacity * rho, then the covariance
        per_opacity = tl.where(drawn, total / tl.where(drawn, opacity * safe, 1.0), 0.0)
        g_opacity += tl.where(drawn, per_opacity * rho, 0.0)
        g_rho2 = per_opacity * opacity * 0.5 / safe
        inverse = 1 / after
        conic = ((c + kernel_size) * inverse, -b * inverse, (a + kernel_size) * inverse)
        ga, gb, gc, g_before = covariance_gradient(
            second_order, conic, inverse, g_rho2, before, after, kernel_size
        )
        g0 = add3(add3(times3(n0, 2 * ga), times3(n1, gb)), times3(cross3(n1, cross), 2 * g_before))
        g1 = add3(add3(times3(n1, 2 * gc), times3(n0, gb)), times3(cross3(cross, n0), 2 * g_before))
        of_scale = add3(scaled3(g0, rows[0]), scaled3(g1, rows[1]))
        g_scale = add3(g_scale, masked3(drawn, of_scale))

        # rows of J R Q
        g0 = scaled3(g0, s)
        g1 = scaled3(g1, s)
        fx = focal[0] / z
        fy = focal[1] / z
        gtx = -fx * dot3(g0, o[2])
        gty = -fy * dot3(g1, o[2])
        gz = -(dot3(g0, rows[0]) + dot3(g1, rows[1]) + gtx * ratio[0] + gty * ratio[1]) / z
        h0, h1, h2 = rotation_gradient(r, times3(g0, fx), times3(g1, fy), ratio)
        dw, dx, dy, dz = quaternion_gradient(q, h0, h1, h2)
        g_q = add3(g_q, masked3(drawn, (dx, dy, dz)))
        g_qw = g_qw + tl.where(drawn, dw, 0.0)

        # the mean on the screen, then the centre
        ox = centre[0] - 0.5 * W
        oy = centre[1] - 0.5 * H
        gmx, gmy, of_z = mean_gradient(sx, sy, conic, (x, y, z), focal, ox, oy)
        gz += of_z
        gx = tl.where(free[0], gtx / z, 0.0) + gmx * focal[0]
        gy = tl.where(free[1], gty / z, 0.0) + gmy * focal[1]
        g_center = add3(g_center, masked3(drawn, rotate_back(r, (gx, gy, gz))))
        g_color = add3(g_color, color)

    g_red = tl.where(f[0] * SH_C0 + 0.5 >= 0, g_color[0] * SH_C0, 0.0)
    g_green = tl.where(f[1] * SH_C0 + 0.5 >= 0, g_color[1] * SH_C0, 0.0)
    g_blue = tl.where(f[2] * SH_C0 + 0.5 >= 0, g_color[2] * SH_C0, 0.0)
    store_rows16(
        grad_ptr,
        first + n,
        live,
        (g_center[0], g_center[1], g_center[2], g_scale[0]),
        (g_scale[1], g_scale[2], g_qw, g_q[0]),
        (g_q[1], g_q[2], g_opacity, g_red),
        (g_green, g_blue, zero, zero),
        BLOCK,
        14,
    )


def project(
    gaussians: Tensor,  # [G, 14] fp32
    # [V, 16] fp32: rotation 9, translation 3, focal lengths 2 (px), principal point 2 (px)
    cameras: Tensor,
    table: ViewTable,
    width: int,
    height: int,
    kernel_size: float,
) -> Packed:
    """Project all pairs in one launch."""
    P = table.pair_start[-1]
    record = gaussians.new_empty(P, PACKED)
    depth = gaussians.new_empty(P)
    tiles = gaussians.new_empty(P, dtype=torch.int32)
    cells = torch.empty_like(tiles)
    target = backend.target(gaussians)
    side = parts(target)
    block = _tiles(target)
    backend.launch(
        _project,
        (triton.cdiv(table.most, block["BLOCK"]), len(table.view_scene)),
        gaussians,
        cameras,
        table.views,
        record,
        depth,
        tiles,
        cells,
        width,
        height,
        kernel_size,
        PARTS=side,
        **block,
    )
    return Packed(record, depth, tiles, cells, side)


def project_backward(
    gaussians: Tensor,  # [G, 14]
    cameras: Tensor,  # [V, 16]
    table: ViewTable,
    width: int,
    height: int,
    kernel_size: float,
    tiles: Tensor,  # [P] int32, see Packed
    bins: Bins,
    # sums over the pixels of each entry, see kernels.gaussian.blend
    moments: Tensor,  # [slots, 8]
    last: Tensor,  # [slots]
) -> Tensor:
    """Return the gradient of the Gaussians [G, 14].

    Each is written once, without atomics: the same bits every time.
    """
    grad = torch.empty_like(gaussians)
    block = _tiles(backend.target(gaussians))
    backend.launch(
        _project_backward,
        (triton.cdiv(table.most, block["BLOCK"]), len(table.scenes)),
        gaussians,
        cameras,
        table.views,
        table.scenes,
        table.by_scene,
        tiles,
        bins.first,
        bins.start,
        moments,
        last,
        grad,
        width,
        height,
        kernel_size,
        **block,
    )
    return grad
