"""Whole runs of train.gaussian, tiny, on the embedded objects: what they leave behind, resume, stop at and refuse."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image as Picture
from safetensors.torch import load_file

import models
from train import checkpoint, loop
from train.gaussian import PRESETS, build

ROOT = Path(__file__).parents[1]
TINY = (
    "--device cpu --image-size 32 --batch-size 2 --views 1 --holdout-views 2 --eval-objects 2 --sample-every 100 --warmup 0 "
    "--model.channels 16 --model.heads 1 --model.blocks 1 --model.per-voxel 2"
).split()


def train(*flags: str) -> None:
    loop.main("gaussian", PRESETS, build, [*map(str, flags)])


def fresh(out: Path, *flags: str) -> list[dict]:
    """A new tiny run; returns its log."""
    train(*TINY, "--out", out, *flags)
    return rows(out)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def state(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return checkpoint.load(checkpoint.newest(run / "checkpoints"))


def size(picture: Path) -> tuple[int, int]:
    with Picture.open(picture) as opened:
        return opened.size


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps that other tests look at and start from."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    fresh(out, "--steps", "6", "--save-every", "3")
    return out


def test_a_run_leaves_everything_that_it_promises(finished):
    log = rows(finished)
    terms = {"l1", "ssim", "kl", "volume", "opacity"}
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    for row in log:
        assert row.keys() == {"step", "loss", "psnr", "seconds", "grad_norm", "skipped", "voxels_per_second"} | terms
        weights = {"l1": 1, "ssim": 0.2, "kl": 1e-6, "volume": 156.25, "opacity": 1e-3}
        assert row["loss"] == pytest.approx(sum(weights[t] * row[t] for t in terms), rel=1e-5)
        assert row["psnr"] > 5 and row["grad_norm"] > 0 and row["skipped"] == 0 and row["voxels_per_second"] > 0
    assert json.loads((finished / "config.json").read_text())["model"]["channels"] == 16
    assert [f.name for f in sorted((finished / "checkpoints").glob("step*"))] == ["step_00000003.safetensors", "step_00000006.safetensors"]
    assert size(finished / "samples" / "step_00000006.png") == (4 * 32, 2 * 32)  # 2 + 2 objects, truth above ours
    assert size(finished / "curves.png")[0] > 500


def test_the_evaluation_has_three_floors_and_its_protocol(finished):
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert "black and on white" in evaluation["protocol"] and evaluation["weights"] == "last" and evaluation["step"] == 6
    names = list(evaluation["psnr"])
    assert names[:3] == ["trained", "untrained", "silhouette"] and names[3].startswith("one Gaussian a voxel")
    for row in evaluation["psnr"].values():
        assert row.keys() == {"held-out views", "held-out objects"}
        assert all(s["pictures"] == 2 * 2 * 2 and 5 < s["inside"] < 40 and 5 < s["full"] < 40 for s in row.values())


def test_trained_models_load_as_pretrained(finished):
    vae = models.GaussianVAE(*(models.load_pretrained(finished / "checkpoints" / part) for part in ("encoder", "decoder")))
    saved = checkpoint.group(state(finished)[0], "model")
    assert vae.state_dict().keys() == saved.keys()
    assert all(torch.equal(t, saved[name]) for name, t in vae.state_dict().items())  # "last" weights: six steps are few for an average


def test_the_header_says_what_runs(tmp_path, capsys):
    fresh(tmp_path / "run", "--steps", "1", "--seed", "5")
    out = capsys.readouterr().out
    for fact in (
        "gaussian, preset demo, seed 5", "torch kernels, fp32 activations", f"torch {torch.__version__}", "encoder 4,304", "decoder 3,836",
        "l1 + 0.2 ssim + 1e-06 kl + 156.25 volume + 0.001 opacity; lpips off: no weights given (--lpips FILE)",
        "20 of 24 objects (4 of another split)", "rgb features [50] at 16^3", "the last 2 views, 4 whole objects",
        "1 of 2 objects x 1 views at 32 px", str(tmp_path / "run"), "mean PSNR in dB, full frame (inside the object):",
    ):  # fmt: skip
        assert fact in out, fact


def interrupted(out: Path, at: int, number: int, monkeypatch, *flags: str) -> int:
    """A run that gets a signal in the middle of step `at`; returns its exit status."""
    whole = loop.Objective.forward

    def forward(self, *args):
        if self.calls == at:
            os.kill(os.getpid(), number)
        self.calls += 1
        return whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Objective, "calls", 1, raising=False)
        patch.setattr(loop.Objective, "forward", forward)
        with pytest.raises(SystemExit) as stopped:
            fresh(out, *flags)
    return stopped.value.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_straight_to_the_bit(finished, tmp_path, monkeypatch, capsys, number):
    out = tmp_path / "run"
    assert interrupted(out, 4, number, monkeypatch, "--steps", "6", "--save-every", "3") == 128 + number
    assert f"stopped at step 4; continue with: python -m train.gaussian --resume {out}" in capsys.readouterr().out
    assert len(rows(out)) == 4 and signal.getsignal(number) != loop.Interrupt._note
    train("--resume", out)
    ours, theirs = state(out), state(finished)
    assert ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(t, theirs[0][name]) for name, t in ours[0].items())
    for a, b in zip(rows(out), rows(finished), strict=True):
        assert {k: v for k, v in a.items() if k not in ("seconds", "voxels_per_second")} == {
            k: v for k, v in b.items() if k not in ("seconds", "voxels_per_second")
        }
    seconds = [row["seconds"] for row in rows(out)]
    assert seconds == sorted(seconds)
    assert load_file(out / "checkpoints" / "encoder.safetensors").keys() == load_file(finished / "checkpoints" / "encoder.safetensors").keys()


def test_a_killed_run_repeats_the_steps_after_its_last_checkpoint(finished, tmp_path):
    out = tmp_path / "run"
    fresh(out, "--steps", "6", "--save-every", "3")
    checkpoint.newest(out / "checkpoints").unlink()  # as if killed after step 5, while writing a row
    (out / "log.jsonl").write_text("".join((out / "log.jsonl").read_text().splitlines(keepends=True)[:5]) + '{"step": 6, "lo')
    train("--resume", out)
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(t, state(finished)[0][name]) for name, t in state(out)[0].items())


def test_more_steps_can_be_asked_of_a_finished_run(tmp_path):
    fresh(tmp_path, "--steps", "2", "--final-lr", "1", "--save-every", "2")
    train("--resume", tmp_path, "--steps", "4")
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
