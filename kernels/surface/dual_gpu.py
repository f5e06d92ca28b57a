"""Dual vertices of surface cubes on a GPU.

T vertices, C cubes, P dual vertices, M = 3 (or 9) coordinates: positions and colors are
interpolated alike. A cube's edge with ends i, j of opposite sign is crossed at

    u = (x_i s_j a_j - x_j s_i a_i) / (s_j a_j - s_i a_i)

and a dual vertex is v = sum beta u / sum beta over its edges (FlexiCubes, Shen et al. 2023, eqs. 4
and 5), with the signed distances s and the weights a (alpha) and beta. With z the plain crossing (a
= 1) and d = |z - v|, the deviation of a dual vertex is the sum of |d - mean d| over its edges (eq.
8).

Backward: one pass per dual vertex
for what its value depends on, then one per vertex that gathers from its eight cubes and the three
edges that meet there. No atomics. Pointers that travel together:

    values_ptr   [T + 1, 1 + M]  signed distance | displacement 3 | color
    weights_ptr  [C, 21]         beta 12 | alpha 8 | gamma
    coords_ptr   [C, 3]          place of the cube in the grid
    corners_ptr  [C, 8]          vertex at each corner of the cube
    cube_ptr     [P]             cube of each dual vertex
    kind_ptr     [P]             kind of each dual vertex, a row of the table of edges
    tables_ptr                   CubeTables.packed
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.surface.cubes import Geometry
from kernels.surface.tables import COMPONENT_AT, EDGES_AT, ENDS_AT, MEETING_AT

EDGES = tl.constexpr(EDGES_AT)
COMPONENT = tl.constexpr(COMPONENT_AT)
MEETING = tl.constexpr(MEETING_AT)
ENDS = tl.constexpr(ENDS_AT)


def _tiles(target: str) -> dict[str, int]:
    """Dual vertices (of 8 lanes) and vertices (of 32) per program; not yet measured on a GPU."""
    if target == "interpreter":  # its cost is per program
        return {"DUALS": 1024, "VERTICES": 512}
    return {"DUALS": 32, "VERTICES": 8}


@triton.jit
def _at(coords_ptr, cube, corner, AXIS: tl.constexpr, R, on):
    """A coordinate of a cube's corner in the grid, before its displacement."""
    cell = tl.load(coords_ptr + cube * 3 + AXIS, mask=on, other=0) + (corner >> AXIS & 1)
    return cell.to(tl.float32) / R - 0.5


@triton.jit
def _edges(
    p,
    live,
    values_ptr,
    weights_ptr,
    corners_ptr,
    cube_ptr,
    kind_ptr,
    tables_ptr,
    M: tl.constexpr,
):
    """The edges of dual vertices, [TILE, 8].

    Returns the cube and the edge, a mask of the edges that exist, the corners i and j, their
    vertices, and the shares of i and of j in the weighted and in the plain crossing.
    """
    cube = tl.load(cube_ptr + p, mask=live, other=0).to(tl.int64)[:, None]
    kind = tl.load(kind_ptr + p, mask=live, other=0)[:, None]
    edge = tl.load(tables_ptr + EDGES + kind * 8 + tl.arange(0, 8)[None, :]).to(tl.int32)
    on = live[:, None] & (edge >= 0)
    edge = tl.where(on, edge, 0)
    i = tl.load(tables_ptr + ENDS + 2 * edge).to(tl.int32)
    j = tl.load(tables_ptr + ENDS + 2 * edge + 1).to(tl.int32)
    vi = tl.load(corners_ptr + cube * 8 + i, mask=on, other=0).to(tl.int64)
    vj = tl.load(corners_ptr + cube * 8 + j, mask=on, other=0).to(tl.int64)
    si = tl.load(values_ptr + vi * (1 + M), mask=on, other=-1.0)
    sj = tl.load(values_ptr + vj * (1 + M), mask=on, other=1.0)
    ai = si * tl.load(weights_ptr + cube * 21 + 12 + i, mask=on, other=1.0)
    aj = sj * tl.load(weights_ptr + cube * 21 + 12 + j, mask=on, other=1.0)
    return (
        cube,
        edge,
        on,
        i,
        j,
        vi,
        vj,
        aj / (aj - ai),
        -ai / (aj - ai),
        sj / (sj - si),
        -si / (sj - si),
    )


