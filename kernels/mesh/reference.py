"""The mesh renderer written plainly: one face, one pixel, one pair of pixels after another.

Slow references for tests and benchmarks, with autograd and without kernels. Each handles one view
of one mesh; `render_mesh_reference` goes through the views.
"""

import torch
from torch import Tensor

from kernels.camera import Camera, Image
from kernels.checks import Host, host_list
from kernels.mesh.clip import projection
from kernels.mesh.render import split_channels


def to_clip_reference(vertices: Tensor, matrix: Tensor) -> Tensor:
    """Clip positions of one view: homogeneous coordinates times the matrix [4, 4]."""
    homogeneous = torch.cat([vertices, vertices.new_ones(len(vertices), 1)], 1)
    return homogeneous @ matrix.to(vertices).T


def rasterize_reference(clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """`rasterize` one view: every face with every pixel, in float64 and exact integers."""
    nearest = torch.full((height, width), torch.inf)
    shown = torch.full((height, width), -1)
    px = torch.arange(width)[None] * 16 + 8 - 8 * width
    py = torch.arange(height)[:, None] * 16 + 8 - 8 * height
    for n, face in enumerate(faces.tolist()):
        polygon = _clip_reference([tuple(c) for c in clip.detach()[face].tolist()])
        screen = [
            (round(x / w * width * 8), round(y / w * height * 8), z / w) for x, y, z, w in polygon
        ]
        for b, c in zip(screen[1:], screen[2:], strict=False):
            corners = [screen[0], b, c]
            x0, y0, _ = screen[0]
            twice = (b[0] - x0) * (c[1] - y0) - (c[0] - x0) * (b[1] - y0)
            if twice == 0:
                continue
            if twice < 0:
                corners = [screen[0], c, b]
            covered = torch.ones(height, width, dtype=torch.bool)
            depth = torch.zeros(height, width, dtype=torch.float64)
            for k in range(3):
                ax, ay, _ = corners[(k + 1) % 3]
                bx, by, _ = corners[(k + 2) % 3]
                dx = bx - ax
                dy = by - ay
                e = (ax - px) * dy - (ay - py) * dx
                covered &= e >= 0 if dy < 0 or (dy == 0 and dx > 0) else e > 0
                depth += e * corners[k][2] / abs(twice)
            depth = depth.float()  # as the z-buffer has it: equal depths tie
            here = covered & (depth <= nearest)
            nearest = torch.where(here, depth, nearest)
            shown = torch.where(here, n, shown)
    fx = (2 * torch.arange(width, dtype=torch.float64)[None] + 1) / width - 1
    fy = (2 * torch.arange(height, dtype=torch.float64)[:, None] + 1) / height - 1
    if len(faces) == 0:
        return clip.new_zeros(1, height, width, 4) + 0 * clip.sum()
    x, y, z, w = clip[faces[shown.clamp(min=0)].long()].double().unbind(-1)  # [H, W, 3] each
    x = x - fx[..., None] * w
    y = y - fy[..., None] * w
    following = [1, 2, 0]
    before = [2, 0, 1]
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
            previous = polygon[-1:] + polygon[:-1]
            for a, b in zip(previous, polygon, strict=True):
                da = inside(a)
                db = inside(b)
                if da * db < 0:
                    share = da / (da - db)
                    kept.append(tuple(p + share * (q - p) for p, q in zip(a, b, strict=True)))
                if db >= 0:
                    kept.append(b)
            polygon = kept
    return polygon


def interpolate_reference(attributes: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
    """`interpolate` one view by the formula."""
    face = rast[..., 3].long() - 1
    if len(faces) == 0:
        return rast.new_zeros(*rast.shape[:3], attributes.shape[1]) + 0 * attributes.sum()
    a0, a1, a2 = attributes[faces[face.clamp(min=0)].long()].unbind(-2)
    u = rast[..., :1]
    v = rast[..., 1:2]
    return torch.where((face >= 0)[..., None], u * a0 + v * a1 + (1 - u - v) * a2, 0)


def flat_normals_reference(vertices: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
    """`flat_normals` of one view by the formula, for every face."""
    face = rast[..., 3].long() - 1
    if len(faces) == 0:
        return rast.new_zeros(*rast.shape[:3], 3) + 0 * vertices.sum()
    a, b, c = vertices[faces.long()].unbind(1)
    normal = torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=1)
    return torch.where((face >= 0)[..., None], normal[face.clamp(min=0)], 0)


def antialias_reference(image: Tensor, rast: Tensor, clip: Tensor, faces: Tensor) -> Tensor:
    """`antialias` one view: one pair of pixels after another, edges in a dictionary."""
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
    """The blend of one pair of pixels, None where it does not blend.

    Its value is exact, its derivative follows the published rule.
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
    if others:
        folded = [screen(others[0]) if n == k else point[n] for n in range(3)]
        if area(folded) != area(point):
            return None  # the surface goes on
    if dy.abs() < dx.abs() or not -1 / 16 < best < 1 + 1 / 16:
        return None
    value = ds * (0.5 - r.detach().clamp(0, 1))
    if value.abs() == 0.5 or (value == 0 and ds > 0):
        return value
    moved = (p[0] * dy - p[1] * dx) / (dy + torch.copysign(torch.full_like(dy, 1e-3), dy))
    return value + moved.detach() - moved


def move_outlines_reference(picture: Tensor, rast: Tensor, clip: Tensor, faces: Tensor) -> Tensor:
    """`move_outlines` of one view: one pair of pixels after another."""
    _, H, W, _ = picture.shape
    image = [list(row.unbind(0)) for row in torch.zeros_like(picture[0]).unbind(0)]
    number = rast[0, ..., 3].long()
    for down in (False, True):
        for j in range(H - down):
            for i in range(W - (not down)):
                pair = (j, i), (j + down, i + (not down))
                if (number[pair[0]] > 0) == (number[pair[1]] > 0):
                    continue
                inside, outside = pair if number[pair[0]] > 0 else pair[::-1]
                u, v = rast[0][inside][:2].detach()
                point = torch.stack([u, v, 1 - u - v]) @ clip[faces[number[inside] - 1].long()]
                place = point[int(down)] / point[3] * (H if down else W) / 2
                sign = 1 if inside == pair[0] else -1
                jump = (picture[0][inside] - picture[0][outside]).detach()
                step = 0.5 * sign * (place - place.detach()) * jump
                for y, x in pair:
                    image[y][x] = image[y][x] + step
    return torch.stack([torch.stack(row) for row in image])[None]


def render_mesh_reference(
    vertices: Tensor,
    faces: Tensor,
    attributes: Tensor | None,
    vertex_starts: Host,
    face_starts: Host,
    camera: Camera,
    view_scene: Host,
    near: float = 1.0,
    far: float = 3.0,
) -> Image:
    """`render_mesh` view after view, by the references of its stages."""
    starts = host_list("vertex_starts", vertex_starts)
    first = host_list("face_starts", face_starts)
    views = []
    matrix = projection(camera, near, far, vertices.dtype)
    for v, s in enumerate(host_list("view_scene", view_scene)):
        own = slice(starts[s], starts[s + 1])
        triangles = faces[first[s] : first[s + 1]]
        clip = to_clip_reference(vertices[own], matrix[v])
        rast = rasterize_reference(clip, triangles, camera.height, camera.width).to(clip)
        parts = [(rast[..., 3:] > 0).to(rast), interpolate_reference(clip[:, 3:], rast, triangles)]
        parts.append(flat_normals_reference(vertices[own], rast, triangles))
        if attributes is not None:
            parts.append(interpolate_reference(attributes[own], rast, triangles))
        views.append(antialias_reference(torch.cat(parts, -1), rast, clip, triangles))
    channels = 0 if attributes is None else attributes.shape[1]
    blank = vertices.new_zeros(0, camera.height, camera.width, 5 + channels)
    return split_channels(torch.cat([blank, *views]).permute(0, 3, 1, 2), channels)
