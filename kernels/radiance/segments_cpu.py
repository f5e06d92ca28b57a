"""Segments of rays inside voxels on a CPU, for any float dtype.

The segments and their order are as in kernels.radiance.segments. Boxes are tested in parts that fit
in the cache.
"""

import torch
from torch import Tensor

from kernels.radiance.rays import RaySegments, by_ray
from kernels.views import ViewTable

NEAR = 0.2
MARGIN = 0.05
CLIP = 1e-3
TESTS = 16384  # pixels of boxes tested at once


def _directions(cameras: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return unit directions of all rays [3, V H W] and the depth of one unit along them [V H W].

    Directions are in world axes, depths in camera axes.
    """
    focal = cameras[:, 12:14, None]
    middle = cameras[:, 14:16, None]
    u = (torch.arange(width).to(cameras) + 0.5 - middle[:, 0]) / focal[:, 0]  # [V, W]
    v = (torch.arange(height).to(cameras) + 0.5 - middle[:, 1]) / focal[:, 1]
    u = u[:, None, :]
    v = v[:, :, None]
    r = cameras[:, :9].view(-1, 3, 3)[..., None, None]
    # [3, V, H, W]
    d = torch.stack([u * r[:, 0, a] + v * r[:, 1, a] + r[:, 2, a] for a in range(3)])
    shrink = 1 / torch.sqrt((d * d).sum(0))
    return d.mul_(shrink).view(3, -1), shrink.view(-1)


def _corners(position: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest corner of every voxel [3, N].

    Neighbours agree on their faces to the bit.
    """
    cell = torch.floor(position.t() * resolution)
    return cell / resolution - 0.5, (cell + 1) / resolution - 0.5


def _rectangles(
    camera: Tensor, low: Tensor, high: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return the pixels [4, N] that one view [16] tries for each voxel, and their number [N].

    The pixels are x0, y0, x1, y1 with an exclusive end.
    """
    rotation = camera[:9].view(3, 3)
    center = camera[9:12, None]
    # [8, 3, N]
    at = torch.stack(
        [torch.stack([(high if i >> a & 1 else low)[a] for a in range(3)]) for i in range(8)]
    )
    local = rotation @ (at - center)
    nearest = local[:, 2].amin(0)
    z = local[:, 2:].clamp(min=CLIP)
    pixel = local[:, :2] / z * camera[12:14, None] + camera[14:16, None]
    size = torch.tensor([[width], [height]])
    a = torch.minimum((pixel.amin(0) - 0.5 - MARGIN).ceil_().clamp_(min=0), size)
    b = torch.minimum((pixel.amax(0) + 0.5 + MARGIN).floor_().clamp_(min=0), size)
    whole = nearest <= CLIP
    a = torch.where(whole, 0, a).long()
    b = torch.where(whole, size, b).long()
    seen = (rotation[2] @ ((low + high) / 2 - center)) > NEAR
    return torch.cat([a, b]), (b - a).clamp_(min=0).prod(0) * seen


def find_segments_torch(
    position: Tensor,  # [N, 3] in [0, 1]
    cameras: Tensor,  # [V, 16]
    offset: Tensor,  # [V, H, W]
    table: ViewTable,
    resolution: int,
    dim: int,
) -> RaySegments:
    """Return the segments of all views, as kernels.radiance.segments.find_segments does."""
    V, H, W = offset.shape
    per_unit = 2 * dim * resolution
    scale = dim * resolution
    low, high = _corners(position, resolution)
    direction, shrink = _directions(cameras, H, W)
    inverse = torch.where(direction == 0, 1e10, 1 / direction)
    offset = offset.view(-1)
    found: list[tuple[Tensor, ...]] = []
    counts = []
    for v, s in enumerate(table.view_scene):
        begin = table.starts[s]
        end = table.starts[s + 1]
        # distances in samples: (plane - centre) * per_unit / d
        near = low[:, begin:end] - cameras[v, 9:12, None]
        far = high[:, begin:end] - cameras[v, 9:12, None]
        rect, area = _rectangles(cameras[v], low[:, begin:end], high[:, begin:end], H, W)
        ends = area.cumsum(0)
        hits = []
        a = 0
        done = 0
        while a < end - begin and done < int(ends[-1]):
            b = max(a + 1, int(torch.searchsorted(ends, done + TESTS, right=True)))
            total = int(ends[b - 1]) - done
            # the voxel of each test, from a on
            n = torch.repeat_interleave(area[a:b], output_size=total)
            k = torch.arange(total) - (ends[a:b] - area[a:b] - done)[n]
            x0, y0, x1, _ = rect[:, a:b]
            across = (x1 - x0)[n]
            row = torch.div(k, across, rounding_mode="floor")
            ray = (y0[n] + row + v * H) * W + x0[n] + k - row * across
            entries = []
            exits = []
            for axis in range(3):
                step = inverse[axis].index_select(0, ray)
                p = near[axis, a:b].index_select(0, n).mul_(step)
                q = far[axis, a:b].index_select(0, n).mul_(step)
                entries.append(torch.minimum(p, q))
                exits.append(torch.maximum(p, q))
            t_in = torch.maximum(torch.maximum(entries[0], entries[1]), entries[2])
            t_out = torch.minimum(torch.minimum(exits[0], exits[1]), exits[2])
            xi = offset.index_select(0, ray)
            first = (t_in * per_unit).sub_(xi).ceil_()
            last = (t_out * per_unit).sub_(xi).floor_()
            hit = ((t_in < t_out) & (first <= last)).nonzero()[:, 0]
            n = n[hit]
            ray = ray[hit]
            first = first[hit]
            last = last[hit]
            xi = xi[hit]
            d = direction.index_select(1, ray)
            shorter = shrink.index_select(0, ray)
            z = xi.add_(first).div_(per_unit)
            q = torch.addcmul(near[:, a:b].index_select(1, n).neg_(), d, z).mul_(scale).sub_(0.5)
            path = torch.cat(
                [q, (z * shorter)[None], d.mul_(0.5), shorter.div_(per_unit)[None]]
            ).t()
            key = (ray << 32) + first.long()
            hits.append((key, (last - first + 1).int(), (n + (a + begin)).int(), path))
            a = b
            done = int(ends[b - 1])
        found += hits
        owners = torch.cat([h[2] for h in hits]) - begin if hits else area[:0]
        counts.append(torch.bincount(owners, minlength=end - begin))
    none = torch.zeros(0, dtype=torch.int64)
    found.append((none, none.int(), none.int(), offset.new_zeros(0, 8)))
    key, samples, voxel, path = (torch.cat(parts) for parts in zip(*found, strict=True))
    start = torch.nn.functional.pad(torch.cat([none, *counts]).cumsum(0), (1, 0))
    ray = ((key + 2**31) >> 32).int()
    facts = torch.stack([voxel, samples], 1)
    return RaySegments(ray, facts, path, start, *by_ray(key, V * H * W))
