"""The z-buffer on a GPU: the nearest face of every pixel, before it is resolved.

V views, F faces, P clip rows, R pieces. Each stage is one launch for all views:

    _raster_snap   clip rows -> integer positions on a grid of 1/16 px, z / w, and the frustum
                   planes that they are outside of
    _raster_small  one face a thread: faces of few pixels go straight to the z-buffer, the others
                   onto two lists
    _raster_large  the listed faces, a tile of pixels at a time; those that reach out of the frustum
                   are clipped to pieces first

A pixel of the z-buffer is one integer, its key: the depth in the high half, the complement of the
face in the low half. So an atomic minimum gives the nearest face, the later one of equals, whatever
the order of the threads. The depth is interpolated between the snapped corners with the integer
edge functions as weights: convex, hence accurate to rounding on the thinnest sliver. Edge functions
at pixels of the picture are below 2^31 for pictures up to 2^23 pixels, differences of int32 that
wrap included.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.mesh.frustum import EMPTY, NOWHERE, Pieces, clip_faces
from kernels.mesh.pixels_gpu import pixel_block

NONE = tl.constexpr(EMPTY)
OFF = tl.constexpr(NOWHERE)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to even
LARGEST = tl.constexpr(1048576.0)


@triton.jit
def _rounded(x):
    # the clamp keeps the sum out of a fused product
    return (tl.minimum(tl.maximum(x, -LARGEST), LARGEST) + ROUND) - ROUND


@triton.jit(do_not_specialize=["P", "W", "H"])
def _raster_snap(clip_ptr, snapped_ptr, depth_ptr, P, W, H, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < P
    c = clip_ptr + n * 4
    x = tl.load(c, live, 0.0)
    y = tl.load(c + 1, live, 0.0)
    z = tl.load(c + 2, live, 0.0)
    w = tl.load(c + 3, live, 1.0)
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
    px = _rounded(x * scale * (W * 8.0))
    py = _rounded(y * scale * (H * 8.0))
    out = snapped_ptr + n * 3
    tl.store(out, tl.where(inside, px, 0.0).to(tl.int32), live)
    tl.store(out + 1, tl.where(inside, py, 0.0).to(tl.int32), live)
    tl.store(out + 2, code, live)
    tl.store(depth_ptr + n, tl.where(inside, z * scale, 0.0), live)


@triton.jit
def _box(a, b, c, size):
    """First and last pixel whose centre may lie between three coordinates."""
    low = tl.minimum(tl.minimum(a, b), c)
    high = tl.maximum(tl.maximum(a, b), c)
    first = tl.maximum((low + 8 * size + 7) >> 4, 0)
    last = tl.minimum((high + 8 * size - 8) >> 4, size - 1)
    return first, last


@triton.jit
def _edge(ax, ay, bx, by, px, py, sign):
    """Edge function a -> b at a position, and whether the position is on the inner side.

    Left and top edges are inside.
    """
    dx = (bx - ax) * sign
    dy = (by - ay) * sign
    e = (ax - px) * dy - (ay - py) * dx
    return e, (e > 0) | ((e == 0) & ((dy < 0) | ((dy == 0) & (dx > 0))))


@triton.jit
def _test(x0, y0, z0, x1, y1, z1, x2, y2, z2, area, face, i, j, W, H):
    """Test if pixels (i, j) are covered; also returns their keys."""
    px = i * 16 + 8 - 8 * W
    py = j * 16 + 8 - 8 * H
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
    """Append to a list that grows from `end` by STEP; its order may vary."""
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
    first = tl.load(t)
    count = tl.load(t + 1)
    base = tl.load(t + 2)
    rows = tl.load(t + 3)
    face = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = face < count
    f = faces_ptr + (first + face) * 3
    a, b, c = _load3(f, live)
    named = (tl.minimum(tl.minimum(a, b), c) >= 0) & (tl.maximum(tl.maximum(a, b), c) < rows)
    wrong = tl.sum((live & ~named).to(tl.int32), 0)
    if wrong > 0:
        tl.atomic_add(counter_ptr + 2, wrong)
    live = live & named
    a += base
    b += base
    c += base
    x0, y0, out0 = _load3(snapped_ptr + a * 3, live)
    x1, y1, out1 = _load3(snapped_ptr + b * 3, live)
    x2, y2, out2 = _load3(snapped_ptr + c * 3, live)
    some = out0 | out1 | out2
    whole = live & (some == 0)
    partly = live & (some != 0) & (some < OFF) & ((out0 & out1 & out2) == 0)
    area = _area(x0, y0, x1, y1, x2, y2)
    i0, i1 = _box(x0, x1, x2, W)
    j0, j1 = _box(y0, y1, y2, H)
    across = tl.maximum(i1 - i0 + 1, 0)
    down = tl.maximum(j1 - j0 + 1, 0)
    boxes = tl.where(whole & (area != 0), across * down, 0)
    small = (boxes > 0) & (boxes <= FEW)
    boxes_small = tl.where(small, boxes, 0)
    z0 = tl.load(depth_ptr + a, small, 0.0)
    z1 = tl.load(depth_ptr + b, small, 0.0)
    z2 = tl.load(depth_ptr + c, small, 0.0)
    across = tl.maximum(across, 1)
    for k in range(0, tl.max(boxes_small, 0)):
        i = i0 + k % across
        j = j0 + k // across
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
    p = xy_ptr + r * 6
    x0, y0, x1 = _load3(p, live)
    y1, x2, y2 = _load3(p + 3, live)
    z0, z1, z2 = _load3(depth_ptr + r * 3, live)
    view = tl.load(view_ptr + r, live, 0)
    face = tl.load(face_ptr + r, live, 0)
    area = _area(x0, y0, x1, y1, x2, y2)
    i0, i1 = _box(x0, x1, x2, W)
    j0, j1 = _box(y0, y1, y2, H)
    across = tl.maximum((i1 - i0 + 16) // 16, 0)  # tiles of 16 x PIXELS / 16
    down = tl.maximum((j1 - j0 + PIXELS // 16) // (PIXELS // 16), 0)
    tiles = tl.where(area != 0, across * down, 0)
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


def _tiles(target: str) -> dict:
    """Sizes of the programs (not yet measured on a GPU).

    `faces`: faces of a program of `_raster_small`; `few`: pixels of a box up to which one thread
    fills it; `pieces` and `pixels`: what a program of `_raster_large` has at once; `strides`:
    programs that share the tiles of the same pieces.
    """
    if target == "interpreter":  # few, large programs
        return {"faces": 512, "few": 16, "pieces": 32, "strides": 1, "pixels": 256}
    return {"faces": 128, "few": 32, "pieces": 1, "strides": 16, "pixels": 256}


def fill_zbuffer(
    clip: Tensor, faces: Tensor, table: Tensor, most: int, pairs: int, height: int, width: int
) -> tuple[Tensor, int]:
    """Find the key of every pixel, [V height width] int64, EMPTY where there is no face.

    Also returns how many faces name a row that is not there; where there are any, the z-buffer is
    not finished. `most` is the largest number of faces of a view, `pairs` their sum over all views.
    Waits once for the device, for the lengths of the two lists.
    """
    V = len(table)
    P = len(clip)
    device = clip.device
    tiles = _tiles(backend.target(clip))
    block = pixel_block(backend.target(clip))
    snapped = torch.empty(P, 3, dtype=torch.int32, device=device)
    depth = clip.new_empty(P)
    grid = (triton.cdiv(P, block["BLOCK"]),)
    backend.launch(_raster_snap, grid, clip, snapped, depth, P, width, height, **block)
    keys = torch.full((V * height * width,), EMPTY, device=device)
    names = torch.empty(pairs, dtype=torch.int64, device=device)
    counters = torch.zeros(3, dtype=torch.int32, device=device)
    grid = (triton.cdiv(most, tiles["faces"]), V)
    lists = (keys, names, counters, pairs, width, height)
    few = {"FEW": tiles["few"], "BLOCK": tiles["faces"], "num_warps": 4}
    backend.launch(_raster_small, grid, snapped, depth, faces, table, *lists, **few)
    large, partly, wrong = counters.tolist()
    if wrong or not large + partly:
        return keys, wrong
    names = torch.cat([names[:large], names[pairs - partly :]])
    pieces = _pieces(names, large, clip, snapped, depth, faces, table, height, width)
    R = len(pieces.view)
    grid = (triton.cdiv(R, tiles["pieces"]), tiles["strides"])
    shape = {"PIECES": tiles["pieces"], "PIXELS": tiles["pixels"], "num_warps": 4}
    backend.launch(_raster_large, grid, *pieces, keys, R, width, height, **shape)
    return keys, 0


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
