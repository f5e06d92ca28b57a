"""Values of vertices at pixels: V views, N rows, C channels, M = V H W pixels.

out = u a_0 + v a_1 + (1 - u - v) a_2 with the barycentrics of kernels.mesh.rasterize and the values
a_k of the face's corners, 0 where there is no face. Backward: each corner gets its weight times the
gradient, added up row by row in a fixed order (kernels.reduce), and (u, v) get the gradient's
products with a_0 - a_2 and a_1 - a_2.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.mesh.packing import check_faces, check_floats, check_rast, check_table
from kernels.mesh.pixels_cpu import shown
from kernels.mesh.pixels_gpu import known_order, pixel_block
from kernels.reduce import sum_rows


@triton.jit
def _face_rows(rast_ptr, faces_ptr, table_ptr, n, size, inside):
    """u, v, the three rows of a pixel's face, and whether it has one with rows that are there."""
    face = tl.load(rast_ptr + n * 4 + 3, inside, 0.0).to(tl.int64) - 1
    live = face >= 0
    t = table_ptr + n // size * 4
    f = faces_ptr + (tl.load(t, live, 0) + face) * 3
    base, rows = tl.load(t + 2, live, 0), tl.load(t + 3, live, 0)
    a = tl.load(f, live, 0)
    b = tl.load(f + 1, live, 0)
    c = tl.load(f + 2, live, 0)
    named = (tl.minimum(tl.minimum(a, b), c) >= 0) & (tl.maximum(tl.maximum(a, b), c) < rows)
    u = tl.load(rast_ptr + n * 4, inside, 0.0)
    v = tl.load(rast_ptr + n * 4 + 1, inside, 0.0)
    return u, v, base + a, base + b, base + c, live, live & named


