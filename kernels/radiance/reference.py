"""Reference of `raymarch` in plain torch: textbook formulas and autograd."""

import torch

from kernels.camera import Image
from kernels.views import SH0, check_scenes


def raymarch_reference(
    position, trivec, density, sh, starts, camera, view_scene, background, resolution, offset
) -> Image:
    """Compute `raymarch` one view after another, every ray with every voxel."""
    views = len(camera)
    starts, view_scene = check_scenes(starts, len(position), "voxels", view_scene, views)
    images = []
    for v, s in enumerate(view_scene):
        mine = slice(starts[s], starts[s + 1])
        parts = (t[mine] for t in (position, trivec, density, sh[:, :, 0]))
        images.append(_view_reference(*parts, camera[v], background[v], resolution, offset[v]))
    shape = (camera.height, camera.width)
    color, alpha, depth = (torch.stack(t) for t in zip(*images, strict=True))
    return Image(color.view(-1, 3, *shape), alpha.view(-1, 1, *shape), depth.view(-1, 1, *shape))


def _view_reference(position, trivec, density, sh, camera, background, resolution, offset):
    """Return colour [3, rays], alpha [rays] and depth [rays] of one view.

    The published rule is marked.
    """
    exact = trivec.dtype
    n = trivec.shape[3]
    step = 0.5 / n / resolution
    camera = camera.to(exact)
    extrinsics = camera.extrinsics[0]
    o, d = (t[0] for t in camera.rays())
    d = d.reshape(-1, 3)
    shrink = 1 / d.norm(dim=1)
    d = d * shrink[:, None]
    offset = offset.reshape(-1).to(exact)
    low = torch.floor(position.to(exact) * resolution) / resolution - 0.5
    keep = ((low + 0.5 / resolution) @ extrinsics[2, :3] + extrinsics[2, 3]) > 0.2
    inverse = torch.where(d == 0, 1e10, 1 / d)
    # [rays, N, 3]
    a, b = ((low[None] + side - o) * inverse[:, None] for side in (0, 1 / resolution))
    t_in = torch.minimum(a, b).amax(2)
    t_out = torch.maximum(a, b).amin(2)
    first = torch.ceil(t_in / step - offset[:, None])
    last = torch.floor(t_out / step - offset[:, None])
    ray, voxel = ((t_in < t_out) & (first <= last) & keep).nonzero(as_tuple=True)
    count = (last - first + 1)[ray, voxel].long()
    first = first[ray, voxel]
    ray, voxel, first = (t.repeat_interleave(count) for t in (ray, voxel, first))
    t = first + torch.arange(len(ray)) - (count.cumsum(0) - count).repeat_interleave(count)
    t, order = t.sort(stable=True)
    ray, order2 = ray[order].sort(stable=True)
    t = t[order2]
    voxel = voxel[order][order2]
    z = (t + offset[ray]) * step
    q = (o + d[ray] * z[:, None] - low[voxel]) * resolution * n - 0.5  # [samples, 3]
    i = q.trunc().clamp(0, n - 2).long()
    w = (q - i)[:, None, :]
    taps = trivec[voxel]  # [samples, R, 3, n]
    i = i[:, None, :, None].expand(-1, taps.shape[1], -1, 1)
    f = (1 - w) * taps.gather(3, i)[..., 0] + w * taps.gather(3, i + 1)[..., 0]
    e = f.prod(2)
    rho = torch.nn.functional.softplus((density[voxel] * e).sum(1), threshold=10)
    color = torch.sigmoid((SH0 * sh[voxel] * e[..., None]).sum(1))
    alpha = 1 - torch.exp(-rho * step)
    # published rule: past the clamp, the gradient is that of rho with the factor step * (1 - clamp)
    # in fp32, as published: one such sample leaves less than 1e-3
    clamp = torch.tensor(0.999).item()
    alpha = torch.where(alpha > clamp, clamp + (1 - clamp) * step * (rho - rho.detach()), alpha)
    rays = len(d)
    count = torch.bincount(ray, minlength=rays)
    column = torch.arange(len(ray)) - (count.cumsum(0) - count)[ray]
    table = alpha.new_zeros(rays, int(count.max()) + 1 if rays else 1).index_put(
        (ray, column), alpha
    )
    through = torch.cumprod(1 - table, 1)
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], 1)
    kept = before >= 1e-3
    weight = (table * before * kept)[ray, column]
    final = torch.where(kept, 1 - table, 1).prod(1)
    image = background.to(exact) * final[:, None] + torch.zeros_like(d).index_add(
        0, ray, weight[:, None] * color
    )
    return image.T, 1 - final, shrink * torch.zeros_like(offset).index_add(0, ray, weight * z)
