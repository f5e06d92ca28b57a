"""Rasterisation: the face that each pixel shows, and the barycentrics of the pixel in it.

V views, F faces, P clip rows (kernels.mesh.packing). Computes what TRELLIS trains its meshes with,
the CUDA rasteriser of nvdiffrast (Laine et al. 2020):

- Faces that reach out of the frustum -w <= x, y, z <= w are clipped. Both sides of a face are
  drawn.
- Vertices are snapped to 1/16 px; a pixel is covered if its centre is inside by exact integer edge
  functions, where left and top edges are inside (row 0 is at the top): two faces that share an edge
  cover every pixel along it once.
- The nearest z / w of the plane through the snapped vertices is seen; of equal ones, the later
  face.
- The perspective-correct barycentrics (u, v) are those of the positions before snapping. With e_k =
  (x_k, y_k) - f w_k for a pixel at f in NDC, a_0 = e_1 x e_2 and cyclic, (u, v) = (a_0, a_1) / (a_0
  + a_1 + a_2).

Gradients of (u, v) reach x, y, w of the clip positions; z / w and the face have none.
Two published rules: the clamps of u and v pass the gradient, and its denominator has 1e-6 added to
its magnitude. Derivatives of silhouettes come from kernels.mesh.antialias.

`rasterize_op` is the op without checks of shapes and dtypes.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.mesh.checks import (
    check_clip,
    check_devices,
    check_face_count,
    check_faces,
    check_floats,
    check_picture,
    check_table,
)
from kernels.mesh.rasterize_cpu import rasterize_torch, rasterize_torch_backward
from kernels.mesh.rasterize_gpu import rasterize_triton, rasterize_triton_backward


@torch.library.custom_op("trislat::rasterize", mutates_args=())
def rasterize_op(
    clip: Tensor,
    faces: Tensor,
    table: Tensor,
    most: int,
    pairs: int,
    height: int,
    width: int,
    order_by: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`rasterize` without checks; also returns the `corner_order` of its picture, for backwards.

    `most` is the largest number of faces of a view, `pairs` their sum over all views. The order is
    that of the rows in the table `order_by`; it is empty without one, and on the torch path.
    Raises ValueError for faces that name a vertex that is not there.
    """
    if backend.is_torch(clip):
        with torch.autocast(clip.device.type, enabled=False):
            rast, wrong = rasterize_torch(clip, faces, table, height, width)
        order = table.new_empty(0)
    else:
        rast, order, wrong = rasterize_triton(
            clip, faces, table, most, pairs, height, width, order_by
        )
    if wrong:
        what = _missing_vertex(faces, table)
        raise ValueError(
            f"{wrong} of {pairs} faces (over all views) name a vertex that their mesh does not "
            f"have: {what}"
        )
    return rast, order


def _missing_vertex(faces: Tensor, table: Tensor) -> str:
    """Name a vertex index that is out of range, and the range. Waits for the device."""
    for first, count, _, rows in table.tolist():
        low, high = faces[first : first + count].aminmax() if count else (0, -1)
        if low < 0 or high >= rows:
            return f"{int(high if high >= rows else low)} of {rows} vertices, counted from 0"
    raise AssertionError("every face names vertices that are there")


@rasterize_op.register_fake
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
    return rasterize_triton_backward(grad.contiguous(), rast, clip, faces, table, order)


@_rasterize_backward.register_fake
def _(grad, rast, clip, faces, table, order):
    return torch.empty_like(clip)


def _setup_context(ctx, inputs, output) -> None:
    clip, faces, table, *_ = inputs
    rast, order = output
    ctx.mark_non_differentiable(order)
    ctx.save_for_backward(rast, clip, faces, table, order)


def _backward(ctx, grad, grad_order):
    return _rasterize_backward(grad, *ctx.saved_tensors), *[None] * 7


rasterize_op.register_autograd(_backward, setup_context=_setup_context)


def rasterize(
    # [P, 4] positions x, y, z, w; NDC (x, y) / w = (-1, -1) is the top left corner of the picture
    clip: Tensor,
    faces: Tensor,  # [F, 3] int32 or int64
    height: int,
    width: int,
    table: Tensor | None = None,  # [V, 4]: clip_table of a MeshLayout; None: one view of one mesh
) -> Tensor:  # [V, H, W, 4] u, v, z / w, face + 1
    """Find the face that each pixel shows, and the pixel's barycentrics and depth in it.

    The barycentrics belong to corners 0 and 1; faces are numbered from 1; all four numbers are 0
    where there is no face. Differentiable, to first order, in `clip` through (u, v). Computes in
    fp32 (float64 only on the torch path). Same inputs, same bits. With a table, a face's indices
    and number count from the first row and the first face of its view's mesh. On a GPU the host
    waits once, and never in the backward.

    Raises ValueError: wrong shapes, dtypes or devices; more than 2^23 pixels in a view or 2^24
    faces; faces that name a vertex that is not there.
    """
    check_clip(clip)
    check_devices(clip, faces)
    clip = check_floats("clip", clip)
    faces = check_faces(faces)
    table = check_table(table, faces, len(clip))
    check_picture(height, width, len(table))
    most = len(faces)
    check_face_count(most)
    return rasterize_op(clip, faces, table, most, most * len(table), height, width, None)[0]
