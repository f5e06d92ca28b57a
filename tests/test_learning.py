"""The script that compares recipes keeps each run's scores, and goes on where it was stopped."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from tests.helpers.datasets import make
from tests.helpers.runs import TINY
from tests.helpers.source_files import ROOT

OWN = "--resolution 8 --model.window 4 --eval-objects 1 --steps 2 --micro-batch 1".split()


def test_the_picture_of_starts_needs_all_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    learning = importlib.import_module("learning")
    scores = {"held-out objects": {"full": 25.0, "inside": 20.0, "pictures": 8}}
    curve = [{"step": step, "seconds": step, "psnr": 20.0 + step} for step in range(1, 9)]
    run = {"curve": curve, "scores": {"trained": scores, "silhouette": scores}}
    runs = {f"{name}-s{seed}": run for name in learning.STARTS for seed in learning.SEEDS}
    assert {experiment.name for experiment in learning.experiments()} > learning.STARTS.keys()
    learning.draw(runs, tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.size[0] > 800
    learning.draw(dict(list(runs.items())[1:]), tmp_path / "missing.png")
    assert not (tmp_path / "missing.png").exists()


@pytest.mark.slow
def test_what_is_there_is_not_run_again(tmp_path):
    data = make(tmp_path / "data")
    results = tmp_path / "learning.json"
    call = [sys.executable, ROOT / "notebooks" / "learning.py", data, "--runs", tmp_path / "runs"]
    call += ["--results", results, "--only", "kl-1e-06", f"--flags={' '.join([*TINY, *OWN])}"]

    def run() -> str:
        done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path)
        return done.stdout

    said = run()
    assert "== kl-1e-06-s0\n" in said and "== kl-1e-06-s1\n" in said
    runs = json.loads(results.read_text())["runs"]
    assert list(runs) == ["kl-1e-06-s0", "kl-1e-06-s1"]
    for seed, row in enumerate(runs.values()):
        assert row["seed"] == seed and row["steps"] == 2
        assert [point["step"] for point in row["curve"]] == [1, 2]
        assert {"trained", "silhouette"} <= row["scores"].keys()
        assert len(row["latents"]["kl"]) == len(row["latents"]["std"]) == 8
        assert row["environment"]["torch"] == torch.__version__
    del runs["kl-1e-06-s1"]
    results.write_text(json.dumps({"runs": runs}))
    said = run()  # its folder is there: the run is only scored again
    assert "== kl-1e-06-s0\n" not in said and "== kl-1e-06-s1\n" in said
    assert list(json.loads(results.read_text())["runs"]) == ["kl-1e-06-s0", "kl-1e-06-s1"]
