"""Sums over the pixels of many Gaussians at once as products of matrices, in Triton.

Tensor cores take numbers of TF32, whose 11 bits hold the pixels' places; other factors are split.
"""

from kernels.backend import tl, triton


@triton.jit
def short(a):
    """Round to the 11 bits of TF32."""
    return ((a.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b):
    """Return a [K, pixels] times b [pixels, 8], a split into two terms of TF32's 11 bits.

    The running sum along an axis of one changes nothing, but keeps Triton from computing all of
    `a` in the layout of the product, where each row would pass through shared memory alone.
    """
    a = tl.reshape(tl.cumsum(tl.reshape(a, [1, a.shape[0], a.shape[1]]), 0), a.shape)
    high = short(a)
    # the small terms first: added to the large ones each would round the whole sum
    return tl.dot(high, b, tl.dot(a - high, b))


@triton.jit
def powers(u, v, column):
    """Return minus 1, u, v of pixels and five times 0 as columns [pixels, 8]."""
    return -tl.where(column == 0, 1.0, tl.where(column == 1, u, tl.where(column == 2, v, 0.0)))


@triton.jit
def halves(r, g, b, column):
    """Return r, g, b [pixels, 1] as columns [pixels, 8]: three of 11 bits, three of the rest."""
    a = tl.where(column % 3 == 0, r, tl.where(column % 3 == 1, g, b))
    high = short(a)
    return tl.where(column < 3, high, tl.where(column < 6, short(a - high), 0.0))
