"""What `python -m kernels.bench` says while it runs, keeps when it is stopped, and leaves out."""

import json

import pytest

from kernels.bench import command as bench
from kernels.bench.case import Impl
from tests.helpers.square import square


def test_errors_are_told_as_they_come(monkeypatch, capsys):
    def cases(*_):
        yield square(ours=lambda x: x * x * 1.001, peers={"broken": Impl(lambda x: x.no_such)})
        said = capsys.readouterr().out
        assert "| square | 3 | fp32 | trislat | 1.0e-03 | 1.0e-03 |" in said
        assert "| square | 3 | fp32 | broken | failed: AttributeError" in said
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "cases", cases)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["gelu", "--errors", "--device", "cpu", "--dtype", "fp32"])


def test_sizes_and_implementations_are_left_out():
    keep = bench.without(r"^3$", "naive|slow")
    assert keep(square()) is None
    case = keep(square(size="33", peers={"slow one": "absent", "fast": "absent"}))
    assert list(case.peers) == ["fast"] and not case.naive
    assert bench.without(None, None)(square(size="3")).naive


def test_warming_runs_everything_and_times_nothing(monkeypatch, capsys):
    seen = []
    peer = Impl(lambda x: (seen.append(1), x * x)[1])
    two = [square(size=size, peers={"p": peer}) for size in "12"]
    monkeypatch.setattr(bench, "cases", lambda *_: two)
    monkeypatch.setattr(bench, "start", lambda *_: pytest.fail("timed"))
    assert bench.main(["gelu", "--warm", "--device", "cpu", "--without-sizes", "1"]) == 0
    assert seen == [1] and "square  2  fp32" in capsys.readouterr().out
    monkeypatch.setattr(bench, "cases", lambda *_: [square(ours=lambda x: x.no_such)])
    assert bench.main(["gelu", "--warm", "--device", "cpu"]) == 1


def test_what_is_measured_is_kept_case_by_case(tmp_path, monkeypatch):
    def cases(*_):
        yield square()
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "cases", cases)
    file = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt):
        bench.main(["gelu", "--device", "cpu", "--seconds", "0", "--json", str(file)])
    assert {row["op"] for row in json.loads(file.read_text())["cases"]} == {"square"}
