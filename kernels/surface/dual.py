"""Dual vertices of surface cubes, forward and backward.

T vertices, C cubes, P dual vertices, M = 3 (or 9) coordinates: positions and colors are
interpolated alike. A cube's edge with ends i, j of opposite sign is crossed at

    u = (x_i s_j a_j - x_j s_i a_i) / (s_j a_j - s_i a_i)

and a dual vertex is v = sum beta u / sum beta over its edges (FlexiCubes, Shen et al. 2023, eqs. 4
and 5), with the signed distances s and the weights a (alpha) and beta. With z the plain crossing (a
= 1) and d = |z - v|, the deviation of a dual vertex is the sum of |d - mean d| over its edges (eq.
8).
"""

from torch import Tensor

from kernels import backend
from kernels.surface.cubes import Geometry
from kernels.surface.dual_cpu import dual_torch, dual_torch_backward
from kernels.surface.dual_gpu import dual_triton, dual_triton_backward


def dual_vertices(g: Geometry) -> tuple[Tensor, Tensor]:
    """Dual vertices [P, M], position and color, and their deviations [P]."""
    if backend.is_torch(g.values):
        return dual_torch(g)
    return dual_triton(g)


def dual_vertices_backward(
    g: Geometry,
    out: Tensor,  # [P, M] of `dual_vertices`
    grad: Tensor,  # [P, M]
    grad_deviation: Tensor,  # [P]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values [T + 1, 1 + M], beta [C, 12] and alpha [C, 8].

    The last row of the first, that of vertices without a voxel, means nothing.
    """
    if backend.is_torch(g.values):
        return dual_torch_backward(g, grad, grad_deviation)
    return dual_triton_backward(g, out, grad, grad_deviation)
