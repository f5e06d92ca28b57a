"""Projection of vertices to clip positions, for every pair of a view and a vertex of its scene.

V views, B scenes, N vertices, P pairs. NDC x and y are -1 to 1 from the left to the right and from
the top to the bottom of the picture, w is the camera's z, and z / w runs from 0 at the near to 1 at
the far distance; since rasterisation clips at z = -w, what is seen begins nearer: at near far / (2
far - near). Backward: a vertex adds up the gradients of its views, in the order of the views.

The tables of a layout travel together (kernels.views): `views_ptr` [V, 3], `scenes_ptr` [B, 4] and
`by_scene_ptr` [V].
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.camera import Camera
from kernels.mesh.pixels_gpu import pixel_block
from kernels.views import ViewTable


def projection(
    camera: Camera, near: float, far: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The matrices from world to clip positions, [V, 4, 4].

    They are the published ones, but with the camera's own principal point.
    """
    k = camera.intrinsics.detach().double()
    e = camera.extrinsics.detach().double()
    p = k.new_zeros(len(k), 4, 4)
    p[:, 0, 0] = 2 * k[:, 0, 0]
    p[:, 0, 2] = 2 * k[:, 0, 2] - 1
    p[:, 1, 1] = 2 * k[:, 1, 1]
    p[:, 1, 2] = 2 * k[:, 1, 2] - 1
    p[:, 2, 2] = far / (far - near)
    p[:, 2, 3] = near * far / (near - far)
    p[:, 3, 2] = 1
    return (p @ e).to(dtype)


@triton.jit
def _load4(ptr, live):
    return (
        tl.load(ptr, live, 0.0),
        tl.load(ptr + 1, live, 0.0),
        tl.load(ptr + 2, live, 0.0),
        tl.load(ptr + 3, live, 0.0),
    )


@triton.jit
def _to_clip(vertices_ptr, matrix_ptr, views_ptr, clip_ptr, BLOCK: tl.constexpr):
    v = tl.program_id(1)
    first = tl.load(views_ptr + v * 3)
    count = tl.load(views_ptr + v * 3 + 1)
    row = tl.load(views_ptr + v * 3 + 2)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < count
    p = vertices_ptr + (first + n) * 3
    x = tl.load(p, live, 0.0)
    y = tl.load(p + 1, live, 0.0)
    z = tl.load(p + 2, live, 0.0)
    for i in tl.static_range(4):
        m = _load4(matrix_ptr + v * 16 + i * 4, True)
        tl.store(clip_ptr + (row + n) * 4 + i, m[0] * x + m[1] * y + m[2] * z + m[3], live)


@triton.jit
def _to_clip_backward(
    grad_ptr, matrix_ptr, views_ptr, scenes_ptr, by_scene_ptr, out_ptr, BLOCK: tl.constexpr
):
    s = scenes_ptr + tl.program_id(1) * 4
    first = tl.load(s)
    count = tl.load(s + 1)
    entry = tl.load(s + 2)
    views = tl.load(s + 3)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < count
    x = tl.zeros([BLOCK], tl.float32)
    y = tl.zeros([BLOCK], tl.float32)
    z = tl.zeros([BLOCK], tl.float32)
    for e in range(entry, entry + views):
        v = tl.load(by_scene_ptr + e)
        g = _load4(grad_ptr + (tl.load(views_ptr + v * 3 + 2) + n) * 4, live)
        for i in tl.static_range(4):
            m = _load4(matrix_ptr + v * 16 + i * 4, True)
            x += m[0] * g[i]
            y += m[1] * g[i]
            z += m[2] * g[i]
    out = out_ptr + (first + n) * 3
    tl.store(out, x, live)
    tl.store(out + 1, y, live)
    tl.store(out + 2, z, live)


@torch.library.custom_op("trislat::to_clip", mutates_args=())
def _to_clip_op(
    vertices: Tensor,
    matrix: Tensor,
    views: Tensor,
    scenes: Tensor,
    by_scene: Tensor,
    most: int,
    rows: int,
) -> Tensor:
    """The clip positions [P, 4]."""
    clip = vertices.new_empty(rows, 4)
    if backend.is_torch(vertices):
        with torch.autocast(vertices.device.type, enabled=False):
            for m, (first, count, row) in zip(matrix, views.tolist(), strict=True):
                torch.addmm(
                    m[:, 3],
                    vertices[first : first + count],
                    m[:, :3].T,
                    out=clip[row : row + count],
                )
        return clip
    block = pixel_block(backend.target(vertices))
    grid = (triton.cdiv(most, block["BLOCK"]), len(views))
    backend.launch(_to_clip, grid, vertices, matrix, views, clip, **block)
    return clip


@_to_clip_op.register_fake
def _(vertices, matrix, views, scenes, by_scene, most, rows):
    return vertices.new_empty(rows, 4)


@torch.library.custom_op("trislat::to_clip_backward", mutates_args=())
def _to_clip_backward_op(
    grad: Tensor,
    matrix: Tensor,
    views: Tensor,
    scenes: Tensor,
    by_scene: Tensor,
    most: int,
    vertices: int,
) -> Tensor:
    """The gradient of the vertices [N, 3]."""
    grad = grad.contiguous()
    if backend.is_torch(grad):
        out = grad.new_zeros(vertices, 3)
        with torch.autocast(grad.device.type, enabled=False):
            for m, (first, count, row) in zip(matrix, views.tolist(), strict=True):
                out[first : first + count].addmm_(grad[row : row + count], m[:, :3])
        return out
    out = grad.new_empty(vertices, 3)
    block = pixel_block(backend.target(grad))
    grid = (triton.cdiv(most, block["BLOCK"]), len(scenes))
    backend.launch(_to_clip_backward, grid, grad, matrix, views, scenes, by_scene, out, **block)
    return out


@_to_clip_backward_op.register_fake
def _(grad, matrix, views, scenes, by_scene, most, vertices):
    return grad.new_empty(vertices, 3)


def _setup_context(ctx, inputs, output) -> None:
    vertices, *tensors, ctx.most, _ = inputs
    ctx.vertices = len(vertices)
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    tables = ctx.saved_tensors
    return _to_clip_backward_op(grad, *tables, ctx.most, ctx.vertices), *[None] * 6


_to_clip_op.register_autograd(_backward, setup_context=_setup_context)


def to_clip(
    vertices: Tensor,  # [N, 3] fp32 (float64 only on the torch path)
    matrix: Tensor,  # [V, 4, 4] of `projection`, in the same dtype
    layout: ViewTable,  # the vertices that each view sees
) -> Tensor:  # [P, 4]
    """Project every view's vertices; internal, without checks.

    Differentiable, to first order, in the vertices; nothing waits for a GPU.
    """
    tables = (layout.views, layout.scenes, layout.by_scene)
    return _to_clip_op(
        vertices.contiguous(), matrix.contiguous(), *tables, layout.most, layout.pair_start[-1]
    )
