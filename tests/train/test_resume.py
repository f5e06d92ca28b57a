"""Runs that stop and go on."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.attack.checkpoints import earlier
from tests.helpers.runs import fresh, refused, rows, state, train
from train import loop
from train.losses import objective
from train.run import checkpoint, resume


def interrupted(out: Path, at: int, number: int, monkeypatch, *flags: str) -> int:
    """A run that gets a signal in the middle of step `at`; returns its exit status."""
    whole = objective.Objective.forward

    def forward(self, *args):
        if self.calls == at:
            os.kill(os.getpid(), number)
        self.calls += 1
        return whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(objective.Objective, "calls", 1, raising=False)
        patch.setattr(objective.Objective, "forward", forward)
        with pytest.raises(SystemExit) as stopped:
            fresh(out, *flags)
    return stopped.value.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_straight_to_the_bit(
    finished, tmp_path, monkeypatch, capsys, number
):
    out = tmp_path / "run"
    assert (
        interrupted(out, 4, number, monkeypatch, "--steps", "6", "--save-every", "3")
        == 128 + number
    )
    assert (
        f"stopped at step 4; continue with: python -m train.gaussian --resume {out}"
        in capsys.readouterr().out
    )
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
    assert (out / "checkpoints" / "encoder.safetensors").is_file()


def test_a_killed_run_repeats_the_steps_after_its_last_checkpoint(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    # as if killed after step 5, while writing a row
    checkpoint.newest(out / "checkpoints").unlink()
    (out / "log.jsonl").write_text(
        "".join((out / "log.jsonl").read_text().splitlines(keepends=True)[:5]) + '{"step": 6, "lo'
    )
    train("--resume", out)
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(t, state(finished)[0][name]) for name, t in state(out)[0].items())


def test_a_checkpoint_of_an_earlier_version_goes_on_and_it_is_said(
    finished, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "conclude", lambda run: None)
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "checkpoints" / "step_00000006.safetensors").unlink()
    file = checkpoint.newest(out / "checkpoints")
    file.write_bytes(earlier(file.read_bytes()))
    train("--resume", out)
    assert f"{file} is of an earlier version, without checksums" in capsys.readouterr().out
    ours, theirs = state(out), state(finished)
    assert ours[1] == theirs[1]
    assert all(torch.equal(t, theirs[0][name]) for name, t in ours[0].items())


def test_another_number_of_steps_in_the_config_is_said(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "conclude", lambda run: None)
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "checkpoints" / "step_00000006.safetensors").unlink()
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"steps": 6', '"steps": 4'))
    train("--resume", out)
    assert "--steps 4 instead of 6 is another cosine" in capsys.readouterr().out


def test_data_that_have_moved_are_asked_for(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"data": []', '"data": ["gone"]'))
    said = f"{out} was trained on 'gone', which is no folder: --data says where the data are now"
    assert said in refused(capsys, "--resume", out)


def test_more_steps_can_be_asked_of_a_finished_run(tmp_path):
    fresh(tmp_path, "--steps", "2", "--final-lr", "1", "--save-every", "2")
    train("--resume", tmp_path, "--steps", "4")
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_a_full_disk_stops_the_run_and_keeps_the_previous_checkpoint(tmp_path, capsys, monkeypatch):
    whole = checkpoint.save_checked

    def full(tensors, file, metadata):
        if "step_00000002" in str(file):
            raise OSError(28, "No space left on device")
        whole(tensors, file, metadata)

    monkeypatch.setattr(checkpoint, "save_checked", full)
    monkeypatch.setattr(resume, "PATIENCE", 0.0)
    with pytest.raises(SystemExit) as stopped:
        fresh(tmp_path, "--steps", "3", "--save-every", "1")
    message = capsys.readouterr().err
    assert (
        stopped.value.code == 1
        and "No space left on device" in message
        and f"--resume {tmp_path}" in message
    )
    assert "the newest complete checkpoint is" in message and state(tmp_path)[1]["step"] == 1
    monkeypatch.undo()
    train("--resume", tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
