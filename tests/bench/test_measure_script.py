"""notebooks/measure.py: a step that fails loses no other, and a second call goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from kernels.bench.environment import environment
from tests.helpers.reports import outcomes
from tests.helpers.scripts import ROOT, notebook_script
from train import timing
from train.decoders import DECODERS

script = notebook_script("measure")
steps = script.steps
Ended = steps.Ended
Jobs = steps.Jobs


def test_everything_has_its_place():
    assert sorted([*steps.OPS, "train_step"]) == sorted(steps.COMMANDS)
    assert steps.BATCH.keys() == DECODERS.keys()
    assert all(callable(getattr(steps, name)) for name in script.PLAN)
    assert sum(least for least, _ in script.PLAN.values()) < 8 * 60


def result(status: str, **found):
    return lambda here: {"status": status, **found}


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs a rehearsal whose steps return what the test says, with one folder to go on from."""

    def run(*flags: str, **made) -> tuple[int, dict]:
        ran = []
        for name in script.PLAN:
            step = made.get(name, result("passed"))

            def noted(here, name=name, step=step):
                ran.append(name)
                return step(here)

            monkeypatch.setattr(steps, name, noted)
        out = tmp_path / "out"
        work = ["--work", str(tmp_path / "work")]
        status = script.main([str(out), "--rehearse", *work, *flags])
        (file,) = out.glob("*.json")
        assert len(list(out.iterdir())) <= 8
        return status, json.loads(file.read_text()) | {"ran": ran}

    return run


def test_a_step_that_fails_loses_no_other_and_a_second_call_goes_on(call):
    status, found = call(errors=result("failed", rows=3), sanitizer=result("absent", why="none"))
    assert status == 1 and sorted(found["ran"]) == sorted(script.PLAN)
    assert list(found["steps"]) == list(script.PLAN)
    assert found["steps"]["errors"]["rows"] == 3 and found["steps"]["ops"]["status"] == "passed"
    keys = {*environment(torch.device("cpu")), "ceilings", "cases", "missing", "steps", "ran"}
    assert found.keys() == keys
    status, found = call()
    assert status == 0 and found["ran"] == ["errors"] and len(found["steps"]) == len(script.PLAN)


def test_without_time_the_last_are_left_out(call, monkeypatch):
    plan = {"tests": (10, 1), "errors": (5, 1), "ops": (1000, 1)}
    monkeypatch.setattr(script, "PLAN", plan)
    monkeypatch.setattr(script, "BESIDE", ())

    def wait(here):
        time.sleep(0.2)
        return {"status": "passed"}

    status, found = call("--minutes", "1", tests=wait)
    assert status == 1 and found["ran"] == ["tests", "errors"]
    assert found["steps"]["ops"] == {"status": "left out", "why": "no time"}
    limits = [found["steps"][name]["limit"] for name in ("tests", "errors")]
    # what is not used is passed on
    assert 10 < limits[0] <= 10 + 45 / 2 and limits[0] < limits[1] <= 60
    assert found["steps"]["tests"]["seconds"] >= 0.2


def test_steps_are_chosen_by_name(call):
    _, found = call("--only", "ops,errors,tests", "--skip", "tests")
    assert sorted(found["ran"]) == ["errors", "ops"]


def test_what_is_there_is_shown_although_a_step_breaks(call, tmp_path):
    def broken(here):
        Image.effect_noise((8, 8), 100).save(here.state / "mesh.png")
        measured = {"ceilings": {"a": 1}, "cases": [2], "missing": [3]}
        (here.state / "bench.json").write_text(json.dumps(measured))
        (here.state / "errors.md").write_text("errors")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        call("--only", "ops", ops=broken)
    (file,) = (tmp_path / "out").glob("*.json")
    assert [json.loads(file.read_text())[key] for key in ("ceilings", "cases")] == [{"a": 1}, [2]]
    assert (tmp_path / "out" / "errors.md").read_text() == "errors"
    assert (tmp_path / "out" / "mesh.png").is_file()


