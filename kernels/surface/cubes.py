"""The topology of the surface: its cubes, its dual vertices, and the quads that join them.

B scenes, N voxels, a grid of R cubes and S = R + 1 vertices along a side. The voxels have T
vertices (their corners); the surface has C cubes (with corners of both signs), P dual vertices and
Q quads. A vertex that no voxel touches is outside. So a surface cube touches a negative vertex, but
it need not be a voxel.

Signs take one byte a vertex and cases one byte a cube of the whole grid: every cube is looked at,
and nothing is searched or sorted to find them. Values are kept for the T vertices and the C cubes
alone. The host waits twice to know their numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.surface.tables import CubeTables, cube_tables

NONE = torch.iinfo(torch.int64).max  # the key of a quad that is not there


@dataclass(frozen=True, eq=False)
class Cubes:
    """The surface's topology. All rows are in order of the scenes."""

    voxel_corners: Tensor  # [N, 8] int32: the vertex at each corner of each voxel
    vertex_index: Tensor  # [T] int64: index in the [B, S, S, S] grid, ascending
    sdf: Tensor  # [T] mean signed distance
    count: Tensor  # [T] corners that share the vertex
    cube_index: Tensor  # [C] int64: index in the [B, R, R, R] grid, ascending
    case: Tensor  # [C] int64, ambiguous ones resolved
    cube_corners: Tensor  # [C, 8] int32: vertex at each corner, T where no voxel touches it
    voxel_cube: Tensor  # [N] int32: the surface cube of each voxel, -1 for none
    first_dual: Tensor  # [C] int64: the cube's first dual vertex
    dual_cube: Tensor  # [P] int32: the cube of each dual vertex
    dual_kind: Tensor  # [P] int32: 4 * case + number in the cube
    # [Q, 4] int32: 12 * cube + edge, for the four cubes around each quad, counter-clockwise seen
    # from outside
    quad_edges: Tensor
    tsdf_starts: list[int]  # [B + 1] vertices of each scene
    dual_starts: list[int]  # [B + 1]
    quad_starts: list[int]  # [B + 1]


@dataclass(frozen=True, eq=False)
class Geometry:
    """The values and the topology that dual vertices are computed from."""

    # [T + 1, 1 + M]: signed distance | displacement 3 | color; row T is outside
    values: Tensor
    weights: Tensor  # [C, 21]: beta 12 | alpha 8 | gamma, activated
    cube_coords: Tensor  # [C, 3] int32
    cube_corners: Tensor  # as in Cubes, like the following four
    case: Tensor
    first_dual: Tensor
    dual_cube: Tensor
    dual_kind: Tensor
    resolution: int
    tables: CubeTables


