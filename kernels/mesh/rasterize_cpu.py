"""Rasterisation on a CPU: from faces to rows of pixels to pixels.

Covered pixels are found without testing each pixel: on a row of pixels, an edge is a bound on the
column. Edge functions are integers below 2^53 (vertices stand on a grid of 1/16 px), which float64
holds exactly.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.mesh.frustum import EMPTY, NOWHERE, STEPS, Pieces, clip_faces, on_grid

CHUNK = 1 << 22  # pixels expanded at once


class Covered(NamedTuple):
    """The M pixels that show a face."""

    at: Tensor  # [M] index in [V, H, W]
    rows: Tensor  # [M, 3] rows of the face's corners


def covered_pixels(rast: Tensor, faces: Tensor, table: Tensor) -> Covered:
    """The covered pixels of a picture of `rasterize`, [V, H, W, 4]."""
    _, H, W, _ = rast.shape
    return covered_by(rast[..., 3].reshape(-1).long() - 1, faces, table, H * W)


def covered_by(face: Tensor, faces: Tensor, table: Tensor, size: int) -> Covered:
    """The covered pixels, given the face of each pixel, below 0 for none: [V size]."""
    at = (face >= 0).nonzero()[:, 0]
    view = table[torch.div(at, size, rounding_mode="floor")]
    return Covered(at, faces[view[:, 0] + face[at]].long() + view[:, 2:3])


class Snapped(NamedTuple):
    """Clip positions snapped to the screen's grid."""

    xy: Tensor  # [..., 2] int32: 1/16 px from the middle of the picture
    depth: Tensor  # [...] z / w
    code: Tensor  # [...] int32: a bit for each of the six planes that the position is outside of


def snap(clip: Tensor, height: int, width: int) -> Snapped:
    """Snap positions [..., 4] to the grid of 1/16 px, rounding to even; 0 outside the frustum."""
    x, y, z, w = clip.unbind(-1)
    code = (
        (x > w).int()
        + 2 * (x < -w).int()
        + 4 * (y > w).int()
        + 8 * (y < -w).int()
        + 16 * (z > w).int()
        + 32 * (z < -w).int()
    )
    finite = (x.abs() + y.abs() + z.abs() + w.abs()) < torch.inf
    code = torch.where(finite & ~((w == 0) & (code == 0)), code, NOWHERE)
    inside = code == 0
    scale = 1 / torch.where(inside, w, 1)
    xy = on_grid(clip[..., :2] * scale[..., None], height, width)
    return Snapped(
        torch.where(inside[..., None], xy, 0).int(), torch.where(inside, z * scale, 0), code
    )


