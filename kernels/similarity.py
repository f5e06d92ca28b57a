"""Structural similarity of two image batches: V views, C channels, H rows, W columns.

An 11 x 11 Gaussian window (sigma 1.5) slides over each plane with zero padding (no renormalisation
at the border):
    SSIM = (2 ma mb + C1) (2 cov + C2) / ((ma^2 + mb^2 + C1) (va + vb + C2))
    C1 = 0.01^2, C2 = 0.03^2
with variances as E[x^2] - m^2 (Wang et al. 2004). Only va + vb enters, so four filtered maps are
enough: ma, mb, E[a^2] + E[b^2], E[ab].

The gradient is the same filter over maps that the forward saves, the derivatives of ssim by ma,
E[a^2] and E[ab]:
    grad a = filter(dma) + 2 a filter(dsq) + b filter(dab)
The gradient of b shares the last two and needs a fourth, the derivative by mb.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend
from kernels import similarity_gpu as gpu
from kernels.backend import triton
from kernels.checks import wide, wide_dtype
from kernels.similarity_gpu import RADIUS, STABILISERS, TAPS

CACHED = 1 << 16  # pixels of all channels that are compared at once on a CPU


def _tiles() -> dict:
    """Return the lanes of a program and the rows of a strip: not yet measured on a GPU."""
    return {"LANES": 128, "ROWS": 16, "num_warps": 4}


def _programs(C: int, H: int, W: int, tiles: dict) -> int:
    """Return the programs of one image.

    No program works on two images, so its partial sum belongs to one.
    """
    return triton.cdiv(C * triton.cdiv(H, tiles["ROWS"]) * W, tiles["LANES"])


def _blur(x: Tensor) -> Tensor:
    """Apply the window to the last two axes of [..., H, W], as shifted sums.

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


def _parts(x: Tensor) -> list[slice]:
    """Divide images [V, C, H, W] into parts of a few, which stay in the cache."""
    few = max(1, CACHED // x.shape[1:].numel())
    return [slice(v, v + few) for v in range(0, len(x), few)]


def _forward_torch(a: Tensor, b: Tensor, maps: int) -> tuple[Tensor, Tensor]:
    a = wide(a)
    b = wide(b)
    mean = a.new_empty(len(a))
    saved = a.new_empty(maps, *a.shape)
    for part in _parts(a):
        mean[part] = _similarity(a[part], b[part], saved[:, part]).mean((1, 2, 3))
    return mean, saved


def _similarity(a: Tensor, b: Tensor, saved: Tensor) -> Tensor:
    """Return the SSIM of every pixel; write the maps [0, 3 or 4, V, C, H, W]."""
    ma, mb, sq, ab = _blur(torch.stack([a, b, a * a + b * b, a * b]))
    square = ma * ma + mb * mb
    cross = 2 * ma * mb
    C1, C2 = STABILISERS
    A1 = cross + C1
    A2 = 2 * ab - cross + C2
    B1 = square + C1
    B2 = sq - square + C2
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
        gpu._ssim_fwd, (V * programs,), a, b, partial, saved, programs, C, H, W, **tiles, MAPS=maps
    )
    return partial.sum(1) / (C * H * W), saved


@_ssim.register_fake
def _(a, b, maps):
    dtype = wide_dtype(a)
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
    backend.launch(gpu._ssim_bwd, (V * programs,), *args, **tiles, BOTH=both)
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
    """Return the mean structural similarity of each pair of images: 1 for equal ones.

    Differentiable in both; an image that needs no gradient costs none. The constants assume a value
    range of one; values outside [0, 1] are not clamped.

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
    maps = 0
    if torch.is_grad_enabled() and a.requires_grad:
        maps = 4 if b.requires_grad else 3
    return _ssim(a.contiguous(), b.contiguous(), maps)[0]


def ssim_reference(a: Tensor, b: Tensor) -> Tensor:
    """Compute `ssim` by its definition: five 11 x 11 convolutions per channel."""
    taps = torch.tensor(TAPS[:0:-1] + TAPS, dtype=a.dtype, device=a.device)
    window = torch.outer(taps, taps).expand(a.shape[1], 1, -1, -1)
    blur = lambda x: F.conv2d(x, window, padding=RADIUS, groups=a.shape[1])
    ma = blur(a)
    mb = blur(b)
    va = blur(a * a) - ma**2
    vb = blur(b * b) - mb**2
    cov = blur(a * b) - ma * mb
    c1 = 0.01**2
    c2 = 0.03**2
    value = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return value.mean((1, 2, 3))
