"""Surface voxels of a mesh, and `rgb` features that need no network.

The features are what the training views saw of each voxel. A cell of the R^3 grid over [-0.5,
0.5]^3 is active where a triangle meets its closed box; touching counts, so a wall in a cell plane
activates both sides, and the interior stays empty (the rule of TRELLIS's voxelize.py).

Channels of `rgb` features, 50 a voxel. Sub-cell s = 4 x + 2 y + z, each 0 or 1, of the 2 x 2 x 2
halves of the voxel:

| channels | what | range |
|---|---|---|
| 0-2 | mean lit colour of the surface points that views saw in the voxel | 0 to 1 |
| 3-5 | their mean normal, each turned to its viewer | -1 to 1 |
| 6-8 | their mean position from the voxel's centre, in voxel sides | -0.5 to 0.5 |
| 9 | fraction of the views that saw the voxel | 0 to 1 |
| 10-33 | per sub-cell s, at 10 + 3 s: mean lit colour | 0 to 1 |
| 34-41 | per sub-cell: fraction of the views that saw it | 0 to 1 |
| 42-49 | per sub-cell: 1 where the surface passes through it | 0 or 1 |

A point counts by the share of its pixel's light that it gives (transparent layers in front take
theirs); what no view saw is zero in every channel but occupancy. Colours are lit because lit views
are what the models reconstruct.
"""

import numpy as np

from train.meshes.surface import earlier_copies

SEEN = 1 / 255  # summed over a view: a trace that no 8-bit image shows is not seen
PAIRS = 1 << 16  # triangle-cell pairs tested at once: a few tens of MB, fastest of 2^12 to 2^18
CORNERS = np.stack(np.meshgrid(*[[0, 1]] * 3, indexing="ij"), -1).reshape(8, 3)
NEAR = np.stack(np.meshgrid(*[[0, 1, 2]] * 3, indexing="ij"), -1).reshape(27, 3)


