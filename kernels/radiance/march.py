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
    contract,
    load_taps,
    opacity,
    sigmoid,
    softplus,
    tap_weights,
)
from kernels.radiance.rays import RaySegments
from kernels.views import ViewTable


def _tiles(target: str) -> dict:
    """Return SIDE of a tile of SIDE^2 pixels and K, the samples of a pixel at a time.

    Not yet measured on a GPU. The rays of a tile have lists of unequal length: of its lanes 81 %
    are at work (SIDE 8: 70 %) on a transparent sphere at resolution 64 and 512 x 512 pixels, 77 %
    on an opaque one; K 4 would leave 73 and 58 %. Lists per tile of 8 x 8 pixels would leave 10 %.
    """
    if target == "interpreter":
        return {"SIDE": 32, "K": 32}
    return {"SIDE": 4, "K": 2, "num_warps": 4, "num_stages": 1}


def _backward_tiles(target: str) -> dict:
    """Return L, the segments of a voxel, and K, the samples of each, that are taken at a time.

    Not yet measured on a GPU. On the sphere of `_tiles` 47 % of the lanes are at work, 36 % if it
    is opaque. More samples at a time would spill, as a thread holds all that it contracts.
    """
    if target == "interpreter":
        return {"L": 64, "K": 32}
    return {"L": 16, "K": 2, "num_warps": 4, "num_stages": 1}


