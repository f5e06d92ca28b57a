"""A run's folder: of runs that start at once one gets it; one that ended early can go on."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.runs import TINY, fresh, refused, rows, state, train
from tests.helpers.source_files import ROOT
from train import loop
from train.run import checkpoint
from train.run import folder as folders

START = """
import sys, time
from pathlib import Path
from models.files import write_whole
from train.run.folder import new_folder
out, go, number = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
while not go.exists():
    pass
try:
    with new_folder("gaussian", out):
        write_whole(out / "config.json", number)
        (out / "log.jsonl").touch()
        time.sleep(0.2)
except ValueError as error:
    sys.exit(str(error))
"""


def test_of_runs_that_start_at_once_one_gets_the_folder_and_the_others_write_nothing(tmp_path):
    out, go = tmp_path / "run", tmp_path / "go"
    command = [sys.executable, "-c", START, str(out), str(go)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    starts = [subprocess.Popen([*command, str(number)], **pipes) for number in range(4)]
    for start in starts:
        assert start.stdout.readline() == "ready\n"
    go.touch()
    said = [start.communicate(timeout=60)[1] for start in starts]
    won = [number for number, start in enumerate(starts) if start.returncode == 0]
    assert len(won) == 1 and (out / "config.json").read_text() == str(won[0]), said
    assert all(
        "is in use" in text or "is not empty" in text
        for number, text in enumerate(said)
        if number != won[0]
    ), said
    assert sorted(file.name for file in out.iterdir()) == [".lock", "config.json", "log.jsonl"]


def test_a_run_that_comes_second_writes_nothing(tmp_path, capsys):
    with loop.new_folder("gaussian", str(tmp_path / "run")) as folder:
        assert f"run folder {folder} is in use" in refused(capsys, *TINY, "--out", folder)
        assert [file.name for file in folder.iterdir()] == [".lock"]
    (folder / "config.json.partial").touch()  # as if killed before it had written anything
    fresh(folder, "--steps", "1", "--eval-objects", "1")
    assert len(rows(folder)) == 1 and not (folder / "config.json.partial").exists()


def test_a_folder_is_held_before_it_is_looked_into(tmp_path, monkeypatch):
    whole = folders.locked

    def late(folder):  # between the look and the lock, another run has come and gone
        (folder / "config.json").write_text("another's")
        return whole(folder)

    monkeypatch.setattr(folders, "locked", late)
    with (
        pytest.raises(ValueError, match="is not empty"),
        loop.new_folder("gaussian", str(tmp_path / "run")),
    ):
        pass
    assert (tmp_path / "run" / "config.json").read_text() == "another's"


def test_a_run_without_a_checkpoint_starts_again(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    common = ["--steps", "2", "--eval-objects", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(
            loop.Run, "step", lambda self, batches: (_ for _ in ()).throw(ValueError("no step"))
        )
        message = refused(capsys, *TINY, *common, "--out", out)
    assert f"error: no step\ncontinue with: python -m train.gaussian --resume {out}\n" in message
    assert not checkpoint.files(out / "checkpoints")
    assert f"continue that run with --resume {out}" in refused(capsys, *TINY, *common, "--out", out)
    (out / "log.jsonl").write_text(
        '{"step": 1, "seconds": 1.0}\n'
    )  # a step that was done, and lost
    train("--resume", out)
    assert f"{out} holds no checkpoint: it starts from step 0" in capsys.readouterr().out
    fresh(tmp_path / "straight", *common)
    assert [row["loss"] for row in rows(out)] == [
        row["loss"] for row in rows(tmp_path / "straight")
    ]
    assert state(out)[1] == state(tmp_path / "straight")[1]
    for file in checkpoint.files(out / "checkpoints"):
        file.unlink()
    assert "holds no checkpoint" in refused(
        capsys, "--resume", out
    )  # a finished run is not started again


def test_leftovers_go_when_a_run_goes_on_and_not_while_another_holds_it(tmp_path, capsys):
    fresh(tmp_path, "--steps", "1", "--eval-objects", "1")
    leftover = tmp_path / "samples" / "step_00000009.png.partial"
    mine = tmp_path / "mine.partial"
    with loop.locked(tmp_path):
        leftover.touch(), mine.touch()
        assert (
            "in use by another process" in refused(capsys, "--resume", tmp_path)
            and leftover.exists()
        )
    train("--resume", tmp_path, "--steps", "2")
    assert not leftover.exists() and mine.exists()
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 2
