"""Parts of the attention kernels: rotation and q/k norm of a tile of rows, the list of tiles."""

from kernels.backend import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
EPSILON = tl.constexpr(1e-12)  # least norm of a row in the q/k norm


@triton.constexpr_function
def padded(D):
    """Head channels that a tile has: a power of two that a product of matrices accepts."""
    return max(16, triton.next_power_of_2(D))


@triton.jit
def rotate(x, phases_ptr, row, live, SIGN: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr):
    """Turn pairs of channels (2 i, 2 i + 1) of rows [ROWS, PAD_D] by their phases, in their type.

    SIGN -1 turns back.
    """
    d = tl.arange(0, PAD_D)[None, :]
    phases = tl.load(phases_ptr + row * D + d, mask=live[:, None] & (d < D), other=0.0)
    cos, sin = tl.split(tl.reshape(phases, [x.shape[0], PAD_D // 2, 2]))
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [x.shape[0], PAD_D // 2, 2]))
    sin *= SIGN
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, [x.shape[0], PAD_D]).to(x.dtype)


@triton.jit
def head_norm(x, gamma_ptr, D: tl.constexpr, PAD_D: tl.constexpr):
    """RMS norm of q or k rows [ROWS, PAD_D] of one head, in their type; gamma_ptr is the head's."""
    d = tl.arange(0, PAD_D)
    gamma = tl.load(gamma_ptr + d, mask=d < D, other=0.0) * (D**0.5)
    wide = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(wide * wide, 1))
    return (wide * (1.0 / tl.maximum(norm, EPSILON))[:, None] * gamma[None, :]).to(x.dtype)


@triton.jit
def head_norm_backward(grad, x, gamma_ptr, D: tl.constexpr, PAD_D: tl.constexpr):
    """Gradients of `head_norm`: of the rows [ROWS, PAD_D], and of gamma [PAD_D] over them."""
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


@triton.jit(do_not_specialize=["M", "N", "low", "high", "rows"])
def _list_tiles(starts_ptr, other_starts_ptr, work_ptr, M, N, low, high, rows, BLOCK: tl.constexpr):
    """List the tiles of the segments of low < length <= high, in one program.

    work: the number of tiles, N and two unused numbers, then of each tile its first position, the
    end of its segment, and the range of the segment on the other side.
    """
    total = 0
    for m0 in range(0, M, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        begin = tl.load(starts_ptr + m, mask=m < M, other=0)
        end = tl.load(starts_ptr + m + 1, mask=m < M, other=0)
        other = tl.load(other_starts_ptr + m, mask=m < M, other=0)
        other_end = tl.load(other_starts_ptr + m + 1, mask=m < M, other=0)
        size = end - begin
        tiles = tl.where((size > low) & (size <= high), (size + rows - 1) // rows, 0)  # [BLOCK]
        slot = work_ptr + 4 * (total + 1 + tl.cumsum(tiles) - tiles)
        for t in range(0, tl.max(tiles)):
            tl.store(slot + 4 * t, begin + t * rows, mask=t < tiles)
            tl.store(slot + 4 * t + 1, end, mask=t < tiles)
            tl.store(slot + 4 * t + 2, other, mask=t < tiles)
            tl.store(slot + 4 * t + 3, other_end, mask=t < tiles)
        total += tl.sum(tiles)
    tl.store(work_ptr, total)
    tl.store(work_ptr + 1, N)
