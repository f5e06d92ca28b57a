"""Runs that cannot be: each ends with a message before it trains."""

import shutil

import pytest
import torch

from tests.helpers.runs import TINY, refused, train
from train import reconstruct
from train.flags import from_cli
from train.gaussian import PRESETS
from train.losses import objective
from train.run import checkpoint
from train.run.latents import load_encoder


def test_output_folders(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "gaussian-007").mkdir(parents=True)
    train(*TINY, "--steps", "1", "--eval-objects", "1")
    assert (tmp_path / "runs" / "gaussian-008" / "evaluation.json").is_file()
    assert "runs/gaussian-008 is not empty" in refused(capsys, *TINY, "--out", "runs/gaussian-008")
    (tmp_path / "file").touch()
    assert "run folder file/run cannot be written" in refused(capsys, *TINY, "--out", "file/run")


def test_what_cannot_be_ends_with_a_message(finished, tmp_path, capsys):
    assert "nowhere is not a folder" in refused(
        capsys, *TINY, "--data", "nowhere", "--out", tmp_path / "a"
    )
    leaking = refused(capsys, *TINY, "--holdout-views", "5", "--out", tmp_path / "a")
    assert (
        "5 held-out views, but its rgb features were made without only 4 of 20 frames: use "
        "--holdout-views 4" in leaking
    )
    message = refused(capsys, *TINY, "--features", "dinov2", "--out", tmp_path / "a")
    assert (
        " feature_dinov2_16: it fits --features rgb --resolution 64 or --features rgb "
        "--resolution 16\n" in message
    )
    empty = shutil.copytree(finished, tmp_path / "b", ignore=lambda *_: ["checkpoints"])
    assert "holds no checkpoint" in refused(capsys, "--resume", empty)
    encoder, decoder = finished / "checkpoints" / "encoder", finished / "checkpoints" / "decoder"
    assert "not an encoder" in refused(capsys, *TINY, "--encoder", decoder, "--out", tmp_path / "a")
    message = refused(
        capsys, *TINY, "--encoder", encoder, "--model.latent", "4", "--out", tmp_path / "a"
    )
    assert "the encoder makes 8 latent channels, the decoder takes 4" in message
    frozen = shutil.copytree(empty, tmp_path / "c")
    assert f"{frozen} holds no trained encoder: the run is not finished" in refused(
        capsys, *TINY, "--encoder", frozen
    )
    text = (frozen / "config.json").read_text()
    (frozen / "config.json").write_text(text.replace('"encoder": null', '"encoder": "runs/first"'))
    message = refused(capsys, *TINY, "--encoder", frozen)
    assert (
        f"{frozen} holds no trained encoder: it was trained on that of --encoder runs/first"
        in message
    )
    assert f"{tmp_path} holds no trained encoder: it is not a run folder" in refused(
        capsys, *TINY, "--encoder", tmp_path
    )
    with pytest.raises(ValueError, match="takes features of channels 50, the data has 51"):
        load_encoder(finished, 51, 16)
    assert "device 'quantum'" in refused(
        capsys, *TINY, "--device", "quantum", "--out", tmp_path / "a"
    )
    assert "LPIPS weights: absent is not a file" in refused(
        capsys, *TINY, "--lpips", "absent", "--out", tmp_path / "a"
    )
    assert not (tmp_path / "a").exists()  # nothing was started


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_absent_gpu_is_named(tmp_path, capsys):
    assert "sees 0 GPUs" in refused(capsys, *TINY, "--device", "cuda:1", "--out", tmp_path / "a")


def test_a_checkpoint_of_another_architecture_or_a_damaged_one_is_named(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    recorded = (run / "config.json").read_text()
    (run / "config.json").write_text(recorded.replace('"channels": 16', '"channels": 24'))
    message = refused(capsys, "--resume", run)
    assert (
        "config.json is not that of" in message
        and ": it was saved with model.channels 16, and this run has 24\n" in message
    )
    (run / "config.json").write_text(recorded)
    newest = checkpoint.newest(run / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-100])
    assert "step_00000006.safetensors is truncated" in refused(capsys, "--resume", run)


def test_values_that_cannot_be_are_refused_in_words(capsys, tmp_path):
    for flags, message in (
        (["--resume", ""], "--resume is empty"),
        (["--data", tmp_path, "--data", ""], "--data is empty"),
        (["--image-size", "1e6"], "image_size 1000000 must be at most 8192"),
        (["--model.per-voxel", "1e5"], "model.per_voxel 100000 must be at most 65536"),
        (["--steps", "1.5"], "argument --steps: '1.5' is not a whole number"),
        (["--steps", "many"], "argument --steps: 'many' is not a whole number"),
        (["--steps", "inf"], "argument --steps: 'inf' is not a whole number"),
        (["--steps", "1e400"], "argument --steps: '1e400' is not a whole number"),
    ):
        assert message in refused(capsys, *flags)
    assert from_cli("gaussian", PRESETS, ["--steps", "1e5"]).steps == 100_000


def test_a_model_of_a_billion_blocks_is_not_built(finished, tmp_path, capsys):
    for part in ("encoder", "decoder"):
        for suffix in (".json", ".safetensors"):
            shutil.copy(finished / "checkpoints" / f"{part}{suffix}", tmp_path)
        described = tmp_path / f"{part}.json"
        text = described.read_text()
        described.write_text(text.replace('"num_blocks": 1,', '"num_blocks": 1000000000,'))
        assert described.read_text() != text
    said = "encoder.json: num_blocks is 1000000000, but"
    assert said in refused(capsys, *TINY, "--encoder", tmp_path / "encoder")
    assert said in refused(capsys, *TINY, "--init", tmp_path / "encoder")
    given = [str(tmp_path / "decoder"), "--latent", "l.npz", "--out", str(tmp_path / "out")]
    assert reconstruct.main(given) == 2
    assert "decoder.json: num_blocks is 1000000000, but" in capsys.readouterr().err


def test_misspelt_weights_fail_at_once():
    one = torch.ones(())
    assert objective.weighted({"l1": one, "kl": 2 * one}, {"l1": 3.0, "kl": 0.5}) == 4
    with pytest.raises(
        ValueError, match=r"terms without a weight: \['kl'\]; weights without a term: \['klm'\]"
    ):
        objective.weighted({"l1": one, "kl": one}, {"l1": 1.0, "klm": 1.0})
