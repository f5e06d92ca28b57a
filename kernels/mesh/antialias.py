"""Antialiasing of silhouettes by the area that they cover, and with it their gradient.

V views, C channels, P clip rows. For each pair of neighbouring pixels that show different faces (no
face counts as one too), take the nearer face and its edge that crosses the line between the two
centres, at a distance D in [0, 1] px from the centre of the face's pixel. This edge is a silhouette
if there is no face across it, or if that face folds back to the same side. It counts if it is
closer to perpendicular than to parallel to that line. The pixel that the edge runs through (the
face's own for D < 1/2, else the neighbour) takes |1/2 - D| of the other's value. So a picture is a
continuous function of the silhouettes, with a derivative that moves their vertices (Laine et al.
2020; TRELLIS trains so).

The choice of pair, edge and side is not differentiated; nor is a saturated blend (|1/2 - D| = 1/2).
One published rule: in the inverse of the edge's extent across the line, 1e-3 px is added to its
magnitude in the derivative.

`antialias_op` is the op without checks.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.mesh.antialias_cpu import antialias_torch, antialias_torch_backward
from kernels.mesh.antialias_gpu import antialias_triton, antialias_triton_backward
from kernels.mesh.checks import (
    check_clip,
    check_devices,
    check_faces,
    check_floats,
    check_order,
    check_rast,
    check_table,
)


@torch.library.custom_op("trislat::antialias", mutates_args=())
def antialias_op(
    image: Tensor,
    rast: Tensor,
    clip: Tensor,
    faces: Tensor,
    table: Tensor,
    opposite: Tensor,
    order: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`antialias` without checks; also returns alpha and code of the pairs, [2, V, H, W].

    The order is for the backward.
    """
    if backend.is_torch(image):
        with torch.autocast(image.device.type, enabled=False):
            return antialias_torch(image, rast, clip, faces, table, opposite)
    return antialias_triton(image, rast, clip, faces, table, opposite)


@antialias_op.register_fake
def _(image, rast, clip, faces, table, opposite, order):
    size = (2, *rast.shape[:3])
    return torch.empty_like(image), image.new_empty(size), image.new_empty(size, dtype=torch.int8)


