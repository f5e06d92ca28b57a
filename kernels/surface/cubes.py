"""Which cubes carry the surface, and how its quads join them. B scenes, N voxels, R cubes along a
side, S = R + 1 vertices.

Out of voxels come T vertices (corners of a voxel), C surface cubes (with corners of both signs), P
dual vertices, Q quads. A vertex that no voxel touches is outside, so a surface cube touches a
negative vertex, but it need not be a voxel. Signs are one byte a vertex and cases one byte a cube
of the whole grid: every cube is looked at, and nothing has to be searched or sorted; what has a
value is kept for the T vertices and C cubes alone. Two reads tell the host their numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.surface.tables import CubeTables, cube_tables

NONE = torch.iinfo(torch.int64).max  # the key of a quad that is not there


@dataclass(frozen=True, eq=False)
class Cubes:
    """The surface's topology. Rows of everything are in order of the scenes."""

    rows: Tensor  # [N, 8] int32: the vertex at each corner of each voxel
    vertex: Tensor  # [T] int64: index in the [B, S, S, S] grid, ascending
    sdf: Tensor  # [T] mean signed distance
    count: Tensor  # [T] corners that share the vertex
    cube: Tensor  # [C] int64: index in the [B, R, R, R] grid, ascending
    case: Tensor  # [C] int64, ambiguous ones resolved
    corner: Tensor  # [C, 8] int32: vertex at each corner, T where no voxel touches it
    surface: Tensor  # [N] int32: the surface cube of each voxel, -1 for none
    first: Tensor  # [C] int64: the cube's first dual vertex
    dual: Tensor  # [P] int32: the cube of each dual vertex
    kind: Tensor  # [P] int32: 4 * case + number in the cube
    # [Q, 4] int32: 12 * cube + edge of the four around each quad, counter-clockwise seen from
    # outside
    around: Tensor
    tsdf_starts: list[int]  # [B + 1] vertices of each scene
    dual_starts: list[int]  # [B + 1]
    quad_starts: list[int]  # [B + 1]


@dataclass(frozen=True, eq=False)
class Geometry:
    """What dual vertices are made from; fields of one name as in Cubes."""

    # [T + 1, 1 + M]: signed distance | displacement 3 | color; the last row is that of T, outside
    values: Tensor
    weights: Tensor  # [C, 21]: beta 12 | alpha 8 | gamma, activated
    place: Tensor  # [C, 3] int32
    corner: Tensor
    case: Tensor
    first: Tensor
    dual: Tensor
    kind: Tensor
    resolution: int


def find_cubes(
    coords: Tensor,  # [N, 4] int32, checked
    fields: Tensor,  # [N, 53 or 101]
    samples: int,
    resolution: int,
) -> Cubes:
    """Reads the device twice: for the numbers of vertices and cubes, then of dual vertices and
    quads.
    """
    B = samples
    N = len(coords)
    R = resolution
    S = resolution + 1
    device = coords.device
    tables = cube_tables(coords.device)
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
    rows = torch.empty(N, 8, dtype=torch.int32, device=device)
    most = min(8 * N, B * S**3)
    sdf, count = (fields.new_zeros(most) for _ in range(2))
    one = fields.new_ones(1).expand(N)
    for i, o in enumerate(offset):  # the i-th corners of different voxels are different vertices
        rows[:, i] = rank[base + o] - 1
        sdf.index_add_(0, rows[:, i], fields[:, i] - 1 / R)
        count.index_add_(0, rows[:, i], one)
    sdf /= count.clamp(min=1)
    negative = (sdf < 0).byte()
    sign = torch.zeros(B * S**3, dtype=torch.uint8, device=device)
    for i, o in enumerate(offset):
        sign.index_copy_(0, base + o, negative[rows[:, i]])
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
    tsdf_starts, (*_, C) = ([0, *e] for e in torch.stack([vertices.long(), cubes]).tolist())
    T = tsdf_starts[-1]
    vertex = base.new_empty(T)
    for i, o in enumerate(offset):
        vertex.index_copy_(0, rows[:, i].long(), base + o)
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
    # edges of one beginning in order of their ends: along y, z, x
    towards = torch.arange(2, -1, -1, device=device)
    key = ((2 * b[:, None] + negative) * S**3 + begin) * 3 + towards
    key = torch.where(crosses & interior, key, NONE)
    totals = torch.nn.functional.pad(torch.stack([duals, (key < NONE).sum(1)]).cumsum(1), (1, 0))
    starts = totals[:, torch.nn.functional.pad(cubes, (1, 0))].tolist()  # the second
    dual_starts, quad_starts = starts
    P, Q = dual_starts[-1], quad_starts[-1]

    dual = order.repeat_interleave(duals[order], output_size=P)
    kind = 4 * resolved[dual] + torch.arange(P, device=device) - first[dual]
    owned = key.view(-1).sort().indices[:Q]
    owner = owned // 3
    axis = owned % 3
    step = (tables.quad_offset[..., 0] * R + tables.quad_offset[..., 1]) * R + tables.quad_offset[
        ..., 2
    ]
    link = torch.searchsorted(cube, cube[owner][:, None] + step[axis]) * 12 + tables.quad_edge[axis]
    around = _wind(link.int(), negative.view(-1)[owned] > 0)
    surface = _find(cube, coords, R)
    return Cubes(
        rows,
        vertex,
        sdf[:T].clone(),
        count[:T].clone(),
        cube,
        resolved,
        corner,
        surface,
        first,
        dual.int(),
        kind.int(),
        around,
        tsdf_starts,
        dual_starts,
        quad_starts,
    )


def unravel(index: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scene and coordinates of indices in a [B, size, size, size] grid."""
    return index // size**3, index // size**2 % size, index // size % size, index % size


def _resolve(cases: Tensor, case: Tensor, cube: Tensor, R: int, tables: CubeTables) -> Tensor:
    """The case of each cube: turned inside out where it and the cube that its ambiguous face looks
    at are both ambiguous.
    """
    look = tables.direction[case].long()
    axis = look // 2
    step = 2 * (look & 1) - 1
    _, *place = unravel(cube, R)
    along = torch.where(axis == 0, place[0], torch.where(axis == 1, place[1], place[2])) + step
    stride = torch.where(axis == 0, R * R, torch.where(axis == 1, R, 1))
    inside = (look >= 0) & (along >= 0) & (along < R)
    other = cases[torch.where(inside, cube + step * stride, cube)].long()
    return torch.where(inside & (tables.direction[other] >= 0), 255 - case, case)


def _wind(link: Tensor, negative: Tensor) -> Tensor:
    """The four cubes in order of their index -> around the edge, by the sign of where it begins."""
    q0, q1, q2, q3 = link.unbind(1)
    pairs = ((q2, q0), (q3, q1), (q1, q3), (q0, q2))
    return torch.stack([torch.where(negative, a, b) for a, b in pairs], 1)


def _find(cube: Tensor, coords: Tensor, R: int) -> Tensor:
    b, x, y, z = coords.long().unbind(1)
    index = ((b * R + x) * R + y) * R + z
    if len(cube) == 0:
        return torch.full_like(coords[:, 0], -1)
    found = torch.searchsorted(cube, index, out_int32=True).clamp_(max=len(cube) - 1)
    return torch.where(cube[found] == index, found, -1)
