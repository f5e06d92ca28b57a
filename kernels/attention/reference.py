"""Reference attention in plain torch: one segment after another, any float dtype, autograd."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from kernels.checks import wide


def rotate_reference(x, phases):
    """Multiply pairs of channels (2 i, 2 i + 1) of x [N, H, D], as complex numbers, by the phases.

    Phases are [N, D / 2]. Computed in fp32 where x has 16 bits, then rounded to x's type: torch has
    no complex bf16, and warns of complex fp16.
    """
    real, imaginary = wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.complex(real, imaginary) * phases[:, None]
    return torch.stack([pairs.real, pairs.imag], -1).flatten(-2).to(x.dtype)


def window_attention_reference(qkv, windows, scale=None, q_gamma=None, k_gamma=None, phases=None):
    """Attention of each window's rows over its keys, [N, H, D]."""
    q, k, v = qkv.unbind(1)
    if phases is not None:
        q = rotate_reference(q, phases)
        k = rotate_reference(k, phases)
    if q_gamma is not None:
        root = qkv.shape[-1] ** 0.5
        q = F.normalize(q, dim=-1) * q_gamma * root
        k = F.normalize(k, dim=-1) * k_gamma * root
    order = windows.order.to(qkv.device).long()
    keys = order
    key_starts = windows.starts
    if windows.keys is not None:
        keys = windows.keys.to(order)
        key_starts = windows.key_starts
    out = segment_attention_reference(q[order], k[keys], v[keys], windows.starts, key_starts, scale)
    return torch.zeros_like(out).index_copy(0, order, out)


def segment_attention_reference(q, k, v, q_starts, k_starts, scale=None):
    """Attention of each segment's queries over its keys, [Nq, H, D]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pieces = [q[:0]]
    queries = pairwise(q_starts.tolist())
    keys = pairwise(k_starts.tolist())
    for (a, b), (c, d) in zip(queries, keys, strict=True):
        p = (torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", p, v[c:d]))
    return torch.cat(pieces)
