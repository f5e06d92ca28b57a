"""Tests of --init and --freeze: runs that start from trained weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import models
from tests.helpers.runs import TINY, fresh, refused, rows, state, train
from train import gaussian, mesh, radiance
from train.decoders import DECODERS
from train.flags import from_cli
from train.run.start import started


def untrained(script):
    """Build the smallest model of a kind, for `rgb` features."""
    presets = {"gaussian": gaussian, "radiance": radiance, "mesh": mesh}[script].PRESETS
    config = from_cli(script, presets, DECODERS[script].smallest.split())
    return DECODERS[script].build(config, 50)


def changed(before, after) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_a_run_starts_from_the_weights_of_another(finished, tmp_path):
    run = tmp_path / "run"
    fresh(run, "--steps", "1", "--lr", "1e-30", "--ema", "0", "--init", finished)
    for part in ("encoder", "decoder"):
        before = load_file(finished / "checkpoints" / f"{part}.safetensors")
        after = load_file(run / "checkpoints" / f"{part}.safetensors")
        assert changed(before, after) == []  # a learning rate of nothing
    assert "before" in json.loads((run / "evaluation.json").read_text())["psnr"]
    assert rows(run)[0]["loss"] < rows(finished)[0]["loss"]  # of the first step of that run


@pytest.mark.parametrize("frozen, trained", [("encoder", "decoder"), ("decoder", "encoder")])
def test_a_frozen_part_keeps_its_weights(finished, tmp_path, frozen, trained):
    run = tmp_path / "run"
    log = fresh(run, "--steps", "2", "--ema", "0", "--init", finished, "--freeze", frozen)
    files = [finished / "checkpoints", run / "checkpoints"]
    kept = [load_file(folder / f"{frozen}.safetensors") for folder in files]
    moved = [load_file(folder / f"{trained}.safetensors") for folder in files]
    assert changed(*kept) == []
    assert changed(*moved)
    assert ("kl" in log[0]) == (frozen == "decoder")
    tensors, _ = state(run)
    assert not any(name.startswith(f"average.{frozen}") for name in tensors)


def test_a_resumed_run_ends_with_the_same_bits(finished, tmp_path):
    straight = tmp_path / "straight"
    halves = tmp_path / "halves"
    flags = ["--init", finished, "--freeze", "encoder", "--save-every", "1", "--steps", "2"]
    fresh(straight, *flags)
    shutil.copytree(straight, halves)
    (halves / "checkpoints" / "step_00000002.safetensors").unlink()
    train("--resume", halves)
    one, two = (state(run)[0] for run in (straight, halves))
    assert one.keys() == two.keys() and changed(one, two) == []


def test_a_published_decoder_keeps_its_own_layout(tmp_path):
    """The published one has another layout of a layer's weights, which is not a size."""
    vae = untrained("mesh")
    args = vae.decoder.args | {"skip_weight": "spconv", "use_checkpoint": True}
    models.save_pretrained(models.MeshDecoder(**args), tmp_path / "published")
    begun = started(vae, (str(tmp_path / "published"),))
    assert begun.decoder.args["skip_weight"] == "spconv"
    assert begun.decoder.use_checkpoint is False
    assert begun.encoder is vae.encoder


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--init {run} --model.blocks 2", "give --model.blocks 1, not 2"),
        ("--init {run} --model.per-voxel 4", "has num_gaussians 2, this run 4"),
        ("--init {run} --init {run}/checkpoints/encoder", "gives the encoder twice"),
        ("--init {run}/checkpoints", "is a folder without checkpoints/encoder and decoder"),
        ("--init {run}/nothing", "nothing.json is not there"),
        ("--init {run}/checkpoints/decoder.json --model.per-voxel 4", "has num_gaussians 2"),
        ("--freeze encoder", "freeze encoder needs trained weights: give --init"),
        ("--init {run} --freeze head", "freeze 'head' is not encoder or decoder"),
        ("--init {run} --encoder {run} --freeze encoder", "is frozen already"),
    ],
)
def test_what_cannot_be_a_start_is_named(finished, tmp_path, capsys, flags, said):
    out = tmp_path / "run"
    words = flags.format(run=finished).split()
    assert said in refused(capsys, *TINY, "--out", out, *words)
    assert not out.exists()


def test_another_kind_of_decoder_is_refused_by_name(tmp_path):
    models.save_pretrained(untrained("radiance").decoder, tmp_path / "radiance")
    said = "radiance.json is a SLatRadianceFieldDecoder, where this run has a SLatGaussianDecoder"
    with pytest.raises(ValueError, match=said):
        started(untrained("gaussian"), (str(tmp_path / "radiance"),))
