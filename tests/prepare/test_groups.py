"""Real runs with data workers in real process groups, and signals to them.

Terminals, schedulers and kernels send these signals.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.mesh_files import box, write_obj
from tests.helpers.run_groups import END, START, members, until
from tests.helpers.runs import TINY, own_data


@pytest.fixture(scope="module")
def shoot(tmp_path_factory):
    """(signal, workers, whom) -> what came of a run; tests.helpers.run_groups says what."""
    folder = tmp_path_factory.mktemp("groups")
    flags = [*TINY, *own_data(folder), "--image-size", 24]
    command = [sys.executable, "-m", "tests.helpers.run_groups", folder, *flags]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as runs:

        def ask(number: signal.Signals, workers: int, whom: str) -> dict:
            runs.stdin.write(f"{number.name} {workers} {whom}\n")
            runs.stdin.flush()
            return json.loads(runs.stdout.readline())

        yield ask
        runs.stdin.close()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_stops_the_run_after_its_step_and_saves(shoot, number, workers):
    run = shoot(number, workers, "group")
    assert run["processes"] == 1 + workers and run["status"] == 128 + number, run["said"]
    assert f"stopped at step {run['steps']}; continue with" in run["said"]
    assert run["saved"] == [f"step_{run['steps']:08d}.safetensors"] and run["gone"]


def test_a_killed_worker_ends_the_run_with_a_line(shoot):
    run = shoot(signal.SIGKILL, 2, "worker")
    assert run["status"] == 1 and run["gone"] and "Traceback" not in run["said"]
    assert run["saved"] == [f"step_{run['steps']:08d}.safetensors"]
    line = (
        rf"error: data worker \d \(process {run['worker']}\) was ended by SIGKILL, perhaps "
        r"because memory ran out"
    )
    assert re.search(line, run["said"]), run["said"]


def test_workers_do_not_outlive_a_killed_run(shoot):
    run = shoot(signal.SIGKILL, 2, "leader")
    assert run["processes"] == 3 and run["status"] == -signal.SIGKILL and run["gone"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_preparing_ends_with_its_group(tmp_path, number):
    for i in range(3):
        write_obj(tmp_path / "in", f"{i}", *box((1, 0.2 * i + 0.1, 0.5)))
    flags = ["--out", tmp_path / "o", "--size", "256", "--views", "1000", "--workers", "2"]
    command = [sys.executable, "-m", "train.prepare", tmp_path / "in", *flags]
    run = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert until(lambda: len(list((tmp_path / "o").rglob("*.png"))) > 3, START)
    os.killpg(run.pid, number)
    said = run.communicate()[0]
    if number == signal.SIGINT:
        assert (
            run.returncode == 130
            and "interrupted with 3 meshes to do: the same command goes on" in said
        )
    assert until(lambda: not members(run.pid), END) and run.returncode in (130, -number)
