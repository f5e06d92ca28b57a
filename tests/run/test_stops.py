"""Runs of train.gaussian that are stopped, what they say then, and that they can go on."""

import re
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.datasets import BB
from tests.helpers.runs import TINY, fresh, own_data, refused, rows, state, train
from train import loop
from train.losses import objective
from train.run import checkpoint


def test_what_is_wrong_with_the_data_shows_before_a_run_has_a_folder(tmp_path, capsys):
    data = own_data(tmp_path)
    out = tmp_path / "run"
    message = refused(capsys, *TINY, *data, "--views", "4", "--out", out)
    assert "transforms.json: 3 train views, 4 wanted" in message and "--resume" not in message
    assert "lists 5 frames: 5 held-out views leave none" in refused(
        capsys, *TINY, *data, "--holdout-views", "5", "--out", out
    )
    assert not out.exists()


def test_an_object_that_breaks_a_run_is_named_and_the_run_can_go_on(tmp_path, capsys):
    data = own_data(tmp_path)
    out = tmp_path / "run"
    seed = next(s for s in range(9) if np.random.default_rng([s, 0]).permutation(3)[1] == 1)
    # 3 and 4 are held out
    files = [tmp_path / "data" / "renders" / BB / f"{view:03d}.png" for view in range(3)]
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(file.read_bytes()[:-60])
    flags = [
        "--batch-size",
        "1",
        "--steps",
        "3",
        "--save-every",
        "1",
        "--seed",
        str(seed),
        "--out",
        out,
    ]
    message = refused(capsys, *TINY, *data, *flags)
    assert (
        re.search(r"error: \S+bb.00\d.png is truncated or damaged", message)
        and f"--resume {out}" in message
    ), message
    for file, content in zip(files, whole, strict=True):
        file.write_bytes(content)
    train("--resume", out)
    assert [row["step"] for row in rows(out)] == [1, 2, 3]


def test_steps_are_saved_before_their_picture_is_drawn(tmp_path, capsys, monkeypatch):
    def failing(pictures, columns, title, file):
        raise OSError(f"could not write {file}")

    monkeypatch.setattr(loop.report, "picture", failing)
    with pytest.raises(SystemExit) as stopped:
        fresh(tmp_path, "--steps", "2", "--save-every", "1", "--sample-every", "1")
    assert (
        stopped.value.code == 1
        and f"--resume {tmp_path}" in capsys.readouterr().err
        and state(tmp_path)[1]["step"] == 1
    )


def test_a_second_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    whole = loop.Run.step

    def step(self, batches):
        if self.done == 1:
            raise KeyboardInterrupt
        return whole(self, batches)

    monkeypatch.setattr(loop.Run, "step", step)
    with pytest.raises(SystemExit) as stopped:
        fresh(tmp_path, "--steps", "2", "--save-every", "1")
    message = capsys.readouterr().err
    assert (
        stopped.value.code == 130
        and "interrupted\ncontinue with" in message
        and f"--resume {tmp_path}" in message
    )


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # each looks before the other has made its folder
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])
    with ExitStack() as stack:
        made = [stack.enter_context(loop.new_folder("gaussian", None)) for _ in range(3)]
    assert made == [Path(f"runs/gaussian-00{i}") for i in (1, 2, 3)]


def test_another_number_of_steps_says_what_it_does_to_the_learning_rate(tmp_path, capsys):
    fresh(tmp_path, "--steps", "2", "--eval-objects", "1")
    before = (tmp_path / "config.json").read_text()
    assert f"--steps 1 is fewer than the 2 that {tmp_path} has done" in refused(
        capsys, "--resume", tmp_path, "--steps", "1"
    )
    assert (tmp_path / "config.json").read_text() == before
    train("--resume", tmp_path, "--steps", "2")
    assert "another cosine" not in capsys.readouterr().out
    train("--resume", tmp_path, "--steps", "4")  # before: 3e-3 * 0.03, the end of its cosine
    said = (
        "--steps 4 instead of 2 is another cosine: the learning rate after step 2 is 0.0031, "
        "not 0.00018"
    )
    assert said in capsys.readouterr().out and len(rows(tmp_path)) == 4


