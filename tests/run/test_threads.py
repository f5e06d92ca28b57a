"""The number of threads that a run computes with."""

import json
import os

import pytest
import torch

from train import loop
from train.flags import from_cli
from train.gaussian import PRESETS, build
from train.run import threads
from train.run.threads import LARGE, available, choose, computing

UNIFIED = "0::/job/step\n"
HYBRID = "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n"


def machine(root, cgroup: str, files: dict[str, str]):
    """A file system with the process's cgroups and what they limit."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


QUOTAS = {
    "nothing": ("", {}, 8),
    "unlimited": (UNIFIED, {"sys/fs/cgroup/job/step/cpu.max": "max 100000\n"}, 8),
    "own": (UNIFIED, {"sys/fs/cgroup/job/step/cpu.max": "300000 100000\n"}, 3),
    "above": (
        UNIFIED,
        {
            "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
            "sys/fs/cgroup/job/cpu.max": "150000 50000\n",
        },
        3,
    ),
    "container": (UNIFIED, {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
    "less than one": (UNIFIED, {"sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
    "more than bound to": (UNIFIED, {"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
    "version 1": (
        HYBRID,
        {
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1, by its full name": (
        HYBRID,
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "10000",
        },
        5,
    ),
    "version 1, unlimited": (
        HYBRID,
        {
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        },
        8,
    ),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_cpus_are_those_bound_to_within_the_quota(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    cgroup, files, want = QUOTAS[name]
    assert available(machine(tmp_path, cgroup, files)) == want


def test_a_process_bound_to_fewer_cpus_has_these(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert available(tmp_path) == 1


def test_the_flag_then_the_user_then_the_size_decides():
    number = lambda *args: choose(*args).number
    assert number(0, LARGE - 1, {}, 8) == 1 and number(0, LARGE, {}, 8) == 8
    assert number(0, 0, {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "5"}, 2) == 3
    assert number(0, 0, {"OMP_NUM_THREADS": "", "MKL_NUM_THREADS": "5,1"}, 2) == 5
    assert number(0, 0, {"OMP_NUM_THREADS": "many"}, 4) == 1
    assert number(2, 0, {"OMP_NUM_THREADS": "3"}, 4) == 2
    capped = choose(16, 0, {}, 4)
    assert capped.number == 4 and "the run says 16" in capped.reason


def test_ranks_share_the_cpus_and_what_was_set_comes_back(monkeypatch):
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "available", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", (numbers := []).append)
    large = from_cli("gaussian", PRESETS, ["--preset", "small", "--data", "d"])
    with computing(large, torch.device("cpu")) as alone:
        pass
    with computing(large, torch.device("cuda", 0)) as host:
        pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with computing(large, torch.device("cpu")) as rank:
        pass
    before = torch.get_num_threads()
    assert (alone.number, host.number, rank.number) == (6, 1, 3) and numbers == [
        6,
        before,
        1,
        before,
        3,
        before,
    ]


def test_a_run_records_its_threads_and_resumes_with_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(threads, "available", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    tiny = (
        "--model.channels 16 --model.blocks 1 --model.heads 1 --model.per-voxel 2 --image-size 16 "
        "--eval-objects 1 --batch-size 1 --views 1 --steps 1 --device cpu"
    )
    flags = [*tiny.split(), "--out", str(tmp_path)]
    monkeypatch.setattr(loop, "conclude", lambda run: None)
    monkeypatch.setattr(loop, "save_samples", lambda run: None)
    used = []
    step = loop.Run.step
    monkeypatch.setattr(
        loop.Run, "step", lambda run, b: used.append(torch.get_num_threads()) or step(run, b)
    )
    loop.main("gaussian", PRESETS, build, flags)
    assert "threads    2 threads (as OMP_NUM_THREADS says)" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["threads"] == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    loop.main("gaussian", PRESETS, build, ["--resume", str(tmp_path), "--steps", "2"])
    assert "threads    2 threads (as the run says)" in capsys.readouterr().out and used == [2, 2]