@triton.jit(do_not_specialize=["M", "C", "size"])
def _interpolate(
    attributes_ptr, rast_ptr, faces_ptr, table_ptr, out_ptr, M, C, size, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u, v, a, b, c, live, named = _face_rows(rast_ptr, faces_ptr, table_ptr, n, size, n < M)
    for k in range(0, C):
        value = u * tl.load(attributes_ptr + a * C + k, named, 0.0) + v * tl.load(
            attributes_ptr + b * C + k, named, 0.0
        )
        value += (1 - u - v) * tl.load(attributes_ptr + c * C + k, named, 0.0)
        tl.store(
            out_ptr + n * C + k, tl.where(live, tl.where(named, value, float("nan")), 0.0), n < M
        )


@triton.jit(do_not_specialize=["M", "C", "size"])
def _interpolate_backward(
    grad_ptr,
    attributes_ptr,
    rast_ptr,
    faces_ptr,
    table_ptr,
    grad_rast_ptr,
    weight_ptr,
    key_ptr,
    M,
    C,
    size,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < M
    u, v, a, b, c, _, named = _face_rows(rast_ptr, faces_ptr, table_ptr, n, size, inside)
    gu, gv = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k in range(0, C):
        g = tl.load(grad_ptr + n * C + k, named, 0.0)
        last = tl.load(attributes_ptr + c * C + k, named, 0.0)
        gu += g * (tl.load(attributes_ptr + a * C + k, named, 0.0) - last)
        gv += g * (tl.load(attributes_ptr + b * C + k, named, 0.0) - last)
    out = grad_rast_ptr + n * 4
    tl.store(out, gu, inside)
    tl.store(out + 1, gv, inside)
    tl.store(out + 2, tl.zeros_like(gu), inside)
    tl.store(out + 3, tl.zeros_like(gu), inside)
    weight, key = weight_ptr + n * 3, key_ptr + n * 3
    tl.store(weight, u, inside)
    tl.store(weight + 1, v, inside)
    tl.store(weight + 2, 1 - u - v, inside)
    tl.store(key, tl.where(named, a, -1).to(tl.int32), inside)
    tl.store(key + 1, tl.where(named, b, -1).to(tl.int32), inside)
    tl.store(key + 2, tl.where(named, c, -1).to(tl.int32), inside)


def _weights(rast: Tensor, at: Tensor) -> Tensor:
    """[M, 3] of the covered pixels."""
    u, v = rast.reshape(-1, 4)[at, :2].unbind(1)
    return torch.stack([u, v, 1 - u - v], 1)


@torch.library.custom_op("trislat::interpolate", mutates_args=())
def _interpolate_op(
    attributes: Tensor, rast: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> Tensor:
    """[V, H, W, C]."""
    V, H, W, _ = rast.shape
    M = V * H * W
    C = attributes.shape[1]
    if backend.is_torch(attributes):
        s = shown(rast, faces, table)
        if len(s.rows) and not 0 <= int(s.rows.min()) <= int(s.rows.max()) < len(attributes):
            raise ValueError(
                f"faces name row {int(s.rows.max())} of {len(attributes)} rows of attributes"
            )
        out = attributes.new_zeros(M, C)
        weights = _weights(rast, s.at)
        value = weights[:, :1] * attributes[s.rows[:, 0]]
        for k in (1, 2):
            value.addcmul_(weights[:, k : k + 1], attributes[s.rows[:, k]])
        out[s.at] = value
    else:
        out = attributes.new_empty(M, C)
        block = pixel_block(backend.target(rast))
        grid = (triton.cdiv(M, block["BLOCK"]),)
        backend.launch(
            _interpolate, grid, attributes, rast, faces, table, out, M, C, H * W, **block
        )
    return out.view(V, H, W, C)


@_interpolate_op.register_fake
def _(attributes, rast, faces, table, order):
    return rast.new_empty(*rast.shape[:3], attributes.shape[1])


@torch.library.custom_op("trislat::interpolate_backward", mutates_args=())
def _interpolate_backward_op(
    grad: Tensor, attributes: Tensor, rast: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the attributes and of rast."""
    V, H, W, _ = rast.shape
    M = V * H * W
    N, C = attributes.shape
    if backend.is_torch(attributes):
        s = shown(rast, faces, table)
        g = grad.reshape(M, C)[s.at]
        spread = _weights(rast, s.at)[..., None] * g[:, None]  # [covered, 3, C]
        total = torch.zeros_like(attributes).index_add_(0, s.rows.flatten(), spread.view(-1, C))
        last = attributes[s.rows[:, 2]]
        uv = [(g * (attributes[s.rows[:, k]] - last)).sum(1) for k in (0, 1)]
        grad_rast = torch.zeros_like(rast).view(M, 4)
        grad_rast[s.at, :2] = torch.stack(uv, 1)
        return total, grad_rast.view_as(rast)
    grad = grad.contiguous()
    grad_rast = torch.empty_like(rast)
    weight = rast.new_empty(M * 3)
    key = torch.empty(M * 3, dtype=torch.int32, device=rast.device)
    block = pixel_block(backend.target(rast))
    inputs = (grad, attributes, rast, faces, table)
    grid = (triton.cdiv(M, block["BLOCK"]),)
    backend.launch(
        _interpolate_backward, grid, *inputs, grad_rast, weight, key, M, C, H * W, **block
    )
    return sum_rows(
        grad.view(M, C), key, known_order(order, rast, faces, table), N, weight, 3
    ), grad_rast


@_interpolate_backward_op.register_fake
def _(grad, attributes, rast, faces, table, order):
    return torch.empty_like(attributes), torch.empty_like(rast)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return *torch.ops.trislat.interpolate_backward(grad, *ctx.saved_tensors), None, None, None


_interpolate_op.register_autograd(_backward, setup_context=_setup_context)


def interpolate(
    attributes: Tensor,  # [N, C] of vertices
    rast: Tensor,  # [V, H, W, 4] of `rasterize`
    # [F, 3]; as `rasterize` had them, or others of as many rows, such as three corners of each
    # face's own
    faces: Tensor,
    # [V, 4]: vertex_table of a MeshLayout for values of vertices, clip_table for those of clip rows
    table: Tensor | None = None,
    # of `kernels.mesh.pixels_gpu.corner_order`, where one is at hand; else the backward sorts
    order: Tensor | None = None,
) -> Tensor:  # [V, H, W, C]
    """The attributes at every pixel, 0 where there is no face.

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
    return _interpolate_op(
        attributes,
        rast,
        faces,
        table,
        faces.new_empty(0, dtype=torch.int64) if order is None else order,
    )


def interpolate_reference(attributes: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
    """`interpolate` of one view by the book, with autograd."""
    face = rast[..., 3].long() - 1
    if len(faces) == 0:
        return rast.new_zeros(*rast.shape[:3], attributes.shape[1]) + 0 * attributes.sum()
    a0, a1, a2 = attributes[faces[face.clamp(min=0)].long()].unbind(-2)
    u = rast[..., :1]
    v = rast[..., 1:2]
    return torch.where((face >= 0)[..., None], u * a0 + v * a1 + (1 - u - v) * a2, 0)
