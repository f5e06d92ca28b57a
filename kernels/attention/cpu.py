"""Attention inside segments for CPU tensors: H heads, D head channels.

Segments of like length are padded to one batch, and a batch is two products and a softmax. A slot
is one (row, head) of a padded batch. One gather per operand brings the slots of all batches
together, one gather per result takes them apart again. No row is added into, so every result is
deterministic. Up to KEPT probabilities are kept for the backward pass, which computes the others
again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import wide

# scores of one product at most: bounds memory, and keeps the passes over them inside a cache
SCORES = 1 << 18
KEPT = 1 << 22
WASTE = 1 << 13  # padded scores per head for which another batch is not worth its overhead


class Side(NamedTuple):
    """The slots of the queries, or of the keys.

    Padding repeats the segment's first row, so a NaN in it stays inside the segment.
    """

    take: Tensor  # [S] int64: row * H + head of each slot
    padding: Tensor  # [S, 1] bool
    put: Tensor  # [N * H] int64: the slot of each (row, head); S where it has none

    def gather(self, x: Tensor) -> Tensor:
        """Slots [S, D] of x [N, H, D], in the type that the arithmetic runs in."""
        return wide(x.reshape(-1, x.shape[-1]).index_select(0, self.take))

    def empty(self, like: Tensor) -> Tensor:
        """Slots for a result, [S + 1, D]; the last is zero, for rows that attend to nothing."""
        slots = like.new_empty(len(self.take) + 1, like.shape[-1])
        slots[-1] = 0
        return slots

    def scatter(self, slots: Tensor, like: Tensor) -> Tensor:
        """The rows [N, H, D] of the slots."""
        return slots.index_select(0, self.put).view(like.shape)


class Batch(NamedTuple):
    """Segments padded to common lengths.

    Its slots are first : first + count * length, in the order [count, length].
    """

    count: int  # segments x heads
    q_first: int
    q_length: int
    k_first: int
    k_length: int
    bias: Tensor | None  # [count, 1, k_length]: -inf at padding, None where no key is padded


class Plan(NamedTuple):
    """The batches of all segments, and the slots of both sides."""

    batches: list[Batch]
    queries: Side
    keys: Side

    def room(self, like: Tensor) -> Tensor:
        """For the probabilities that are kept: of all scores, or of none."""
        scores = sum(batch.count * batch.q_length * batch.k_length for batch in self.batches)
        return like.new_empty(scores if scores <= KEPT else 0)


def _side(
    order: Tensor | None, N: int, heads: int, groups: list[list[list[int]]]
) -> tuple[Side, list[tuple[int, int, Tensor]]]:
    """Make the slots of one side, from the [rows, begin] of each segment of each group.

    Returns them, and (first slot, length, padding [count, 1, length]) of every group.
    """
    head = torch.arange(heads)
    first = 0
    take = [torch.zeros(0, dtype=torch.int64)]
    padding = [torch.zeros(0).bool()]
    spans = []
    for group in groups:
        n, begin = torch.tensor(group).T[..., None]
        at = torch.arange(max(n for n, _ in group))
        pad = at >= n  # [segments, length]
        rows = begin + at.masked_fill(pad, 0)
        if order is not None:
            rows = order[rows]
        take.append((rows[:, None] * heads + head[:, None]).flatten())  # [segments, heads, length]
        pad = pad[:, None].expand(-1, heads, -1).reshape(-1, 1, len(at))
        padding.append(pad.flatten())
        spans.append((first, len(at), pad))
        first += pad.numel()
    take = torch.cat(take)
    padding = torch.cat(padding)
    put = torch.full((N * heads,), first)
    live = ~padding
    put[take[live]] = torch.arange(first)[live]
    return Side(take, padding[:, None], put), spans


def plan(
    q_starts: Tensor,
    k_starts: Tensor,
    heads: int,
    q_rows: int,
    k_rows: int,
    order: Tensor | None = None,
) -> Plan:
    """Group the segments of q_starts and k_starts [M + 1] into batches that waste little.

    The longest come first. `order` [N] names the query at each position, and the key too where
    k_starts is q_starts; without it, positions are rows.
    """
    q = q_starts.tolist()
    k = k_starts.tolist()
    segments = [(q[m + 1] - q[m], k[m + 1] - k[m], q[m], k[m]) for m in range(len(q) - 1)]
    segments = sorted((s for s in segments if s[0] > 0 and s[1] > 0), reverse=True)
    groups: list[list[tuple[int, int, int, int]]] = []
    most = useful = 0
    for segment in segments:
        a, b = segment[:2]
        if groups:
            most = max(most, b)
            padded = (len(groups[-1]) + 1) * groups[-1][0][0] * most
            if padded - useful - a * b <= max(WASTE, useful // 8):
                groups[-1].append(segment)
                useful += a * b
                continue
        groups.append([segment])
        most = b
        useful = a * b
    order = None if order is None else order.long()
    queries, q_spans = _side(order, q_rows, heads, [[[s[0], s[2]] for s in g] for g in groups])
    if q_starts is k_starts:
        keys = queries
        k_spans = q_spans
    else:
        keys, k_spans = _side(None, k_rows, heads, [[[s[1], s[3]] for s in g] for g in groups])
    batches = []
    for (q_first, q_length, _), (k_first, k_length, pad) in zip(q_spans, k_spans, strict=True):
        bias = torch.zeros(pad.shape).masked_fill_(pad, -torch.inf) if pad.any() else None
        batches.append(Batch(len(pad), q_first, q_length, k_first, k_length, bias))
    return Plan(batches, queries, keys)


class _Piece(NamedTuple):
    """Part of a batch with at most SCORES scores.

    One segment and head may have more; its queries then go range by range.
    """

    batch: Batch
    q: slice
    k: slice
    bias: Tensor | None
    scores: slice
    ranges: list[slice]

    def of_scores(self, kept: Tensor) -> Tensor:
        return kept[self.scores].view(-1, self.batch.q_length, self.batch.k_length)

    def of_queries(self, *slots: Tensor) -> list[Tensor]:
        return [x[self.q].view(-1, self.batch.q_length, x.shape[-1]) for x in slots]

    def of_keys(self, *slots: Tensor) -> list[Tensor]:
        return [x[self.k].view(-1, self.batch.k_length, x.shape[-1]) for x in slots]


def _pieces(batches: list[Batch]) -> Iterator[_Piece]:
    end = 0
    for batch in batches:
        rows = max(1, min(batch.q_length, SCORES // batch.k_length))
        step = max(1, SCORES // (batch.q_length * batch.k_length))
        ranges = [slice(m, min(m + rows, batch.q_length)) for m in range(0, batch.q_length, rows)]
        for a in range(0, batch.count, step):
            b = min(a + step, batch.count)
            q = slice(batch.q_first + a * batch.q_length, batch.q_first + b * batch.q_length)
            k = slice(batch.k_first + a * batch.k_length, batch.k_first + b * batch.k_length)
            first = end
            end = end + (b - a) * batch.q_length * batch.k_length
            bias = None if batch.bias is None else batch.bias[a:b]
            yield _Piece(batch, q, k, bias, slice(first, end), ranges)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    scores = torch.bmm(q, k.mT)
    if bias is not None:
        scores += bias
    return torch.softmax(scores, -1, out=out)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, kept: Tensor) -> Tensor:
    """Attend: outputs [Nq, H, D] of q [Nq, H, D] and k, v [Nk, H, D].

    Fills `kept` with probabilities if it has room for them.
    """
    like = q
    q = plan.queries.gather(q)
    k = plan.keys.gather(k)
    v = plan.keys.gather(v)
    q *= scale
    out = plan.queries.empty(q)
    for piece in _pieces(plan.batches):
        qs, outs = piece.of_queries(q, out)
        ks, vs = piece.of_keys(k, v)
        room = piece.of_scores(kept) if len(kept) else None
        for m in piece.ranges:
            to = None if room is None else room[:, m]
            outs[:, m] = torch.bmm(_probabilities(qs[:, m], ks, piece.bias, to), vs)
    return plan.queries.scatter(out, like).to(like.dtype)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in the type of the arithmetic.

    `grad` [Nq, H, D] is the gradient of the output.
    """
    like_q = q
    like_k = k
    q = plan.queries.gather(q)
    g = plan.queries.gather(grad)
    k = plan.keys.gather(k)
    v = plan.keys.gather(v)
    q *= scale
    g.masked_fill_(plan.queries.padding, 0)  # a padded query has no output
    dq = plan.queries.empty(q)
    dk = plan.keys.empty(k)
    dv = plan.keys.empty(v)
    for piece in _pieces(plan.batches):
        qs, gs, dqs = piece.of_queries(q, g, dq)
        ks, vs, dks, dvs = piece.of_keys(k, v, dk, dv)
        known = piece.of_scores(kept) if len(kept) else None
        for i, m in enumerate(piece.ranges):
            p = _probabilities(qs[:, m], ks, piece.bias) if known is None else known[:, m]
            ds = torch._softmax_backward_data(torch.bmm(gs[:, m], vs.mT), p, -1, p.dtype)
            dqs[:, m] = torch.bmm(ds, ks)
            if i == 0:
                torch.bmm(ds.mT, qs[:, m], out=dks)
                torch.bmm(p.mT, gs[:, m], out=dvs)
            else:
                dks.baddbmm_(ds.mT, qs[:, m])
                dvs.baddbmm_(p.mT, gs[:, m])
    dq *= scale
    return (
        plan.queries.scatter(dq, like_q),
        plan.keys.scatter(dk, like_k),
        plan.keys.scatter(dv, like_k),
    )


