"""The geometry of a projected Gaussian as Triton functions: rotations, the filter, and their
gradients.
"""

from kernels.backend import tl, triton


@triton.jit
def dot3(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@triton.jit
def cross3(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@triton.jit
def load3(ptr, live):
    return tl.load(ptr, live, 0.0), tl.load(ptr + 1, live, 0.0), tl.load(ptr + 2, live, 0.0)


@triton.jit
def load_camera(cameras_ptr, v):
    """One view's rotation rows, translation, focal lengths and principal point (px): scalars."""
    c = cameras_ptr + v * 16
    rows = load3(c, True), load3(c + 3, True), load3(c + 6, True)
    return (
        rows,
        load3(c + 9, True),
        (tl.load(c + 12), tl.load(c + 13)),
        (tl.load(c + 14), tl.load(c + 15)),
    )


@triton.jit
def rotated(r, q):
    """The rows of r Q(q): scalars r, vectors q = (w, x, y, z), not normalised."""
    w, x, y, z = q
    q0 = 1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)
    q1 = 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)
    q2 = 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)
    c0, c1, c2 = (q0[0], q1[0], q2[0]), (q0[1], q1[1], q2[1]), (q0[2], q1[2], q2[2])
    return (
        (dot3(r[0], c0), dot3(r[0], c1), dot3(r[0], c2)),
        (dot3(r[1], c0), dot3(r[1], c1), dot3(r[1], c2)),
        (dot3(r[2], c0), dot3(r[2], c1), dot3(r[2], c2)),
    )


@triton.jit
def clamped_ratio(x, z, focal, centre, size):
    """x/z clamped to 1.3 times the half field of view (from an off-centre principal point: the same
    margin), and whether it was left alone.
    """
    low = -(centre + 0.15 * size) / focal
    high = (size - centre + 0.15 * size) / focal
    t = x / z
    return tl.minimum(tl.maximum(t, low), high), (t >= low) & (t <= high)


@triton.jit
def axis_row(a, b, t, f):
    """Row of J R Q: f (a - t b)."""
    return f * (a[0] - t * b[0]), f * (a[1] - t * b[1]), f * (a[2] - t * b[2])


@triton.jit
def scaled3(a, s):
    return a[0] * s[0], a[1] * s[1], a[2] * s[2]


@triton.jit
def filtered(n0, n1, kernel_size):
    """a, b, c of the unfiltered covariance, n0 x n1, and the determinants before and after the
    filter.
    """
    w = cross3(n0, n1)
    a = dot3(n0, n0)
    b = dot3(n0, n1)
    c = dot3(n1, n1)
    before = dot3(w, w)
    return a, b, c, w, before, before + kernel_size * (a + c) + kernel_size * kernel_size


@triton.jit
def compensated(before, after):
    rho = tl.sqrt(before / (after + EPS) + EPS)
    return tl.where((before > EPS) & (after > EPS), rho, 0.0)


@triton.jit
def tile_range(mean, radius, reach, tiles):
    """Tiles that a square of `radius` touches by the published rule, less those farther than
    `reach`, where alpha is below 1/255 in every pixel. Clamping before the conversion keeps it
    defined for any float.
    """
    low = tl.maximum((mean - radius) / 16, tl.floor((mean - reach) / 16))
    high = tl.minimum((mean + radius + 15) / 16, tl.floor((mean + reach) / 16) + 1)
    most = tiles * 1.0
    return tl.minimum(tl.maximum(low, 0.0), most).to(tl.int32), tl.minimum(
        tl.maximum(high, 0.0), most
    ).to(tl.int32)


@triton.jit
def add3(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def masked3(mask, a):
    return tl.where(mask, a[0], 0.0), tl.where(mask, a[1], 0.0), tl.where(mask, a[2], 0.0)


@triton.jit
def times3(a, k):
    return a[0] * k, a[1] * k, a[2] * k


@triton.jit
def rotate_back(r, v):
    """The transpose of scalars r times vectors v."""
    return (
        r[0][0] * v[0] + r[1][0] * v[1] + r[2][0] * v[2],
        r[0][1] * v[0] + r[1][1] * v[1] + r[2][1] * v[2],
        r[0][2] * v[0] + r[1][2] * v[1] + r[2][2] * v[2],
    )


@triton.jit
def quaternion_gradient(q, h0, h1, h2):
    """Of the rows h of the gradient of Q(q)."""
    w, x, y, z = q
    return (
        2 * (z * (h1[0] - h0[1]) + y * (h0[2] - h2[0]) + x * (h2[1] - h1[2])),
        2 * (y * (h0[1] + h1[0]) + z * (h0[2] + h2[0]) + w * (h2[1] - h1[2]))
        - 4 * x * (h1[1] + h2[2]),
        2 * (x * (h0[1] + h1[0]) + w * (h0[2] - h2[0]) + z * (h2[1] + h1[2]))
        - 4 * y * (h0[0] + h2[2]),
        2 * (w * (h1[0] - h0[1]) + x * (h0[2] + h2[0]) + y * (h2[1] + h1[2]))
        - 4 * z * (h0[0] + h1[1]),
    )


EPS = tl.constexpr(1e-6)