@torch.library.custom_op("trislat::antialias_backward", mutates_args=())
def _antialias_backward(
    grad: Tensor,
    image: Tensor,
    alpha: Tensor,
    code: Tensor,
    rast: Tensor,
    clip: Tensor,
    faces: Tensor,
    table: Tensor,
    order: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the image and of the clip positions."""
    if backend.is_torch(image):
        with torch.autocast(image.device.type, enabled=False):
            return antialias_torch_backward(grad, image, alpha, code, rast, clip, faces, table)
    return antialias_triton_backward(
        grad.contiguous(), image, alpha, code, rast, clip, faces, table, order
    )


@_antialias_backward.register_fake
def _(grad, image, alpha, code, rast, clip, *rest):
    return torch.empty_like(image), torch.empty_like(clip)


def _setup_context(ctx, inputs, output) -> None:
    image, rast, clip, faces, table, _, order = inputs
    _, alpha, code = output
    ctx.mark_non_differentiable(alpha, code)
    ctx.save_for_backward(image, alpha, code, rast, clip, faces, table, order)


def _backward(ctx, grad, grad_alpha, grad_code):
    image, clip = _antialias_backward(grad, *ctx.saved_tensors)
    return image, None, clip, None, None, None, None


antialias_op.register_autograd(_backward, setup_context=_setup_context)


def opposite_vertices(
    faces: Tensor,  # [F, 3] int32
    # [B, 4] int64: first face, number of faces, first vertex, number of vertices
    scene_table: Tensor,
    vertices: int,  # of all scenes
) -> Tensor:  # [F, 3] int32
    """Find the vertex across each edge of each face, -1 where there is none.

    Entry k belongs to the edge without corner k; it is the third corner of the other face at that
    edge. An edge is a pair of vertex indices (positions do not matter, so a seam of split vertices
    is open). Of three and more faces at an edge the first two different third corners count, in the
    order of the faces, and only for each other, as in the published table, which is filled in
    order. A face that names a vertex twice has no edges; a repeated face counts once. Sorts the 3 F
    edges once; waits for nothing.
    """
    F = len(faces)
    if F == 0:
        return faces.new_empty(0, 3)
    # first vertex of the face's scene
    scene = torch.repeat_interleave(scene_table[:, 2], scene_table[:, 1], output_size=F)
    corner = faces.long() + scene[:, None]
    # a list as an index would be copied to the device, which waits
    a = corner.roll(-1, 1)
    b = corner.roll(1, 1)
    good = (a != b) & (corner != a) & (corner != b)
    good &= ((faces >= 0) & (faces < 2**31 - 1)).all(1, keepdim=True)
    key = torch.where(good, torch.minimum(a, b) * vertices + torch.maximum(a, b), -1).flatten()
    key, order = key.sort(stable=True)
    third = faces.flatten()[order]
    at = torch.arange(3 * F, device=faces.device)
    begins = torch.ones_like(key, dtype=torch.bool)
    begins[1:] = key[1:] != key[:-1]
    first = torch.cummax(torch.where(begins, at, 0), 0).values  # where the edge's faces begin
    one = third[first]
    other = torch.where(third != one, at, 3 * F)
    # the first face with another third corner, perhaps of another edge
    later = other.flip(0).cummin(0).values.flip(0)[first]
    found = later.clamp(max=3 * F - 1)
    two = torch.where((later < 3 * F) & (key[found] == key), third[found], -1)
    across = torch.where(third == one, two, torch.where(third == two, one, -1))
    across.masked_fill_(key < 0, -1)
    return torch.empty_like(across).scatter_(0, order, across).view(F, 3)


def antialias(
    image: Tensor,  # [V, H, W, C]
    rast: Tensor,  # [V, H, W, 4] of `rasterize`
    clip: Tensor,  # [P, 4], as `rasterize` had them
    faces: Tensor,  # [F, 3], as `rasterize` had them
    table: Tensor | None = None,  # [V, 4]: clip_table of a MeshLayout
    # [F, 3] of `opposite_vertices`; needed with a table
    opposite: Tensor | None = None,
    # of `kernels.mesh.pixels_gpu.corner_order`, where one is at hand; else the backward sorts
    order: Tensor | None = None,
) -> Tensor:  # [V, H, W, C]
    """Blend the image's pixels across the silhouettes of the mesh.

    Differentiable, to first order, in the image and, through the silhouettes, in x, y, w of `clip`.
    Computes in fp32 (float64 only on the torch path). Same inputs, same bits; nothing waits for a
    GPU.

    Raises ValueError: wrong shapes, dtypes or devices; a table without `opposite`.
    """
    check_clip(clip)
    if image.ndim != 4 or image.shape[:3] != rast.shape[:3]:
        raise ValueError(
            f"image must be {[*rast.shape[:3]]} pixels of C channels, not {list(image.shape)}"
        )
    check_devices(image, clip)
    image = check_floats("image", image)
    clip = check_floats("clip", clip)
    faces = check_faces(faces)
    if table is not None and opposite is None:
        raise ValueError(
            "a table needs `opposite` beside it: the table does not say which rows belong to one "
            "scene"
        )
    table = check_table(table, faces, len(clip))
    if opposite is None:
        opposite = opposite_vertices(faces, table, len(clip))
    if opposite.shape != faces.shape:
        raise ValueError(f"opposite must be {list(faces.shape)}, not {list(opposite.shape)}")
    rast = check_rast(rast, image, faces, table)
    clip = clip.to(image.dtype)
    order = check_order(order, faces)
    return antialias_op(image, rast, clip, faces, table, opposite.int(), order)[0]