def rotate(x: Tensor, phases: Tensor, back: bool = False) -> Tensor:
    """Turn pairs of channels (2 i, 2 i + 1) of x [N, 2, H, D] by phases [N, D / 2, 2], or back.

    The result has x's type.
    """
    # not view_as_complex, which needs an even storage offset
    even, odd = x.to(phases.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = phases[:, None, None].unbind(-1)
    sin = -sin if back else sin
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2).to(x.dtype)


def norm(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The q/k norm of x [N, 2, H, D] in its type, the unit rows and the inverse norms.

    An inverse is negative where the norm is below 1e-12.
    """
    rows = x.to(gamma.dtype)
    length = rows.norm(dim=-1, keepdim=True)
    inverse = length.clamp(min=1e-12).reciprocal()
    unit = rows * inverse
    normed = (unit * gamma * x.shape[-1] ** 0.5).to(x.dtype)
    return normed, unit, inverse.copysign(length - 1e-12)


def norm_backward(grad: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, 2, H, D] and gamma [2, H, D]."""
    _, unit, inverse = norm(x, gamma)
    grad = grad * x.shape[-1] ** 0.5
    dgamma = (grad * unit).sum(0)
    grad = grad * gamma
    along = (grad * unit).sum(-1, keepdim=True).where(inverse > 0, 0)
    return inverse.abs() * (grad - unit * along), dgamma


def sum_uses(x: Tensor, uses: Tensor, starts: Tensor) -> Tensor:
    """The sums [N, ...] of x [K, ...] over the uses of each row as a key (`Windows.uses`).

    They are added in the order of the uses.
    """
    begin = starts[:-1].long()
    count = starts.diff()
    total = x.new_zeros(len(count), *x.shape[1:])
    for t in range(int(count.max()) if len(count) else 0):
        rows = (count > t).nonzero()[:, 0]
        total[rows] += x[uses[begin[rows] + t].long()]
    return total