@triton.jit(do_not_specialize=["P", "R"])
def _dual_fwd(
    values_ptr,
    weights_ptr,
    coords_ptr,
    corners_ptr,
    cube_ptr,
    kind_ptr,
    tables_ptr,
    out_ptr,
    deviation_ptr,
    P,
    R,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = p < P
    cube, edge, on, i, j, vi, vj, ti, tj, zi, zj = _edges(
        p, live, values_ptr, weights_ptr, corners_ptr, cube_ptr, kind_ptr, tables_ptr, M
    )
    beta = tl.load(weights_ptr + cube * 21 + edge, mask=on, other=0.0)  # [TILE, 8]
    share = beta / tl.where(live, tl.sum(beta, 1), 1.0)[:, None]
    square = tl.zeros([TILE, 8], tl.float32)
    for m in tl.static_range(M):
        xi = tl.load(values_ptr + vi * (1 + M) + 1 + m, mask=on, other=0.0)
        xj = tl.load(values_ptr + vj * (1 + M) + 1 + m, mask=on, other=0.0)
        if m < 3:
            xi += _at(coords_ptr, cube, i, m, R, on)
            xj += _at(coords_ptr, cube, j, m, R, on)
        v = tl.sum(tl.where(on, share * (ti * xi + tj * xj), 0.0), 1)
        tl.store(out_ptr + p * M + m, v, mask=live)
        if m < 3:
            away = zi * xi + zj * xj - v[:, None]
            square += away * away
    distance = tl.where(on, tl.sqrt(square), 0.0)
    count = tl.maximum(tl.sum(on.to(tl.float32), 1), 1.0)
    beyond = distance - (tl.sum(distance, 1) / count)[:, None]
    tl.store(deviation_ptr + p, tl.sum(tl.where(on, tl.abs(beyond), 0.0), 1), mask=live)


@triton.jit(do_not_specialize=["P", "R"])
def _dual_bwd(
    values_ptr,
    weights_ptr,
    coords_ptr,
    corners_ptr,
    cube_ptr,
    kind_ptr,
    tables_ptr,
    out_ptr,
    grad_ptr,
    grad_deviation_ptr,
    grad_sum_ptr,
    slope_ptr,
    grad_beta_ptr,
    P,
    R,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    """From the gradients of dual vertices and deviations to those of their sums over edges.

    grad_sum [P, M] is the gradient of sum beta u: that of v, the deviation's part included, over
    sum beta. slope [C, 12] is the gradient of d, over d.
    """
    p = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = p < P
    cube, edge, on, i, j, vi, vj, ti, tj, zi, zj = _edges(
        p, live, values_ptr, weights_ptr, corners_ptr, cube_ptr, kind_ptr, tables_ptr, M
    )
    square = tl.zeros([TILE, 8], tl.float32)
    for m in tl.static_range(3):
        xi = tl.load(values_ptr + vi * (1 + M) + 1 + m, mask=on, other=0.0) + _at(
            coords_ptr, cube, i, m, R, on
        )
        xj = tl.load(values_ptr + vj * (1 + M) + 1 + m, mask=on, other=0.0) + _at(
            coords_ptr, cube, j, m, R, on
        )
        away = zi * xi + zj * xj - tl.load(out_ptr + p * M + m, mask=live, other=0.0)[:, None]
        square += away * away
    distance = tl.where(on, tl.sqrt(square), 0.0)
    count = tl.maximum(tl.sum(on.to(tl.float32), 1), 1.0)[:, None]
    beyond = distance - tl.sum(distance, 1)[:, None] / count
    sign = tl.where(on, tl.where(beyond > 0, 1.0, tl.where(beyond < 0, -1.0, 0.0)), 0.0)
    slope = (sign - tl.sum(sign, 1)[:, None] / count) * tl.load(
        grad_deviation_ptr + p, mask=live, other=0.0
    )[:, None]
    slope = tl.where(on & (distance > 0), slope / tl.where(distance > 0, distance, 1.0), 0.0)
    tl.store(slope_ptr + cube * 12 + edge, slope, mask=on)
    divisor = tl.sum(tl.load(weights_ptr + cube * 21 + edge, mask=on, other=0.0), 1)
    grad_beta = tl.zeros([TILE, 8], tl.float32)
    for m in tl.static_range(M):
        xi = tl.load(values_ptr + vi * (1 + M) + 1 + m, mask=on, other=0.0)
        xj = tl.load(values_ptr + vj * (1 + M) + 1 + m, mask=on, other=0.0)
        v = tl.load(out_ptr + p * M + m, mask=live, other=0.0)[:, None]
        grad = tl.load(grad_ptr + p * M + m, mask=live, other=0.0)
        if m < 3:
            xi += _at(coords_ptr, cube, i, m, R, on)
            xj += _at(coords_ptr, cube, j, m, R, on)
            grad -= tl.sum(tl.where(on, slope * (zi * xi + zj * xj - v), 0.0), 1)
        grad_sum = grad / tl.where(live, divisor, 1.0)
        tl.store(grad_sum_ptr + p * M + m, grad_sum, mask=live)
        grad_beta += grad_sum[:, None] * (ti * xi + tj * xj - v)
    tl.store(grad_beta_ptr + cube * 12 + edge, grad_beta, mask=on)


@triton.jit(do_not_specialize=["T", "R"])
def _vertex_bwd(
    values_ptr,
    weights_ptr,
    coords_ptr,
    corners_ptr,
    case_ptr,
    first_ptr,
    vertex_cubes_ptr,
    tables_ptr,
    out_ptr,
    grad_sum_ptr,
    slope_ptr,
    grad_values_ptr,
    grad_alpha_ptr,
    T,
    R,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gather the gradient of each vertex from its eight cubes and their edges that meet there.

    Lane 4 q + n, n < 3, is edge n of the three that meet at corner q of a cube: the corner which is
    this vertex in the cube.
    """
    t = (tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE))[:, None]
    q = tl.arange(0, 32)[None, :] // 4
    n = tl.arange(0, 32)[None, :] % 4
    # [TILE, 32]
    cube = tl.load(vertex_cubes_ptr + t * 8 + q, mask=(t < T) & (n < 3), other=-1).to(tl.int64)
    case = tl.load(case_ptr + cube, mask=cube >= 0, other=0)
    edge = tl.load(tables_ptr + MEETING + q * 3 + n, mask=n < 3, other=0).to(tl.int32)  # [1, 32]
    part = tl.load(tables_ptr + COMPONENT + case * 12 + edge).to(tl.int32)
    on = (cube >= 0) & (part >= 0)
    p = tl.load(first_ptr + cube, mask=on, other=0) + tl.where(on, part, 0)
    # the edge's far corner
    ends = tables_ptr + ENDS + 2 * edge
    other = tl.load(ends).to(tl.int32) + tl.load(ends + 1).to(tl.int32) - q
    v = tl.load(corners_ptr + cube * 8 + other, mask=on, other=0).to(tl.int64)
    alpha = tl.load(weights_ptr + cube * 21 + 12 + q, mask=on, other=1.0)
    s = tl.load(values_ptr + t * (1 + M), mask=t < T, other=0.0)  # [TILE, 1]
    so = tl.load(values_ptr + v * (1 + M), mask=on, other=0.0)
    a = s * alpha
    ao = so * tl.load(weights_ptr + cube * 21 + 12 + other, mask=on, other=1.0)
    gap = tl.where(on, ao - a, 1.0)
    plain_gap = tl.where(on, so - s, 1.0)
    # shares of this vertex in the weighted and in the plain crossing
    share = ao / gap
    plain = so / plain_gap
    beta = tl.load(weights_ptr + cube * 21 + edge, mask=on, other=0.0)
    slope = tl.load(slope_ptr + cube * 12 + edge, mask=on, other=0.0)
    along = tl.zeros([TILE, 32], tl.float32)
    plain_along = tl.zeros([TILE, 32], tl.float32)
    for m in tl.static_range(M):
        x = tl.load(values_ptr + t * (1 + M) + 1 + m, mask=t < T, other=0.0)
        xo = tl.load(values_ptr + v * (1 + M) + 1 + m, mask=on, other=0.0)
        g = beta * tl.load(grad_sum_ptr + p * M + m, mask=on, other=0.0)
        grad = share * g
        if m < 3:
            x += _at(coords_ptr, cube, q, m, R, on)
            xo += _at(coords_ptr, cube, other, m, R, on)
            g_plain = slope * (
                plain * x + (1.0 - plain) * xo - tl.load(out_ptr + p * M + m, mask=on, other=0.0)
            )
            plain_along += g_plain * (x - xo)
            grad += g_plain * plain
        along += g * (x - xo)
        at = grad_values_ptr + t * (1 + M) + 1 + m
        tl.store(at, tl.sum(tl.where(on, grad, 0.0), 1)[:, None], mask=t < T)
    product = tl.where(on, along * share / gap, 0.0)  # the gradient of s alpha
    direct = tl.where(on, plain_along * plain / plain_gap, 0.0)
    tl.store(
        grad_values_ptr + t * (1 + M), tl.sum(direct + product * alpha, 1)[:, None], mask=t < T
    )
    corner = tl.arange(0, 8)[None, :]
    cube = tl.load(vertex_cubes_ptr + t * 8 + corner, mask=t < T, other=-1).to(
        tl.int64
    )  # [TILE, 8]
    tl.store(
        grad_alpha_ptr + cube * 8 + corner,
        tl.sum(tl.reshape(product * s, [TILE, 8, 4]), 2),
        mask=cube >= 0,
    )


def dual_triton(g: Geometry) -> tuple[Tensor, Tensor]:
    """Dual vertices [P, M], position and color, and their deviations [P]."""
    P = len(g.dual_cube)
    out = g.values.new_empty(P, g.values.shape[1] - 1)
    deviation = g.values.new_empty(P)
    duals = (g.dual_cube, g.dual_kind, g.tables.packed)
    _launch(_dual_fwd, "DUALS", P, g, *duals, out, deviation)
    return out, deviation


def dual_triton_backward(
    g: Geometry,
    out: Tensor,  # [P, M] of `dual_triton`
    grad: Tensor,  # [P, M]
    grad_deviation: Tensor,  # [P]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values [T + 1, 1 + M], beta [C, 12] and alpha [C, 8].

    The last row of the first, for vertices without a voxel, is not meaningful.
    """
    C = len(g.cube_corners)
    T = len(g.values) - 1
    grad_sum = torch.empty_like(out)
    slope = out.new_zeros(C, 12)
    grad_beta = out.new_zeros(C, 12)
    duals = (g.dual_cube, g.dual_kind, g.tables.packed)
    inputs = (out, grad, grad_deviation)
    outputs = (grad_sum, slope, grad_beta)
    _launch(_dual_bwd, "DUALS", len(out), g, *duals, *inputs, *outputs)
    vertex_cubes = g.cube_corners.new_full((T + 1, 8), -1)
    row = torch.arange(C, dtype=torch.int32, device=out.device)
    # q-th corners of different cubes are different vertices, but for corners without a voxel
    for q in range(8):
        vertex_cubes[:, q].index_copy_(0, g.cube_corners[:, q].long(), row)
    grad_values = torch.zeros_like(g.values)
    grad_alpha = out.new_zeros(C, 8)
    cubes = (g.case, g.first_dual, vertex_cubes, g.tables.packed)
    inputs = (out, grad_sum, slope)
    _launch(_vertex_bwd, "VERTICES", T, g, *cubes, *inputs, grad_values, grad_alpha)
    return grad_values, grad_beta, grad_alpha


def _launch(kernel, rows: str, count: int, g: Geometry, *tensors: Tensor) -> None:
    target = backend.target(g.values)
    TILE = _tiles(target)[rows]
    warps = 2 if kernel is _vertex_bwd and target.startswith("sm_8") else 4  # 4 spill there
    M = g.values.shape[1] - 1
    args = (g.values, g.weights, g.cube_coords, g.cube_corners, *tensors, count, g.resolution)
    constants = dict(M=M, TILE=TILE, num_warps=warps)
    # lanes hold copies of its sums, and a fused product rounds in one of them alone
    constants["enable_fp_fusion"] = kernel is not _vertex_bwd
    backend.launch(kernel, (triton.cdiv(count, TILE),), *args, **constants)
