"""Rasterisation by the book: every face with every pixel, in float64 and exact integers."""

import torch
from torch import Tensor


def rasterize_reference(clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """`rasterize` of one view by the book: every face with every pixel, in float64 and exact
    integers, and autograd.
    """
    nearest = torch.full((height, width), torch.inf)
    shown = torch.full((height, width), -1)
    px = torch.arange(width)[None] * 16 + 8 - 8 * width
    py = torch.arange(height)[:, None] * 16 + 8 - 8 * height
    for n, face in enumerate(faces.tolist()):
        polygon = _clip_reference([tuple(c) for c in clip.detach()[face].tolist()])
        screen = [
            (round(x / w * width * 8), round(y / w * height * 8), z / w) for x, y, z, w in polygon
        ]
        for b, c in zip(screen[1:], screen[2:], strict=False):
            corners = [screen[0], b, c]
            twice = (b[0] - corners[0][0]) * (c[1] - corners[0][1]) - (c[0] - corners[0][0]) * (
                b[1] - corners[0][1]
            )
            if twice == 0:
                continue
            if twice < 0:
                corners = [screen[0], c, b]
            covered = torch.ones(height, width, dtype=torch.bool)
            depth = torch.zeros(height, width, dtype=torch.float64)
            for k in range(3):
                ax, ay, _ = corners[(k + 1) % 3]
                bx, by, _ = corners[(k + 2) % 3]
                dx, dy = bx - ax, by - ay
                e = (ax - px) * dy - (ay - py) * dx
                covered &= e >= 0 if dy < 0 or (dy == 0 and dx > 0) else e > 0
                depth += e * corners[k][2] / abs(twice)
            depth = depth.float()  # as the z-buffer has it: equal depths tie
            here = covered & (depth <= nearest)
            nearest, shown = torch.where(here, depth, nearest), torch.where(here, n, shown)
    fx = (2 * torch.arange(width, dtype=torch.float64)[None] + 1) / width - 1
    fy = (2 * torch.arange(height, dtype=torch.float64)[:, None] + 1) / height - 1
    if len(faces) == 0:
        return clip.new_zeros(1, height, width, 4) + 0 * clip.sum()
    x, y, z, w = clip[faces[shown.clamp(min=0)].long()].double().unbind(-1)  # [H, W, 3] each
    x, y = x - fx[..., None] * w, y - fy[..., None] * w
    following, before = [1, 2, 0], [2, 0, 1]
    a = x[..., following] * y[..., before] - y[..., following] * x[..., before]
    total = a.sum(-1, keepdim=True)
    true = (a[..., :2] / total).clamp(0, 1).detach()
    true = true / true.sum(-1, keepdim=True).clamp(min=1)
    # published rule: for the gradient
    uv = a[..., :2] / (total + torch.copysign(torch.full_like(total, 1e-6), total))
    uv = true + uv - uv.detach()
    depth = ((z * a).sum(-1) / (w * a).sum(-1)).clamp(-1, 1).detach()
    rast = torch.cat([uv, depth[..., None], (shown + 1.0)[..., None]], -1)
    return torch.where((shown >= 0)[..., None], rast, 0)[None]


def _clip_reference(polygon: list[tuple]) -> list[tuple]:
    """The part of a polygon of clip positions inside the frustum."""
    for axis in range(3):
        for sign in (1, -1):
            inside = lambda p, axis=axis, sign=sign: p[3] + sign * p[axis]
            kept = []
            for a, b in zip([polygon[-1], *polygon[:-1]] if polygon else [], polygon, strict=True):
                da, db = inside(a), inside(b)
                if da * db < 0:
                    kept.append(
                        tuple(p + da / (da - db) * (q - p) for p, q in zip(a, b, strict=True))
                    )
                if db >= 0:
                    kept.append(b)
            polygon = kept
    return polygon
