"""Calls of the public ops at the full models' sizes, on few rows, for `kernels.compile` to record.

Channel counts, head sizes and window sizes are those of the published models, so every constant of
a launch is the one that training uses; only the number of rows is small enough for Triton's
interpreter.
"""

import math

import torch
from torch import Tensor

from kernels import (
    Camera,
    SpatialCache,
    Windows,
    add_layer_norm,
    backend,
    build_table,
    gelu,
    group_norm,
    isosurface,
    layer_norm,
    lookup,
    neighbours,
    pool,
    pooling,
    raymarch,
    render_mesh,
    segment_attention,
    serialized_windows,
    sparse_conv,
    splat,
    ssim,
    subdivide_conv,
    unpool,
    window_attention,
    window_partition,
)
from kernels.conv.launch import product, product_tiles
from kernels.conv.order import child_rows, octants
from kernels.conv.tables import ConvTables, list_pairs, sort_rows
from kernels.voxels.children import child_neighbours

CHANNELS = 768
HEADS = 12
WINDOW = 8
DEMO_CHANNELS = 64
DEMO_HEADS = 2


def _coords(N: int, extent: int) -> Tensor:
    cells = torch.arange(N) * 7 % extent**3
    xyz = torch.stack([cells // extent**2, cells // extent % extent, cells % extent], dim=1)
    return torch.nn.functional.pad(xyz, (1, 0)).int()


def _backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])


