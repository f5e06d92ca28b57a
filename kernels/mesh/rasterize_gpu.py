"""Rasterisation on a GPU: V views, F faces, P clip rows, R pieces. Each stage is one launch for all
views.

    _raster_snap     clip rows -> integer positions on a grid of 1/16 px, z / w, and which frustum
                     planes are crossed
    _raster_small    one face per thread: those of few pixels go straight to the z-buffer, the
                     others onto two lists
    _raster_large    the listed faces, those that reach out of the frustum clipped to pieces first,
                     a tile of pixels at a time
    _raster_resolve  the nearest face of every pixel -> u, v, z / w, face + 1

A pixel of the z-buffer is one integer, the depth in its high half and the complement of the face in
its low half, so an atomic minimum gives the nearest face, the later one of equals, whatever the
order of the threads. The depth is interpolated between the snapped corners with the integer edge
functions as weights: convex, hence good to rounding on the thinnest sliver. Edge functions at
pixels of the picture are below 2^31 for pictures up to 2^23 pixels, differences of int32 that wrap
included.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.mesh.frustum import EMPTY, Pieces, clip_faces
from kernels.mesh.pixels_gpu import pixel_block, spread
from kernels.mesh.zbuffer_gpu import NONE, _raster_large, _raster_small, _raster_snap
from kernels.reduce import sum_rows


def _tiles(target: str) -> dict:
    """Not yet measured on a GPU. `few`: pixels of a box up to which one thread fills it; `pieces`
    and `pixels`: what one program of `_raster_large` has at once; `strides`: programs that share
    the tiles of the same pieces.
    """
    if target == "interpreter":  # few, large programs
        return {"faces": 512, "few": 16, "pieces": 32, "strides": 1, "pixels": 256}
    return {"faces": 128, "few": 32, "pieces": 1, "strides": 16, "pixels": 256}


@triton.jit
def _corner(clip_ptr, faces_ptr, table_ptr, v, face, k, live):
    """x, y, z, w of corner k in float64: what is computed of them loses digits where faces are
    small.
    """
    t = table_ptr + v * 4
    row = tl.load(t + 2, live, 0) + tl.load(
        faces_ptr + (tl.load(t, live, 0) + face) * 3 + k, live, 0
    )
    c = clip_ptr + row * 4
    x = tl.load(c, live, 0.0).to(tl.float64)
    y = tl.load(c + 1, live, 0.0).to(tl.float64)
    return (
        x,
        y,
        tl.load(c + 2, live, 0.0).to(tl.float64),
        tl.load(c + 3, live, 1.0).to(tl.float64),
        row,
    )


@triton.jit
def _seen(clip_ptr, faces_ptr, table_ptr, v, face, fx, fy, live):
    """The three corners from pixels at NDC (fx, fy): x - fx w and y - fy w of each, and the three
    z, w and rows.
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
    out = rast_ptr + n * 4
    tl.store(out, tl.where(live, u / over, 0.0).to(tl.float32), inside)
    tl.store(out + 1, tl.where(live, v / over, 0.0).to(tl.float32), inside)
    tl.store(
        out + 2,
        tl.where(live, tl.minimum(tl.maximum(depth, -1.0), 1.0), 0.0).to(tl.float32),
        inside,
    )
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
    clip: Tensor, faces: Tensor, table: Tensor, most: int, pairs: int, height: int, width: int
) -> tuple[Tensor, int]:
    """The picture [V, H, W, 4] (u, v, z / w, face + 1), and how many faces name a row that is not
    there. Waits once for the device, for the lengths of the two lists.
    """
    V = len(table)
    P = len(clip)
    device = clip.device
    tiles, block = _tiles(backend.target(clip)), pixel_block(backend.target(clip))
    snapped = torch.empty(P, 3, dtype=torch.int32, device=device)
    depth = clip.new_empty(P)
    backend.launch(
        _raster_snap,
        (triton.cdiv(P, block["BLOCK"]),),
        clip,
        snapped,
        depth,
        P,
        width,
        height,
        **block,
    )
    keys = torch.full((V * height * width,), EMPTY, device=device)
    names = torch.empty(pairs, dtype=torch.int64, device=device)
    counters = torch.zeros(3, dtype=torch.int32, device=device)
    grid = (triton.cdiv(most, tiles["faces"]), V)
    lists = (keys, names, counters, pairs, width, height)
    few = {"FEW": tiles["few"], "BLOCK": tiles["faces"], "num_warps": 4}
    backend.launch(_raster_small, grid, snapped, depth, faces, table, *lists, **few)
    large, partly, wrong = counters.tolist()
    rast = clip.new_empty(V, height, width, 4)
    if wrong:
        return rast.zero_(), wrong
    if large + partly:
        pieces = _pieces(
            torch.cat([names[:large], names[pairs - partly :]]),
            large,
            clip,
            snapped,
            depth,
            faces,
            table,
            height,
            width,
        )
        R = len(pieces.view)
        grid = (triton.cdiv(R, tiles["pieces"]), tiles["strides"])
        shape = {"PIECES": tiles["pieces"], "PIXELS": tiles["pixels"], "num_warps": 4}
        backend.launch(_raster_large, grid, *pieces, keys, R, width, height, **shape)
    N = V * height * width
    backend.launch(
        _raster_resolve,
        (triton.cdiv(N, block["BLOCK"]),),
        keys,
        clip,
        faces,
        table,
        rast,
        N,
        width,
        height,
        **block,
    )
    return rast, 0


def _pieces(
    names, large: int, clip, snapped, depth, faces, table, height: int, width: int
) -> Pieces:
    """The listed faces, the first `large` whole, the others clipped."""
    view = names >> 32
    face = names & 0xFFFFFFFF
    rows = faces[table[view, 0] + face].long() + table[view, 2:3]
    xy = snapped[rows][..., :2]
    z = depth[rows]
    whole = Pieces(xy[:large].reshape(-1, 6), z[:large], view[:large], face[:large])
    if large == len(names):
        return whole
    cut = clip_faces(
        clip[rows[large:]], xy[large:], z[large:], view[large:], face[large:], height, width
    )
    return Pieces(*(torch.cat(pair) for pair in zip(whole, cut, strict=True)))


def rasterize_triton_backward(
    grad: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> Tensor:
    """Of the clip positions [P, 4]; `order` is that of `corner_order`."""
    V, H, W, _ = rast.shape
    N = V * H * W
    block = pixel_block(backend.target(rast))
    rows = clip.new_empty(N * 3, 3)
    key = torch.empty(N * 3, dtype=torch.int32, device=clip.device)
    grid = (triton.cdiv(N, block["BLOCK"]),)
    backend.launch(
        _raster_backward, grid, grad, rast, clip, faces, table, rows, key, N, W, H, **block
    )
    return spread(sum_rows(rows, key, order, len(clip)))
