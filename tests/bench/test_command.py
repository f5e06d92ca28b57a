"""`python -m kernels.bench`: what it prints, keeps when it is stopped, and leaves out."""

import json

import pytest
import torch

from kernels.bench import command
from kernels.bench.case import INTERPRETED, NAIVE, OURS, Impl
from kernels.bench.environment import device_name, file_name
from kernels.bench.norm import eager_layer_norm
from kernels.bench.ops import OPS
from kernels.norm.layer import layer_norm, layer_norm_reference
from tests.conftest import GPU
from tests.helpers.square import square

CPU = torch.device("cpu")


def bench(*arguments: str, **ops) -> int:
    """Run the command on a CPU, with the registered ops or with some of the test's own."""
    registry = {name: lambda *_, cases=cases: iter(cases) for name, cases in ops.items()}
    return command.main(registry or OPS, "bench", [*arguments, "--device", "cpu"])


def test_the_command_writes_the_schema(tmp_path, capsys):
    what = ["layer_norm", "cache_hit", "--seconds", "0"]
    assert bench(*what, "--json", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "the torch path is measured against the naive reference" in out
    assert "gsplat absent" in out
    (file,) = tmp_path.iterdir()
    assert file.name == file.name.lower() == file_name(device_name(CPU))
    result = json.loads(file.read_text())
    keys = "device driver torch triton python commit date ceilings cases missing"
    assert list(result) == keys.split()
    assert result["torch"] == torch.__version__
    assert result["ceilings"]["copy_bytes_per_s"] > 1e6
    assert all(list(row) == command.COLUMNS for row in result["cases"])
    assert {(row["op"], row["pass"]) for row in result["cases"]} == {
        ("layer_norm", "forward"),
        ("layer_norm", "backward"),
        ("cache_hit", "forward"),
    }
    ours = result["cases"][0]
    assert ours["impl"] == OURS and ours["agrees"] is True
    assert ours["bytes"] == 4496 * 2 * 64 * 4  # rows of 64 channels, once in and once out
    assert ours["fraction"] == pytest.approx(ours["floor_us"] / ours["median_us"])


def test_an_unknown_op_is_an_error_that_lists_the_known(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench("sort")
    assert "unknown sort; known are window_attention, segment_attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "/no/such/x.json"], "argument --json: there is no folder /no/such for x.json"),
        (["--seconds", "-1"], "--seconds -1.0 must be finite and at least 0"),
        (["--seconds", "nan"], "--seconds nan must be"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_before_anything_is_measured(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="2"):
        bench("gelu", *arguments)
    assert message in capsys.readouterr().err


def test_a_disagreement_is_the_exit_status():
    wrong = square(baselines={"wrong": Impl(lambda x: x)})
    assert bench("--seconds", "0", square=[wrong]) == 1


def test_errors_are_printed_as_they_come(capsys):
    def cases(*_):
        broken = {"broken": Impl(lambda x: x.no_such)}
        yield square(ours=lambda x: x * x * 1.001, baselines=broken)
        printed = capsys.readouterr().out
        assert "| square | 3 | fp32 | trislat | 1.0e-03 | 1.0e-03 |" in printed
        assert "| square | 3 | fp32 | broken | failed: AttributeError" in printed
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench("--errors", "--dtype", "fp32", square=cases())


def test_errors_against_float64(capsys):
    norm = square(
        inputs=lambda seed: (torch.randn(20, 16, requires_grad=True),),
        ours=layer_norm,
        reference=layer_norm_reference,
        baselines={"torch, eager": Impl(eager_layer_norm), "absent one": "absent: no such package"},
    )
    assert bench("--errors", norm=[norm]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in printed if line.startswith("| square")]
    assert [row[3] for row in rows] == [OURS, *[INTERPRETED] * (not GPU), NAIVE, "torch, eager"]
    assert all(1e-9 < float(value.strip(" |")) < 1e-6 for row in rows for value in row[4:6])
    assert printed[-1] == "- absent one: absent: no such package"


def test_sizes_and_implementations_are_left_out():
    keep = command.exclude(r"^3$", "naive|slow")
    assert keep(square()) is None
    case = keep(square(size="33", baselines={"slow one": "absent", "fast": "absent"}))
    assert list(case.baselines) == ["fast"] and not case.naive
    assert command.exclude(None, None)(square(size="3")).naive


def test_warming_runs_everything_and_times_nothing(monkeypatch, capsys):
    seen = []

    def run(x):
        seen.append(1)
        return x * x

    two = [square(size=size, baselines={"p": Impl(run)}) for size in "12"]
    monkeypatch.setattr(command, "start", lambda *_: pytest.fail("timed"))
    assert bench("--warm", "--without-sizes", "1", square=two) == 0
    assert seen == [1] and "square  2  fp32" in capsys.readouterr().out
    assert bench("--warm", square=[square(ours=lambda x: x.no_such)]) == 1


def test_what_is_measured_is_kept_case_by_case(tmp_path):
    def cases():
        yield square()
        raise KeyboardInterrupt

    file = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt):
        bench("--seconds", "0", "--json", str(file), square=cases())
    assert {row["op"] for row in json.loads(file.read_text())["cases"]} == {"square"}


def test_results_of_other_ops_stay_in_the_file(tmp_path):
    """Several commands make one file, unless something that numbers depend on has changed."""
    path = tmp_path / "cpu.json"
    same = {"device": "cpu", "driver": "none", "torch": "2", "triton": "3", "commit": "abc"}

    def result(op: str, **more) -> dict:
        return same | more | {"cases": [{"op": op, "n": more.get("n")}], "missing": [{"op": op}]}

    assert command.merge(result("gelu"), path, ["gelu"]) == result("gelu")
    path.write_text(json.dumps(result("gelu") | {"cases": [{"op": "gelu"}, {"op": "ssim"}]}))
    merged = command.merge(result("gelu", n=2), path, ["gelu"])
    assert [row["op"] for row in merged["cases"]] == ["ssim", "gelu"]
    other = result("gelu", commit="abd")
    assert command.merge(other, path, ["gelu"]) == other
