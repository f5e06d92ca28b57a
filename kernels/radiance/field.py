"""The radiance field at a sample as Triton functions: taps, density, opacity, colour."""

from kernels.backend import tl, triton

STOP = tl.constexpr(1e-3)  # a ray ends behind the sample at which its transmittance falls below
CLAMP = tl.constexpr(0.999)  # the largest opacity of a sample


@triton.jit
def load_taps(axis_ptr, q, rank, valid, R, DIM: tl.constexpr):
    """Interpolate along one axis: return index and weight [L, K], and values [L, K, RANKS].

    The index is that of the lower tap, the weight that of the upper one.
    """
    i = tl.minimum(tl.maximum(q, 0.0), DIM - 2.0).to(tl.int32)
    w = q - i
    at = (axis_ptr + i * R)[:, :, None] + rank[None, None, :]
    a = tl.load(at, valid, 0.0)
    b = tl.load(at + R, valid, 0.0)
    return i, w, a + w[:, :, None] * (b - a)


@triton.jit
def along_ray(path_ptr, k, live):
    """Return one coordinate of sample k [L, K] of segments [L].

    The increment of a coordinate stands 4 places behind that of the first sample.
    """
    first = tl.load(path_ptr, live, 0.0)
    return first[:, None] + tl.load(path_ptr + 4, live, 0.0)[:, None] * k


@triton.jit
def softplus(s):
    """Return softplus, linear from 10 on, and its derivative."""
    decayed = tl.exp(-tl.abs(s))
    inverse = 1 / (1 + decayed)
    smooth = tl.maximum(s, 0.0) + tl.log(1 + decayed)
    slope = tl.where(s < 0, decayed * inverse, inverse)
    return tl.where(s < 10, smooth, s), tl.where(s < 10, slope, 1.0)


@triton.jit
def opacity(x):
    """Return min(1 - exp(-x), 0.999), by its series where the difference would cancel."""
    series = x * (1 - x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120)))))
    return tl.minimum(tl.where(x < 0.125, series, 1 - tl.exp(-x)), CLAMP)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tap_weights(i, w, DIM_P: tl.constexpr):
    """Return the weight of every tap [L, K, DIM_P]: 1 - w at tap i, w at i + 1, else 0."""
    tap = tl.arange(0, DIM_P)[None, None, :]
    i = i[:, :, None]
    w = w[:, :, None]
    return tl.where(tap == i, 1 - w, tl.where(tap == i + 1, w, 0.0))


@triton.jit
def contract(a, b, total, L: tl.constexpr, K: tl.constexpr, M: tl.constexpr, RANKS: tl.constexpr):
    """Add the sum over the samples of a [L, K, M] times b [L, K, RANKS] to total, in fp32."""
    a = tl.reshape(a, [L * K, M])
    b = tl.reshape(b, [L * K, RANKS])
    return tl.dot(tl.trans(a), b, total, input_precision="ieee")
