"""Structural similarity of two image batches: V views, C channels, H rows, W columns.

An 11 x 11 Gaussian window (sigma 1.5) slides over each plane with zero padding (no renormalisation
at the border):
    SSIM = (2 ma mb + C1) (2 cov + C2) / ((ma^2 + mb^2 + C1) (va + vb + C2))
    C1 = 0.01^2, C2 = 0.03^2
with variances as E[x^2] - m^2 (Wang et al. 2004). Only va + vb enters, so four filtered maps are
enough: ma, mb, E[a^2] + E[b^2], E[ab].

A lane is one column of a strip of ROWS rows; it walks down. A row is filtered horizontally from
eleven shifted loads (the first misses the cache, ten hit it) and added to the eleven output rows
that it reaches, whose sums live in registers until they are complete. So the filter is separable,
with no shared memory and no second pass; a strip pays for ten extra rows.

The gradient is the same filter over three maps that the forward saves (d ssim / d ma, d E[a^2], d
E[ab]):
    grad a = filter(dma) + 2 a filter(dsq) + b filter(dab);   b's shares the last two and adds a
                                                              fourth, d ssim / d mb.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton

RADIUS = 5
CACHED = 1 << 16  # pixels of all channels that are compared at once on a CPU


def _taps() -> list[float]:
    """The window's weights by distance from its centre, 0 to RADIUS; all eleven sum to one."""
    raw = [math.exp(-(d * d) / (2 * 1.5**2)) for d in range(RADIUS + 1)]
    return [w / (2 * sum(raw) - raw[0]) for w in raw]


TAPS = _taps()
T0, T1, T2, T3, T4, T5 = (tl.constexpr(w) for w in TAPS)
# in kernels a constant stands to the right: the interpreter needs it
C1, C2 = tl.constexpr(0.01**2), tl.constexpr(0.03**2)


def _tiles() -> dict:
    """Lanes of a program and rows of a strip: not yet measured on a GPU."""
    return {"LANES": 128, "ROWS": 16, "num_warps": 4}


def _programs(C: int, H: int, W: int, tiles: dict) -> int:
    """Programs of one image: a program's lanes never cross into another, so its partial sum belongs
    to one.
    """
    return triton.cdiv(C * triton.cdiv(H, tiles["ROWS"]) * W, tiles["LANES"])


