"""FlexiCubes (Shen et al. 2023) written plainly: torch over a dense grid, with autograd."""

import torch
from torch import Tensor

from kernels.surface.isosurface import Surfaces
from kernels.surface.tables import EDGES, ambiguous_faces, crossing, dual_parts


def isosurface_reference(coords, fields, resolution, training, batch_size=None) -> Surfaces:
    """`isosurface` of every scene as a dense grid of cubes."""
    R = resolution
    S = resolution + 1
    bias = -1 / resolution
    parts = []
    for b in range(int(coords[:, 0].max()) + 1 if batch_size is None else batch_size):
        mine = coords[:, 0] == b
        voxel = coords[mine, 1:].long()
        field = fields[mine]
        n = len(voxel)
        A = 6 if fields.shape[1] == 101 else 0
        offset = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)])
        corner = (voxel[:, None] + offset).flatten(0, 1)  # [8 n, 3]
        sdf = field[:, :8].flatten() + bias
        deform = field[:, 8:32].reshape(-1, 3)
        color = field[:, 53:].reshape(8 * n, A)
        value = torch.cat([sdf[:, None], deform, color], 1)
        vertex, row = torch.unique(
            (corner[:, 0] * S + corner[:, 1]) * S + corner[:, 2], return_inverse=True
        )
        count = torch.bincount(row, minlength=len(vertex))
        total = torch.zeros(len(vertex), 4 + A, dtype=fields.dtype).index_add(0, row, value)
        mean = total / count[:, None]
        consistency = (value - mean[row]).square().mean() if n else value.sum()
        size = field[:, 32:52].abs().mean() if n else field.sum()

        axis = torch.arange(S, dtype=fields.dtype)
        grid = torch.cartesian_prod(axis, axis, axis) / R - 0.5
        outside = torch.tensor([1.0] + [0.0] * (3 + A), dtype=fields.dtype)
        dense = outside.repeat(S**3, 1).index_put((vertex,), mean)
        x = grid + (1 - 1e-8) / (2 * R) * torch.tanh(dense[:, 1:4])
        cube = (voxel[:, 0] * R + voxel[:, 1]) * R + voxel[:, 2]
        weights = torch.zeros(R**3, 21, dtype=fields.dtype).index_put((cube,), field[:, 32:53])
        surface = flexicubes_reference(
            x, dense[:, 0], torch.sigmoid(dense[:, 4:]), weights, R, training
        )
        vertices, faces, attributes, deviation = surface
        spread = deviation.mean() if len(deviation) else deviation.sum()
        regularizer = consistency + 0.5 * spread + 0.2 * size
        parts.append((vertices, faces, attributes, regularizer, x[vertex], mean[:, 0]))
    vertices, faces, attributes, regularizer, position, value = zip(*parts, strict=True)
    starts = [torch.tensor([0, *map(len, part)]).cumsum(0) for part in (vertices, faces, position)]
    faces = [f + first for f, first in zip(faces, starts[0], strict=False)]
    return Surfaces(
        torch.cat(vertices),
        torch.cat(faces).int(),
        torch.cat(attributes),
        torch.stack(regularizer),
        torch.cat(position),
        torch.cat(value),
        *starts,
    )