def voxelize(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> np.ndarray:
    """Find the cells [V, 3] int32 that triangles meet, in (x, y, z) order.

    vertices [P, 3] are clipped to the cube; faces [F, 3]. Each triangle starts in at most 27 blocks
    of its own size, and blocks that it meets are halved until they are cells, so the work follows
    the surface: 200k faces take seconds at 64^3, and a diagonal through the cube is no worse.
    """
    if not 1 <= resolution <= 1024:
        raise ValueError(f"resolution {resolution} is not in 1 to 1024")
    limit = 0.5 - 1e-6
    clipped = np.clip(np.asarray(vertices, np.float64), -limit, limit)
    places = (clipped + 0.5) * resolution  # in cells
    hit = np.zeros(resolution**3, bool)
    # as many triangles at once as start in PAIRS blocks
    once = np.flatnonzero(earlier_copies(clipped, faces) == 0)
    for first in range(0, len(once), PAIRS // len(NEAR)):
        some = faces[once[first : first + PAIRS // len(NEAR)]]
        _mark(hit, Triangles(places[some]), resolution)
    hits = np.flatnonzero(hit)
    return np.stack(
        [hits // resolution**2, hits // resolution % resolution, hits % resolution], -1
    ).astype(np.int32)


def _mark(hit: np.ndarray, triangles: "Triangles", resolution: int) -> None:
    """Mark the cells that triangles meet in `hit` [resolution^3], by their numbers.

    Blocks are halved depth first, PAIRS at once, so that memory does not follow the surface.
    """
    extent = (triangles.high - triangles.low).max(1)
    # a block is 2^level cells wide, not less than the triangle
    level = np.ceil(np.log2(np.maximum(extent, 1))).astype(int)
    for size_log in np.unique(level).tolist():
        size = 1 << size_log
        born = np.flatnonzero(level == size_log)
        # closed boxes: the one that only touches counts
        low = np.ceil(triangles.low[born] / size).astype(np.int64) - 1
        high = np.floor(triangles.high[born] / size).astype(np.int64)
        first = low[:, None] + NEAR
        inside = ((first <= high[:, None]) & (first >= 0)).all(-1)
        owner = np.broadcast_to(born[:, None], inside.shape)[inside]
        todo = [(size_log, owner, first[inside])]
        while todo:
            size_log, pairs, blocks = todo.pop()
            size = 1 << size_log
            keep = (blocks * size < resolution).all(1)
            if size_log == 0:
                keep[keep] = ~hit[cell_id(blocks[keep], resolution)]
            pairs = pairs[keep]
            blocks = blocks[keep]
            keep = triangles.overlap(pairs, (blocks + 0.5) * size, 0.5 * size)
            pairs = pairs[keep]
            blocks = blocks[keep]
            if size_log == 0:
                hit[cell_id(blocks, resolution)] = True
                continue
            for first in range(0, len(pairs), PAIRS // len(CORNERS)):
                rows = slice(first, first + PAIRS // len(CORNERS))
                children = (blocks[rows, None] * 2 + CORNERS).reshape(-1, 3)
                todo.append((size_log - 1, pairs[rows].repeat(len(CORNERS)), children))


class Triangles:
    """Triangles [F, 3, 3] that are tested against cubes.

    Coordinates are kept one by one: numpy is slow along axes of three.
    """

    def __init__(self, corners: np.ndarray):
        # of each corner and axis [F]
        self.corners = [
            [np.ascontiguousarray(corners[:, i, a]) for a in range(3)] for i in range(3)
        ]
        columns = list(zip(*self.corners, strict=True))
        self.low = np.stack([_least(*axis) for axis in columns], 1)  # [F, 3]
        self.high = np.stack([_most(*axis) for axis in columns], 1)

    def overlap(self, which: np.ndarray, centers: np.ndarray, half: float) -> np.ndarray:
        """Test triangles [T] against their closed cubes (centre [T, 3], half side): [T].

        13 separating axes in float64, the cheap ones first. Akenine-Moller, "Fast 3D triangle-box
        overlap testing", 2001.
        """
        meets = np.ones(len(which), bool)
        for a in range(3):
            meets &= self.low[which, a] - centers[:, a] <= half
            meets &= self.high[which, a] - centers[:, a] >= -half
        near = np.flatnonzero(meets)
        t = [
            [self.corners[i][a][which[near]] - centers[near, a] for a in range(3)] for i in range(3)
        ]
        edges = [[t[(i + 1) % 3][a] - t[i][a] for a in range(3)] for i in range(3)]
        meets[near] = _planes(t, edges, half)
        return meets


def _planes(t: list, edges: list, half: float) -> np.ndarray:
    """Test triangles against cubes at the origin by the axes other than the cubes' own: [T].

    t and edges hold the coordinates of three corners and edges, each [T].
    """
    normal = []
    for a in range(3):
        b = (a + 1) % 3
        c = (a + 2) % 3
        normal.append(edges[0][b] * edges[1][c] - edges[0][c] * edges[1][b])
    height = normal[0] * t[0][0] + normal[1] * t[0][1] + normal[2] * t[0][2]
    reach = np.abs(normal[0]) + np.abs(normal[1]) + np.abs(normal[2])
    meets = np.abs(height) <= half * reach
    for edge in edges:  # the cross products of the box's axes with the triangle's edges
        size = [np.abs(x) for x in edge]
        for axis in range(3):
            a = (axis + 1) % 3
            b = (axis + 2) % 3
            p = [edge[a] * corner[b] - edge[b] * corner[a] for corner in t]
            radius = half * (size[a] + size[b])
            meets &= (_least(*p) <= radius) & (_most(*p) >= -radius)
    return meets


def _least(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.minimum(np.minimum(a, b), c)


def _most(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.maximum(np.maximum(a, b), c)


def cell_id(cells: np.ndarray, resolution: int) -> np.ndarray:
    """[..., 3] integer cells to [...] int64 numbers whose order is that of (x, y, z)."""
    cells = np.asarray(cells, np.int64)
    return (cells[..., 0] * resolution + cells[..., 1]) * resolution + cells[..., 2]


class Features:
    """Accumulates `rgb` features (the table above) of one grid, one view after the other."""

    def __init__(self, cells: np.ndarray, sub_cells: np.ndarray, resolution: int):
        """Take cells [V, 3] at `resolution`, and sub_cells at twice that resolution.

        Both are of `voxelize`.
        """
        self.cells = cells
        self.resolution = resolution
        self.views = 0
        self.ids = cell_id(cells, resolution)
        V = len(cells)
        self.cell = np.zeros((10, V))  # weighted sums of colour, normal, offset; weight
        self.sub = np.zeros((4, 8 * V))  # weighted sum of colour; weight
        self.cell_seen = np.zeros(V)
        self.sub_seen = np.zeros(8 * V)
        self.occupied = np.zeros(8 * V)
        row, s, known = self._rows(sub_cells)
        self.occupied[row[known] * 8 + s[known]] = 1

    def _rows(self, sub_cells: np.ndarray):
        """Locate sub-cells [M, 3]: the row of the voxel, and the number 0 to 7 within it.

        `known` [M] says where a voxel exists.
        """
        ids = cell_id(sub_cells // 2, self.resolution)
        row = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return row, (sub_cells % 2) @ np.array([4, 2, 1]), self.ids[row] == ids

    def add_view(
        self, points: np.ndarray, weights: np.ndarray, colors: np.ndarray, normals: np.ndarray
    ) -> None:
        """Add the surface points [M, 3] of a view, in the unit cube.

        Each has a weight [M] (share of a pixel), a colour and a normal [M, 3].
        """
        self.views += 1
        position = (points + 0.5) * self.resolution
        sub_cell = np.floor(position * 2).astype(np.int64).clip(0, 2 * self.resolution - 1)
        row, s, known = self._rows(sub_cell)
        # rounding can put a point beyond the face of the last cell it belongs to
        kept = np.flatnonzero(known & (self.occupied[row * 8 + s] > 0))
        row = row[kept]
        sub_row = row * 8 + s[kept]
        w = weights[kept]
        offset = (position.take(kept, 0) - sub_cell.take(kept, 0) // 2 - 0.5).clip(-0.5, 0.5)
        # channel by channel: numpy is slow along short axes
        columns = [*colors.take(kept, 0).T, *normals.take(kept, 0).T, *offset.T]
        values = [column * w for column in columns] + [w]
        V = len(self.ids)
        for channel, x in enumerate(values):
            seen = np.bincount(row, x, V)
            self.cell[channel] += seen
        self.cell_seen += seen > SEEN
        for channel, x in enumerate((*values[:3], w)):
            seen = np.bincount(sub_row, x, 8 * V)
            self.sub[channel] += seen
        self.sub_seen += seen > SEEN

    def result(self) -> np.ndarray:
        """[V, 50] float16; ValueError where one is not finite, which no training would accept."""
        V = len(self.ids)
        views = max(self.views, 1)
        sub = (self.sub[:3] / np.maximum(self.sub[3], 1e-12)).T.reshape(V, 24)
        cell = (self.cell[:9] / np.maximum(self.cell[9], 1e-12)).T
        parts = [
            cell,
            self.cell_seen[:, None] / views,
            sub,
            self.sub_seen.reshape(V, 8) / views,
            self.occupied.reshape(V, 8),
        ]
        tokens = np.concatenate(parts, 1).astype(np.float16)
        if not np.isfinite(tokens).all():
            row = int(np.flatnonzero(~np.isfinite(tokens).all(1))[0])
            raise ValueError(f"the features of voxel {self.cells[row].tolist()} are not finite")
        return tokens
