"""The projection of kernels.project for a CPU: the same forms over all P pairs at once, any float dtype, and its backward."""

import torch
from torch import Tensor

from kernels.pairs import TILE, Layout, Projected

NEAR, SH0, EPS, VISIBLE = 0.2, 0.28209479177387814, 1e-6, 1 / 255


class _Pairs:
    """What forward and backward share: every quantity of the docstring of kernels.project, per pair."""

    def __init__(
        self, gaussians: Tensor, cameras: Tensor, layout: Layout, width: int, height: int, kernel_size: float
    ) -> None:
        P = layout.pair_start[-1]
        count = layout.views[:, 1]
        size = cameras.new_tensor([width, height])
        camera = cameras.repeat_interleave(count, 0, output_size=P)
        self.view = torch.arange(len(cameras), device=count.device).repeat_interleave(count, output_size=P)
        seen = [gaussians[layout.starts[s] : layout.starts[s + 1]] for s in layout.view_scene]
        m, self.scale, self.quaternion, opacity, self.sh = torch.cat(seen or [gaussians[:0]]).split([3, 3, 4, 1, 3], -1)
        self.opacity = opacity[:, 0]
        self.r, translation, self.focal, centre = camera[:, :9].view(-1, 3, 3), camera[:, 9:12], camera[:, 12:14], camera[:, 14:]
        self.p = (self.r @ m[..., None])[..., 0] + translation
        in_front = self.p[:, 2] > NEAR
        self.z = torch.where(in_front, self.p[:, 2], 1)
        ratio = self.p[:, :2] / self.z[:, None]
        low, high = -(centre + 0.15 * size) / self.focal, (size - centre + 0.15 * size) / self.focal
        self.ratio, self.free = ratio.clamp(low, high), (ratio >= low) & (ratio <= high)
        self.rotated = self.r @ _rotation(self.quaternion)  # rows o0, o1, o2
        self.rows = (self.focal / self.z[:, None])[..., None] * (
            self.rotated[:, :2] - self.ratio[..., None] * self.rotated[:, 2:]
        )  # [P, 2, 3] of J R Q
        self.n = self.rows * self.scale[:, None]
        n0, n1 = self.n.unbind(1)
        self.cross = torch.linalg.cross(n0, n1)
        self.a, self.b, self.c = (n0 * n0).sum(-1), (n0 * n1).sum(-1), (n1 * n1).sum(-1)
        self.before = (self.cross * self.cross).sum(-1)
        after = self.before + kernel_size * (self.a + self.c) + kernel_size * kernel_size
        self.seen = in_front & (after > 0) & after.isfinite()
        self.after = torch.where(self.seen, after, 1)
        rho = torch.sqrt(self.before / (self.after + EPS) + EPS)
        self.rho = torch.where((self.before > EPS) & (self.after > EPS), rho, 0)
        self.A, self.C = self.a + kernel_size, self.c + kernel_size
        self.conic = torch.stack([self.C, -self.b, self.A], -1) / self.after[:, None]
        self.lens = 1 / (self.z + 1e-7)
        self.offset = centre - 0.5 * size
        self.numerator = self.focal * self.p[:, :2] + self.offset * self.z[:, None]
        self.mean = self.numerator * self.lens[:, None] + 0.5 * (size - 1)


def _rotation(q: Tensor) -> Tensor:
    """[P, 4] (w, x, y, z), not normalised -> [P, 3, 3]."""
    w, x, y, z = q.unbind(-1)
    entries = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(entries, -1).view(-1, 3, 3)


def _rotation_backward(q: Tensor, h: Tensor) -> Tensor:
    """The gradient of the quaternion, of the gradient h [P, 3, 3] of its matrix."""
    w, x, y, z = q.unbind(-1)
    sums, differences = h + h.mT, h - h.mT
    d = torch.stack([differences[:, 2, 1], differences[:, 0, 2], differences[:, 1, 0]], -1)
    xy, xz, yz = sums[:, 0, 1], sums[:, 0, 2], sums[:, 1, 2]
    xx, yy, zz = h.diagonal(dim1=1, dim2=2).unbind(-1)
    entries = [
        x * d[:, 0] + y * d[:, 1] + z * d[:, 2],
        y * xy + z * xz + w * d[:, 0] - 2 * x * (yy + zz),
        x * xy + z * yz + w * d[:, 1] - 2 * y * (xx + zz),
        x * xz + y * yz + w * d[:, 2] - 2 * z * (xx + yy),
    ]
    return 2 * torch.stack(entries, -1)


