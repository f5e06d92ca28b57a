"""Flat normals at pixels: that of the face which a pixel shows, n = normalize((v_1 - v_0) x (v_2 -
v_0)), in world axes.

Computed pixel by pixel, so faces that nobody sees cost nothing. No gradient reaches the
barycentrics: a face has one normal.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.mesh.packing import check_faces, check_floats, check_rast, check_table
from kernels.mesh.pixels_cpu import shown
from kernels.mesh.pixels_gpu import known_order, pixel_block
from kernels.reduce import sum_rows

LEAST = tl.constexpr(1e-12)  # length of a cross product below which it is not normalised


@triton.jit
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@triton.jit
def _difference(a_ptr, b_ptr, live):
    return (
        tl.load(a_ptr, live, 0.0) - tl.load(b_ptr, live, 0.0),
        tl.load(a_ptr + 1, live, 0.0) - tl.load(b_ptr + 1, live, 0.0),
        tl.load(a_ptr + 2, live, 0.0) - tl.load(b_ptr + 2, live, 0.0),
    )


@triton.jit
def _normal(vertices_ptr, rast_ptr, faces_ptr, table_ptr, n, size, inside):
    """A pixel's face: its rows, two edges, their cross product divided by its length (at least
    LEAST), and that length.
    """
    face = tl.load(rast_ptr + n * 4 + 3, inside, 0.0).to(tl.int64) - 1
    live = face >= 0
    t = table_ptr + n // size * 4
    f = faces_ptr + (tl.load(t, live, 0) + face) * 3
    base = tl.load(t + 2, live, 0)
    a = base + tl.load(f, live, 0)
    b = base + tl.load(f + 1, live, 0)
    c = base + tl.load(f + 2, live, 0)
    e1 = _difference(vertices_ptr + b * 3, vertices_ptr + a * 3, live)
    e2 = _difference(vertices_ptr + c * 3, vertices_ptr + a * 3, live)
    x, y, z = _cross(e1, e2)
    length = tl.maximum(tl.sqrt(x * x + y * y + z * z), LEAST)
    return live, (a, b, c), e1, e2, (x / length, y / length, z / length), length


@triton.jit(do_not_specialize=["M", "size"])
def _normals(vertices_ptr, rast_ptr, faces_ptr, table_ptr, out_ptr, M, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, _, _, _, normal, _ = _normal(vertices_ptr, rast_ptr, faces_ptr, table_ptr, n, size, n < M)
    for k in tl.static_range(3):
        tl.store(out_ptr + n * 3 + k, normal[k], n < M)


@triton.jit(do_not_specialize=["M", "size"])
def _normals_backward(
    grad_ptr,
    vertices_ptr,
    rast_ptr,
    faces_ptr,
    table_ptr,
    rows_ptr,
    key_ptr,
    M,
    size,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < M
    live, rows, e1, e2, normal, length = _normal(
        vertices_ptr, rast_ptr, faces_ptr, table_ptr, n, size, inside
    )
    g = grad_ptr + n * 3
    gx = tl.load(g, live, 0.0)
    gy = tl.load(g + 1, live, 0.0)
    gz = tl.load(g + 2, live, 0.0)
    along = tl.where(length > LEAST, gx * normal[0] + gy * normal[1] + gz * normal[2], 0.0)
    g = (
        (gx - along * normal[0]) / length,
        (gy - along * normal[1]) / length,
        (gz - along * normal[2]) / length,
    )
    g1, g2 = _cross(e2, g), _cross(g, e1)
    for k in tl.static_range(3):
        out = rows_ptr + n * 9 + k
        tl.store(out, -(g1[k] + g2[k]), inside)
        tl.store(out + 3, g1[k], inside)
        tl.store(out + 6, g2[k], inside)
        tl.store(key_ptr + n * 3 + k, tl.where(live, rows[k], -1).to(tl.int32), inside)


def _torch_normal(vertices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_normal`, of faces [M, 3]."""
    corner = vertices[rows.T]
    e1, e2 = corner[1] - corner[0], corner[2] - corner[0]
    cross = torch.linalg.cross(e1, e2)
    length = torch.linalg.vector_norm(cross, dim=1, keepdim=True).clamp_(min=LEAST.value)
    return e1, e2, cross / length, length


