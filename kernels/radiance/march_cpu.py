"""Compositing along rays on a CPU and its backward, for any float dtype.

The formulas are as in kernels.radiance.march, in matrix products.

Samples are evaluated voxel by voxel: at the samples of one voxel the interpolation is a product of
the weights [samples, n] with its taps [n, rank], and the backward is the transposed product.
Segments are taken in groups of one
voxel, and groups with about as many samples form a part, a batch of matrices of one size that stays
in the cache (glibc gives large temporaries back to the system and faults them in again). Voxels
come in round after round: round j is the j-th segment of every ray that is still alive, so what is
hidden is never evaluated. Sums along a segment are differences of float64 running sums.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.radiance.rays import RaySegments

STOP = 1e-3
# optical depth of alpha = 0.999 in fp32, behind which a transmittance of 1 is below STOP
CLAMP = 6.907768153668287
SAMPLES = 16384  # samples evaluated at once
PIECE = 64  # at most this many segments of a voxel in one group


class _Field(NamedTuple):
    """The field that is evaluated: voxels, step and sizes."""

    voxels: Tensor  # [N, (3 n + 4) R]
    step: float
    rank: int
    dim: int


def _weights(q: Tensor, dim: int) -> Tensor:
    """Return the weight of every tap [..., n, L] at places q [..., 1, L].

    The weights are hats around each tap, but the first two and the last two go on outwards in
    straight lines, which extrapolates.
    """
    tap = torch.arange(dim, dtype=q.dtype)[:, None]
    least_rise = torch.zeros_like(tap)
    least_fall = torch.zeros_like(tap)
    least_rise[0] = torch.inf
    least_rise[1] = -torch.inf
    least_fall[-1] = torch.inf
    least_fall[-2] = -torch.inf
    rise = torch.sub(q, tap - 1)
    torch.maximum(rise, least_rise, out=rise)
    fall = torch.sub(tap + 1, q)
    torch.maximum(fall, least_fall, out=fall)
    return torch.minimum(rise, fall, out=rise)


class _Part:
    """G groups of L samples each, from T segments.

    Of the m = G L samples those that fill up a group are not `live`.
    """

    def __init__(
        self, field: _Field, voxel: Tensor, path: Tensor, samples: Tensor, length: Tensor, G: int
    ):
        R = field.rank
        dim = field.dim
        m = int(length.sum())
        self.field = field
        self.voxel = voxel
        self.G = G
        self.L = m // G
        self.start = length.cumsum(0) - length  # [T]
        self.samples = samples
        self.owner = torch.repeat_interleave(length, output_size=m)  # [m] segment
        k = torch.arange(m) - self.of(self.start)
        last = self.of(samples) - 1
        self.live = k <= last
        k = torch.minimum(k, last).to(path.dtype)
        first, further = self.of(path).view(2, 4, m)
        # in taps [3, m], camera depth [1, m]
        q, self.z = torch.addcmul(first, further, k).split([3, 1])
        self.weights = _weights(q.view(3, G, 1, self.L), dim).view(3 * G, dim, self.L)
        rows = field.voxels.index_select(0, voxel)
        taps = rows[:, : 3 * dim * R]
        self.heads = rows[:, 3 * dim * R :].reshape(G, 4, R)
        taps = taps.view(G, 3, dim, R).transpose(0, 1).reshape(3 * G, dim, R)
        self.f = torch.bmm(self.weights.transpose(1, 2), taps).view(3, G, self.L, R)
        self.xy = self.f[0] * self.f[1]
        self.e = self.xy * self.f[2]
        logits = torch.bmm(self.heads, self.e.transpose(1, 2)).transpose(0, 1).reshape(4, m)
        self.s = logits[0]
        self.color = logits[1:].sigmoid_()  # [3, m]
        rho = torch.nn.functional.softplus(self.s, threshold=10)
        self.depth = rho.mul_(field.step).clamp_(max=CLAMP).mul_(self.live)  # optical

    def of(self, values: Tensor) -> Tensor:
        """Return values per segment [..., T] at the samples [..., m]."""
        return values.index_select(-1, self.owner)

    def along(self, values: Tensor) -> Tensor:
        """Sum [..., m] along each segment up to each sample, itself included, in float64."""
        total = values.double().cumsum(-1)
        return total - self.of(torch.nn.functional.pad(total, (1, 0)).index_select(-1, self.start))

    def light(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transmittance in front of and behind every sample [m], in float64.

        `entering` [T] is the transmittance at the entry of each segment.
        """
        passed = self.along(self.depth)
        behind = passed.neg().exp_()
        entering = self.of(entering)
        return torch.exp_(self.depth - passed).mul_(entering), behind.mul_(entering)

    def total(self, values: Tensor) -> Tensor:
        """Sum [..., m] over the samples of every segment: [..., T] float64."""
        total = torch.nn.functional.pad(values.double().cumsum(-1), (1, 0))
        return total.index_select(-1, self.start + self.samples) - total.index_select(
            -1, self.start
        )

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient of the voxels of the groups [G, (3 n + 4) R].

        `grad` [4, m] is the gradient of s and of the colour logits.
        """
        G = self.G
        L = self.L
        R = self.field.rank
        grad = grad.view(4, G, L).transpose(0, 1)  # [G, 4, L]
        g_heads = torch.bmm(grad, self.e)
        ge = torch.bmm(grad.transpose(1, 2), self.heads)
        g = torch.empty_like(self.f)
        torch.mul(ge, self.xy, out=g[2])
        ge.mul_(self.f[2])
        torch.mul(ge, self.f[1], out=g[0])
        torch.mul(ge, self.f[0], out=g[1])
        g_taps = torch.bmm(self.weights, g.view(3 * G, L, R))
        return torch.cat(
            [g_taps.view(3, G, -1).transpose(0, 1).reshape(G, -1), g_heads.view(G, -1)], 1
        )


def _parts(
    field: _Field, voxel: Tensor, path: Tensor, samples: Tensor
) -> Iterator[tuple[_Part, Tensor]]:
    """Divide segments into parts; yield each part and the indices [T] of its segments."""
    if not len(voxel):
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
    size = size[by_total]
    of_group = owner[begins[by_total]]
    ends = size.cumsum(0)

    path = path.index_select(0, order).t().contiguous()
    samples = samples.index_select(0, order).long()
    length = samples.clone()
    lengths = total.tolist()
    at = ends.tolist()
    a = 0
    done = 0
    while a < len(lengths):
        b = min(len(lengths), a + max(1, SAMPLES // lengths[a]))
        length[ends[a:b] - 1] += lengths[a] - total[a:b]
        here = slice(done, at[b - 1])
        part = _Part(field, of_group[a:b], path[:, here], samples[here], length[here], b - a)
        yield part, order[here]
        a = b
        done = at[b - 1]


def march_torch(
    voxels: Tensor,  # [N, (3 n + 4) R]
    segments: RaySegments,
    background: Tensor,  # [V, 3]
    height: int,
    width: int,
    step: float,
    rank: int,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Composite all rays, as kernels.radiance.march.march does."""
    field = _Field(voxels, step, rank, dim)
    bounds = segments.bounds.long()
    used = torch.zeros_like(segments.ray)
    state = voxels.new_empty(len(segments.ray), 5)
    seen = voxels.new_zeros(5, len(bounds) - 1)  # transmittance, colour, depth so far
    seen[0] = 1
    alive = (bounds[1:] > bounds[:-1]).nonzero()[:, 0]
    j = 0
    while len(alive):
        slot = segments.order[bounds[alive] + j]
        entry = seen.index_select(1, alive)
        state[slot] = entry.t()
        taken = used.new_empty(len(slot))
        leaving = torch.empty_like(entry)
        for part, which in _parts(
            field,
            *(t.index_select(0, slot) for t in (segments.voxel, segments.path, segments.samples)),
        ):
            entering = entry.index_select(1, which)
            before, behind = part.light(entering[0])
            kept = (before >= STOP) & part.live
            weight = before.sub_(behind).mul_(kept)
            gained = part.total(torch.cat([part.color, part.z]).mul_(weight))
            count = part.total(kept).long().clamp_(min=1)  # less only where a voxel is NaN
            leaving[0, which] = behind.index_select(0, part.start + count - 1).to(leaving.dtype)
            leaving[1:, which] = entering[1:].add_(gained)
            taken[which] = count.int()
        used[slot] = taken
        seen[:, alive] = leaving
        j += 1
        alive = alive[(leaving[0] >= STOP) & (bounds[alive] + j < bounds[alive + 1])]
    light, *color, depth = seen.view(5, -1, height, width).unbind()
    picture = torch.stack([*color, light, depth], 1)
    picture[:, :3].addcmul_(background[:, :, None, None], light[:, None])
    return picture, used, state


