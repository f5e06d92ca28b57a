"""Distances between two surfaces: points on one, and how far they are from the other, exactly.

A KD-tree (scipy) over the triangles' centres finds candidates, a bound on what it has not named
ends the search, and the distances to the candidates are those of a point and a triangle. All in
float64. N points, F triangles.
"""

from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from torch import Tensor

SIDE = 1 / 32  # world units: longer triangles are cut, for their centres say little
PIECES = 1 << 22  # of all triangles, about: no more are cut
FEW = 0.02  # of all pieces: so few of one size are searched with the larger ones
NEAREST = 8  # pieces that every point is compared with
ROUNDING = 1e-12  # of distances, relative
TINY = 1e-300
PAIRS = 1 << 19  # of points and pieces at once


def need_scipy() -> None:
    """Raise ValueError that says how to install scipy where it is absent."""
    try:
        import scipy.spatial  # noqa: F401
    except ImportError as error:
        raise ValueError("surface distances need scipy: pip install '.[evaluate]'") from error


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
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    below = area.cumsum()
    if not len(area) or not 0 < below[-1] < np.inf:
        raise ValueError(f"a surface of {len(faces)} triangles without area has no points to draw")
    chosen = np.searchsorted(below, rng.random(count) * below[-1], side="right")
    chosen = chosen.clip(max=len(area) - 1)
    root = np.sqrt(rng.random(count))[:, None]
    along = rng.random(count)[:, None]
    a, b, c = a[chosen], b[chosen], c[chosen]
    return (1 - root) * a + root * (1 - along) * b + root * along * c


def squared_distance(points: Tensor, triangles: Tensor) -> Tensor:
    """Squared distances of points [N, 3] from triangles [N, 3, 3], row by row: [N], float64.

    Triangles without area are the segment, or the point, that they are.
    """
    normal = torch.linalg.cross(
        triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    )
    length = normal.square().sum(1)
    inside = length > 0
    nearest = torch.full_like(length, torch.inf)
    for i in range(3):
        start = triangles[:, i]
        edge = triangles[:, (i + 1) % 3] - start
        to = points - start
        reach = edge.square().sum(1)
        along = ((to * edge).sum(1) / reach.clamp(min=torch.finfo(reach.dtype).tiny)).clamp(0, 1)
        nearest = torch.minimum(nearest, (to - along[:, None] * edge).square().sum(1))
        inside &= (torch.linalg.cross(edge, to) * normal).sum(1) >= 0
    height = ((points - triangles[:, 0]) * normal).sum(1)
    return torch.where(inside, height.square() / length.where(inside, 1), nearest)


class Surface:
    """Triangles that can be asked how far points are from them.

    `workers` threads search, and distances are computed on `device`. ValueError without triangles.
    """

    def __init__(
        self,
        vertices: np.ndarray,  # [P, 3]
        faces: np.ndarray,  # [F, 3]
        device: torch.device,
        workers: int = 1,
    ):
        if not len(faces):
            raise ValueError("a surface without triangles has no distances")
        pieces = _cut(vertices.astype(np.float64)[faces])
        center = pieces.mean(1)
        radius = np.linalg.norm(pieces - center[:, None], axis=2).max(1)
        self.parts = [
            _Part(pieces[rows], center[rows], radius[rows], device, workers)
            for rows in _by_size(radius)
        ]

    def squared_distance(self, points: np.ndarray) -> np.ndarray:
        """Squared distances of points [N, 3] from the nearest triangle: [N] float64."""
        nearest = np.full(len(points), np.inf)
        for part in self.parts:
            part.improve(points, nearest)
        return nearest


