"""Geometry of a projected Gaussian as Triton functions: rotations, the filter, their gradients.

A vector is a tuple of three; a matrix is a tuple of its rows. Symbols are as in
kernels.gaussian.project.
"""

from kernels.backend import tl, triton
from kernels.gaussian.columns import load_columns

EPS = tl.constexpr(1e-6)


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
def load_gaussian(gaussians_ptr, row, live, N: tl.constexpr):
    """Load center, scale, rotation (w, x, y, z), opacity and colour coefficients."""
    mx, my, mz, sx, sy, sz, qw, qx, qy, qz, opacity, r, g, b, _, _ = load_columns(
        gaussians_ptr, row, live, N, 14
    )
    return (mx, my, mz), (sx, sy, sz), (qw, qx, qy, qz), opacity, (r, g, b)


@triton.jit
def load_camera(cameras_ptr, v):
    """Load a view's rotation, translation, focal lengths and principal point (px): scalars."""
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
    """Return r Q(q) for scalars r and quaternions q = (w, x, y, z) that are not normalised."""
    w, x, y, z = q
    q0 = 1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)
    q1 = 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)
    q2 = 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)
    c0 = q0[0], q1[0], q2[0]
    c1 = q0[1], q1[1], q2[1]
    c2 = q0[2], q1[2], q2[2]
    return (
        (dot3(r[0], c0), dot3(r[0], c1), dot3(r[0], c2)),
        (dot3(r[1], c0), dot3(r[1], c1), dot3(r[1], c2)),
        (dot3(r[2], c0), dot3(r[2], c1), dot3(r[2], c2)),
    )


@triton.jit
def clamped_ratio(x, z, focal, centre, size):
    """Clamp x/z to 1.3 times the half field of view; return it and whether it was in range.

    With an off-centre principal point the margin is the same on both sides.
    """
    low = -(centre + 0.15 * size) / focal
    high = (size - centre + 0.15 * size) / focal
    t = x / z
    return tl.minimum(tl.maximum(t, low), high), (t >= low) & (t <= high)


@triton.jit
def axis_row(a, b, t, f):
    """Return a row of J R Q: f (a - t b)."""
    return f * (a[0] - t * b[0]), f * (a[1] - t * b[1]), f * (a[2] - t * b[2])


@triton.jit
def linearised(point, o, focal, centre, W, H):
    """Linearise the projection at a point: clamped x/z and y/z, whether in range, rows of J R Q."""
    x, y, z = point
    tx, free_x = clamped_ratio(x, z, focal[0], centre[0], W)
    ty, free_y = clamped_ratio(y, z, focal[1], centre[1], H)
    k0 = axis_row(o[0], o[2], tx, focal[0] / z)
    k1 = axis_row(o[1], o[2], ty, focal[1] / z)
    return (tx, ty), (free_x, free_y), (k0, k1)


@triton.jit
def scaled3(a, s):
    return a[0] * s[0], a[1] * s[1], a[2] * s[2]


@triton.jit
def filtered(n0, n1, kernel_size):
    """Return a, b, c of the covariance, n0 x n1, and the determinants without and with filter."""
    w = cross3(n0, n1)
    a = dot3(n0, n0)
    b = dot3(n0, n1)
    c = dot3(n1, n1)
    before = dot3(w, w)
    return a, b, c, w, before, before + kernel_size * (a + c) + kernel_size * kernel_size


@triton.jit
def compensated(before, after):
    """Return rho, the factor of the opacity, of the determinants without and with filter."""
    rho = tl.sqrt(before / (after + EPS) + EPS)
    return tl.where((before > EPS) & (after > EPS), rho, 0.0)


@triton.jit
def cell_range(mean, radius, reach, size, PARTS: tl.constexpr):
    """Return the first part of a tile and the end of the parts along an axis of `size` pixels.

    They are the parts of the tiles that a square of `radius` touches by the published rule, less
    those farther than `reach`, where alpha is below 1/255 in every pixel. The clamp before the
    conversion keeps it defined for any float.
    """
    SIDE: tl.constexpr = 16 // PARTS
    most = tl.cdiv(size, SIDE) * 1.0
    low = tl.floor(tl.minimum(tl.maximum((mean - radius) / 16, 0.0), most)) * PARTS
    high = tl.floor(tl.minimum(tl.maximum((mean + radius + 15) / 16, 0.0), most)) * PARTS
    low = tl.maximum(low, tl.floor((mean - reach) / SIDE))
    high = tl.minimum(high, tl.floor((mean + reach) / SIDE) + 1)
    first = tl.minimum(tl.maximum(low, 0.0), most).to(tl.int32)
    end = tl.minimum(tl.maximum(high, 0.0), most).to(tl.int32)
    return first, end


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
    """Return the transpose of scalars r times vectors v."""
    return (
        r[0][0] * v[0] + r[1][0] * v[1] + r[2][0] * v[2],
        r[0][1] * v[0] + r[1][1] * v[1] + r[2][1] * v[2],
        r[0][2] * v[0] + r[1][2] * v[1] + r[2][2] * v[2],
    )


@triton.jit
def covariance_gradient(second, conic, inverse, g_rho2, before, after, kernel_size):
    """Return the gradients of a, b, c and of the determinant without filter.

    The gradient of an entry of the conic is minus half its second moment, off the diagonal minus
    the moment; `inverse` is 1 / after and g_rho2 the gradient of rho^2.
    """
    sxx, sxy, syy = second
    c11, c12, c22 = conic
    g_after = (0.5 * sxx * c11 + sxy * c12 + 0.5 * syy * c22) * inverse - g_rho2 * before / (
        (after + EPS) * (after + EPS)
    )
    g_before = g_after + g_rho2 / (after + EPS)
    ga = -0.5 * syy * inverse + kernel_size * g_after
    gc = -0.5 * sxx * inverse + kernel_size * g_after
    gb = sxy * inverse
    return ga, gb, gc, g_before


@triton.jit
def rotation_gradient(r, g0, g1, ratio):
    """Return the gradient of Q, of the gradients g0, g1 of the first two rows of R Q.

    The third row of R Q enters both rows of J R Q, with minus the ratios x/z and y/z.
    """
    tx, ty = ratio
    g2 = -(tx * g0[0] + ty * g1[0]), -(tx * g0[1] + ty * g1[1]), -(tx * g0[2] + ty * g1[2])
    c0 = rotate_back(r, (g0[0], g1[0], g2[0]))
    c1 = rotate_back(r, (g0[1], g1[1], g2[1]))
    c2 = rotate_back(r, (g0[2], g1[2], g2[2]))
    return (c0[0], c1[0], c2[0]), (c0[1], c1[1], c2[1]), (c0[2], c1[2], c2[2])


@triton.jit
def mean_gradient(sx, sy, conic, point, focal, ox, oy):
    """Return the gradients of the mean on the screen, divided by z, and of z.

    The gradient of the mean is minus the conic times the first moments (sx, sy); ox, oy is the
    principal point from the middle of the picture.
    """
    c11, c12, c22 = conic
    x, y, z = point
    w = 1 / (z + 1e-7)
    gmx = -(c11 * sx + c12 * sy) * w
    gmy = -(c12 * sx + c22 * sy) * w
    gz = gmx * (ox - (focal[0] * x + ox * z) * w) + gmy * (oy - (focal[1] * y + oy * z) * w)
    return gmx, gmy, gz


@triton.jit
def quaternion_gradient(q, h0, h1, h2):
    """Return the gradient (w, x, y, z) of a quaternion, of the gradient h of its matrix Q(q)."""
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