def march_torch_backward(
    voxels: Tensor,
    ray: Tensor,  # [S] int32
    voxel: Tensor,  # [S] int32
    path: Tensor,  # [S, 8]
    used: Tensor,  # [S] int32
    state: Tensor,  # [S, 5]
    pixels: Tensor,  # [V, 5, H, W]: gradient of colour, what the whole ray contributes, of depth
    step: float,
    rank: int,
    dim: int,
) -> Tensor:
    """Return the gradient of the voxels, as kernels.radiance.march.march_backward does."""
    visited = used.nonzero()[:, 0]
    ray, voxel, path, used, state = (
        t.index_select(0, visited) for t in (ray, voxel, path, used, state)
    )
    red, green, blue, arriving, depth = pixels.transpose(0, 1).flatten(1).index_select(1, ray)
    upstream = torch.stack([red, green, blue, depth])  # [4, segments]
    behind = arriving - (upstream * state[:, 1:].t()).sum(0)
    grad = torch.zeros_like(voxels)
    entering = state[:, 0].contiguous()
    for part, which in _parts(_Field(voxels, step, rank, dim), voxel, path, used):
        g = part.of(upstream.index_select(1, which))
        before, after = part.light(entering.index_select(0, which))
        weight = (before - after).to(g.dtype).mul_(part.live)
        a = torch.cat([part.color, part.z]).mul_(g).sum(0)
        rest = part.of(behind.index_select(0, which)) - part.along(weight * a)
        slope = torch.where(part.s > 10, 1, part.s.sigmoid())
        g_rho = (after * a - rest).mul_(step).to(g.dtype)
        g_color = g[:3].mul_(weight).mul_(part.color).mul_(1 - part.color)
        g_logits = torch.cat([g_rho.mul_(slope).mul_(part.live)[None], g_color])
        grad.index_add_(0, part.voxel, part.backward(g_logits))
    return grad