def _all_faces(faces: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All Q pairs of a view and a face of it: view, face, and the face's rows [Q, 3].

    The last result says whether the rows are in range.
    """
    count = table[:, 1]
    total = int(count.sum())
    view = torch.repeat_interleave(count, output_size=total)
    face = torch.arange(total, device=faces.device) - (count.cumsum(0) - count)[view]
    local = faces[table[view, 0] + face].long()
    good = ((local >= 0) & (local < table[view, 3, None])).all(1)
    return view, face, local + table[view, 2, None], good


def rasterize_torch(
    clip: Tensor, faces: Tensor, table: Tensor, height: int, width: int
) -> tuple[Tensor, int]:
    """The picture [V, H, W, 4] (u, v, z / w, face + 1), and the number of faces with missing rows.

    Where rows are missing the picture is 0.
    """
    V = len(table)
    view, face, rows, good = _all_faces(faces, table)
    bad = int((~good).sum())
    if bad:
        return clip.new_zeros(V, height, width, 4), bad
    snapped = snap(clip, height, width)
    code = snapped.code[rows]
    whole = (code == 0).all(1)
    a, b, c = code.unbind(1)
    partly = (~whole & ((a & b & c) == 0) & ((a | b | c) < NOWHERE)).nonzero()[:, 0]
    whole = whole.nonzero()[:, 0]
    pieces = Pieces(
        snapped.xy[rows[whole]].view(-1, 6), snapped.depth[rows[whole]], view[whole], face[whole]
    )
    if len(partly):
        r = rows[partly]
        cut = clip_faces(
            clip[r], snapped.xy[r], snapped.depth[r], view[partly], face[partly], height, width
        )
        pieces = Pieces(*(torch.cat(pair) for pair in zip(pieces, cut, strict=True)))
    keys = torch.full((V * height * width,), EMPTY, device=clip.device)
    _cover(keys, pieces, height, width)
    return resolve(keys, clip, faces, table, height, width), 0


def _cover(keys: Tensor, pieces: Pieces, height: int, width: int) -> None:
    """Lower the key of every pixel to the nearest piece's; of equal depths to the later face's."""
    xy = pieces.xy.double().view(-1, 3, 2)
    area = _cross(xy[:, 1] - xy[:, 0], xy[:, 2] - xy[:, 0])
    low = xy.amin(1)
    high = xy.amax(1)
    # minus the position of pixel centre (0, 0)
    half = xy.new_tensor([width, height]) * (STEPS // 2) - STEPS // 2
    first = ((low + half) / STEPS).ceil().clamp_(min=0)
    last = torch.minimum(((high + half) / STEPS).floor(), xy.new_tensor([width - 1, height - 1]))
    size = (last - first + 1).clamp_(min=0)
    used = ((area != 0) & (size > 0).all(1)).nonzero()[:, 0]
    cost = (size[used, 0] * size[used, 1]).cumsum(0)
    begin = 0
    while begin < len(used):
        spent = float(cost[begin - 1]) if begin else 0.0
        end = max(begin + 1, int(torch.searchsorted(cost, spent + CHUNK, right=True)))
        r = used[begin:end]
        part = (xy[r], area[r], first[r, 1], size[r, 1], first[r, 0], last[r, 0])
        _cover_part(keys, *part, pieces.depth[r], pieces.view[r], pieces.face[r], height, width)
        begin = end


def _cover_part(
    keys, xy, area, top, rows, left, right, depth, view, face, height: int, width: int
) -> None:
    """`_cover` for some of the pieces: [R, ...] tensors, one row a piece."""
    # turns the edges around, instead of swapping two vertices
    sign = torch.where(area > 0, 1.0, -1.0).double()
    run = torch.repeat_interleave(rows.long())
    step = torch.arange(len(run), device=run.device) - (rows.cumsum(0) - rows).long()[run]
    y = top[run] + step
    lower = left[run]
    upper = right[run]
    edges = []
    for k in range(3):
        a = xy[:, (k + 1) % 3]
        b = xy[:, (k + 2) % 3]
        dx, dy = ((b - a) * sign[:, None]).unbind(1)
        # left and top edges are inside
        bias = torch.where((dy < 0) | ((dy == 0) & (dx > 0)), 0.0, 1.0).double()
        # E at the centre of column 0 of row y: (a - s) x d, s = 16 pixel + 8 - 8 size
        x0 = a[:, 0] + (STEPS // 2 * width - STEPS // 2)
        y0 = a[:, 1] + (STEPS // 2 * height - STEPS // 2)
        origin = x0 * dy - y0 * dx
        slope = -STEPS * dy
        e = origin[run] + (STEPS * dx)[run] * y
        room = e - bias[run]
        m = slope[run]
        bound = -room / torch.where(m == 0, 1, m)
        lower = torch.where(m > 0, torch.maximum(lower, bound.ceil()), lower)
        upper = torch.where(m < 0, torch.minimum(upper, bound.floor()), upper)
        upper = torch.where((m == 0) & (room < 0), lower - 1, upper)
        edges.append((e, slope))
    count = (upper - lower + 1).clamp_(min=0).long()
    pixel = torch.repeat_interleave(count)
    column = torch.arange(len(pixel), device=run.device) - (count.cumsum(0) - count)[pixel]
    x = lower[pixel] + column
    piece = run[pixel]
    z = 0
    for k, (e, slope) in enumerate(edges):
        z = z + (e[pixel] + slope[piece] * x) * depth[piece, k]
    z = (z / area[piece].abs()).float() + 0.0
    bits = z.view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # ascending with z
    key = (bits << 32) | (0xFFFFFFFF - face[piece])
    at = (view[piece] * height + y[pixel].long()) * width + x.long()
    keys.scatter_reduce_(0, at, key, "amin")


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _edges(clip: Tensor, s: Covered, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The corners of each pixel's face as seen from the pixel, in float64.

    Returns x_k - f_x w_k and y_k - f_y w_k of corner k, [3, 2, M]; f [2, M]; clip [M, 3, 4]. These
    differences lose digits where faces are small, and their cross products lose more.
    """
    corner = clip[s.rows].double()
    x = s.at % width
    y = torch.div(s.at, width, rounding_mode="floor") % height
    f = torch.stack([(2 * x + 1).double() / width - 1, (2 * y + 1).double() / height - 1])
    return (corner[..., :2].permute(1, 2, 0) - f * corner[..., 3].mT[:, None]), f, corner


def resolve(
    keys: Tensor, clip: Tensor, faces: Tensor, table: Tensor, height: int, width: int
) -> Tensor:
    """Barycentrics and depth of the nearest face, from the clip positions that were not snapped."""
    face = torch.where(keys == EMPTY, -1, 0xFFFFFFFF - (keys & 0xFFFFFFFF))
    s = covered_by(face, faces, table, height * width)
    e, _, corner = _edges(clip, s, height, width)
    a = torch.stack([_cross(e[(k + 1) % 3].T, e[(k + 2) % 3].T) for k in range(3)])
    # 0: a face without area that covers a pixel as snapped
    nonzero = lambda value: torch.where(value != 0, value, 1)
    u, v = (a[:2] / nonzero(a.sum(0))).clamp_(0, 1)
    over = (u + v).clamp_(min=1)
    w = (corner[..., 3].mT * a).sum(0)
    z = ((corner[..., 2].mT * a).sum(0) / nonzero(w)).clamp_(-1, 1)
    rast = clip.new_zeros(len(keys), 4)
    rast[s.at] = torch.stack([u / over, v / over, z, face[s.at] + 1.0], 1).to(clip.dtype)
    return rast.view(len(table), height, width, 4)


def rasterize_torch_backward(
    grad: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, table: Tensor
) -> Tensor:
    """The gradient of the clip positions [P, 4], from that of (u, v)."""
    _, H, W, _ = rast.shape
    s = covered_pixels(rast, faces, table)
    e, f, _ = _edges(clip, s, H, W)
    g = grad.reshape(-1, 4)[s.at, :2].double()
    (x0, y0), (x1, y1), (x2, y2) = e
    a0 = x1 * y2 - y1 * x2
    a1 = x2 * y0 - y2 * x0
    a2 = x0 * y1 - y0 * x1
    total = a0 + a1 + a2
    inverse = 1 / (total + torch.copysign(torch.full_like(total, 1e-6), total))
    g0 = g[:, 0] * inverse
    g1 = g[:, 1] * inverse
    mean = (g0 * a0 + g1 * a1) * inverse
    gx0 = mean * (y2 - y1) - g1 * y2
    gx1 = mean * (y0 - y2) + g0 * y2
    gx2 = mean * (y1 - y0) - g0 * y1 + g1 * y0
    gy0 = mean * (x1 - x2) + g1 * x2
    gy1 = mean * (x2 - x0) - g0 * x2
    gy2 = mean * (x0 - x1) + g0 * x1 - g1 * x0
    gx = torch.stack([gx0, gx1, gx2], 1)
    gy = torch.stack([gy0, gy1, gy2], 1)
    gw = -f[0, :, None] * gx - f[1, :, None] * gy
    gradient = torch.stack([gx, gy, torch.zeros_like(gx), gw], 2)
    return torch.zeros_like(clip).index_add_(
        0, s.rows.flatten(), gradient.view(-1, 4).to(clip.dtype)
    )
