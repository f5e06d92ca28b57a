"""Clipping of faces by the frustum, in plain torch, for the kernels and the torch path alike."""

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 16  # positions of a snapped vertex per pixel
EMPTY = torch.iinfo(torch.int64).max  # key of a pixel that no face covers
NOWHERE = 64  # outcode of a position that is not finite; its faces are not drawn


class Pieces(NamedTuple):
    """Triangles inside the frustum, in snapped coordinates."""

    xy: Tensor  # [R, 6] int32
    depth: Tensor  # [R, 3]
    view: Tensor  # [R] int64
    face: Tensor  # [R] int64, counted from the first face of the view


def on_grid(ndc: Tensor, height: int, width: int) -> Tensor:
    """Snap positions [..., 2] in NDC to the grid of 1/16 px, counted from the picture's middle.

    Rounds to even. Overwrites its argument.
    """
    ndc[..., 0] *= STEPS // 2 * width
    # one after the other: a tensor of both would be copied to the device, which waits
    ndc[..., 1] *= STEPS // 2 * height
    return ndc.round_()


def clip_faces(
    corners: Tensor, xy: Tensor, depth: Tensor, view: Tensor, face: Tensor, height: int, width: int
) -> Pieces:
    """Clip faces [n, 3, 4] that reach out of the frustum into up to 7 pieces each.

    The algorithm is that of Sutherland and Hodgman (1974). `xy` [n, 3, 2] and `depth` [n, 3] are
    the snapped corners. Corners inside keep these, as in their other faces. A new vertex is
    computed from the inner end of its edge, so that both faces of an edge get the same one. Always
    returns 7 n rows, so that the host need not wait; unused ones have no area.
    """
    n = len(corners)
    polygon = corners.new_zeros(n, 9, 4)
    polygon[:, :3] = corners
    origin = torch.full((n, 9), -1, device=corners.device)  # which corner a vertex is
    origin[:, :3] = torch.arange(3, device=corners.device)
    count = torch.full((n, 1), 3, device=corners.device)
    slot = torch.arange(9, device=corners.device)
    for axis in range(3):
        for sign in (1, -1):
            distance = polygon[..., 3] + sign * polygon[..., axis]
            # the neighbour that comes first
            before = torch.where(slot == 0, count - 1, slot - 1).clamp_(min=0)
            last = distance.gather(1, before)
            previous = polygon.gather(1, before[..., None].expand(-1, -1, 4))
            live = slot < count
            crosses = live & (distance * last < 0)
            stays = live & (distance >= 0)
            inner = torch.maximum(distance, last)
            outer = torch.minimum(distance, last)
            entering = (distance > last)[..., None]
            start = torch.where(entering, polygon, previous)
            end = torch.where(entering, previous, polygon)
            share = torch.where(crosses, inner / torch.where(crosses, inner - outer, 1), 0)
            cut = start + share[..., None] * (end - start)
            emitted = crosses.int() + stays.int()
            at = emitted.cumsum(1) - emitted
            # the last entry takes what is dropped
            new = polygon.new_zeros(n, 10, 4)
            old = origin.new_full((n, 10), -1)
            for take, place, vertex, name in (
                (crosses, at, cut, torch.full_like(origin, -1)),
                (stays, at + crosses, polygon, origin),
            ):
                place = torch.where(take, place, 9).clamp_(max=9)
                new.scatter_(1, place[..., None].expand(-1, -1, 4), vertex)
                old.scatter_(1, place, name)
            polygon = new[:, :9]
            origin = old[:, :9]
            count = emitted.sum(1, keepdim=True).clamp_(max=9)

    scale = 1 / torch.where(polygon[..., 3] > 0, polygon[..., 3], 1)
    cut = on_grid(polygon[..., :2] * scale[..., None], height, width).int()
    for axis, size in enumerate((width, height)):
        cut[..., axis].clamp_(-STEPS // 2 * size, STEPS // 2 * size)
    known = origin >= 0
    corner = origin.clamp(min=0)
    cut = torch.where(known[..., None], xy.gather(1, corner[..., None].expand(-1, -1, 2)), cut)
    z = torch.where(known, depth.gather(1, corner), polygon[..., 2] * scale)
    fan = [torch.zeros(7, dtype=torch.int64, device=z.device), slot[1:8], slot[2:9]]
    there = slot[2:9] < count
    # [n, 7, 3, 2]
    pieces = torch.stack([torch.where(there[..., None], cut[:, f], 0) for f in fan], 2)
    z = torch.stack([z[:, f] for f in fan], 2)
    return Pieces(
        pieces.reshape(-1, 6),
        z.reshape(-1, 3),
        view.repeat_interleave(7, output_size=7 * n),
        face.repeat_interleave(7, output_size=7 * n),
    )
