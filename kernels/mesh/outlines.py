"""Gradients of the mesh's outline by pixels instead of by triangle edges.

Antialiasing moves a silhouette through the edge of the triangle that a pixel shows. So where
triangles are smaller than a pixel, almost no silhouette has a gradient. Here the border between a
covered and an empty pixel moves as the surface in the covered one does, whatever its triangles are:
the border rule of Rasterized Edge Gradients (Pidhorskyi et al., arXiv 2405.02508) where coverage
ends. Where one surface hides another, nothing moves.
"""

import torch
from torch import Tensor

from kernels.mesh.attributes import interpolate_op


def move_outlines(
    picture: Tensor,  # [V, H, W, C]
    rast: Tensor,  # [V, H, W, 4] of `rasterize`
    clip: Tensor,  # [P, 4], as `rasterize` had them
    faces: Tensor,  # [F, 3], as `rasterize` had them
    table: Tensor,  # [V, 4]: clip_table of a MeshLayout
    order: Tensor,  # of `kernels.mesh.pixels_gpu.corner_order`, or empty
) -> Tensor:  # [V, H, W, C]
    """Zeros, with the gradient in `clip` of moving the outlines of the covered pixels.

    A border that moves by s pixels outwards changes both of its pixels by s / 2 (covered - empty),
    so their sum by s times that difference. Internal, without checks. Same inputs, same bits.
    """
    covered = rast[..., 3] > 0
    picture = picture.detach()
    place = interpolate_op(clip, rast.detach(), faces, table, order)
    w = torch.where(covered, place[..., 3], 1.0)
    change = torch.zeros_like(picture)
    for axis, dim in ((0, 2), (1, 1)):  # pixels beside each other, and one above the other
        length = rast.shape[dim]
        if length < 2:
            continue
        screen = place[..., axis] / w * (length / 2)  # pixels
        moved = screen - screen.detach()
        first = covered.narrow(dim, 0, length - 1)
        second = covered.narrow(dim, 1, length - 1)
        outwards = torch.where(first & ~second, moved.narrow(dim, 0, length - 1), 0.0)
        outwards = outwards + torch.where(second & ~first, moved.narrow(dim, 1, length - 1), 0.0)
        # (covered - empty) s outwards: where the second is the covered one, both signs turn
        jump = picture.narrow(dim, 0, length - 1) - picture.narrow(dim, 1, length - 1)
        change = change + _to_both_pixels(0.5 * outwards[..., None] * jump, dim)
    return change


def _to_both_pixels(change: Tensor, dim: int) -> Tensor:
    """Add the change of each pair of neighbours to both of its pixels."""
    edge = torch.zeros_like(change.narrow(dim, 0, 1))
    return torch.cat([change, edge], dim) + torch.cat([edge, change], dim)
