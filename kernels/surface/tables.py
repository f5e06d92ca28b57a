"""The tables of dual contouring on one cube, derived by rule.

There are 256 cases, 12 edges, and at most 4 dual vertices of at most 7 edges in a case.
Corner i has the offset (i & 1, i >> 1 & 1, i >> 2 & 1) along (x, y, z); a case is the sum of 2^i
over the negative corners. Crossing edges of a cube belong to one dual vertex where the faces join
them: on a face with two of them these two, on a face with four the two that meet at each negative
corner (Nielson, "Dual Marching Cubes", 2004; FlexiCubes, Shen et al. 2023).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.backend import to_device

# pairs of corners; along x and z from low to high, along y from high to low, which decides the
# winding and the order of quads
EDGES = (
    (0, 1),
    (1, 5),
    (4, 5),
    (0, 4),
    (2, 3),
    (3, 7),
    (6, 7),
    (2, 6),
    (2, 0),
    (3, 1),
    (7, 5),
    (6, 4),
)
# quads around an edge along x, z, y: the four cubes around it in order of their index, as offsets
# (x, y, z), and the edge's number in each; the last cube, in which the edge begins or ends at
# corner 0, owns the quad
QUADS = (
    (((0, -1, -1), 6), ((0, -1, 0), 4), ((0, 0, -1), 2), ((0, 0, 0), 0)),
    (((-1, -1, 0), 5), ((-1, 0, 0), 1), ((0, -1, 0), 7), ((0, 0, 0), 3)),
    (((-1, 0, -1), 10), ((-1, 0, 0), 9), ((0, 0, -1), 11), ((0, 0, 0), 8)),
)
SWAPPED = 231  # the one case whose two dual vertices the published table lists in reverse order
# where each table begins in CubeTables.packed
EDGES_AT = 0
COMPONENT_AT = 1024 * 8
MEETING_AT = COMPONENT_AT + 256 * 12
ENDS_AT = MEETING_AT + 8 * 3


@dataclass(frozen=True, eq=False)
class CubeTables:
    """The tables on one device. The kind of a dual vertex is 4 * case + its number in the case."""

    duals: Tensor  # [256] int64: dual vertices of a case
    # [256, 12] int8: the dual vertex that each edge belongs to, -1 for an edge that does not cross
    component: Tensor
    edges: Tensor  # [1024, 8] int8: edges of each kind, ascending, then -1
    # [256] int8: the ambiguous face, 2 * axis + side, of a case that its neighbour may invert; -1
    # for the others
    direction: Tensor
    ends: Tensor  # [12, 2] int64: corners of an edge
    # int8, for kernels: edges, component, the edges that meet at a corner [8, 3], ends
    packed: Tensor
    quad_offset: Tensor  # [3, 4, 3] int64, as QUADS
    quad_edge: Tensor  # [3, 4] int64


def crossing(case: int) -> list[int]:
    """The edges with one negative end."""
    return [e for e, (i, j) in enumerate(EDGES) if (case >> i & 1) != (case >> j & 1)]


def ambiguous_faces(case: int) -> list[int]:
    """The faces (2 * axis + side) all of whose four edges cross."""
    return [face for face, corners in enumerate(_faces()) if len(_on_face(case, corners)) == 4]


def dual_parts(case: int) -> list[list[int]]:
    """The edges of each dual vertex of a case, in order of the smallest negative corner."""
    joined = {e: {e} for e in crossing(case)}
    for corners in _faces():
        edges = _on_face(case, corners)
        if len(edges) == 4:
            negative = [corner for corner in corners if case >> corner & 1]
            groups = [[e for e in edges if corner in EDGES[e]] for corner in negative]
        else:
            groups = [edges]
        for group in groups:
            together = set().union(*(joined[e] for e in group))
            joined.update(dict.fromkeys(together, together))
    distinct = {min(part): sorted(part) for part in joined.values()}
    smallest = lambda part: min(c for e in part for c in EDGES[e] if case >> c & 1)
    found = sorted(distinct.values(), key=smallest)
    return found[::-1] if case == SWAPPED else found


def _faces() -> list[list[int]]:
    """The corners of each face, 2 * axis + side."""
    return [
        [c for c in range(8) if (c >> axis & 1) == side] for axis in range(3) for side in range(2)
    ]


def _on_face(case: int, corners: list[int]) -> list[int]:
    """The crossing edges on a face."""
    return [e for e in crossing(case) if set(EDGES[e]) <= set(corners)]


@cache
def cube_tables(device: torch.device) -> CubeTables:
    """The tables on a device, made once for each device. Does not wait for it."""
    duals = torch.zeros(256, dtype=torch.int64)
    component = torch.full((256, 12), -1, dtype=torch.int8)
    edges = torch.full((1024, 8), -1, dtype=torch.int8)
    direction = torch.full((256,), -1, dtype=torch.int8)
    for case in range(256):
        parts = dual_parts(case)
        faces = ambiguous_faces(case)
        duals[case] = len(parts)
        for number, part in enumerate(parts):
            component[case, part] = number
            edges[4 * case + number, : len(part)] = torch.tensor(part, dtype=torch.int8)
        if len(faces) == 1 and len(parts) == 1:
            direction[case] = faces[0]
    meeting = torch.tensor([[e for e in range(12) if c in EDGES[e]] for c in range(8)])
    ends = torch.tensor(EDGES)
    packed = torch.cat([t.flatten().char() for t in (edges, component, meeting, ends)])
    offset = torch.tensor([[cube for cube, _ in quad] for quad in QUADS])
    edge = torch.tensor([[edge for _, edge in quad] for quad in QUADS])
    tables = (duals, component, edges, direction, ends, packed, offset, edge)
    return CubeTables(*(to_device(t, device) for t in tables))
