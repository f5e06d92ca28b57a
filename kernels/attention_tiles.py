"""The Triton programs of `kernels.attention`: N rows, M segments, H heads, D head channels padded to PAD_D, a power of two.

Pointers: q, k, v and their gradients [N, H, D] with STRIDE between rows; out, grad [N, H, D]; gamma [2, H, D] fp32 or None
(no q/k norm); order [N] int32 or None (position = row); starts [M + 1] int32; work from `_list_tiles`; lse, delta [H, N] fp32
by position; dgamma [tiles, 2, H, D] fp32. Program axis 0 strides over the tiles in `work`; axis 1 is the head, or a group.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
EPSILON = tl.constexpr(1e-12)  # least norm of a row in the q/k norm


@triton.jit(do_not_specialize=["M"])
def _list_tiles(starts_ptr, work_ptr, M, LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """work: how many tiles there are, an unused number, then (segment, its first position) of each. One program."""
    total = 0
    for m0 in range(0, M, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        begin = tl.load(starts_ptr + m, mask=m < M, other=0)
        size = tl.load(starts_ptr + m + 1, mask=m < M, other=0) - begin
        tiles = tl.where((size > LOW) & (size <= HIGH), (size + ROWS - 1) // ROWS, 0)  # [BLOCK]
        slot = work_ptr + 2 * (total + 1 + tl.cumsum(tiles) - tiles)
        for t in range(0, tl.max(tiles)):
            tl.store(slot + 2 * t, m, mask=t < tiles)
            tl.store(slot + 2 * t + 1, begin + t * ROWS, mask=t < tiles)
        total += tl.sum(tiles)
    tl.store(work_ptr, total)


@triton.jit
def _position(order_ptr, first, end, ROWS: tl.constexpr):
    """Positions first + 0..ROWS of a segment that stops at `end`, which are inside it, and their rows."""
    at = first + tl.arange(0, ROWS)
    live = at < end
    row = at if order_ptr is None else tl.load(order_ptr + at, mask=live, other=0)
    return at, live, row.to(tl.int64)[:, None]


@triton.jit
def _mask(live, D: tl.constexpr, PAD_D: tl.constexpr):
    if D == PAD_D:
        return live[:, None]
    else:
        return live[:, None] & (tl.arange(0, PAD_D) < D)[None, :]


@triton.jit
def _load(ptr, row, live, h, STRIDE: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr):
    """Head h of rows, [ROWS, PAD_D]; zeros at padding."""
    return tl.load(ptr + row * STRIDE + h * D + tl.arange(0, PAD_D)[None, :], mask=_mask(live, D, PAD_D), other=0.0)


@triton.jit
def _store(ptr, row, live, h, value, STRIDE: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr):
    at = ptr + row * STRIDE + h * D + tl.arange(0, PAD_D)[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=_mask(live, D, PAD_D))


@triton.jit
def _gamma(gamma_ptr, which, h, H: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr):
    """The scale of q (0) or k (1) times sqrt(D), [1, PAD_D]."""
    d = tl.arange(0, PAD_D)
    return tl.load(gamma_ptr + (which * H + h) * D + d, mask=d < D, other=0.0)[None, :] * (D**0.5)


@triton.jit
def _unit(x):
    """Rows over their norms, the norms, and the inverse norms; [ROWS, 1] each."""
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))[:, None]
    inverse = 1.0 / tl.maximum(norm, EPSILON)
    return x * inverse, norm, inverse


@triton.jit
def _norm(x, gamma_ptr, which, h, H: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr):
    """RMS norm of q or k rows, in their type."""
    if gamma_ptr is None:
        return x
    else:
        unit, _, _ = _unit(x)
        return (unit * _gamma(gamma_ptr, which, h, H, D, PAD_D)).to(x.dtype)


@triton.jit
def _norm_backward(grad, x, gamma_ptr, which, h, H: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr):
    """Gradients of `_norm`: of the rows, [ROWS, PAD_D], and of gamma over these rows, [PAD_D]."""
    unit, norm, inverse = _unit(x)
    dgamma = tl.sum(grad * unit, 0) * (D**0.5)
    grad *= _gamma(gamma_ptr, which, h, H, D, PAD_D)
    along = tl.where(norm > EPSILON, tl.sum(grad * unit, 1)[:, None], 0.0)
    return inverse * (grad - unit * along), dgamma


@triton.jit(do_not_specialize=["N"])
def _attention_short(
    q_ptr, k_ptr, v_ptr, gamma_ptr, order_ptr, starts_ptr, work_ptr, out_ptr, lse_ptr, N, scale,
    H: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program: whole segments, HEADS heads of each."""
    h0 = tl.program_id(1) * HEADS
    for i in range(tl.program_id(0), tl.load(work_ptr), tl.num_programs(0)):
        segment = tl.load(work_ptr + 2 * i + 2)
        end = tl.load(starts_ptr + segment + 1)
        at, live, row = _position(order_ptr, tl.load(starts_ptr + segment), end, ROWS)
        for h in tl.range(h0, tl.minimum(h0 + HEADS, H), num_stages=STAGES):
            q = _norm(_load(q_ptr, row, live, h, STRIDE, D, PAD_D), gamma_ptr, 0, h, H, D, PAD_D)
            k = _norm(_load(k_ptr, row, live, h, STRIDE, D, PAD_D), gamma_ptr, 1, h, H, D, PAD_D)
            v = _load(v_ptr, row, live, h, STRIDE, D, PAD_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [ROWS, ROWS]
            s = tl.where(live[None, :], s, float("-inf"))
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
            _store(out_ptr, row, live, h, out, H * D, D, PAD_D)
            tl.store(lse_ptr + h * N + at, (top + tl.log2(total)) / LOG2E, mask=live)


@triton.jit(do_not_specialize=["N"])
def _attention_long(
    q_ptr, k_ptr, v_ptr, gamma_ptr, order_ptr, q_starts_ptr, k_starts_ptr, work_ptr, out_ptr, lse_ptr, N, scale,
    H: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program: tiles of ROWS queries of a segment, one head, over the segment's keys."""
    h = tl.program_id(1)
    for i in range(tl.program_id(0), tl.load(work_ptr), tl.num_programs(0)):
        segment = tl.load(work_ptr + 2 * i + 2)
        first, q_end = tl.load(work_ptr + 2 * i + 3), tl.load(q_starts_ptr + segment + 1)
        at, live, row = _position(order_ptr, first, q_end, ROWS)
        q = _norm(_load(q_ptr, row, live, h, STRIDE, D, PAD_D), gamma_ptr, 0, h, H, D, PAD_D)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, PAD_D], tl.float32)
        k_end = tl.load(k_starts_ptr + segment + 1)
        for n in tl.range(tl.load(k_starts_ptr + segment), k_end, STEP, num_stages=STAGES):
            _, k_live, k_row = _position(order_ptr, n, k_end, STEP)
            k = _norm(_load(k_ptr, k_row, k_live, h, STRIDE, D, PAD_D), gamma_ptr, 1, h, H, D, PAD_D)
            v = _load(v_ptr, k_row, k_live, h, STRIDE, D, PAD_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [ROWS, STEP]
            s = tl.where(k_live[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            keep = tl.exp2(top - higher)
            total = total * keep + tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, out * keep[:, None], input_precision="ieee")
            top = higher
        found = total > 0  # not where a segment has queries and no keys: zeros
        out = tl.where(found[:, None], out / total[:, None], 0.0)
        _store(out_ptr, row, live, h, out, H * D, D, PAD_D)
        tl.store(lse_ptr + h * N + at, tl.where(found, (top + tl.log2(total)) / LOG2E, 0.0), mask=live)


@triton.jit(do_not_specialize=["N"])
def _attention_short_backward(
    q_ptr, k_ptr, v_ptr, gamma_ptr, order_ptr, starts_ptr, work_ptr, out_ptr, lse_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr,
    dgamma_ptr, N, scale,
    H: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program: whole segments, one head; every row is read once. delta = sum_d out * grad is made on the way."""
    h = tl.program_id(1)
    for i in range(tl.program_id(0), tl.load(work_ptr), tl.num_programs(0)):
        segment = tl.load(work_ptr + 2 * i + 2)
        begin, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        _, k_live, k_row = _position(order_ptr, begin, end, ROWS)
        k = _norm(_load(k_ptr, k_row, k_live, h, STRIDE, D, PAD_D), gamma_ptr, 1, h, H, D, PAD_D)
        v = _load(v_ptr, k_row, k_live, h, STRIDE, D, PAD_D)
        dk = tl.zeros([ROWS, PAD_D], tl.float32)
        dv = tl.zeros([ROWS, PAD_D], tl.float32)
        dgamma = tl.zeros([PAD_D], tl.float32)
        for m in tl.range(begin, end, STEP, num_stages=STAGES):
            at, live, row = _position(order_ptr, m, end, STEP)
            x = _load(q_ptr, row, live, h, STRIDE, D, PAD_D)
            q = _norm(x, gamma_ptr, 0, h, H, D, PAD_D)
            g = _load(grad_ptr, row, live, h, H * D, D, PAD_D)
            out = _load(out_ptr, row, live, h, H * D, D, PAD_D)
            delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
            lse = tl.load(lse_ptr + h * N + at, mask=live, other=0.0) * LOG2E
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)  # [ROWS, STEP]: keys x queries
            p = tl.where(k_live[:, None], tl.exp2(s - lse[None, :]), 0.0)  # a padded query has q = g = delta = 0
            dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(g), input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee")
            dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * scale  # [STEP, PAD_D]
            if gamma_ptr is not None:
                dq, part = _norm_backward(dq, x, gamma_ptr, 0, h, H, D, PAD_D)
                dgamma += part
            _store(dq_ptr, row, live, h, dq, STRIDE, D, PAD_D)
        dk *= scale
        if gamma_ptr is not None:
            d = tl.arange(0, PAD_D)
            slot = dgamma_ptr + (i * 2 * H + h) * D + d
            tl.store(slot, dgamma, mask=d < D)
            x = _load(k_ptr, k_row, k_live, h, STRIDE, D, PAD_D)
            dk, part = _norm_backward(dk, x, gamma_ptr, 1, h, H, D, PAD_D)
            tl.store(slot + H * D, part, mask=d < D)
        _store(dk_ptr, k_row, k_live, h, dk, STRIDE, D, PAD_D)
        _store(dv_ptr, k_row, k_live, h, dv, STRIDE, D, PAD_D)


@triton.jit(do_not_specialize=["N"])
def _attention_long_dq(
    q_ptr, k_ptr, v_ptr, gamma_ptr, order_ptr, q_starts_ptr, k_starts_ptr, work_ptr, out_ptr, lse_ptr, grad_ptr, dq_ptr,
    delta_ptr, dgamma_ptr, N, scale,
    H: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program: dq of tiles of ROWS queries, one head, over the segment's keys; and their delta, for the next kernel."""
    h = tl.program_id(1)
    for i in range(tl.program_id(0), tl.load(work_ptr), tl.num_programs(0)):
        segment = tl.load(work_ptr + 2 * i + 2)
        first, q_end = tl.load(work_ptr + 2 * i + 3), tl.load(q_starts_ptr + segment + 1)
        at, live, row = _position(order_ptr, first, q_end, ROWS)
        q = _norm(_load(q_ptr, row, live, h, STRIDE, D, PAD_D), gamma_ptr, 0, h, H, D, PAD_D)
        g = _load(grad_ptr, row, live, h, H * D, D, PAD_D)
        delta = tl.sum(_load(out_ptr, row, live, h, H * D, D, PAD_D).to(tl.float32) * g.to(tl.float32), 1)
        tl.store(delta_ptr + h * N + at, delta, mask=live)
        lse = tl.load(lse_ptr + h * N + at, mask=live, other=0.0) * LOG2E
        dq = tl.zeros([ROWS, PAD_D], tl.float32)
        k_end = tl.load(k_starts_ptr + segment + 1)
        for n in tl.range(tl.load(k_starts_ptr + segment), k_end, STEP, num_stages=STAGES):
            _, k_live, k_row = _position(order_ptr, n, k_end, STEP)
            k = _norm(_load(k_ptr, k_row, k_live, h, STRIDE, D, PAD_D), gamma_ptr, 1, h, H, D, PAD_D)
            v = _load(v_ptr, k_row, k_live, h, STRIDE, D, PAD_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [ROWS, STEP]
            p = tl.where(k_live[None, :], tl.exp2(s - lse[:, None]), 0.0)
            dp = tl.dot(g, tl.trans(v), input_precision="ieee")
            dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision="ieee")
        dq *= scale
        if gamma_ptr is not None:
            d = tl.arange(0, PAD_D)
            x = _load(q_ptr, row, live, h, STRIDE, D, PAD_D)
            dq, part = _norm_backward(dq, x, gamma_ptr, 0, h, H, D, PAD_D)
            tl.store(dgamma_ptr + (i * 2 * H + h) * D + d, part, mask=d < D)
        _store(dq_ptr, row, live, h, dq, STRIDE, D, PAD_D)


@triton.jit(do_not_specialize=["N"])
def _attention_long_dkv(
    q_ptr, k_ptr, v_ptr, gamma_ptr, order_ptr, q_starts_ptr, k_starts_ptr, work_ptr, lse_ptr, delta_ptr, grad_ptr, dk_ptr,
    dv_ptr, dgamma_ptr, N, scale,
    H: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program: dk and dv of tiles of ROWS keys, one head, over the segment's queries."""
    h = tl.program_id(1)
    for i in range(tl.program_id(0), tl.load(work_ptr), tl.num_programs(0)):
        segment = tl.load(work_ptr + 2 * i + 2)
        first, k_end = tl.load(work_ptr + 2 * i + 3), tl.load(k_starts_ptr + segment + 1)
        _, k_live, k_row = _position(order_ptr, first, k_end, ROWS)
        k = _norm(_load(k_ptr, k_row, k_live, h, STRIDE, D, PAD_D), gamma_ptr, 1, h, H, D, PAD_D)
        v = _load(v_ptr, k_row, k_live, h, STRIDE, D, PAD_D)
        dk = tl.zeros([ROWS, PAD_D], tl.float32)
        dv = tl.zeros([ROWS, PAD_D], tl.float32)
        q_end = tl.load(q_starts_ptr + segment + 1)
        for m in tl.range(tl.load(q_starts_ptr + segment), q_end, STEP, num_stages=STAGES):
            at, live, row = _position(order_ptr, m, q_end, STEP)
            q = _norm(_load(q_ptr, row, live, h, STRIDE, D, PAD_D), gamma_ptr, 0, h, H, D, PAD_D)
            g = _load(grad_ptr, row, live, h, H * D, D, PAD_D)
            lse = tl.load(lse_ptr + h * N + at, mask=live, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + h * N + at, mask=live, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)  # [ROWS, STEP]: keys x queries
            p = tl.where(k_live[:, None], tl.exp2(s - lse[None, :]), 0.0)
            dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(g), input_precision="ieee")
            dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision="ieee")
        dk *= scale
        if gamma_ptr is not None:
            d = tl.arange(0, PAD_D)
            x = _load(k_ptr, k_row, k_live, h, STRIDE, D, PAD_D)
            dk, part = _norm_backward(dk, x, gamma_ptr, 1, h, H, D, PAD_D)
            tl.store(dgamma_ptr + ((i * 2 + 1) * H + h) * D + d, part, mask=d < D)
        _store(dk_ptr, k_row, k_live, h, dk, STRIDE, D, PAD_D)
        _store(dv_ptr, k_row, k_live, h, dv, STRIDE, D, PAD_D)
