"""Attention inside segments of uneven length: the public ops and their gradients.

Shapes: N rows, M segments, K listed keys, H heads, D head channels. Rows are read and written
through the row order of the windows, so no permuted copy exists. Segments of like length (a size
class) are one launch. A short segment is one tile: the forward pass walks its heads (the loads of
the next head overlap this one); the backward pass makes dq, dk, dv of one head in one program, in
the form S^T = K Q^T, whose P^T and dS^T are the left operands of dV and dK. Longer segments, and
those whose keys are other rows than the queries, are tiles of rows that loop over the segment (Dao,
FlashAttention-2, arXiv 2307.08691). Where a row is a key more than once, the gradients of each use
are kept apart, then summed row by row. Nothing waits for the device, nothing is added atomically,
results are deterministic.

The Triton programs are in `short`, `long` and `rows`, their launches in `launch`, their tile sizes
in `sizes`, and the path for CPU tensors in `cpu`. The backward pass is `launch.backward` on a GPU
and `cpu.backward` on a CPU. What the forward pass saves, the backward op and its fake change
together.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.attention import cpu, launch
from kernels.attention.launch import Segments, keep
from kernels.checks import check_tensors, wide_dtype
from kernels.voxels.window import Windows


def _window_plan(order: Tensor, starts: Tensor, heads: int) -> cpu.Plan:
    return cpu.plan(starts, starts, heads, len(order), len(order), order)


def _listed_plan(
    order: Tensor, starts: Tensor, key_starts: Tensor, heads: int, keys: int
) -> cpu.Plan:
    return cpu.plan(starts, key_starts, heads, len(order), keys, order)


def _segment_plan(
    q_starts: Tensor, k_starts: Tensor, heads: int, q_rows: int, k_rows: int
) -> cpu.Plan:
    return cpu.plan(q_starts, k_starts, heads, q_rows, k_rows)


def _operands(
    qkv: Tensor,
    order: Tensor,
    starts: Tensor,
    keys: Tensor | None,
    key_starts: Tensor | None,
    gamma: Tensor | None,
    phases: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, cpu.Plan]:
    """q [N, H, D] and k, v of every key, rotated and normed, and the plan, for the torch path."""
    qk = qkv[:, :2]
    heads = qkv.shape[2]
    if phases is not None:
        qk = cpu.rotate(qk, phases)
    if gamma is not None:
        qk = cpu.norm(qk, gamma)[0]
    q, k = qk.unbind(1)
    v = qkv[:, 2]
    if keys is None:
        return q, k, v, keep((order, starts), _window_plan, heads)
    plan = keep((order, starts, key_starts), _listed_plan, heads, len(keys))
    keys = keys.long()
    return q, k[keys], v[keys], plan


def _segments(
    order: Tensor,
    starts: Tensor,
    keys: Tensor | None,
    key_starts: Tensor | None,
    uses: Tensor | None,
    use_starts: Tensor | None,
    bound: int,
) -> Segments:
    """The segments that windows describe, for the kernels."""
    if keys is None:
        return Segments(order, starts, None, starts, min(bound, len(order)))
    return Segments(order, starts, keys, key_starts, None, (uses, use_starts))


@torch.library.custom_op("trislat::window_attention", mutates_args=())
def _window_attention(
    qkv: Tensor,
    order: Tensor,
    starts: Tensor,
    keys: Tensor | None,
    key_starts: Tensor | None,
    uses: Tensor | None,
    use_starts: Tensor | None,
    gamma: Tensor | None,
    phases: Tensor | None,
    bound: int,
    scale: float,
    follows: bool,  # whether a backward pass follows: the torch path keeps more for it
) -> tuple[Tensor, Tensor, Tensor]:
    """out [N, H, D], lse [H, N] by position, and what the torch path keeps for its backward pass.

    lse is the log sum exp of the scores. The torch path has no use for it and returns [0, N].
    """
    if backend.is_torch(qkv):
        with torch.autocast(qkv.device.type, enabled=False):
            *operands, plan = _operands(qkv, order, starts, keys, key_starts, gamma, phases)
            none = qkv.new_empty(0, dtype=torch.promote_types(qkv.dtype, torch.float32))
            kept = plan.room(none) if follows else none
            out = cpu.forward(*operands, plan, scale, kept)
        return out, out.new_empty(0, len(out), dtype=torch.float32), kept
    segments = _segments(order, starts, keys, key_starts, uses, use_starts, bound)
    out, lse = launch.forward(*qkv.unbind(1), gamma, phases, segments, scale)
    return out, lse, qkv.new_empty(0, dtype=torch.float32)


@_window_attention.register_fake
def _(qkv, order, starts, keys, key_starts, uses, use_starts, gamma, phases, bound, scale, follows):
    N, _, H, D = qkv.shape
    on_torch = backend.is_torch(qkv)
    kept = torch.library.get_ctx().new_dynamic_size() if on_torch and follows else 0
    dtype = torch.promote_types(qkv.dtype, torch.float32) if on_torch else torch.float32
    return (
        qkv.new_empty(N, H, D),
        qkv.new_empty(0 if on_torch else H, N, dtype=torch.float32),
        qkv.new_empty(kept, dtype=dtype),
    )


@torch.library.custom_op("trislat::window_attention_backward", mutates_args=())
def _window_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    order: Tensor,
    starts: Tensor,
    keys: Tensor | None,
    key_starts: Tensor | None,
    uses: Tensor | None,
    use_starts: Tensor | None,
    gamma: Tensor | None,
    phases: Tensor | None,
    bound: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dqkv [N, 3, H, D], and dgamma [2, H, D] or, without gamma, [0]."""
    if len(lse) > 0:  # what the forward pass ran on, whichever context the backward pass runs in
        dqkv = torch.empty_like(qkv)
        segments = _segments(order, starts, keys, key_starts, uses, use_starts, bound)
        inputs = (*qkv.unbind(1), gamma, phases)
        gradients = dqkv.unbind(1)
        dgamma = launch.backward(grad.contiguous(), *inputs, out, lse, segments, scale, *gradients)
        return dqkv, dgamma
    with torch.autocast(qkv.device.type, enabled=False):
        operands = _operands(qkv, order, starts, keys, key_starts, gamma, phases)
        dq, dk, dv = cpu.backward(grad, *operands, scale, kept)
    if keys is not None:
        dk, dv = (cpu.sum_uses(d, uses, use_starts) for d in (dk, dv))
    dqk = torch.stack([dq, dk], 1)
    dgamma = qkv.new_empty(0)
    if gamma is not None:
        qk = qkv[:, :2] if phases is None else cpu.rotate(qkv[:, :2], phases)
        dqk, dgamma = cpu.norm_backward(dqk, qk, gamma)
    if phases is not None:
        dqk = cpu.rotate(dqk, phases, back=True)
    return torch.cat([dqk, dv[:, None]], 1).to(qkv.dtype), dgamma


