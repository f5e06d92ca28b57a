"""Distances of surfaces: exact on shapes that are known, and beside trimesh's on others."""

import numpy as np
import pytest
import torch
import trimesh

from train.evaluate import surfaces
from train.evaluate.surfaces import Surface, sample_surface, surface_scores

CPU = torch.device("cpu")


def arrays(mesh) -> tuple[np.ndarray, np.ndarray]:
    return np.array(mesh.vertices), np.array(mesh.faces)


def square(z: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two triangles in the plane of height z, [-0.5, 0.5]^2."""
    corners = [(-0.5, -0.5, z), (0.5, -0.5, z), (0.5, 0.5, z), (-0.5, 0.5, z)]
    return np.array(corners), np.array([[0, 1, 2], [0, 2, 3]])


def points(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3)) * 0.5


def distances(mesh, where: np.ndarray) -> np.ndarray:
    return np.sqrt(Surface(*mesh, CPU).squared_distance(where))


def test_distances_of_a_square_and_a_box_are_those_of_their_formulas():
    where = points(400)
    beside = np.maximum(np.abs(where[:, :2]) - 0.5, 0)
    wanted = np.sqrt((beside**2).sum(1) + (where[:, 2] - 0.1) ** 2)
    assert np.abs(distances(square(0.1), where) - wanted).max() < 1e-14
    half = np.array([0.5, 0.3, 0.02])
    off = np.abs(where) - half
    wanted = np.linalg.norm(np.maximum(off, 0), axis=1) + np.minimum(off.max(1), 0)
    found = distances(arrays(trimesh.creation.box(2 * half)), where)
    assert (wanted < 0).any() and np.abs(found - np.abs(wanted)).max() < 1e-14


def test_distances_of_a_sphere_are_between_those_of_the_spheres_around_and_within():
    radius = 0.4
    vertices, faces = arrays(trimesh.creation.icosphere(4, radius))
    within = np.linalg.norm(vertices[faces].mean(1), axis=1).min()  # of all triangles, almost
    where = points(500)
    length = np.linalg.norm(where, axis=1)
    found = distances((vertices, faces), where)
    outside = length > radius
    assert (found[outside] >= length[outside] - radius - 1e-14).all()
    assert np.abs(found - np.abs(length - radius)).max() < 1.1 * (radius - within)
    assert distances((vertices, faces), vertices).max() < 1e-15


@pytest.mark.parametrize("side", [1 / 16, 10.0], ids=["cut", "whole"])
def test_triangles_of_all_sizes_and_without_area_are_as_trimesh_has_them(side, monkeypatch):
    monkeypatch.setattr(surfaces, "SIDE", side)
    monkeypatch.setattr(surfaces, "TURN", 32)  # several turns
    rng = np.random.default_rng(1)
    size = 10 ** rng.uniform(-4, -0.3, (700, 1, 1))
    triangles = rng.normal(size=(700, 1, 3)) * 0.3 + rng.normal(size=(700, 3, 3)) * size
    where = points(90, 2)
    nearest = [
        trimesh.triangles.closest_point(triangles, np.broadcast_to(p, (700, 3))) for p in where
    ]
    wanted = np.array(
        [np.linalg.norm(n - p, axis=1).min() for n, p in zip(nearest, where, strict=True)]
    )
    soup = triangles.reshape(-1, 3), np.arange(2100).reshape(-1, 3)
    assert np.abs(distances(soup, where) - wanted).max() < 1e-14
    flat = np.array([[0.0, 0, 0], [1, 0, 0], [0.5, 0, 0], [0, 2, 0]])
    segment, point = np.array([[0, 1, 2]]), np.array([[3, 3, 3]])
    assert distances((flat, segment), np.array([[0.7, 0.3, 0.4]]))[0] == pytest.approx(0.5)
    assert distances((flat, point), np.array([[0.0, 2, 7]]))[0] == 7


def test_points_lie_on_the_surface_as_many_as_its_area_and_the_same_each_time():
    vertices, faces = arrays(trimesh.creation.box((1, 0.5, 0.25)))
    drawn = sample_surface(vertices, faces, 20000, np.random.default_rng(3))
    assert distances((vertices, faces), drawn).max() < 1e-15
    top = np.abs(drawn[:, 2] - 0.125) < 1e-12
    share = 0.5 / (2 * (0.5 + 0.25 + 0.125))
    assert abs(top.mean() - share) < 4 * np.sqrt(share * (1 - share) / 20000)
    assert abs(drawn[top, :2].mean(0)).max() < 0.02
    again = sample_surface(vertices, faces, 20000, np.random.default_rng(3))
    assert np.array_equal(drawn, again)


def test_scores_of_two_parallel_squares_are_known():
    gap = 0.008
    seeds = [0, 1], [0, 2]
    scores = surface_scores(square(gap), square(), 4000, (0.05, 0.005), (1e-4, 1e-5), seeds, CPU)
    assert scores["md"] == pytest.approx(gap**2, rel=1e-12)
    assert (scores["md_f1_1e-04"], scores["md_f1_1e-05"]) == (1, 0)
    # from point to point is farther, by what 4000 points leave between them: 1 / (pi 4000)
    assert scores["cd2"] == pytest.approx(gap**2 + 1 / (np.pi * 4000), rel=0.05)
    assert scores["cd"] > gap and scores["cd"] ** 2 < scores["cd2"]
    assert (scores["f_0.05"], scores["f_0.005"], scores["empty"]) == (1, 0, 0)
    half = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0]]), np.array([[0, 1, 2]])
    part = surface_scores(half, square(), 4000, (0.02,), (1e-8,), seeds, CPU)
    # all of ours is near the truth, and half of it near ours
    assert part["md_f1_1e-08"] == pytest.approx(2 / 3, abs=0.02)
    none = (np.zeros((0, 3)), np.zeros((0, 3), int))
    for absent in (none, (np.full((3, 3), np.nan), half[1]), (np.zeros((3, 3)), half[1])):
        empty = surface_scores(absent, square(), 100, (0.05,), (1e-6,), seeds, CPU)
        assert empty["empty"] == 1 and empty["f_0.05"] == empty["md_f1_1e-06"] == 0
        assert np.isnan([empty["cd"], empty["md"], empty["cd2"]]).all()


def test_surfaces_without_area_or_triangles_are_refused():
    with pytest.raises(ValueError, match="1 triangles without area"):
        sample_surface(np.zeros((3, 3)), np.array([[0, 1, 2]]), 5, np.random.default_rng(0))
    with pytest.raises(ValueError, match="without triangles"):
        Surface(np.zeros((3, 3)), np.zeros((0, 3), int), CPU)
