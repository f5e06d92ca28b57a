"""Shared parts of the GPU passes with one thread a pixel.

The launch size, the rows of the vertices of each pixel's face, and sums over the pixels of a
vertex. Three pointers travel together through these kernels:

    rast_ptr   [V, H, W, 4] u, v, z / w, face + 1 of `rasterize`
    faces_ptr  [F, 3] int32
    table_ptr  [V, 4] int64: first face, number of faces, first row, number of rows of each view
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.reduce import sum_rows


@triton.jit
def face_rows(rast_ptr, faces_ptr, table_ptr, n, size, inside):
    """The rows of the three corners of each pixel's face, and whether it shows one.

    `size` is the number of pixels of a view.
    """
    face = tl.load(rast_ptr + n * 4 + 3, inside, 0.0).to(tl.int64) - 1
    live = face >= 0
    t = table_ptr + n // size * 4
    f = faces_ptr + (tl.load(t, live, 0) + face) * 3
    base = tl.load(t + 2, live, 0)
    a = base + tl.load(f, live, 0)
    b = base + tl.load(f + 1, live, 0)
    c = base + tl.load(f + 2, live, 0)
    return a, b, c, live


@triton.jit
def store_keys(key_ptr, a, b, c, used, inside):
    """Write the rows of a pixel's three corners as keys of `sum_corners`, -1 where not used."""
    tl.store(key_ptr, tl.where(used, a, -1).to(tl.int32), inside)
    tl.store(key_ptr + 1, tl.where(used, b, -1).to(tl.int32), inside)
    tl.store(key_ptr + 2, tl.where(used, c, -1).to(tl.int32), inside)


@triton.jit(do_not_specialize=["N", "size"])
def _corner_rows(rast_ptr, faces_ptr, table_ptr, key_ptr, N, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    a, b, c, live = face_rows(rast_ptr, faces_ptr, table_ptr, n, size, inside)
    store_keys(key_ptr + n * 3, a, b, c, live, inside)


def pixel_block(target: str) -> dict:
    """Pixels or rows per program where a thread has one of them (not yet measured on a GPU)."""
    return {"BLOCK": 4096 if target == "interpreter" else 128, "num_warps": 4}


def corner_rows(rast: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """The three rows of every pixel's face: [V H W 3] int32, -1 where there is no face."""
    V, H, W, _ = rast.shape
    key = torch.empty(V * H * W * 3, dtype=torch.int32, device=rast.device)
    block = pixel_block(backend.target(rast))
    grid = (triton.cdiv(V * H * W, block["BLOCK"]),)
    backend.launch(_corner_rows, grid, rast, faces, table, key, V * H * W, H * W, **block)
    return key


def corner_order(rast: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """The corners of all pixels sorted by their rows, for `sum_corners`: [V H W 3] int64.

    Sorted by vertex, the corners of one clip row are neighbours too: a view's pixels are
    neighbours, and the sort is stable.
    """
    return corner_rows(rast, faces, table).sort(stable=True).indices


def sum_corners(
    rows: Tensor,  # [M / share, C] fp32
    key: Tensor,  # [M] int32: the row that each corner of a pixel belongs to, -1 for none
    order: Tensor,  # of `corner_order`; empty: sorted here
    N: int,
    weight: Tensor | None = None,  # [M] fp32
    share: int = 1,  # corners that share a row
) -> Tensor:  # [N, C]
    """Sum the corners of all pixels by their vertices, in a fixed order (kernels.reduce)."""
    if len(order) == 0:
        order = key.sort(stable=True).indices
    return sum_rows(rows, key, order, N, weight, share)


def clip_gradient(xyw: Tensor, key: Tensor, order: Tensor, P: int) -> Tensor:
    """Sum gradients of x, y, w of corners [M, 3] to those of clip positions [P, 4]; z has none."""
    total = sum_corners(xyw, key, order, P)
    return torch.cat([total[:, :2], torch.zeros_like(total[:, :1]), total[:, 2:]], 1)
