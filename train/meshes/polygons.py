"""Polygons as triangles, each in its own plane.

A fan from the first corner is kept where it covers the polygon and nothing else (every convex one):
that is found for all polygons at once. The others are cut by ear clipping (mapbox-earcut, of the
extra `prepare`); a polygon that a keyhole joins to its holes is one of them.
"""

from dataclasses import dataclass

import numpy as np

# shares of a polygon's area
OVERLAP = 1e-7  # a fan that covers more than this twice, or outside, is not kept: not by rounding
CROSSED = 1e-6  # ear clipping that covers more or less than this: the polygon's edges cross
FLAT = 1e-12  # of the square of a polygon's extent: less area than this is none


@dataclass(frozen=True)
class Triangles:
    """The triangles of M polygons, whose corners are numbered through all of them."""

    corners: np.ndarray  # [F, 3] int64, numbers of corners
    polygon: np.ndarray  # [F] int64, the polygon of each
    flat: int  # polygons without area, or of fewer than 3 corners: they have no triangles
    crossed: int  # polygons whose edges cross in their plane

    def notes(self, name: str) -> list[str]:
        """Say what of the polygons of file `name` is not shown as they are."""
        lines = []
        if self.flat:
            lines.append(f"{name}: polygons without area: {self.flat}, not shown")
        if self.crossed:
            lines.append(
                f"{name}: polygons whose edges cross: {self.crossed}, which may cover too much"
            )
        return lines


def triangulate(points: np.ndarray, sizes: np.ndarray) -> Triangles:
    """Cut polygons into triangles that face the same way.

    `points` [N, 3] float64 are the corners of all polygons, one after the other, and `sizes` [M]
    says how many each has. Triangles pass as they are. A polygon's plane is that of its mean
    normal. Points that are not finite make a fan: whoever reads the file refuses them. Raises
    ValueError where ear clipping is needed and not installed.
    """
    sizes = np.asarray(sizes, np.int64)
    first = np.cumsum(sizes) - sizes
    polygon, corners = _fans(sizes, first)
    flat = sizes < 3
    if (sizes <= 3).all():
        return Triangles(corners, polygon, int(flat.sum()), 0)
    a, b, c = np.moveaxis(points[corners], 1, 0)
    cross = np.cross(b - a, c - a)
    M = len(sizes)
    normal = np.stack([np.bincount(polygon, cross[:, axis], M) for axis in range(3)], 1)
    length = np.linalg.norm(normal, axis=1)
    area = np.bincount(polygon, np.linalg.norm(cross, axis=1), M)
    reach = np.zeros(M)
    np.maximum.at(reach, polygon, np.maximum(np.abs(b - a).max(1), np.abs(c - a).max(1)))
    # negated: of points that are not finite nothing is larger
    flat |= (sizes > 3) & (area <= FLAT * reach**2)
    along = (cross * normal[polygon]).sum(1) / np.maximum(length, 1e-300)[polygon]
    outside = np.bincount(polygon, np.maximum(-along, 0), M)
    outside[length <= FLAT * area] = np.inf  # both halves cancel: a bow tie
    wrong = (sizes > 3) & ~flat & (outside > OVERLAP * length)
    if not wrong.any() and not flat.any():
        return Triangles(corners, polygon, 0, 0)
    quads = wrong & (sizes == 4)
    crossed = _turn_quads(points, corners, polygon, quads, normal)
    wrong &= ~quads
    kept = ~(flat | wrong)[polygon]
    cut = [corners[kept]]
    owner = [polygon[kept]]
    for m in np.flatnonzero(wrong).tolist():
        ears, error = _ears(points[first[m] : first[m] + sizes[m]], normal[m])
        crossed += error > CROSSED * length[m]
        if outside[m] == np.inf or error > 2 * outside[m]:  # the fan is nearer to its area
            step = np.arange(1, sizes[m] - 1)
            ears = np.stack([0 * step, step, step + 1], 1)
        cut.append(ears + first[m])
        owner.append(np.full(len(ears), m))
    owner = np.concatenate(owner)
    order = np.argsort(owner, kind="stable")  # in the order of the file
    return Triangles(np.concatenate(cut)[order], owner[order], int(flat.sum()), int(crossed))


def _turn_quads(
    points: np.ndarray,
    corners: np.ndarray,
    polygon: np.ndarray,
    quads: np.ndarray,
    normal: np.ndarray,
) -> int:
    """Cut the `quads` [M] whose fan is wrong along their other diagonal, in place in `corners`.

    Where that is wrong too, the quad is twisted and its fan stays; returns how many are.
    """
    rows = np.flatnonzero(quads[polygon]).reshape(-1, 2)
    first = corners[rows[:, 0], 0]
    other = np.array([[1, 2, 3], [1, 3, 0]]) + first[:, None, None]
    a, b, c = np.moveaxis(points[other], 2, 0)
    mean = normal[quads]
    along = (np.cross(b - a, c - a) * mean[:, None]).sum(2)
    square = (mean**2).sum(1)
    good = (along >= -OVERLAP * square[:, None]).all(1) & (square > 0)
    corners[rows[good]] = other[good]
    return int((~good).sum())


def _fans(sizes: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The polygon [F] and the corners [F, 3] of the triangles of all fans."""
    count = np.maximum(sizes - 2, 0)
    polygon = np.repeat(np.arange(len(sizes)), count)
    step = np.arange(len(polygon)) - np.repeat(np.cumsum(count) - count, count)
    start = first[polygon]
    return polygon, np.stack([start, start + step + 1, start + step + 2], 1)


def _ears(points: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, float]:
    """Cut one polygon [n, 3] by ear clipping: triangles [F, 3], and twice the error of their area.

    `normal` [3] is that of its plane, as long as twice its area.
    """
    try:
        from mapbox_earcut import triangulate_float64
    except ImportError as error:
        raise ValueError(
            "polygons that are not convex need mapbox-earcut: pip install '.[prepare]'"
        ) from error
    area = np.linalg.norm(normal)
    if not area > 0:
        return np.zeros((0, 3), np.int64), np.inf
    normal = normal / area
    aside = np.eye(3)[np.abs(normal).argmin()]
    across = np.cross(aside, normal)
    across /= np.linalg.norm(across)
    plane = np.stack([across, np.cross(normal, across)], 1)
    flat = np.ascontiguousarray((points - points[0]) @ plane)
    ears = triangulate_float64(flat, np.array([len(points)], np.uint32))
    ears = ears.reshape(-1, 3).astype(np.int64)
    a, b, c = np.moveaxis(flat[ears], 1, 0)
    twice = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    turned = twice < 0
    ears[turned] = ears[turned][:, ::-1]
    return ears, abs(np.abs(twice).sum() - area)
