"""Quads between dual vertices -> triangles, with or without a centre. P dual vertices of M
coordinates, Q quads.

Diagonals are weighed by gamma: with w = gamma_0 gamma_2 and w' = gamma_1 gamma_3, a quad is split
along 0-2 where w > w'; its centre is (w (v0 + v2) + w' (v1 + v3)) / (2 (w + w')). Plain torch: a
few passes over Q rows. The backward gathers, per dual vertex and per cube, from the quads around
their edges.
"""

import torch
from torch import Tensor

from kernels.surface.cubes import Geometry
from kernels.surface.tables import cube_tables

TINY = 1e-8  # added to w + w'


def quad_duals(around: Tensor, g: Geometry) -> tuple[Tensor, Tensor]:
    """Cubes [Q, 4] and dual vertices [Q, 4] around each quad."""
    cube = around.long() // 12
    edge = around.long() % 12
    return cube, g.first[cube] + cube_tables(around.device).component[g.case[cube], edge]


def _weigh(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """w and w'."""
    return gamma[:, 0] * gamma[:, 2], gamma[:, 1] * gamma[:, 3]


def _diagonals(dual: Tensor, quad: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
    """v0 + v2, v1 + v3 and half the shares of the two in the centre."""
    v0, v1, v2, v3 = (dual.index_select(0, quad[:, n]) for n in range(4))
    w, w_ = _weigh(gamma)
    double = 2 * (w + w_ + TINY)
    return v0.add_(v2), v1.add_(v3), (w / double)[:, None], (w_ / double)[:, None]


def centres(dual: Tensor, quad: Tensor, gamma: Tensor) -> Tensor:
    """[Q, M]"""
    even, odd, share, share_ = _diagonals(dual, quad, gamma)
    return share * even + share_ * odd


def centres_backward(
    g: Geometry, dual: Tensor, quad: Tensor, cube: Tensor, around: Tensor, up: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of dual vertices, up [P, M] included, and of gamma [C], from that of the
    centres, grad [Q, M].
    """
    C = len(g.weights)
    Q = len(quad)
    gamma = g.weights[:, 20][cube]
    tables = cube_tables(around.device)
    even, odd, share, share_ = _diagonals(dual, quad, gamma)
    centre = share * even + share_ * odd
    total = sum(_weigh(gamma)) + TINY
    grad_w = (grad * (even / 2 - centre)).sum(1) / total
    grad_w_ = (grad * (odd / 2 - centre)).sum(1) / total
    slots = [
        grad_w * gamma[:, 2],
        grad_w_ * gamma[:, 3],
        grad_w * gamma[:, 0],
        grad_w_ * gamma[:, 1],
    ]
    # 4 * quad + slot of every edge of a cube; 4 Q: it has none
    at = around.new_full((12 * C,), 4 * Q)
    at.index_copy_(
        0, around.view(-1).long(), torch.arange(4 * Q, dtype=torch.int32, device=at.device)
    )
    pad = torch.nn.functional.pad
    grad_gamma = pad(torch.stack(slots, 1).view(-1), (0, 1))[at].view(C, 12).sum(1)
    grad = pad(grad, (0, 0, 0, 1))
    share = pad(torch.cat([share, share_, share, share_], 1).view(-1), (0, 1))
    edges = tables.edges[g.kind]
    for n in range(8):
        edge = edges[:, n]
        slot = torch.where(edge >= 0, at[12 * g.dual.long() + edge.clamp(min=0)], 4 * Q).long()
        up = up + share[slot, None] * grad.index_select(0, slot // 4)
    return up, grad_gamma


def split_quads(
    quad: Tensor, gamma: Tensor, duals: list[int], quads: list[int], training: bool
) -> Tensor:
    """Triangles [2 Q or 4 Q, 3] int32; in training the centres of a scene's quads stand behind its
    dual vertices.
    """
    parts = []
    for b in range(len(duals) - 1):
        span = slice(quads[b], quads[b + 1])
        v0, v1, v2, v3 = (quad[span].int() + (quads[b] if training else 0)).unbind(1)
        if training:
            c = (
                torch.arange(quads[b], quads[b + 1], dtype=torch.int32, device=quad.device)
                + duals[b + 1]
            )
            corners = [v0, v1, c, v1, v2, c, v2, v3, c, v3, v0, c]
        else:
            w, w_ = _weigh(gamma[span])
            along = w > w_
            last = [torch.where(along, a, b) for a, b in ((v2, v3), (v0, v3), (v2, v1), (v3, v2))]
            corners = [v0, v1, *last]
        parts.append(torch.stack(corners, 1).view(-1, 3))
    return torch.cat([quad[:0, :3].int(), *parts])
