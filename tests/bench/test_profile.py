"""`python -m kernels.profile`: what it refuses, what it makes of a profile, and its rehearsal."""

import json
from types import SimpleNamespace

import pytest
import torch

from kernels import backend, layer_norm
from kernels.bench import profile
from kernels.bench.case import Work
from kernels.bench.measure import Roofline, Timer
from kernels.bench.profile import ALL, Facts
from tests.helpers.hardware import GPU
from tests.helpers.square import square

CPU = torch.device("cpu")
KEYS = (
    "op kernel pass dtype size calls us bytes flops registers spilled shared blocks floor_us"
).split()


def command(*arguments: str, **ops) -> int:
    """Run the command over ops of the test's own."""
    registry = {name: lambda *_, cases=cases: iter(cases) for name, cases in ops.items()}
    return profile.main(registry, list(arguments))


@pytest.mark.skipif(GPU, reason="there is a GPU to measure")
def test_without_a_gpu_it_says_what_counts_instead(capsys):
    with pytest.raises(SystemExit, match="2"):
        command("square", square=[square()])
    said = " ".join(capsys.readouterr().err.split())
    assert "measures on a GPU and torch finds none" in said
    assert "`python -m tests.emulator OP` counts" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sort"], "unknown sort; known are square"),
        (["square", "--dtype", "fp8"], "unknown fp8; known are fp16, bf16, fp32"),
        (["square", "--only", "("], "--only '(' is no regular expression"),
        (["square", "--json", "/no/such/x.json"], "there is no folder /no/such for x.json"),
        ([], "the following arguments are required: op"),
    ],
    ids=str,
)
def test_impossible_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(*arguments, "--rehearse", square=[square()])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_rehearsal_writes_the_schema(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command("square", "--rehearse", "--json", str(tmp_path), square=[square()]) == 0
    assert "A rehearsal: its times say nothing." in capsys.readouterr().out
    (file,) = tmp_path.glob("profile-*.json")
    result = json.loads(file.read_text())
    head = "device driver torch triton python commit date ceilings kernels".split()
    assert list(result) == head and result["torch"] == torch.__version__
    assert all(sorted(row) == sorted(KEYS) for row in result["kernels"])
    whole = [row for row in result["kernels"] if row["kernel"] == ALL]
    assert [(row["pass"], row["bytes"]) for row in whole] == [("forward", 24), ("backward", 36)]
    assert any("aten::mul" in row["kernel"] and row["us"] > 0 for row in result["kernels"])


def test_a_size_that_no_case_has_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command("square", "--rehearse", "--only", "^4$", square=[square()]) == 1
    assert "no case of square has a size that matches '^4$'" in capsys.readouterr().out


def event(name: str, start: float, end: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def test_builds_of_one_kernel_are_told_apart_by_their_order():
    """Two calls of an op that launches a kernel for short segments, then for long, and copies."""
    short = Facts(100, registers=40)
    long = Facts(100, registers=168)
    events = [event("attend", 10 * i, 10 * i + (1 if i % 2 == 0 else 4)) for i in range(4)]
    events += [event("copy", 50, 56)]
    known = [("attend", short), ("attend", long)]
    found = list(profile.by_kernel(events, 2, known))
    assert found == [
        ("attend", 1.0, 4.0, long),
        ("copy", 0.5, 3.0, Facts()),
        ("attend", 1.0, 1.0, short),
    ]
    # one launch was not seen: nobody knows which
    found = list(profile.by_kernel(events[1:], 2, known))
    assert found[0] == ("attend", 1.5, 4.5, Facts())


def test_the_table_of_a_made_up_profile(monkeypatch):
    """A pass of 10 us whose kernel takes 8: rates, floors and what is not known."""
    monkeypatch.setattr(Timer, "time", lambda self, call, on_host: [10.0])
    seen = [("fused", Facts(16000, 40, 0, 2048, 6))]
    monkeypatch.setattr(profile, "launches", lambda call: seen)
    events = [event("fused", 0, 8), event("memset", 8, 9)]
    monkeypatch.setattr(profile, "profiled", lambda call, device, runs: events)
    case = square(forward=[Work(20000, 4e6)], backward=[])
    roofline = Roofline(4e9, {"fp32": 1e12})
    rows = list(profile.rows(case, Timer(CPU), roofline, runs=1))
    assert [row["kernel"] for row in rows] == [ALL, "fused", "memset"]
    assert [row["floor_us"] for row in rows] == [5.0, 4.0, None]
    lines = [line.split() for line in profile.table(rows)]
    assert lines[0] == ["square", "forward", "3", "fp32"]
    assert lines[2] == "all 1 10.0 5.0 2 0.4 - - - -".split()
    assert lines[3] == "fused 1 8.0 4.0 2 - 40 0 2048 6".split()
    assert lines[4] == "memset 1 1.0 - - - - - - -".split()


def test_the_launches_of_a_call_and_the_memory_they_are_given(kernel_device):
    x = torch.randn(6, 16, device=kernel_device)
    (launch,) = profile.launches(lambda i: layer_norm(x[:3]))
    name, facts = launch
    assert name == "_layer_norm_fwd"
    # x lies in the memory of six rows, y in that of three
    assert facts.bytes >= 4 * 16 * 9
    if not GPU:
        assert facts == Facts(facts.bytes)


@pytest.mark.skipif(GPU, reason="a GPU compiles for itself")
def test_what_was_compiled_is_read(monkeypatch):
    """Registers, spills, shared memory and occupancy come from the kernel that was launched."""
    code = {"registers": 100, "spills": 2}
    monkeypatch.setattr(profile, "machine_code", lambda compiled, target: code)
    metadata = SimpleNamespace(shared=30 << 10, num_warps=4)
    asked = []

    def warmup(*args, **options):
        asked.append(options)
        return SimpleNamespace(metadata=metadata)

    kernel = SimpleNamespace(warmup=warmup)
    with backend.assume("sm_89"):
        found = profile.facts(kernel, (2, 3), (torch.zeros(8), None, 5), {"STEP": 16})
    assert found == Facts(32, registers=100, spilled=2, shared=30 << 10, blocks=3)
    assert asked == [{"grid": (2, 3), "enable_fp_fusion": True, "STEP": 16}]
    with backend.assume("sm_75"):
        assert profile.facts(kernel, (2, 3), (torch.zeros(8),), {}) == Facts(32)