def project_torch(
    gaussians: Tensor, cameras: Tensor, layout: Layout, width: int, height: int, kernel_size: float
) -> Projected:
    """As kernels.project.project."""
    pairs = _Pairs(gaussians, cameras, layout, width, height, kernel_size)
    opacity = pairs.opacity * pairs.rho
    half = 0.5 * (pairs.A - pairs.C)
    largest = 0.5 * (pairs.A + pairs.C) + torch.sqrt((half * half + pairs.b * pairs.b).clamp(min=0.1))
    radius = torch.ceil(3 * torch.sqrt(largest))[:, None]
    # no pixel farther than `reach` has alpha >= 1/255
    fading = 2 * torch.log((opacity * 255).clamp(min=1))
    reach = 1.001 * torch.sqrt(fading[:, None] * torch.stack([pairs.A, pairs.C], -1)) + 0.01
    most = torch.tensor([-(-width // TILE), -(-height // TILE)])
    low = torch.maximum((pairs.mean - radius) / TILE, torch.floor((pairs.mean - reach) / TILE)).clamp(min=0)
    high = torch.minimum((pairs.mean + radius + TILE - 1) / TILE, torch.floor((pairs.mean + reach) / TILE) + 1).clamp(min=0)
    rect = torch.cat([torch.minimum(low, most), torch.minimum(high, most)], -1)
    drawn = pairs.seen & (opacity >= VISIBLE)
    rect = torch.where(drawn[:, None], rect, 0).int()
    rect = torch.where((rect[:, 2:] > rect[:, :2]).all(-1, keepdim=True), rect, 0)
    color = (SH0 * pairs.sh + 0.5).clamp(min=0)
    record = torch.cat([pairs.mean, pairs.conic, opacity[:, None], color], -1)
    return Projected(record, pairs.p[:, 2], rect, pairs.view)


def project_torch_backward(
    gaussians: Tensor, cameras: Tensor, layout: Layout, width: int, height: int, kernel_size: float,
    rect: Tensor,  # [P, 4]
    g_mean: Tensor,  # [P, 2]
    g_conic: Tensor,  # [P, 3]
    g_opacity: Tensor,  # [P], of the blended one
    g_color: Tensor,  # [P, 3]
) -> Tensor:  # fmt: skip
    """The gradient of the Gaussians [G, 14]."""
    t = _Pairs(gaussians, cameras, layout, width, height, kernel_size)
    g_rho2 = g_opacity * t.opacity * 0.5 / torch.where(t.rho > 0, t.rho, 1)
    g_after = -(g_conic * t.conic).sum(-1) / t.after - g_rho2 * t.before / (t.after + EPS) ** 2
    g_before = g_after + g_rho2 / (t.after + EPS)
    ga = g_conic[:, 2] / t.after + kernel_size * g_after
    gc = g_conic[:, 0] / t.after + kernel_size * g_after
    gb = -g_conic[:, 1] / t.after
    n0, n1 = t.n.unbind(1)
    square = torch.stack([torch.linalg.cross(n1, t.cross), torch.linalg.cross(t.cross, n0)], 1)
    g = torch.stack([ga, gc], -1)[..., None] * 2 * t.n + gb[:, None, None] * t.n.flip(1) + 2 * g_before[:, None, None] * square
    g_scale = (g * t.rows).sum(1)
    g = g * t.scale[:, None]  # of the rows of J R Q
    f = t.focal / t.z[:, None]
    g_ratio = -f * (g * t.rotated[:, 2:]).sum(-1)
    g_z = -((g * t.rows).sum((1, 2)) + (g_ratio * t.ratio).sum(-1)) / t.z  # the published rule: clamped or not
    g_rows = f[..., None] * g
    g_rotated = torch.cat([g_rows, -(t.ratio[..., None] * g_rows).sum(1, keepdim=True)], 1)
    g_quaternion = _rotation_backward(t.quaternion, t.r.mT @ g_rotated)
    g_mean = g_mean * t.lens[:, None]
    g_z = g_z + (g_mean * (t.offset - t.numerator * t.lens[:, None])).sum(-1)
    g_xy = torch.where(t.free, g_ratio / t.z[:, None], 0) + g_mean * t.focal
    g_center = (t.r.mT @ torch.cat([g_xy, g_z[:, None]], -1)[..., None])[..., 0]
    g_sh = torch.where(SH0 * t.sh + 0.5 >= 0, SH0 * g_color, 0)
    per_pair = torch.cat([g_center, g_scale, g_quaternion, (g_opacity * t.rho)[:, None], g_sh], -1)
    per_pair = torch.where((rect[:, 2] > rect[:, 0])[:, None], per_pair, 0)
    grad = torch.zeros_like(gaussians)
    for v, s in enumerate(layout.view_scene):
        grad[layout.starts[s] : layout.starts[s + 1]] += per_pair[layout.pair_start[v] : layout.pair_start[v + 1]]
    return grad
