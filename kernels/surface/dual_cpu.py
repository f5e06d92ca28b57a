"""Dual vertices on a CPU (the formulas: kernels.surface.dual_gpu).

One row for each pair of a dual vertex and one of its edges, a chunk of dual vertices at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.surface.cubes import Geometry

CHUNK = 1 << 14  # dual vertices at a time: bounds the memory


class _Pairs(NamedTuple):
    """The I pairs of a chunk of n dual vertices."""

    span: slice  # the dual vertices
    p: Tensor  # [I] the dual vertex, from the first of the chunk
    flat: Tensor  # [I] 12 * cube + edge
    beta: Tensor  # [I, 1]
    ends: tuple["_End", "_End"]


class _End(NamedTuple):
    """One end of the edge of each pair."""

    row: Tensor  # [I] vertex
    flat: Tensor  # [I] 8 * cube + corner
    point: Tensor  # [I, M]
    sdf: Tensor  # [I, 1]
    alpha: Tensor  # [I, 1]


def _pairs(g: Geometry) -> Iterator[_Pairs]:
    P = len(g.dual_cube)
    for begin in range(0, P, CHUNK):
        span = slice(begin, min(begin + CHUNK, P))
        edges = g.tables.edges[g.dual_kind[span]]
        p, slot = (edges >= 0).nonzero().unbind(1)
        edge = edges[p, slot].long()
        cube = g.dual_cube[span][p].long()
        ends = tuple(_end(g, cube, corner) for corner in g.tables.ends[edge].unbind(1))
        yield _Pairs(span, p, 12 * cube + edge, g.weights[cube, edge, None], ends)


def _end(g: Geometry, cube: Tensor, corner: Tensor) -> _End:
    flat = 8 * cube + corner
    row = g.cube_corners.view(-1)[flat]
    value = g.values.index_select(0, row)
    offset = torch.stack([corner & 1, corner >> 1 & 1, corner >> 2], 1)
    grid = (g.cube_coords.index_select(0, cube) + offset).to(value.dtype) / g.resolution - 0.5
    point = torch.cat([value[:, 1:4] + grid, value[:, 4:]], 1)
    return _End(row, flat, point, value[:, :1], g.weights[cube, 12 + corner, None])


def _total(value: Tensor, pairs: _Pairs) -> Tensor:
    """Sum the pairs [I, ...] of each dual vertex: [n, ...]."""
    n = pairs.span.stop - pairs.span.start
    return value.new_zeros(n, value.shape[1]).index_add_(0, pairs.p, value)


class _Shape(NamedTuple):
    """The numbers that forward and backward share."""

    point: Tensor  # [I, M] weighted crossing of the edge
    vertex: Tensor  # [n, M]
    divisor: Tensor  # [n, 1] sum of beta
    away: Tensor  # [I, 3] plain crossing minus dual vertex
    distance: Tensor  # [I, 1]
    beyond: Tensor  # [I, 1] distance minus mean distance
    edges: Tensor  # [n, 1]


def _shape(pairs: _Pairs) -> _Shape:
    a, b = pairs.ends
    sa = a.sdf * a.alpha
    sb = b.sdf * b.alpha
    point = (a.point * sb - b.point * sa) / (sb - sa)
    divisor = _total(pairs.beta, pairs)
    vertex = _total(pairs.beta * point, pairs) / divisor
    plain = (a.point[:, :3] * b.sdf - b.point[:, :3] * a.sdf) / (b.sdf - a.sdf)
    away = plain - vertex[:, :3].index_select(0, pairs.p)
    distance = away.norm(dim=1, keepdim=True)
    edges = _total(torch.ones_like(distance), pairs)
    beyond = distance - (_total(distance, pairs) / edges).index_select(0, pairs.p)
    return _Shape(point, vertex, divisor, away, distance, beyond, edges)


def dual_torch(g: Geometry) -> tuple[Tensor, Tensor]:
    """Dual vertices [P, M], position and color, and their deviations [P]."""
    P = len(g.dual_cube)
    M = g.values.shape[1] - 1
    out = g.values.new_empty(P, M)
    deviation = g.values.new_empty(P)
    for pairs in _pairs(g):
        shape = _shape(pairs)
        out[pairs.span] = shape.vertex
        deviation[pairs.span] = _total(shape.beyond.abs(), pairs)[:, 0]
    return out, deviation


def dual_torch_backward(
    g: Geometry, grad: Tensor, grad_deviation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values [T + 1, 1 + M], beta [C, 12] and alpha [C, 8]."""
    C = len(g.weights)
    grad_values = torch.zeros_like(g.values)
    grad_beta = grad.new_zeros(12 * C)
    grad_alpha = grad.new_zeros(8 * C)
    for pairs in _pairs(g):
        s = _shape(pairs)
        up = grad[pairs.span].clone()
        sign = s.beyond.sign()
        slope = sign - (_total(sign, pairs) / s.edges)[pairs.p]
        slope = slope * grad_deviation[pairs.span][pairs.p, None]
        g_plain = torch.where(s.distance > 0, slope / s.distance, 0) * s.away
        up[:, :3] -= _total(g_plain, pairs)
        g_point = (up / s.divisor).index_select(0, pairs.p)
        grad_beta[pairs.flat] = (g_point * (s.point - s.vertex.index_select(0, pairs.p))).sum(1)
        g_point *= pairs.beta
        for own, other in (pairs.ends, pairs.ends[::-1]):
            between = own.point - other.point
            s_own = own.sdf * own.alpha
            s_other = other.sdf * other.alpha
            part = s_other / (s_other - s_own)
            g_product = (g_point * between).sum(1, keepdim=True) * part / (s_other - s_own)
            plain = other.sdf / (other.sdf - own.sdf)
            g_sdf = (g_plain * between[:, :3]).sum(1, keepdim=True) * plain / (other.sdf - own.sdf)
            g_point_own = part * g_point
            g_point_own[:, :3] += plain * g_plain
            g_own = torch.cat([g_sdf + g_product * own.alpha, g_point_own], 1)
            grad_values.index_add_(0, own.row, g_own)
            grad_alpha.index_add_(0, own.flat, (g_product * own.sdf)[:, 0])
    return grad_values, grad_beta.view(C, 12), grad_alpha.view(C, 8)
