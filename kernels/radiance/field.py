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
    other = None if valid is None else 0.0
    a = tl.load(at, valid, other)
    b = tl.load(at + R, valid, other)
    return i, w, tl.fma(w[:, :, None], b - a, a)


@triton.jit
def along_ray(path_ptr, k, live):
    """Return one coordinate of sample k [L, K] of segments [L].

    The increment of a coordinate stands 4 places behind that of the first sample.
    """
    first = tl.load(path_ptr, live, 0.0)
    return tl.fma(tl.load(path_ptr + 4, live, 0.0)[:, None], k.to(tl.float32), first[:, None])


@triton.jit
def inverse(x):
    """Return 1 / x of x >= 1, in half the instructions of a quotient, as precise on a GPU."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def softplus(s):
    """Return softplus, linear from 10 on, and its derivative."""
    decayed = tl.exp(-tl.abs(s))
    # log(1 + decayed) = 2 artanh(u) = 2 (u + u^3 / 3 + u^5 / 5 + ...)
    u = decayed * inverse(2 + decayed)
    series = tl.fma(u * u, 1 / 13, 1 / 11)
    series = tl.fma(u * u, series, 1 / 9)
    series = tl.fma(u * u, series, 1 / 7)
    series = tl.fma(u * u, series, 1 / 5)
    series = tl.fma(u * u, series, 1 / 3)
    series = tl.fma(u * u, series, 1.0)
    smooth = tl.fma(2 * u, series, tl.maximum(s, 0.0))
    slope = tl.where(s < 0, decayed, 1.0) * inverse(1 + decayed)
    return tl.where(s < 10, smooth, s), tl.where(s < 10, slope, 1.0)


@triton.jit
def opacity(x):
    """Return min(1 - exp(-x), 0.999), by its series where the difference would cancel."""
    series = tl.fma(-x, 1 / 120, 1 / 24)
    series = tl.fma(-x, series, 1 / 6)
    series = tl.fma(-x, series, 1 / 2)
    series = tl.fma(-x, series, 1.0)
    return tl.minimum(tl.where(x < 0.125, x * series, 1 - tl.exp(-x)), CLAMP)


@triton.jit
def sigmoid(x):
    return inverse(1 + tl.exp(-x))


@triton.jit
def no_totals(L: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr, COUNT: tl.constexpr):
    """Return COUNT sums [L, K, RANKS] of nothing."""
    totals = ()
    for _ in tl.static_range(COUNT):
        totals = totals + (tl.zeros([L, K, RANKS], tl.float32),)
    return totals


@triton.jit
def spread(totals, i, w, grad, DIM: tl.constexpr):
    """Add a gradient [L, K, RANKS] to the totals of the DIM taps, by their weights.

    They are 1 - w at tap i, w at i + 1, else 0. All DIM sums stay in registers, each lane's own:
    no lane can choose a register by its i.
    """
    added = ()
    for tap in tl.static_range(DIM):
        weight = tl.where(i == tap, 1 - w, tl.where(i == tap - 1, w, 0.0))
        added = added + (tl.fma(weight[:, :, None], grad, totals[tap]),)
    return added


@triton.jit
def store_totals(grad_ptr, totals, rank, R, COUNT: tl.constexpr):
    """Write the sums of COUNT totals over all samples, R numbers each."""
    for n in tl.static_range(COUNT):
        tl.store(grad_ptr + n * R + rank, tl.sum(tl.sum(totals[n], 0), 0), rank < R)
