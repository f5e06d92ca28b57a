"""Means of the voxels' corner values at the vertices that they share, and the gradient.

N voxels of `channels` (53 or 101) channels, T vertices of K = 4 (or 10) values. A voxel's channels
are sdf 8 | deform 8 x 3 | weights 21 | color 8 x 6, corner by corner with x fastest; a vertex's
values are sdf | deform 3 | color 6. A vertex takes the mean over the voxels that share it; their
spread around it is a penalty. Forward gathers per vertex, backward per voxel: neither needs an
atomic.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.surface.cubes import Cubes

WEIGHTS = slice(32, 53)
PENALISED = 20  # of the weights: all but gamma
CHUNK = 1 << 16  # voxels at a time in the torch path's backward: bounds the memory


def _tiles(target: str) -> dict[str, int]:
    """Vertices (of 16 values) and voxels (of 128 channels) a program; not yet measured on a GPU."""
    if target == "interpreter":  # its cost is per program
        return {"VERTICES": 1024, "VOXELS": 256}
    return {"VERTICES": 32, "VOXELS": 8}


@triton.jit(do_not_specialize=["T"])
def _average(
    fields_ptr,
    voxel_ptr,
    mean_ptr,
    spread_ptr,
    T,
    bias,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, 16)[None, :]
    total = tl.zeros([TILE, 16], tl.float32)
    count = tl.zeros([TILE], tl.float32)
    for i in tl.static_range(8):
        channel = tl.where(k == 0, i, tl.where(k < 4, 7 + 3 * i + k, 49 + 6 * i + k))
        n = tl.load(voxel_ptr + t * 8 + i, mask=t < T, other=-1).to(tl.int64)
        live = (n >= 0)[:, None] & (k < K)  # [TILE, 16]
        value = tl.load(fields_ptr + n[:, None] * CHANNELS + channel, mask=live, other=0.0)
        total += value + tl.where(live & (k == 0), bias, 0.0)
        count += tl.where(n >= 0, 1.0, 0.0)
    mean = total / tl.maximum(count, 1.0)[:, None]
    spread = tl.zeros([TILE, 16], tl.float32)
    for i in tl.static_range(8):
        channel = tl.where(k == 0, i, tl.where(k < 4, 7 + 3 * i + k, 49 + 6 * i + k))
        n = tl.load(voxel_ptr + t * 8 + i, mask=t < T, other=-1).to(tl.int64)
        live = (n >= 0)[:, None] & (k < K)
        value = tl.load(fields_ptr + n[:, None] * CHANNELS + channel, mask=live, other=0.0)
        away = tl.where(live, value + tl.where(k == 0, bias, 0.0) - mean, 0.0)
        spread += away * away
    tl.store(mean_ptr + t[:, None] * K + k, mean, mask=(t < T)[:, None] & (k < K))
    tl.store(spread_ptr + t, tl.sum(spread, 1), mask=t < T)


@triton.jit(do_not_specialize=["N"])
def _fields_bwd(
    fields_ptr,
    coords_ptr,
    corners_ptr,
    mean_ptr,
    voxel_cube_ptr,
    grad_mean_ptr,
    grad_weights_ptr,
    spread_slope_ptr,
    size_slope_ptr,
    out_ptr,
    N,
    bias,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)[None] * TILE + tl.arange(0, TILE)
    n = n[:, None]  # [TILE, 1]
    c = tl.arange(0, 128)[None, :]
    live = (n < N) & (c < CHANNELS)
    weight = live & (c >= 32) & (c < 53)
    shared = live & ((c < 32) | (c >= 53))
    corner = tl.where(c < 8, c, tl.where(c < 32, (c - 8) // 3, (c - 53) // 6))
    k = tl.where(c < 8, 0, tl.where(c < 32, 1 + (c - 8) % 3, 4 + (c - 53) % 6))
    value = tl.load(fields_ptr + n * CHANNELS + c, mask=live, other=0.0)
    scene = tl.load(coords_ptr + n * 4, mask=n < N, other=0)
    spread_slope = tl.load(spread_slope_ptr + scene, mask=n < N, other=0.0)
    size_slope = tl.load(size_slope_ptr + scene, mask=n < N, other=0.0)
    row = tl.load(corners_ptr + n * 8 + corner, mask=shared, other=0).to(tl.int64)
    mean = tl.load(mean_ptr + row * K + k, mask=shared, other=0.0)
    grad = tl.load(grad_mean_ptr + row * K + k, mask=shared, other=0.0)
    grad += spread_slope * (value + tl.where(c < 8, bias, 0.0) - mean)
    cube = tl.load(voxel_cube_ptr + n, mask=n < N, other=-1).to(tl.int64)
    sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))
    own = tl.load(grad_weights_ptr + cube * 21 + c - 32, mask=weight & (cube >= 0), other=0.0)
    own += tl.where(c < 52, size_slope * sign, 0.0)
    tl.store(out_ptr + n * CHANNELS + c, tl.where(weight, own, grad), mask=live)


def _channels(i: int, K: int) -> list[int]:
    """The channels of corner i."""
    return [i, *range(8 + 3 * i, 11 + 3 * i), *range(53 + 6 * i, 49 + 6 * i + K)]


def average(fields: Tensor, cubes: Cubes, bias: float) -> tuple[Tensor, Tensor]:
    """Mean corner values at each vertex [T, K], and the sum of squares around them [T].

    The bias is added to the signed distance.
    """
    N = len(fields)
    T = len(cubes.vertex_index)
    K = 10 if fields.shape[1] > 53 else 4
    corners = cubes.voxel_corners
    mean = fields.new_zeros(T, K)
    if backend.is_torch(fields):
        spread = fields.new_zeros(T)
        for i in range(8):
            mean.index_add_(0, corners[:, i], fields[:, _channels(i, K)])
        mean /= cubes.count[:, None]
        mean[:, 0] = cubes.sdf
        for i in range(8):
            square = _away(fields, corners, mean, bias, i).square_().sum(1)
            spread.index_add_(0, corners[:, i], square)
        return mean, spread
    voxel = corners.new_full((T, 8), -1)
    spread = fields.new_empty(T)
    row = torch.arange(N, dtype=torch.int32, device=fields.device)
    for i in range(8):
        voxel[:, i].index_copy_(0, corners[:, i].long(), row)
    TILE = _tiles(backend.target(fields))["VERTICES"]
    grid = (triton.cdiv(T, TILE),)
    constants = {"CHANNELS": fields.shape[1], "K": K, "TILE": TILE, "num_warps": 4}
    backend.launch(_average, grid, fields, voxel, mean, spread, T, bias, **constants)
    mean[:, 0] = cubes.sdf  # the same numbers whose signs decided the topology
    return mean, spread


def _away(fields: Tensor, corners: Tensor, mean: Tensor, bias: float, i: int) -> Tensor:
    """Corner i of every voxel minus its mean."""
    value = fields[:, _channels(i, mean.shape[1])]
    value[:, 0] += bias
    return value.sub_(mean.index_select(0, corners[:, i]))


def fields_backward(
    fields: Tensor,
    coords: Tensor,
    corners: Tensor,  # [N, 8] vertex at each corner
    voxel_cube: Tensor,  # [N] surface cube of each voxel
    mean: Tensor,  # [T, K]
    grad_mean: Tensor,  # [T, K], divided by how many corners share the vertex
    grad_weights: Tensor,  # [C, 21]
    spread_slope: Tensor,  # [B] gradient of a corner value, over its distance from the mean
    size_slope: Tensor,  # [B] gradient of the size of a penalised weight
    bias: float,
) -> Tensor:
    """The gradient of the fields, [N, channels]."""
    N = len(fields)
    K = mean.shape[1]
    out = torch.empty_like(fields)
    if backend.is_torch(fields):
        for begin in range(0, N, CHUNK):
            part = slice(begin, begin + CHUNK)
            mine = (t[part] for t in (fields, corners, voxel_cube, coords[:, 0], out))
            _part_backward(*mine, mean, grad_mean, grad_weights, spread_slope, size_slope, bias)
        return out
    TILE = _tiles(backend.target(fields))["VOXELS"]
    grid = (triton.cdiv(N, TILE),)
    inputs = (fields, coords, corners, mean, voxel_cube, grad_mean, grad_weights)
    slopes = (spread_slope, size_slope)
    constants = {"CHANNELS": fields.shape[1], "K": K, "TILE": TILE, "num_warps": 4}
    backend.launch(_fields_bwd, grid, *inputs, *slopes, out, N, bias, **constants)
    return out


def _part_backward(
    fields,
    corners,
    voxel_cube,
    scene,
    out,
    mean,
    grad_mean,
    grad_weights,
    spread_slope,
    size_slope,
    bias,
) -> None:
    """`fields_backward` of some voxels on the torch path, into `out`."""
    slope = spread_slope.index_select(0, scene)[:, None]
    first = WEIGHTS.start
    last = WEIGHTS.start + PENALISED
    for i in range(8):
        grad = _away(fields, corners, mean, bias, i).mul_(slope)
        out[:, _channels(i, mean.shape[1])] = grad.add_(grad_mean.index_select(0, corners[:, i]))
    out[:, WEIGHTS] = 0
    on_surface = (voxel_cube >= 0).nonzero()[:, 0]
    out[on_surface, WEIGHTS] = grad_weights.index_select(0, voxel_cube[on_surface])
    size = fields[:, first:last].sign().mul_(size_slope.index_select(0, scene)[:, None])
    out[:, first:last].add_(size)
