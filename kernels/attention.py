"""Attention inside segments of uneven length: N rows, M segments, H heads, D head channels; one launch per size class.

Rows are read and written through the row order of the windows, so no permuted copy exists. A short segment is one tile:
the forward pass walks its heads (the loads of the next head overlap this one), the backward pass makes dq, dk, dv of one
head in one program, in the form S^T = K Q^T whose P^T and dS^T are the left operands of dV and dK. Longer segments are
tiles of rows that loop over the segment (Dao, FlashAttention-2, arXiv 2307.08691). Which tiles exist is listed on the
device, once per windows: nothing waits for the device, nothing is added atomically, results are deterministic.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels import attention_tiles as kernel
from kernels import attention_torch as padded
from kernels import backend
from kernels.window import Windows

ANY = 2**31 - 1
KEPT = 16  # how many plans and tile lists are kept


class Tile(NamedTuple):
    """How segments of `low` < length <= `high` are computed: `rows` of them by a program, `step` of the other side at a time."""

    low: int
    high: int
    rows: int
    step: int
    num_warps: int
    num_stages: int


def _tiles(dtype: torch.dtype, pad_d: int, target: str, normed: bool) -> tuple[list[Tile], list[Tile]]:
    """Size classes, forward and backward. Not yet measured on a GPU: chosen so that nothing spills and shared memory suffices.

    The q/k norm (`normed`) holds more of a row in registers. The last class loops, from any length.
    """
    if target == "interpreter":  # a program costs milliseconds whatever its size
        forward = [Tile(0, 64, 64, 64, 4, 1), Tile(64, 256, 256, 256, 4, 1), Tile(256, ANY, 128, 256, 4, 1)]
        backward = [Tile(0, 64, 64, 64, 4, 1), Tile(64, 256, 256, 128, 4, 1), Tile(256, ANY, 128, 256, 4, 1)]
    elif dtype == torch.float32:  # no tensor cores on NVIDIA: full fp32 products hold their operands in registers
        forward = [Tile(0, ANY, 32, 16, 4, 1)]
        step = 32 if pad_d <= 32 and not normed else 16
        backward = [Tile(0, ANY, 32, step, 8, 1)] if pad_d <= 64 else [Tile(0, ANY, 16, 16, 4, 1)]
        if pad_d <= 64 and not normed:
            backward = [Tile(0, 64, 64, 16, 8, 2 if target.startswith("sm_8") else 1), backward[0]._replace(low=64)]
    elif pad_d > 64:
        forward, backward = [Tile(0, ANY, 64, 32, 4, 2)], [Tile(0, 64, 64, 16, 4, 1), Tile(64, ANY, 64, 16, 4, 1)]
        if normed:
            forward, backward = [Tile(0, ANY, 64, 32, 8, 2)], [Tile(0, ANY, 32, 16, 8, 1)]
    elif target.startswith("gfx1"):  # 256 registers a thread, half of what gfx9 has
        forward, backward = [Tile(0, ANY, 64, 32, 8, 1)], [Tile(0, ANY, 16 if normed else 32, 16, 4, 1)]
    elif target.startswith("gfx"):
        forward = [Tile(0, ANY, 64, 32, 4, 2)]
        backward = [Tile(0, 64, 64, 16, 4, 2), Tile(64, 128, 128, 16, 8, 1), Tile(128, ANY, 64, 16, 4, 2)]
        if not normed:
            backward[2:] = [Tile(128, 256, 256, 16, 8, 1), Tile(256, ANY, 64, 16, 4, 2)]
    elif 90 <= int(target.removeprefix("sm_")) < 120:  # 227 KB of shared memory, and products from it
        step = 64 if target == "sm_90" else 32
        forward = [Tile(0, 64, 64, 64, 4, 2), Tile(64, 128, 128, 128, 8, 2), Tile(128, ANY, 64, step, 4, 3)]
        backward = [Tile(0, 64, 64, 32, 4, 2), Tile(64, 128, 128, 32, 8, 2), Tile(128, ANY, 64, 32, 4, 2)]
        if not normed:
            backward[2:] = [Tile(128, 256, 256, 32, 8, 1), Tile(256, ANY, 64, 32, 4, 2)]
    elif normed:
        forward = [Tile(0, 64, 64, 64, 4, 3), Tile(64, ANY, 64, 64, 4, 3)]
        backward = [Tile(0, ANY, 64, 16, 4, 2)]
    else:
        forward = [Tile(0, 64, 64, 64, 4, 3), Tile(64, 128, 128, 128, 8, 2), Tile(128, ANY, 64, 64, 4, 3)]
        backward = [Tile(0, 64, 64, 32, 4, 1), Tile(64, 128, 128, 32, 8, 2), Tile(128, ANY, 64, 32, 4, 3)]
    return forward, backward


_kept: dict[tuple, tuple] = {}


def _keep(tensors: tuple[Tensor | None, ...], make, *args):
    """make(*args), kept for the next call with the same memory in `tensors`, which the entry keeps alive.

    By memory and version, not by object: checkpointing and torch.compile hand over aliases of the same tensors.
    """
    key = make, args, *((t.data_ptr(), t.shape, 0 if t.is_inference() else t._version) for t in tensors if t is not None)
    made = _kept.pop(key, None) or (make(*tensors, *args), tensors)
    _kept[key] = made  # the most recent last
    for old in list(_kept)[:-KEPT]:
        _kept.pop(old, None)
    return made[0]


def _list_tiles(starts: Tensor, N: int, low: int, high: int, rows: int) -> Tensor:
    """[1 + tiles, 2] int32, as many as there can be: how many there are, then (segment, first position) of each."""
    M = len(starts) - 1
    most = min(M, N // (low + 1)) + (0 if high <= rows else N // rows)
    work = starts.new_empty(1 + most, 2)
    block = min(1024, triton.next_power_of_2(M))
    backend.launch(kernel._list_tiles, (1,), starts, work, M, LOW=low, HIGH=high, ROWS=rows, BLOCK=block, num_warps=4)
    return work


def _programs(tiles: int, tensor: Tensor) -> int:
    """Programs along the tiles: more than run at once would start only to find nothing left."""
    units = torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
    return min(tiles, 8 * units)


def _constants(q: Tensor, tile: Tile) -> dict[str, int]:
    H, D = q.shape[1:]
    return dict(H=H, D=D, PAD_D=max(16, triton.next_power_of_2(D)), STRIDE=q.stride(0), ROWS=tile.rows, STAGES=tile.num_stages,
                num_warps=tile.num_warps, num_stages=tile.num_stages)  # fmt: skip


def _classes(q: Tensor, bound: int | None, normed: bool) -> tuple[list[Tile], list[Tile]]:
    """Those that a segment of up to `bound` rows can be in; None: queries and keys are separate, all tiles loop."""
    forward, backward = _tiles(q.dtype, max(16, triton.next_power_of_2(q.shape[2])), backend.target(q), normed)
    if bound is None:
        return [forward[-1]._replace(low=0)], [backward[-1]._replace(low=0)]
    return [t for t in forward if t.low < bound], [t for t in backward if t.low < bound]


def _forward(q, k, v, gamma, order, q_starts, k_starts, bound: int | None, scale: float) -> tuple[Tensor, Tensor]:
    N, H, D = q.shape
    out, lse = q.new_empty(N, H, D), q.new_empty(H, N, dtype=torch.float32)
    for tile in _classes(q, bound, gamma is not None)[0]:
        work = _keep((q_starts,), _list_tiles, N, tile.low, tile.high, tile.rows)
        programs, constants = _programs(len(work) - 1, q), _constants(q, tile)
        if tile.high <= tile.rows:
            heads = min(H, 4)
            backend.launch(kernel._attention_short, (triton.cdiv(H, heads), programs), q, k, v, gamma, order, q_starts, work,
                           out, lse, N, scale, HEADS=heads, **constants)  # fmt: skip
        else:
            backend.launch(kernel._attention_long, (H, programs), q, k, v, gamma, order, q_starts, k_starts, work, out, lse,
                           N, scale, STEP=tile.step, **constants)  # fmt: skip
    return out, lse


def _backward(grad, q, k, v, out, lse, gamma, order, q_starts, k_starts, bound: int | None, scale: float, dq, dk, dv) -> Tensor:
    """Fill dq, dk, dv; return dgamma [2, H, D], or nothing [0] without gamma."""
    N, H, D = q.shape
    classes = _classes(q, bound, gamma is not None)[1]
    lists = [_keep((q_starts,), _list_tiles, N, tile.low, tile.high, tile.rows) for tile in classes]
    parts = None if gamma is None else gamma.new_zeros(sum(len(work) - 1 for work in lists), 2, H, D)
    first = 0
    for tile, work in zip(classes, lists, strict=True):
        tiles, constants = len(work) - 1, _constants(q, tile) | {"STEP": tile.step}
        grid, part = (H, _programs(tiles, q)), None if parts is None else parts[first : first + tiles]
        if tile.high <= tile.rows:
            backend.launch(kernel._attention_short_backward, grid, q, k, v, gamma, order, q_starts, work, out, lse, grad,
                           dq, dk, dv, part, N, scale, **constants)  # fmt: skip
        else:
            delta = torch.empty_like(lse)
            backend.launch(kernel._attention_long_dq, grid, q, k, v, gamma, order, q_starts, k_starts, work, out, lse, grad,
                           dq, delta, part, N, scale, **constants)  # fmt: skip
            if k_starts is not q_starts:
                work = _keep((k_starts,), _list_tiles, len(k), tile.low, tile.high, tile.rows)
                grid = (H, _programs(len(work) - 1, q))
            backend.launch(kernel._attention_long_dkv, grid, q, k, v, gamma, order, q_starts, k_starts, work, lse, delta, grad,
                           dk, dv, part, N, scale, **constants)  # fmt: skip
        first += tiles
    return q.new_empty(0) if parts is None else parts.sum(0)


def _norm(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The q/k norm of x [N, 2, H, D] in its type; the unit rows and the inverse norms, negative where a norm is below 1e-12."""
    wide = x.to(gamma.dtype)
    norm = wide.norm(dim=-1, keepdim=True)
    inverse = norm.clamp(min=1e-12).reciprocal()
    unit = wide * inverse
    return (unit * gamma * x.shape[-1] ** 0.5).to(x.dtype), unit, inverse.copysign(norm - 1e-12)