@triton.jit(do_not_specialize=["W", "H"])
def _march(
    voxels_ptr,  # [N, (3 DIM + 4) R]
    background_ptr,  # [V, 3]
    # see RaySegments
    samples_ptr,
    voxel_ptr,
    path_ptr,
    order_ptr,
    bounds_ptr,
    # results, see `march`
    image_ptr,
    final_ptr,
    depth_ptr,
    used_ptr,
    state_ptr,
    W,
    H,
    step,
    R,
    DIM: tl.constexpr,
    RANKS: tl.constexpr,
    SIDE: tl.constexpr,
    K: tl.constexpr,
):
    tile = tl.program_id(0)
    TX = tl.cdiv(W, SIDE)
    TY = tl.cdiv(H, SIDE)
    lane = tl.arange(0, SIDE * SIDE)
    v = (tile // TX // TY).to(tl.int64)
    x = tile % TX * SIDE + lane % SIDE
    y = tile // TX % TY * SIDE + lane // SIDE
    inside = (x < W) & (y < H)
    pixel = y * W + x
    ray = v * H * W + pixel
    cursor = tl.load(bounds_ptr + ray, inside, 0)
    end = tl.load(bounds_ptr + ray + 1, inside, 0)
    rank = tl.arange(0, RANKS)
    taps = 3 * DIM * R
    light = tl.full([SIDE * SIDE], 1.0, tl.float32)
    zero = tl.zeros([SIDE * SIDE], tl.float32)
    red = zero
    green = zero
    blue = zero
    distance = zero
    k = tl.zeros([SIDE * SIDE], tl.int32)  # samples done of the segment at the cursor
    alive = cursor < end
    while tl.max(alive.to(tl.int32), 0) > 0:
        slot = tl.load(order_ptr + cursor, alive, 0)
        samples = tl.load(samples_ptr + slot, alive, 0)
        row = tl.load(voxel_ptr + slot, alive, 0).to(tl.int64)
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
        own = (base + taps)[:, None] + rank[None, :]
        some = alive[:, None] & (rank < R)[None, :]
        s = tl.sum(e * tl.load(own, some, 0.0)[:, None, :], 2)
        r = sigmoid(tl.sum(e * tl.load(own + R, some, 0.0)[:, None, :], 2))
        g = sigmoid(tl.sum(e * tl.load(own + 2 * R, some, 0.0)[:, None, :], 2))
        b = sigmoid(tl.sum(e * tl.load(own + 3 * R, some, 0.0)[:, None, :], 2))
        rho, _ = softplus(s)
        alpha = tl.where(live, opacity(rho * step), 0.0)
        through = light[:, None] * tl.cumprod(1 - alpha, 1)  # behind each sample
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
    plane = H * W
    background = background_ptr + v * 3
    image = image_ptr + v * 3 * plane + pixel
    tl.store(image, red + light * tl.load(background), inside)
    tl.store(image + plane, green + light * tl.load(background + 1), inside)
    tl.store(image + 2 * plane, blue + light * tl.load(background + 2), inside)
    tl.store(final_ptr + ray, light, inside)
    tl.store(depth_ptr + ray, distance, inside)


@triton.jit(do_not_specialize=["plane"])
def _march_backward(
    voxels_ptr,  # [N, (3 DIM + 4) R]
    # see ViewTable
    views_ptr,
    scenes_ptr,
    by_scene_ptr,
    # see RaySegments; `used` and `state` are results of `march`
    ray_ptr,
    used_ptr,
    path_ptr,
    start_ptr,
    state_ptr,
    # of the pixels
    grad_image_ptr,
    grad_depth_ptr,
    arriving_ptr,
    grad_ptr,  # result [N, (3 DIM + 4) R]
    plane,
    step,
    R,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    RANKS: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
):
    scene = scenes_ptr + tl.program_id(1) * 4
    n = tl.program_id(0)
    count = tl.load(scene + 1)
    mine = tl.load(scene + 2)
    views = tl.load(scene + 3)
    if n >= count:
        return
    row = tl.load(scene) + n
    rank = tl.arange(0, RANKS)
    some = rank < R
    taps = 3 * DIM * R
    base = voxels_ptr + row * (taps + 4 * R)
    density = tl.load(base + taps + rank, some, 0.0)
    k_red = tl.load(base + taps + R + rank, some, 0.0)
    k_green = tl.load(base + taps + 2 * R + rank, some, 0.0)
    k_blue = tl.load(base + taps + 3 * R + rank, some, 0.0)
    total_x = tl.zeros([DIM_P, RANKS], tl.float32)
    total_y = tl.zeros([DIM_P, RANKS], tl.float32)
    total_z = tl.zeros([DIM_P, RANKS], tl.float32)
    total_w = tl.zeros([4, RANKS], tl.float32)
    for j in range(0, views):
        v = tl.load(by_scene_ptr + mine + j)
        pair = start_ptr + tl.load(views_ptr + v * 3 + 2) + n
        begin = tl.load(pair)
        end = tl.load(pair + 1)
        for m in range(begin, end, L):
            slot = m + tl.arange(0, L)
            used = tl.load(used_ptr + slot, slot < end, 0)
            live = used > 0
            ray = tl.load(ray_ptr + slot, live, 0).to(tl.int64)
            pixel = ray - v * plane
            grad = grad_image_ptr + v * 3 * plane + pixel
            gr = tl.load(grad, live, 0.0)
            gg = tl.load(grad + plane, live, 0.0)
            gb = tl.load(grad + 2 * plane, live, 0.0)
            gd = tl.load(grad_depth_ptr + ray, live, 0.0)
            entry = state_ptr + slot * 5
            path = path_ptr + slot * 8
            light = tl.load(entry, live, 0.0)
            behind = tl.load(arriving_ptr + ray, live, 0.0) - gr * tl.load(entry + 1, live, 0.0)
            behind -= gg * tl.load(entry + 2, live, 0.0) + gb * tl.load(entry + 3, live, 0.0)
            behind -= gd * tl.load(entry + 4, live, 0.0)
            for k in range(0, tl.max(used, 0), K):
                at = k + tl.arange(0, K)[None, :]
                taken = at < used[:, None]
                valid = taken[:, :, None] & some[None, None, :]
                ix, wx, fx = load_taps(base, along_ray(path, at, live), rank, valid, R, DIM)
                iy, wy, fy = load_taps(
                    base + DIM * R, along_ray(path + 1, at, live), rank, valid, R, DIM
                )
                iz, wz, fz = load_taps(
                    base + 2 * DIM * R, along_ray(path + 2, at, live), rank, valid, R, DIM
                )
                z = along_ray(path + 3, at, live)
                xy = fx * fy
                e = xy * fz
                s = tl.sum(e * density[None, None, :], 2)
                r = sigmoid(tl.sum(e * k_red[None, None, :], 2))
                g = sigmoid(tl.sum(e * k_green[None, None, :], 2))
                b = sigmoid(tl.sum(e * k_blue[None, None, :], 2))
                rho, slope = softplus(s)
                alpha = tl.where(taken, opacity(rho * step), 0.0)
                through = light[:, None] * tl.cumprod(1 - alpha, 1)
                weight = alpha * (through / (1 - alpha))
                a = r * gr[:, None] + g * gg[:, None] + b * gb[:, None] + z * gd[:, None]
                part = weight * a
                rest = behind[:, None] - tl.cumsum(part, 1)
                behind -= tl.sum(part, 1)
                light = tl.min(through, 1)
                gs = tl.where(taken, step * (through * a - rest) * slope, 0.0)
                # gradients of the logits
                r = weight * gr[:, None] * r * (1 - r)
                g = weight * gg[:, None] * g * (1 - g)
                b = weight * gb[:, None] * b * (1 - b)
                which = tl.arange(0, 4)[None, None, :]
                heads = tl.where(
                    which < 2,
                    tl.where(which == 0, gs[:, :, None], r[:, :, None]),
                    tl.where(which == 2, g[:, :, None], b[:, :, None]),
                )
                total_w = contract(heads, e, total_w, L, K, 4, RANKS)
                ge = gs[:, :, None] * density[None, None, :] + r[:, :, None] * k_red[None, None, :]
                ge += g[:, :, None] * k_green[None, None, :] + b[:, :, None] * k_blue[None, None, :]
                total_z = contract(tap_weights(iz, wz, DIM_P), ge * xy, total_z, L, K, DIM_P, RANKS)
                ge *= fz
                total_x = contract(tap_weights(ix, wx, DIM_P), ge * fy, total_x, L, K, DIM_P, RANKS)
                total_y = contract(tap_weights(iy, wy, DIM_P), ge * fx, total_y, L, K, DIM_P, RANKS)
    out = grad_ptr + row * (taps + 4 * R)
    tap = tl.arange(0, DIM_P)[:, None]
    at = tap * R + rank[None, :]
    there = (tap < DIM) & some[None, :]
    tl.store(out + at, total_x, there)
    tl.store(out + DIM * R + at, total_y, there)
    tl.store(out + 2 * DIM * R + at, total_z, there)
    tl.store(out + taps + tl.arange(0, 4)[:, None] * R + rank[None, :], total_w, some[None, :])


def march(
    voxels: Tensor,  # [N, (3 n + 4) R]: taps [3, n, R], density [R], colour [3, R]
    segments: RaySegments,
    background: Tensor,  # [V, 3]
    height: int,
    width: int,
    step: float,
    rank: int,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the image [V, 3, H, W], final transmittance and depth [V, H, W].

    Two more are for the backward: how many samples of a segment were used [S], and transmittance,
    colour and depth at its entry [S, 5], written where some are used.
    """
    V = len(background)
    image = background.new_empty(V, 3, height, width)
    final = background.new_empty(V, height, width)
    depth = torch.empty_like(final)
    used = torch.zeros_like(segments.samples)
    state = background.new_empty(len(segments.ray), 5)
    tiles = _tiles(backend.target(voxels))
    across = triton.cdiv(width, tiles["SIDE"])
    down = triton.cdiv(height, tiles["SIDE"])
    backend.launch(
        _march,
        (V * across * down,),
        voxels,
        background,
        segments.samples,
        segments.voxel,
        segments.path,
        segments.order,
        segments.bounds,
        image,
        final,
        depth,
        used,
        state,
        width,
        height,
        step,
        rank,
        DIM=dim,
        RANKS=triton.next_power_of_2(rank),
        **tiles,
        enable_fp_fusion=False,
    )
    return image, final, depth, used, state


def march_backward(
    voxels: Tensor,
    table: ViewTable,
    ray: Tensor,  # [S] int32
    path: Tensor,  # [S, 8]
    start: Tensor,  # [P + 1] int64
    used: Tensor,  # [S] int32
    state: Tensor,  # [S, 5]
    grad_image: Tensor,  # [V, 3, H, W]
    grad_depth: Tensor,  # [V, H, W]
    arriving: Tensor,  # [V, H, W]: what the whole ray contributes to the loss
    step: float,
    rank: int,
    dim: int,
) -> Tensor:
    """Return the gradient of the voxels, each written once: the same bits every time."""
    grad = torch.empty_like(voxels)
    pad = triton.next_power_of_2
    _, height, width = grad_depth.shape
    backend.launch(
        _march_backward,
        (table.most, len(table.scenes)),
        voxels,
        table.views,
        table.scenes,
        table.by_scene,
        ray,
        used,
        path,
        start,
        state,
        grad_image,
        grad_depth,
        arriving,
        grad,
        height * width,
        step,
        rank,
        DIM=dim,
        DIM_P=pad(dim),
        RANKS=pad(rank),
        **_backward_tiles(backend.target(voxels)),
        enable_fp_fusion=False,
    )
    return grad