@triton.jit
def _place(programs, C, H, W, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Of every lane [LANES]: its column, its strip's first row (an idle lane's are all below the
    image), its plane's start.
    """
    strips = tl.cdiv(H, ROWS)
    lane = tl.program_id(0) % programs * LANES + tl.arange(0, LANES)
    image = (tl.program_id(0) // programs).to(tl.int64)
    channel = lane // W // strips
    first = tl.where(channel < C, lane // W % strips * ROWS, H + 5)
    # elements of the batch: the stride of the saved maps
    size = (tl.num_programs(0) // programs).to(tl.int64) * C * H * W
    return lane % W, first, (image * C + channel) * H * W, size


@triton.jit
def _add_images(ha, hb, hsq, hab, a_ptr, b_ptr, x, end, D: tl.constexpr, TAP: tl.constexpr):
    """Add the pixels D columns to the left and right of x to a row's four sums; outside 0 <= column
    < end they are zero.
    """
    left = (x >= D) & (end > 0)
    right = x < end - D
    a0 = tl.load(a_ptr - D, mask=left, other=0.0).to(tl.float32)
    a1 = tl.load(a_ptr + D, mask=right, other=0.0).to(tl.float32)
    b0 = tl.load(b_ptr - D, mask=left, other=0.0).to(tl.float32)
    b1 = tl.load(b_ptr + D, mask=right, other=0.0).to(tl.float32)
    ha += (a0 + a1) * TAP
    hb += (b0 + b1) * TAP
    hsq += (a0 * a0 + a1 * a1 + b0 * b0 + b1 * b1) * TAP
    hab += (a0 * b0 + a1 * b1) * TAP
    return ha, hb, hsq, hab


@triton.jit
def _add_maps(
    ha, hb, hsq, hab, ptr, size, x, end, D: tl.constexpr, TAP: tl.constexpr, BOTH: tl.constexpr
):
    """As `_add_images`, of the saved maps."""
    left = (x >= D) & (end > 0)
    right = x < end - D
    ha += (tl.load(ptr - D, mask=left, other=0.0) + tl.load(ptr + D, mask=right, other=0.0)) * TAP
    ptr += size
    hsq += (tl.load(ptr - D, mask=left, other=0.0) + tl.load(ptr + D, mask=right, other=0.0)) * TAP
    ptr += size
    hab += (tl.load(ptr - D, mask=left, other=0.0) + tl.load(ptr + D, mask=right, other=0.0)) * TAP
    if BOTH:
        ptr += size
        hb += (
            tl.load(ptr - D, mask=left, other=0.0) + tl.load(ptr + D, mask=right, other=0.0)
        ) * TAP
    return ha, hb, hsq, hab


@triton.jit
def _ring(LANES: tl.constexpr):
    """Sums of the ten output rows under way, the one completed next first."""
    z = tl.zeros([LANES], tl.float32)
    return z, z, z, z, z, z, z, z, z, z


@triton.jit
def _push(r, h):
    """Add row h to the eleven output rows that it reaches: (the one it completes, the ten under
    way).
    """
    h0 = h * T0
    h1 = h * T1
    h2 = h * T2
    h3 = h * T3
    h4 = h * T4
    h5 = h * T5
    return r[0] + h5, (
        r[1] + h4,
        r[2] + h3,
        r[3] + h2,
        r[4] + h1,
        r[5] + h0,
        r[6] + h1,
        r[7] + h2,
        r[8] + h3,
        r[9] + h4,
        h5,
    )


@triton.jit(do_not_specialize=["programs", "C", "H", "W"])
def _ssim_fwd(
    a_ptr,
    b_ptr,
    partial_ptr,
    maps_ptr,
    programs,
    C,
    H,
    W,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    MAPS: tl.constexpr,
):
    x, first, plane, size = _place(programs, C, H, W, LANES, ROWS)
    ring_a = _ring(LANES)
    ring_b = _ring(LANES)
    ring_sq = _ring(LANES)
    ring_ab = _ring(LANES)
    total = tl.zeros([LANES], tl.float32)
    for i in range(ROWS + 10):
        y = first - 5 + i
        end = tl.where((y >= 0) & (y < H), W, 0)  # a row outside the image has no columns
        at = plane + y * W + x
        a = tl.load(a_ptr + at, mask=x < end, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + at, mask=x < end, other=0.0).to(tl.float32)
        ha = a * T0
        hb = b * T0
        hsq = (a * a + b * b) * T0
        hab = a * b * T0
        ha, hb, hsq, hab = _add_images(ha, hb, hsq, hab, a_ptr + at, b_ptr + at, x, end, 1, T1)
        ha, hb, hsq, hab = _add_images(ha, hb, hsq, hab, a_ptr + at, b_ptr + at, x, end, 2, T2)
        ha, hb, hsq, hab = _add_images(ha, hb, hsq, hab, a_ptr + at, b_ptr + at, x, end, 3, T3)
        ha, hb, hsq, hab = _add_images(ha, hb, hsq, hab, a_ptr + at, b_ptr + at, x, end, 4, T4)
        ha, hb, hsq, hab = _add_images(ha, hb, hsq, hab, a_ptr + at, b_ptr + at, x, end, 5, T5)
        ma, ring_a = _push(ring_a, ha)
        mb, ring_b = _push(ring_b, hb)
        sq, ring_sq = _push(ring_sq, hsq)
        ab, ring_ab = _push(ring_ab, hab)
        # the completed row; before `first` it is the strip above's
        live = (y - 5 >= first) & (y - 5 < H)
        square = ma * ma + mb * mb
        cross = 2 * ma * mb
        A1 = cross + C1
        A2 = 2 * ab - cross + C2
        B1 = square + C1
        B2 = sq - square + C2
        value = A1 * A2 / (B1 * B2)
        total += tl.where(live, value, 0.0)
        if MAPS > 0:
            to = maps_ptr + at - 5 * W
            u = 2 * (A2 - A1) / (B1 * B2)
            v = 2 * value * (1 / B2 - 1 / B1)
            tl.store(to, mb * u + ma * v, mask=live)
            tl.store(to + size, -value / B2, mask=live)
            tl.store(to + 2 * size, 2 * A1 / (B1 * B2), mask=live)
            if MAPS > 3:
                tl.store(to + 3 * size, ma * u + mb * v, mask=live)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["programs", "C", "H", "W"])
def _ssim_bwd(
    a_ptr,
    b_ptr,
    maps_ptr,
    grad_ptr,
    da_ptr,
    db_ptr,
    programs,
    C,
    H,
    W,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BOTH: tl.constexpr,
):
    x, first, plane, size = _place(programs, C, H, W, LANES, ROWS)
    scale = tl.load(grad_ptr + tl.program_id(0) // programs).to(tl.float32)
    ring_a = _ring(LANES)
    ring_b = _ring(LANES)
    ring_sq = _ring(LANES)
    ring_ab = _ring(LANES)
    for i in range(ROWS + 10):
        y = first - 5 + i
        end = tl.where((y >= 0) & (y < H), W, 0)
        at = plane + y * W + x
        row = maps_ptr + at
        ha = tl.load(row, mask=x < end, other=0.0) * T0
        hsq = tl.load(row + size, mask=x < end, other=0.0) * T0
        hab = tl.load(row + 2 * size, mask=x < end, other=0.0) * T0
        hb = tl.load(row + 3 * size, mask=x < end, other=0.0) * T0 if BOTH else hab
        ha, hb, hsq, hab = _add_maps(ha, hb, hsq, hab, row, size, x, end, 1, T1, BOTH)
        ha, hb, hsq, hab = _add_maps(ha, hb, hsq, hab, row, size, x, end, 2, T2, BOTH)
        ha, hb, hsq, hab = _add_maps(ha, hb, hsq, hab, row, size, x, end, 3, T3, BOTH)
        ha, hb, hsq, hab = _add_maps(ha, hb, hsq, hab, row, size, x, end, 4, T4, BOTH)
        ha, hb, hsq, hab = _add_maps(ha, hb, hsq, hab, row, size, x, end, 5, T5, BOTH)
        ma, ring_a = _push(ring_a, ha)
        sq, ring_sq = _push(ring_sq, hsq)
        ab, ring_ab = _push(ring_ab, hab)
        live = (y - 5 >= first) & (y - 5 < H)
        to = at - 5 * W
        a = tl.load(a_ptr + to, mask=live, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + to, mask=live, other=0.0).to(tl.float32)
        tl.store(da_ptr + to, scale * (ma + 2 * a * sq + b * ab), mask=live)
        if BOTH:
            mb, ring_b = _push(ring_b, hb)
            tl.store(db_ptr + to, scale * (mb + 2 * b * sq + a * ab), mask=live)


def _blur(x: Tensor) -> Tensor:
    """The window over the last two axes of [..., H, W], as shifted sums.

    That is faster on a CPU than a convolution of one channel.
    """
    for axis in (-1, -2):
        n = x.shape[axis]
        padded = F.pad(x, (RADIUS, RADIUS) if axis == -1 else (0, 0, RADIUS, RADIUS))
        x = padded.narrow(axis, RADIUS, n) * TAPS[0]
        for d in range(1, RADIUS + 1):
            x.add_(padded.narrow(axis, RADIUS - d, n), alpha=TAPS[d]).add_(
                padded.narrow(axis, RADIUS + d, n), alpha=TAPS[d]
            )
    return x


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _parts(x: Tensor) -> list[slice]:
    """A few of the images [V, C, H, W] at a time: what is read again is then still in the cache."""
    few = max(1, CACHED // x.shape[1:].numel())
    return [slice(v, v + few) for v in range(0, len(x), few)]


def _forward_torch(a: Tensor, b: Tensor, maps: int) -> tuple[Tensor, Tensor]:
    a, b = a.to(_accumulator(a)), b.to(_accumulator(b))
    mean = a.new_empty(len(a))
    saved = a.new_empty(maps, *a.shape)
    for part in _parts(a):
        mean[part] = _similarity(a[part], b[part], saved[:, part]).mean((1, 2, 3))
    return mean, saved


def _similarity(a: Tensor, b: Tensor, saved: Tensor) -> Tensor:
    """SSIM of every pixel; writes the maps [0, 3 or 4, V, C, H, W]."""
    ma, mb, sq, ab = _blur(torch.stack([a, b, a * a + b * b, a * b]))
    square = ma * ma + mb * mb
    cross = 2 * ma * mb
    A1 = cross + C1.value
    A2 = 2 * ab - cross + C2.value
    B1 = square + C1.value
    B2 = sq - square + C2.value
    value = A1 * A2 / (B1 * B2)
    if len(saved):
        u = 2 * (A2 - A1) / (B1 * B2)
        v = 2 * value * (1 / B2 - 1 / B1)
        saved[0] = mb * u + ma * v
        saved[1] = -value / B2
        saved[2] = 2 * A1 / (B1 * B2)
    if len(saved) > 3:
        saved[3] = ma * u + mb * v
    return value


def _backward_torch(a: Tensor, b: Tensor, saved: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    both = len(saved) > 3
    da = torch.empty_like(a)
    db = torch.empty_like(b) if both else b.new_empty(0)
    for part in _parts(a):
        blurred = _blur(saved[:, part]).mul_(scale[part].to(saved.dtype).view(-1, 1, 1, 1))
        da[part] = blurred[0] + 2 * a[part] * blurred[1] + b[part] * blurred[2]
        if both:
            db[part] = blurred[3] + 2 * b[part] * blurred[1] + a[part] * blurred[2]
    return da, db


@torch.library.custom_op("trislat::ssim", mutates_args=())
def _ssim(a: Tensor, b: Tensor, maps: int) -> tuple[Tensor, Tensor]:
    if backend.is_torch(a):
        return _forward_torch(a, b, maps)
    if a.dtype == torch.float64:
        raise ValueError(
            f"the kernels of ssim compute in float32: {a.dtype} images run on a CPU only"
        )
    V, C, H, W = a.shape
    tiles = _tiles()
    programs = _programs(C, H, W, tiles)
    partial = a.new_empty(V, programs, dtype=torch.float32)
    saved = a.new_empty(maps, V, C, H, W, dtype=torch.float32)
    backend.launch(
        _ssim_fwd, (V * programs,), a, b, partial, saved, programs, C, H, W, **tiles, MAPS=maps
    )
    return partial.sum(1) / (C * H * W), saved


@_ssim.register_fake
def _(a, b, maps):
    dtype = _accumulator(a)
    return a.new_empty(a.shape[0], dtype=dtype), a.new_empty(maps, *a.shape, dtype=dtype)


@torch.library.custom_op("trislat::ssim_backward", mutates_args=())
def _ssim_backward(a: Tensor, b: Tensor, saved: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    V, C, H, W = a.shape
    both = len(saved) > 3
    scale = grad / (C * H * W)
    if backend.is_torch(a):
        return _backward_torch(a, b, saved, scale)
    da = torch.empty_like(a)
    db = torch.empty_like(b) if both else b.new_empty(0)
    tiles = _tiles()
    programs = _programs(C, H, W, tiles)
    args = a, b, saved, scale.contiguous(), da, db, programs, C, H, W
    backend.launch(_ssim_bwd, (V * programs,), *args, **tiles, BOTH=both)
    return da, db


@_ssim_backward.register_fake
def _(a, b, saved, grad):
    return torch.empty_like(a), torch.empty_like(b) if len(saved) > 3 else b.new_empty(0)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return None, None, None
    a, b, saved = ctx.saved_tensors
    da, db = _ssim_backward(a, b, saved, grad)
    return da, db if len(saved) > 3 else None, None


_ssim.register_autograd(_backward, setup_context=_setup)


def ssim(
    a: Tensor,  # [V, C, H, W] float, in [0, 1]
    b: Tensor,  # [V, C, H, W]
) -> Tensor:  # [V] float32 (float64 for float64 images)
    """Mean structural similarity of each pair of images: 1 for equal ones. Differentiable in both;
    an image that needs no gradient costs none. The constants assume a value range of one; values
    outside [0, 1] are not clamped.

    Raises ValueError for shapes, dtypes or devices that differ, and for images without a pixel.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"ssim compares two [V, C, H, W] batches, not {tuple(a.shape)} with {tuple(b.shape)}"
        )
    if a.dtype != b.dtype or a.device != b.device or not a.is_floating_point():
        raise ValueError(
            f"ssim needs one float dtype and device, not {a.dtype} on {a.device} with {b.dtype} "
            f"on {b.device}"
        )
    if 0 in a.shape[1:]:
        raise ValueError(
            f"ssim needs images of at least one pixel and channel, not {tuple(a.shape)}"
        )
    if b.requires_grad and not a.requires_grad:
        a, b = b, a  # symmetric: the first is the one whose gradient always exists
    maps = (4 if b.requires_grad else 3 if a.requires_grad else 0) if torch.is_grad_enabled() else 0
    return _ssim(a.contiguous(), b.contiguous(), maps)[0]


def ssim_reference(a: Tensor, b: Tensor) -> Tensor:
    """The definition: five plain 11 x 11 convolutions a channel."""
    taps = torch.tensor(TAPS[:0:-1] + TAPS, dtype=a.dtype, device=a.device)
    window = torch.outer(taps, taps).expand(a.shape[1], 1, -1, -1)
    blur = lambda x: F.conv2d(x, window, padding=RADIUS, groups=a.shape[1])
    ma, mb = blur(a), blur(b)
    va = blur(a * a) - ma**2
    vb = blur(b * b) - mb**2
    cov = blur(a * b) - ma * mb
    C1, C2 = 0.01**2, 0.03**2
    value = (2 * ma * mb + C1) * (2 * cov + C2) / ((ma**2 + mb**2 + C1) * (va + vb + C2))
    return value.mean((1, 2, 3))
