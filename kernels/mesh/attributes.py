"""Values at pixels: interpolated attributes of vertices, and flat normals of faces.

V views, N rows, C channels. Interpolation is

    out = u a_0 + v a_1 + (1 - u - v) a_2

with the barycentrics of kernels.mesh.rasterize and the values a_k of the face's corners, 0 where
there is no face. Backward: each corner gets its weight times the gradient, added up row by row in a
fixed order (kernels.reduce); u and v get the gradient's products with a_0 - a_2 and a_1 - a_2.

A flat normal is n = normalize((v_1 - v_0) x (v_2 - v_0)), in world axes. It is computed pixel by
pixel, so faces that no pixel shows cost nothing. No gradient reaches the barycentrics: a face has
one normal.

`interpolate_op` and `flat_normals_op` are the ops without checks.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.mesh.attributes_cpu import (
    interpolate_torch,
    interpolate_torch_backward,
    normals_torch,
    normals_torch_backward,
)
from kernels.mesh.attributes_gpu import (
    interpolate_triton,
    interpolate_triton_backward,
    normals_triton,
    normals_triton_backward,
)
from kernels.mesh.checks import check_faces, check_floats, check_order, check_rast, check_table


@torch.library.custom_op("trislat::interpolate", mutates_args=())
def interpolate_op(
    attributes: Tensor, rast: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> Tensor:
    """`interpolate` without checks."""
    if backend.is_torch(attributes):
        return interpolate_torch(attributes, rast, faces, table)
    return interpolate_triton(attributes, rast, faces, table)


@interpolate_op.register_fake
def _(attributes, rast, faces, table, order):
    return rast.new_empty(*rast.shape[:3], attributes.shape[1])


@torch.library.custom_op("trislat::interpolate_backward", mutates_args=())
def _interpolate_backward(
    grad: Tensor, attributes: Tensor, rast: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the attributes and of rast."""
    if backend.is_torch(attributes):
        return interpolate_torch_backward(grad, attributes, rast, faces, table)
    return interpolate_triton_backward(grad.contiguous(), attributes, rast, faces, table, order)


@_interpolate_backward.register_fake
def _(grad, attributes, rast, faces, table, order):
    return torch.empty_like(attributes), torch.empty_like(rast)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward_interpolate(ctx, grad):
    return *_interpolate_backward(grad, *ctx.saved_tensors), None, None, None


interpolate_op.register_autograd(_backward_interpolate, setup_context=_save)


@torch.library.custom_op("trislat::flat_normals", mutates_args=())
def flat_normals_op(
    vertices: Tensor, rast: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> Tensor:
    """`flat_normals` without checks."""
    if backend.is_torch(vertices):
        return normals_torch(vertices, rast, faces, table)
    return normals_triton(vertices, rast, faces, table)


@flat_normals_op.register_fake
def _(vertices, rast, faces, table, order):
    return rast.new_empty(*rast.shape[:3], 3)


@torch.library.custom_op("trislat::flat_normals_backward", mutates_args=())
def _flat_normals_backward(
    grad: Tensor, vertices: Tensor, rast: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> Tensor:
    """The gradient of the vertices."""
    if backend.is_torch(vertices):
        return normals_torch_backward(grad, vertices, rast, faces, table)
    return normals_triton_backward(grad.contiguous(), vertices, rast, faces, table, order)


@_flat_normals_backward.register_fake
def _(grad, vertices, rast, faces, table, order):
    return torch.empty_like(vertices)


def _backward_normals(ctx, grad):
    return _flat_normals_backward(grad, *ctx.saved_tensors), None, None, None, None


flat_normals_op.register_autograd(_backward_normals, setup_context=_save)


def interpolate(
    attributes: Tensor,  # [N, C] of vertices
    rast: Tensor,  # [V, H, W, 4] of `rasterize`
    # [F, 3]: as `rasterize` had them, or as many others, such as three corners for each face
    faces: Tensor,
    # [V, 4]: vertex_table of a MeshLayout for values of vertices, clip_table for those of clip rows
    table: Tensor | None = None,
    # of `kernels.mesh.pixels_gpu.corner_order`, where one is at hand; else the backward sorts
    order: Tensor | None = None,
) -> Tensor:  # [V, H, W, C]
    """Interpolate the attributes of vertices at every pixel, 0 where there is no face.

    Differentiable, to first order, in the attributes and in (u, v) of `rast`. Computes in fp32
    (float64 only on the torch path). Same inputs, same bits.

    Raises ValueError: wrong shapes, dtypes or devices; on the torch path a face that names a row
    that is not there, which the kernels, where a check would wait for the device, show as NaN.
    """
    if attributes.ndim != 2:
        raise ValueError(f"attributes must be [N, C], not {list(attributes.shape)}")
    attributes = check_floats("attributes", attributes)
    faces = check_faces(faces)
    table = check_table(table, faces, len(attributes))
    rast = check_rast(rast, attributes, faces, table)
    return interpolate_op(attributes, rast, faces, table, check_order(order, faces))


def flat_normals(
    vertices: Tensor,  # [N, 3] world units
    rast: Tensor,  # [V, H, W, 4] of `rasterize`
    faces: Tensor,  # [F, 3], as `rasterize` had them
    table: Tensor | None = None,  # [V, 4]: vertex_table of a MeshLayout
    # of `kernels.mesh.pixels_gpu.corner_order`, where one is at hand; else the backward sorts
    order: Tensor | None = None,
) -> Tensor:  # [V, H, W, 3]
    """Compute the unit normal of the face that each pixel shows, 0 where there is no face.

    Its direction follows the right-hand rule on the face's corners. Differentiable, to first order,
    in the vertices. Computes in fp32 (float64 only on the torch path). Same inputs, same bits.

    Raises ValueError for wrong shapes, dtypes or devices.
    """
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        raise ValueError(f"vertices must be [N, 3], not {list(vertices.shape)}")
    vertices = check_floats("vertices", vertices)
    faces = check_faces(faces)
    table = check_table(table, faces, len(vertices))
    rast = check_rast(rast, vertices, faces, table)
    return flat_normals_op(vertices, rast, faces, table, check_order(order, faces))
