"""Reference of `splat` in plain torch: textbook formulas and autograd."""

import torch

from kernels.camera import Image
from kernels.views import SH0, check_scenes


def splat_reference(
    center, scale, rotation, opacity, sh, starts, camera, view_scene, background, kernel_size=0.1
) -> Image:
    """Compute `splat` one view after another, every pixel with every Gaussian."""
    views = len(camera)
    starts, view_scene = check_scenes(starts, len(center), "Gaussians", view_scene, views)
    color = []
    alpha = []
    for v, s in enumerate(view_scene):
        mine = slice(starts[s], starts[s + 1])
        image, final = _view_reference(
            *(t[mine] for t in (center, scale, rotation, opacity[:, 0], sh[:, 0])),
            camera[v],
            background[v],
            kernel_size,
        )
        color.append(image)
        alpha.append(1 - final)
    shape = (camera.height, camera.width)
    return Image(torch.stack(color).view(-1, 3, *shape), torch.stack(alpha).view(-1, 1, *shape))


def _view_reference(m, s, q, o, sh, camera, background, kernel_size):
    """Return colour [3, H * W] and final transmittance [H * W] of one view.

    The two published rules are marked.
    """
    E = camera.extrinsics[0].to(m.dtype)
    K = camera.intrinsics[0].to(m.dtype)
    W = camera.width
    H = camera.height
    fx = K[0, 0] * W
    fy = K[1, 1] * H
    cx = K[0, 2] * W
    cy = K[1, 2] * H
    x, y, z = (m @ E[:3, :3].T + E[:3, 3]).unbind(1)
    keep = z.detach() > 0.2
    m, s, q, o, sh, x, y, z = (t[keep] for t in (m, s, q, o, sh, x, y, z))

    def clamped(value, focal, centre, size):
        low = (-centre - 0.15 * size) / focal
        high = (size - centre + 0.15 * size) / focal
        t = value / z
        # published rule 1: past the clamp, the gradient of z is that of (value * z.detach()) / z
        return torch.where(
            (t >= low) & (t <= high), t, t.detach().clamp(low, high) * z.detach() / z
        )

    zero = torch.zeros_like(z)
    jx = torch.stack([fx / z, zero, -fx / z * clamped(x, fx, cx, W)], 1)
    jy = torch.stack([zero, fy / z, -fy / z * clamped(y, fy, cy, H)], 1)
    w, i, j, k = q.unbind(1)
    Q = torch.stack(
        [
            1 - 2 * (j * j + k * k),
            2 * (i * j - w * k),
            2 * (i * k + w * j),
            2 * (i * j + w * k),
            1 - 2 * (i * i + k * k),
            2 * (j * k - w * i),
            2 * (i * k - w * j),
            2 * (j * k + w * i),
            1 - 2 * (i * i + j * j),
        ],
        1,
    ).view(-1, 3, 3)
    U = torch.stack([jx, jy], 1) @ E[:3, :3]
    cov = U @ Q @ torch.diag_embed(s * s) @ Q.mT @ U.mT
    a = cov[:, 0, 0]
    b = cov[:, 0, 1]
    c = cov[:, 1, 1]
    A = a + kernel_size
    C = c + kernel_size
    D0 = a * c - b * b
    D1 = A * C - b * b
    rho = torch.where(
        (D0 > 1e-6) & (D1 > 1e-6),
        (D0.clamp(min=1e-6) / (D1.clamp(min=1e-6) + 1e-6) + 1e-6).sqrt(),
        0,
    )
    mx = (fx * x + (cx - W / 2) * z) / (z + 1e-7) + (W - 1) / 2
    my = (fy * y + (cy - H / 2) * z) / (z + 1e-7) + (H - 1) / 2
    mid = ((A + C) / 2).detach()
    radius = torch.ceil(3 * (mid + (mid * mid - D1.detach()).clamp(min=0.1).sqrt()).sqrt()).float()
    left = mx.detach().float() - radius
    top = my.detach().float() - radius

    order = torch.sort(z.detach(), stable=True).indices
    column, row = (
        t.flatten() for t in torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy")
    )
    px = column.to(m.dtype)[:, None]
    py = row.to(m.dtype)[:, None]

    # whether the pixel's tile is in the rectangle: C truncation, clamped to the grid
    def touched(low, pixel, size):
        first = (low / 16).trunc().clamp(0, -(-size // 16))
        last = ((low + 2 * radius + 15) / 16).trunc().clamp(0, -(-size // 16))
        return ((pixel // 16)[:, None] >= first) & ((pixel // 16)[:, None] < last)

    inside = (touched(left, column, W) & touched(top, row, H))[:, order]
    A, b, C, D1, mx, my, strength, sh = (t[order] for t in (A, b, C, D1, mx, my, o * rho, sh))
    dx = mx - px
    dy = my - py
    e = -0.5 * (C * dx * dx + A * dy * dy) / D1 + b * dx * dy / D1
    alpha = strength * e.exp()
    # published rule 2: the clamp passes the gradient
    alpha = alpha - (alpha - 0.99).clamp(min=0).detach()
    alpha = torch.where(inside & (e <= 0) & (alpha >= 1 / 255), alpha, 0)
    through = torch.cumprod(1 - alpha, 1)
    kept = through >= 1e-4
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], 1)
    color = ((alpha * before * kept) @ (SH0 * sh + 0.5).clamp(min=0)).T
    final = torch.where(kept, 1 - alpha, 1).prod(1)
    return color + background.to(m.dtype)[:, None] * final, final
