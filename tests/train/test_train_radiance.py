"""Tiny whole runs of train.radiance.

What they leave, resuming to the bit, a frozen encoder, the published recipe.
"""

import json
from pathlib import Path

import pytest
import torch

import models
from train import loop
from train.radiance import BASE, PRESETS, build
from train.run import checkpoint

TINY = (
    "--device cpu --image-size 24 --batch-size 2 --views 1 --holdout-views 2 --eval-objects 2 "
    "--sample-every 100 --warmup 0 "
    "--model.channels 16 --model.heads 1 --model.blocks 1 --model.rank 2"
).split()


def train(out: Path, *flags: str) -> list[dict]:
    loop.main("radiance", PRESETS, build, [*TINY, "--out", str(out), *map(str, flags)])
    return rows(out)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    train(out, "--steps", "4", "--save-every", "2")
    return out


def test_a_run_leaves_pictures_scores_and_models(finished):
    log = rows(finished)
    terms = {"l1": 1.0, "ssim": 0.2, "kl": 1e-6}  # no penalties, no LPIPS without its file
    for row in log:
        assert row["loss"] == pytest.approx(
            sum(weight * row[term] for term, weight in terms.items()), rel=1e-5
        )
    assert (finished / "samples" / "step_00000004.png").is_file() and (
        finished / "curves.png"
    ).is_file()
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert list(evaluation["psnr"])[:3] == ["trained", "untrained", "silhouette"]
    decoder = models.load_pretrained(finished / "checkpoints" / "decoder")
    assert (
        isinstance(decoder, models.RadianceDecoder)
        and decoder.config.rank == 2
        and decoder.config.trivec_std == 0.5
    )


def test_resumed_equals_straight_to_the_bit_ray_offsets_included(tmp_path):
    train(tmp_path / "whole", "--steps", "4", "--final-lr", "1")
    train(tmp_path / "parts", "--steps", "2", "--final-lr", "1")
    loop.main("radiance", PRESETS, build, ["--resume", str(tmp_path / "parts"), "--steps", "4"])
    whole, parts = (
        checkpoint.load(checkpoint.newest(tmp_path / run / "checkpoints"))[0]
        for run in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and all(
        torch.equal(whole[name], parts[name]) for name in whole
    )


def test_an_encoder_trained_with_another_decoder_is_frozen(finished, tmp_path):
    log = train(tmp_path, "--steps", "2", "--encoder", finished)
    assert (
        all("kl" not in row for row in log)
        and len(list((tmp_path / "latents").rglob("*.safetensors"))) > 0
    )
    assert not any(
        name.startswith("model.encoder.")
        for name in checkpoint.load(checkpoint.newest(tmp_path / "checkpoints"))[0]
    )


def test_base_is_the_published_recipe():
    assert (BASE.steps, BASE.batch_size, BASE.views) == (500_000, 256, 1)
    assert (BASE.lr, BASE.final_lr, BASE.weight_decay) == (1e-4, 1.0, 0.0)
    assert (BASE.optimizer, BASE.precision, BASE.resolution, BASE.image_size, BASE.ema) == (
        "adamw",
        "fp16",
        64,
        512,
        0.9999,
    )
    assert (BASE.model.rank, BASE.model.dim, BASE.model.density_scale, BASE.model.trivec_std) == (
        16,
        8,
        1.0,
        0.0,
    )
    weights = BASE.weights
    assert (weights.l1, weights.ssim, weights.lpips, weights.kl) == (1.0, 0.2, 0.2, 1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.rank", "0"], "rank 0 must be at least 1"),
        (["--model.dim", "1"], "dim 1 at least 2"),
        (["--model.density-scale", "nan"], "density_scale nan must exceed 0"),
        (["--model.trivec-std", "-1"], "trivec_std -1.0 be at least 0"),
    ],
)
def test_impossible_fields_end_with_a_message(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path / "run", *flags)
    assert message in capsys.readouterr().err