def _norm_backward(grad: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, 2, H, D] and gamma [2, H, D]."""
    _, unit, inverse = _norm(x, gamma)
    grad = grad * x.shape[-1] ** 0.5
    dgamma, grad = (grad * unit).sum(0), grad * gamma
    along = (grad * unit).sum(-1, keepdim=True).where(inverse > 0, 0)
    return inverse.abs() * (grad - unit * along), dgamma


def _window_plan(order: Tensor, starts: Tensor, heads: int) -> padded.Plan:
    return padded.plan(starts, starts, heads, len(order), len(order), order)


def _segment_plan(q_starts: Tensor, k_starts: Tensor, heads: int, q_rows: int, k_rows: int) -> padded.Plan:
    return padded.plan(q_starts, k_starts, heads, q_rows, k_rows)


@torch.library.custom_op("trislat::window_attention", mutates_args=())
def _window_attention(
    qkv: Tensor, order: Tensor, starts: Tensor, gamma: Tensor | None, bound: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out [N, H, D], and lse [H, N] by position: log sum exp of the scores; the torch path has no use for it, [0, N]."""
    if backend.is_torch(qkv):
        q, k, v = qkv.unbind(1) if gamma is None else (*_norm(qkv[:, :2], gamma)[0].unbind(1), qkv[:, 2])
        out = padded.forward(q, k, v, _keep((order, starts), _window_plan, qkv.shape[2]), scale)
        return out, out.new_empty(0, len(out), dtype=torch.float32)
    return _forward(*qkv.unbind(1), gamma, order, starts, starts, min(bound, len(qkv)), scale)


