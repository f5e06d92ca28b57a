"""Differentiable pictures of triangle meshes.

B scenes, V views, N vertices and F faces in all. Stages, each one launch for all scenes and views:
to_clip -> rasterize -> interpolate and flat_normals -> antialias, and back. `render_mesh` checks
what it is given; the stages that it calls do not check again. Computes what TRELLIS trains its
meshes with (Xiang et al. 2024, on nvdiffrast, Laine et al. 2020). Coverage, depth, normals and
colours are antialiased together, which is the same as one by one: a blend does not depend on the
values.

Two deliberate differences: the principal point may lie anywhere (the published matrix mirrors its
y), and a scene without faces shows the background as any pixel without a face does, normals 0.5
included (published: zeros).
"""

import torch
from torch import Tensor

from kernels.camera import Camera, Image
from kernels.checks import Host, check_tensors, check_whole, host_list
from kernels.mesh.antialias import antialias_op, opposite_vertices
from kernels.mesh.attributes import flat_normals_op, interpolate_op
from kernels.mesh.checks import (
    check_devices,
    check_face_count,
    check_faces,
    check_floats,
    check_picture,
)
from kernels.mesh.clip import projection, to_clip
from kernels.mesh.outlines import move_outlines
from kernels.mesh.packing import MeshLayout, make_mesh_layout
from kernels.mesh.rasterize import rasterize_op

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
    near: float = 1.0,  # world units; published: 1 and 3 in training, 1 and 100 in evaluation
    far: float = 3.0,
    ssaa: int = 1,  # render ssaa times as wide and high, then shrink with a triangle filter
    # what moves them: the triangles' "edges" (published) or the "pixels" beside the background
    silhouettes: str = "edges",
) -> Image:
    """Render antialiased pictures of every view of its scene.

    alpha is the coverage; color and normal_map are the attributes on black; depth is the camera's
    z, 0 in the background; normal is (n + 1) / 2 of flat normals in world axes, by the right-hand
    rule whichever side is seen.

    Differentiable, to first order, in the vertices and the attributes; in the vertices also through
    silhouettes. Where triangles are smaller than a pixel, "edges" moves almost no silhouette, while
    "pixels" moves all outlines (kernels.mesh.outlines). Computes in fp32 (16-bit inputs are
    converted; float64 only on the torch path). Same inputs, same bits (the gradient through ssaa >
    1 only where torch's resize has it so). On a GPU the host waits once, and never in the backward.
    What is nearer than near far / (2 far - near) or beyond `far` is cut off.

    Raises ValueError: wrong shapes, dtypes or devices; starts that do not fit; a view_scene of
    another length than the camera or naming no scene; near and far out of order; ssaa below 1;
    unknown silhouettes; pictures or batches beyond the limits of `rasterize`; faces that name a
    vertex that is not there. TypeError: no tensor where one belongs.
    """
    vertex_starts = host_list("vertex_starts", vertex_starts)
    face_starts = host_list("face_starts", face_starts)
    view_scene = host_list("view_scene", view_scene)
    _check(vertices, faces, attributes, vertex_starts, face_starts, camera, view_scene)
    if not 0 < near < far:
        raise ValueError(f"near and far must be 0 < near < far, not {near} and {far}")
    check_whole("ssaa", ssaa)
    if silhouettes not in SILHOUETTES:
        raise ValueError(f"silhouettes {silhouettes!r} is not one of {', '.join(SILHOUETTES)}")
    vertices = check_floats("vertices", vertices)
    if attributes is not None:
        attributes = attributes.to(vertices.dtype).contiguous()
    faces = check_faces(faces)
    height = camera.height * ssaa
    width = camera.width * ssaa
    check_picture(height, width, len(camera))
    layout = make_mesh_layout(vertex_starts, face_starts, view_scene, vertices.device)
    check_face_count(layout.most, " in a scene")

    clip = to_clip(vertices, projection(camera, near, far, vertices.dtype), layout.vertices)
    picture = _draw(clip, vertices, faces, attributes, layout, height, width, silhouettes)
    picture = picture.permute(0, 3, 1, 2)
    if ssaa > 1 and len(camera):
        size = (camera.height, camera.width)
        picture = torch.nn.functional.interpolate(
            picture, size, mode="bilinear", align_corners=False, antialias=True
        )
    picture = picture[..., : camera.height, : camera.width].contiguous()
    return split_channels(picture, 0 if attributes is None else attributes.shape[1])


