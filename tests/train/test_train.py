"""Whole runs of train.gaussian, tiny, on the embedded objects.

What they leave behind, resume, stop at and refuse.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as Picture
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import models
from tests.helpers.runs import TINY, fresh, rows, state, train
from tests.helpers.source_files import ROOT
from train import loop
from train.data.objects import Objects
from train.draws import draw
from train.flags import from_cli
from train.gaussian import PRESETS
from train.losses import objective
from train.run import checkpoint, latents, report
from train.run.latents import Latents, load_encoder
from train.run.machine import Machine


def size(picture: Path) -> tuple[int, int]:
    with Picture.open(picture) as opened:
        return opened.size


def test_a_run_leaves_everything_that_it_promises(finished):
    log = rows(finished)
    terms = {"l1", "ssim", "kl", "volume", "opacity"}
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    for row in log:
        assert (
            row.keys()
            == {"step", "loss", "psnr", "seconds", "grad_norm", "skipped", "voxels_per_second"}
            | terms
        )
        weights = {"l1": 1, "ssim": 0.2, "kl": 1e-6, "volume": 1250.0, "opacity": 1e-3}
        assert row["loss"] == pytest.approx(sum(weights[t] * row[t] for t in terms), rel=1e-5)
        assert (
            row["psnr"] > 5
            and row["grad_norm"] > 0
            and row["skipped"] == 0
            and row["voxels_per_second"] > 0
        )
    assert json.loads((finished / "config.json").read_text())["model"]["channels"] == 16
    assert [f.stem for f in sorted((finished / "checkpoints").glob("step*"))] == [
        "step_00000003",
        "step_00000006",
    ]
    width, height = size(finished / "samples" / "step_00000006.png")
    # 2 + 2 objects enlarged three times, truth above ours
    assert width > 4 * 96 and height == 4 * report.LINE + 2 * 96
    assert size(finished / "curves.png")[0] > 500


def test_the_evaluation_has_three_floors_and_its_protocol(finished):
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert (
        "black and on white" in evaluation["protocol"]
        and evaluation["weights"] == "last"
        and evaluation["step"] == 6
    )
    names = list(evaluation["psnr"])
    assert names[:3] == ["trained", "untrained", "silhouette"] and names[3].startswith(
        "one Gaussian a voxel"
    )
    for row in evaluation["psnr"].values():
        assert row.keys() == {"held-out views", "held-out objects"}
        assert all(
            s["pictures"] == 2 * 2 * 2 and 5 < s["inside"] < 40 and 5 < s["full"] < 40
            for s in row.values()
        )


def test_trained_models_load_as_pretrained(finished):
    vae = models.GaussianVAE(
        *(
            models.load_pretrained(finished / "checkpoints" / part)
            for part in ("encoder", "decoder")
        )
    )
    saved = checkpoint.group(state(finished)[0], "model")
    assert vae.state_dict().keys() == saved.keys()
    # the last: six steps are no average
    assert all(torch.equal(t, saved[name]) for name, t in vae.state_dict().items())


def test_the_header_says_what_runs(tmp_path, capsys):
    fresh(tmp_path / "run", "--steps", "1", "--seed", "5")
    out = capsys.readouterr().out
    for fact in (
        "gaussian, preset demo, seed 5",
        "torch kernels, fp32 activations",
        f"torch {torch.__version__}",
        "encoder 4,304, decoder 3,836",
        "l1 + 0.2 ssim + 1e-06 kl + 1250 volume + 0.001 opacity; lpips off: no weights given "
        "(--lpips FILE)",
        "20 of 24 objects (4 of another split)",
        "rgb features [50] at 16^3",
        "the last 2 views, 4 whole objects",
        "1 of 2 objects x 1 views at 32 px",
        str(tmp_path / "run"),
        "mean PSNR in dB, full frame (inside the object):",
    ):
        assert fact in out, fact


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_activations_train_fp32_weights(tmp_path, precision):
    log = fresh(tmp_path, "--steps", "3", "--precision", precision, "--micro-batch", "1")
    tensors, recorded = state(tmp_path)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())
    assert [row["skipped"] for row in log] == [0, 0, 0]
    assert recorded["optimizer"]["log2_scale"] == pytest.approx(
        20.003 if precision == "fp16" else 0
    )


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    whole = objective.weighted
    calls = []

    def poisoned(terms, weights):
        calls.append(1)
        return whole(terms, weights) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(objective, "weighted", poisoned)
    log = fresh(tmp_path, "--steps", "4", "--precision", "fp16", "--ema", "0.5")
    assert (
        [row["skipped"] for row in log] == [0, 1, 1, 1]
        and log[1]["loss"] is None
        and log[1]["grad_norm"] is None
    )
    tensors, recorded = state(tmp_path)
    assert all(t.isfinite().all() for t in tensors.values())
    assert recorded["optimizer"]["log2_scale"] == pytest.approx(20 + 3 * 0.001 - 1)
    assert (
        tensors["optimizer.encoder.input_layer.weight.step"] == 3
        and recorded["optimizer"]["steps"] == 4
    )
    assert len(recorded["clipper"]["norms"]) == 3
    # the untrained weights still have 1/16 in the average
    assert json.loads((tmp_path / "evaluation.json").read_text())["weights"] == "last"


def test_micro_batches_are_averaged_and_draw_what_the_whole_batch_draws(tmp_path, monkeypatch):
    drawn = []
    whole = objective.Objective.forward

    def forward(self, x, noise, batch, background):
        drawn.append((noise, background))
        return whole(self, x, noise, batch, background)

    monkeypatch.setattr(objective.Objective, "forward", forward)
    common = ["--batch-size", "8", "--views", "2", "--eval-objects", "1"]
    together = fresh(tmp_path / "a", *common, "--micro-batch", "8", "--steps", "2")[0]
    (noise, background), (later, _) = drawn
    assert not torch.equal(noise[:9], later[:9])
    drawn.clear()
    (apart,) = fresh(tmp_path / "b", *common, "--micro-batch", "2", "--steps", "1")
    assert len(drawn) == 4 and torch.equal(torch.cat([n for n, _ in drawn]), noise)
    assert torch.equal(torch.cat([b for _, b in drawn]), background)
    # black or white, view by view
    assert sorted(background.unique(dim=0).tolist()) == [[0.0] * 3, [1.0] * 3]
    assert (
        noise.std().item() == pytest.approx(1, abs=0.02)
        and noise.unique().numel() > 0.99 * noise.numel()
    )
    assert all(apart[k] == pytest.approx(together[k], rel=1e-5) for k in ("l1", "ssim", "psnr"))
    # penalties are means over a micro-batch
    assert apart["grad_norm"] == pytest.approx(together["grad_norm"], rel=0.02)


def test_ranks_draw_what_one_rank_draws():
    def draws(rank, world, micro, batch):
        config = from_cli("gaussian", PRESETS, ["--batch-size", "4", "--micro-batch", "1"])
        coords = torch.tensor([[0, 1, 2, 3], [0, 2, 2, 2]][: batch + 1], dtype=torch.int32)
        x = models.SparseTensor(torch.zeros(len(coords), 8), coords)
        run = SimpleNamespace(config=config, here=Machine(torch.device("cpu"), rank, world))
        return torch.cat([d.flatten() for d in draw(run.config, run.here, 7, micro, x, [0, 0])])

    for place in range(4):
        assert torch.equal(
            draws(place // 2, 2, place % 2, place % 2), draws(0, 1, place, place % 2)
        )
    assert not torch.equal(draws(0, 2, 0, 1), draws(1, 2, 0, 1))


def test_a_run_learns(tmp_path):
    log = fresh(
        tmp_path,
        "--steps",
        "80",
        "--lr",
        "0.005",
        "--ema",
        "0.9",
        "--batch-size",
        "4",
        "--eval-objects",
        "1",
    )
    first, last = (sum(row["psnr"] for row in part) / 10 for part in (log[:10], log[-10:]))
    assert last > first + 2, (first, last)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    scores = {name: row["held-out views"]["full"] for name, row in evaluation["psnr"].items()}
    assert evaluation["weights"] == "averaged" and scores["trained"] > scores["untrained"] + 3


def test_a_frozen_encoder_gives_cached_latents_and_no_kl(finished, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    log = fresh(out, "--steps", "2", "--encoder", finished, "--eval-objects", "1")
    assert "kl" not in log[0] and "kl off: the encoder is frozen" in capsys.readouterr().out
    (cache,) = (out / "latents").iterdir()
    digest = hashlib.sha256(
        (finished / "checkpoints" / "encoder.safetensors").read_bytes()
    ).hexdigest()
    latents = load_file(next(cache.iterdir()))
    assert cache.name == digest and latents["mean"].dtype == torch.float32
    assert latents["mean"].shape == (len(latents["coords"]), 8)
    assert not any(name.startswith("model.encoder") for name in state(out)[0])
    assert (
        not (out / "checkpoints" / "encoder.safetensors").exists()
        and (out / "checkpoints" / "decoder.safetensors").exists()
    )
    # a second run on the same cache encodes nothing
    monkeypatch.setattr(models.Encoder, "forward", None)
    shutil.copytree(out / "latents", tmp_path / "again" / "latents")
    train("--resume", out, "--steps", "2")


def test_latents_of_changed_objects_are_made_anew(finished, tmp_path):
    """Kept ones would be of other colours, or of other voxels than the object that is scored."""
    objects = Objects(from_cli("gaussian", PRESETS, TINY), Machine(torch.device("cpu"), 0, 1))
    batch = next(objects.steps())[0]
    cache = Latents(load_encoder(finished, 50, 16)[0], tmp_path / "latents")
    x = models.SparseTensor(batch.features, batch.coords, batch.batch_size)
    assert torch.allclose(cache(batch, changed=True).feats, cache.encoder(x).mean, atol=1e-6)
    assert list((tmp_path / "latents").iterdir()) == []
    flags = "--steps 3 --augment both --eval-objects 20".split()
    fresh(tmp_path / "run", *flags, "--encoder", finished)


def test_the_posterior_mean_of_the_cache_is_the_encoders(finished, tmp_path, monkeypatch):
    objects = Objects(from_cli("gaussian", PRESETS, TINY), Machine(torch.device("cpu"), 0, 1))
    batch = next(objects.steps())[0]
    cache = Latents(load_encoder(finished, 50, 16)[0], tmp_path)
    x = models.SparseTensor(batch.features, batch.coords, batch.batch_size)
    for _ in range(2):  # made, then read
        assert torch.allclose(cache(batch).feats, cache.encoder(x).mean, atol=1e-6)
    name, other = batch.names
    (tmp_path / f"{name}.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=f"{name}.safetensors is truncated"):
        cache(batch)
    shutil.copy(tmp_path / f"{other}.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(
        ValueError, match=f"{name}.safetensors is of the object '{other}', not {name}"
    ):
        cache(batch)
    save_file(load_file(tmp_path / f"{other}.safetensors"), tmp_path / f"{name}.safetensors")
    with pytest.raises(  # of an earlier version, which says nothing of the object
        ValueError, match=f"{name}.safetensors holds .* voxels that are not the object's"
    ):
        cache(batch)
    save_file({"other": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=rf"{name}.safetensors holds \['other'\], not mean"):
        cache(batch)
    (tmp_path / f"{name}.safetensors").unlink()
    monkeypatch.setattr(
        latents,
        "save_checked",
        lambda tensors, file, header: (_ for _ in ()).throw(SafetensorError("No space left")),
    )
    with pytest.raises(OSError, match=f"could not write .*{name}.safetensors: No space left"):
        cache(batch)


def test_deterministic_is_for_the_run_only(tmp_path):
    with loop.machine("cpu", deterministic=True):
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()  # as conftest set it
    fresh(tmp_path, "--steps", "1", "--deterministic", "--eval-objects", "1")


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    flags = [
        *TINY,
        "--batch-size",
        "4",
        "--micro-batch",
        "1",
        "--steps",
        "3",
        "--save-every",
        "1",
        "--lr",
        "1e-3",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*torchrun, "-m", "train.gaussian", *flags, "--out", str(tmp_path / "two")]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    train(*flags, "--out", tmp_path / "one")
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        assert all(
            a[k] == pytest.approx(b[k], rel=1e-5)
            for k in ("loss", "psnr", "grad_norm", "kl", "l1", "ssim", "volume")
        )
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for name, t in checkpoint.group(one[0], "model").items():
        assert (t - two[0][f"model.{name}"]).abs().max() <= 1e-5, name
