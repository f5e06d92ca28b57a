"""Values of vertices and normals of faces at pixels, on a CPU: the covered pixels alone."""

import torch
from torch import Tensor

from kernels.mesh.rasterize_cpu import covered_pixels

LEAST = 1e-12  # length of a cross product below which it is not normalised


def _weights(rast: Tensor, at: Tensor) -> Tensor:
    """Barycentrics of the covered pixels, [M, 3]."""
    u, v = rast.reshape(-1, 4)[at, :2].unbind(1)
    return torch.stack([u, v, 1 - u - v], 1)


def interpolate_torch(attributes: Tensor, rast: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """Interpolate attributes at every pixel, [V, H, W, C].

    Raises ValueError for a face that names a row that is not there.
    """
    V, H, W, _ = rast.shape
    C = attributes.shape[1]
    at, rows = covered_pixels(rast, faces, table)
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(attributes):
        raise ValueError(
            f"faces name row {int(rows.max())} of {len(attributes)} rows of attributes"
        )
    weights = _weights(rast, at)
    value = weights[:, :1] * attributes[rows[:, 0]]
    for k in (1, 2):
        value.addcmul_(weights[:, k : k + 1], attributes[rows[:, k]])
    out = attributes.new_zeros(V * H * W, C)
    out[at] = value
    return out.view(V, H, W, C)


def interpolate_torch_backward(
    grad: Tensor, attributes: Tensor, rast: Tensor, faces: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the attributes and of rast."""
    C = attributes.shape[1]
    at, rows = covered_pixels(rast, faces, table)
    g = grad.reshape(-1, C)[at]
    corners = _weights(rast, at)[..., None] * g[:, None]  # [M, 3, C]
    total = torch.zeros_like(attributes).index_add_(0, rows.flatten(), corners.view(-1, C))
    last = attributes[rows[:, 2]]
    uv = [(g * (attributes[rows[:, k]] - last)).sum(1) for k in (0, 1)]
    grad_rast = torch.zeros_like(rast).view(-1, 4)
    grad_rast[at, :2] = torch.stack(uv, 1)
    return total, grad_rast.view_as(rast)


def _normal(vertices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two edges of faces [M, 3], their unit normals, and the lengths of the cross products."""
    corner = vertices[rows.T]
    e1 = corner[1] - corner[0]
    e2 = corner[2] - corner[0]
    cross = torch.linalg.cross(e1, e2)
    length = torch.linalg.vector_norm(cross, dim=1, keepdim=True).clamp_(min=LEAST)
    return e1, e2, cross / length, length


def normals_torch(vertices: Tensor, rast: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """The unit normal of every pixel's face, [V, H, W, 3]."""
    V, H, W, _ = rast.shape
    at, rows = covered_pixels(rast, faces, table)
    out = vertices.new_zeros(V * H * W, 3)
    out[at] = _normal(vertices, rows)[2]
    return out.view(V, H, W, 3)


def normals_torch_backward(
    grad: Tensor, vertices: Tensor, rast: Tensor, faces: Tensor, table: Tensor
) -> Tensor:
    """The gradient of the vertices."""
    at, rows = covered_pixels(rast, faces, table)
    e1, e2, normal, length = _normal(vertices, rows)
    g = grad.reshape(-1, 3)[at]
    along = torch.where(length > LEAST, (g * normal).sum(1, keepdim=True), 0)
    g = (g - along * normal) / length
    g1 = torch.linalg.cross(e2, g)
    g2 = torch.linalg.cross(g, e1)
    corners = torch.stack([-(g1 + g2), g1, g2], 1).view(-1, 3)
    return torch.zeros_like(vertices).index_add_(0, rows.flatten(), corners)
