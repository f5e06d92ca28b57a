"""Long runs: memory and files stay, logs are read in little memory, a full disk is waited for.

`python -m tests.run.test_long 20000` prints what a run of so many steps takes as it goes.
"""

import errno
import json
import sys
import tempfile
import time
import tracemalloc
from io import FileIO
from pathlib import Path

import pytest
from PIL import Image as Picture
from safetensors import SafetensorError

from tests.helpers.forks import Fork
from tests.helpers.run_groups import members
from tests.helpers.runs import TINY, fresh, rows, state, train
from train import loop
from train.run import checkpoint, report, resume

IN_FLIGHT = 5  # open files of a data worker
SECONDS = 0.5  # a step takes at most, on a busy machine


def taken(process: int) -> tuple[int, int]:
    """The private memory of a process in KiB, and its open files."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    memory = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return memory, len(list(Path(f"/proc/{process}/fd").iterdir()))


def watched(folder: Path, steps: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Run so many steps of a model that computes nothing; (step, what its processes take) by turns.

    The loop, the data, the optimiser, the log, checkpoints, pictures and curves are real.
    """
    size = "--batch-size 1 --image-size 16 --workers 1 --save-every 500 --sample-every 500".split()
    flags = [*TINY, *size, "--steps", steps, "--out", folder / "run"]
    run = Fork("gaussian", flags, folder / "said", fault="light")
    log = folder / "run" / "log.jsonl"
    found = []
    try:
        end = time.monotonic() + SECONDS * steps
        while run.status is None and time.monotonic() < end:
            lines = log.read_bytes().count(b"\n") if log.is_file() else 0
            if 0 < lines < steps:
                found.append((lines, [taken(process) for process in members(run.pid)]))
                print(*found[-1], flush=True)
            time.sleep(0.2)
        assert run.status == 0, (folder / "said").read_text()
    finally:
        run.end()
    return found


@pytest.mark.slow
def test_memory_and_files_stay(tmp_path):
    """Of 3,000 steps; of 20,000 too, by hand."""
    steps = 3000
    found = [taken for step, taken in watched(tmp_path, steps) if step > steps // 3]
    assert len(found) > 3
    early, late = found[: len(found) // 2], found[len(found) // 2 :]
    assert {len(taken) for taken in found} == {3}  # the run, a helper of Python's, a data worker
    for process in range(3):
        peaks = [max(taken[process][0] for taken in half) for half in (early, late)]
        assert peaks[1] <= 1.01 * peaks[0], peaks
        # the least, for some are open for a moment
        handles = [min(taken[process][1] for taken in half) for half in (early, late)]
        # batches on their way hold some of the worker's, seldom none
        assert handles[1] <= handles[0] + (IN_FLIGHT if process == 2 else 0)
    assert len(rows(tmp_path / "run")) == steps


def test_a_long_log_is_read_in_little_memory_and_drawn_in_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "POINTS", 100)
    file = tmp_path / "log.jsonl"
    names = "loss l1 ssim kl volume opacity psnr grad_norm voxels_per_second".split()
    count = 5_000
    with file.open("w") as stream:
        for step in range(1, count + 1):
            row = {"step": step, **dict.fromkeys(names, step / 7), "seconds": step / 10}
            stream.write(json.dumps(row) + "\n")
    tracemalloc.start()
    with report.Log(file, count - 1) as log:
        memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert log.step == count - 1 and log.seconds == (count - 1) / 10
    assert len(log.rows) <= 2 * report.POINTS and memory < file.stat().st_size / 2
    assert file.read_bytes().count(b"\n") == count - 1
    report.curves(log.rows, {"l1": 1.0}, tmp_path / "curves.png")
    with Picture.open(tmp_path / "curves.png") as picture:
        assert picture.width > 500


def test_a_crash_that_leaves_zeros_in_the_log_costs_no_run(tmp_path):
    file = tmp_path / "log.jsonl"
    whole = b'{"step": 1, "seconds": 1}\n'
    file.write_bytes(whole + bytes(4096))
    with report.Log(file, 5) as log:
        log.write({"step": 6, "seconds": 2})
    assert [row["step"] for row in map(json.loads, file.read_text().splitlines())] == [1, 6]


@pytest.fixture
def filling(monkeypatch):
    """A disk that is full for a while: what is saved, and rows of the log, fail so often."""
    left = {"save": 0, "row": 0}
    save = checkpoint.save_checked

    def saves(*args):
        if left["save"]:
            left["save"] -= 1
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(*args)

    class Full(FileIO):
        def write(self, data):
            if left["row"]:
                left["row"] -= 1
                if left["row"] % 2 == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                data = data[: len(data) // 2]  # as much as there was room for
            return super().write(data)

    monkeypatch.setattr(checkpoint, "save_checked", saves)
    monkeypatch.setattr(report, "FileIO", Full)
    monkeypatch.setattr(resume, "PAUSE", 0.01)
    return left


def test_a_disk_that_fills_and_empties_again_ends_no_run(tmp_path, filling, capsys, monkeypatch):
    whole = loop.Run.step

    def step(self, batches):
        if self.done == 1:
            filling.update(save=3, row=4)
        return whole(self, batches)

    monkeypatch.setattr(loop.Run, "step", step)
    fresh(tmp_path, "--steps", "3", "--save-every", "1", "--eval-objects", "1")
    said = capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3] and state(tmp_path)[1]["step"] == 3
    assert filling == {"save": 0, "row": 0} and said.count("there is room again") == 2
    assert said.count("waiting for room, for 10 minutes at most") == 2, said


def test_a_disk_that_stays_full_ends_it(tmp_path, filling, capsys, monkeypatch):
    monkeypatch.setattr(resume, "PATIENCE", 0.05)
    filling["save"] = 1000
    with pytest.raises(SystemExit, match="1"):
        fresh(tmp_path, "--steps", "3", "--save-every", "2")
    assert "No space left on device" in capsys.readouterr().err and len(rows(tmp_path)) == 2
    filling["save"] = 0
    train("--resume", tmp_path)
    assert state(tmp_path)[1]["step"] == 3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        watched(Path(folder), int(sys.argv[1]))
