"""Rasterisation on a GPU: the nearest face of every pixel resolved, and its gradient.

V views, F faces, P clip rows, N = V H W pixels. Pointers as in kernels.mesh.pixels_gpu.

    _raster_resolve   the key of every pixel (kernels.mesh.zbuffer_gpu) -> u, v, z / w, face + 1
    _raster_backward  the gradient of (u, v) -> that of x, y, w of the three corners of each pixel's
                      face
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.mesh.pixels_gpu import clip_gradient, corner_order, pixel_block
from kernels.mesh.zbuffer_gpu import NONE, fill_zbuffer


@triton.jit
def _corner(clip_ptr, faces_ptr, table_ptr, v, face, k, live):
    """x, y, z, w of corner k in float64, and its row.

    Cross products of these numbers lose digits where faces are small.
    """
    t = table_ptr + v * 4
    f = faces_ptr + (tl.load(t, live, 0) + face) * 3
    row = tl.load(t + 2, live, 0) + tl.load(f + k, live, 0)
    c = clip_ptr + row * 4
    x = tl.load(c, live, 0.0).to(tl.float64)
    y = tl.load(c + 1, live, 0.0).to(tl.float64)
    z = tl.load(c + 2, live, 0.0).to(tl.float64)
    w = tl.load(c + 3, live, 1.0).to(tl.float64)
    return x, y, z, w, row


@triton.jit
def _seen(clip_ptr, faces_ptr, table_ptr, v, face, fx, fy, live):
    """The three corners of a face as seen from pixels at NDC (fx, fy).

    For each corner (x - fx w, y - fy w); then the three z, w and rows.
    """
    x0, y0, z0, w0, r0 = _corner(clip_ptr, faces_ptr, table_ptr, v, face, 0, live)
    x1, y1, z1, w1, r1 = _corner(clip_ptr, faces_ptr, table_ptr, v, face, 1, live)
    x2, y2, z2, w2, r2 = _corner(clip_ptr, faces_ptr, table_ptr, v, face, 2, live)
    return (
        (x0 - fx * w0, y0 - fy * w0),
        (x1 - fx * w1, y1 - fy * w1),
        (x2 - fx * w2, y2 - fy * w2),
        (z0, z1, z2),
        (w0, w1, w2),
        (r0, r1, r2),
    )


@triton.jit
def _centre(i, size):
    return (2 * i + 1).to(tl.float64) / (size * 1.0) - 1


@triton.jit(do_not_specialize=["N", "W", "H"])
def _raster_resolve(
    keys_ptr, clip_ptr, faces_ptr, table_ptr, rast_ptr, N, W, H, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    key = tl.load(keys_ptr + n, inside, NONE)
    live = key != NONE
    face = 0xFFFFFFFF - (key & 0xFFFFFFFF)
    fx = _centre(n % W, W)
    fy = _centre(n // W % H, H)
    p0, p1, p2, z, w, _ = _seen(clip_ptr, faces_ptr, table_ptr, n // W // H, face, fx, fy, live)
    a0 = p1[0] * p2[1] - p1[1] * p2[0]
    a1 = p2[0] * p0[1] - p2[1] * p0[0]
    a2 = p0[0] * p1[1] - p0[1] * p1[0]
    total = a0 + a1 + a2
    # 0: a face without area that covers a pixel as snapped
    total = tl.where(total != 0, total, 1.0)
    u = tl.minimum(tl.maximum(a0 / total, 0.0), 1.0)
    v = tl.minimum(tl.maximum(a1 / total, 0.0), 1.0)
    over = tl.maximum(u + v, 1.0)
    below = w[0] * a0 + w[1] * a1 + w[2] * a2
    depth = (z[0] * a0 + z[1] * a1 + z[2] * a2) / tl.where(below != 0, below, 1.0)
    depth = tl.minimum(tl.maximum(depth, -1.0), 1.0)
    out = rast_ptr + n * 4
    tl.store(out, tl.where(live, u / over, 0.0).to(tl.float32), inside)
    tl.store(out + 1, tl.where(live, v / over, 0.0).to(tl.float32), inside)
    tl.store(out + 2, tl.where(live, depth, 0.0).to(tl.float32), inside)
    tl.store(out + 3, tl.where(live, face + 1, 0).to(tl.float32), inside)


@triton.jit
def _store_corner(grad_ptr, key_ptr, gx, gy, fx, fy, row, live, inside):
    tl.store(grad_ptr, gx.to(tl.float32), inside)
    tl.store(grad_ptr + 1, gy.to(tl.float32), inside)
    tl.store(grad_ptr + 2, (-fx * gx - fy * gy).to(tl.float32), inside)
    tl.store(key_ptr, tl.where(live, row, -1).to(tl.int32), inside)


@triton.jit(do_not_specialize=["N", "W", "H"])
def _raster_backward(
    grad_ptr,
    rast_ptr,
    clip_ptr,
    faces_ptr,
    table_ptr,
    rows_ptr,
    key_ptr,
    N,
    W,
    H,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    face = tl.load(rast_ptr + n * 4 + 3, inside, 0.0).to(tl.int64) - 1
    live = face >= 0
    fx = _centre(n % W, W)
    fy = _centre(n // W % H, H)
    p0, p1, p2, _, _, row = _seen(clip_ptr, faces_ptr, table_ptr, n // W // H, face, fx, fy, live)
    a0 = p1[0] * p2[1] - p1[1] * p2[0]
    a1 = p2[0] * p0[1] - p2[1] * p0[0]
    a2 = p0[0] * p1[1] - p0[1] * p1[0]
    total = a0 + a1 + a2
    inverse = 1 / (total + tl.where(total < 0, -1e-6, 1e-6))
    g0 = tl.load(grad_ptr + n * 4, live, 0.0).to(tl.float64) * inverse
    g1 = tl.load(grad_ptr + n * 4 + 1, live, 0.0).to(tl.float64) * inverse
    mean = (g0 * a0 + g1 * a1) * inverse
    x0 = mean * (p2[1] - p1[1]) - g1 * p2[1]
    y0 = mean * (p1[0] - p2[0]) + g1 * p2[0]
    x1 = mean * (p0[1] - p2[1]) + g0 * p2[1]
    y1 = mean * (p2[0] - p0[0]) - g0 * p2[0]
    x2 = mean * (p1[1] - p0[1]) - g0 * p1[1] + g1 * p0[1]
    y2 = mean * (p0[0] - p1[0]) + g0 * p1[0] - g1 * p0[0]
    _store_corner(rows_ptr + n * 9, key_ptr + n * 3, x0, y0, fx, fy, row[0], live, inside)
    _store_corner(rows_ptr + n * 9 + 3, key_ptr + n * 3 + 1, x1, y1, fx, fy, row[1], live, inside)
    _store_corner(rows_ptr + n * 9 + 6, key_ptr + n * 3 + 2, x2, y2, fx, fy, row[2], live, inside)


def rasterize_triton(
    clip: Tensor,
    faces: Tensor,
    table: Tensor,
    most: int,
    pairs: int,
    height: int,
    width: int,
    order_by: Tensor | None,
) -> tuple[Tensor, Tensor, int]:
    """The picture [V, H, W, 4] (u, v, z / w, face + 1), and the order of its corners' rows.

    The order is `corner_order` in the table `order_by`, empty without one. The third result is the
    number of faces with missing rows; where there are any, the picture is 0. Waits once for the
    device.
    """
    keys, wrong = fill_zbuffer(clip, faces, table, most, pairs, height, width)
    rast = clip.new_empty(len(table), height, width, 4)
    order = table.new_empty(0)
    if wrong:
        return rast.zero_(), order, wrong
    N = len(keys)
    block = pixel_block(backend.target(clip))
    grid = (triton.cdiv(N, block["BLOCK"]),)
    inputs = (keys, clip, faces, table)
    backend.launch(_raster_resolve, grid, *inputs, rast, N, width, height, **block)
    if order_by is not None:
        order = corner_order(rast, faces, order_by)
    return rast, order, 0


def rasterize_triton_backward(
    grad: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> Tensor:
    """The gradient of the clip positions [P, 4]."""
    V, H, W, _ = rast.shape
    N = V * H * W
    block = pixel_block(backend.target(rast))
    rows = clip.new_empty(N * 3, 3)
    key = torch.empty(N * 3, dtype=torch.int32, device=clip.device)
    grid = (triton.cdiv(N, block["BLOCK"]),)
    inputs = (grad, rast, clip, faces, table)
    backend.launch(_raster_backward, grid, *inputs, rows, key, N, W, H, **block)
    return clip_gradient(rows, key, order, len(clip))
