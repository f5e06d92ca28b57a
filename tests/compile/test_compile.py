"""Builds for absent GPUs: a few are made, every kernel is recorded, and the tables are right."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import kernels
from kernels.compile.build import TARGETS, Build, _verdict, blocks_per_unit
from kernels.compile.command import OPS, _parse, _read, _wanted, main
from kernels.compile.report import full_table, summary
from kernels.compile.workloads import BLIND, SAME_TYPE


def run(*arguments, interpret=False):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-m", "kernels.compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_kernels_are_built_for_absent_gpus(tmp_path):
    report = tmp_path / "report.json"
    what = "--op similarity --dtype fp16 --target sm_90,gfx942 --workers 2 --hot".split()
    done = run(*what, "--json", str(report), "--markdown", str(tmp_path / "report.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {row["target"] for row in rows} == {"sm_90", "gfx942"}
    assert {row["kernel"] for row in rows} == {"_ssim_fwd", "_ssim_bwd"}
    assert "| _ssim_fwd fp16 (" in done.stdout and done.stdout.count("| hot |") == 4
    assert "most a block may have: gfx1100 65536, gfx942 65536" in done.stdout
    table = (tmp_path / "report.md").read_text()
    assert table.count("\n| similarity_gpu `_ssim_") == 2
    assert "have: gfx942 65536, sm_90 232448." in " ".join(table.split())
    for row in rows:
        assert row["hot"] and row["spills"] == 0
        assert row["registers"] > 16 and row["blocks_per_unit"] >= 1
        assert row["shared"] <= TARGETS[row["target"]].shared_block
    assert "0 failures" in done.stdout


def test_short_attention_shares_a_multiprocessor_of_100_kb(tmp_path):
    """Three blocks of the models' heads at once, two where q and k are normed."""
    what = "--op attention --kernel attention_short --target sm_89 --dtype fp16 --workers 2".split()
    report = tmp_path / "report.json"
    without = "backward|ROWS=128|D=32"
    done = run(*what, "--without", without, "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    normed = {dict(row["types"])["gamma_ptr"] != "constexpr": row for row in rows}
    assert {row["dtype"] for row in rows} == {"fp16"} and normed.keys() == {False, True}
    assert normed[False]["blocks_per_unit"] >= 3 and normed[True]["blocks_per_unit"] >= 2


def test_what_fails_a_finished_build():
    h100 = TARGETS["sm_90"]
    too_much = _verdict({"shared": 300000, "spills": 0, "hot": False}, h100, "sm_90")
    assert too_much == "shared memory 300000 B exceeds the 232448 B of sm_90"
    for name in ("sm_86", "sm_89", "sm_120"):
        fits = {"shared": 99 << 10, "spills": 0, "hot": True, "dtype": "int"}
        assert _verdict(fits, TARGETS[name], name) is None
        above = _verdict(fits | {"shared": (99 << 10) + 1}, TARGETS[name], name)
        assert above == f"shared memory 101377 B exceeds the 101376 B of {name}"
    assert (
        _verdict({"shared": 0, "spills": 3, "hot": True}, h100, "sm_90")
        == "3 spills in a hot kernel"
    )
    assert _verdict({"shared": 0, "spills": 3, "hot": False}, h100, "sm_90") is None
    lost = {"shared": 0, "spills": 0, "hot": True, "dtype": "fp16", "products": 2}
    message = "no tensor-core instruction for 2 products"
    assert _verdict(lost | {"tensor_core": 0}, h100, "sm_90") == message
    assert _verdict(lost | {"tensor_core": 8}, h100, "sm_90") is None
    assert _verdict(lost | {"tensor_core": 0, "dtype": "fp32"}, h100, "sm_90") is None


def test_blocks_per_multiprocessor_by_what_runs_out():
    h100 = TARGETS["sm_90"]
    assert blocks_per_unit(h100, registers=32, shared=0, warps=4) == 16  # warps: 64 of them
    # registers: 65536 / (128 * 256)
    assert blocks_per_unit(h100, registers=128, shared=0, warps=8) == 2
    assert blocks_per_unit(h100, registers=32, shared=100 << 10, warps=4) == 2  # shared memory


def test_blocks_of_smaller_multiprocessors():
    """48 warps, and 16 blocks or 24: twelve of 4 warps, and one-warp blocks until the limit."""
    assert blocks_per_unit(TARGETS["sm_89"], registers=32, shared=0, warps=4) == 12
    assert blocks_per_unit(TARGETS["sm_86"], registers=32, shared=0, warps=1) == 16
    assert blocks_per_unit(TARGETS["sm_120"], registers=32, shared=0, warps=1) == 24


def test_amd_reserves_no_shared_memory():
    assert blocks_per_unit(TARGETS["gfx942"], registers=32, shared=64 << 10, warps=4) == 1


def entry_points() -> set[str]:
    """Find every Triton function that no other one calls: those that can only be launched."""
    functions = [
        node
        for file in Path(kernels.__file__).parent.rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    calls = [
        node.func
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
    ]
    return {f.name for f in functions} - {
        getattr(call, "id", getattr(call, "attr", "")) for call in calls
    }


def test_every_kernel_is_built_and_what_was_recorded_can_be_read():
    done = run("--record", "--dtype", "fp16", "--target", "sm_90", interpret=True)
    assert done.returncode == 0, done.stderr
    builds = _read(done.stdout)
    assert {build.kernel for build in builds} == entry_points()
    assert {build.dtype for build in builds} == {"fp16", "fp32", "int"}
    insert = next(build for build in builds if build.kernel == "_insert")
    assert dict(insert.types)["keys_ptr"] == "*i64" and 0 in insert.aligned  # memory comes aligned
    splat = next(build for build in builds if build.kernel == "_emit")
    assert dict(splat.types)["TX"] == "i32"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], True),
        (["--hot"], True),
        (["--kernel", "x"], False),
        (["--without", r"C=76\b"], True),
        (["--without", "C"], False),
    ],
    ids=str,
)
def test_launches_are_chosen(arguments, wanted):
    norm = Build(
        "kernels.norm.layer",
        "_layer_norm_fwd",
        (("x_ptr", "*fp16"),),
        (0,),
        (),
        (("C", 768), ("num_warps", 4)),
    )
    assert bool(_wanted(norm, _parse(arguments))) == wanted
    assert not _wanted(replace(norm, kernel="_lookup"), _parse(["--hot"]))


