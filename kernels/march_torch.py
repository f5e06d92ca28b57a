"""The radiance field on a CPU, any float dtype: the formulas of kernels.march in matrix products, and their backward.

Samples are evaluated voxel by voxel: at the samples of one voxel the interpolation is a product of the weights [samples, n]
with its taps [n, rank], and the backward is the transposed product. Segments are taken in groups of one voxel, and groups
with about as many samples form a part, a batch of matrices of one size that stays in the cache (glibc gives large temporaries
back to the system and faults them in again). Voxels come in round after round: round j is the j-th segment of every ray
that is still alive, so what is hidden is never evaluated. Sums along a segment are differences of float64 running sums.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.march_segments import Segments
from kernels.march_segments_torch import directions

STOP = 1e-3
CLAMP = 6.907768153436  # optical depth of alpha = 0.999 in fp32, behind which a transmittance of 1 is below STOP
SAMPLES = 16384  # samples evaluated at once
PIECE = 64  # at most this many segments of a voxel in one group


class _Scene(NamedTuple):
    """What every evaluation reads."""

    voxels: Tensor  # [N, (3 n + 4) R]
    low: Tensor  # [3, N] least corners
    center: Tensor  # [3, V] of the cameras
    direction: Tensor  # [3, rays]
    offset: Tensor  # [rays]
    shrink: Tensor  # [rays]: camera depth of one unit along the ray
    step: float
    rank: int
    dim: int

    @property
    def scale(self) -> float:  # taps per world unit
        return 0.5 / self.step


def _scene(voxels: Tensor, low: Tensor, cameras: Tensor, offset: Tensor, step: float, rank: int, dim: int) -> _Scene:
    direction, shrink = directions(cameras, *offset.shape[1:])
    return _Scene(voxels, low, cameras[:, 9:12].t().contiguous(), direction, offset.view(-1), shrink, step, rank, dim)


class _Part:
    """G groups of L samples each, from T segments; m = G L samples, those that fill up a group are not `live`."""

    def __init__(self, scene: _Scene, voxel: Tensor, q: Tensor, dq: Tensor, samples: Tensor, length: Tensor, G: int):
        R, dim = scene.rank, scene.dim
        m = int(length.sum())
        self.scene, self.voxel, self.G, self.L = scene, voxel, G, m // G
        self.start = length.cumsum(0) - length  # [T]
        self.samples = samples
        self.owner = torch.repeat_interleave(length, output_size=m)  # [m] segment
        k = torch.arange(m) - self.of(self.start)
        last = self.of(samples) - 1
        self.live = k <= last
        self.k = torch.minimum(k, last).to(q.dtype)
        q = torch.addcmul(self.of(q), self.of(dq), self.k)  # [3, m] in taps
        tap = torch.arange(dim, dtype=q.dtype)
        inside = q.clamp(0, dim - 1)
        weights = (inside[..., None] - tap).abs_().neg_().add_(1).clamp_(min=0)  # [3, m, n]
        beyond = q.sub_(inside)  # extrapolate below tap 0 and above tap n - 1
        below, above = beyond.clamp(max=0), beyond.clamp(min=0)
        weights[..., 0] -= below
        weights[..., 1] += below
        weights[..., -1] += above
        weights[..., -2] -= above
        self.weights = weights.view(3 * G, self.L, dim)
        rows = scene.voxels.index_select(0, voxel)
        taps, self.heads = rows[:, : 3 * dim * R], rows[:, 3 * dim * R :].reshape(G, 4, R)
        taps = taps.view(G, 3, dim, R).transpose(0, 1).reshape(3 * G, dim, R)
        self.f = torch.bmm(self.weights, taps).view(3, G, self.L, R)
        self.xy = self.f[0] * self.f[1]
        self.e = self.xy * self.f[2]
        logits = torch.bmm(self.heads, self.e.transpose(1, 2)).transpose(0, 1).reshape(4, m)
        self.s = logits[0]
        self.color = logits[1:].sigmoid_()  # [3, m]
        rho = torch.nn.functional.softplus(self.s, threshold=10)
        self.depth = rho.mul_(scene.step).clamp_(max=CLAMP).mul_(self.live)  # optical

    def of(self, values: Tensor) -> Tensor:
        """Values per segment [..., T] at the samples [..., m]."""
        return values.index_select(-1, self.owner)

    def along(self, values: Tensor) -> Tensor:
        """Sums over the samples of the same segment up to each one, itself included: [..., m] -> [..., m] float64."""
        total = values.double().cumsum(-1)
        return total - self.of(torch.nn.functional.pad(total, (1, 0)).index_select(-1, self.start))

    def light(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        """Transmittance in front of and behind every sample [m], of that at the segments' entry [T]; float64."""
        passed = self.along(self.depth)
        behind, entering = passed.neg().exp_(), self.of(entering)
        return torch.exp_(self.depth - passed).mul_(entering), behind.mul_(entering)

    def total(self, values: Tensor) -> Tensor:
        """Sums over the samples of every segment: [..., m] -> [..., T] float64."""
        total = torch.nn.functional.pad(values.double().cumsum(-1), (1, 0))
        return total.index_select(-1, self.start + self.samples) - total.index_select(-1, self.start)

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient of the groups' voxels [G, (3 n + 4) R], of that of s and the colour logits [4, m]."""
        G, L, R = self.G, self.L, self.scene.rank
        grad = grad.view(4, G, L).transpose(0, 1)  # [G, 4, L]
        g_heads = torch.bmm(grad, self.e)
        ge = torch.bmm(grad.transpose(1, 2), self.heads)
        g = torch.empty_like(self.f)
        torch.mul(ge, self.xy, out=g[2])
        ge.mul_(self.f[2])
        torch.mul(ge, self.f[1], out=g[0])
        torch.mul(ge, self.f[0], out=g[1])
        g_taps = torch.bmm(self.weights.transpose(1, 2), g.view(3 * G, L, R))
        return torch.cat([g_taps.view(3, G, -1).transpose(0, 1).reshape(G, -1), g_heads.view(G, -1)], 1)