@_window_attention_backward.register_fake
def _(
    grad,
    qkv,
    out,
    lse,
    kept,
    order,
    starts,
    keys,
    key_starts,
    uses,
    use_starts,
    gamma,
    phases,
    bound,
    scale,
):
    dgamma = qkv.new_empty(0) if gamma is None else torch.empty_like(gamma)
    return torch.empty_like(qkv), dgamma


def _save_window(ctx, inputs, output):
    qkv, *lists, ctx.bound, ctx.scale, _ = inputs
    ctx.normed = lists[6] is not None
    ctx.save_for_backward(qkv, *output, *lists)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def _differentiate_window(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    # read saved_tensors once: activation checkpointing computes them at the first read and allows
    # no second
    dqkv, dgamma = torch.ops.trislat.window_attention_backward(
        grad, *ctx.saved_tensors, ctx.bound, ctx.scale
    )
    return dqkv, *[None] * 6, dgamma if ctx.normed else None, *[None] * 4


_window_attention.register_autograd(_differentiate_window, setup_context=_save_window)


@torch.library.custom_op("trislat::segment_attention", mutates_args=())
def _segment_attention(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out [Nq, H, D], lse [H, Nq] or [0, Nq] as in window_attention."""
    if backend.is_torch(q):
        plan = keep((q_starts, k_starts), _segment_plan, q.shape[1], len(q), len(k))
        with torch.autocast(q.device.type, enabled=False):
            out = cpu.forward(q, k, v, plan, scale, q.new_empty(0))
        return out, q.new_empty(0, len(q), dtype=torch.float32)
    return launch.forward(q, k, v, None, None, Segments(None, q_starts, None, k_starts), scale)


@_segment_attention.register_fake
def _(q, k, v, q_starts, k_starts, scale):
    heads = 0 if backend.is_torch(q) else q.shape[1]
    return torch.empty_like(q), q.new_empty(heads, q.shape[0], dtype=torch.float32)


@torch.library.custom_op("trislat::segment_attention_backward", mutates_args=())
def _segment_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if len(lse) == 0:
        plan = keep((q_starts, k_starts), _segment_plan, q.shape[1], len(q), len(k))
        with torch.autocast(q.device.type, enabled=False):
            dq, dk, dv = cpu.backward(grad, q, k, v, plan, scale, q.new_empty(0))
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
    dq = torch.empty_like(q)
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    segments = Segments(None, q_starts, None, k_starts)
    launch.backward(grad.contiguous(), q, k, v, None, None, out, lse, segments, scale, dq, dk, dv)
    return dq, dk, dv


@_segment_attention_backward.register_fake
def _(grad, q, k, v, out, lse, q_starts, k_starts, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_segments(ctx, inputs, output):
    q, k, v, q_starts, k_starts, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, q_starts, k_starts)
    ctx.mark_non_differentiable(output[1])


def _differentiate_segments(ctx, grad, _):
    return (
        *torch.ops.trislat.segment_attention_backward(grad, *ctx.saved_tensors, ctx.scale),
        None,
        None,
        None,
    )


_segment_attention.register_autograd(_differentiate_segments, setup_context=_save_segments)


def _check(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) and not (
        x.dtype == torch.float64 and backend.is_torch(x)
    ):
        raise ValueError(
            f"{name} must be float16, bfloat16 or float32 (float64 on the torch path), got "
            f"{x.dtype}"
        )
    if x.shape[-1] % 8 or not 8 <= x.shape[-1] <= 128:
        raise ValueError(
            f"{name} has {x.shape[-1]} channels per head; they must be a multiple of 8 from 8 "
            "to 128"
        )


def window_attention(
    qkv: Tensor,  # [N, 3, H, D] fp16, bf16 or fp32
    windows: Windows,
    *,
    scale: float | None = None,  # of the scores; D ** -0.5
    # [H, D] both: q and k are RMS-normed over D and scaled by their gamma first
    q_gamma: Tensor | None = None,
    k_gamma: Tensor | None = None,
    # [N, D / 2] complex: q and k, in pairs of channels (2 i, 2 i + 1), are multiplied by them
    phases: Tensor | None = None,
) -> Tensor:  # [N, H, D]
    """Attention softmax(scale q k^T) v of each window's rows over its keys.

    Windows may have any length; sums are fp32. The rotation by the phases (Su et al., RoFormer,
    arXiv 2104.09864) comes first, as published; then the norm: with the gammas, q becomes
    q / max(|q|, 1e-12) * gamma * sqrt(D), and k likewise. Both are computed in fp32 and rounded to
    q's type. Deterministic forward and backward; gradients reach qkv and both gammas, not the
    phases; once differentiable. Nothing waits for the device; for CPU tensors the window starts are
    read. Raises ValueError for wrong ranks, types, head sizes (multiples of 8 from 8 to 128) and
    row counts; TypeError for what are no windows and no tensor.
    """
    check_tensors(qkv=qkv)
    if not isinstance(windows, Windows):
        raise TypeError(
            f"windows must be Windows, which window_partition makes, not {type(windows).__name__}"
        )
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be [N, 3, H, D], got {list(qkv.shape)}")
    _check("qkv", qkv)
    if windows.order.shape[0] != qkv.shape[0]:
        raise ValueError(
            f"qkv has {qkv.shape[0]} rows and the windows have {windows.order.shape[0]}"
        )
    gamma = None
    if q_gamma is not None or k_gamma is not None:
        if q_gamma is None or k_gamma is None:
            raise ValueError("q_gamma and k_gamma go together: 1 of the 2 is missing")
        for name, g in (("q_gamma", q_gamma), ("k_gamma", k_gamma)):
            if g.shape != qkv.shape[2:]:
                raise ValueError(
                    f"{name} must be [H, D] = {list(qkv.shape[2:])}, got {list(g.shape)}"
                )
        gamma = torch.stack([q_gamma, k_gamma]).to(wide_dtype(qkv))
    if phases is not None:
        expected = [len(qkv), qkv.shape[3] // 2]
        if list(phases.shape) != expected or not phases.is_complex():
            raise ValueError(
                f"phases must be [N, D / 2] = {expected} complex, got {list(phases.shape)} "
                f"{phases.dtype}"
            )
        phases = torch.view_as_real(phases.detach().resolve_conj())
        phases = phases.to(wide_dtype(qkv)).contiguous()
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    uses = (None, None) if windows.keys is None else windows.uses
    lists = windows.order, windows.starts, windows.keys, windows.key_starts, *uses
    follows = torch.is_grad_enabled() and qkv.requires_grad
    return torch.ops.trislat.window_attention(
        qkv.contiguous(), *lists, gamma, phases, windows.bound, scale, follows
    )[0]


def segment_attention(
    q: Tensor,  # [Nq, H, D]
    k: Tensor,  # [Nk, H, D]
    v: Tensor,  # [Nk, H, D]
    q_starts: Tensor,  # [M + 1] int32: segment m has the queries q_starts[m] : q_starts[m + 1]
    k_starts: Tensor,  # [M + 1] int32: and the keys k_starts[m] : k_starts[m + 1]
    *,
    scale: float | None = None,
) -> Tensor:  # [Nq, H, D]
    """Attention softmax(scale q k^T) v of the queries over the keys of the same segment.

    Outputs are zero where a segment has no keys. Types, head sizes, determinism and errors are
    those of `window_attention`; gradients reach q, k and v.
    """
    check_tensors(q=q, k=k, v=v, q_starts=q_starts, k_starts=k_starts)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3 or x.shape[1:] != q.shape[1:] or x.dtype != q.dtype:
            raise ValueError(
                f"{name} must be [rows, H, D] like q, got {list(x.shape)} {x.dtype} and "
                f"{list(q.shape)} {q.dtype}"
            )
        _check(name, x)
    if len(k) != len(v):
        raise ValueError(f"k has {len(k)} rows and v has {len(v)}")
    if q_starts.shape != k_starts.shape or q_starts.ndim != 1:
        raise ValueError(
            f"q_starts {list(q_starts.shape)} and k_starts {list(k_starts.shape)} must both be "
            "[M + 1]"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = [t.contiguous() for t in (q, k, v, q_starts, k_starts)]
    return torch.ops.trislat.segment_attention(*tensors, scale)[0]