def flexicubes_reference(
    x: Tensor,  # [S^3, 3] position of every grid vertex, S = R + 1, x slowest
    sdf: Tensor,  # [S^3]
    color: Tensor,  # [S^3, A]
    weights: Tensor,  # [R^3, 21] raw
    resolution: int,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vertices, faces and attributes of one dense grid, and the deviations.

    There is a deviation for each pair of a dual vertex and one of its edges.
    """
    R = resolution
    S = resolution + 1
    axis = torch.arange(R)
    cx, cy, cz = (t.flatten() for t in torch.meshgrid(axis, axis, axis, indexing="ij"))
    corner = torch.stack(
        [((cx + (i & 1)) * S + cy + (i >> 1 & 1)) * S + cz + (i >> 2) for i in range(8)], 1
    )
    beta = torch.tanh(weights[:, :12]) * 0.99 + 1
    alpha = torch.tanh(weights[:, 12:20]) * 0.99 + 1
    gamma = torch.sigmoid(weights[:, 20]) * 0.99 + 0.005
    negative = sdf < 0
    cases = sum(negative[corner[:, i]].int() << i for i in range(8))
    mixed = ((cases > 0) & (cases < 255)).nonzero()[:, 0]
    original = dict(zip(mixed.tolist(), cases[mixed].tolist(), strict=True))
    parts = [dual_parts(case) for case in range(256)]
    ambiguous = {}  # cases that a neighbour may invert, and the face that they share
    for case in range(256):
        faces = ambiguous_faces(case)
        if len(faces) == 1 and len(parts[case]) == 1:
            ambiguous[case] = faces[0]
    kind = {}
    for c, case in original.items():
        kind[c] = case
        if case in ambiguous:
            along, up = divmod(ambiguous[case], 2)
            place = [c // R**2, c // R % R, c % R]
            place[along] += 2 * up - 1
            other = (place[0] * R + place[1]) * R + place[2]
            if 0 <= place[along] < R and other in original and original[other] in ambiguous:
                kind[c] = 255 - case

    duals = sorted(
        (len(parts[kind[c]]), c, k) for c in original for k in range(len(parts[kind[c]]))
    )
    dual_of = {}
    incidences = []
    for p, (_, c, k) in enumerate(duals):
        dual_of.update({(c, e): p for e in parts[kind[c]][k]})
        incidences += [(p, c, e) for e in parts[kind[c]][k]]
    P = len(duals)
    ends = torch.tensor(EDGES)
    p, c, e = torch.tensor(incidences, dtype=torch.long).view(-1, 3).unbind(1)
    i, j = ends[e].unbind(1)
    vi = corner[c, i]
    vj = corner[c, j]

    def crossing_point(value: Tensor, si: Tensor, sj: Tensor) -> Tensor:
        return (value[vi] * sj[:, None] - value[vj] * si[:, None]) / (sj - si)[:, None]

    def total(value: Tensor) -> Tensor:
        return value.new_zeros(P, value.shape[1]).index_add(0, p, value)

    si = sdf[vi] * alpha[c, i]
    sj = sdf[vj] * alpha[c, j]
    b = beta[c, e][:, None]
    vertices = total(b * crossing_point(x, si, sj)) / total(b)
    attributes = total(b * crossing_point(color, si, sj)) / total(b)
    distance = (crossing_point(x, sdf[vi], sdf[vj]) - vertices[p]).norm(dim=1, keepdim=True)
    deviation = (distance - (total(distance) / total(torch.ones_like(b)))[p]).abs()[:, 0]

    around = {}
    for cube in sorted(original):
        for edge in crossing(kind[cube]):
            key = tuple(corner[cube, list(EDGES[edge])].tolist())
            around.setdefault(key, []).append((dual_of[cube, edge], cube))
    quads = []
    for first, second in sorted(around, key=lambda key: (bool(negative[key[0]]), key)):
        four = around[first, second]
        if len(four) == 4:
            turn = (2, 3, 1, 0) if negative[first] else (0, 1, 3, 2)
            quads.append([four[n] for n in turn])
    quad, owner = torch.tensor(quads, dtype=torch.long).view(-1, 4, 2).unbind(2)
    g02 = gamma[owner[:, 0]] * gamma[owner[:, 2]]
    g13 = gamma[owner[:, 1]] * gamma[owner[:, 3]]
    if not training:
        split = torch.where(
            (g02 > g13)[:, None], quad[:, [0, 1, 2, 0, 2, 3]], quad[:, [0, 1, 3, 3, 1, 2]]
        )
        return vertices, split.view(-1, 3), attributes, deviation

    def centre(value: Tensor) -> Tensor:
        v0, v1, v2, v3 = value[quad].unbind(1)
        sides = g02[:, None] * (v0 + v2) / 2 + g13[:, None] * (v1 + v3) / 2
        return torch.cat([value, sides / (g02 + g13 + 1e-8)[:, None]])

    middle = P + torch.arange(len(quads))
    faces = torch.stack(
        [torch.stack([quad[:, n], quad[:, (n + 1) % 4], middle], 1) for n in range(4)], 1
    )
    return centre(vertices), faces.view(-1, 3), centre(attributes), deviation
