"""Triangles of the quads between dual vertices, with or without a centre.

P dual vertices of M coordinates, Q quads. Diagonals are weighed by gamma: with w = gamma_0 gamma_2
and w' = gamma_1 gamma_3, a quad is split along 0-2 where w > w'; its centre is (w (v0 + v2) + w'
(v1 + v3)) / (2 (w + w')). In plain torch on every device: a few passes over Q rows. The backward
gathers, for each dual vertex and each cube, from the quads around their edges.
"""

import torch
from torch import Tensor

from kernels.surface.cubes import Geometry

TINY = 1e-8  # added to w + w'


def quad_duals(quad_edges: Tensor, g: Geometry) -> tuple[Tensor, Tensor]:
    """Cubes [Q, 4] and dual vertices [Q, 4] around each quad."""
    cube = quad_edges.long() // 12
    edge = quad_edges.long() % 12
    return cube, g.first_dual[cube] + g.tables.component[g.case[cube], edge]


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
    """The centre of each quad, [Q, M]."""
    even, odd, share, share_ = _diagonals(dual, quad, gamma)
    return share * even + share_ * odd


def centres_backward(
    g: Geometry,
    dual: Tensor,  # [P, M]
    quad_edges: Tensor,  # [Q, 4]
    grad_dual: Tensor,  # [P, M] that they have from elsewhere
    grad_centre: Tensor,  # [Q, M]
) -> tuple[Tensor, Tensor]:
    """The gradients of dual vertices [P, M], `grad_dual` included, and of gamma [C]."""
    cube, quad = quad_duals(quad_edges, g)
    C = len(g.weights)
    Q = len(quad)
    gamma = g.weights[:, 20][cube]
    even, odd, share, share_ = _diagonals(dual, quad, gamma)
    centre = share * even + share_ * odd
    total = sum(_weigh(gamma)) + TINY
    grad_w = (grad_centre * (even / 2 - centre)).sum(1) / total
    grad_w_ = (grad_centre * (odd / 2 - centre)).sum(1) / total
    slots = [
        grad_w * gamma[:, 2],
        grad_w_ * gamma[:, 3],
        grad_w * gamma[:, 0],
        grad_w_ * gamma[:, 1],
    ]
    # 4 * quad + slot of every edge of a cube; 4 Q: it has none
    at = quad_edges.new_full((12 * C,), 4 * Q)
    slot = torch.arange(4 * Q, dtype=torch.int32, device=at.device)
    at.index_copy_(0, quad_edges.view(-1).long(), slot)
    pad = torch.nn.functional.pad
    grad_gamma = pad(torch.stack(slots, 1).view(-1), (0, 1))[at].view(C, 12).sum(1)
    grad_centre = pad(grad_centre, (0, 0, 0, 1))
    share = pad(torch.cat([share, share_, share, share_], 1).view(-1), (0, 1))
    edges = g.tables.edges[g.dual_kind]
    first = 12 * g.dual_cube.long()
    for n in range(8):
        edge = edges[:, n]
        slot = torch.where(edge >= 0, at[first + edge.clamp(min=0)], 4 * Q).long()
        grad_dual = grad_dual + share[slot, None] * grad_centre.index_select(0, slot // 4)
    return grad_dual, grad_gamma


def split_quads(
    quad: Tensor, gamma: Tensor, duals: list[int], quads: list[int], training: bool
) -> Tensor:
    """Split quads into triangles [2 Q or 4 Q, 3] int32.

    In training the centres of a scene's quads stand behind its dual vertices.
    """
    parts = []
    for b in range(len(duals) - 1):
        span = slice(quads[b], quads[b + 1])
        v0, v1, v2, v3 = (quad[span].int() + (quads[b] if training else 0)).unbind(1)
        if training:
            c = torch.arange(quads[b], quads[b + 1], dtype=torch.int32, device=quad.device)
            c = c + duals[b + 1]
            corners = [v0, v1, c, v1, v2, c, v2, v3, c, v3, v0, c]
        else:
            w, w_ = _weigh(gamma[span])
            along = w > w_
            last = [torch.where(along, a, b) for a, b in ((v2, v3), (v0, v3), (v2, v1), (v3, v2))]
            corners = [v0, v1, *last]
        parts.append(torch.stack(corners, 1).view(-1, 3))
    return torch.cat([quad[:0, :3].int(), *parts])
