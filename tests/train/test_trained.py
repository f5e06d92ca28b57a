"""Checkpoints are opened: runs, runs on a frozen encoder, prefixes; what is wrong is named."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import models
from train.run import shipped
from train.run.latents import load_encoder
from train.run.shipped import only
from train.run.trained import is_checkpoint, open_all, open_trained

CPU = torch.device("cpu")


def small(channels=50, **changed) -> dict:
    sizes = dict(resolution=16, model_channels=16, latent_channels=8, num_blocks=1, num_heads=1)
    return {"in_channels": channels} | sizes | changed


def prefixes(folder, channels=50, **changed):
    """The prefixes of an encoder and a decoder, untrained."""
    encoder = models.Encoder(**small(channels))
    args = small(**changed)
    del args["in_channels"]
    decoder = models.GaussianDecoder(**args, representation_config={"num_gaussians": 2})
    for name, model in (("enc", encoder), ("dec", decoder)):
        models.save_pretrained(model, folder / name)
    return folder / "enc", folder / "dec"


def test_a_run_is_opened_with_what_its_config_says(finished):
    before = sorted(finished.rglob("*"))
    trained = open_trained(finished, CPU)
    assert (trained.kind, trained.label, trained.features) == ("gaussian", "straight", "rgb")
    assert (trained.resolution, trained.image_size, trained.holdout_views) == (16, 32, 2)
    assert trained.data == () and is_checkpoint(finished)
    parts = (trained.encoder, trained.decoder)
    assert not any(part.training for part in parts)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert sorted(finished.rglob("*")) == before


def test_demo_stands_for_what_comes_with_the_package(finished, frozen, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"demo.json is not there"):
        open_all(["demo"], CPU)
    shutil.copytree(finished, tmp_path / "assets" / "gaussian")
    assert is_checkpoint("demo") and only("demo") == tmp_path / "assets" / "gaussian"
    radiance = shutil.copytree(frozen, tmp_path / "assets" / "radiance")
    config = json.loads((radiance / "config.json").read_text())
    (radiance / "config.json").write_text(json.dumps(config | {"encoder": "gaussian"}))
    both = open_all(["demo"], CPU)
    assert [one.label for one in both] == ["gaussian", "radiance"]
    assert both[0].encoder is both[1].encoder
    (one,) = open_all(["demo/radiance"], CPU)
    assert one.kind == "radiance"
    with pytest.raises(ValueError, match=r"demo stands for 2 checkpoints.*demo/gaussian, demo/rad"):
        only("demo")
    assert load_encoder("demo/gaussian", 50, 16)[1] == both[0].digest
    with pytest.raises(ValueError, match="demo stands for 2 checkpoints"):
        load_encoder("demo", 50, 16)
    # what is the user's comes first: the two files of a prefix, or a folder
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "gaussian.json").touch()
    assert only("demo/gaussian") == Path("demo/gaussian")
    shutil.rmtree(tmp_path / "demo")
    shutil.copytree(finished, tmp_path / "demo")
    assert only("demo") == Path("demo")


def test_a_frozen_encoder_is_found_where_it_was_and_beside_a_moved_run(
    finished, frozen, tmp_path, monkeypatch
):
    own = open_trained(finished, CPU).digest
    assert open_trained(frozen, CPU).digest == own
    moved = shutil.copytree(frozen, tmp_path / "field")
    config = json.loads((moved / "config.json").read_text())
    config["encoder"] = "runs/straight"
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"trained on the encoder runs/straight.*--encoder says"):
        open_trained(moved, CPU)
    assert open_trained(moved, CPU, encoder=finished).digest == own
    shutil.copytree(finished, tmp_path / "straight")
    monkeypatch.chdir(tmp_path.parent)
    trained = open_trained(moved, CPU)
    assert (trained.kind, trained.digest) == ("radiance", own)


def test_an_encoder_that_a_run_was_not_trained_on_is_refused(frozen, tmp_path):
    other, _ = prefixes(tmp_path)
    with pytest.raises(ValueError, match=r"enc.safetensors has the sha256 .* was trained on"):
        open_trained(frozen, CPU, encoder=other)


def test_a_prefix_is_opened_with_and_without_an_encoder(tmp_path):
    encoder, decoder = prefixes(tmp_path)
    alone = open_trained(decoder, CPU)
    assert (alone.encoder, alone.digest, alone.features, alone.kind) == (
        None,
        None,
        None,
        "gaussian",
    )
    for name in (decoder, f"{decoder}.json", f"{decoder}.safetensors"):
        trained = open_trained(name, CPU, encoder)
        assert (trained.features, trained.label, trained.resolution) == ("rgb", "dec", 16)
        assert is_checkpoint(name)
    assert not is_checkpoint(tmp_path) and not is_checkpoint(tmp_path / "chair.obj")


def test_features_without_a_run_follow_from_the_encoders_channels(tmp_path):
    encoder, decoder = prefixes(tmp_path, channels=1024)
    assert open_trained(decoder, CPU, encoder).features == "dinov2_vitl14_reg"
    encoder, _ = prefixes(tmp_path, channels=7)
    with pytest.raises(ValueError, match=r"enc reads 7 channels, and nothing says"):
        open_trained(decoder, CPU, encoder)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"latent_channels": 4}, "the encoder has 8 latent channels, the decoder 4"),
        ({"resolution": 8}, "the encoder has 16 voxels a side, the decoder 8"),
    ],
    ids=["latents", "resolution"],
)
def test_an_encoder_that_does_not_fit_is_refused(tmp_path, changed, message):
    encoder, decoder = prefixes(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        open_trained(decoder, CPU, encoder)


def test_what_is_no_decoder_or_no_encoder_is_named(tmp_path, finished):
    encoder, decoder = prefixes(tmp_path)
    with pytest.raises(ValueError, match="enc.json is an encoder, not a decoder"):
        open_trained(encoder, CPU)
    with pytest.raises(ValueError, match="dec.json is a GaussianDecoder, not an encoder"):
        open_trained(decoder, CPU, decoder)
    with pytest.raises(ValueError, match=r"absent.json is not there: a checkpoint is PREFIX"):
        open_trained(tmp_path / "absent", CPU)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"script": "voxels"}, "script 'voxels' is none of gaussian, radiance, mesh"),
        ({"script": "mesh"}, "is a decoder of train.gaussian, not mesh"),
        ({"image_size": 0}, "image_size 0 is not in 1 to 8192"),
        ({"data": [1]}, r"data is \[1\], not a list of text"),
        ({"encoder": 3}, "encoder is 3, not text"),
        ({"encoder": "gone"}, "trained on the encoder gone"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_named(finished, tmp_path, change, message):
    run = shutil.copytree(finished, tmp_path / "run")
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        open_trained(run, CPU)
    assert str(run) in str(error.value)


def test_a_run_that_is_not_finished_says_how_to_go_on(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "checkpoints" / "decoder.json").unlink()
    with pytest.raises(ValueError, match=rf"not finished.*--resume {re.escape(str(run))}"):
        open_trained(run, CPU)
    with pytest.raises(ValueError, match="is not the folder of a run"):
        open_trained(tmp_path, CPU)