@_window_attention.register_fake
def _(qkv, order, starts, gamma, bound, scale):
    N, _, H, D = qkv.shape
    return qkv.new_empty(N, H, D), qkv.new_empty(0 if backend.is_torch(qkv) else H, N, dtype=torch.float32)


@torch.library.custom_op("trislat::window_attention_backward", mutates_args=())
def _window_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, order: Tensor, starts: Tensor, gamma: Tensor | None, bound: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dqkv [N, 3, H, D], and dgamma [2, H, D] or, without gamma, [0]."""
    if len(lse) == 0:  # what the forward pass ran on, whichever context the backward pass runs in
        q, k, v = qkv.unbind(1) if gamma is None else (*_norm(qkv[:, :2], gamma)[0].unbind(1), qkv[:, 2])
        dq, dk, dv = padded.backward(grad, q, k, v, _keep((order, starts), _window_plan, qkv.shape[2]), scale)
        if gamma is None:
            return torch.stack([dq, dk, dv], 1).to(qkv.dtype), qkv.new_empty(0)
        dqk, dgamma = _norm_backward(torch.stack([dq, dk], 1), qkv[:, :2], gamma)
        return torch.cat([dqk, dv[:, None]], 1).to(qkv.dtype), dgamma
    dqkv = torch.empty_like(qkv)
    bound = min(bound, len(qkv))
    dgamma = _backward(
        grad.contiguous(), *qkv.unbind(1), out, lse, gamma, order, starts, starts, bound, scale, *dqkv.unbind(1)
    )
    return dqkv, dgamma


@_window_attention_backward.register_fake
def _(grad, qkv, out, lse, order, starts, gamma, bound, scale):
    return torch.empty_like(qkv), qkv.new_empty(0) if gamma is None else torch.empty_like(gamma)


def _save_window(ctx, inputs, output):
    qkv, order, starts, gamma, ctx.bound, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output, order, starts, gamma)
    ctx.mark_non_differentiable(output[1])


def _differentiate_window(ctx, grad, _):
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes at the first read and allows no second
    dqkv, dgamma = torch.ops.trislat.window_attention_backward(grad, *saved, ctx.bound, ctx.scale)
    return dqkv, None, None, None if saved[-1] is None else dgamma, None, None


_window_attention.register_autograd(_differentiate_window, setup_context=_save_window)


@torch.library.custom_op("trislat::segment_attention", mutates_args=())
def _segment_attention(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out [Nq, H, D], lse [H, Nq] or [0, Nq] as in window_attention."""
    if backend.is_torch(q):
        plan = _keep((q_starts, k_starts), _segment_plan, q.shape[1], len(q), len(k))
        return padded.forward(q, k, v, plan, scale), q.new_empty(0, len(q), dtype=torch.float32)
    return _forward(q, k, v, None, None, q_starts, k_starts, None, scale)


