"""Projection of Gaussians on a CPU, and its backward, for any float dtype.

The formulas are as in kernels.gaussian.project, over all P pairs at once. Pairs are the last
dimension throughout: [3, P] planes, and products of 3 x 3 matrices as sums of planes. Batches of P
small matrices, or sums over a last dimension of 3, take five times as long.
"""

import torch
from torch import Tensor

from kernels.gaussian.records import TILE, Projected
from kernels.views import SH0, ViewTable

NEAR = 0.2
EPS = 1e-6
VISIBLE = 1 / 255


class _Pairs:
    """Every quantity of the formulas in kernels.gaussian.project, for all pairs.

    Forward and backward share it.
    """

    def __init__(
        self,
        gaussians: Tensor,
        cameras: Tensor,
        table: ViewTable,
        width: int,
        height: int,
        kernel_size: float,
    ) -> None:
        size = cameras.new_tensor([[width], [height]])
        self.view = torch.arange(len(cameras)).repeat_interleave(
            table.views[:, 1], output_size=table.pair_start[-1]
        )
        camera = cameras.t().contiguous().index_select(1, self.view)
        planes = gaussians.t().contiguous()
        planes = torch.cat(
            [
                planes[:, :0],
                *(planes[:, table.starts[s] : table.starts[s + 1]] for s in table.view_scene),
            ],
            1,
        )
        m, self.scale, self.quaternion, (self.opacity,), self.sh = planes.split([3, 3, 4, 1, 3])
        self.r = camera[:9].view(3, 3, -1)
        translation = camera[9:12]
        self.focal = camera[12:14]
        centre = camera[14:]
        self.p = _product(self.r, m[:, None])[:, 0] + translation
        in_front = self.p[2] > NEAR
        self.z = torch.where(in_front, self.p[2], 1)
        ratio = self.p[:2] / self.z
        low = -(centre + 0.15 * size) / self.focal
        high = (size - centre + 0.15 * size) / self.focal
        self.ratio = ratio.clamp(low, high)
        self.free = (ratio >= low) & (ratio <= high)
        self.rotated = _product(self.r, _rotation(self.quaternion))  # rows o0, o1, o2
        # J R Q
        self.rows = (self.focal / self.z)[:, None] * (
            self.rotated[:2] - self.ratio[:, None] * self.rotated[2]
        )
        self.n = self.rows * self.scale  # [2, 3, P]
        n0, n1 = self.n
        self.cross = _cross(n0, n1)
        self.a = (n0 * n0).sum(0)
        self.b = (n0 * n1).sum(0)
        self.c = (n1 * n1).sum(0)
        self.before = (self.cross * self.cross).sum(0)
        after = self.before + kernel_size * (self.a + self.c) + kernel_size * kernel_size
        self.seen = in_front & (after > 0) & after.isfinite()
        self.after = torch.where(self.seen, after, 1)
        rho = torch.sqrt(self.before / (self.after + EPS) + EPS)
        self.rho = torch.where((self.before > EPS) & (self.after > EPS), rho, 0)
        self.A = self.a + kernel_size
        self.C = self.c + kernel_size
        self.conic = torch.stack([self.C, -self.b, self.A]) / self.after
        self.lens = 1 / (self.z + 1e-7)
        self.offset = centre - 0.5 * size
        self.numerator = self.focal * self.p[:2] + self.offset * self.z
        self.mean = self.numerator * self.lens + 0.5 * (size - 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices [m, k, P] x [k, n, P] -> [m, n, P]."""
    total = a[:, 0, None] * b[0]
    for k in range(1, len(b)):
        total.addcmul_(a[:, k, None], b[k])
    return total


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """Return the cross product [3, P] of planes [3, P]."""
    a0, a1, a2 = a
    b0, b1, b2 = b
    return torch.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0])


def _rotation(q: Tensor) -> Tensor:
    """Return the matrix [3, 3, P] of quaternions [4, P] (w, x, y, z), not normalised."""
    w, x, y, z = q
    entries = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(entries).view(3, 3, -1)


def _rotation_backward(q: Tensor, h: Tensor) -> Tensor:
    """Return the gradient of a quaternion, of the gradient h [3, 3, P] of its matrix."""
    w, x, y, z = q
    (xx, h01, h02), (h10, yy, h12), (h20, h21, zz) = h
    xy = h01 + h10
    xz = h02 + h20
    yz = h12 + h21
    dx = h21 - h12
    dy = h02 - h20
    dz = h10 - h01
    entries = [
        x * dx + y * dy + z * dz,
        y * xy + z * xz + w * dx - 2 * x * (yy + zz),
        x * xy + z * yz + w * dy - 2 * y * (xx + zz),
        x * xz + y * yz + w * dz - 2 * z * (xx + yy),
    ]
    return 2 * torch.stack(entries)


def project_torch(
    gaussians: Tensor,
    cameras: Tensor,
    table: ViewTable,
    width: int,
    height: int,
    kernel_size: float,
) -> Projected:
    """Project all pairs, as kernels.gaussian.project.project does."""
    pairs = _Pairs(gaussians, cameras, table, width, height, kernel_size)
    opacity = pairs.opacity * pairs.rho
    half = 0.5 * (pairs.A - pairs.C)
    largest = 0.5 * (pairs.A + pairs.C) + torch.sqrt(
        (half * half + pairs.b * pairs.b).clamp(min=0.1)
    )
    radius = torch.ceil(3 * torch.sqrt(largest))
    # no pixel farther than `reach` has alpha >= 1/255
    fading = 2 * torch.log((opacity * 255).clamp(min=1))
    reach = 1.001 * torch.sqrt(fading * torch.stack([pairs.A, pairs.C])) + 0.01
    most = torch.tensor([[-(-width // TILE)], [-(-height // TILE)]])
    low = torch.maximum(
        (pairs.mean - radius) / TILE, torch.floor((pairs.mean - reach) / TILE)
    ).clamp(min=0)
    high = torch.minimum(
        (pairs.mean + radius + TILE - 1) / TILE, torch.floor((pairs.mean + reach) / TILE) + 1
    ).clamp(min=0)
    rect = torch.cat([torch.minimum(low, most), torch.minimum(high, most)])
    drawn = pairs.seen & (opacity >= VISIBLE) & pairs.sh.isfinite().all(0)
    rect = torch.where(drawn, rect, 0).int()
    rect = torch.where((rect[2:] > rect[:2]).all(0), rect, 0).t().contiguous()
    color = (SH0 * pairs.sh + 0.5).clamp(min=0)
    record = torch.cat([pairs.mean, pairs.conic, opacity[None], color]).t()  # planes, as all here
    return Projected(record, pairs.p[2], rect, pairs.view)


def project_torch_backward(
    gaussians: Tensor,
    cameras: Tensor,
    table: ViewTable,
    width: int,
    height: int,
    kernel_size: float,
    rect: Tensor,  # [P, 4]
    g_mean: Tensor,  # [P, 2]
    g_conic: Tensor,  # [P, 3]
    g_opacity: Tensor,  # [P], of the blended one
    g_color: Tensor,  # [P, 3]
) -> Tensor:
    """Return the gradient of the Gaussians [G, 14]."""
    t = _Pairs(gaussians, cameras, table, width, height, kernel_size)
    g_mean, g_conic, g_color = (g.t().contiguous() for g in (g_mean, g_conic, g_color))
    g_rho2 = g_opacity * t.opacity * 0.5 / torch.where(t.rho > 0, t.rho, 1)
    g_after = -(g_conic * t.conic).sum(0) / t.after - g_rho2 * t.before / (t.after + EPS) ** 2
    g_before = g_after + g_rho2 / (t.after + EPS)
    ga = g_conic[2] / t.after + kernel_size * g_after
    gc = g_conic[0] / t.after + kernel_size * g_after
    gb = -g_conic[1] / t.after
    n0, n1 = t.n
    square = torch.stack([_cross(n1, t.cross), _cross(t.cross, n0)])
    g = torch.stack([ga, gc])[:, None] * 2 * t.n + gb * t.n.flip(0) + 2 * g_before * square
    g_scale = (g * t.rows).sum(0)
    g = g * t.scale  # of the rows of J R Q
    f = t.focal / t.z
    g_ratio = -f * (g * t.rotated[2]).sum(1)
    # the published rule: clamped or not
    g_z = -((g * t.rows).sum((0, 1)) + (g_ratio * t.ratio).sum(0)) / t.z
    g_rows = f[:, None] * g
    g_rotated = torch.cat([g_rows, -(t.ratio[:, None] * g_rows).sum(0, keepdim=True)])
    back = t.r.transpose(0, 1)
    g_quaternion = _rotation_backward(t.quaternion, _product(back, g_rotated))
    g_mean = g_mean * t.lens
    g_z = g_z + (g_mean * (t.offset - t.numerator * t.lens)).sum(0)
    g_xy = torch.where(t.free, g_ratio / t.z, 0) + g_mean * t.focal
    g_center = _product(back, torch.cat([g_xy, g_z[None]])[:, None])[:, 0]
    g_sh = torch.where(SH0 * t.sh + 0.5 >= 0, SH0 * g_color, 0)
    per_pair = torch.cat([g_center, g_scale, g_quaternion, (g_opacity * t.rho)[None], g_sh])
    per_pair = torch.where(rect[:, 2] > rect[:, 0], per_pair, 0)
    grad = gaussians.new_zeros(gaussians.shape[::-1])
    for v, s in enumerate(table.view_scene):
        grad[:, table.starts[s] : table.starts[s + 1]] += per_pair[
            :, table.pair_start[v] : table.pair_start[v + 1]
        ]
    return grad.t().contiguous()
