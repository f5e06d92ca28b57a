"""The attention kernels for segments longer than a tile, which walk the other side in steps.

Arguments as in `short`. q, k and v are separate, because queries and keys may be. Without `order`,
positions are rows; without `keys`, the keys are the rows of the queries.
"""

from kernels.attention.rows import LOG2E, head_norm, head_norm_backward, padded, rotate
from kernels.backend import tl, triton


@triton.jit
def _attention_long(
    q_ptr,
    k_ptr,
    v_ptr,
    gamma_ptr,
    phases_ptr,
    order_ptr,
    keys_ptr,
    work_ptr,
    out_ptr,
    lse_ptr,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: tiles of ROWS queries of a segment, one head, over the segment's keys."""
    PAD_D: tl.constexpr = padded(D)
    h = tl.program_id(0)
    H = tl.num_programs(0)
    C = H * D
    STRIDE = C if order_ptr is None else 3 * C
    rows_ptr = order_ptr if keys_ptr is None else keys_ptr
    d = tl.arange(0, PAD_D)[None, :]
    N = tl.load(work_ptr + 1)
    for i in range(tl.program_id(1), tl.load(work_ptr), tl.num_programs(1)):
        at = tl.load(work_ptr + 4 * i + 4) + tl.arange(0, ROWS)
        live = at < tl.load(work_ptr + 4 * i + 5)
        mask = live[:, None] if D == PAD_D else live[:, None] & (d < D)
        row = at if order_ptr is None else tl.load(order_ptr + at, mask=live, other=0)
        row = row.to(tl.int64)[:, None]
        q = tl.load(q_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
        if phases_ptr is not None:
            q = rotate(q, phases_ptr, row, live, 1, D, PAD_D)
        if gamma_ptr is not None:
            q = head_norm(q, gamma_ptr + h * D, D, PAD_D)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, PAD_D], tl.float32)
        k_end = tl.load(work_ptr + 4 * i + 7)
        for n in tl.range(tl.load(work_ptr + 4 * i + 6), k_end, STEP, num_stages=STAGES):
            k_at = n + tl.arange(0, STEP)
            k_live = k_at < k_end
            k_mask = k_live[:, None] if D == PAD_D else k_live[:, None] & (d < D)
            k_row = k_at if rows_ptr is None else tl.load(rows_ptr + k_at, mask=k_live, other=0)
            k_row = k_row.to(tl.int64)[:, None]
            k = tl.load(k_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
            v = tl.load(v_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
            if phases_ptr is not None:
                k = rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
            if gamma_ptr is not None:
                k = head_norm(k, gamma_ptr + (H + h) * D, D, PAD_D)
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
        tl.store(out_ptr + row * C + h * D + d, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_ptr + h * N + at, (top + tl.log2(total)) / LOG2E, mask=live)


@triton.jit
def _attention_long_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    gamma_ptr,
    phases_ptr,
    order_ptr,
    keys_ptr,
    work_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    dq_ptr,
    delta_ptr,
    dgamma_ptr,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: dq of tiles of ROWS queries, one head, over the segment's keys.

    It stores their delta for the next kernel.
    """
    PAD_D: tl.constexpr = padded(D)
    h = tl.program_id(0)
    H = tl.num_programs(0)
    C = H * D
    STRIDE = C if order_ptr is None else 3 * C
    rows_ptr = order_ptr if keys_ptr is None else keys_ptr
    d = tl.arange(0, PAD_D)[None, :]
    N = tl.load(work_ptr + 1)
    for i in range(tl.program_id(1), tl.load(work_ptr), tl.num_programs(1)):
        at = tl.load(work_ptr + 4 * i + 4) + tl.arange(0, ROWS)
        live = at < tl.load(work_ptr + 4 * i + 5)
        mask = live[:, None] if D == PAD_D else live[:, None] & (d < D)
        row = at if order_ptr is None else tl.load(order_ptr + at, mask=live, other=0)
        row = row.to(tl.int64)[:, None]
        q = tl.load(q_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
        g = tl.load(grad_ptr + row * C + h * D + d, mask=mask, other=0.0)
        out = tl.load(out_ptr + row * C + h * D + d, mask=mask, other=0.0)
        lse = tl.load(lse_ptr + h * N + at, mask=live, other=0.0) * LOG2E
        if phases_ptr is not None:
            q = rotate(q, phases_ptr, row, live, 1, D, PAD_D)
        if gamma_ptr is not None:
            q = head_norm(q, gamma_ptr + h * D, D, PAD_D)
        delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
        tl.store(delta_ptr + h * N + at, delta, mask=live)
        dq = tl.zeros([ROWS, PAD_D], tl.float32)
        k_end = tl.load(work_ptr + 4 * i + 7)
        for n in tl.range(tl.load(work_ptr + 4 * i + 6), k_end, STEP, num_stages=STAGES):
            k_at = n + tl.arange(0, STEP)
            k_live = k_at < k_end
            k_mask = k_live[:, None] if D == PAD_D else k_live[:, None] & (d < D)
            k_row = k_at if rows_ptr is None else tl.load(rows_ptr + k_at, mask=k_live, other=0)
            k_row = k_row.to(tl.int64)[:, None]
            k = tl.load(k_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
            v = tl.load(v_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
            if phases_ptr is not None:
                k = rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
            if gamma_ptr is not None:
                k = head_norm(k, gamma_ptr + (H + h) * D, D, PAD_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [ROWS, STEP]
            p = tl.exp2(tl.where(k_live[None, :], s, float("-inf")) - lse[:, None])
            dp = tl.dot(g, tl.trans(v), input_precision="ieee")
            dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision="ieee")
        dq *= scale
        if gamma_ptr is not None:
            q = tl.load(q_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
            if phases_ptr is not None:
                q = rotate(q, phases_ptr, row, live, 1, D, PAD_D)
            dq, dgamma = head_norm_backward(dq, q, gamma_ptr + h * D, D, PAD_D)
            tl.store(
                dgamma_ptr + (i * 2 * H + h) * D + tl.arange(0, PAD_D),
                dgamma,
                mask=tl.arange(0, PAD_D) < D,
            )
        if phases_ptr is not None:
            dq = rotate(dq, phases_ptr, row, live, -1, D, PAD_D)
        tl.store(dq_ptr + row * STRIDE + h * D + d, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attention_long_dkv(
    q_ptr,
    k_ptr,
    v_ptr,
    gamma_ptr,
    phases_ptr,
    order_ptr,
    keys_ptr,
    work_ptr,
    lse_ptr,
    delta_ptr,
    grad_ptr,
    dk_ptr,
    dv_ptr,
    dgamma_ptr,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: dk and dv of tiles of ROWS keys, one head, over the segment's queries.

    With `keys` they are stored by position [K, H, D] for `_sum_uses`, because a row may be a key
    more than once.
    """
    PAD_D: tl.constexpr = padded(D)
    h = tl.program_id(0)
    H = tl.num_programs(0)
    C = H * D
    STRIDE = C if order_ptr is None else 3 * C
    rows_ptr = order_ptr if keys_ptr is None else keys_ptr
    d = tl.arange(0, PAD_D)[None, :]
    N = tl.load(work_ptr + 1)
    for i in range(tl.program_id(1), tl.load(work_ptr), tl.num_programs(1)):
        k_at = tl.load(work_ptr + 4 * i + 4) + tl.arange(0, ROWS)
        k_live = k_at < tl.load(work_ptr + 4 * i + 5)
        k_mask = k_live[:, None] if D == PAD_D else k_live[:, None] & (d < D)
        k_row = k_at if rows_ptr is None else tl.load(rows_ptr + k_at, mask=k_live, other=0)
        k_row = k_row.to(tl.int64)[:, None]
        k = tl.load(k_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
        v = tl.load(v_ptr + k_row * STRIDE + h * D + d, mask=k_mask, other=0.0)
        if phases_ptr is not None:
            k = rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
        if gamma_ptr is not None:
            k = head_norm(k, gamma_ptr + (H + h) * D, D, PAD_D)
        dk = tl.zeros([ROWS, PAD_D], tl.float32)
        dv = tl.zeros([ROWS, PAD_D], tl.float32)
        q_end = tl.load(work_ptr + 4 * i + 7)
        for m in tl.range(tl.load(work_ptr + 4 * i + 6), q_end, STEP, num_stages=STAGES):
            at = m + tl.arange(0, STEP)
            live = at < q_end
            mask = live[:, None] if D == PAD_D else live[:, None] & (d < D)
            row = at if order_ptr is None else tl.load(order_ptr + at, mask=live, other=0)
            row = row.to(tl.int64)[:, None]
            q = tl.load(q_ptr + row * STRIDE + h * D + d, mask=mask, other=0.0)
            g = tl.load(grad_ptr + row * C + h * D + d, mask=mask, other=0.0)
            lse = tl.load(lse_ptr + h * N + at, mask=live, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + h * N + at, mask=live, other=0.0)
            if phases_ptr is not None:
                q = rotate(q, phases_ptr, row, live, 1, D, PAD_D)
            if gamma_ptr is not None:
                q = head_norm(q, gamma_ptr + h * D, D, PAD_D)
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
                k = rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
            dk, dgamma = head_norm_backward(dk, k, gamma_ptr + (H + h) * D, D, PAD_D)
            tl.store(
                dgamma_ptr + ((i * 2 + 1) * H + h) * D + tl.arange(0, PAD_D),
                dgamma,
                mask=tl.arange(0, PAD_D) < D,
            )
        if phases_ptr is not None:
            dk = rotate(dk, phases_ptr, k_row, k_live, -1, D, PAD_D)
        to = k_row * STRIDE if keys_ptr is None else k_at.to(tl.int64)[:, None] * C
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
    """A program: dk and dv of ROWS rows, BLOCK of C = H D channels.

    They are sums over the uses of each row as a key, in their order.
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
