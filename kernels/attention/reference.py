"""Attention by the book: one segment after another in plain torch, any float dtype, autograd."""

import torch


def rotate_reference(x, phases):
    """Pairs of channels (2 i, 2 i + 1) of x [N, H, D] multiplied, as complex numbers, by phases [N,
    D / 2].

    In fp32 where x has 16 bits, then rounded to x's type: torch has no complex bf16, and warns of
    complex fp16.
    """
    real, imaginary = (
        x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    )
    pairs = torch.complex(real, imaginary) * phases[:, None]
    return torch.stack([pairs.real, pairs.imag], -1).flatten(-2).to(x.dtype)


def window_attention_reference(qkv, windows, scale=None, q_gamma=None, k_gamma=None, phases=None):
    """One window after the other; [N, H, D]."""
    q, k, v = qkv.unbind(1)
    if phases is not None:
        q, k = rotate_reference(q, phases), rotate_reference(k, phases)
    if q_gamma is not None:
        root = qkv.shape[-1] ** 0.5
        q, k = (
            torch.nn.functional.normalize(x, dim=-1) * g * root
            for x, g in ((q, q_gamma), (k, k_gamma))
        )
    order = windows.order.to(qkv.device).long()
    keys, key_starts = (
        (order, windows.starts)
        if windows.keys is None
        else (windows.keys.to(order), windows.key_starts)
    )
    out = segment_attention_reference(q[order], k[keys], v[keys], windows.starts, key_starts, scale)
    return torch.zeros_like(out).index_copy(0, order, out)


def segment_attention_reference(q, k, v, q_starts, k_starts, scale=None):
    """One segment after the other; [Nq, H, D]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pieces = [q[:0]]
    a, *q_ends = q_starts.tolist()
    c, *k_ends = k_starts.tolist()
    for b, d in zip(q_ends, k_ends, strict=True):
        p = (torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", p, v[c:d]))
        a, c = b, d
    return torch.cat(pieces)
