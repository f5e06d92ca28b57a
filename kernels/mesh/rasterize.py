"""Which triangle each pixel shows, and where in it. V views, F faces, P clip rows (see
kernels.mesh.packing).

What is computed is what TRELLIS trains its meshes with, the CUDA rasteriser of nvdiffrast (Laine et
al. 2020):
- Faces that reach out of the frustum -w <= x, y, z <= w are clipped. Both sides of a face are
  drawn.
- Vertices are snapped to 1/16 px; a pixel is covered if its centre is inside by exact integer edge
  functions, where left edges and those of the smallest row are inside: two faces that share an edge
  cover every pixel along it once.
- The nearest z / w of the plane through the snapped vertices is seen; of equal ones, the later
  face.
- The perspective-correct barycentrics (u, v) are those of the positions before snapping. With e_k =
  (x_k, y_k) - f w_k for a pixel at f in NDC, a_0 = e_1 x e_2 and cyclic, (u, v) = (a_0, a_1) / (a_0
  + a_1 + a_2).
Gradients of (u, v) reach x, y, w of the clip positions; those of z / w and of the face are none.
Two published rules: the clamps of u and v pass the gradient, and its denominator has 1e-6 added to
its magnitude. Derivatives of silhouettes come from kernels.mesh.antialias.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.mesh.packing import (
    FACES_MAX,
    check_faces,
    check_floats,
    check_picture,
    check_table,
)
from kernels.mesh.pixels_gpu import corner_order, known_order
from kernels.mesh.rasterize_cpu import rasterize_torch, rasterize_torch_backward
from kernels.mesh.rasterize_gpu import rasterize_triton, rasterize_triton_backward


@torch.library.custom_op("trislat::rasterize", mutates_args=())
def _rasterize(
    clip: Tensor,
    faces: Tensor,
    table: Tensor,
    most: int,
    pairs: int,
    height: int,
    width: int,
    order_by: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The picture [V, H, W, 4], and the order of its corners' rows in the table `order_by` for
    backward passes (kernels only).
    """
    if backend.is_torch(clip):
        with torch.autocast(clip.device.type, enabled=False):
            rast, wrong = rasterize_torch(clip, faces, table, height, width)
    else:
        rast, wrong = rasterize_triton(clip, faces, table, most, pairs, height, width)
    if wrong:
        what = _missing_vertex(faces, table)
        raise ValueError(
            f"{wrong} of {pairs} faces (over all views) name a vertex that their mesh does not "
            f"have: {what}"
        )
    if order_by is None or backend.is_torch(clip):
        return rast, torch.empty(0, dtype=torch.int64, device=clip.device)
    return rast, corner_order(rast, faces, order_by)


def _missing_vertex(faces: Tensor, table: Tensor) -> str:
    """The first view's largest or negative index that is out of range. Reads: for an error that is
    raised anyway.
    """
    for first, count, _, rows in table.tolist():
        low, high = faces[first : first + count].aminmax() if count else (0, -1)
        if low < 0 or high >= rows:
            return f"{int(high if high >= rows else low)} of {rows} vertices, counted from 0"
    raise AssertionError("every face names vertices that are there")


@_rasterize.register_fake
def _(clip, faces, table, most, pairs, height, width, order_by):
    N = len(table) * height * width
    ordered = 0 if order_by is None or backend.is_torch(clip) else 3 * N
    return clip.new_empty(len(table), height, width, 4), table.new_empty(ordered)


@torch.library.custom_op("trislat::rasterize_backward", mutates_args=())
def _rasterize_backward(
    grad: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> Tensor:
    """The gradient of the clip positions [P, 4]."""
    if backend.is_torch(clip):
        with torch.autocast(clip.device.type, enabled=False):
            return rasterize_torch_backward(grad, rast, clip, faces, table)
    return rasterize_triton_backward(
        grad.contiguous(), rast, clip, faces, table, known_order(order, rast, faces, table)
    )


@_rasterize_backward.register_fake
def _(grad, rast, clip, faces, table, order):
    return torch.empty_like(clip)


def _setup_context(ctx, inputs, output) -> None:
    clip, faces, table, *_ = inputs
    rast, order = output
    ctx.mark_non_differentiable(order)
    ctx.save_for_backward(rast, clip, faces, table, order)


def _backward(ctx, grad, grad_order):
    return torch.ops.trislat.rasterize_backward(grad, *ctx.saved_tensors), *[None] * 7


_rasterize.register_autograd(_backward, setup_context=_setup_context)


def rasterize(
    # [P, 4] positions x, y, z, w; NDC (x, y) / w = (-1, -1) is the top left corner of the picture
    clip: Tensor,
    faces: Tensor,  # [F, 3] int32 or int64
    height: int,
    width: int,
    table: Tensor | None = None,  # [V, 4]: clip_table of a MeshLayout; None: one view of one mesh
) -> Tensor:  # [V, H, W, 4] u, v, z / w, face + 1
    """Find the face that each pixel shows: barycentrics of its corners 0 and 1, its depth, and its
    number from 1; all 0 where there is none.

    Differentiable, to first order, in `clip` through (u, v). Computes in fp32 (float64 only on the
    torch path). Same inputs, same bits. With a table, a face's indices and number count from the
    first row and the first face of its view's mesh. On a GPU the host waits once, and never in the
    backward.

    Raises ValueError: wrong shapes, dtypes or devices; more than 2^23 pixels in a view or 2^24
    faces; faces that name a vertex that is not there.
    """
    if clip.ndim != 2 or clip.shape[1] != 4:
        raise ValueError(f"clip must be [P, 4], not {list(clip.shape)}")
    if clip.device != faces.device:
        raise ValueError(
            f"all tensors must be on one device, not on {clip.device} and {faces.device}"
        )
    clip = check_floats("clip", clip)
    faces = check_faces(faces)
    table = check_table(table, faces, len(clip))
    check_picture(height, width, len(table))
    if len(faces) >= FACES_MAX:
        raise ValueError(f"{len(faces)} faces are more than {FACES_MAX - 1}")
    most = len(faces)
    return _rasterize(clip, faces, table, most, most * len(table), height, width, None)[0]
