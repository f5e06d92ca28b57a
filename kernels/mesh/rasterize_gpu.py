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
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend
from kernels.mesh.rasterize_cpu import EMPTY, NOWHERE, Pieces, clip_faces
from kernels.reduce import sum_rows

PIXELS_MAX = 1 << 23
NONE = tl.constexpr(EMPTY)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to even
LARGEST = tl.constexpr(1048576.0)
OFF = tl.constexpr(NOWHERE)


def _tiles(target: str) -> dict:
    """Not yet measured on a GPU. `few`: pixels of a box up to which one thread fills it; `pieces`
    and `pixels`: what one program of `_raster_large` has at once; `strides`: programs that share
    the tiles of the same pieces.
    """
    if target == "interpreter":  # few, large programs
        return {"faces": 512, "few": 16, "pieces": 32, "strides": 1, "pixels": 256}
    return {"faces": 128, "few": 32, "pieces": 1, "strides": 16, "pixels": 256}


@triton.jit
def _rounded(x):
    # the clamp keeps the sum out of a fused product
    return (tl.minimum(tl.maximum(x, -LARGEST), LARGEST) + ROUND) - ROUND


@triton.jit(do_not_specialize=["P", "W", "H"])
def _raster_snap(clip_ptr, snapped_ptr, depth_ptr, P, W, H, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < P
    c = clip_ptr + n * 4
    x, y, z, w = (
        tl.load(c, live, 0.0),
        tl.load(c + 1, live, 0.0),
        tl.load(c + 2, live, 0.0),
        tl.load(c + 3, live, 1.0),
    )
    code = (
        (x > w).to(tl.int32)
        + 2 * (x < -w).to(tl.int32)
        + 4 * (y > w).to(tl.int32)
        + 8 * (y < -w).to(tl.int32)
    )
    code += 16 * (z > w).to(tl.int32) + 32 * (z < -w).to(tl.int32)
    finite = tl.abs(x) + tl.abs(y) + tl.abs(z) + tl.abs(w) < float("inf")
    code = tl.where(finite & ((w != 0) | (code != 0)), code, OFF)
    inside = code == 0
    # rounded as IEEE does: every kernel and the torch path agree
    scale = tl.div_rn(1.0, tl.where(inside, w, 1.0))
    px, py = _rounded(x * scale * (W * 8.0)), _rounded(y * scale * (H * 8.0))
    out = snapped_ptr + n * 3
    tl.store(out, tl.where(inside, px, 0.0).to(tl.int32), live)
    tl.store(out + 1, tl.where(inside, py, 0.0).to(tl.int32), live)
    tl.store(out + 2, code, live)
    tl.store(depth_ptr + n, tl.where(inside, z * scale, 0.0), live)


@triton.jit
def _box(a, b, c, size):
    """First and last pixel whose centre may lie between three coordinates."""
    low, high = tl.minimum(tl.minimum(a, b), c), tl.maximum(tl.maximum(a, b), c)
    return tl.maximum((low + 8 * size + 7) >> 4, 0), tl.minimum(
        (high + 8 * size - 8) >> 4, size - 1
    )


@triton.jit
def _edge(ax, ay, bx, by, px, py, sign):
    """Edge function a -> b at a position, and whether it is on the inner side (left and
    smallest-row edges are inside).
    """
    dx, dy = (bx - ax) * sign, (by - ay) * sign
    e = (ax - px) * dy - (ay - py) * dx
    return e, (e > 0) | ((e == 0) & ((dy < 0) | ((dy == 0) & (dx > 0))))


@triton.jit
def _test(x0, y0, z0, x1, y1, z1, x2, y2, z2, area, face, i, j, W, H):
    """Whether pixels (i, j) are covered, and their keys."""
    px, py = i * 16 + 8 - 8 * W, j * 16 + 8 - 8 * H
    sign = tl.where(area < 0, -1, 1)
    _, in0 = _edge(x1, y1, x2, y2, px, py, sign)
    e1, in1 = _edge(x2, y2, x0, y0, px, py, sign)
    e2, in2 = _edge(x0, y0, x1, y1, px, py, sign)
    total = tl.maximum(tl.abs(area), 1).to(tl.float32)
    z = z0 + (e1.to(tl.float32) * (z1 - z0) + e2.to(tl.float32) * (z2 - z0)) / total + 0.0
    bits = z.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ascending with z
    return in0 & in1 & in2, (bits.to(tl.int64) << 32) | (0xFFFFFFFF - face.to(tl.int64))


@triton.jit
def _area(x0, y0, x1, y1, x2, y2):
    return (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)


@triton.jit
def _load3(ptr, live):
    return tl.load(ptr, live, 0), tl.load(ptr + 1, live, 0), tl.load(ptr + 2, live, 0)


@triton.jit
def _push(list_ptr, counter_ptr, name, flag, end, STEP: tl.constexpr):
    """Append to a list that grows from `end` by STEP; the order of the list is free."""
    number = tl.sum(flag.to(tl.int32), 0)
    if number > 0:
        base = tl.atomic_add(counter_ptr, number).to(tl.int64)
        at = base + tl.cumsum(flag.to(tl.int32), 0) - 1
        tl.store(list_ptr + end + STEP * at, name, flag)


@triton.jit(do_not_specialize=["Q", "W", "H"])
def _raster_small(
    snapped_ptr,
    depth_ptr,
    faces_ptr,
    table_ptr,
    keys_ptr,
    list_ptr,
    counter_ptr,
    Q,
    W,
    H,
    FEW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    v = tl.program_id(1).to(tl.int64)
    t = table_ptr + v * 4
    first, count, base, rows = tl.load(t), tl.load(t + 1), tl.load(t + 2), tl.load(t + 3)
    face = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = face < count
    f = faces_ptr + (first + face) * 3
    a, b, c = _load3(f, live)
    named = (tl.minimum(tl.minimum(a, b), c) >= 0) & (tl.maximum(tl.maximum(a, b), c) < rows)
    wrong = tl.sum((live & ~named).to(tl.int32), 0)
    if wrong > 0:
        tl.atomic_add(counter_ptr + 2, wrong)
    live = live & named
    a, b, c = base + a, base + b, base + c
    x0, y0, out0 = _load3(snapped_ptr + a * 3, live)
    x1, y1, out1 = _load3(snapped_ptr + b * 3, live)
    x2, y2, out2 = _load3(snapped_ptr + c * 3, live)
    some = out0 | out1 | out2
    whole = live & (some == 0)
    partly = live & (some != 0) & (some < OFF) & ((out0 & out1 & out2) == 0)
    area = _area(x0, y0, x1, y1, x2, y2)
    i0, i1 = _box(x0, x1, x2, W)
    j0, j1 = _box(y0, y1, y2, H)
    across, down = tl.maximum(i1 - i0 + 1, 0), tl.maximum(j1 - j0 + 1, 0)
    boxes = tl.where(whole & (area != 0), across * down, 0)
    small = (boxes > 0) & (boxes <= FEW)
    boxes_small = tl.where(small, boxes, 0)
    z0, z1, z2 = (
        tl.load(depth_ptr + a, small, 0.0),
        tl.load(depth_ptr + b, small, 0.0),
        tl.load(depth_ptr + c, small, 0.0),
    )
    across = tl.maximum(across, 1)
    for k in range(0, tl.max(boxes_small, 0)):
        i, j = i0 + k % across, j0 + k // across
        covered, key = _test(x0, y0, z0, x1, y1, z1, x2, y2, z2, area, face, i, j, W, H)
        covered = covered & (k < boxes_small)
        tl.atomic_min(keys_ptr + (v * H + j) * W + i, key, covered, sem="relaxed")
    name = (v << 32) | face
    _push(list_ptr, counter_ptr, name, boxes > FEW, 0, 1)
    _push(list_ptr, counter_ptr + 1, name, partly, Q - 1, -1)


@triton.jit(do_not_specialize=["R", "W", "H"])
def _raster_large(
    xy_ptr,
    depth_ptr,
    view_ptr,
    face_ptr,
    keys_ptr,
    R,
    W,
    H,
    PIECES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    live = r < R
    p, d = xy_ptr + r * 6, depth_ptr + r * 3
    x0, y0, x1 = _load3(p, live)
    y1, x2, y2 = _load3(p + 3, live)
    z0, z1, z2 = _load3(d, live)
    view, face = tl.load(view_ptr + r, live, 0), tl.load(face_ptr + r, live, 0)
    area = _area(x0, y0, x1, y1, x2, y2)
    i0, i1 = _box(x0, x1, x2, W)
    j0, j1 = _box(y0, y1, y2, H)
    across = tl.maximum((i1 - i0 + 16) // 16, 0)  # tiles of 16 x PIXELS / 16
    tiles = tl.where(
        area != 0, across * tl.maximum((j1 - j0 + PIXELS // 16) // (PIXELS // 16), 0), 0
    )
    across = tl.maximum(across, 1)
    lane = tl.arange(0, PIXELS)
    for k in range(tl.program_id(1), tl.max(tiles, 0), tl.num_programs(1)):
        i = (i0 + k % across * 16)[:, None] + (lane % 16)[None, :]  # (PIECES, PIXELS)
        j = (j0 + k // across * (PIXELS // 16))[:, None] + (lane // 16)[None, :]
        covered, key = _test(
            x0[:, None],
            y0[:, None],
            z0[:, None],
            x1[:, None],
            y1[:, None],
            z1[:, None],
            x2[:, None],
            y2[:, None],
            z2[:, None],
            area[:, None],
            face[:, None],
            i,
            j,
            W,
            H,
        )
        covered = covered & (i <= i1[:, None]) & (j <= j1[:, None]) & (k < tiles)[:, None]
        tl.atomic_min(keys_ptr + (view[:, None] * H + j) * W + i, key, covered, sem="relaxed")


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
    x, y = tl.load(c, live, 0.0).to(tl.float64), tl.load(c + 1, live, 0.0).to(tl.float64)
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
    fx, fy = _centre(n % W, W), _centre(n // W % H, H)
    p0, p1, p2, z, w, _ = _seen(clip_ptr, faces_ptr, table_ptr, n // W // H, face, fx, fy, live)
    a0, a1, a2 = (
        p1[0] * p2[1] - p1[1] * p2[0],
        p2[0] * p0[1] - p2[1] * p0[0],
        p0[0] * p1[1] - p0[1] * p1[0],
    )
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
    fx, fy = _centre(n % W, W), _centre(n // W % H, H)
    p0, p1, p2, _, _, row = _seen(clip_ptr, faces_ptr, table_ptr, n // W // H, face, fx, fy, live)
    a0, a1, a2 = (
        p1[0] * p2[1] - p1[1] * p2[0],
        p2[0] * p0[1] - p2[1] * p0[0],
        p0[0] * p1[1] - p0[1] * p1[0],
    )
    total = a0 + a1 + a2
    inverse = 1 / (total + tl.where(total < 0, -1e-6, 1e-6))
    g0 = tl.load(grad_ptr + n * 4, live, 0.0).to(tl.float64) * inverse
    g1 = tl.load(grad_ptr + n * 4 + 1, live, 0.0).to(tl.float64) * inverse
    mean = (g0 * a0 + g1 * a1) * inverse
    x0, y0 = mean * (p2[1] - p1[1]) - g1 * p2[1], mean * (p1[0] - p2[0]) + g1 * p2[0]
    x1, y1 = mean * (p0[1] - p2[1]) + g0 * p2[1], mean * (p2[0] - p0[0]) - g0 * p2[0]
    x2, y2 = (
        mean * (p1[1] - p0[1]) - g0 * p1[1] + g1 * p0[1],
        mean * (p0[0] - p1[0]) + g0 * p1[0] - g1 * p0[0],
    )
    _store_corner(rows_ptr + n * 9, key_ptr + n * 3, x0, y0, fx, fy, row[0], live, inside)
    _store_corner(rows_ptr + n * 9 + 3, key_ptr + n * 3 + 1, x1, y1, fx, fy, row[1], live, inside)
    _store_corner(rows_ptr + n * 9 + 6, key_ptr + n * 3 + 2, x2, y2, fx, fy, row[2], live, inside)


@triton.jit(do_not_specialize=["N", "size"])
def _corner_rows(rast_ptr, faces_ptr, table_ptr, key_ptr, N, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    face = tl.load(rast_ptr + n * 4 + 3, inside, 0.0).to(tl.int64) - 1
    live = face >= 0
    t = table_ptr + n // size * 4
    f = faces_ptr + (tl.load(t, live, 0) + face) * 3
    base = tl.load(t + 2, live, 0)
    for k in tl.static_range(3):
        row = base + tl.load(f + k, live, 0)
        tl.store(key_ptr + n * 3 + k, tl.where(live, row, -1).to(tl.int32), inside)


def pixel_block(target: str) -> dict:
    """Pixels or rows per program where a thread has one of them (not yet measured on a GPU)."""
    return {"BLOCK": 4096 if target == "interpreter" else 128, "num_warps": 4}


def corner_rows(rast: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """The three rows of every pixel's face: [V H W 3] int32, -1 where there is no face."""
    V, H, W, _ = rast.shape
    key = torch.empty(V * H * W * 3, dtype=torch.int32, device=rast.device)
    block = pixel_block(backend.target(rast))
    grid = (triton.cdiv(V * H * W, block["BLOCK"]),)
    backend.launch(_corner_rows, grid, rast, faces, table, key, V * H * W, H * W, **block)
    return key


def corner_order(rast: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """The corners of all pixels [V H W 3] in the order of their rows: what `sum_rows` takes. int64.

    Sorted by vertex, the corners of one clip row are neighbours too, since a view's pixels are and
    the sort is stable.
    """
    return corner_rows(rast, faces, table).sort(stable=True).indices


def rasterize_triton(
    clip: Tensor, faces: Tensor, table: Tensor, most: int, pairs: int, height: int, width: int
) -> tuple[Tensor, int]:
    """The picture [V, H, W, 4] (u, v, z / w, face + 1), and how many faces name a row that is not
    there. Waits once for the device, for the lengths of the two lists.
    """
    V, P, device = len(table), len(clip), clip.device
    tiles, block = _tiles(backend.target(clip)), pixel_block(backend.target(clip))
    snapped, depth = torch.empty(P, 3, dtype=torch.int32, device=device), clip.new_empty(P)
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
    view, face = names >> 32, names & 0xFFFFFFFF
    rows = faces[table[view, 0] + face].long() + table[view, 2:3]
    xy, z = snapped[rows][..., :2], depth[rows]
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
    rows, key = clip.new_empty(N * 3, 3), torch.empty(N * 3, dtype=torch.int32, device=clip.device)
    grid = (triton.cdiv(N, block["BLOCK"]),)
    backend.launch(
        _raster_backward, grid, grad, rast, clip, faces, table, rows, key, N, W, H, **block
    )
    return spread(sum_rows(rows, key, order, len(clip)))


def spread(xyw: Tensor) -> Tensor:
    """Gradients of x, y, w [P, 3] -> of clip positions [P, 4]: z has none."""
    return torch.cat([xyw[:, :2], torch.zeros_like(xyw[:, :1]), xyw[:, 2:]], 1)
