"""Gradients of the mesh's outline by pixels instead of by triangle edges.

Antialiasing moves a silhouette through the edge of the very triangle that a pixel shows, so of
triangles smaller than a pixel almost no silhouette has a gradient. Here the border between a
covered and an empty pixel moves as the surface in the covered one does, whatever its triangles are
(the border rule of Rasterized Edge Gradients, Pidhorskyi et al., arXiv
2405.02508, where coverage ends; where one surface hides another, nothing moves).
"""

import torch
from torch import Tensor

from kernels.mesh.interpolate import interpolate


def move_outlines(
    picture: Tensor,  # [V, H, W, C]
    rast: Tensor,  # [V, H, W, 4] of `rasterize`
    clip: Tensor,  # [P, 4], as `rasterize` had them
    faces: Tensor,  # [F, 3], as `rasterize` had them
    table: Tensor | None = None,  # [V, 4]: clip_table of a MeshLayout
    order: Tensor | None = None,  # of `kernels.mesh.pixels_gpu.corner_order`
) -> Tensor:  # [V, H, W, C]
    """Zeros, whose gradient in `clip` is that of the picture when the outlines of its covered
    pixels move.

    A border that moves by s pixels outwards changes both of its pixels by s / 2 (covered - empty),
    so their sum by one pixel's worth. Same inputs, same bits. Errors as `interpolate`.
    """
    covered = rast[..., 3] > 0
    picture = picture.detach()
    place = interpolate(clip, rast.detach(), faces, table, order)
    w = torch.where(covered, place[..., 3], 1.0)
    change = torch.zeros_like(picture)
    for axis, dim in ((0, 2), (1, 1)):  # pixels beside each other, and one above the other
        length = rast.shape[dim]
        if length < 2:
            continue
        screen = place[..., axis] / w * (length / 2)  # pixels
        ahead, behind = ((screen - screen.detach()).narrow(dim, at, length - 1) for at in (0, 1))
        first, second = (covered.narrow(dim, at, length - 1) for at in (0, 1))
        outwards = torch.where(first & ~second, ahead, 0.0) + torch.where(
            second & ~first, behind, 0.0
        )
        # as (covered - empty) s outwards: where the second is the covered one, both signs turn
        jump = picture.narrow(dim, 0, length - 1) - picture.narrow(dim, 1, length - 1)
        change = change + _both(0.5 * outwards[..., None] * jump, dim)
    return change


def _both(change: Tensor, dim: int) -> Tensor:
    """Of every pair, what both of its pixels get."""
    edge = torch.zeros_like(change.narrow(dim, 0, 1))
    return torch.cat([change, edge], dim) + torch.cat([edge, change], dim)


def move_outlines_reference(picture: Tensor, rast: Tensor, clip: Tensor, faces: Tensor) -> Tensor:
    """`move_outlines` of one view by the book: one pair of pixels after another, with autograd."""
    _, H, W, _ = picture.shape
    image = [list(row.unbind(0)) for row in torch.zeros_like(picture[0]).unbind(0)]
    number = rast[0, ..., 3].long()
    for down in (False, True):
        for j in range(H - down):
            for i in range(W - (not down)):
                pair = (j, i), (j + down, i + (not down))
                if (number[pair[0]] > 0) == (number[pair[1]] > 0):
                    continue
                inside, outside = pair if number[pair[0]] > 0 else pair[::-1]
                u, v = rast[0][inside][:2].detach()
                point = torch.stack([u, v, 1 - u - v]) @ clip[faces[number[inside] - 1].long()]
                place = point[int(down)] / point[3] * (H if down else W) / 2
                sign = 1 if inside == pair[0] else -1
                step = (
                    0.5
                    * sign
                    * (place - place.detach())
                    * (picture[0][inside] - picture[0][outside]).detach()
                )
                for y, x in pair:
                    image[y][x] = image[y][x] + step
    return torch.stack([torch.stack(row) for row in image])[None]