def test_a_picture_is_shrunk_until_it_fits(tmp_path):
    large = tmp_path / "large.png"
    small = tmp_path / "small.png"
    Image.effect_noise((200, 100), 100).save(large)
    script.fitted(large, small, most=5000)
    with Image.open(small) as image:
        assert small.stat().st_size <= 5000 and 20 < image.height < 100
    script.fitted(large, small)
    assert small.read_bytes() == large.read_bytes()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--rehearse", "data"], "not both"),
        ([], "not both"),
        (["nowhere"], "nowhere is no dataset"),
        (["--rehearse", "--only", "tests,sleep"], "unknown sleep; known are tests, errors"),
        (["--rehearse", "--minutes", "0"], "--minutes 0.0 must exceed 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(tmp_path, capsys, args, said):
    with pytest.raises(SystemExit, match="2"):
        script.main([str(tmp_path / "out"), *args])
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_a_gpu_nothing_is_measured(tmp_path, capsys, monkeypatch):
    (tmp_path / "metadata.csv").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        script.main([str(tmp_path / "out"), str(tmp_path)])
    assert "torch finds no GPU: nothing can be measured" in capsys.readouterr().err


class Bench:
    """Stands in for kernels.bench: a case of every op into the file, until one ends the process."""

    def __init__(self, ends: dict):
        # op -> status: None stopped, after its case is written
        self.ends = ends
        self.asked = []
        self.modules = []

    def run(self, commands: dict, *_) -> dict[str, Ended]:
        ((name, command),) = commands.items()
        file = Path(command[command.index("--json") + 1])
        ops = [word for word in command if word in steps.OPS]
        self.asked.append(ops)
        self.modules.append(command[command.index("-m") + 1])
        rows = [row for row in steps.read(file, {"cases": []})["cases"] if row["op"] not in ops]
        for op in ops:
            rows.append({"op": op, "size": "1", "impl": "other", "agrees": op != "gelu"})
            file.write_text(json.dumps({"cases": rows, "missing": []}))
            if op in self.ends:
                return {name: Ended(self.ends.pop(op), 1.0)}
        return {name: Ended(0, 1.0)}


def here_with(folder: Path, run, seconds: float = 60) -> steps.Here:
    class Here(steps.Here):
        def run(self, commands, *more):
            return run(commands, *more)

    jobs = Jobs(folder, folder, {})
    return Here(folder, folder, jobs, 2, time.monotonic() + seconds)


def test_an_op_that_ends_the_process_costs_itself(tmp_path):
    fake = Bench({"splat": -6})
    for again in (False, True):  # a second call has nothing left to run, and says the same
        found = steps.timed(here_with(tmp_path, fake.run), "ops", ["gelu", "splat", "pool"], [])
        assert fake.asked == [["gelu", "splat", "pool"], ["pool"]]
        assert found["status"] == "failed" and found["broke"] == {"splat": -6}
        assert found["rows"] == 3
        assert found["left"] == [] and found["disagree"] == ["gelu, 1: other"]
        assert ("exits" in found) != again


def test_each_op_is_measured_by_the_command_that_has_it(tmp_path):
    fake = Bench({})
    ops = ["gelu", "block", "trunk", "pool"]
    found = steps.timed(here_with(tmp_path, fake.run), "ops", ops, [])
    assert fake.asked == [["gelu"], ["block", "trunk"], ["pool"]]
    assert fake.modules == ["kernels.bench", "train.bench", "kernels.bench"]
    assert found["rows"] == 4 and found["left"] == []


def test_an_op_that_was_stopped_is_measured_again(tmp_path):
    fake = Bench({"splat": None})

    def slow(commands, *more):
        ended = fake.run(commands)
        time.sleep(0.2)
        return ended

    found = steps.timed(here_with(tmp_path, slow, 0.1), "ops", ["pool", "splat", "ssim"], [])
    assert found["status"] == "stopped" and found["left"] == ["splat", "ssim"]
    assert json.loads((tmp_path / "ops.json").read_text()) == {"pool": 0}
    found = steps.timed(here_with(tmp_path, fake.run), "ops", ["pool", "splat", "ssim"], [])
    assert fake.asked == [["pool", "splat", "ssim"], ["splat", "ssim"]]
    assert found["status"] == "passed" and found["rows"] == 3


def test_bits_that_differ_fail_the_step(tmp_path):
    def run(commands: dict, *_) -> dict[str, Ended]:
        for name, command in commands.items():
            folder = Path(command[command.index("--out") + 1])
            (folder / "checkpoints").mkdir(parents=True)
            other = b"other" if name == differs else b"weights"
            (folder / "checkpoints" / "decoder.safetensors").write_bytes(other)
        return {name: Ended(0, 1.0) for name in commands}

    differs = ""
    assert steps.determinism(here_with(tmp_path, run)) == {"status": "passed", "differ": []}
    differs = "same-mesh-b"
    assert steps.determinism(here_with(tmp_path, run)) == {"status": "failed", "differ": ["mesh"]}
    assert not steps.same_bits(tmp_path / "nothing", tmp_path / "nothing")


TESTS = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_good(n):
    print("ran", n)

def test_bad():
    assert 1 == 2

def test_skipped():
    pytest.skip("why")
"""


def test_every_test_is_reported_and_those_that_passed_are_left_out(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)

    def run(*more: str) -> list[str]:
        plugins = ["-p", "tests.helpers.reports", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-c", os.devnull, *plugins, *more]
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
        command += ["test_it.py"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 1, done.stdout
        return done.stdout.splitlines()

    report = tmp_path / "reports.jsonl"
    run("--reports", str(report))
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["passed"] * 3 + ["failed", "skipped"]
    assert "assert 1 == 2" in rows[3]["why"] and rows[0]["why"] == "" and rows[0]["when"] == "call"
    rows = [*rows[1:], rows[1] | {"outcome": "failed"}]
    report.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = outcomes(report)
    assert list(known.values()) == ["failed", "passed", "failed", "skipped"]
    printed = "\n".join(run("--passed", str(report)))  # the first is unseen, the second failed last
    assert "2 deselected" in printed and "ran 2" not in printed
    assert printed.index("ran 1") < printed.index("ran 0")


def test_time_that_kernels_share_counts_once():
    kernels = [("a", 0.0, 10.0), ("b", 5.0, 20.0), ("b", 30.0, 40.0), ("a", 31.0, 32.0)]
    kernels.append(("a", 33.0, 34.0))  # inside another, after one inside it
    assert timing.busy(kernels) == 30 and timing.busy([]) == 0
    assert timing.by_name(kernels, 2) == [
        {"kernel": "b", "calls": 1.0, "ms": 0.0125},
        {"kernel": "a", "calls": 1.5, "ms": 0.006},
    ]
