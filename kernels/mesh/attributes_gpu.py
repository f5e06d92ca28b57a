"""Values of vertices and normals of faces at pixels, on a GPU: one thread a pixel.

M = V H W pixels, C channels. Pointers as in kernels.mesh.pixels_gpu. The backward kernels write
what each corner of a pixel's face gets, and the row it belongs to (`key_ptr`); `sum_corners` adds
them up.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.mesh.pixels_gpu import face_rows, pixel_block, store_keys, sum_corners

LEAST = tl.constexpr(1e-12)  # length of a cross product below which it is not normalised


@triton.jit
def _face_of(rast_ptr, faces_ptr, table_ptr, n, size, inside):
    """u, v, the rows of the face's corners, and two masks: there is a face; its rows are valid."""
    a, b, c, live = face_rows(rast_ptr, faces_ptr, table_ptr, n, size, inside)
    t = table_ptr + n // size * 4
    base = tl.load(t + 2, live, 0)
    rows = tl.load(t + 3, live, 0)
    low = tl.minimum(tl.minimum(a, b), c)
    high = tl.maximum(tl.maximum(a, b), c)
    named = live & (low >= base) & (high < base + rows)
    u = tl.load(rast_ptr + n * 4, inside, 0.0)
    v = tl.load(rast_ptr + n * 4 + 1, inside, 0.0)
    return u, v, a, b, c, live, named


@triton.jit(do_not_specialize=["M", "C", "size"])
def _interpolate(
    attributes_ptr, rast_ptr, faces_ptr, table_ptr, out_ptr, M, C, size, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u, v, a, b, c, live, named = _face_of(rast_ptr, faces_ptr, table_ptr, n, size, n < M)
    for k in range(0, C):
        first = tl.load(attributes_ptr + a * C + k, named, 0.0)
        second = tl.load(attributes_ptr + b * C + k, named, 0.0)
        third = tl.load(attributes_ptr + c * C + k, named, 0.0)
        value = u * first + v * second
        value += (1 - u - v) * third
        value = tl.where(named, value, float("nan"))
        tl.store(out_ptr + n * C + k, tl.where(live, value, 0.0), n < M)


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
    u, v, a, b, c, _, named = _face_of(rast_ptr, faces_ptr, table_ptr, n, size, inside)
    gu = tl.zeros([BLOCK], tl.float32)
    gv = tl.zeros([BLOCK], tl.float32)
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
    weight = weight_ptr + n * 3
    tl.store(weight, u, inside)
    tl.store(weight + 1, v, inside)
    tl.store(weight + 2, 1 - u - v, inside)
    store_keys(key_ptr + n * 3, a, b, c, named, inside)


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
    """A pixel's face: its rows, two edges, unit normal, and the length of their cross product.

    The length is at least LEAST.
    """
    a, b, c, live = face_rows(rast_ptr, faces_ptr, table_ptr, n, size, inside)
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
    g1 = _cross(e2, g)
    g2 = _cross(g, e1)
    for k in tl.static_range(3):
        out = rows_ptr + n * 9 + k
        tl.store(out, -(g1[k] + g2[k]), inside)
        tl.store(out + 3, g1[k], inside)
        tl.store(out + 6, g2[k], inside)
    store_keys(key_ptr + n * 3, rows[0], rows[1], rows[2], live, inside)


def interpolate_triton(attributes: Tensor, rast: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """Interpolate attributes at every pixel, [V, H, W, C]."""
    V, H, W, _ = rast.shape
    M = V * H * W
    C = attributes.shape[1]
    out = attributes.new_empty(V, H, W, C)
    block = pixel_block(backend.target(rast))
    grid = (triton.cdiv(M, block["BLOCK"]),)
    backend.launch(_interpolate, grid, attributes, rast, faces, table, out, M, C, H * W, **block)
    return out


def interpolate_triton_backward(
    grad: Tensor, attributes: Tensor, rast: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the attributes and of rast."""
    V, H, W, _ = rast.shape
    M = V * H * W
    N, C = attributes.shape
    grad_rast = torch.empty_like(rast)
    weight = rast.new_empty(M * 3)
    key = torch.empty(M * 3, dtype=torch.int32, device=rast.device)
    block = pixel_block(backend.target(rast))
    grid = (triton.cdiv(M, block["BLOCK"]),)
    inputs = (grad, attributes, rast, faces, table)
    outputs = (grad_rast, weight, key)
    backend.launch(_interpolate_backward, grid, *inputs, *outputs, M, C, H * W, **block)
    return sum_corners(grad.view(M, C), key, order, N, weight, 3), grad_rast


def normals_triton(vertices: Tensor, rast: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """The unit normal of every pixel's face, [V, H, W, 3]."""
    V, H, W, _ = rast.shape
    M = V * H * W
    out = vertices.new_empty(V, H, W, 3)
    block = pixel_block(backend.target(rast))
    grid = (triton.cdiv(M, block["BLOCK"]),)
    backend.launch(_normals, grid, vertices, rast, faces, table, out, M, H * W, **block)
    return out


def normals_triton_backward(
    grad: Tensor, vertices: Tensor, rast: Tensor, faces: Tensor, table: Tensor, order: Tensor
) -> Tensor:
    """The gradient of the vertices."""
    V, H, W, _ = rast.shape
    M = V * H * W
    rows = vertices.new_empty(M * 3, 3)
    key = torch.empty(M * 3, dtype=torch.int32, device=rast.device)
    block = pixel_block(backend.target(rast))
    grid = (triton.cdiv(M, block["BLOCK"]),)
    inputs = (grad, vertices, rast, faces, table)
    backend.launch(_normals_backward, grid, *inputs, rows, key, M, H * W, **block)
    return sum_corners(rows, key, order, len(vertices))
