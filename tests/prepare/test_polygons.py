"""Polygons as triangles: their area, nothing outside it, whatever the corner they begin with."""

import sys

import numpy as np
import pytest

from tests.helpers.front import area
from tests.helpers.mesh_files import write_obj
from train.meshes.polygons import triangulate
from train.meshes.read import read_mesh

L = np.array([[0, 0], [2, 0], [2, 1], [1, 1], [1, 2], [0, 2]], float)  # its area is 3
ARROW = np.array([[0, 0], [2, 2], [0, 4], [1, 2]], float)  # of 4 corners, one of them inside
RING = np.array(  # a hole of 2 x 2 in a square of 4 x 4, joined to it by a keyhole
    [[0, 0], [4, 0], [4, 4], [0, 4], [0, 0], [1, 1], [1, 3], [3, 3], [3, 1], [1, 1]], float
)
KNOWN = {"L": (L, 3.0), "arrow": (ARROW, 2.0), "ring": (RING, 12.0)}


def star(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """A simple polygon [n, 2] about the origin, concave as a rule; the first corner is on +x."""
    n = int(rng.integers(4, 24))
    angle = (np.arange(n) + rng.uniform(0, 0.9, n)) / n * 2 * np.pi
    angle[0] = 0
    radius = rng.uniform(low, high, n)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def keyhole(rng: np.random.Generator) -> np.ndarray:
    """A simple polygon with a hole, which a slit along +x joins to its outline."""
    outer = star(rng, 2.2, 4)
    hole = star(rng, 0.5, 1)[::-1]
    hole = np.roll(hole, 1, 0)  # from the corner on +x
    return np.concatenate([outer, outer[:1], hole, hole[:1]])


def comb(rng: np.random.Generator) -> np.ndarray:
    """A bar with teeth of random lengths: no point sees all of it."""
    teeth = int(rng.integers(2, 9))
    x = np.arange(2 * teeth + 1, dtype=float)
    y = np.where(np.arange(2 * teeth + 1) % 2, rng.uniform(0.2, 4, 2 * teeth + 1), -0.1)
    steps = np.stack([x.repeat(2)[1:-1], y[:-1].repeat(2)], 1)
    return np.concatenate([steps[::-1], [[0, -1], [x[-1], -1]]])


def shoelace(polygon: np.ndarray) -> float:
    """The area of a polygon in the plane."""
    x, y = polygon.T
    return abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2


def inside(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """True for points in a polygon: a ray along +x crosses its edges an odd number of times."""
    found = np.zeros(len(points), bool)
    for a, b in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        level = (a[1] > points[:, 1]) != (b[1] > points[:, 1])
        rise = b[1] - a[1] if b[1] != a[1] else 1.0
        found ^= level & (points[:, 0] < a[0] + (points[:, 1] - a[1]) * (b[0] - a[0]) / rise)
    return found


def covering(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """How many triangles [F, 3, 2] cover each point."""
    a, b, c = np.moveaxis(triangles, 1, 0)

    def side(p, q):
        edge = q - p
        away = points[:, None] - p
        return edge[:, 0] * away[..., 1] - edge[:, 1] * away[..., 0]

    sides = np.stack([side(a, b), side(b, c), side(c, a)])
    return ((sides > 0).all(0) | (sides < 0).all(0)).sum(1)


@pytest.mark.parametrize("kind", [star, keyhole, comb], ids=lambda kind: kind.__name__)
def test_random_polygons_are_covered_once_and_nothing_else_is(kind):
    rng = np.random.default_rng(17)
    flat = [kind(rng, 0.3, 3) if kind is star else kind(rng) for _ in range(40)]
    flat = [np.roll(p, rng.integers(len(p)), 0)[:: rng.choice([-1, 1])] for p in flat]
    turns = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in flat]
    scales = 10.0 ** rng.uniform(-3, 3, len(flat))
    spatial = [
        (np.pad(p, ((0, 0), (0, 1))) @ turn + rng.normal(size=3)) * scale
        for p, turn, scale in zip(flat, turns, scales, strict=True)
    ]
    points = np.concatenate(spatial)
    sizes = np.array([len(p) for p in flat])
    cut = triangulate(points, sizes)
    assert cut.flat == cut.crossed == 0
    first = np.cumsum(sizes) - sizes
    for m, polygon in enumerate(flat):
        own = cut.corners[cut.polygon == m]
        assert (own >= first[m]).all() and (own < first[m] + sizes[m]).all()
        a, b, c = np.moveaxis(points[own], 1, 0)
        normal = np.cross(b - a, c - a)
        mean = normal.sum(0)
        assert (normal @ mean >= -1e-9 * (mean @ mean)).all(), "all face the same way"
        covered = np.linalg.norm(normal, axis=1).sum() / 2 / scales[m] ** 2
        assert covered == pytest.approx(shoelace(polygon), rel=1e-9)
        here = rng.uniform(polygon.min(0), polygon.max(0), (200, 2))
        count = covering(here, polygon[own - first[m]])
        assert np.array_equal(count, inside(here, polygon))


def test_slightly_warped_polygons_keep_their_area():
    rng = np.random.default_rng(3)
    flat = [star(rng, 0.5, 3) for _ in range(40)]
    warped = [np.c_[p, rng.normal(size=len(p)) * 2e-3] for p in flat]
    cut = triangulate(np.concatenate(warped), np.array([len(p) for p in flat]))
    a, b, c = np.moveaxis(np.concatenate(warped)[cut.corners], 1, 0)
    found = np.bincount(cut.polygon, np.linalg.norm(np.cross(b - a, c - a), axis=1)) / 2
    assert cut.crossed == 0
    assert np.allclose(found, [shoelace(p) for p in flat], rtol=5e-3)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("suffix", ["obj", "ply"])
def test_files_of_polygons_from_every_corner(tmp_path, name, suffix):
    polygon, true = KNOWN[name]
    n = len(polygon)
    for start in range(n):
        corners = np.roll(polygon, start, 0)
        rows = "\n".join(f"{x} {y} 0" for x, y in corners)
        path = tmp_path / f"a.{suffix}"
        if suffix == "obj":
            path.write_text(
                "v " + rows.replace("\n", "\nv ") + "\nf " + " ".join(map(str, range(1, n + 1)))
            )
        else:
            path.write_text(
                f"ply\nformat ascii 1.0\nelement vertex {n}\n"
                + "".join(f"property float {axis}\n" for axis in "xyz")
                + "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
                + rows
                + f"\n{n} {' '.join(map(str, range(n)))}\n"
            )
        mesh = read_mesh(path)
        assert area(mesh) == pytest.approx(true, abs=1e-9) and not mesh.notes, start


def test_the_holes_of_a_keyhole_are_empty(tmp_path):
    rows = "".join(f"v {x} {y} 0\n" for x, y in RING)
    path = write_obj(tmp_path, "ring", rows + "f 1 2 3 4 5 6 7 8 9 10\n")
    mesh = read_mesh(path)
    plane = mesh.vertices[mesh.faces][..., [0, 2]]
    places = np.array([[2.0, 2.1], [1.2, 2.7], [0.5, 2.1], [3.5, 0.4]])
    assert covering(places, plane).tolist() == [0, 0, 1, 1]


def test_convex_polygons_keep_their_fan_and_need_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "mapbox_earcut", None)
    rng = np.random.default_rng(5)
    polygons = []
    for n in (3, 4, 5, 8, 4, 3):
        angle = np.sort(rng.uniform(0, 2 * np.pi, n))
        polygons.append(np.stack([np.cos(angle), np.sin(angle), 0 * angle + n], 1))
    polygons.append(ARROW[:, [0, 1, 1]] * [1, 1, 0])  # star-shaped about its first corner
    polygons[-1] = np.roll(polygons[-1], 1, 0)
    sizes = np.array([len(p) for p in polygons])
    cut = triangulate(np.concatenate(polygons), sizes)
    first = np.cumsum(sizes) - sizes
    fans = [
        (a, a + i, a + i + 1) for a, n in zip(first, sizes, strict=True) for i in range(1, n - 1)
    ]
    assert cut.corners.tolist() == [list(map(int, fan)) for fan in fans]
    with pytest.raises(ValueError, match="not convex need mapbox-earcut: pip install '.*prepare"):
        triangulate(np.pad(np.roll(L, 1, 0), ((0, 0), (0, 1))), np.array([6]))


def test_degenerate_and_crossing_polygons_are_counted(tmp_path):
    text = "".join(f"v {x} {y} 0\n" for x, y in [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (3, 1)])
    text += "f 1 2\nf 1 2 3 4\nf 1 1 1 1\nf 1 4 6 5\n"  # only the last has an area
    mesh = read_mesh(write_obj(tmp_path, "flat", text))
    assert len(mesh.faces) == 2
    assert mesh.notes == ["flat.obj: polygons without area: 3, not shown"]
    mesh = read_mesh(write_obj(tmp_path, "bow", text.replace("f 1 4 6 5", "f 1 4 5 6")))
    assert mesh.notes[1] == "bow.obj: polygons whose edges cross: 1, which may cover too much"
    assert len(mesh.faces) == 2, "a twisted quad keeps both halves"
    star = RING[[0, 2, 1, 3, 0, 2, 3, 1]]  # two bow ties whose areas cancel
    cut = triangulate(np.pad(star, ((0, 0), (0, 1))), np.array([8]))
    assert cut.crossed == 1 and len(cut.corners) == 6
