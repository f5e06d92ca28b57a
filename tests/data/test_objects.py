"""Training and scored data stay apart; scores are of posterior means."""

import json

import pytest
import torch

import models
import train.data
from tests.helpers.datasets import AA, BB, CC, make, view_number
from tests.helpers.runs import TINY, own_data
from train import loop
from train.data.objects import Objects
from train.flags import from_cli
from train.gaussian import PRESETS, build
from train.run.machine import Machine

HERE = Machine(torch.device("cpu"), 0, 1)


def config(*flags):
    return from_cli("gaussian", PRESETS, [*map(str, (*TINY, *flags))])


@pytest.fixture
def data(tmp_path):
    """Objects aa, bb, cc with views 0, 1, 2 to train on and 3, 4 held out; cc is held out whole."""
    flags = own_data(tmp_path)
    make(tmp_path / "split", split=["train", "train", "test"])
    return [tmp_path / "split" if flag == tmp_path / "data" else flag for flag in flags]


def test_held_out_views_and_objects_are_scored_and_never_trained_on(data):
    objects = Objects(
        config(*data, "--image-size", "24", "--eval-objects", "3", "--steps", "40"), HERE
    )
    batches = [batch for step in objects.steps() for batch in step]
    trained = {
        (name, view_number(image))
        for b in batches
        for name, image in zip(b.names, b.image, strict=True)
    }
    assert trained == {(name, view) for name in (AA, BB) for view in (0, 1, 2)}
    assert sorted(objects.groups["held-out views"]) == [AA, BB] and objects.groups[
        "held-out objects"
    ] == [CC]
    for name in (AA, BB, CC):
        assert [view_number(image) for image in objects.views(name, "train").image] == [0, 1, 2]
        assert [view_number(image) for image in objects.views(name, "holdout").image] == [3, 4]
    gallery = objects.gallery()
    # without a local_path
    assert sorted(objects.captions(gallery)) == [AA[:8], BB[:8], f"{CC[:8]}\n(unseen)"]
    assert sorted(gallery.names) == [AA, BB, CC] and [
        view_number(image) for image in gallery.image
    ] == [3, 3, 3]


def test_views_that_the_features_saw_are_not_held_out():
    objects = lambda holdout: Objects(config("--holdout-views", holdout), HERE)
    # with which the embedded objects were made
    assert "the last 4 views, 4 whole objects" in objects(4).summary()
    with pytest.raises(
        ValueError,
        match="5 held-out views, but its rgb features were made without only 4 of 20 frames",
    ):
        objects(5)


def test_too_few_held_out_views_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    two = make(tmp_path / "two", resolution=8)
    for file in two.rglob("transforms.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"holdout": 2}))
    for name in ("read_features", "read_picture", "read_triangles"):
        monkeypatch.setattr(
            train.data.dataset, name, lambda *_: pytest.fail("something was loaded")
        )
    flags = ["--data", two, "--data", tmp_path / "absent", "--resolution", 8]
    no_model = lambda *_: pytest.fail("a model was made")
    said = "4 held-out views, but its rgb .* without only 2 of 5 frames: use --holdout-views 2 or"
    with pytest.raises(ValueError, match=said):
        loop.Run("gaussian", config(*flags, "--holdout-views", 4), no_model, HERE)
    said = "lists 5 frames: 5 held-out views leave none to train on: use fewer --holdout-views"
    with pytest.raises(ValueError, match=said):
        Objects(config(*flags, "--holdout-views", 5), HERE)


def test_pictures_and_scores_are_of_posterior_means(data, tmp_path):
    run = loop.Run("gaussian", config(*data, "--out", tmp_path / "run"), build, HERE)
    # untrained it is zero, and every latent gives the same scene
    torch.nn.init.normal_(run.vae.decoder.out_layer.weight)
    batch = run.objects.gallery()
    posterior = run.vae.encoder(models.SparseTensor(batch.features, batch.coords, batch.batch_size))
    means, sampled = (run.vae.decoder(z) for z in (posterior.mode(), posterior.sample()))
    for scene, mean, other in zip(run.decode(batch), means, sampled, strict=True):
        assert torch.equal(scene.color, mean.color) and torch.equal(scene.center, mean.center)
        assert not torch.equal(scene.color, other.color)


def test_moments_are_those_of_the_training_features_of_all_voxels(data, monkeypatch):
    objects = Objects(config(*data), HERE)
    items = [objects.train.item(index, [0]) for index in range(2)]
    features = torch.cat([item.features for item in items]).double()
    mean, covariance = objects.moments
    assert torch.allclose(mean, features.mean(0), atol=1e-12)
    expected = torch.cov(features.T, correction=0)
    assert torch.allclose(covariance, expected, rtol=0, atol=1e-12)
    monkeypatch.setattr(train.data.objects, "MEASURED", 1)
    (mean, _) = Objects(config(*data), HERE).moments
    assert torch.allclose(mean, items[0].features.double().mean(0), atol=1e-12)


def test_a_run_starts_from_the_principal_components_of_its_features():
    flags = ("--model.channels", "64", "--model.heads", "2", "--seed", "3")
    starts = {
        start: loop.Run("gaussian", config(*flags, "--model.start", start), build, HERE)
        for start in ("principal", "published")
    }
    share = {}
    for start, run in starts.items():
        item = run.objects.train.item(0, [0])
        voxels = models.SparseTensor(
            item.features, torch.nn.functional.pad(item.coords, (1, 0)), batch_size=1
        )
        latents = run.vae.encoder(voxels).mean.detach().double()
        mean, covariance = run.objects.moments
        _, components = torch.linalg.eigh(covariance)
        first = (item.features.double() - mean) @ components[:, -8:]
        stacked = torch.cat([latents, torch.ones(len(latents), 1)], 1)
        fit = stacked @ torch.linalg.lstsq(stacked, first).solution
        share[start] = 1 - ((first - fit).square().sum() / (first - first.mean(0)).square().sum())
    assert share["principal"] > 0.95 > 0.85 > share["published"], share
