"""Batches of meshes: the tables of their scenes and views.

V views, B scenes, N vertices, F faces, P clip rows. A clip row is a pair of a view and a vertex of
its scene, view after view. So P is known on the host, and a view never sees another scene. The rows
of a face are its three indices plus a first row: the scene's first vertex in tensors of N vertices,
the view's first clip row in tensors of P clip positions. A table [V, 4] holds these numbers; every
op on meshes takes one.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.backend import make_table
from kernels.views import ViewTable, make_view_table

TABLE = 4  # numbers of a view: first face, number of faces, first row, number of rows


@dataclass(frozen=True, eq=False)
class MeshLayout:
    """A batch of meshes and their views: lists on the host, and tables on the vertices' device."""

    vertices: ViewTable  # the vertices that each view sees; its pairs are the clip rows
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
        # not max(..., default=0), which torch.compile does not trace
        return max([0, *[b - a for a, b in pairwise(self.face_starts)]])


def make_mesh_layout(
    vertex_starts: list[int], face_starts: list[int], view_scene: list[int], device: torch.device
) -> MeshLayout:
    """The MeshLayout of B scenes and V views. Does not wait for the device.

    Scene b owns the vertices vertex_starts[b] : vertex_starts[b + 1], and its faces likewise.

    Raises ValueError for lists of different lengths, starts that do not rise from 0, and a view of
    a scene that is not there.
    """
    if len(vertex_starts) != len(face_starts):
        raise ValueError(
            f"vertex_starts are of {len(vertex_starts) - 1} scenes, face_starts of "
            f"{len(face_starts) - 1}"
        )
    for name, starts in (("vertex_starts", vertex_starts), ("face_starts", face_starts)):
        rises = all(a <= b for a, b in pairwise(starts))
        if not starts or starts[0] != 0 or not rises:
            raise ValueError(f"{name} must rise from 0, not be {starts}")
    for s in view_scene:
        if not 0 <= s < len(vertex_starts) - 1:
            raise ValueError(f"view_scene names scene {s} of {len(vertex_starts) - 1}")
    layout = make_view_table(vertex_starts, view_scene, device)
    owned = []  # rows of the scene table
    for s, (first, end) in enumerate(pairwise(vertex_starts)):
        face_count = face_starts[s + 1] - face_starts[s]
        owned.append([face_starts[s], face_count, first, end - first])
    by_vertex = [owned[s] for s in view_scene]
    by_clip = []
    for v, (first_face, face_count, _, rows) in enumerate(by_vertex):
        by_clip.append([first_face, face_count, layout.pair_start[v], rows])
    numbers = [number for row in by_vertex + by_clip + owned for number in row]
    table = make_table(numbers, TABLE, device)
    V = len(view_scene)
    return MeshLayout(layout, face_starts, table[:V], table[V : 2 * V], table[2 * V :])


def single_table(faces: int, rows: int, device: torch.device) -> Tensor:
    """The table of one view of one mesh: [1, 4] int64."""
    return make_table([0, faces, 0, rows], TABLE, device)
