"""Differentiable pictures of triangle meshes: B scenes, V views, N vertices and F faces in all.

Stages, each one launch for all scenes and views: to_clip -> rasterize -> interpolate and
flat_normals -> antialias, and back. What is computed is what TRELLIS trains its meshes with (Xiang
et al. 2024, on nvdiffrast, Laine et al. 2020). Coverage, depth, normals and colours are antialiased
together, which is the same as one by one: a blend does not depend on the values.

Two deliberate differences: the principal point may lie anywhere (the published matrix mirrors its
y), and a scene without faces shows the background as any pixel without a face does, normals 0.5
included (published: zeros).
"""

import torch
from torch import Tensor

from kernels.camera import Camera, Image
from kernels.checks import Host, check_tensors, check_whole, host_list
from kernels.mesh.antialias import antialias, antialias_reference
from kernels.mesh.clip import projection, to_clip, to_clip_reference
from kernels.mesh.interpolate import interpolate, interpolate_reference
from kernels.mesh.normals import flat_normals, flat_normals_reference
from kernels.mesh.outlines import move_outlines
from kernels.mesh.packing import (
    FACES_MAX,
    check_faces,
    check_floats,
    check_picture,
    make_mesh_layout,
    opposite_vertices,
)
from kernels.mesh.rasterize_reference import rasterize_reference

SILHOUETTES = ("edges", "pixels")


def render_mesh(
    vertices: Tensor,  # [N, 3] world units
    faces: Tensor,  # [F, 3] int32 or int64: indices into the vertices of the face's own scene
    # [N, 3] colours or [N, 6] colours and normal_map; None: geometry only
    attributes: Tensor | None,
    # [B + 1]: scene b owns the vertices vertex_starts[b] : vertex_starts[b + 1]
    vertex_starts: Host,
    face_starts: Host,  # [B + 1]: and the faces face_starts[b] : face_starts[b + 1]
    camera: Camera,  # V views
    view_scene: Host,  # [V]: the scene that each view shows
    near: float = 1.0,  # world units; 1 and 3 in training, 1 and 100 in the published evaluation
    far: float = 3.0,
    ssaa: int = 1,  # render ssaa times as wide and high, then shrink with a triangle filter
    # what moves them: the triangles' "edges" (published) or the "pixels" beside the background
    silhouettes: str = "edges",
) -> Image:
    """Render every view of its scene. Antialiased: alpha is the coverage; color and normal_map are
    the attributes on black, depth is the camera's z, 0 in the background; normal is (n + 1) / 2 of
    flat normals in world axes, by the right-hand rule whichever side is seen.

    Differentiable, to first order, in the vertices and the attributes, to the vertices also through
    silhouettes: of triangles smaller than a pixel "edges" move almost none of them, "pixels" all
    outlines (kernels.mesh.outlines). Computes in fp32 (16-bit inputs are converted; float64 only on
    the torch path). Same inputs, same bits (the gradient through ssaa > 1 only where torch's resize
    has it so). On a GPU the host waits once, and never in the backward. What is nearer than near
    far / (2 far - near) or beyond `far` is cut off.

    Raises ValueError: wrong shapes, dtypes or devices; starts that do not fit; a view_scene of
    another length than the camera or naming no scene; near and far out of order; ssaa below 1;
    unknown silhouettes; pictures or batches beyond the limits of `rasterize`; faces that name a
    vertex that is not there. TypeError: no tensor where one belongs.
    """
    check_tensors(
        vertices=vertices, faces=faces, **({} if attributes is None else {"attributes": attributes})
    )
    vertex_starts = host_list("vertex_starts", vertex_starts)
    face_starts = host_list("face_starts", face_starts)
    view_scene = host_list("view_scene", view_scene)
    N, F, V = len(vertices), len(faces), len(camera)
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        raise ValueError(f"vertices must be [N, 3], not {list(vertices.shape)}")
    if attributes is not None and tuple(attributes.shape) not in ((N, 3), (N, 6)):
        raise ValueError(f"attributes must be [{N}, 3] or [{N}, 6], not {list(attributes.shape)}")
    for name, starts, size in (
        ("vertex_starts", vertex_starts, N),
        ("face_starts", face_starts, F),
    ):
        if not starts or starts[-1] != size:
            raise ValueError(f"{name} must rise from 0 to {size}, not be {starts}")
    if len(view_scene) != V:
        raise ValueError(f"view_scene names {len(view_scene)} scenes for {V} views")
    if not 0 < near < far:
        raise ValueError(f"near and far must be 0 < near < far, not {near} and {far}")
    check_whole("ssaa", ssaa)
    if silhouettes not in SILHOUETTES:
        raise ValueError(f"silhouettes {silhouettes!r} is not one of {', '.join(SILHOUETTES)}")
    for value in (
        vertices,
        faces,
        camera.extrinsics,
        camera.intrinsics,
        *([] if attributes is None else [attributes]),
    ):
        if value.device != vertices.device:
            raise ValueError(
                f"all tensors must be on one device, not on {vertices.device} and {value.device}"
            )
    vertices = check_floats("vertices", vertices)
    faces = check_faces(faces)
    height, width = camera.height * ssaa, camera.width * ssaa
    check_picture(height, width, V)
    layout = make_mesh_layout(vertex_starts, face_starts, view_scene, vertices.device)
    if layout.most >= FACES_MAX:
        raise ValueError(f"{layout.most} faces in a scene are more than {FACES_MAX - 1}")

    clip = to_clip(vertices, projection(camera, near, far, vertices.dtype), layout.vertices)
    moving = torch.is_grad_enabled() and (
        vertices.requires_grad or (attributes is not None and attributes.requires_grad)
    )
    pairs = sum(face_starts[s + 1] - face_starts[s] for s in view_scene)
    rast, order = torch.ops.trislat.rasterize(
        clip,
        faces,
        layout.clip_table,
        layout.most,
        pairs,
        height,
        width,
        layout.vertex_table if moving else None,
    )
    of_vertices = {"table": layout.vertex_table, "order": order}
    of_clip = {"table": layout.clip_table, "order": order}
    parts = [
        (rast[..., 3:].detach() > 0).to(clip.dtype),
        interpolate(clip[:, 3:], rast, faces, **of_clip),
    ]
    parts.append(flat_normals(vertices, rast, faces, **of_vertices))
    if attributes is not None:
        parts.append(interpolate(attributes.to(clip.dtype), rast, faces, **of_vertices))
    opposite = opposite_vertices(faces, layout.scene_table, N)
    raw = torch.cat(parts, -1)
    by_edges = silhouettes == "edges"
    picture = antialias(
        raw, rast, clip if by_edges else clip.detach(), faces, opposite=opposite, **of_clip
    )
    if not by_edges and moving:
        picture = picture + move_outlines(raw, rast, clip, faces, **of_clip)
    picture = picture.permute(0, 3, 1, 2)
    if ssaa > 1 and V:
        size = (camera.height, camera.width)
        picture = torch.nn.functional.interpolate(
            picture, size, mode="bilinear", align_corners=False, antialias=True
        )
    picture = picture[..., : camera.height, : camera.width].contiguous()
    alpha, depth, normal, color, normal_map = picture.split_with_sizes(
        [1, 1, 3, *_channels(attributes)], 1
    )
    return Image(
        color=None if attributes is None else color,
        alpha=alpha,
        depth=depth,
        normal=(normal + 1) / 2,
        normal_map=normal_map if normal_map.shape[1] else None,
    )


