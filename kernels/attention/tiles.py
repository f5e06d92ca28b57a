"""The Triton programs of `kernels.attention.op`: N rows, M segments, H heads, D head channels padded
to PAD_D, a power of two.

Pointers: q, k, v and their gradients [N, H, D] with STRIDE between rows; out, grad [N, H, D]; gamma
[2, H, D] fp32 or None (no q/k norm); phases [N, D / 2, 2] fp32 or None (no rotation); order of the
queries, keys [N] int32 or None (position = row); starts [M + 1] int32; work from `_list_tiles`;
lse, delta [H, N] fp32 by position; dgamma [tiles, 2, H, D] fp32. Program axis 0 is the head, or a
group: heads share the lines of a row. Axis 1 strides over the tiles in `work`.

Padded rows load as zeros: a padded query adds nothing to dk and dv, a padded key is masked out of
the softmax. Loops call no helper except the rotation and the norm: Triton's interpreter pays
milliseconds for each call.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
EPSILON = tl.constexpr(1e-12)  # least norm of a row in the q/k norm


@triton.jit(do_not_specialize=["M", "low", "high", "rows"])
def _list_tiles(starts_ptr, work_ptr, M, low, high, rows, BLOCK: tl.constexpr):
    """work: how many tiles there are, an unused number, then (segment, its first position) of each.
    One program.
    """
    total = 0
    for m0 in range(0, M, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        begin = tl.load(starts_ptr + m, mask=m < M, other=0)
        size = tl.load(starts_ptr + m + 1, mask=m < M, other=0) - begin
        tiles = tl.where((size > low) & (size <= high), (size + rows - 1) // rows, 0)  # [BLOCK]
        slot = work_ptr + 2 * (total + 1 + tl.cumsum(tiles) - tiles)
        for t in range(0, tl.max(tiles)):
            tl.store(slot + 2 * t, m, mask=t < tiles)
            tl.store(slot + 2 * t + 1, begin + t * rows, mask=t < tiles)
        total += tl.sum(tiles)
    tl.store(work_ptr, total)


@triton.jit
def _rotate(x, phases_ptr, row, live, SIGN: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr):
    """Pairs of channels (2 i, 2 i + 1) of rows [ROWS, PAD_D] turned by their phases, or back (SIGN
    -1), in their type.
    """
    d = tl.arange(0, PAD_D)[None, :]
    phases = tl.load(phases_ptr + row * D + d, mask=live[:, None] & (d < D), other=0.0)
    cos, sin = tl.split(tl.reshape(phases, [x.shape[0], PAD_D // 2, 2]))
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [x.shape[0], PAD_D // 2, 2]))
    sin *= SIGN
    return tl.reshape(
        tl.join(even * cos - odd * sin, even * sin + odd * cos), [x.shape[0], PAD_D]
    ).to(x.dtype)


@triton.jit
def _norm(x, gamma_ptr, D: tl.constexpr, PAD_D: tl.constexpr):
    """RMS norm of q or k rows [ROWS, PAD_D] of one head, whose gamma the pointer names, in their
    type.
    """
    d = tl.arange(0, PAD_D)
    gamma = tl.load(gamma_ptr + d, mask=d < D, other=0.0) * (D**0.5)
    wide = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(wide * wide, 1))
    return (wide * (1.0 / tl.maximum(norm, EPSILON))[:, None] * gamma[None, :]).to(x.dtype)


@triton.jit
def _norm_backward(grad, x, gamma_ptr, D: tl.constexpr, PAD_D: tl.constexpr):
    """Gradients of `_norm`: of the rows, [ROWS, PAD_D], and of gamma over these rows, [PAD_D]."""
    d = tl.arange(0, PAD_D)
    gamma = tl.load(gamma_ptr + d, mask=d < D, other=0.0) * (D**0.5)
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse = (1.0 / tl.maximum(norm, EPSILON))[:, None]
    unit = x * inverse
    dgamma = tl.sum(grad * unit, 0) * (D**0.5)
    grad *= gamma[None, :]
    along = tl.where(norm > EPSILON, tl.sum(grad * unit, 1), 0.0)
    return inverse * (grad - unit * along[:, None]), dgamma


@triton.jit(do_not_specialize=["N"])
def _attention_short(
    q_ptr,
    k_ptr,
    v_ptr,
    gamma_ptr,
    phases_ptr,
    order_ptr,
    starts_ptr,
    work_ptr,
    out_ptr,
    lse_ptr,
    N,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: whole segments, HEADS heads of each."""
    d = tl.arange(0, PAD_D)[None, :]
    h0 = tl.program_id(0) * HEADS
    for i in range(tl.program_id(1), tl.load(work_ptr), tl.num_programs(1)):
        segment = tl.load(work_ptr + 2 * i + 2)
        at = tl.load(starts_ptr + segment) + tl.arange(0, ROWS)
        live = at < tl.load(starts_ptr + segment + 1)
        mask = live[:, None] if D == PAD_D else live[:, None] & (d < D)
        row = tl.load(order_ptr + at, mask=live, other=0).to(tl.int64)[:, None]
        for h in tl.range(h0, tl.minimum(h0 + HEADS, H), num_stages=STAGES):
            q = tl.load(q_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
            k = tl.load(k_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
            v = tl.load(v_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
            if phases_ptr is not None:
                q = _rotate(q, phases_ptr, row, live, 1, D, PAD_D)
                k = _rotate(k, phases_ptr, row, live, 1, D, PAD_D)
            if gamma_ptr is not None:
                q = _norm(q, gamma_ptr + h * D, D, PAD_D)
                k = _norm(k, gamma_ptr + (H + h) * D, D, PAD_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [ROWS, ROWS]
            s = tl.where(live[None, :], s, float("-inf"))
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
            tl.store(
                out_ptr + row * (H * D) + h * D + d, out.to(out_ptr.dtype.element_ty), mask=mask
            )
            tl.store(lse_ptr + h * N + at, (top + tl.log2(total)) / LOG2E, mask=live)


@triton.jit(do_not_specialize=["N"])
def _attention_long(
    q_ptr,
    k_ptr,
    v_ptr,
    gamma_ptr,
    phases_ptr,
    order_ptr,
    keys_ptr,
    q_starts_ptr,
    k_starts_ptr,
    work_ptr,
    out_ptr,
    lse_ptr,
    N,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: tiles of ROWS queries of a segment, one head, over the segment's keys."""
    h = tl.program_id(0)
    d = tl.arange(0, PAD_D)[None, :]
    for i in range(tl.program_id(1), tl.load(work_ptr), tl.num_programs(1)):
        segment = tl.load(work_ptr + 2 * i + 2)
        at = tl.load(work_ptr + 2 * i + 3) + tl.arange(0, ROWS)
        live = at < tl.load(q_starts_ptr + segment + 1)
        mask = live[:, None] if D == PAD_D else live[:, None] & (d < D)
        row = (at if order_ptr is None else tl.load(order_ptr + at, mask=live, other=0)).to(
            tl.int64
        )[:, None]
        q = tl.load(q_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
        if phases_ptr is not None:
            q = _rotate(q, phases_ptr, row, live, 1, D, PAD_D)
        if gamma_ptr is not None:
            q = _norm(q, gamma_ptr + h * D, D, PAD_D)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, PAD_D], tl.float32)
        k_end = tl.load(k_starts_ptr + segment + 1)
        for n in tl.range(tl.load(k_starts_ptr + segment), k_end, STEP, num_stages=STAGES):
            k_at = n + tl.arange(0, STEP)
            k_live = k_at < k_end
            k_mask = k_live[:, None] if D == PAD_D else k_live[:, None] & (d < D)
            k_row = (
                k_at if keys_ptr is None else tl.load(keys_ptr + k_at, mask=k_live, other=0)
            ).to(tl.int64)[:, None]
            k = tl.load(k_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
            v = tl.load(v_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
            if phases_ptr is not None:
                k = _rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
            if gamma_ptr is not None:
                k = _norm(k, gamma_ptr + (H + h) * D, D, PAD_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [ROWS, STEP]
            s = tl.where(k_live[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            keep = tl.exp2(top - higher)
            total = total * keep + tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, out * keep[:, None], input_precision="ieee")
            top = higher
        total = tl.where(total == 0, 1.0, total)  # a segment with queries and no keys: zeros
        out /= total[:, None]
        tl.store(out_ptr + row * (H * D) + h * D + d, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_ptr + h * N + at, (top + tl.log2(total)) / LOG2E, mask=live)


@triton.jit(do_not_specialize=["N"])
def _attention_short_backward(
    q_ptr,
    k_ptr,
    v_ptr,
    gamma_ptr,
    phases_ptr,
    order_ptr,
    starts_ptr,
    work_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dgamma_ptr,
    N,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: whole segments, one head; every row is read once. delta = sum_d out * grad is made
    on the way.
    """
    h = tl.program_id(0)
    d = tl.arange(0, PAD_D)[None, :]
    for i in range(tl.program_id(1), tl.load(work_ptr), tl.num_programs(1)):
        segment = tl.load(work_ptr + 2 * i + 2)
        begin, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        k_at = begin + tl.arange(0, ROWS)
        k_live = k_at < end
        k_mask = k_live[:, None] if D == PAD_D else k_live[:, None] & (d < D)
        k_row = tl.load(order_ptr + k_at, mask=k_live, other=0).to(tl.int64)[:, None]
        k = tl.load(k_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
        v = tl.load(v_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
        dgamma = tl.zeros([PAD_D], tl.float32)
        if phases_ptr is not None:
            k = _rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
        if gamma_ptr is not None:
            k = _norm(k, gamma_ptr + (H + h) * D, D, PAD_D)
        dk = tl.zeros([ROWS, PAD_D], tl.float32)
        dv = tl.zeros([ROWS, PAD_D], tl.float32)
        for m in tl.range(begin, end, STEP, num_stages=STAGES):
            at = m + tl.arange(0, STEP)
            live = at < end
            mask = live[:, None] if D == PAD_D else live[:, None] & (d < D)
            row = tl.load(order_ptr + at, mask=live, other=0).to(tl.int64)[:, None]
            x = tl.load(q_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
            g = tl.load(grad_ptr + row * (H * D) + h * D + d, mask=mask, other=0.0)
            out = tl.load(out_ptr + row * (H * D) + h * D + d, mask=mask, other=0.0)
            lse = tl.load(lse_ptr + h * N + at, mask=live, other=0.0) * LOG2E
            if phases_ptr is not None:
                x = _rotate(x, phases_ptr, row, live, 1, D, PAD_D)
            q = x if gamma_ptr is None else _norm(x, gamma_ptr + h * D, D, PAD_D)
            delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
            # [ROWS, STEP]: keys x queries
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
            p = tl.exp2(tl.where(k_live[:, None], s, float("-inf")) - lse[None, :])
            dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(g), input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee")
            dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * scale  # [STEP, PAD_D]
            if gamma_ptr is not None:
                dq, part = _norm_backward(dq, x, gamma_ptr + h * D, D, PAD_D)
                dgamma += part
            if phases_ptr is not None:
                dq = _rotate(dq, phases_ptr, row, live, -1, D, PAD_D)
            tl.store(dq_ptr + row * STRIDE + h * D + d, dq.to(dq_ptr.dtype.element_ty), mask=mask)
        dk *= scale
        if gamma_ptr is not None:
            at = dgamma_ptr + (i * 2 * H + h) * D + tl.arange(0, PAD_D)
            tl.store(at, dgamma, mask=tl.arange(0, PAD_D) < D)
            k = tl.load(k_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
            if phases_ptr is not None:
                k = _rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
            dk, dgamma = _norm_backward(dk, k, gamma_ptr + (H + h) * D, D, PAD_D)
            tl.store(at + H * D, dgamma, mask=tl.arange(0, PAD_D) < D)
        if phases_ptr is not None:
            dk = _rotate(dk, phases_ptr, k_row, k_live, -1, D, PAD_D)
        tl.store(dk_ptr + k_row * STRIDE + h * D + d, dk.to(dk_ptr.dtype.element_ty), mask=k_mask)
        tl.store(dv_ptr + k_row * STRIDE + h * D + d, dv.to(dv_ptr.dtype.element_ty), mask=k_mask)


@triton.jit(do_not_specialize=["N"])
def _attention_long_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    gamma_ptr,
    phases_ptr,
    order_ptr,
    keys_ptr,
    q_starts_ptr,
    k_starts_ptr,
    work_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    dq_ptr,
    delta_ptr,
    dgamma_ptr,
    N,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: dq of tiles of ROWS queries, one head, over the segment's keys; and their delta,
    for the next kernel.
    """
    h = tl.program_id(0)
    d = tl.arange(0, PAD_D)[None, :]
    for i in range(tl.program_id(1), tl.load(work_ptr), tl.num_programs(1)):
        segment = tl.load(work_ptr + 2 * i + 2)
        at = tl.load(work_ptr + 2 * i + 3) + tl.arange(0, ROWS)
        live = at < tl.load(q_starts_ptr + segment + 1)
        mask = live[:, None] if D == PAD_D else live[:, None] & (d < D)
        row = (at if order_ptr is None else tl.load(order_ptr + at, mask=live, other=0)).to(
            tl.int64
        )[:, None]
        q = tl.load(q_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
        g = tl.load(grad_ptr + row * (H * D) + h * D + d, mask=mask, other=0.0)
        out = tl.load(out_ptr + row * (H * D) + h * D + d, mask=mask, other=0.0)
        lse = tl.load(lse_ptr + h * N + at, mask=live, other=0.0) * LOG2E
        if phases_ptr is not None:
            q = _rotate(q, phases_ptr, row, live, 1, D, PAD_D)
        if gamma_ptr is not None:
            q = _norm(q, gamma_ptr + h * D, D, PAD_D)
        delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
        tl.store(delta_ptr + h * N + at, delta, mask=live)
        dq = tl.zeros([ROWS, PAD_D], tl.float32)
        k_end = tl.load(k_starts_ptr + segment + 1)
        for n in tl.range(tl.load(k_starts_ptr + segment), k_end, STEP, num_stages=STAGES):
            k_at = n + tl.arange(0, STEP)
            k_live = k_at < k_end
            k_mask = k_live[:, None] if D == PAD_D else k_live[:, None] & (d < D)
            k_row = (
                k_at if keys_ptr is None else tl.load(keys_ptr + k_at, mask=k_live, other=0)
            ).to(tl.int64)[:, None]
            k = tl.load(k_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
            v = tl.load(v_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
            if phases_ptr is not None:
                k = _rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
            if gamma_ptr is not None:
                k = _norm(k, gamma_ptr + (H + h) * D, D, PAD_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [ROWS, STEP]
            p = tl.exp2(tl.where(k_live[None, :], s, float("-inf")) - lse[:, None])
            dp = tl.dot(g, tl.trans(v), input_precision="ieee")
            dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision="ieee")
        dq *= scale
        if gamma_ptr is not None:
            q = tl.load(q_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
            if phases_ptr is not None:
                q = _rotate(q, phases_ptr, row, live, 1, D, PAD_D)
            dq, dgamma = _norm_backward(dq, q, gamma_ptr + h * D, D, PAD_D)
            tl.store(
                dgamma_ptr + (i * 2 * H + h) * D + tl.arange(0, PAD_D),
                dgamma,
                mask=tl.arange(0, PAD_D) < D,
            )
        if phases_ptr is not None:
            dq = _rotate(dq, phases_ptr, row, live, -1, D, PAD_D)
        tl.store(dq_ptr + row * STRIDE + h * D + d, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _attention_long_dkv(
    q_ptr,
    k_ptr,
    v_ptr,
    gamma_ptr,
    phases_ptr,
    order_ptr,
    keys_ptr,
    q_starts_ptr,
    k_starts_ptr,
    work_ptr,
    lse_ptr,
    delta_ptr,
    grad_ptr,
    dk_ptr,
    dv_ptr,
    dgamma_ptr,
    N,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    PAD_D: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    BY_POSITION: tl.constexpr,
):
    """A program: dk and dv of tiles of ROWS keys, one head, over the segment's queries.

    They are stored by position [K, H, D], for `_sum_uses`, where a row may be a key more than once.
    """
    h = tl.program_id(0)
    d = tl.arange(0, PAD_D)[None, :]
    for i in range(tl.program_id(1), tl.load(work_ptr), tl.num_programs(1)):
        segment = tl.load(work_ptr + 2 * i + 2)
        k_at = tl.load(work_ptr + 2 * i + 3) + tl.arange(0, ROWS)
        k_live = k_at < tl.load(k_starts_ptr + segment + 1)
        k_mask = k_live[:, None] if D == PAD_D else k_live[:, None] & (d < D)
        k_row = (k_at if keys_ptr is None else tl.load(keys_ptr + k_at, mask=k_live, other=0)).to(
            tl.int64
        )[:, None]
        k = tl.load(k_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
        v = tl.load(v_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
        if phases_ptr is not None:
            k = _rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
        if gamma_ptr is not None:
            k = _norm(k, gamma_ptr + (H + h) * D, D, PAD_D)
        dk = tl.zeros([ROWS, PAD_D], tl.float32)
        dv = tl.zeros([ROWS, PAD_D], tl.float32)
        q_end = tl.load(q_starts_ptr + segment + 1)
        for m in tl.range(tl.load(q_starts_ptr + segment), q_end, STEP, num_stages=STAGES):
            at = m + tl.arange(0, STEP)
            live = at < q_end
            mask = live[:, None] if D == PAD_D else live[:, None] & (d < D)
            row = (at if order_ptr is None else tl.load(order_ptr + at, mask=live, other=0)).to(
                tl.int64
            )[:, None]
            q = tl.load(q_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
            g = tl.load(grad_ptr + row * (H * D) + h * D + d, mask=mask, other=0.0)
            lse = tl.load(lse_ptr + h * N + at, mask=live, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + h * N + at, mask=live, other=0.0)
            if phases_ptr is not None:
                q = _rotate(q, phases_ptr, row, live, 1, D, PAD_D)
            if gamma_ptr is not None:
                q = _norm(q, gamma_ptr + h * D, D, PAD_D)
            # [ROWS, STEP]: keys x queries
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
            p = tl.exp2(tl.where(k_live[:, None], s, float("-inf")) - lse[None, :])
            dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(g), input_precision="ieee")
            dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision="ieee")
        dk *= scale
        if gamma_ptr is not None:
            k = tl.load(k_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
            if phases_ptr is not None:
                k = _rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
            dk, dgamma = _norm_backward(dk, k, gamma_ptr + (H + h) * D, D, PAD_D)
            tl.store(
                dgamma_ptr + ((i * 2 + 1) * H + h) * D + tl.arange(0, PAD_D),
                dgamma,
                mask=tl.arange(0, PAD_D) < D,
            )
        if phases_ptr is not None:
            dk = _rotate(dk, phases_ptr, k_row, k_live, -1, D, PAD_D)
        to = k_at.to(tl.int64)[:, None] * (H * D) if BY_POSITION else k_row * STRIDE
        tl.store(dk_ptr + to + h * D + d, dk.to(dk_ptr.dtype.element_ty), mask=k_mask)
        tl.store(dv_ptr + to + h * D + d, dv.to(dv_ptr.dtype.element_ty), mask=k_mask)


@triton.jit(do_not_specialize=["N"])
def _sum_uses(
    dk_uses_ptr,
    dv_uses_ptr,
    uses_ptr,
    use_starts_ptr,
    dk_ptr,
    dv_ptr,
    N,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dk and dv of each row, C = H D channels: the sum over its uses as a key, in their order. A
    program: ROWS x BLOCK.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    begin = tl.load(use_starts_ptr + row, mask=row < N, other=0)
    end = tl.load(use_starts_ptr + row + 1, mask=row < N, other=0)
    dk = tl.zeros([ROWS, BLOCK], tl.float32)
    dv = tl.zeros([ROWS, BLOCK], tl.float32)
    for t in range(0, tl.max(end - begin)):
        live = begin + t < end
        use = tl.load(uses_ptr + begin + t, mask=live, other=0).to(tl.int64)[:, None]
        mask = live[:, None] & (c < C)
        dk += tl.load(dk_uses_ptr + use * C + c, mask=mask, other=0.0)
        dv += tl.load(dv_uses_ptr + use * C + c, mask=mask, other=0.0)
    mask = (row < N)[:, None] & (c < C)
    to = row.to(tl.int64)[:, None] * STRIDE + c
    tl.store(dk_ptr + to, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=mask)