@torch.library.custom_op("trislat::flat_normals", mutates_args=())
def _flat_normals(
    vertices: Tensor, rast: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> Tensor:
    """[V, H, W, 3]."""
    V, H, W, _ = rast.shape
    M = V * H * W
    if backend.is_torch(vertices):
        s = shown(rast, faces, table)
        out = vertices.new_zeros(M, 3)
        out[s.at] = _torch_normal(vertices, s.rows)[2]
    else:
        out = vertices.new_empty(M, 3)
        block = pixel_block(backend.target(rast))
        grid = (triton.cdiv(M, block["BLOCK"]),)
        backend.launch(_normals, grid, vertices, rast, faces, table, out, M, H * W, **block)
    return out.view(V, H, W, 3)


@_flat_normals.register_fake
def _(vertices, rast, faces, table, order):
    return rast.new_empty(*rast.shape[:3], 3)


@torch.library.custom_op("trislat::flat_normals_backward", mutates_args=())
def _flat_normals_backward(
    grad: Tensor, vertices: Tensor, rast: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> Tensor:
    """The gradient of the vertices."""
    V, H, W, _ = rast.shape
    M = V * H * W
    if backend.is_torch(vertices):
        s = shown(rast, faces, table)
        e1, e2, normal, length = _torch_normal(vertices, s.rows)
        g = grad.reshape(M, 3)[s.at]
        along = torch.where(length > LEAST.value, (g * normal).sum(1, keepdim=True), 0)
        g = (g - along * normal) / length
        g1, g2 = torch.linalg.cross(e2, g), torch.linalg.cross(g, e1)
        spread = torch.stack([-(g1 + g2), g1, g2], 1).view(-1, 3)
        return torch.zeros_like(vertices).index_add_(0, s.rows.flatten(), spread)
    rows = vertices.new_empty(M * 3, 3)
    key = torch.empty(M * 3, dtype=torch.int32, device=rast.device)
    block = pixel_block(backend.target(rast))
    grid = (triton.cdiv(M, block["BLOCK"]),)
    grad = grad.contiguous()
    backend.launch(
        _normals_backward, grid, grad, vertices, rast, faces, table, rows, key, M, H * W, **block
    )
    return sum_rows(rows, key, known_order(order, rast, faces, table), len(vertices))


@_flat_normals_backward.register_fake
def _(grad, vertices, rast, faces, table, order):
    return torch.empty_like(vertices)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return torch.ops.trislat.flat_normals_backward(grad, *ctx.saved_tensors), None, None, None, None


_flat_normals.register_autograd(_backward, setup_context=_setup_context)


def flat_normals(
    vertices: Tensor,  # [N, 3] world units
    rast: Tensor,  # [V, H, W, 4] of `rasterize`
    faces: Tensor,  # [F, 3], as `rasterize` had them
    table: Tensor | None = None,  # [V, 4]: vertex_table of a MeshLayout
    # of `kernels.mesh.pixels_gpu.corner_order`, where one is at hand; else the backward sorts
    order: Tensor | None = None,
) -> Tensor:  # [V, H, W, 3]
    """The unit normal of the face that each pixel shows, by the right-hand rule on its corners; 0
    where there is no face.

    Differentiable, to first order, in the vertices. Computes in fp32 (float64 only on the torch
    path). Same inputs, same bits. Raises ValueError for wrong shapes, dtypes or devices.
    """
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        raise ValueError(f"vertices must be [N, 3], not {list(vertices.shape)}")
    vertices = check_floats("vertices", vertices)
    faces = check_faces(faces)
    table = check_table(table, faces, len(vertices))
    rast = check_rast(rast, vertices, faces, table)
    return _flat_normals(
        vertices,
        rast,
        faces,
        table,
        faces.new_empty(0, dtype=torch.int64) if order is None else order,
    )


def flat_normals_reference(vertices: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
    """`flat_normals` of one view by the book, with autograd."""
    face = rast[..., 3].long() - 1
    if len(faces) == 0:
        return rast.new_zeros(*rast.shape[:3], 3) + 0 * vertices.sum()
    a, b, c = vertices[faces.long()].unbind(1)
    normal = torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=1)
    return torch.where((face >= 0)[..., None], normal[face.clamp(min=0)], 0)
