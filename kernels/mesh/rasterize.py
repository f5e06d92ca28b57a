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
from kernels.checks import check_whole
from kernels.mesh.packing import TABLE, single_table
from kernels.mesh.rasterize_cpu import rasterize_torch, rasterize_torch_backward
from kernels.mesh.rasterize_gpu import (
    PIXELS_MAX,
    corner_order,
    rasterize_triton,
    rasterize_triton_backward,
)

FACES_MAX = 1 << 24  # a face's number is stored in fp32


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


def known_order(order: Tensor, rast: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """`order` of the corners of `rast`, found now if it was not before (then it is empty)."""
    return order if len(order) else corner_order(rast, faces, table)


def _setup_context(ctx, inputs, output) -> None:
    clip, faces, table, *_ = inputs
    rast, order = output
    ctx.mark_non_differentiable(order)
    ctx.save_for_backward(rast, clip, faces, table, order)


def _backward(ctx, grad, grad_order):
    return torch.ops.trislat.rasterize_backward(grad, *ctx.saved_tensors), *[None] * 7


_rasterize.register_autograd(_backward, setup_context=_setup_context)


def check_faces(faces: Tensor) -> Tensor:
    """Faces as the kernels take them. Raises ValueError for another shape or dtype."""
    if faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(f"faces must be [F, 3], not {list(faces.shape)}")
    if faces.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"faces must be int32 or int64, not {faces.dtype}")
    return faces.int().contiguous()


def check_floats(name: str, value: Tensor) -> Tensor:
    """A tensor as the kernels take it: contiguous fp32, or float64 on the torch path. Raises
    ValueError for integers.
    """
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, not {value.dtype}")
    if value.dtype == torch.float64:
        if not backend.is_torch(value):
            raise ValueError("the kernels compute in fp32: float64 is for the torch path only")
        return value.contiguous()
    return value.float().contiguous()


def check_table(table: Tensor | None, faces: Tensor, rows: int) -> Tensor:
    """The table given, or that of one view of one mesh."""
    if table is None:
        return single_table(len(faces), rows, faces.device)
    if table.ndim != 2 or table.shape[1] != TABLE or table.dtype != torch.int64:
        raise ValueError(f"table must be [V, {TABLE}] int64, not {list(table.shape)} {table.dtype}")
    return table


def check_rast(rast: Tensor, beside: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """The picture of `rasterize` as the kernels take it, in the dtype of `beside`. Raises
    ValueError for another shape or device.
    """
    if rast.ndim != 4 or rast.shape[3] != 4:
        raise ValueError(f"rast must be [V, H, W, 4], not {list(rast.shape)}")
    if len(rast) != len(table):
        raise ValueError(f"rast has {len(rast)} views, the table {len(table)}")
    for other in (rast, faces):
        if other.device != beside.device:
            raise ValueError(
                f"all tensors must be on one device, not on {beside.device} and {other.device}"
            )
    return rast.to(beside.dtype).contiguous()


def check_picture(height: int, width: int, views: int) -> None:
    """Raises ValueError for a size that the kernels do not have."""
    check_whole("height", height), check_whole("width", width)
    if height * width > PIXELS_MAX:
        raise ValueError(
            f"a picture of {height} x {width} has {height * width} pixels, more than {PIXELS_MAX}"
        )
    if 3 * views * height * width >= 2**31:
        raise ValueError(
            f"{views} views of {height} x {width} are more than 2^31 corners of pixels: render "
            "fewer at once"
        )


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
    clip, faces = check_floats("clip", clip), check_faces(faces)
    table = check_table(table, faces, len(clip))
    check_picture(height, width, len(table))
    if len(faces) >= FACES_MAX:
        raise ValueError(f"{len(faces)} faces are more than {FACES_MAX - 1}")
    most = len(faces)
    return _rasterize(clip, faces, table, most, most * len(table), height, width, None)[0]


def rasterize_reference(clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """`rasterize` of one view by the book: every face with every pixel, in float64 and exact
    integers, and autograd.
    """
    nearest = torch.full((height, width), torch.inf)
    shown = torch.full((height, width), -1)
    px, py = (
        torch.arange(width)[None] * 16 + 8 - 8 * width,
        torch.arange(height)[:, None] * 16 + 8 - 8 * height,
    )
    for n, face in enumerate(faces.tolist()):
        polygon = _clip_reference([tuple(c) for c in clip.detach()[face].tolist()])
        screen = [
            (round(x / w * width * 8), round(y / w * height * 8), z / w) for x, y, z, w in polygon
        ]
        for b, c in zip(screen[1:], screen[2:], strict=False):
            corners = [screen[0], b, c]
            twice = (b[0] - corners[0][0]) * (c[1] - corners[0][1]) - (c[0] - corners[0][0]) * (
                b[1] - corners[0][1]
            )
            if twice == 0:
                continue
            if twice < 0:
                corners = [screen[0], c, b]
            covered, depth = (
                torch.ones(height, width, dtype=torch.bool),
                torch.zeros(height, width, dtype=torch.float64),
            )
            for k in range(3):
                (ax, ay, _), (bx, by, _) = corners[(k + 1) % 3], corners[(k + 2) % 3]
                dx, dy = bx - ax, by - ay
                e = (ax - px) * dy - (ay - py) * dx
                covered &= e >= 0 if dy < 0 or (dy == 0 and dx > 0) else e > 0
                depth += e * corners[k][2] / abs(twice)
            depth = depth.float()  # as the z-buffer has it: equal depths tie
            here = covered & (depth <= nearest)
            nearest, shown = torch.where(here, depth, nearest), torch.where(here, n, shown)
    fx = (2 * torch.arange(width, dtype=torch.float64)[None] + 1) / width - 1
    fy = (2 * torch.arange(height, dtype=torch.float64)[:, None] + 1) / height - 1
    if len(faces) == 0:
        return clip.new_zeros(1, height, width, 4) + 0 * clip.sum()
    x, y, z, w = clip[faces[shown.clamp(min=0)].long()].double().unbind(-1)  # [H, W, 3] each
    x, y = x - fx[..., None] * w, y - fy[..., None] * w
    following, before = [1, 2, 0], [2, 0, 1]
    a = x[..., following] * y[..., before] - y[..., following] * x[..., before]
    total = a.sum(-1, keepdim=True)
    true = (a[..., :2] / total).clamp(0, 1).detach()
    true = true / true.sum(-1, keepdim=True).clamp(min=1)
    # published rule: for the gradient
    uv = a[..., :2] / (total + torch.copysign(torch.full_like(total, 1e-6), total))
    uv = true + uv - uv.detach()
    depth = ((z * a).sum(-1) / (w * a).sum(-1)).clamp(-1, 1).detach()
    rast = torch.cat([uv, depth[..., None], (shown + 1.0)[..., None]], -1)
    return torch.where((shown >= 0)[..., None], rast, 0)[None]


def _clip_reference(polygon: list[tuple]) -> list[tuple]:
    """The part of a polygon of clip positions inside the frustum."""
    for axis in range(3):
        for sign in (1, -1):
            inside = lambda p, axis=axis, sign=sign: p[3] + sign * p[axis]
            kept = []
            for a, b in zip([polygon[-1], *polygon[:-1]] if polygon else [], polygon, strict=True):
                da, db = inside(a), inside(b)
                if da * db < 0:
                    kept.append(
                        tuple(p + da / (da - db) * (q - p) for p, q in zip(a, b, strict=True))
                    )
                if db >= 0:
                    kept.append(b)
            polygon = kept
    return polygon
