"""The build report: a fast subset really built, and its arithmetic."""

import json
import os
import subprocess
import sys

import pytest

from kernels.compile import OPS, TARGETS, _blocks_per_unit, _verdict, main
from kernels.workloads import WORKLOADS


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_kernels_are_built_for_absent_gpus(tmp_path):
    report = tmp_path / "report.json"
    done = run("--op", "similarity", "--dtype", "fp16", "--target", "sm_90,gfx942", "--workers", "2", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {row["target"] for row in rows} == {"sm_90", "gfx942"}
    assert {row["kernel"] for row in rows} == {"_ssim_fwd", "_ssim_bwd"}
    for row in rows:
        assert row["registers"] > 16 and row["blocks_per_unit"] >= 1 and row["spills"] == 0 and row["hot"]
        assert row["shared"] <= TARGETS[row["target"]].shared_block
    assert "0 failures" in done.stdout


def test_what_fails_a_finished_build():
    h100 = TARGETS["sm_90"]
    too_much = _verdict({"shared": 300000, "spills": 0, "hot": False}, h100, "sm_90")
    assert too_much == "shared memory 300000 B exceeds the 232448 B of sm_90"
    assert _verdict({"shared": 0, "spills": 3, "hot": True}, h100, "sm_90") == "3 spills in a hot kernel"
    assert _verdict({"shared": 0, "spills": 3, "hot": False}, h100, "sm_90") is None


def test_blocks_per_multiprocessor_by_what_runs_out():
    h100 = TARGETS["sm_90"]
    assert _blocks_per_unit(h100, registers=32, shared=0, warps=4) == 16  # warps: 64 of them
    assert _blocks_per_unit(h100, registers=128, shared=0, warps=8) == 2  # registers: 65536 / (128 * 256)
    assert _blocks_per_unit(h100, registers=32, shared=100 << 10, warps=4) == 2  # shared memory


def test_every_op_of_the_list_exists():
    assert OPS.split(",") == list(WORKLOADS)


@pytest.mark.parametrize("arguments", [["--target", "sm_91"], ["--dtype", "fp8"], ["--op", "sort"]])
def test_unknown_names_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "known are" in capsys.readouterr().err
