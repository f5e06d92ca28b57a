"""The ops as the full-size models call them, forward and backward, on few rows: what `kernels.compile` builds.

Channel counts, head sizes and window sizes are those of the published models, so every constant of a launch is the one
that training uses; only the number of rows is small enough for Triton's interpreter.
"""

import math

import torch
from torch import Tensor

from kernels.attention import segment_attention, window_attention
from kernels.cache import SpatialCache
from kernels.camera import Camera
from kernels.hash import build_table, lookup, neighbours
from kernels.norm import add_layer_norm, gelu, layer_norm, rms_norm
from kernels.pool import pool, pooling, unpool
from kernels.splat import splat
from kernels.ssim import ssim
from kernels.window import Windows, window_partition

CHANNELS, HEADS, WINDOW = 768, 12, 8
DEMO_CHANNELS, DEMO_HEADS = 64, 2


def _coords(N: int, extent: int) -> Tensor:
    cells = torch.arange(N) * 7 % extent**3
    xyz = torch.stack([cells // extent**2, cells // extent % extent, cells % extent], dim=1)
    return torch.nn.functional.pad(xyz, (1, 0)).int()


def _backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])


def attention(dtype: torch.dtype) -> None:
    """Windows of 8^3 voxels at the published and the demo's head sizes, with and without the q/k norm; every size class.

    The windows are all empty: enough rows for each class to be launched, and nothing for the interpreter to compute.
    """
    N = WINDOW**3 + 1
    windows = Windows(torch.arange(N, dtype=torch.int32), torch.zeros(9, dtype=torch.int32), N)
    for channels, heads in ((CHANNELS, HEADS), (DEMO_CHANNELS, DEMO_HEADS)):
        D = channels // heads
        qkv = torch.randn(N, 3, heads, D).to(dtype).requires_grad_()
        _backward(window_attention(qkv, windows))
        gamma = torch.ones(heads, D, requires_grad=True)
        _backward(window_attention(qkv, windows, q_gamma=gamma, k_gamma=gamma))
        _backward(segment_attention(*qkv.unbind(1), windows.starts, windows.starts))


def norms(dtype: torch.dtype) -> None:
    """The memory-bound passes of a block."""
    for channels, heads in ((CHANNELS, HEADS), (DEMO_CHANNELS, DEMO_HEADS)):
        x, h = (torch.randn(8, channels).to(dtype).requires_grad_() for _ in range(2))
        _backward(layer_norm(x))
        _backward(*add_layer_norm(x, h))
        gamma = torch.ones(heads, channels // heads, requires_grad=True)
        _backward(rms_norm(x.view(8, heads, -1), gamma))
        _backward(gelu(x))


def coordinates(dtype: torch.dtype) -> None:
    """Tables of both kinds (few rows in a wide extent take the hash), neighbours and windows."""
    for extent in (16, 1000):
        coords = _coords(40, 16)
        coords[-1, 1:] = extent - 1
        lookup(build_table(coords), coords)
        neighbours(coords, 3)
        window_partition(coords, 1, WINDOW, WINDOW // 2)


def gaussians(dtype: torch.dtype) -> None:
    """A rendered view of a few Gaussians; the renderer computes in fp32 whatever it is given."""
    G = 8
    camera = Camera.orbit([0.3], [0.2], 2.0, math.radians(40), 32, 32)
    center, scale = torch.rand(G, 3) * 0.2, torch.full((G, 3), 0.02)
    rotation, opacity, sh = torch.nn.functional.normalize(torch.rand(G, 4)), torch.full((G, 1), 0.5), torch.rand(G, 1, 3)
    tensors = [t.requires_grad_() for t in (center, scale, rotation, opacity, sh)]
    image = splat(*tensors, [0, G], camera, [0], torch.ones(1, 3))
    _backward(image.color, image.alpha)


def similarity(dtype: torch.dtype) -> None:
    a, b = (torch.rand(1, 3, 16, 16).to(dtype).requires_grad_() for _ in range(2))
    _backward(ssim(a, b))


def scales(dtype: torch.dtype) -> None:
    """Features to a coarser scale and back."""
    for channels in (CHANNELS, DEMO_CHANNELS):
        cache = SpatialCache(_coords(40, 16))
        groups = cache.get(pooling, 2)
        x = torch.randn(len(cache), channels).to(dtype).requires_grad_()
        _backward(unpool(pool(x, groups), groups))


WORKLOADS = {op.__name__: op for op in (attention, norms, coordinates, gaussians, similarity, scales)}