class _Part:
    """Pieces of triangles of about one size, and a KD-tree of their centres."""

    def __init__(
        self,
        pieces: np.ndarray,  # [n, 3, 3]
        center: np.ndarray,  # [n, 3]
        radius: np.ndarray,  # [n]: no corner is farther from the centre
        device: torch.device,
        workers: int,
    ):
        from scipy.spatial import KDTree

        self.tree = KDTree(center)
        self.largest = radius.max()
        self.radius = torch.from_numpy(radius).to(device)
        self.pieces = torch.from_numpy(pieces).to(device)
        self.center = torch.from_numpy(center).to(device)
        self.offset = self.pieces - self.center[:, None]
        self.workers = workers

    def improve(self, points: np.ndarray, nearest: np.ndarray) -> None:
        """Lower squared distances [N] in place to those of the pieces here, where these are less.

        A point is compared with the pieces of the nearest centres, and where others may be nearer,
        with all whose centres are as near as theirs can be.
        """
        few = min(NEAREST, self.tree.n)
        ranks = list(range(1, few + 1))  # a list: [N, 1] for one, too
        for rows in np.array_split(np.arange(len(points)), -(-len(points) * few // PAIRS)):
            distance, piece = self.tree.query(points[rows], k=ranks, workers=self.workers)
            own = np.arange(len(rows))
            for row, pieces in (
                (own, piece[:, 0].copy()),  # alone: what it leaves to the others is little
                (np.repeat(own, few), piece.ravel()),
            ):
                nearest[rows] = self._compare(points[rows], nearest[rows], row, pieces)
            reach = np.sqrt(nearest[rows]) * (1 + ROUNDING) + self.largest
            if few < self.tree.n:
                left = distance[:, -1] < reach
                self._compare_all(points, nearest, rows[left], reach[left])

    def _compare_all(
        self, points: np.ndarray, nearest: np.ndarray, rows: np.ndarray, reach: np.ndarray
    ) -> None:
        """Compare the points of some rows with every piece whose centre is within their reach."""
        ball = self.tree.query_ball_point
        counts = ball(points[rows], reach, workers=self.workers, return_length=True)
        turn = counts.cumsum() // PAIRS
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(turn)) + 1):
            found = ball(points[rows[part]], reach[part], workers=self.workers, return_sorted=False)
            piece = np.fromiter(chain.from_iterable(found), np.int64)
            row = np.repeat(np.arange(len(part)), counts[part])
            nearest[rows[part]] = self._compare(points[rows[part]], nearest[rows[part]], row, piece)

    def _compare(
        self, points: np.ndarray, nearest: np.ndarray, row: np.ndarray, piece: np.ndarray
    ) -> np.ndarray:
        """The lesser of `nearest` [n] and the distances of pairs: points[row] and a piece each."""
        device = self.pieces.device
        from_host = lambda values: torch.from_numpy(values).to(device)
        row, piece = from_host(row), from_host(piece)
        points, nearest = from_host(points), from_host(nearest)
        way = points[row] - self.center[piece]
        length = way.square().sum(1).sqrt()
        limit = nearest.sqrt()[row] * (1 + ROUNDING)
        near = (length - self.radius[piece] < limit).nonzero()[:, 0]
        row, piece, way, length, limit = (x[near] for x in (row, piece, way, length, limit))
        # no corner is nearer than the plane through the nearest of them, square to the way to the
        # centre
        ahead = (self.offset[piece] * way[:, None]).sum(2).amax(1) / length.clamp(min=TINY)
        near = (length - ahead < limit).nonzero()[:, 0]
        row, piece = row[near], piece[near]
        exact = squared_distance(points[row], self.pieces[piece])
        return nearest.scatter_reduce(0, row, exact, "amin").cpu().numpy()


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


def _by_size(radius: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of pieces whose radii differ by a factor of four at most, the largest last.

    What is FEW joins the next larger ones, and may be smaller.
    """
    largest = radius.max()
    level = np.floor(np.log(np.maximum(radius / max(largest, 1e-300), 1e-12)) / np.log(4) + 0.5)
    taken = np.zeros(len(radius), bool)
    for step in np.unique(level):
        rows = np.flatnonzero((level <= step) & ~taken)
        if len(rows) >= FEW * len(radius) or step == level.max():
            taken[rows] = True
            yield rows


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
    the threshold. No triangles of ours score 0, and have no distances (nan).
    """
    empty = not len(ours[1])
    points_true = sample_surface(*truth, count, np.random.default_rng(seeds[1]))
    to_point = to_surface = (np.full(count, np.nan),) * 2
    if not empty:
        points = sample_surface(*ours, count, np.random.default_rng(seeds[0]))
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
