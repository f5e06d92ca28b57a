"""Segments of rays inside voxels.

V views, B scenes, N voxels, P pairs of a view and a voxel of its scene, S segments.

A segment is the ray of one pixel inside one voxel, with the samples that fall there. Sample t of a
ray lies at the distance (t + offset) * step from the camera. It belongs to the voxel if
    ceil(t_in / step - offset) <= t <= floor(t_out / step - offset)
for the distances at which the ray enters and leaves the box. This is decided here, once, by these
integers. Faces are computed from the voxel's cell, so neighbours agree on them to the bit. 1/d of a
direction that is exactly 0 is 1e10: a ray inside a face belongs to the voxel on its + side. A voxel
whose centre is nearer than 0.2 is not seen. (As diffoctreerast does it.)

A program takes a few pairs and walks the pixels of their projected boxes, once to count and once to
write. So segments are in the order of the pairs, a voxel's segments of one view side by side, which
the voxel-parallel backward reads without a search; one sort gives every ray its list, near to far.
Both passes are compiled without fusion, so that a hit rounds alike in both; and whatever they find,
a pair writes all its slots and no others: hits without a slot are left out, a slot without a hit
has no samples and is in no ray's list.

Of a sphere of 19e3 voxels at resolution 64 and 512 x 512 pixels a voxel's box covers 70 pixels and
52 of their rays cross it: two times 1.3e6 independent box tests. A lookup volume would cost two
walks of 10^2 dependent loads per ray and a second sort for the backward; lists per tile of 8 x 8
pixels (69e3 pairs of a tile and a voxel) would make 98e6 lanes step through 9.9e6 samples.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.radiance.rays import RaySegments, by_ray
from kernels.views import ViewTable

NEAR = tl.constexpr(0.2)
MARGIN = tl.constexpr(0.05)  # pixels added around a projected box: far more than rounding
CLIP = tl.constexpr(1e-3)  # a corner nearer than this: every pixel is tried


def _tiles(target: str) -> dict:
    """Return the pairs of a program and the pixels of a step (not yet measured on a GPU).

    Most boxes of the published views fit in 64 pixels or two steps. Four pairs a program, because a
    program takes as many steps as its largest box.
    """
    if target == "interpreter":
        return {"PAIRS": 128, "PIXELS": 256}
    return {"PAIRS": 4, "PIXELS": 64, "num_warps": 2}


@triton.jit
def _camera(cameras_ptr, v):
    """Load a view's rotation, centre, focal lengths and principal point (px): scalars."""
    c = cameras_ptr + v * 16
    r0 = tl.load(c), tl.load(c + 1), tl.load(c + 2)
    r1 = tl.load(c + 3), tl.load(c + 4), tl.load(c + 5)
    r2 = tl.load(c + 6), tl.load(c + 7), tl.load(c + 8)
    center = tl.load(c + 9), tl.load(c + 10), tl.load(c + 11)
    return (
        (r0, r1, r2),
        center,
        (tl.load(c + 12), tl.load(c + 13)),
        (tl.load(c + 14), tl.load(c + 15)),
    )


@triton.jit
def _direction(rotation, focal, middle, x, y):
    """Return the unit direction in the world through the centre of pixel (x, y), and its depth.

    The depth is that of one unit along the direction, in camera axes.
    """
    u = (x.to(tl.float32) + 0.5 - middle[0]) / focal[0]
    v = (y.to(tl.float32) + 0.5 - middle[1]) / focal[1]
    r0, r1, r2 = rotation
    d0 = u * r0[0] + v * r1[0] + r2[0]
    d1 = u * r0[1] + v * r1[1] + r2[1]
    d2 = u * r0[2] + v * r1[2] + r2[2]
    shrink = 1 / tl.sqrt(d0 * d0 + d1 * d1 + d2 * d2)
    return (d0 * shrink, d1 * shrink, d2 * shrink), shrink


@triton.jit
def _inside(x, size):
    return tl.minimum(tl.maximum(x, 0.0), size)


