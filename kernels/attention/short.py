"""The attention kernels for segments that are one tile: N rows, M segments, H heads.

C = H D channels; D head channels are padded to PAD_D, a power of two. Arguments, here and in
`long`, in groups that travel together:

  qkv, or q, k, v     [N, 3, H, D]; or three of [rows, H, D] with one stride: parts of qkv, or alone
  gamma, phases       [2, H, D] fp32, None: no q/k norm; [N, D / 2, 2] fp32, None: no rotation
  order, keys         [N] int32: the row at each position; [K] of the keys, None: as the queries
  work                [1 + tiles, 4] int32, as `_list_tiles` lists them
  out, lse            [N, H, D]; [H, N] fp32 by position: log sum exp of the scores
  grad, delta         the gradient of out; [H, N] fp32 by position: sum of out * grad
  dqkv or dq, dk, dv  as qkv or q, k, v
  dgamma              [tiles, 2, H, D] fp32

Program axis 0 is the head, or a group: heads share the lines of a row. Axis 1 strides over the
tiles in `work`. Padded rows load as zeros: a padded query adds nothing to dk and dv, a padded key
is masked out of the softmax. Loops call no helper except the rotation and the norm: Triton's
interpreter pays milliseconds for each call.
"""

from kernels.attention.rows import LOG2E, head_norm, head_norm_backward, padded, rotate
from kernels.backend import tl, triton


@triton.jit
def _attention_short(
    qkv_ptr,
    gamma_ptr,
    phases_ptr,
    order_ptr,
    work_ptr,
    out_ptr,
    lse_ptr,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: whole segments, HEADS heads of each."""
    PAD_D: tl.constexpr = padded(D)
    C: tl.constexpr = H * D
    d = tl.arange(0, PAD_D)[None, :]
    h0 = tl.program_id(0) * HEADS
    N = tl.load(work_ptr + 1)
    for i in range(tl.program_id(1), tl.load(work_ptr), tl.num_programs(1)):
        at = tl.load(work_ptr + 4 * i + 4) + tl.arange(0, ROWS)
        live = at < tl.load(work_ptr + 4 * i + 5)
        mask = live[:, None] if D == PAD_D else live[:, None] & (d < D)
        row = tl.load(order_ptr + at, mask=live, other=0).to(tl.int64)[:, None]
        for h in tl.range(h0, tl.minimum(h0 + HEADS, H), num_stages=STAGES):
            q = tl.load(qkv_ptr + row * (3 * C) + h * D + d, mask=mask, other=0.0)
            k = tl.load(qkv_ptr + row * (3 * C) + C + h * D + d, mask=mask, other=0.0)
            v = tl.load(qkv_ptr + row * (3 * C) + 2 * C + h * D + d, mask=mask, other=0.0)
            if phases_ptr is not None:
                q = rotate(q, phases_ptr, row, live, 1, D, PAD_D)
                k = rotate(k, phases_ptr, row, live, 1, D, PAD_D)
            if gamma_ptr is not None:
                q = head_norm(q, gamma_ptr + h * D, D, PAD_D)
                k = head_norm(k, gamma_ptr + (H + h) * D, D, PAD_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [ROWS, ROWS]
            s = tl.where(live[None, :], s, float("-inf"))
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
            out = out.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * C + h * D + d, out, mask=mask)
            tl.store(lse_ptr + h * N + at, (top + tl.log2(total)) / LOG2E, mask=live)


@triton.jit
def _attention_short_backward(
    qkv_ptr,
    gamma_ptr,
    phases_ptr,
    order_ptr,
    work_ptr,
    out_ptr,
    lse_ptr,
    grad_ptr,
    dqkv_ptr,
    dgamma_ptr,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: whole segments, one head; every row is read once, delta is made on the way."""
    PAD_D: tl.constexpr = padded(D)
    h = tl.program_id(0)
    H = tl.num_programs(0)
    C = H * D
    d = tl.arange(0, PAD_D)[None, :]
    N = tl.load(work_ptr + 1)
    for i in range(tl.program_id(1), tl.load(work_ptr), tl.num_programs(1)):
        begin = tl.load(work_ptr + 4 * i + 4)
        end = tl.load(work_ptr + 4 * i + 5)
        k_at = begin + tl.arange(0, ROWS)
        k_live = k_at < end
        k_mask = k_live[:, None] if D == PAD_D else k_live[:, None] & (d < D)
        k_row = tl.load(order_ptr + k_at, mask=k_live, other=0).to(tl.int64)[:, None]
        k = tl.load(qkv_ptr + k_row * (3 * C) + C + h * D + d, mask=k_mask, other=0.0)
        v = tl.load(qkv_ptr + k_row * (3 * C) + 2 * C + h * D + d, mask=k_mask, other=0.0)
        dgamma = tl.zeros([PAD_D], tl.float32)
        if phases_ptr is not None:
            k = rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
        if gamma_ptr is not None:
            k = head_norm(k, gamma_ptr + (H + h) * D, D, PAD_D)
        dk = tl.zeros([ROWS, PAD_D], tl.float32)
        dv = tl.zeros([ROWS, PAD_D], tl.float32)
        for m in tl.range(begin, end, STEP, num_stages=STAGES):
            at = m + tl.arange(0, STEP)
            live = at < end
            mask = live[:, None] if D == PAD_D else live[:, None] & (d < D)
            row = tl.load(order_ptr + at, mask=live, other=0).to(tl.int64)[:, None]
            x = tl.load(qkv_ptr + row * (3 * C) + h * D + d, mask=mask, other=0.0)
            g = tl.load(grad_ptr + row * C + h * D + d, mask=mask, other=0.0)
            out = tl.load(out_ptr + row * C + h * D + d, mask=mask, other=0.0)
            lse = tl.load(lse_ptr + h * N + at, mask=live, other=0.0) * LOG2E
            if phases_ptr is not None:
                x = rotate(x, phases_ptr, row, live, 1, D, PAD_D)
            q = x if gamma_ptr is None else head_norm(x, gamma_ptr + h * D, D, PAD_D)
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
                dq, part = head_norm_backward(dq, x, gamma_ptr + h * D, D, PAD_D)
                dgamma += part
            if phases_ptr is not None:
                dq = rotate(dq, phases_ptr, row, live, -1, D, PAD_D)
            dq = dq.to(dqkv_ptr.dtype.element_ty)
            tl.store(dqkv_ptr + row * (3 * C) + h * D + d, dq, mask=mask)
        dk *= scale
        if gamma_ptr is not None:
            at = dgamma_ptr + (i * 2 * H + h) * D + tl.arange(0, PAD_D)
            tl.store(at, dgamma, mask=tl.arange(0, PAD_D) < D)
            k = tl.load(qkv_ptr + k_row * (3 * C) + C + h * D + d, mask=k_mask, other=0.0)
            if phases_ptr is not None:
                k = rotate(k, phases_ptr, k_row, k_live, 1, D, PAD_D)
            dk, dgamma = head_norm_backward(dk, k, gamma_ptr + (H + h) * D, D, PAD_D)
            tl.store(at + C, dgamma, mask=tl.arange(0, PAD_D) < D)
        if phases_ptr is not None:
            dk = rotate(dk, phases_ptr, k_row, k_live, -1, D, PAD_D)
        dk = dk.to(dqkv_ptr.dtype.element_ty)
        dv = dv.to(dqkv_ptr.dtype.element_ty)
        tl.store(dqkv_ptr + k_row * (3 * C) + C + h * D + d, dk, mask=k_mask)
        tl.store(dqkv_ptr + k_row * (3 * C) + 2 * C + h * D + d, dv, mask=k_mask)
