"""notebooks/measure.py: what it would run is everything there is, and what fails is told."""

import importlib.util
import sys
from pathlib import Path

import pytest

from kernels.bench import OPS

FILE = Path(__file__).parents[1] / "notebooks" / "measure.py"
spec = importlib.util.spec_from_file_location("measure_script", FILE)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_every_op_is_measured_once_and_some_are_rehearsed():
    assert sorted(" ".join(script.BENCH.values()).split()) == sorted(OPS)
    assert script.REHEARSED.keys() == script.BENCH.keys()
    assert all(op in script.BENCH[name].split() for name, op in script.REHEARSED.items())


def test_the_rehearsal_has_the_steps_and_programs_of_the_measurement(tmp_path):
    real, small = script.steps(tmp_path, "data"), script.steps(tmp_path, None)
    assert list(real) == list(small)
    for name in real:
        assert [command[:2] for command in real[name]] == [command[:2] for command in small[name]]


def run(monkeypatch, out, plan: dict, *args: str) -> int:
    monkeypatch.setattr(script, "steps", lambda *_: plan)
    monkeypatch.setattr(sys, "argv", ["measure.py", str(out), "--rehearse", *args])
    return script.main()


def test_a_step_that_fails_loses_no_other(tmp_path, monkeypatch, capsys):
    plan = {"bad": [["-c", "print('oh'); exit(3)"], ["-c", "open('never', 'w')"]], "slow": [["-c", "while True: pass"]]}
    plan["good"] = [["-c", "print('fine')"]]
    monkeypatch.setattr(script, "LIMIT", 1)
    assert run(monkeypatch, tmp_path, plan) == 1
    said = capsys.readouterr().out
    assert "failed: bad, slow" in said and "slow: more than 1 s, stopped" in said and "  fine" in said
    assert (tmp_path / "bad.log").read_text() == "oh\n" and (tmp_path / "good.log").read_text() == "fine\n"
    assert run(monkeypatch, tmp_path, plan, "good") == 0


def test_weights_that_differ_fail_the_step(tmp_path, monkeypatch):
    for decoder in script.DECODERS:
        for turn in ("first", "second"):
            folder = tmp_path / f"{decoder}-{turn}" / "checkpoints"
            folder.mkdir(parents=True)
            (folder / "decoder.safetensors").write_bytes(b"weights")
    plan = {"determinism": [["-c", "0"]]}
    assert run(monkeypatch, tmp_path, plan) == 0
    (tmp_path / "mesh-second" / "checkpoints" / "decoder.safetensors").write_bytes(b"other")
    assert run(monkeypatch, tmp_path, plan) == 1


@pytest.mark.parametrize("args", [["--rehearse", "test"], ["nowhere"], []])
def test_wrong_arguments_are_refused(tmp_path, monkeypatch, capsys, args):
    monkeypatch.setattr(sys, "argv", ["measure.py", str(tmp_path / "out"), *args])
    with pytest.raises(SystemExit):
        script.main()
    assert ("unknown test; known are tests, memcheck" if "test" in args else "is no dataset") in capsys.readouterr().err