@triton.jit
def _rectangle(rotation, center, focal, middle, low, high, W, H):
    """Return the pixels x0, y0, x1, y1 whose rays may meet a box, and the depth of its centre.

    x1 and y1 are exclusive.
    """
    r0, r1, r2 = rotation
    left = low[0] * 0 + 1e9
    right = low[0] * 0 - 1e9
    top = left
    bottom = right
    nearest = left
    for i in tl.static_range(8):
        a = (high[0] if i % 2 == 1 else low[0]) - center[0]
        b = (high[1] if i // 2 % 2 == 1 else low[1]) - center[1]
        c = (high[2] if i // 4 == 1 else low[2]) - center[2]
        z = r2[0] * a + r2[1] * b + r2[2] * c
        nearest = tl.minimum(nearest, z)
        z = tl.maximum(z, CLIP)
        u = (r0[0] * a + r0[1] * b + r0[2] * c) / z * focal[0] + middle[0]
        v = (r1[0] * a + r1[1] * b + r1[2] * c) / z * focal[1] + middle[1]
        left = tl.minimum(left, u)
        right = tl.maximum(right, u)
        top = tl.minimum(top, v)
        bottom = tl.maximum(bottom, v)
    whole = nearest <= CLIP
    x0 = tl.where(whole, 0.0, _inside(tl.ceil(left - 0.5 - MARGIN), W)).to(tl.int32)
    y0 = tl.where(whole, 0.0, _inside(tl.ceil(top - 0.5 - MARGIN), H)).to(tl.int32)
    x1 = tl.where(whole, W, _inside(tl.floor(right + 0.5 + MARGIN), W)).to(tl.int32)
    y1 = tl.where(whole, H, _inside(tl.floor(bottom + 0.5 + MARGIN), H)).to(tl.int32)
    a = (low[0] + high[0]) * 0.5 - center[0]
    b = (low[1] + high[1]) * 0.5 - center[1]
    c = (low[2] + high[2]) * 0.5 - center[2]
    return x0, y0, x1, y1, r2[0] * a + r2[1] * b + r2[2] * c


@triton.jit
def _slab(low, high, o, d):
    """Return the distances at which a ray passes the two faces of an axis, the nearer first."""
    inverse = tl.where(d == 0, 1e10, 1 / tl.where(d == 0, 1.0, d))
    a = (low[:, None] - o) * inverse
    b = (high[:, None] - o) * inverse
    return tl.minimum(a, b), tl.maximum(a, b)


@triton.jit(do_not_specialize=["W", "H", "resolution"])
def _segments(
    position_ptr,  # [N, 3]
    cameras_ptr,  # [V, 16]
    views_ptr,  # [V, 3], see ViewTable
    offset_ptr,  # [V, H, W]
    count_ptr,  # [P]: result of the counting pass
    start_ptr,  # [P + 1]: read by the writing pass
    # results of the writing pass, see RaySegments and by_ray
    key_ptr,
    facts_ptr,
    path_ptr,
    W,
    H,
    resolution,
    DIM: tl.constexpr,
    WRITE: tl.constexpr,
    PAIRS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    v = tl.program_id(1)
    begin = tl.load(views_ptr + v * 3)
    count = tl.load(views_ptr + v * 3 + 1)
    pair = tl.load(views_ptr + v * 3 + 2)
    n = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    live = n < count
    rotation, o, focal, middle = _camera(cameras_ptr, v)
    size = tl.div_rn(1.0, resolution.to(tl.float32))  # of a voxel
    scale = (resolution * DIM).to(tl.float32)  # taps per unit of length
    per_unit = 2 * scale  # samples
    p = position_ptr + (begin + n) * 3
    c0 = tl.floor(tl.load(p, live, 0.0) * resolution)
    c1 = tl.floor(tl.load(p + 1, live, 0.0) * resolution)
    c2 = tl.floor(tl.load(p + 2, live, 0.0) * resolution)
    low = c0 * size - 0.5, c1 * size - 0.5, c2 * size - 0.5
    high = (c0 + 1) * size - 0.5, (c1 + 1) * size - 0.5, (c2 + 1) * size - 0.5
    x0, y0, x1, y1, depth = _rectangle(rotation, o, focal, middle, low, high, W, H)
    across = tl.maximum(x1 - x0, 1)
    area = tl.where(live & (depth > NEAR) & (x1 > x0), across * tl.maximum(y1 - y0, 0), 0)
    found = tl.zeros([PAIRS], tl.int64)
    if WRITE:
        found += tl.load(start_ptr + pair + n, live, 0)
    end = tl.load(start_ptr + pair + n + 1, live, 0) if WRITE else found
    for i in range(0, tl.max(area, 0), PIXELS):
        at = i + tl.arange(0, PIXELS)[None, :]
        inside = at < area[:, None]
        x = x0[:, None] + at % across[:, None]
        y = y0[:, None] + at // across[:, None]
        ray = (v * H + y) * W + x
        d, shrink = _direction(rotation, focal, middle, x, y)
        in0, out0 = _slab(low[0], high[0], o[0], d[0])
        in1, out1 = _slab(low[1], high[1], o[1], d[1])
        in2, out2 = _slab(low[2], high[2], o[2], d[2])
        t_in = tl.maximum(tl.maximum(in0, in1), in2)
        t_out = tl.minimum(tl.minimum(out0, out1), out2)
        offset = tl.load(offset_ptr + ray, inside, 0.0)
        first = tl.ceil(t_in * per_unit - offset)
        last = tl.floor(t_out * per_unit - offset)
        hit = inside & (t_in < t_out) & (first <= last)
        if WRITE:
            slot = found[:, None] + tl.cumsum(hit.to(tl.int32), 1) - 1
            hit = hit & (slot < end[:, None])
            first = tl.where(hit, first, 0.0)
            last = tl.where(hit, last, 0.0)
            tl.store(key_ptr + slot, (ray.to(tl.int64) << 32) + first.to(tl.int64), hit)
            tl.store(facts_ptr + slot * 2, (begin + n)[:, None].to(tl.int32), hit)
            tl.store(facts_ptr + slot * 2 + 1, (last - first + 1).to(tl.int32), hit)
            z = (first + offset) / per_unit
            path = path_ptr + slot * 8
            tl.store(path, ((o[0] - low[0])[:, None] + d[0] * z) * scale - 0.5, hit)
            tl.store(path + 1, ((o[1] - low[1])[:, None] + d[1] * z) * scale - 0.5, hit)
            tl.store(path + 2, ((o[2] - low[2])[:, None] + d[2] * z) * scale - 0.5, hit)
            tl.store(path + 3, z * shrink, hit)
            tl.store(path + 4, d[0] * 0.5, hit)
            tl.store(path + 5, d[1] * 0.5, hit)
            tl.store(path + 6, d[2] * 0.5, hit)
            tl.store(path + 7, shrink / per_unit, hit)
        found += tl.sum(hit.to(tl.int32), 1)
    if WRITE:
        beyond = tl.num_programs(1).to(tl.int64) * H * W  # behind the last ray
        for i in range(0, tl.max(end - found, 0)):
            tl.store(key_ptr + found + i, (beyond << 32) + tl.zeros_like(found), found + i < end)
            tl.store(facts_ptr + (found + i) * 2 + 1, 0, found + i < end)
    else:
        tl.store(count_ptr + pair + n, found, live)


def find_segments(
    position: Tensor,  # [N, 3] fp32 in [0, 1]
    # [V, 16] fp32: rotation 9, centre 3, focal lengths 2 (px), principal point 2 (px)
    cameras: Tensor,
    offset: Tensor,  # [V, H, W] fp32
    table: ViewTable,
    resolution: int,
    dim: int,
    mistakes: Tensor,  # [2] int64, read together with the number of segments
) -> tuple[RaySegments, list[int]]:
    """Return the segments of all views, found in two launches, and the numbers of `mistakes`.

    Reads three numbers from the device in one copy, and waits for them: the only wait of
    `raymarch`. Raises ValueError where the segments are more than an int32 counts.
    """
    V, height, width = offset.shape
    device = position.device
    count = torch.empty(table.pair_start[-1], dtype=torch.int64, device=device)
    tiles = _tiles(backend.target(position))
    grid = triton.cdiv(table.most, tiles["PAIRS"]), V
    fixed = position, cameras, table.views, offset
    sizes = width, height, resolution
    # the arguments that only the second pass uses stand in as `count` in the first
    constants = dict(DIM=dim, WRITE=False, **tiles, enable_fp_fusion=False)
    backend.launch(_segments, grid, *fixed, *[count] * 5, *sizes, **constants)
    start = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    S, *wrong = torch.cat([start[-1:], mistakes]).tolist()
    if S >= 2**31:
        raise ValueError(
            f"{S} segments (a ray in a voxel) are more than {2**31 - 1}: render fewer views at once"
        )
    key = torch.empty(S, dtype=torch.int64, device=device)
    path = torch.empty(S, 8, device=device)
    facts = torch.empty(S, 2, dtype=torch.int32, device=device)
    arrays = count, start, key, facts, path
    backend.launch(_segments, grid, *fixed, *arrays, *sizes, **(constants | {"WRITE": True}))
    ray = ((key + 2**31) >> 32).int()
    lists = by_ray(key, V * height * width)
    return RaySegments(ray, facts, path, start, *lists), wrong
