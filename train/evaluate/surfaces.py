"""Distances between two surfaces: points on one, and how far they are from the other, exactly.

All in float64. N points, F triangles.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 1 / 16  # world units: longer triangles are cut, for their boxes say little
PIECES = 1 << 22  # of all triangles, about: no more are cut
EIGHT = 8  # boxes in a box
TURN = 1 << 12  # points at once
ROUNDING = 1e-12  # of distances, relative
TINY = 1e-300


def need_scipy() -> None:
    """Raise ValueError that says how to install scipy where it is absent."""
    try:
        import scipy.spatial  # noqa: F401
    except ImportError as error:
        raise ValueError("surface distances need scipy: pip install '.[evaluate]'") from error


def areas(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Areas of triangles: vertices [P, 3] and faces [F, 3] give [F] float64."""
    a, b, c = np.moveaxis(vertices.astype(np.float64)[faces], 1, 0)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def sample_surface(
    vertices: np.ndarray,  # [P, 3]
    faces: np.ndarray,  # [F, 3]
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:  # [count, 3]
    """Draw points on a surface, each part of it as likely as its area.

    ValueError for a surface without area.
    """
    a, b, c = np.moveaxis(vertices.astype(np.float64)[faces], 1, 0)
    area = areas(vertices, faces)
    below = area.cumsum()
    if not 0 < area.sum() < np.inf:
        raise ValueError(f"a surface of {len(faces)} triangles without area has no points to draw")
    chosen = np.searchsorted(below, rng.random(count) * below[-1], side="right")
    chosen = chosen.clip(max=len(area) - 1)
    root = np.sqrt(rng.random(count))[:, None]
    along = rng.random(count)[:, None]
    a, b, c = a[chosen], b[chosen], c[chosen]
    return (1 - root) * a + root * (1 - along) * b + root * along * c


def squared_distance(points: Tensor, triangles: Tensor) -> Tensor:
    """Squared distances of points [3, N] from triangles [corner, 3, N], column by column: [N].

    Triangles without area are the segment, or the point, that they are.
    """
    sides = [triangles[(i + 1) % 3] - triangles[i] for i in range(3)]
    ways = [points - corner for corner in triangles]
    normal = torch.linalg.cross(sides[0], sides[1], dim=0)
    length = _dot(normal, normal)
    inside = length > 0
    nearest = torch.full_like(length, torch.inf)
    for side, way in zip(sides, ways, strict=True):
        along = (_dot(way, side) / _dot(side, side).clamp(min=TINY)).clamp(0, 1)
        off = way - along * side
        nearest = torch.minimum(nearest, _dot(off, off))
        inside &= _dot(torch.linalg.cross(side, way, dim=0), normal) >= 0
    height = _dot(ways[0], normal)
    return torch.where(inside, height.square() / length.where(inside, 1), nearest)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of columns: [3, N] and [3, N] give [N]."""
    return (a * b).sum(0)


class Surface:
    """Triangles that can be asked how far points are from them, exactly.

    A KD-tree of their centres (scipy) gives each point some near triangle. Boxes around eights of
    them, eights of these and so on name those that may be nearer; the KD-tree's order makes boxes
    small. `workers` threads search, and distances are computed on `device`, in float64. ValueError
    without triangles.
    """

    def __init__(
        self,
        vertices: np.ndarray,  # [P, 3]
        faces: np.ndarray,  # [F, 3]
        device: torch.device,
        workers: int = 1,
    ):
        from scipy.spatial import KDTree

        if not len(faces):
            raise ValueError("a surface without triangles has no distances")
        pieces = _cut(vertices.astype(np.float64)[faces])
        center = pieces.mean(1)
        order = KDTree(center).indices
        self.tree = KDTree(center[order])
        self.workers = workers
        self.device = device
        # the number of the piece last: sums over three rows are fast, over rows of three are not
        self.pieces = torch.from_numpy(pieces[order].transpose(1, 2, 0).copy()).to(device)
        self.boxes = _boxes(self.pieces)  # the largest first

    def squared_distance(self, points: np.ndarray) -> np.ndarray:
        """Squared distances of points [N, 3] from the nearest triangle: [N] float64."""
        first = self.tree.query(points, workers=self.workers)[1]
        found = [
            self._nearest(points[rows], first[rows])
            for rows in np.array_split(np.arange(len(points)), -(-len(points) // TURN))
        ]
        return np.concatenate(found) if found else np.zeros(0)

    def _nearest(self, points: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Squared distances of some points, each of which may be near the piece `first`."""
        points = torch.from_numpy(points.T.copy()).to(self.device)
        best = squared_distance(points, self.pieces[..., torch.from_numpy(first).to(self.device)])
        count = points.shape[1]
        top = self.boxes[0].shape[-1]
        row = torch.arange(count, device=self.device).repeat_interleave(top)
        box = torch.arange(top, device=self.device).repeat(count)
        eight = torch.arange(EIGHT, device=self.device)
        for level, bounds in enumerate(self.boxes):
            if level:
                row = row.repeat_interleave(EIGHT)
                box = (box[:, None] * EIGHT + eight).flatten()
            point = points[:, row]
            low, high = bounds[..., box]
            gap = torch.maximum(low - point, point - high).clamp(min=0)
            near = (_dot(gap, gap) < best[row]).nonzero()[:, 0]
            row, box = row[near], box[near]
        # no corner is nearer than the plane through the nearest of them, square to the way to the
        # centre
        point = points[:, row]
        pieces = self.pieces[..., box]
        center = pieces.mean(0)
        way = point - center
        length = _dot(way, way).sqrt()
        ahead = ((pieces - center) * way).sum(1).amax(0) / length.clamp(min=TINY)
        near = ((length - ahead) * (1 - ROUNDING) < best[row].sqrt()).nonzero()[:, 0]
        row = row[near]
        exact = squared_distance(point[:, near], pieces[..., near])
        return best.scatter_reduce(0, row, exact, "amin").cpu().numpy()


def _boxes(pieces: Tensor) -> list[Tensor]:
    """Boxes around pieces [corner, 3, n], eights of them, and so on, the fewest first.

    Each [2, 3, boxes]: the least and the largest coordinates; boxes of nothing are inside out.
    """
    low, high = pieces.amin(0), pieces.amax(0)
    levels = [torch.stack([low, high])]
    while levels[-1].shape[-1] > EIGHT:
        missing = -levels[-1].shape[-1] % EIGHT
        low, high = levels[-1]
        low = F.pad(low, (0, missing), value=torch.inf).unflatten(1, (-1, EIGHT))
        high = F.pad(high, (0, missing), value=-torch.inf).unflatten(1, (-1, EIGHT))
        levels[-1] = torch.stack([low.flatten(1), high.flatten(1)])
        levels.append(torch.stack([low.amin(2), high.amax(2)]))
    return levels[::-1]


def _cut(triangles: np.ndarray) -> np.ndarray:
    """Cut triangles [F, 3, 3] in two at their longest side until none is longer than SIDE.

    Stops where there would be over PIECES.
    """
    done = []
    while len(triangles):
        sides = np.linalg.norm(np.roll(triangles, -1, 1) - triangles, axis=2)  # of corners i, i + 1
        first = sides.argmax(1)
        long = sides.max(1) > SIDE
        if sum(map(len, done)) + len(triangles) + long.sum() > PIECES:
            long[:] = False
        done.append(triangles[~long])
        rest = triangles[long]
        a, b, c = (rest[np.arange(len(rest)), (first[long] + i) % 3] for i in range(3))
        middle = (a + b) / 2
        triangles = np.concatenate([np.stack([a, middle, c], 1), np.stack([middle, b, c], 1)])
    return np.concatenate(done)


def surface_scores(
    ours: tuple[np.ndarray, np.ndarray],  # vertices [P, 3] and faces [F, 3]
    truth: tuple[np.ndarray, np.ndarray],
    count: int,
    distances: tuple[float, ...],
    squared: tuple[float, ...],
    seeds: tuple[list[int], list[int]],  # of the points on ours and on the truth
    device: torch.device,
    workers: int = 1,
) -> dict[str, float]:
    """Score a surface by `count` points on it and as many on the true one.

    With `distances` (thresholds): "cd", the mean distance from point to point, and its F-scores.
    With `squared` (thresholds of squared distances): "cd2", the mean squared distance from point to
    point, "md", from point to surface, and the F-scores of both. Means are those of both
    directions; an F-score is the harmonic mean of the two shares of points that are nearer than
    the threshold. A surface of ours without area scores 0 and has no distances (nan); for a true
    one a ValueError is raised.
    """
    empty = not 0 < areas(*ours).sum() < np.inf
    points_true = _in_order(sample_surface(*truth, count, np.random.default_rng(seeds[1])))
    to_point = to_surface = (np.full(count, np.nan),) * 2
    if not empty:
        points = _in_order(sample_surface(*ours, count, np.random.default_rng(seeds[0])))
        to_point = _point_to_point(points, points_true, workers)
        if squared:
            to_surface = (
                Surface(*truth, device, workers).squared_distance(points),
                Surface(*ours, device, workers).squared_distance(points_true),
            )
    scores = {}
    if distances:
        apart = tuple(np.sqrt(one) for one in to_point)
        scores["cd"] = _mean(apart)
        scores |= {f"f_{limit:g}": _f_score(apart, limit) for limit in distances}
    if squared:
        for name, apart in (("md", to_surface), ("cd2", to_point)):
            scores[name] = _mean(apart)
            scores |= {f"{name}_f1_{limit:.0e}": _f_score(apart, limit) for limit in squared}
    return scores | {"empty": float(empty)}


def _in_order(points: np.ndarray) -> np.ndarray:
    """Put points next to their neighbours: searches of other trees then take a quarter of the time.

    A search begins where the one before it has left memory in the cache.
    """
    from scipy.spatial import KDTree

    return points[KDTree(points).indices]


def _point_to_point(a: np.ndarray, b: np.ndarray, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances of points from the nearest of the others, both ways."""
    from scipy.spatial import KDTree

    ways = ((a, b), (b, a))
    return tuple(KDTree(of).query(own, workers=workers)[0] ** 2 for own, of in ways)


def _mean(apart: tuple[np.ndarray, np.ndarray]) -> float:
    return float((apart[0].mean() + apart[1].mean()) / 2)


def _f_score(apart: tuple[np.ndarray, np.ndarray], limit: float) -> float:
    near = [float((one < limit).mean()) for one in apart]
    return 2 * near[0] * near[1] / sum(near) if sum(near) else 0.0