def _parts(scene: _Scene, ray: Tensor, first: Tensor, samples: Tensor, voxel: Tensor) -> Iterator[tuple[_Part, Tensor]]:
    """Every part of some segments, and which of them it holds [T]."""
    if not len(ray):
        return
    order = voxel.sort(stable=True).indices
    owner = voxel[order]
    new = torch.ones_like(owner, dtype=torch.bool)
    torch.ne(owner[1:], owner[:-1], out=new[1:])
    begins = new.nonzero()[:, 0]
    runs = torch.diff(begins, append=begins.new_tensor([len(owner)]))
    new = (torch.arange(len(owner)) - torch.repeat_interleave(begins, runs)) % PIECE == 0
    group = new.cumsum(0) - 1
    begins = new.nonzero()[:, 0]
    size = torch.diff(begins, append=begins.new_tensor([len(owner)]))  # segments of a group
    total = torch.zeros_like(size).index_add_(0, group, samples[order].long())
    total, by_total = total.sort(descending=True, stable=True)
    rank = torch.empty_like(by_total)
    rank[by_total] = torch.arange(len(rank))
    order = order[rank[group].sort(stable=True).indices]
    size, of_group = size[by_total], owner[begins[by_total]]
    ends = size.cumsum(0)

    ray, first, samples, voxel = (t.index_select(0, order).long() for t in (ray, first, samples, voxel))
    d = scene.direction.index_select(1, ray)
    near = (first + scene.offset.index_select(0, ray)) * scene.step
    view = ray // (len(scene.offset) // max(scene.center.shape[1], 1))
    q = scene.center.index_select(1, view).sub_(scene.low.index_select(1, voxel)).addcmul_(d, near).mul_(scene.scale).sub_(0.5)
    dq, length, lengths, at, a, done = d.mul_(0.5), samples.clone(), total.tolist(), ends.tolist(), 0, 0
    while a < len(lengths):
        b = min(len(lengths), a + max(1, SAMPLES // lengths[a]))
        length[ends[a:b] - 1] += lengths[a] - total[a:b]
        here = slice(done, at[b - 1])
        part = _Part(scene, of_group[a:b], q[:, here], dq[:, here], samples[here], length[here], b - a)
        yield part, order[here]
        a, done = b, at[b - 1]


def march_torch(
    voxels: Tensor,  # [N, (3 n + 4) R]
    low: Tensor,  # [3, N] least corners of the voxels, world units
    cameras: Tensor,  # [V, 16]
    offset: Tensor,  # [V, H, W]
    background: Tensor,  # [V, 3]
    segments: Segments,
    step: float,
    rank: int,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As kernels.march.march."""
    scene = _scene(voxels, low, cameras, offset, step, rank, dim)
    rays = offset.numel()
    ray, first, samples, voxel, order, bounds = (
        segments.ray, segments.first, segments.samples, segments.voxel, segments.order, segments.bounds.long(),
    )  # fmt: skip
    used, state = torch.zeros_like(samples), offset.new_empty(len(ray), 5)
    seen = offset.new_zeros(5, rays)  # transmittance, colour, distance so far
    seen[0] = 1
    alive = (bounds[1:] > bounds[:-1]).nonzero()[:, 0]
    j = 0
    while len(alive):
        slot = order[bounds[alive] + j]
        entry = seen.index_select(1, alive)
        state[slot] = entry.t()
        taken, leaving = used.new_empty(len(slot)), torch.empty_like(entry)
        for part, which in _parts(scene, alive, first[slot], samples[slot], voxel[slot]):
            entering = entry.index_select(1, which)
            before, behind = part.light(entering[0])
            kept = (before >= STOP) & part.live
            weight = before.sub_(behind).mul_(kept)
            z = part.k + part.of(first[slot[which]] + scene.offset[alive[which]])
            gained = part.total(torch.cat([part.color, z.mul_(step)[None]]).mul_(weight))
            count = part.total(kept).long()
            leaving[0, which] = behind.index_select(0, part.start + count - 1).to(leaving.dtype)
            leaving[1:, which] = entering[1:].add_(gained)
            taken[which] = count.int()
        used[slot] = taken
        seen[:, alive] = leaving
        j += 1
        alive = alive[(leaving[0] >= STOP) & (bounds[alive] + j < bounds[alive + 1])]
    seen[4] *= scene.shrink
    V, H, W = offset.shape
    final = seen[0].view(V, H, W)
    image = torch.addcmul(seen[1:4].view(3, V, H, W).transpose(0, 1), background[:, :, None, None], final[:, None])
    return image, final.clone(), seen[4].view(V, H, W).clone(), used, state


def march_torch_backward(
    voxels: Tensor, low: Tensor, cameras: Tensor, offset: Tensor,
    ray: Tensor,  # [S] int32
    first: Tensor,  # [S] int32
    used: Tensor,  # [S] int32
    voxel: Tensor,  # [S] int32
    state: Tensor,  # [S, 5]
    grad_image: Tensor,  # [V, 3, H, W]
    grad_depth: Tensor,  # [V, H, W]
    arriving: Tensor,  # [V, H, W]
    step: float,
    rank: int,
    dim: int,
) -> Tensor:  # fmt: skip
    """As kernels.march.march_backward."""
    scene = _scene(voxels, low, cameras, offset, step, rank, dim)
    visited = used.nonzero()[:, 0]
    ray, first, used, voxel = (t[visited].long() for t in (ray, first, used, voxel))
    state = state[visited].t()
    upstream = torch.cat([grad_image.transpose(0, 1).reshape(3, -1), (grad_depth.view(-1) * scene.shrink)[None]])
    upstream = upstream.index_select(1, ray)  # [4, segments]
    behind = arriving.view(-1)[ray] - (upstream * state[1:]).sum(0)
    grad = torch.zeros_like(voxels)
    for part, which in _parts(scene, ray, first, used, voxel):
        g = part.of(upstream[:, which])
        z = (part.k + part.of(first[which] + scene.offset[ray[which]])).mul_(step)
        before, after = part.light(state[0, which])
        weight = (before - after).to(z.dtype).mul_(part.live)
        a = (g[:3] * part.color).sum(0).addcmul_(z, g[3])
        rest = part.of(behind[which]) - part.along(weight * a)
        slope = torch.where(part.s > 10, 1, part.s.sigmoid())
        g_logits = g  # of s, then of the three colours
        g_logits[1:], density = g[:3] * weight * part.color * (1 - part.color), (after * a - rest).mul_(step)
        g_logits[0] = density.to(z.dtype).mul_(slope).mul_(part.live)
        grad.index_add_(0, part.voxel, part.backward(g_logits))
    return grad