def _channels(attributes: Tensor | None) -> tuple[int, int]:
    """Of colour and of normal_map."""
    return (0, 0) if attributes is None else (3, attributes.shape[1] - 3)


def face_camera(normal: Tensor, camera: Camera) -> Tensor:
    """Turn normals [V, 3, H, W] in [0, 1] (as (n + 1) / 2) that point away from the camera towards
    it.

    Files disagree on which way faces turn, so the ground truth that a mesh decoder learns from is
    rendered by `render_mesh` and turned so; its own normals are not. Each pixel is turned by its
    own ray; the background, 0.5, stays.
    """
    n = 2 * normal - 1
    ray = camera.rays()[1].permute(0, 3, 1, 2)
    away = (n * ray).sum(1, keepdim=True) >= 0
    return (torch.where(away, -n, n) + 1) / 2


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
    """`render_mesh` view after view by the book, with autograd: the references of its stages, every
    face with every pixel.
    """
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
    channels = _channels(attributes)
    blank = vertices.new_zeros(0, camera.height, camera.width, 5 + sum(channels))
    picture = torch.cat([blank, *views]).permute(0, 3, 1, 2)
    alpha, depth, normal, color, normal_map = picture.split_with_sizes([1, 1, 3, *channels], 1)
    color = None if attributes is None else color
    return Image(color, alpha, depth, (normal + 1) / 2, normal_map if normal_map.shape[1] else None)
