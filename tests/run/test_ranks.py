"""Ranks that die, raise or hang: all end, one line says why, and torchrun's restart goes on."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.helpers.forks import torchrun
from tests.helpers.runs import TINY, own_data, rows, same_run, state
from tests.helpers.source_files import ROOT
from train.config import write_config
from train.gaussian import PRESETS
from train.run import ranks
from train.run.folder import continued, launch, new_folder
from train.run.machine import Machine

SECONDS = 240.0  # on a machine that has much else to do
STEPS = "--micro-batch 1 --steps 8 --save-every 3".split()
NETWORK = re.compile("gloo|Connection|Traceback|Error:")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of the runs, on a small dataset."""
    return [*TINY, *own_data(tmp_path_factory.mktemp("data")), "--image-size", 24, *STEPS]


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """A run of two ranks that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    with torchrun("gaussian", [*flags, "--out", "run"], folder) as wait:
        assert wait(SECONDS) == [[0, 0]], (folder / "said").read_text()
    return folder / "run"


def ended(folder, flags, *args, **more) -> tuple[list[list[int]], str]:
    """The statuses of ranks, and what they said."""
    with torchrun("gaussian", flags, folder, *args, **more) as wait:
        statuses = wait(SECONDS)
    return statuses, (folder / "said").read_text()


def test_a_rank_that_is_killed_is_named_and_the_next_start_goes_on(flags, straight, tmp_path):
    """Without --out, where the folder is to be found again among others."""
    statuses, said = ended(tmp_path, flags, restarts=1, fault="SIGKILL:5")
    assert statuses == [[1, -signal.SIGKILL], [0, 0]], said
    gone = r"the run of 2 ranks ends: rank 1 \(process \d+\) is gone: it was killed, perhaps "
    folder = "runs/gaussian-001"
    hint = f"because memory ran out\ncontinue with: python -m train.gaussian --resume {folder}\n"
    assert re.search(gone + hint, said) and not NETWORK.search(said), said
    assert f"torchrun starts the ranks again (restart 1): {folder} goes on\n" in said
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["gaussian-001"]
    same_run(tmp_path / folder, straight)


@pytest.mark.parametrize(
    ("fault", "statuses", "message"),
    [
        ("value:5", [1, 2], r"\(rank 1 of 2\): error: what is wrong"),
        ("hang:5", [1, 1], r"nothing goes on since \d s: rank 0 is in backward .*, rank 1 is in "),
        pytest.param("exit:5", [1, 5], r"rank 1 \(process \d+\) is gone", marks=pytest.mark.slow),
    ],
)
def test_ranks_end_together_with_one_line_of_the_cause(flags, tmp_path, fault, statuses, message):
    ends, said = ended(tmp_path, [*flags, "--out", "run"], fault=fault)
    assert ends == [statuses], said
    assert re.search(message, said) and not NETWORK.search(said), said
    assert said.count("continue with: python -m train.gaussian --resume run\n") == 1, said


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["device", "bug"])
def test_a_fault_of_ours_has_its_own_traceback_and_no_other(flags, tmp_path, fault):
    ends, said = ended(tmp_path, [*flags, "--out", "run"], fault=f"{fault}:5")
    assert ends == [[1, 1]] and said.count("Traceback") == 1, said
    assert "what is wrong" in said and "gloo" not in said


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_found(flags, tmp_path):
    ends, said = ended(tmp_path, [*flags, "--out", "run"], fault="SIGSTOP:5", timeout=20.0)
    assert ends == [[1, -signal.SIGKILL]], said
    assert re.search(r"nothing goes on since 2\d s: .*, rank 1 is in .* and says nothing", said)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_that_something_else_starts_end_too(flags, tmp_path, victim):
    ends, said = ended(
        tmp_path, [*flags, "--out", "run"], fault="SIGKILL:5", victim=victim, agent=False
    )
    assert sorted(ends[0]) == [-signal.SIGKILL, 1], said
    assert said.count("the run of 2 ranks ends: ") == 1 and "Traceback" not in said, said


@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_save_and_end(flags, tmp_path):
    more = [*flags, "--steps", 5000, "--save-every", 5000, "--out", "run"]
    ends, said = ended(tmp_path, more, leaves=tmp_path / "run" / "log.jsonl")
    assert ends == [[128 + signal.SIGTERM] * 2], said
    assert said.count("the process in which the ranks met is gone") in (1, 2), said
    assert state(tmp_path / "run")[1]["step"] == len(rows(tmp_path / "run")) > 0


SCRIPT = """
import os, sys
from tests.helpers.forks import fail
from train import loop
from train.gaussian import PRESETS, build
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    fail("SIGKILL", 5)
loop.main("gaussian", PRESETS, build, sys.argv[1:])
"""


@pytest.mark.slow
def test_torchrun_itself_starts_them_again(flags, straight, tmp_path):
    (tmp_path / "ranks.py").write_text(SCRIPT)
    start = "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 ranks.py"
    command = [sys.executable, "-m", *start.split(), *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = dict(capture_output=True, text=True, timeout=2 * SECONDS)
    run = subprocess.run(command, cwd=tmp_path, env=environment, **pipes)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    assert re.search(r"ends: rank 1 \(process \d+\) is gone", run.stderr), run.stderr
    assert "(restart 1): runs/gaussian-001 goes on" in run.stdout
    same_run(tmp_path / "runs" / "gaussian-001", straight)


def test_ranks_that_start_again_go_on_in_the_folder_of_their_launch_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    config = PRESETS["demo"]

    def launched(name: str) -> list[str | None]:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/logs/7_{name}/attempt_0/0/error.json")
        return [launch()]

    for name in ("a", "b", "c"):
        with new_folder("gaussian", None, launched(name)) as folder:
            if name != "c":  # that one was killed before it wrote
                write_config(config, "gaussian", folder / "config.json")
    given = replace(config, lr=1.0)  # the record counts
    here = Machine(torch.device("cpu"), 0, 1)
    found = lambda name: continued("gaussian", PRESETS, given, here, launched(name))
    assert found("b") is given  # the first start
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert found("a") == replace(config, resume="runs/gaussian-001")
    assert found("b") == replace(config, resume="runs/gaussian-002")
    assert found("c") == replace(given, out="runs/gaussian-003")
    with new_folder("gaussian", found("c").out, launched("c")):
        pass
    assert found("d") is given  # killed before it had a folder
    given = replace(config, out="runs/gaussian-001")
    assert found("a").resume == "runs/gaussian-001" and found("b") is given
    given = replace(config, resume="runs/gaussian-001")
    assert found("a") is given
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert launched("a") == [None]


def test_one_rank_alone_says_why(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # it would hear no SIGTERM any more
    store = dist.HashStore()
    both = [ranks.Ranks(store, rank, 2) for rank in (0, 1)]
    try:
        assert [one.first() for one in both] == [True, False]
    finally:
        for one in both:
            one.leave()


def test_a_rank_that_waits_in_vain_says_for_what(monkeypatch):
    monkeypatch.setattr(ranks, "TIMEOUT", 1.0)
    monkeypatch.setattr(ranks, "LATER", 0.0)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(OSError, match="rank 0 did not meet the other ranks of 2: .*1/2"),
        ranks.joined("gloo", 0, 2),
    ):
        pass