def report(version: str, *registers: int, **changes) -> dict:
    """One kernel's report, with a build for each number of registers."""
    row = {
        "module": "kernels.x",
        "kernel": "_k",
        "types": [["x_ptr", "*fp16"]],
        "ones": [],
        "constants": [["C", 8], ["num_warps", 4]],
        "dtype": "fp16",
        "target": "sm_90",
        "hot": False,
        "stack": 0,
        "spills": 0,
        "shared": 0,
    }
    targets = ("sm_90", "gfx942")
    rows = [
        row | {"registers": count, "target": target} | changes
        for count, target in zip(registers, targets, strict=False)
    ]
    return {"triton": version, "commit": "abc", "date": "2026-11-30", "rows": rows}


def test_two_versions_share_a_line_of_the_full_table():
    reports = [report("3.6.0", 32), report("3.9.0", 40, failure="3 spills in a hot kernel")]
    (line,) = full_table(reports).splitlines()[2:]
    assert line.startswith("| _k fp16 (C=8) | sm_90 | 32 / 40 | 0 | 0 | 0 |")
    assert line.endswith("| triton 3.9.0: 3 spills in a hot kernel |")


def test_the_short_table_has_the_worst_of_a_kernel_in_one_line():
    old = report("3.6.0", 32, 60)
    old["rows"].append(old["rows"][0] | {"registers": 50, "target": "sm_80", "shared": 64})
    new = report("3.9.0", 40, 60, spills=3, failure="3 spills in a hot kernel")
    text = summary([old, new], {"sm_80": 1, "sm_90": 232448, "gfx942": 65536})
    assert text.startswith("# Kernels built for absent GPUs, Triton 3.6.0 and 3.9.0\n")
    words = " ".join(text.split())
    assert "Triton 3.6.0, commit abc, 2026-11-30: 1 kernels, 3 builds, 0 failures." in words
    assert "Triton 3.9.0, commit abc, 2026-11-30: 1 kernels, 2 builds, 2 failures." in words
    cells = text.splitlines()[-1].strip("| ").split(" | ")
    assert cells == [
        "x `_k`",
        "3 / 2",
        "50 sm_80 / 40 sm_90",
        "60 gfx942",
        "0 / 3 sm_90",
        "64 sm_80 / 0",
        "0",
        "0 / 2: gfx942, sm_90",
    ]


def test_a_kernel_that_one_version_lacks_has_a_line():
    text = summary([report("3.6.0"), report("3.9.0", 40)], {"sm_90": 232448})
    assert text.splitlines()[-1] == "| x `_k` | 0 / 1 | 40 sm_90 | - | 0 | 0 | - | 0 |"


def test_every_op_of_the_list_exists():
    assert OPS.split(",") == [op.__name__ for op in (*BLIND, *SAME_TYPE)]


def test_another_python_must_be_there(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--also", "/no/such/python"])
    assert "--also /no/such/python is no Python that can be run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "/no/such/x.json"], "argument --json: there is no folder /no/such for x.json"),
        (
            ["--markdown", "/no/such/x.md"],
            "argument --markdown: there is no folder /no/such for x.md",
        ),
        (["--json", os.sep], f"{os.sep} is a folder: name a file in it"),
        (["--workers", "0"], "--workers 0 must be at least 1"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_before_anything_is_built(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr("kernels.compile.command._recorded", lambda args: pytest.fail("recorded"))
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_kernel_that_is_not_there_is_said_with_those_that_are(capsys, monkeypatch):
    norm = Build(
        "kernels.norm.layer", "_layer_norm_fwd", (("x_ptr", "*fp16"),), (0,), (), (("C", 768),)
    )
    monkeypatch.setattr(
        "kernels.compile.command._recorded",
        lambda args: json.dumps([asdict(norm) | {"targets": ["sm_90"]}]),
    )
    assert main(["--kernel", "nosuch"]) == 1
    assert (
        "no launch matches --kernel 'nosuch', --hot and --without; the kernels are _layer_norm_fwd"
        in capsys.readouterr().err
    )


def test_the_help_is_in_whole_sentences_and_names_the_choices(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "shared memory. options:" in text
        and "of fp16,bf16,fp32" in text
        and "attention, norms" in text
    )


@pytest.mark.parametrize("arguments", [["--target", "sm_91"], ["--dtype", "fp8"], ["--op", "sort"]])
def test_unknown_names_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "known are" in capsys.readouterr().err