def test_a_run_folder_belongs_to_one_process(tmp_path, capsys, monkeypatch):
    fresh(run := tmp_path / "run", "--steps", "2", "--eval-objects", "1")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with loop.locked(run):
        assert f"error: run folder {run} is in use by another process" in refused(
            capsys, "--resume", run, "--steps", "9"
        )
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    held = []

    def step(self, batches):
        with pytest.raises(ValueError, match="in use"), loop.locked(self.folder):
            pass
        held.append(self.folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Run, "step", step)
    for flags in (["--resume", run, "--steps", "9"], [*TINY, "--out", tmp_path / "new"]):
        with pytest.raises(SystemExit, match="130"):
            train(*flags)
    assert held == [run, tmp_path / "new"]
    with loop.locked(run), loop.locked(tmp_path / "new"):  # both gave it back
        pass


def failing(monkeypatch, at: int, error: BaseException, where: str) -> None:
    """Have the forward pass, or the optimiser's step, raise an error after `at` of its calls."""
    forward = objective.Objective.forward
    update = torch.optim.AdamW.step
    calls = []

    def fails(whole):
        def run(*args):
            calls.append(where)
            if len(calls) == at + 1:
                raise error
            return whole(*args)

        return run

    if where == "forward":
        monkeypatch.setattr(objective.Objective, "forward", fails(forward))
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", fails(update))


ERRORS = [RuntimeError("no memory"), OSError("unplugged"), ValueError("bad"), AssertionError("bug")]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_inside_a_step_saves_the_steps_before(tmp_path, capsys, monkeypatch, error):
    with monkeypatch.context() as patch:
        failing(patch, 3, error, "forward")
        with pytest.raises(SystemExit if isinstance(error, OSError | ValueError) else type(error)):
            fresh(tmp_path, "--steps", "4", "--save-every", "100")
    message = capsys.readouterr().err
    assert "an error ends the run; it is saved as it was after the last whole step" in message
    assert f"--resume {tmp_path}" in message or isinstance(error, AssertionError)
    assert state(tmp_path)[1]["step"] == 3 and len(rows(tmp_path)) == 3


def test_what_an_error_ended_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "conclude", lambda run: None)
    common = ["--steps", "4", "--save-every", "100", "--micro-batch", "1"]
    with monkeypatch.context() as patch:
        failing(patch, 5, OSError("unplugged"), "forward")  # in the second half of the third step
        with pytest.raises(SystemExit, match="1"):
            fresh(tmp_path / "a", *common)
    assert state(tmp_path / "a")[1]["step"] == 2
    train("--resume", tmp_path / "a")
    fresh(tmp_path / "b", *common)
    ours, theirs = state(tmp_path / "a"), state(tmp_path / "b")
    assert ours[1] == theirs[1]
    assert all(torch.equal(t, theirs[0][name]) for name, t in ours[0].items())


def test_nothing_is_saved_of_a_step_that_has_moved_some_weights(tmp_path, capsys, monkeypatch):
    failing(monkeypatch, 2, OSError("half way"), "update")
    with pytest.raises(SystemExit, match="1"):
        fresh(tmp_path, "--steps", "4", "--save-every", "1")
    assert "is saved" not in capsys.readouterr().err and state(tmp_path)[1]["step"] == 2
    kept = [file.stem for file in checkpoint.files(tmp_path / "checkpoints")]
    assert kept == ["step_00000001", "step_00000002"]


def test_a_log_that_cannot_be_written_costs_no_step(tmp_path, capsys, monkeypatch):
    whole = loop.report.Log.write

    def write(self, row):
        if row["step"] == 3:
            raise OSError("log is full")
        whole(self, row)

    monkeypatch.setattr(loop.report.Log, "write", write)
    with pytest.raises(SystemExit, match="1"):
        fresh(tmp_path, "--steps", "4", "--save-every", "100")
    assert state(tmp_path)[1]["step"] == 3 and "error: log is full" in capsys.readouterr().err


def test_what_cannot_be_saved_does_not_hide_the_error(tmp_path, capsys, monkeypatch):
    failing(monkeypatch, 2, OSError("unplugged"), "forward")
    monkeypatch.setattr(
        checkpoint, "save_checked", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(SystemExit, match="1"):
        fresh(tmp_path, "--steps", "4", "--save-every", "100")
    message = capsys.readouterr().err
    assert "cannot be saved: could not write" in message and "error: unplugged" in message
