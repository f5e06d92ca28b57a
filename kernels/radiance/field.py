"""The radiance field at a sample as Triton functions: taps, density, opacity, colour."""

from kernels.backend import tl, triton

STOP, CLAMP = tl.constexpr(1e-3), tl.constexpr(0.999)


@triton.jit
def load_taps(axis_ptr, q, rank, valid, R, DIM: tl.constexpr):
    """One axis: index and weight [L, K] of the upper tap, and the interpolated values [L, K,
    RANKS].
    """
    i = tl.minimum(tl.maximum(q, 0.0), DIM - 2.0).to(tl.int32)
    w = q - i
    at = (axis_ptr + i * R)[:, :, None] + rank[None, None, :]
    a = tl.load(at, valid, 0.0)
    b = tl.load(at + R, valid, 0.0)
    return i, w, a + w[:, :, None] * (b - a)


@triton.jit
def along_ray(path_ptr, k, live):
    """One coordinate of sample k [L, K] of segments [L]; the increments stand 4 places behind the
    first sample's.
    """
    return tl.load(path_ptr, live, 0.0)[:, None] + tl.load(path_ptr + 4, live, 0.0)[:, None] * k


@triton.jit
def softplus(s):
    """softplus, linear from 10 on, and its derivative."""
    decayed = tl.exp(-tl.abs(s))
    inverse = 1 / (1 + decayed)
    smooth = tl.maximum(s, 0.0) + tl.log(1 + decayed)
    return tl.where(s < 10, smooth, s), tl.where(
        s < 10, tl.where(s < 0, decayed * inverse, inverse), 1.0
    )


@triton.jit
def opacity(x):
    """min(1 - exp(-x), 0.999), by its series where the difference would cancel."""
    series = x * (1 - x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120)))))
    return tl.minimum(tl.where(x < 0.125, series, 1 - tl.exp(-x)), CLAMP)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))
