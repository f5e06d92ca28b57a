"""Silhouettes, blended by the area that they cover, and with it their gradient. V views, C
channels, P clip rows.

For each pair of neighbouring pixels that show different faces (no face is one too) the nearer
face's edge that crosses the line between the two centres, at a distance D in [0, 1] px from its
own, is a silhouette if the face across it folds to the same side or is missing, and counts if it is
closer to perpendicular than to parallel to that line. The pixel that the edge runs through (its
face's own for D < 1/2, else the neighbour) takes |1/2 - D| of the other's value. So a picture is a
continuous function of the silhouettes, with a derivative that moves their vertices (Laine et al.
2020; TRELLIS trains so).

The choice of pair, edge and side is not differentiated; nor is a saturated blend (|1/2 - D| = 1/2).
One published rule: in the inverse of the edge's extent across the line, 1e-3 px is added to its
magnitude in the derivative.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.mesh.antialias_cpu import antialias_torch, antialias_torch_backward
from kernels.mesh.antialias_gpu import antialias_triton, antialias_triton_backward
from kernels.mesh.packing import (
    check_faces,
    check_floats,
    check_rast,
    check_table,
    opposite_vertices,
    single_table,
)
from kernels.mesh.pixels_gpu import known_order


@torch.library.custom_op("trislat::antialias", mutates_args=())
def _antialias(
    image: Tensor,
    rast: Tensor,
    clip: Tensor,
    faces: Tensor,
    table: Tensor,
    opposite: Tensor,
    order: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The blended image, and alpha and code [2, V, H, W] of the pairs."""
    if backend.is_torch(image):
        with torch.autocast(image.device.type, enabled=False):
            return antialias_torch(image, rast, clip, faces, table, opposite)
    return antialias_triton(image, rast, clip, faces, table, opposite)


@_antialias.register_fake
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
    order = known_order(order, rast, faces, table)
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
    image, clip = torch.ops.trislat.antialias_backward(grad, *ctx.saved_tensors)
    return image, None, clip, None, None, None, None


_antialias.register_autograd(_backward, setup_context=_setup_context)


def antialias(
    image: Tensor,  # [V, H, W, C]
    rast: Tensor,  # [V, H, W, 4] of `rasterize`
    clip: Tensor,  # [P, 4], as `rasterize` had them
    faces: Tensor,  # [F, 3], as `rasterize` had them
    table: Tensor | None = None,  # [V, 4]: clip_table of a MeshLayout
    # [F, 3] of `kernels.mesh.packing.opposite_vertices`; needed with a table
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
    if clip.ndim != 2 or clip.shape[1] != 4:
        raise ValueError(f"clip must be [P, 4], not {list(clip.shape)}")
    if image.ndim != 4 or image.shape[:3] != rast.shape[:3]:
        raise ValueError(
            f"image must be {[*rast.shape[:3]]} pixels of C channels, not {list(image.shape)}"
        )
    if clip.device != image.device:
        raise ValueError(
            f"all tensors must be on one device, not on {image.device} and {clip.device}"
        )
    image = check_floats("image", image)
    clip = check_floats("clip", clip)
    faces = check_faces(faces)
    if opposite is None:
        if table is not None:
            raise ValueError(
                "a table needs `opposite` beside it: whose rows are whose is not known from the "
                "table"
            )
        opposite = opposite_vertices(
            faces, single_table(len(faces), len(clip), faces.device), len(clip)
        )
    if opposite.shape != faces.shape:
        raise ValueError(f"opposite must be {list(faces.shape)}, not {list(opposite.shape)}")
    table = check_table(table, faces, len(clip))
    rast = check_rast(rast, image, faces, table)
    order = faces.new_empty(0, dtype=torch.int64) if order is None else order
    return _antialias(image, rast, clip.to(image.dtype), faces, table, opposite.int(), order)[0]


def antialias_reference(image: Tensor, rast: Tensor, clip: Tensor, faces: Tensor) -> Tensor:
    """`antialias` of one view by the book: one pair of pixels after another, edges in a dictionary,
    autograd.
    """
    thirds: dict[tuple, list[int]] = {}  # the first two different third corners of every edge
    for face in faces.tolist():
        for k in range(3) if len(set(face)) == 3 else ():
            known = thirds.setdefault(tuple(sorted((face[k - 2], face[k - 1]))), [])
            if face[k] not in known and len(known) < 2:
                known.append(face[k])
    _, H, W, _ = image.shape
    c = image[0]
    depth, number = rast[0, ..., 2:].unbind(-1)
    rows = [list(row.unbind(0)) for row in c.unbind(0)]
    for down in (False, True):
        for j in range(H - down):
            for i in range(W - (not down)):
                p0 = (j, i)
                p1 = (j + down, i + (not down))
                if number[p0] == number[p1]:
                    continue
                second = number[p0] == 0 or (number[p1] != 0 and depth[p1] <= depth[p0])
                near = p1 if second else p0
                face = faces[int(number[near]) - 1].tolist()
                size = clip.new_tensor([W, H]) / 2
                middle = clip.new_tensor([near[1] + 0.5 - W / 2, near[0] + 0.5 - H / 2])
                alpha = _pair_reference(
                    clip, face, thirds, size, middle, down, -1.0 if second else 1.0
                )
                if alpha is not None:
                    y, x = p0 if alpha > 0 else p1
                    rows[y][x] = rows[y][x] + alpha * (c[p1] - c[p0])
    return torch.stack([torch.stack(row) for row in rows])[None]


def _pair_reference(clip, face, thirds, size, middle, down: bool, ds: float) -> Tensor | None:
    """The blend of one pair: its value exact, its derivative by the published rule; None where it
    does not blend.
    """
    screen = lambda n: clip[n, :2] / clip[n, 3] * size - middle
    cross = lambda p, q: p[0] * q[1] - p[1] * q[0]
    point = [screen(n) for n in face]
    area = lambda p: cross(p[1] - p[0], p[2] - p[0]).signbit()
    best = -torch.inf
    chosen = None
    for k in range(3):
        p, q = (point[n].flip(0) if down else point[n] for n in (k - 2, k - 1))
        dx, dy = q - p
        if p[1].signbit() == q[1].signbit():
            continue
        r = ds * (p[0] * dy - p[1] * dx) / dy
        if r > best:
            best = r.item()
            chosen = (k, p, dx, dy, r)
    if chosen is None:
        return None
    k, p, dx, dy, r = chosen
    known = thirds.get(tuple(sorted((face[k - 2], face[k - 1]))), [])
    others = [n for n in known if n != face[k]] if face[k] in known else []
    if others and area([screen(others[0]) if n == k else point[n] for n in range(3)]) != area(
        point
    ):
        return None  # the surface goes on
    if dy.abs() < dx.abs() or not -1 / 16 < best < 1 + 1 / 16:
        return None
    value = ds * (0.5 - r.detach().clamp(0, 1))
    if value.abs() == 0.5 or (value == 0 and ds > 0):
        return value
    moved = (p[0] * dy - p[1] * dx) / (dy + torch.copysign(torch.full_like(dy, 1e-3), dy))
    return value + moved.detach() - moved
