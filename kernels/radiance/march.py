"""Compositing along rays, one program per tile of pixels; its backward, one program per voxel.

Segments of rays come from kernels.radiance.segments. With taps V [rank, axis, n] of a voxel, q =
(x - low) * resolution * n - 1/2 at a sample, i = clip(trunc(q), 0, n - 2), w = q - i:
    f_a = (1 - w) V_a[i] + w V_a[i + 1]  (w reaches -1/2 and 3/2 in the outer half-cells: a linear
                                         extrapolation),
    e = f_x f_y f_z  [rank]
    s = <density, e>
    color = sigmoid(<k, e>)
    alpha = min(1 - exp(-softplus(s) step), 0.999)
    image = sum alpha T color + T_final background
    depth likewise of the distance, stop where T < 1e-3 (inclusive).
(Trivec radiance field of TRELLIS, Xiang et al. 2024, after Gao et al. 2023 and Chen et al. 2022.)

Backward, per sample, with a = <color, g_image> + distance g_depth, T behind the sample and B what
arrives from further behind:
    gradient of softplus(s) = step (T a - B), also where alpha was clamped (the published rule: step
        * 0.001 passes).
B needs no walk from the back: it is <image, g> less what came before, stored per segment by the
forward pass as (T, color, depth) at its entry. So segments do not depend on each other: a program
owns a voxel, replays its segments of all views, contracts with the interpolation weights [samples,
n]^T @ [samples, rank] in fp32, and writes the gradient once. No atomics.

`used` is how many samples of a segment the forward pass took: the stop of the backward pass,
whatever rounds.

Several lanes hold copies of a ray's state, made by sums across lanes, and each decides by its own
copy. A product fused into such a sum is exact in its own lane and rounded in the others, which then
differ: both kernels are compiled without fusion.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.radiance.field import (
    STOP,
    along_ray,
    load_taps,
    no_totals,
    opacity,
    sigmoid,
    softplus,
    spread,
    store_totals,
)
from kernels.radiance.lengths import sort_by_length
from kernels.radiance.rays import RaySegments
from kernels.views import ViewTable


def _tiles(target: str) -> dict:
    """Return SIDE of a tile of SIDE x SIDE / 2 pixels and K, the samples of a pixel at a time.

    Not yet measured on a GPU; counted. A tile is one warp, so no lane waits at a barrier, and four
    lanes sum over the ranks. The rays of a tile have lists of unequal length: of its lanes 97 % are
    at work in the middle of a transparent sphere at resolution 64 and 512 x 512 pixels. Lists per
    tile of 8 x 8 pixels would leave 10 %.
    """
    if target == "interpreter":
        return {"SIDE": 32, "K": 32}
    side = 8 if target.startswith("gfx9") else 4  # wavefronts of 64 lanes
    return {"SIDE": side, "K": 1, "num_warps": 1, "num_stages": 1}


def _backward_tiles(target: str) -> dict:
    """Return L, the segments of a voxel, and K, the samples of each, that are taken at a time.

    BLOCK segments of a voxel are sorted by length. Not yet measured on a GPU; counted: on the
    sphere of `_tiles` 88 % of the lanes are at work, 85 % if it is opaque; unsorted 70 and 59 %.
    A thread of the warp holds 112 sums, of 24 taps and 4 heads for 4 ranks: more segments or
    samples at a time would spill.
    """
    if target == "interpreter":
        return {"L": 64, "K": 32, "BLOCK": 64}
    L = 16 if target.startswith("gfx9") else 8
    return {"L": L, "K": 1, "BLOCK": 64, "num_warps": 1, "num_stages": 1}


@triton.jit(do_not_specialize=["W", "H"])
def _march(
    voxels_ptr,  # [N, (3 DIM + 4) R]
    background_ptr,  # [V, 3]
    # see RaySegments
    facts_ptr,
    path_ptr,
    order_ptr,
    bounds_ptr,
    # results, see `march`
    picture_ptr,
    used_ptr,
    state_ptr,
    W,
    H,
    step,
    R: tl.constexpr,
    DIM: tl.constexpr,
    SIDE: tl.constexpr,
    K: tl.constexpr,
):
    tile = tl.program_id(0)
    L: tl.constexpr = SIDE * SIDE // 2
    TX = tl.cdiv(W, SIDE)
    TY = tl.cdiv(H, SIDE // 2)
    lane = tl.arange(0, L)
    v = (tile // TX // TY).to(tl.int64)
    x = tile % TX * SIDE + lane % SIDE
    y = tile // TX % TY * (SIDE // 2) + lane // SIDE
    inside = (x < W) & (y < H)
    pixel = y * W + x
    plane = H * W
    cursor = tl.load(bounds_ptr + v * plane + pixel, inside, 0)
    end = tl.load(bounds_ptr + v * plane + pixel + 1, inside, 0)
    RANKS: tl.constexpr = triton.next_power_of_2(R)
    rank = tl.arange(0, RANKS)
    taps = 3 * DIM * R
    light = tl.full([L], 1.0, tl.float32)
    zero = tl.zeros([L], tl.float32)
    red = zero
    green = zero
    blue = zero
    distance = zero
    k = tl.zeros([L], tl.int32)  # samples done of the segment at the cursor
    alive = cursor < end
    while tl.max(alive.to(tl.int32), 0) > 0:
        slot = tl.load(order_ptr + cursor, alive, 0)
        row = tl.load(facts_ptr + slot * 2, alive, 0).to(tl.int64)
        samples = tl.load(facts_ptr + slot * 2 + 1, alive, 0)
        entry = state_ptr + slot * 5
        entering = alive & (k == 0)
        tl.store(entry, light, entering)
        tl.store(entry + 1, red, entering)
        tl.store(entry + 2, green, entering)
        tl.store(entry + 3, blue, entering)
        tl.store(entry + 4, distance, entering)
        at = k[:, None] + tl.arange(0, K)[None, :]
        live = alive[:, None] & (at < samples[:, None])
        base = voxels_ptr + row * (taps + 4 * R)
        path = path_ptr + slot * 8
        axis = base[:, None] + tl.zeros_like(at)
        valid = live[:, :, None] & (rank < R)[None, None, :]
        _, _, e = load_taps(axis, along_ray(path, at, alive), rank, valid, R, DIM)
        _, _, f = load_taps(axis + DIM * R, along_ray(path + 1, at, alive), rank, valid, R, DIM)
        e *= f
        _, _, f = load_taps(axis + 2 * DIM * R, along_ray(path + 2, at, alive), rank, valid, R, DIM)
        e *= f
        z = along_ray(path + 3, at, alive)
        own = (axis + taps)[:, :, None] + rank[None, None, :]
        s = tl.sum(e * tl.load(own, valid, 0.0), 2)
        r = sigmoid(tl.sum(e * tl.load(own + R, valid, 0.0), 2))
        g = sigmoid(tl.sum(e * tl.load(own + 2 * R, valid, 0.0), 2))
        b = sigmoid(tl.sum(e * tl.load(own + 3 * R, valid, 0.0), 2))
        rho, _ = softplus(s)
        alpha = tl.where(live, opacity(rho * step), 0.0)
        before = light[:, None]
        through = before * (1 - alpha)
        if K > 1:
            through = before * tl.cumprod(1 - alpha, 1)
            before = through / (1 - alpha)
        kept = before >= STOP
        weight = tl.where(kept, alpha * before, 0.0)
        red += tl.sum(weight * r, 1)
        green += tl.sum(weight * g, 1)
        blue += tl.sum(weight * b, 1)
        distance += tl.sum(weight * z, 1)
        light = tl.min(tl.where(kept, through, light[:, None]), 1)
        taken = k + tl.sum((kept & live).to(tl.int32), 1)
        done = (k + K >= samples) | (light < STOP)
        tl.store(used_ptr + slot, taken, alive & done)
        cursor += done.to(tl.int32)
        k = tl.where(done, 0, k + K)
        alive = alive & (cursor < end) & (light >= STOP)
    background = background_ptr + v * 3
    picture = picture_ptr + v * 5 * plane + pixel
    tl.store(picture, red + light * tl.load(background), inside)
    tl.store(picture + plane, green + light * tl.load(background + 1), inside)
    tl.store(picture + 2 * plane, blue + light * tl.load(background + 2), inside)
    tl.store(picture + 3 * plane, light, inside)
    tl.store(picture + 4 * plane, distance, inside)


@triton.jit
def _enter(pixels_ptr, state_ptr, ray, slot, live, v, plane):
    """Load the gradients of the pixels of segments, what arrives from behind, and the light.

    The first are those of red, green, blue and depth.
    """
    pixel = pixels_ptr + ray + v * 4 * plane
    red = tl.load(pixel, live, 0.0)
    green = tl.load(pixel + plane, live, 0.0)
    blue = tl.load(pixel + 2 * plane, live, 0.0)
    depth = tl.load(pixel + 4 * plane, live, 0.0)
    entry = state_ptr + slot * 5
    behind = tl.load(pixel + 3 * plane, live, 0.0) - red * tl.load(entry + 1, live, 0.0)
    behind -= green * tl.load(entry + 2, live, 0.0) + blue * tl.load(entry + 3, live, 0.0)
    behind -= depth * tl.load(entry + 4, live, 0.0)
    return red, green, blue, depth, behind, tl.load(entry, live, 0.0)


@triton.jit(do_not_specialize=["plane"])
def _march_backward(
    voxels_ptr,  # [N, (3 DIM + 4) R]
    # see ViewTable
    views_ptr,
    scenes_ptr,
    by_scene_ptr,
    # see RaySegments; `used` and `state` are results of `march`, `order` is for this kernel alone
    ray_ptr,
    path_ptr,
    start_ptr,
    used_ptr,
    state_ptr,
    order_ptr,
    pixels_ptr,  # [V, 5, H, W]: gradient of colour, what the whole ray contributes, of depth
    grad_ptr,  # result [N, (3 DIM + 4) R]
    plane,
    step,
    R: tl.constexpr,
    DIM: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scene = scenes_ptr + tl.program_id(1) * 4
    n = tl.program_id(0)
    mine = tl.load(scene + 2)
    views = tl.load(scene + 3)
    if n >= tl.load(scene + 1):
        return
    row = tl.load(scene) + n
    RANKS: tl.constexpr = triton.next_power_of_2(R)
    rank = tl.arange(0, RANKS)
    some = None if R == RANKS else (rank < R)[None, None, :]
    taps = 3 * DIM * R
    base = voxels_ptr + row * (taps + 4 * R)
    density = tl.load(base + taps + rank, rank < R, 0.0)[None, None, :]
    k_red = tl.load(base + taps + R + rank, rank < R, 0.0)[None, None, :]
    k_green = tl.load(base + taps + 2 * R + rank, rank < R, 0.0)[None, None, :]
    k_blue = tl.load(base + taps + 3 * R + rank, rank < R, 0.0)[None, None, :]
    total_x = no_totals(L, K, RANKS, DIM)
    total_y = no_totals(L, K, RANKS, DIM)
    total_z = no_totals(L, K, RANKS, DIM)
    heads = no_totals(L, K, RANKS, 4)
    for j in range(0, views):
        v = tl.load(by_scene_ptr + mine + j)
        pair = start_ptr + tl.load(views_ptr + v * 3 + 2) + n
        begin = tl.load(pair)
        end = tl.load(pair + 1)
        sort_by_length(used_ptr, order_ptr, begin, end, BLOCK)
        for m in range(begin, end, L):
            listed = m + tl.arange(0, L)
            slot = tl.load(order_ptr + listed, listed < end, 0).to(tl.int64)
            used = tl.load(used_ptr + slot, listed < end, 0)
            live = used > 0
            ray = tl.load(ray_ptr + slot, live, 0)
            gr, gg, gb, gd, behind, light = _enter(pixels_ptr, state_ptr, ray, slot, live, v, plane)
            path = path_ptr + slot * 8
            for k in range(0, tl.max(used, 0), K):
                at = k + tl.arange(0, K)[None, :]
                taken = at < used[:, None]
                at = tl.minimum(at, used[:, None] - 1)  # no tap is far beyond the voxel
                ix, wx, fx = load_taps(base, along_ray(path, at, live), rank, some, R, DIM)
                iy, wy, fy = load_taps(
                    base + DIM * R, along_ray(path + 1, at, live), rank, some, R, DIM
                )
                iz, wz, fz = load_taps(
                    base + 2 * DIM * R, along_ray(path + 2, at, live), rank, some, R, DIM
                )
                z = along_ray(path + 3, at, live)
                xy = fx * fy
                e = xy * fz
                s = tl.sum(e * density, 2)
                r = sigmoid(tl.sum(e * k_red, 2))
                g = sigmoid(tl.sum(e * k_green, 2))
                b = sigmoid(tl.sum(e * k_blue, 2))
                rho, slope = softplus(s)
                alpha = tl.where(taken, opacity(rho * step), 0.0)
                before = light[:, None]
                through = before * (1 - alpha)
                if K > 1:
                    through = before * tl.cumprod(1 - alpha, 1)
                    before = through / (1 - alpha)
                weight = alpha * before
                a = tl.fma(r, gr[:, None], tl.fma(g, gg[:, None], b * gb[:, None]))
                a = tl.fma(z, gd[:, None], a)
                part = weight * a
                rest = behind[:, None] - (tl.cumsum(part, 1) if K > 1 else part)
                behind -= tl.sum(part, 1)
                light = tl.min(through, 1)
                gs = tl.where(taken, step * tl.fma(through, a, -rest) * slope, 0.0)[:, :, None]
                # gradients of the logits
                r = (weight * gr[:, None] * tl.fma(-r, r, r))[:, :, None]
                g = (weight * gg[:, None] * tl.fma(-g, g, g))[:, :, None]
                b = (weight * gb[:, None] * tl.fma(-b, b, b))[:, :, None]
                heads = (
                    tl.fma(gs, e, heads[0]),
                    tl.fma(r, e, heads[1]),
                    tl.fma(g, e, heads[2]),
                    tl.fma(b, e, heads[3]),
                )
                ge = tl.fma(gs, density, tl.fma(r, k_red, tl.fma(g, k_green, b * k_blue)))
                total_z = spread(total_z, iz, wz, ge * xy, DIM)
                ge *= fz
                total_x = spread(total_x, ix, wx, ge * fy, DIM)
                total_y = spread(total_y, iy, wy, ge * fx, DIM)
    out = grad_ptr + row * (taps + 4 * R)
    store_totals(out, total_x, rank, R, DIM)
    store_totals(out + DIM * R, total_y, rank, R, DIM)
    store_totals(out + 2 * DIM * R, total_z, rank, R, DIM)
    store_totals(out + taps, heads, rank, R, 4)


def march(
    voxels: Tensor,  # [N, (3 n + 4) R]: taps [3, n, R], density [R], colour [3, R]
    segments: RaySegments,
    background: Tensor,  # [V, 3]
    height: int,
    width: int,
    step: float,
    rank: int,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the picture [V, 5, H, W]: colour, final transmittance and depth.

    Two more are for the backward: how many samples of a segment were used [S], and transmittance,
    colour and depth at its entry [S, 5], written where some are used.
    """
    V = len(background)
    S = len(segments.ray)
    picture = background.new_empty(V, 5, height, width)
    used = torch.zeros_like(segments.ray)
    state = background.new_empty(S, 5)
    tiles = _tiles(backend.target(voxels))
    across = triton.cdiv(width, tiles["SIDE"])
    down = triton.cdiv(height, tiles["SIDE"] // 2)
    backend.launch(
        _march,
        (V * across * down,),
        voxels,
        background,
        segments.facts,
        segments.path,
        segments.order,
        segments.bounds,
        picture,
        used,
        state,
        width,
        height,
        step,
        R=rank,
        DIM=dim,
        **tiles,
        enable_fp_fusion=False,
    )
    return picture, used, state


def march_backward(
    voxels: Tensor,
    table: ViewTable,
    ray: Tensor,  # [S] int32
    path: Tensor,  # [S, 8]
    start: Tensor,  # [P + 1] int64
    used: Tensor,  # [S] int32
    state: Tensor,  # [S, 5]
    pixels: Tensor,  # [V, 5, H, W]: gradient of colour, what the whole ray contributes, of depth
    step: float,
    rank: int,
    dim: int,
) -> Tensor:
    """Return the gradient of the voxels, each written once: the same bits every time."""
    grad = torch.empty_like(voxels)
    height, width = pixels.shape[2:]
    backend.launch(
        _march_backward,
        (table.most, len(table.scenes)),
        voxels,
        table.views,
        table.scenes,
        table.by_scene,
        ray,
        path,
        start,
        used,
        state,
        torch.empty_like(used),
        pixels,
        grad,
        height * width,
        step,
        R=rank,
        DIM=dim,
        **_backward_tiles(backend.target(voxels)),
        enable_fp_fusion=False,
    )
    return grad
