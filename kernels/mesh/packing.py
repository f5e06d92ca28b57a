"""Which view sees which faces, and what lies across an edge. V views, B scenes, N vertices, F
faces, P clip rows.

A clip row is a pair of a view and a vertex of its scene, view after view, so P is known on the host
and a view never sees another scene. The rows of a face are its three indices plus a first row: that
of the scene in tensors of N vertices, that of the view in tensors of P clip positions. A Table says
which; every op on meshes takes one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import make_table
from kernels.checks import check_whole
from kernels.views import ViewTable, make_view_table

TABLE = 4  # numbers of a view: first face, number of faces, first row, number of rows


@dataclass(frozen=True, eq=False)
class MeshLayout:
    """A batch of meshes and the views of them: the host's lists, and the same as tables beside the
    vertices (one copy).
    """

    vertices: ViewTable  # which view sees which vertices; its pairs are the clip rows
    face_starts: list[int]  # [B + 1]
    # [V, 4] int64: first face, number of faces, first vertex, number of vertices
    vertex_table: Tensor
    # [V, 4] int64: first face, number of faces, first clip row, number of clip rows
    clip_table: Tensor
    # [B, 4] int64: first face, number of faces, first vertex, number of vertices
    scene_table: Tensor

    @property
    def rows(self) -> int:
        """Clip rows of all views."""
        return self.vertices.pair_start[-1]

    @property
    def most(self) -> int:
        """Faces of the largest scene."""
        return max(
            [0, *[b - a for a, b in zip(self.face_starts, self.face_starts[1:], strict=False)]]
        )


def make_mesh_layout(
    vertex_starts: list[int], face_starts: list[int], view_scene: list[int], device: torch.device
) -> MeshLayout:
    """The MeshLayout of B scenes (scene b owns the vertices vertex_starts[b] : vertex_starts[b +
    1], its faces likewise) and V views. Does not wait for the device.

    Raises ValueError for lists of different lengths, starts that do not rise from 0, and a view of
    a scene that is not there.
    """
    if len(vertex_starts) != len(face_starts):
        raise ValueError(
            f"vertex_starts are of {len(vertex_starts) - 1} scenes, face_starts of "
            f"{len(face_starts) - 1}"
        )
    for name, starts in (("vertex_starts", vertex_starts), ("face_starts", face_starts)):
        if (
            not starts
            or starts[0] != 0
            or any(b < a for a, b in zip(starts, starts[1:], strict=False))
        ):
            raise ValueError(f"{name} must rise from 0, not be {starts}")
    for s in view_scene:
        if not 0 <= s < len(vertex_starts) - 1:
            raise ValueError(f"view_scene names scene {s} of {len(vertex_starts) - 1}")
    layout = make_view_table(vertex_starts, view_scene, device)
    owned = [
        [
            face_starts[s],
            face_starts[s + 1] - face_starts[s],
            vertex_starts[s],
            vertex_starts[s + 1] - vertex_starts[s],
        ]
        for s in range(len(vertex_starts) - 1)
    ]
    numbers = [owned[s] for s in view_scene]
    clips = [[f, n, layout.pair_start[v], rows] for v, (f, n, _, rows) in enumerate(numbers)]
    table = make_table([number for row in numbers + clips + owned for number in row], TABLE, device)
    V = len(view_scene)
    return MeshLayout(layout, face_starts, table[:V], table[V : 2 * V], table[2 * V :])


def single_table(faces: int, rows: int, device: torch.device) -> Tensor:
    """The Table of one view of one mesh: [1, 4] int64."""
    return make_table([0, faces, 0, rows], TABLE, device)


def opposite_vertices(
    faces: Tensor,  # [F, 3] int32
    # [B, 4] int64: first face, number of faces, first vertex, number of vertices
    scene_table: Tensor,
    vertices: int,  # of all scenes
) -> Tensor:  # [F, 3] int32
    """The vertex across each edge: entry k belongs to the edge without corner k, and is the third
    corner of the other face at that edge; -1 where there is none.

    An edge is a pair of vertex indices (positions do not matter, so a seam of split vertices is
    open). Of three and more faces at an edge the first two different third corners count, in the
    order of the faces, and only for each other: the published table, filled in order. A face that
    names a vertex twice has no edges, a repeated face counts once. Sorts the 3 F edges once; waits
    for nothing.
    """
    F = len(faces)
    if F == 0:
        return faces.new_empty(0, 3)
    # first vertex of the face's scene
    scene = torch.repeat_interleave(scene_table[:, 2], scene_table[:, 1], output_size=F)
    corner = faces.long() + scene[:, None]
    # a list as an index would be copied to the device, which waits
    a = corner.roll(-1, 1)
    b = corner.roll(1, 1)
    good = (a != b) & (corner != a) & (corner != b)
    good &= ((faces >= 0) & (faces < 2**31 - 1)).all(1, keepdim=True)
    key = torch.where(good, torch.minimum(a, b) * vertices + torch.maximum(a, b), -1).flatten()
    key, order = key.sort(stable=True)
    third = faces.flatten()[order]
    at = torch.arange(3 * F, device=faces.device)
    begins = torch.ones_like(key, dtype=torch.bool)
    begins[1:] = key[1:] != key[:-1]
    first = torch.cummax(torch.where(begins, at, 0), 0).values  # where the edge's faces begin
    one = third[first]
    other = torch.where(third != one, at, 3 * F)
    # the first face with another third corner, perhaps of another edge
    later = other.flip(0).cummin(0).values.flip(0)[first]
    found = later.clamp(max=3 * F - 1)
    two = torch.where((later < 3 * F) & (key[found] == key), third[found], -1)
    across = torch.where(third == one, two, torch.where(third == two, one, -1))
    across.masked_fill_(key < 0, -1)
    return torch.empty_like(across).scatter_(0, order, across).view(F, 3)


PIXELS_MAX = 1 << 23


FACES_MAX = 1 << 24  # a face's number is stored in fp32


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