def attention(dtype: torch.dtype) -> None:
    """Run attention in windows of 8^3 voxels, with and without the q/k norm, in every size class.

    Head sizes are the published ones and the demo's. The windows are all empty: enough rows for
    each class to be launched, and nothing for the interpreter to compute.
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


def rotary(dtype: torch.dtype) -> None:
    """Run attention with rotary phases, with and without q/k norm, as in `attention`."""
    N = WINDOW**3 + 1
    windows = Windows(torch.arange(N, dtype=torch.int32), torch.zeros(9, dtype=torch.int32), N)
    for channels, heads in ((CHANNELS, HEADS), (DEMO_CHANNELS, DEMO_HEADS)):
        D = channels // heads
        qkv = torch.randn(N, 3, heads, D).to(dtype).requires_grad_()
        phases = torch.ones(N, D // 2, dtype=torch.complex64)
        gamma = torch.ones(heads, D, requires_grad=True)
        _backward(window_attention(qkv, windows, phases=phases))
        _backward(window_attention(qkv, windows, q_gamma=gamma, k_gamma=gamma, phases=phases))


def serialized(dtype: torch.dtype) -> None:
    """Make windows along both curves; attend to listed keys alone, normed, rotated, and both."""
    coords = _coords(16, 16)
    for mode in ("z_order", "hilbert_transposed"):
        serialized_windows(coords, 1, WINDOW, mode, shift_window=WINDOW // 2)
    rows = torch.arange(16, dtype=torch.int32)
    none = torch.zeros(9, dtype=torch.int32)
    windows = Windows(rows, none, 16, keys=rows, key_starts=none)
    for channels, heads in ((CHANNELS, HEADS), (DEMO_CHANNELS, DEMO_HEADS)):
        D = channels // heads
        qkv = torch.randn(16, 3, heads, D).to(dtype).requires_grad_()
        phases = torch.ones(16, D // 2, dtype=torch.complex64)
        gamma = torch.ones(heads, D, requires_grad=True)
        _backward(window_attention(qkv, windows))
        _backward(window_attention(qkv, windows, phases=phases))
        _backward(window_attention(qkv, windows, q_gamma=gamma, k_gamma=gamma))
        _backward(window_attention(qkv, windows, q_gamma=gamma, k_gamma=gamma, phases=phases))


def norms(dtype: torch.dtype) -> None:
    """Run the memory-bound passes of a block."""
    for channels in (CHANNELS, DEMO_CHANNELS):
        x, h = (torch.randn(8, channels).to(dtype).requires_grad_() for _ in range(2))
        bias = torch.zeros(channels, requires_grad=True)
        _backward(layer_norm(x))
        _backward(layer_norm(x, bias=bias))
        _backward(*add_layer_norm(x, h))
        _backward(gelu(x))
        _backward(gelu(x, bias))


def coordinates() -> None:
    """Make tables of both kinds, neighbours and windows.

    Few rows in a wide extent take the hash.
    """
    for extent in (16, 1000):
        coords = _coords(40, 16)
        coords[-1, 1:] = extent - 1
        lookup(build_table(coords), coords)
        neighbours(coords, 3)
        window_partition(coords, 1, WINDOW, WINDOW // 2)


def gaussians() -> None:
    """Render a view of a few Gaussians.

    The renderer computes in fp32 whatever it is given, as the ones below.
    """
    G = 8
    camera = Camera.orbit([0.3], [0.2], 2.0, math.radians(40), 32, 32)
    center = torch.rand(G, 3) * 0.2
    scale = torch.full((G, 3), 0.02)
    rotation = torch.nn.functional.normalize(torch.rand(G, 4))
    opacity = torch.full((G, 1), 0.5)
    sh = torch.rand(G, 1, 3)
    tensors = [t.requires_grad_() for t in (center, scale, rotation, opacity, sh)]
    image = splat(*tensors, [0, G], camera, [0], torch.ones(1, 3))
    _backward(image.color, image.alpha)


def convolution(dtype: torch.dtype) -> None:
    """Run the mesh decoder's four 3x3x3 convolutions, and the norm before each.

    Nobody has neighbours, so that there is nothing for the interpreter to compute. On few rows the
    ops take small tiles: the others are run beside.
    """
    N = 16
    taps = torch.full((N, 27), -1, dtype=torch.int32)
    order = torch.arange(N, dtype=torch.int32)
    for CI, CO, subdivided in (
        (CHANNELS, 192, True),
        (192, 192, False),
        (192, 96, True),
        (96, 96, False),
    ):
        x = torch.randn(N, CI).to(dtype).requires_grad_()
        weight = torch.randn(CO, 3, 3, 3, CI, requires_grad=True)
        bias = torch.zeros(CO, requires_grad=True)
        norm = torch.ones(CI, requires_grad=True), torch.zeros(CI, requires_grad=True)
        _backward(group_norm(x, *norm, torch.tensor([0, N], dtype=torch.int32), silu=True))
        op = subdivide_conv if subdivided else sparse_conv
        map_ = octants(taps) if subdivided else taps[:, None]
        parts = 1 if subdivided else 3
        rows = sort_rows(map_, order.expand(parts * map_.shape[1], N).contiguous(), parts)
        whole = sort_rows(child_rows(taps) if subdivided else map_, order[None])
        tables = ConvTables(rows, whole if subdivided else rows, list_pairs(map_))
        y = op(x, weight, bias, taps, tables=tables)
        _backward(y)
        tiles = product_tiles(dtype, backend.target(x))
        weight = torch.zeros(CO, 64 if subdivided else 27, CI, dtype=dtype)
        groups = 8 if subdivided else 1
        forward = rows if subdivided else whole
        for tile in tiles[:1] if subdivided else tiles:
            with torch.no_grad():
                product(y, weight, None, whole, back=True, mirror=not subdivided, tile=tile)
                product(x, weight, bias, forward, groups, tile=tile)
    child_neighbours(taps)


def similarity(dtype: torch.dtype) -> None:
    a, b = (torch.rand(1, 3, 16, 16).to(dtype).requires_grad_() for _ in range(2))
    _backward(ssim(a, b))


def surfaces() -> None:
    """Extract a surface with and without color."""
    for channels in (53, 101):
        fields = torch.randn(40, channels, requires_grad=True)
        out = isosurface(_coords(40, 5), fields, 5, True)
        _backward(out.vertices, out.attributes, out.regularizer, out.tsdf_position, out.tsdf_value)


def meshes() -> None:
    """Render a view of a large triangle and a small one."""
    camera = Camera.orbit([0.3], [0.2], 2.0, math.radians(40), 16, 16)
    corners = torch.tensor(
        [[-0.4, 0.0, -0.4], [0.4, 0.0, -0.4], [0.0, 0.0, 0.4], [0.0, 0.1, 0.02], [0.02, 0.1, 0.0]]
    )
    vertices = corners.requires_grad_()
    colors = torch.rand(5, 6, requires_grad=True)
    faces = torch.tensor([[0, 1, 2], [2, 3, 4]], dtype=torch.int32)
    image = render_mesh(vertices, faces, colors, [0, 5], [0, 2], camera, [0])
    _backward(image.color, image.alpha, image.depth, image.normal, image.normal_map)


def radiance() -> None:
    """Render a view of two voxels at the published rank and number of taps, and at the demo's."""
    for resolution, rank, dim in ((64, 16, 8), (16, 8, 4)):
        camera = Camera.orbit([0.3], [0.2], 2.0, math.radians(40), 32, 32)
        position = (torch.tensor([[8, 8, 8], [8, 8, 9]]) * (resolution // 16) + 0.5) / resolution
        tensors = [
            t.requires_grad_()
            for t in (torch.ones(2, rank, 3, dim), torch.zeros(2, rank), torch.zeros(2, rank, 1, 3))
        ]
        image = raymarch(position, *tensors, [0, 2], camera, [0], torch.ones(1, 3), resolution)
        _backward(image.color, image.alpha, image.depth)


def scales(dtype: torch.dtype) -> None:
    """Pool features to a coarser scale and unpool them."""
    for channels in (CHANNELS, DEMO_CHANNELS):
        cache = SpatialCache(_coords(40, 16))
        groups = cache.get(pooling, 2)
        x = torch.randn(len(cache), channels).to(dtype).requires_grad_()
        _backward(unpool(pool(x, groups), groups))


# what these compute decides no launch, so their hot kernels need not run to be recorded
BLIND = (attention, norms, similarity, rotary, serialized, convolution, scales)
# of one type whatever the tensors: Gaussians, surfaces, meshes and radiance fields compute in fp32
SAME_TYPE = (coordinates, gaussians, surfaces, meshes, radiance)
