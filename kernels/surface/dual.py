"""Dual vertices of surface cubes, forward and backward. T vertices, C cubes, P dual vertices, M = 3
(or 9) coordinates.

values [T + 1, 1 + M]: signed distance | displacement 3 | color; the last row is that of every
corner without a voxel. weights [C, 21]: beta 12 | alpha 8 | gamma, activated. A cube's edge with
ends i, j of opposite sign is crossed at

    u = (x_i s_j a_j - x_j s_i a_i) / (s_j a_j - s_i a_i)
    a dual vertex is v = sum beta u / sum beta over its edges

(FlexiCubes, Shen et al. 2023, eqs. 4 and 5), colors alike. With z the plain crossing (a = 1) and d
= |z - v|, the deviation of a dual vertex is the sum of |d - mean d| over its edges (eq. 8).
Backward: one pass per dual vertex for what is behind v, one per vertex that gathers from its eight
cubes and the three edges that meet there. No atomics.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.surface.cubes import Geometry
from kernels.surface.dual_cpu import dual_torch, dual_torch_backward
from kernels.surface.tables import cube_tables


def _tiles(target: str) -> dict[str, int]:
    """Dual vertices (of 8 lanes) and vertices (of 32) per program; not yet measured on a GPU."""
    large = target == "interpreter"  # which pays per program
    return {"DUALS": 1024 if large else 32, "VERTICES": 512 if large else 8}


@triton.jit
def _at(place_ptr, cube, corner, AXIS: tl.constexpr, R, on):
    """Coordinate of a grid vertex, a corner of a cube, before its displacement."""
    cell = tl.load(place_ptr + cube * 3 + AXIS, mask=on, other=0) + (corner >> AXIS & 1)
    return cell.to(tl.float32) / R - 0.5


@triton.jit
def _edges(
    p,
    live,
    values_ptr,
    weights_ptr,
    corner_ptr,
    dual_ptr,
    kind_ptr,
    edges_ptr,
    ends_ptr,
    M: tl.constexpr,
):
    """The edges of dual vertices, [TILE, 8]: cube, edge, whether there is one, corners i and j,
    their vertices and signed distances, and the shares of i and of j in the weighted and in the
    plain crossing.
    """
    cube = tl.load(dual_ptr + p, mask=live, other=0).to(tl.int64)[:, None]
    kind = tl.load(kind_ptr + p, mask=live, other=0)[:, None]
    edge = tl.load(edges_ptr + kind * 8 + tl.arange(0, 8)[None, :]).to(tl.int32)
    on = live[:, None] & (edge >= 0)
    edge = tl.where(on, edge, 0)
    i = tl.load(ends_ptr + 2 * edge)
    j = tl.load(ends_ptr + 2 * edge + 1)
    vi = tl.load(corner_ptr + cube * 8 + i, mask=on, other=0).to(tl.int64)
    vj = tl.load(corner_ptr + cube * 8 + j, mask=on, other=0).to(tl.int64)
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
    place_ptr,
    corner_ptr,
    dual_ptr,
    kind_ptr,
    edges_ptr,
    ends_ptr,
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
        p, live, values_ptr, weights_ptr, corner_ptr, dual_ptr, kind_ptr, edges_ptr, ends_ptr, M
    )
    beta = tl.load(weights_ptr + cube * 21 + edge, mask=on, other=0.0)  # [TILE, 8]
    share = beta / tl.where(live, tl.sum(beta, 1), 1.0)[:, None]
    square = tl.zeros([TILE, 8], tl.float32)
    for m in tl.static_range(M):
        xi = tl.load(values_ptr + vi * (1 + M) + 1 + m, mask=on, other=0.0)
        xj = tl.load(values_ptr + vj * (1 + M) + 1 + m, mask=on, other=0.0)
        if m < 3:
            xi += _at(place_ptr, cube, i, m, R, on)
            xj += _at(place_ptr, cube, j, m, R, on)
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
    place_ptr,
    corner_ptr,
    dual_ptr,
    kind_ptr,
    edges_ptr,
    ends_ptr,
    out_ptr,
    grad_ptr,
    grad_deviation_ptr,
    pull_ptr,
    slope_ptr,
    grad_beta_ptr,
    P,
    R,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    """pull [P, M]: the gradient of v, its deviation included, over sum beta; slope [C, 12]: the
    gradient of d, over d.
    """
    p = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = p < P
    cube, edge, on, i, j, vi, vj, ti, tj, zi, zj = _edges(
        p, live, values_ptr, weights_ptr, corner_ptr, dual_ptr, kind_ptr, edges_ptr, ends_ptr, M
    )
    square = tl.zeros([TILE, 8], tl.float32)
    for m in tl.static_range(3):
        xi = tl.load(values_ptr + vi * (1 + M) + 1 + m, mask=on, other=0.0) + _at(
            place_ptr, cube, i, m, R, on
        )
        xj = tl.load(values_ptr + vj * (1 + M) + 1 + m, mask=on, other=0.0) + _at(
            place_ptr, cube, j, m, R, on
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
            xi += _at(place_ptr, cube, i, m, R, on)
            xj += _at(place_ptr, cube, j, m, R, on)
            grad -= tl.sum(tl.where(on, slope * (zi * xi + zj * xj - v), 0.0), 1)
        pull = grad / tl.where(live, divisor, 1.0)
        tl.store(pull_ptr + p * M + m, pull, mask=live)
        grad_beta += pull[:, None] * (ti * xi + tj * xj - v)
    tl.store(grad_beta_ptr + cube * 12 + edge, grad_beta, mask=on)


@triton.jit(do_not_specialize=["T", "R"])
def _vertex_bwd(
    values_ptr,
    weights_ptr,
    place_ptr,
    corner_ptr,
    case_ptr,
    first_ptr,
    cube_ptr,
    component_ptr,
    ends_ptr,
    meeting_ptr,
    out_ptr,
    pull_ptr,
    slope_ptr,
    grad_values_ptr,
    grad_alpha_ptr,
    T,
    R,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    """A lane is one of the three edges that meet at one of eight cubes' corners: cube 4 q + n, n <
    3.
    """
    t = (tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE))[:, None]
    q = tl.arange(0, 32)[None, :] // 4
    n = tl.arange(0, 32)[None, :] % 4
    # [TILE, 32]
    cube = tl.load(cube_ptr + t * 8 + q, mask=(t < T) & (n < 3), other=-1).to(tl.int64)
    case = tl.load(case_ptr + cube, mask=cube >= 0, other=0)
    edge = tl.load(meeting_ptr + q * 3 + n, mask=n < 3, other=0).to(tl.int32)  # [1, 32]
    part = tl.load(component_ptr + case * 12 + edge).to(tl.int32)
    on = (cube >= 0) & (part >= 0)
    p = tl.load(first_ptr + cube, mask=on, other=0) + tl.where(on, part, 0)
    # the edge's far corner
    other = tl.load(ends_ptr + 2 * edge) + tl.load(ends_ptr + 2 * edge + 1) - q
    v = tl.load(corner_ptr + cube * 8 + other, mask=on, other=0).to(tl.int64)
    alpha = tl.load(weights_ptr + cube * 21 + 12 + q, mask=on, other=1.0)
    s = tl.load(values_ptr + t * (1 + M), mask=t < T, other=0.0)  # [TILE, 1]
    so = tl.load(values_ptr + v * (1 + M), mask=on, other=0.0)
    a = s * alpha
    ao = so * tl.load(weights_ptr + cube * 21 + 12 + other, mask=on, other=1.0)
    gap, plain_gap = tl.where(on, ao - a, 1.0), tl.where(on, so - s, 1.0)
    # of this vertex in the weighted and in the plain crossing
    share, plain = ao / gap, so / plain_gap
    beta = tl.load(weights_ptr + cube * 21 + edge, mask=on, other=0.0)
    slope = tl.load(slope_ptr + cube * 12 + edge, mask=on, other=0.0)
    along, plain_along = tl.zeros([TILE, 32], tl.float32), tl.zeros([TILE, 32], tl.float32)
    for m in tl.static_range(M):
        x = tl.load(values_ptr + t * (1 + M) + 1 + m, mask=t < T, other=0.0)
        xo = tl.load(values_ptr + v * (1 + M) + 1 + m, mask=on, other=0.0)
        g = beta * tl.load(pull_ptr + p * M + m, mask=on, other=0.0)
        grad = share * g
        if m < 3:
            x += _at(place_ptr, cube, q, m, R, on)
            xo += _at(place_ptr, cube, other, m, R, on)
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
    cube = tl.load(cube_ptr + t * 8 + corner, mask=t < T, other=-1).to(tl.int64)  # [TILE, 8]
    tl.store(
        grad_alpha_ptr + cube * 8 + corner,
        tl.sum(tl.reshape(product * s, [TILE, 8, 4]), 2),
        mask=cube >= 0,
    )


def dual_vertices(g: Geometry) -> tuple[Tensor, Tensor]:
    """Dual vertices [P, M], position and color, and their deviations [P]."""
    if backend.is_torch(g.values):
        return dual_torch(g)
    P = len(g.dual)
    M = g.values.shape[1] - 1
    out = g.values.new_empty(P, M)
    deviation = g.values.new_empty(P)
    _launch(_dual_fwd, "DUALS", P, g, *_duals(g), out, deviation)
    return out, deviation


def dual_vertices_backward(
    g: Geometry,
    out: Tensor,  # [P, M] as dual_vertices gave it
    grad: Tensor,  # [P, M]
    grad_deviation: Tensor,  # [P]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values [T + 1, 1 + M] (the last row is none), beta [C, 12] and alpha [C, 8]."""
    if backend.is_torch(g.values):
        return dual_torch_backward(g, grad, grad_deviation)
    C = len(g.corner)
    T = len(g.values) - 1
    tables = cube_tables(g.values.device)
    pull = torch.empty_like(out)
    slope = out.new_zeros(C, 12)
    grad_beta = out.new_zeros(C, 12)
    _launch(
        _dual_bwd,
        "DUALS",
        len(out),
        g,
        *_duals(g),
        out,
        grad,
        grad_deviation,
        pull,
        slope,
        grad_beta,
    )
    cubes = g.corner.new_full((T + 1, 8), -1)
    row = torch.arange(C, dtype=torch.int32, device=out.device)
    # q-th corners of different cubes are different vertices, but for those without a voxel
    for q in range(8):
        cubes[:, q].index_copy_(0, g.corner[:, q].long(), row)
    grad_values = torch.zeros_like(g.values)
    grad_alpha = out.new_zeros(C, 8)
    _launch(
        _vertex_bwd,
        "VERTICES",
        T,
        g,
        g.case,
        g.first,
        cubes,
        tables.component,
        tables.ends,
        tables.meeting,
        out,
        pull,
        slope,
        grad_values,
        grad_alpha,
    )
    return grad_values, grad_beta, grad_alpha


def _duals(g: Geometry) -> tuple[Tensor, ...]:
    tables = cube_tables(g.values.device)
    return g.dual, g.kind, tables.edges, tables.ends


def _launch(kernel, rows: str, count: int, g: Geometry, *tensors: Tensor) -> None:
    TILE = _tiles(backend.target(g.values))[rows]
    args = (g.values, g.weights, g.place, g.corner, *tensors, count, g.resolution)
    backend.launch(
        kernel, (triton.cdiv(count, TILE),), *args, M=g.values.shape[1] - 1, TILE=TILE, num_warps=4
    )
