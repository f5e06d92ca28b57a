"""Antialiasing of silhouettes on a CPU: only the pairs of pixels whose faces differ.

The method is described in kernels.mesh.antialias, alpha and code in kernels.mesh.antialias_gpu.
"""

import torch
from torch import Tensor

MARGIN = 0.0625  # how far beyond the two centres an edge may cross the line between them
STEEP = 1e-3  # added to the magnitude of dy where its inverse is differentiated


def _screen(clip: Tensor, row: Tensor, centre: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of clip rows [..., K], in pixels from the centres [2, K]."""
    position = clip[row]
    xy = position[..., :2] / position[..., 3:] * half
    return xy[..., 0] - centre[0], xy[..., 1] - centre[1]


def _area(x: list[Tensor], y: list[Tensor]) -> Tensor:
    return (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])


def _origin(at: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Pixel centres, counted from the middle of the picture: [2, K]."""
    x = at % width
    y = torch.div(at, width, rounding_mode="floor") % height
    return torch.stack([x.to(dtype) + 0.5 - width / 2, y.to(dtype) + 0.5 - height / 2])


def find_pairs(
    rast: Tensor, clip: Tensor, faces: Tensor, table: Tensor, opposite: Tensor
) -> tuple[Tensor, Tensor]:
    """Find alpha and code of all pairs, [2, V, H, W] each."""
    V, H, W, _ = rast.shape
    number = rast[..., 3].reshape(-1)
    depth = rast[..., 2].reshape(-1)
    alphas = clip.new_zeros(2, V * H * W)
    codes = torch.zeros(2, V * H * W, dtype=torch.int8, device=clip.device)
    half = clip.new_tensor([W / 2, H / 2])
    for d in (0, 1):
        grid = rast[..., 3]
        if d == 0:
            differs = torch.nn.functional.pad(grid[:, :, 1:] != grid[:, :, :-1], (0, 1))
        else:
            differs = torch.nn.functional.pad(grid[:, 1:] != grid[:, :-1], (0, 0, 0, 1))
        first = differs.reshape(-1).nonzero()[:, 0]
        other = first + (W if d else 1)
        f0 = number[first]
        f1 = number[other]
        # the second pixel's face is the nearer one
        second = (f0 == 0) | ((f1 != 0) & (depth[other] <= depth[first]))
        ds = torch.where(second, -1.0, 1.0).to(clip.dtype)
        view = table[torch.div(first, H * W, rounding_mode="floor")]
        face = view[:, 0] + torch.where(second, f1, f0).long() - 1
        centre = _origin(torch.where(second, other, first), H, W, clip.dtype)
        x, y = _screen(clip, (faces[face].long() + view[:, 2:3]).T, centre, half)  # [3, K]
        across = opposite[face].T
        ox, oy = _screen(clip, across.clamp(min=0) + view[:, 2], centre, half)
        turn = _area(list(x), list(y)).signbit()
        folds = []
        for k in range(3):
            folded_x = [ox[k] if k == c else x[c] for c in range(3)]
            folded_y = [oy[k] if k == c else y[c] for c in range(3)]
            # an open edge, or both faces on one side
            folds.append((across[k] < 0) | (_area(folded_x, folded_y).signbit() == turn))
        if d:
            x, y = y, x  # along and across the line to the neighbour
        dx = x[[2, 0, 1]] - x[[1, 2, 0]]
        dy = y[[2, 0, 1]] - y[[1, 2, 0]]
        r = ds * (x[[1, 2, 0]] * dy - y[[1, 2, 0]] * dx) / dy
        crosses = (y[[1, 2, 0]].signbit() != y[[2, 0, 1]].signbit()) & (dy != 0)
        r = torch.where(crosses, r, torch.finfo(torch.float32).min)
        m = torch.where((r[2] > r[0]) & (r[2] > r[1]), 2, torch.where(r[1] > r[0], 1, 0))[None]
        pick = lambda value, m=m: value.gather(0, m)[0]
        r = pick(r)
        dx = pick(dx)
        dy = pick(dy)
        fold = pick(torch.stack(folds))
        alpha = ds * (0.5 - r.clamp(0, 1))
        hit = fold & (dy.abs() >= dx.abs())
        hit &= (r > -MARGIN) & (r < 1 + MARGIN)
        hit &= (alpha != 0) | alpha.signbit()
        alphas[d, first[hit]] = alpha[hit]
        codes[d, first[hit]] = (1 + m[0] + 3 * second)[hit].to(torch.int8)
    return alphas.view(2, V, H, W), codes.view(2, V, H, W)


def antialias_torch(
    image: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, table: Tensor, opposite: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Blend the image [V, H, W, C]; also returns alpha and code of the pairs, [2, V, H, W]."""
    alpha, code = find_pairs(rast, clip, faces, table, opposite)
    flat = image.reshape(-1, image.shape[-1])
    out = flat.clone()
    for d, step in ((0, 1), (1, image.shape[2])):
        first = code[d].view(-1).nonzero()[:, 0]
        a = alpha[d].view(-1)[first]
        blended = torch.where(a > 0, first, first + step)
        out.index_add_(0, blended, a[:, None] * (flat[first + step] - flat[first]))
    return out.view_as(image), alpha, code


def antialias_torch_backward(
    grad: Tensor,
    image: Tensor,
    alpha: Tensor,
    code: Tensor,
    rast: Tensor,
    clip: Tensor,
    faces: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the image [V, H, W, C] and of the clip positions [P, 4]."""
    V, H, W, C = image.shape
    flat = image.reshape(-1, C)
    g = grad.reshape(-1, C)
    number = rast[..., 3].reshape(-1)
    grad_image = g.clone()
    grad_clip = torch.zeros_like(clip)
    half = clip.new_tensor([W / 2, H / 2])
    for d, step in ((0, 1), (1, W)):
        first = code[d].view(-1).nonzero()[:, 0]
        a = alpha[d].view(-1)[first]
        c = code[d].view(-1)[first].long() - 1
        other = first + step
        y = g[torch.where(a > 0, first, other)]
        grad_image.index_add_(0, first, -a[:, None] * y).index_add_(0, other, a[:, None] * y)
        delta = (y * (flat[other] - flat[first])).sum(1)
        moves = (a.abs() < 0.5).nonzero()[:, 0]
        first = first[moves]
        other = other[moves]
        c = c[moves]
        delta = delta[moves]
        near = torch.where(c >= 3, other, first)
        view = table[torch.div(near, H * W, rounding_mode="floor")]
        rows = faces[view[:, 0] + number[near].long() - 1].long() + view[:, 2:3]
        edge = torch.stack([(c + 1) % 3, (c + 2) % 3])  # it runs from P to Q
        row = rows.T.gather(0, edge)
        sx, sy = _screen(clip, row, _origin(near, H, W, clip.dtype), half)
        hx, hy = half.tolist()
        if d:
            sx, sy, hx, hy = sy, sx, hy, hx
        px, qx = sx
        py, qy = sy
        dx = qx - px
        dy = qy - py
        inverse = 1 / (dy + torch.copysign(torch.full_like(dy, STEEP), dy))
        at = (px * dy - py * dx) * inverse
        x, y, _, w = clip[row].unbind(-1)
        scale = delta * inverse / w
        gx = hx * torch.stack([-qy, py]) * scale
        gy = hy * torch.stack([qx - at, at - px]) * scale
        if d:
            gx, gy = gy, gx
        gradient = torch.stack([gx, gy, torch.zeros_like(gx), -(x * gx + y * gy) / w], -1)
        grad_clip.index_add_(0, row.flatten(), gradient.view(-1, 4))
    return grad_image.view_as(image), grad_clip
