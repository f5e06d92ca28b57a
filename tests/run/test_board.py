"""Tests of --tensorboard, and of the list of commands."""

import json

import numpy as np
import pytest
from PIL import Image as Picture
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.runs import fresh, train
from tests.helpers.source_files import ROOT
from train.__main__ import COMMANDS, main
from train.run import board


def events(folder):
    """Read the event files of a folder as TensorBoard does."""
    read = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return read.Reload()


def test_a_run_writes_its_log_and_pictures_for_tensorboard(tmp_path):
    fresh(tmp_path / "run", "--steps", "2", "--tensorboard")
    read = events(tmp_path / "run" / "tensorboard")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    wanted = log[0].keys() - {"step", "seconds"}
    assert set(read.Tags()["scalars"]) == wanted
    for name in wanted:
        points = [(point.step, point.value) for point in read.Scalars(name)]
        assert points == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in log]
    assert [image.step for image in read.Images("samples")] == [2]


def test_steps_that_a_resumed_run_repeats_are_shown_once(tmp_path):
    file = tmp_path / "sample.png"
    Picture.fromarray(np.full((4, 6, 3), 99, np.uint8)).save(file)
    with board.Board(tmp_path / "board") as first:
        for step in (1, 2, 3):
            first.row({"step": step, "loss": float(step)})
    with board.Board(tmp_path / "board", step=1) as second:
        second.row({"step": 2, "loss": 20.0})
        second.picture(file, 2)
    read = events(tmp_path / "board")
    assert [(p.step, p.value) for p in read.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
    assert (read.Images("samples")[0].height, read.Images("samples")[0].width) == (4, 6)


def test_without_the_package_a_run_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(board, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        train("--out", str(tmp_path / "run"), "--tensorboard")
    assert stopped.value.code == 2
    assert "pip install -e '.[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_list_of_commands_is_complete(capsys):
    folder = ROOT / "train"
    scripts = {
        file.stem
        for file in folder.glob("*.py")
        if 'if __name__ == "__main__":' in file.read_text()
    }
    packages = {file.parent.name for file in folder.glob("*/__main__.py")}
    assert set(COMMANDS) == (scripts | packages) - {"__main__"}
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(COMMANDS)
    for command, line in zip(COMMANDS, lines, strict=True):
        assert line.startswith(f"python -m train.{command} ")
        assert len(line.split(maxsplit=3)[3]) > 15