@_segment_attention.register_fake
def _(q, k, v, q_starts, k_starts, scale):
    return torch.empty_like(q), q.new_empty(0 if backend.is_torch(q) else q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("trislat::segment_attention_backward", mutates_args=())
def _segment_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_starts: Tensor, k_starts: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if len(lse) == 0:
        plan = _keep((q_starts, k_starts), _segment_plan, q.shape[1], len(q), len(k))
        dq, dk, dv = padded.backward(grad, q, k, v, plan, scale)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _backward(grad.contiguous(), q, k, v, out, lse, None, None, q_starts, k_starts, None, scale, dq, dk, dv)
    return dq, dk, dv


@_segment_attention_backward.register_fake
def _(grad, q, k, v, out, lse, q_starts, k_starts, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_segments(ctx, inputs, output):
    q, k, v, q_starts, k_starts, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, q_starts, k_starts)
    ctx.mark_non_differentiable(output[1])


def _differentiate_segments(ctx, grad, _):
    return *torch.ops.trislat.segment_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


_segment_attention.register_autograd(_differentiate_segments, setup_context=_save_segments)


def _check(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) and not (x.dtype == torch.float64 and backend.is_torch(x)):
        raise ValueError(f"{name} must be float16, bfloat16 or float32 (float64 on the torch path), got {x.dtype}")
    if x.shape[-1] % 8 or not 8 <= x.shape[-1] <= 128:
        raise ValueError(f"{name} has {x.shape[-1]} channels per head; they must be a multiple of 8 from 8 to 128")


def window_attention(
    qkv: Tensor,  # [N, 3, H, D] fp16, bf16 or fp32
    windows: Windows,
    *,
    scale: float | None = None,  # of the scores; D ** -0.5
    q_gamma: Tensor | None = None,  # [H, D], with k_gamma: q and k are RMS-normed over D and scaled by them first
    k_gamma: Tensor | None = None,
) -> Tensor:  # [N, H, D]
    """softmax(scale q k^T) v among the rows of each window, every window and head in one launch per size class.

    Any window length; fp32 accumulation; deterministic, forward and backward (to qkv and both gammas; once
    differentiable). With the gammas, q becomes q / max(|q|, 1e-12) * gamma * sqrt(D), in fp32, rounded to q's type.
    Nothing waits for the device; for CPU tensors the window starts are read. Raises ValueError for wrong ranks, types,
    head sizes (multiples of 8 from 8 to 128) and row counts.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be [N, 3, H, D], got {list(qkv.shape)}")
    _check("qkv", qkv)
    if windows.order.shape[0] != qkv.shape[0]:
        raise ValueError(f"qkv has {qkv.shape[0]} rows and the windows have {windows.order.shape[0]}")
    gamma = None
    if q_gamma is not None or k_gamma is not None:
        if q_gamma is None or k_gamma is None:
            raise ValueError("q_gamma and k_gamma go together: 1 of the 2 is missing")
        for name, g in (("q_gamma", q_gamma), ("k_gamma", k_gamma)):
            if g.shape != qkv.shape[2:]:
                raise ValueError(f"{name} must be [H, D] = {list(qkv.shape[2:])}, got {list(g.shape)}")
        gamma = torch.stack([q_gamma, k_gamma]).to(torch.promote_types(qkv.dtype, torch.float32))
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.trislat.window_attention(qkv.contiguous(), windows.order, windows.starts, gamma, windows.bound, scale)[0]


def segment_attention(
    q: Tensor,  # [Nq, H, D]
    k: Tensor,  # [Nk, H, D]
    v: Tensor,  # [Nk, H, D]
    q_starts: Tensor,  # [M + 1] int32: segment m has the queries q_starts[m] : q_starts[m + 1]
    k_starts: Tensor,  # [M + 1] int32: and the keys k_starts[m] : k_starts[m + 1]
    *,
    scale: float | None = None,
) -> Tensor:  # [Nq, H, D]
    """softmax(scale q k^T) v of the queries over the keys of the same segment; zeros where a segment has no keys.

    As `window_attention` otherwise: types, head sizes, determinism, gradients to q, k and v, errors.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3 or x.shape[1:] != q.shape[1:] or x.dtype != q.dtype:
            raise ValueError(f"{name} must be [rows, H, D] like q, got {list(x.shape)} {x.dtype} and {list(q.shape)} {q.dtype}")
        _check(name, x)
    if len(k) != len(v):
        raise ValueError(f"k has {len(k)} rows and v has {len(v)}")
    if q_starts.shape != k_starts.shape or q_starts.ndim != 1:
        raise ValueError(f"q_starts {list(q_starts.shape)} and k_starts {list(k_starts.shape)} must both be [M + 1]")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    args = q.contiguous(), k.contiguous(), v.contiguous(), q_starts, k_starts, scale
    return torch.ops.trislat.segment_attention(*args)[0]


def window_attention_reference(qkv, order, starts, scale=None, q_gamma=None, k_gamma=None):
    """One window after the other; [N, H, D]."""
    q, k, v = qkv.unbind(1)
    if q_gamma is not None:
        root = qkv.shape[-1] ** 0.5
        q, k = (torch.nn.functional.normalize(x, dim=-1) * g * root for x, g in ((q, q_gamma), (k, k_gamma)))
    order = order.long()
    out = segment_attention_reference(q[order], k[order], v[order], starts, starts, scale)
    return torch.zeros_like(out).index_copy(0, order, out)


def segment_attention_reference(q, k, v, q_starts, k_starts, scale=None):
    """One segment after the other; [Nq, H, D]."""
    scale, pieces = q.shape[-1] ** -0.5 if scale is None else scale, [q[:0]]
    (a, *q_ends), (c, *k_ends) = q_starts.tolist(), k_starts.tolist()
    for b, d in zip(q_ends, k_ends, strict=True):
        p = (torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", p, v[c:d]))
        a, c = b, d
    return torch.cat(pieces)