def find_cubes(
    coords: Tensor,  # [N, 4] int32, checked
    fields: Tensor,  # [N, 53 or 101]
    samples: int,
    resolution: int,
) -> Cubes:
    """Find the surface's cubes, dual vertices and quads.

    Waits for the device twice: for the numbers of vertices and cubes, then of dual vertices and
    quads.
    """
    B = samples
    N = len(coords)
    R = resolution
    S = resolution + 1
    device = coords.device
    tables = cube_tables(device)
    b, x, y, z = coords.long().unbind(1)
    base = ((b * S + x) * S + y) * S + z
    offset = [((i & 1) * S + (i >> 1 & 1)) * S + (i >> 2) for i in range(8)]

    flag = coords.new_zeros(B * S**3)
    for o in offset:
        flag.index_fill_(0, base + o, 1)
    rank = flag.cumsum(0, dtype=torch.int32)
    vertices = rank[S**3 - 1 :: S**3].clone()  # of this scene and those before it
    rank *= flag  # 1 + row of a vertex, 0 where there is none
    del flag
    voxel_corners = torch.empty(N, 8, dtype=torch.int32, device=device)
    most = min(8 * N, B * S**3)
    sdf = fields.new_zeros(most)
    count = fields.new_zeros(most)
    one = fields.new_ones(1).expand(N)
    for i, o in enumerate(offset):  # the i-th corners of different voxels are different vertices
        voxel_corners[:, i] = rank[base + o] - 1
        sdf.index_add_(0, voxel_corners[:, i], fields[:, i] - 1 / R)
        count.index_add_(0, voxel_corners[:, i], one)
    sdf /= count.clamp(min=1)
    negative = (sdf < 0).byte()
    sign = torch.zeros(B * S**3, dtype=torch.uint8, device=device)
    for i, o in enumerate(offset):
        sign.index_copy_(0, base + o, negative[voxel_corners[:, i]])
    sign = sign.view(B, S, S, S)
    case = torch.zeros(B, R, R, R, dtype=torch.uint8, device=device)
    for i in range(8):
        dx = i & 1
        dy = i >> 1 & 1
        dz = i >> 2
        case |= sign[:, dx : dx + R, dy : dy + R, dz : dz + R] << i
    mixed = (case > 0) & (case < 255)

    cubes = mixed.view(B, R**3).sum(1).cumsum(0)
    # the first wait for the device
    vertex_ends, cube_ends = torch.stack([vertices.long(), cubes]).tolist()
    tsdf_starts = [0, *vertex_ends]
    T = tsdf_starts[-1]
    C = cube_ends[-1] if B else 0
    vertex = base.new_empty(T)
    for i, o in enumerate(offset):
        vertex.index_copy_(0, voxel_corners[:, i].long(), base + o)
    cube = mixed.view(-1).nonzero_static(size=C)[:, 0]
    del sign, mixed
    b, x, y, z = unravel(cube, R)
    base = ((b * S + x) * S + y) * S + z
    corner = torch.empty(C, 8, dtype=torch.int32, device=device)
    for i, o in enumerate(offset):
        corner[:, i] = rank[base + o] - 1
    corner.masked_fill_(corner < 0, T)
    del rank
    original = case.view(-1)[cube].long()
    resolved = _resolve(case.view(-1), original, cube, R, tables)
    del case

    duals = tables.duals[resolved]
    order = (4 * b + duals).sort(stable=True).indices  # cubes with fewer dual vertices come first
    first = torch.empty_like(cube).index_copy_(0, order, duals[order].cumsum(0) - duals[order])
    # where the edges along x, z, y begin
    negative = torch.stack([original & 1, original & 1, original >> 2 & 1], 1)
    begin = torch.stack([base, base, base + S], 1) - (b * S**3)[:, None]
    crosses = tables.component[resolved][:, tables.quad_edge[:, 3]] >= 0
    # four cubes around the edge
    interior = torch.stack([(y > 0) & (z > 0), (x > 0) & (y > 0), (x > 0) & (z > 0)], 1)
    # edges that begin at one vertex, in order of their ends: along y, z, x
    towards = torch.arange(2, -1, -1, device=device)
    key = ((2 * b[:, None] + negative) * S**3 + begin) * 3 + towards
    key = torch.where(crosses & interior, key, NONE)
    totals = torch.nn.functional.pad(torch.stack([duals, (key < NONE).sum(1)]).cumsum(1), (1, 0))
    # the second wait
    dual_starts, quad_starts = totals[:, torch.nn.functional.pad(cubes, (1, 0))].tolist()
    P = dual_starts[-1]
    Q = quad_starts[-1]

    dual = order.repeat_interleave(duals[order], output_size=P)
    kind = 4 * resolved[dual] + torch.arange(P, device=device) - first[dual]
    owned = key.view(-1).sort().indices[:Q]
    owner = owned // 3
    axis = owned % 3
    dx, dy, dz = tables.quad_offset.unbind(-1)
    step = (dx * R + dy) * R + dz
    neighbours = torch.searchsorted(cube, cube[owner][:, None] + step[axis])
    edges = (neighbours * 12 + tables.quad_edge[axis]).int()
    quad_edges = _wind(edges, negative.view(-1)[owned] > 0)
    voxel_cube = _find(cube, coords, R)
    return Cubes(
        voxel_corners=voxel_corners,
        vertex_index=vertex,
        sdf=sdf[:T].clone(),
        count=count[:T].clone(),
        cube_index=cube,
        case=resolved,
        cube_corners=corner,
        voxel_cube=voxel_cube,
        first_dual=first,
        dual_cube=dual.int(),
        dual_kind=kind.int(),
        quad_edges=quad_edges,
        tsdf_starts=tsdf_starts,
        dual_starts=dual_starts,
        quad_starts=quad_starts,
    )


def unravel(index: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scene and coordinates of indices in a [B, size, size, size] grid."""
    return index // size**3, index // size**2 % size, index // size % size, index % size


def _resolve(cases: Tensor, case: Tensor, cube: Tensor, R: int, tables: CubeTables) -> Tensor:
    """Resolve ambiguous cases: where two cubes share their ambiguous face, both are inverted."""
    face = tables.direction[case].long()
    axis = face // 2
    step = 2 * (face & 1) - 1
    _, *place = unravel(cube, R)
    along = torch.where(axis == 0, place[0], torch.where(axis == 1, place[1], place[2])) + step
    stride = torch.where(axis == 0, R * R, torch.where(axis == 1, R, 1))
    inside = (face >= 0) & (along >= 0) & (along < R)
    other = cases[torch.where(inside, cube + step * stride, cube)].long()
    return torch.where(inside & (tables.direction[other] >= 0), 255 - case, case)


def _wind(edges: Tensor, negative: Tensor) -> Tensor:
    """Turn four cubes in order of their index into a loop around their edge.

    The direction depends on the sign at the edge's beginning.
    """
    q0, q1, q2, q3 = edges.unbind(1)
    pairs = ((q2, q0), (q3, q1), (q1, q3), (q0, q2))
    return torch.stack([torch.where(negative, a, b) for a, b in pairs], 1)


def _find(cube: Tensor, coords: Tensor, R: int) -> Tensor:
    """The surface cube of each voxel, -1 for none."""
    b, x, y, z = coords.long().unbind(1)
    index = ((b * R + x) * R + y) * R + z
    if len(cube) == 0:
        return torch.full_like(coords[:, 0], -1)
    found = torch.searchsorted(cube, index, out_int32=True).clamp_(max=len(cube) - 1)
    return torch.where(cube[found] == index, found, -1)