def _check(
    vertices: Tensor,
    faces: Tensor,
    attributes: Tensor | None,
    vertex_starts: list[int],
    face_starts: list[int],
    camera: Camera,
    view_scene: list[int],
) -> None:
    """Raises ValueError for inputs that do not fit together, TypeError for what is no tensor."""
    tensors = {"vertices": vertices, "faces": faces}
    if attributes is not None:
        tensors["attributes"] = attributes
    check_tensors(**tensors)
    N = len(vertices)
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        raise ValueError(f"vertices must be [N, 3], not {list(vertices.shape)}")
    if attributes is not None and tuple(attributes.shape) not in ((N, 3), (N, 6)):
        raise ValueError(f"attributes must be [{N}, 3] or [{N}, 6], not {list(attributes.shape)}")
    ends = (("vertex_starts", vertex_starts, N), ("face_starts", face_starts, len(faces)))
    for name, starts, size in ends:
        if not starts or starts[-1] != size:
            raise ValueError(f"{name} must rise from 0 to {size}, not be {starts}")
    if len(view_scene) != len(camera):
        raise ValueError(f"view_scene names {len(view_scene)} scenes for {len(camera)} views")
    check_devices(*tensors.values(), camera.extrinsics, camera.intrinsics)


def _draw(
    clip: Tensor,  # [P, 4]
    vertices: Tensor,
    faces: Tensor,
    attributes: Tensor | None,
    layout: MeshLayout,
    height: int,
    width: int,
    silhouettes: str,
) -> Tensor:  # [V, height, width, 5 + A]
    """The antialiased picture: coverage, depth, normal 3, and A attributes."""
    moving = torch.is_grad_enabled() and (
        vertices.requires_grad or (attributes is not None and attributes.requires_grad)
    )
    starts = layout.face_starts
    pairs = sum(starts[s + 1] - starts[s] for s in layout.vertices.view_scene)
    # the backward passes share one order of the pixels' corners
    order_by = layout.vertex_table if moving else None
    by_vertex = layout.vertex_table
    by_clip = layout.clip_table
    rast, order = rasterize_op(clip, faces, by_clip, layout.most, pairs, height, width, order_by)
    parts = [
        (rast[..., 3:].detach() > 0).to(clip.dtype),
        interpolate_op(clip[:, 3:].contiguous(), rast, faces, by_clip, order),
        flat_normals_op(vertices, rast, faces, by_vertex, order),
    ]
    if attributes is not None:
        parts.append(interpolate_op(attributes, rast, faces, by_vertex, order))
    raw = torch.cat(parts, -1)
    opposite = opposite_vertices(faces, layout.scene_table, len(vertices))
    if silhouettes == "edges":
        return antialias_op(raw, rast, clip, faces, by_clip, opposite, order)[0]
    picture = antialias_op(raw, rast, clip.detach(), faces, by_clip, opposite, order)[0]
    if moving:
        picture = picture + move_outlines(raw, rast, clip, faces, by_clip, order)
    return picture


def split_channels(picture: Tensor, attributes: int) -> Image:
    """The Image of a picture [V, 5 + attributes, H, W] with 0, 3 or 6 attributes."""
    alpha, depth, normal, values = picture.split_with_sizes([1, 1, 3, attributes], 1)
    return Image(
        color=values[:, :3] if attributes else None,
        alpha=alpha,
        depth=depth,
        normal=(normal + 1) / 2,
        normal_map=values[:, 3:] if attributes > 3 else None,
    )


def face_camera(normal: Tensor, camera: Camera) -> Tensor:
    """Turn normals that point away from the camera towards it.

    Normals are pictures [V, 3, H, W] of (n + 1) / 2, in [0, 1]. Files disagree on which way faces
    turn, so the ground truth that a mesh decoder learns from is rendered by `render_mesh` and
    turned so; its own normals are not. Each pixel is turned by its own ray; the background, 0.5,
    stays.
    """
    n = 2 * normal - 1
    ray = camera.rays()[1].permute(0, 3, 1, 2)
    away = (n * ray).sum(1, keepdim=True) >= 0
    return (torch.where(away, -n, n) + 1) / 2
