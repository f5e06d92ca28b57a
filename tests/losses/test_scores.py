"""Scores of pictures whose PSNR is known, and baselines on an object that they must get right."""

import math
from types import SimpleNamespace

import pytest
import torch

from kernels.camera import Camera, Image
from models import GaussianScene
from train import scores as scoring
from train.data.batch import Batch

V = 3
SIZE = 32
RESOLUTION = 4
RED = torch.tensor([0.8, 0.2, 0.1])


def batch(color=RED, hole: bool = False) -> Batch:
    """A batch of one object in V views: a flat square of `color` on half the frame.

    The square has a transparent hole; the voxels are a full grid.
    """
    image = torch.zeros(V, 4, SIZE, SIZE)
    image[:, :3, 8:24, 8:24] = color[:, None, None]
    image[:, 3, 8:24, 8:24] = 1
    if hole:
        image[:, 3, 10:12, 10:12] = 0
    grid = torch.cartesian_prod(*[torch.arange(1, 3)] * 3)  # the 8 voxels around the origin
    coords = torch.nn.functional.pad(grid, (1, 0)).int()
    features = color.expand(len(coords), 3)
    camera = Camera.orbit(torch.linspace(0, 4, V), torch.zeros(V), width=SIZE)
    return Batch(features, coords, 1, camera, [0] * V, image, ["object"])


def objects(held_out: Batch, training: Batch | None = None):
    views = {"holdout": held_out, "train": training or held_out}
    return SimpleNamespace(
        views=lambda name, kind: views[kind],
        groups={"held-out views": ["object"], "held-out objects": []},
    )


def test_scores_of_known_errors():
    truth = batch()
    color, alpha = truth.image.split([3, 1], dim=1)
    exact = scoring.score(lambda b: Image(color * alpha, alpha), [truth, truth])
    assert exact.full == exact.inside == float("inf") and exact.pictures == 2 * V * 2
    # 0.1 off in a quarter of the frame
    off = scoring.score(lambda b: Image((color + 0.1) * alpha, alpha), [truth])
    assert off.inside == pytest.approx(20, abs=1e-3) and off.full == pytest.approx(
        20 + 10 * math.log10(4), abs=1e-3
    )
    # shows the background
    clear = scoring.score(
        lambda b: Image(torch.zeros_like(color), torch.zeros_like(alpha)), [truth]
    )
    edge = batch()
    edge.image[:, 3, 8:24, 16:24] = 0.4  # a pixel that is less than half covered is not inside
    wrong = torch.where(edge.image[:, 3:] == 0.4, 0.9, 0.0)
    assert scoring.score(
        lambda b: Image(color * b.image[:, 3:] + wrong, b.image[:, 3:]), [edge]
    ).inside == float("inf")
    error = torch.stack([RED, 1 - RED]).square().mean(1) / 4
    assert clear.full == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    bright = scoring.score(
        lambda b: Image(torch.where(alpha > 0, 1.5, 0.0) * torch.ones(3, 1, 1), alpha),
        [batch(torch.ones(3))],
    )
    assert bright.full == float("inf")  # clamped before it is compared


def test_pictures_without_the_object_count_in_the_full_frame_only():
    truth = batch()
    truth.image[0] = 0
    score = scoring.score(
        lambda b: Image(0.5 * b.image[:, :3] * b.image[:, 3:], b.image[:, 3:]), [truth]
    )
    assert score.inside == score.inside and score.pictures == 2 * V


def test_the_silhouette_is_the_mean_training_colour():
    render = scoring.silhouette(objects(batch(), batch(hole=True)))
    image = render(batch(torch.tensor([0.0, 1.0, 0.0]), hole=True))
    assert torch.equal(image.alpha, batch(hole=True).image[:, 3:])
    assert (
        torch.allclose(image.color[:, :, 16, 16], RED.expand(V, 3))
        and image.color[:, :, 11, 11].abs().max() == 0
    )


def test_one_gaussian_a_voxel_shows_the_voxels_colour_where_they_are():
    image = scoring.voxel_gaussians(RESOLUTION, 0.6)(batch())
    middle = slice(SIZE // 2 - 1, SIZE // 2 + 1)
    assert torch.allclose(
        image.color[:, :, middle, middle].mean((2, 3)), RED.expand(V, 3), atol=0.02
    )
    assert image.alpha[:, :, middle, middle].min() > 0.95 and image.alpha[:, :, 0, 0].max() < 1e-3


def test_compare_scores_every_floor_and_every_group_that_has_objects():
    small = lambda b: [
        GaussianScene(*(torch.zeros(0, n) for n in (3, 3, 4, 1)), torch.zeros(0, 1, 3))
    ]
    training = batch()  # shows less than the held-out views, so that another size suits it
    training.image[:, :, :, :12] = training.image[:, :, :, 20:] = 0
    training.image[:, :, :12] = training.image[:, :, 20:] = 0
    seen = objects(batch(), training)
    without, scores = (
        scoring.compare({"empty": small}, seen, RESOLUTION, rgb) for rgb in (False, True)
    )
    assert list(without) == ["empty", "silhouette"] and list(scores)[:2] == ["empty", "silhouette"]
    (name,) = scores.keys() - without.keys()
    own, held = (
        {
            size: scoring.score(scoring.voxel_gaussians(RESOLUTION, size), [views]).full
            for size in scoring.SIZES
        }
        for views in (training, batch())
    )
    best = max(own, key=own.get)
    assert name == f"one Gaussian a voxel ({best} wide)" and best != max(held, key=held.get)
    assert scores[name]["held-out views"].full == pytest.approx(held[best])
    assert scores["empty"]["held-out views"].full < held[best]
    # no object is held out whole
    assert all(row.keys() == {"held-out views"} for row in scores.values())
    text = scoring.table(scores)
    assert name in text and f"{held[best]:.2f}" in text and "held-out views, 6 pictures" in text
