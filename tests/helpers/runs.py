"""Tiny training runs of train.gaussian, and what they leave."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.datasets import make
from train import loop
from train.gaussian import PRESETS, build
from train.run import checkpoint

TINY = (
    "--device cpu --resolution 16 --image-size 32 --batch-size 2 --views 1 --holdout-views 2 "
    "--eval-objects 2 --sample-every 100 --warmup 0 "
    "--model.channels 16 --model.heads 1 --model.blocks 1 --model.per-voxel 2"
).split()


def train(*flags: str) -> None:
    """Run train.gaussian with these flags."""
    loop.main("gaussian", PRESETS, build, [*map(str, flags)])


def fresh(out: Path, *flags: str) -> list[dict]:
    """A new tiny run; returns its log."""
    train(*TINY, "--out", out, *flags)
    return rows(out)


def rows(run: Path) -> list[dict]:
    """The rows of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def state(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The newest checkpoint of a run: tensors and the rest."""
    return checkpoint.load(checkpoint.newest(run / "checkpoints"))


def same_run(ours: Path, theirs: Path) -> None:
    """Assert that two runs have ended with the same bits; only times may differ."""
    mine, his = state(ours), state(theirs)
    assert mine[1] == his[1] and mine[0].keys() == his[0].keys()
    for name, t in mine[0].items():
        assert torch.equal(t, his[0][name]), name
    times = {"seconds", "voxels_per_second"}
    logs = [
        [{k: row[k] for k in row.keys() - times} for row in rows(run)] for run in (ours, theirs)
    ]
    assert logs[0] == logs[1]
    for name in ("encoder.safetensors", "decoder.safetensors"):
        files = [run / "checkpoints" / name for run in (ours, theirs)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    scores = [json.loads((run / "evaluation.json").read_text())["psnr"] for run in (ours, theirs)]
    assert scores[0] == scores[1]


def refused(capsys, *flags) -> str:
    """The message of a run that ends with status 2 before it trains."""
    with pytest.raises(SystemExit) as stopped:
        train(*flags)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def own_data(tmp_path: Path) -> list:
    """Flags for a dataset of three objects, 8^3, five views of 24 pixels."""
    own = "--resolution 8 --features rgb --model.window 4 --eval-objects 1".split()
    return ["--data", make(tmp_path / "data"), *own]
