"""One thread a pixel: launch size, and the rows of the corners of each pixel's face, on a GPU."""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton


@triton.jit(do_not_specialize=["N", "size"])
def _corner_rows(rast_ptr, faces_ptr, table_ptr, key_ptr, N, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    face = tl.load(rast_ptr + n * 4 + 3, inside, 0.0).to(tl.int64) - 1
    live = face >= 0
    t = table_ptr + n // size * 4
    f = faces_ptr + (tl.load(t, live, 0) + face) * 3
    base = tl.load(t + 2, live, 0)
    for k in tl.static_range(3):
        row = base + tl.load(f + k, live, 0)
        tl.store(key_ptr + n * 3 + k, tl.where(live, row, -1).to(tl.int32), inside)


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
    """The corners of all pixels [V H W 3] in the order of their rows: what `sum_rows` takes. int64.

    Sorted by vertex, the corners of one clip row are neighbours too, since a view's pixels are and
    the sort is stable.
    """
    return corner_rows(rast, faces, table).sort(stable=True).indices


def spread(xyw: Tensor) -> Tensor:
    """Gradients of x, y, w [P, 3] -> of clip positions [P, 4]: z has none."""
    return torch.cat([xyw[:, :2], torch.zeros_like(xyw[:, :1]), xyw[:, 2:]], 1)


def known_order(order: Tensor, rast: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """`order` of the corners of `rast`, found now if it was not before (then it is empty)."""
    return order if len(order) else corner_order(rast, faces, table)
