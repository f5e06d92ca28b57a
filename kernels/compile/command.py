"""Command line of `python -m kernels.compile`.

    python -m kernels.compile [--target sm_90,gfx942] [--dtype fp16] [--hot] [--json FILE]
    python -m kernels.compile --markdown FILE --also OTHER_VENV/bin/python

Builds every kernel for GPUs that need not be there and reports registers, spills and shared memory.

Two steps, each in processes of its own because Triton decides at import whether it interprets or
compiles:

1. record: the public ops run at the full models' channel counts on a few rows in Triton's
   interpreter, with the tile sizes of each target, and every launch is noted with its argument
   types, constants and options. So what is built is what is launched, never a copy of it.
2. build: each distinct launch is compiled for its targets, disassembled and counted.

What comes out depends on the version of Triton. `--also PYTHON` builds the same launches, recorded
once, with another interpreter's Triton too. The command prints a line for every launch and target;
`--markdown` writes a short table, with one line a kernel: the worst of all its builds.

Exit status 1: a build failed, asked for more shared memory than the target has, or, in a kernel
marked hot, spilled or has 16-bit products that no tensor core computes.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch

from kernels import backend
from kernels.bench.environment import commit, today
from kernels.checks import new_file
from kernels.compile.build import DTYPES, TARGETS, Build, build_one, launched
from kernels.compile.report import describe, full_table, meaning, summary

DEFAULT_TARGETS = "sm_80,sm_86,sm_89,sm_90,sm_100,sm_120,gfx942"
# The names in kernels.compile.workloads, whose import would load Triton
OPS = (
    "attention,norms,similarity,rotary,serialized,convolution,scales,"
    "coordinates,gaussians,surfaces,meshes,radiance"
)


def _record(ops: list[str], dtypes: list[str], targets: list[str]) -> dict[Build, list[str]]:
    """Run ops of kernels.compile.workloads in the interpreter and note what they launch.

    Returns every distinct launch with the targets that make it.
    """
    from kernels.compile.workloads import BLIND, SAME_TYPE

    builds: dict[Build, list[str]] = {}
    for target in targets:

        def note(kernel, grid, args, constants, target=target):
            build = launched(kernel, args, constants)
            found = builds.setdefault(build, [])
            if target not in found:
                found.append(target)
            return build

        def note_alone(*launch, note=note):
            return False if note(*launch).hot else None

        with backend.use("interpreter"), backend.assume(target):
            with backend.observe(note_alone):
                for op, dtype in itertools.product(BLIND, dtypes):
                    if op.__name__ in ops:
                        op(DTYPES[dtype])
            with backend.observe(note):
                for op in SAME_TYPE:
                    if op.__name__ in ops:
                        op()
    return builds


def _recorded(args: argparse.Namespace) -> str:
    """Record the launches in another process, whose Triton interprets; return JSON text."""
    command = [sys.executable, "-m", "kernels.compile", "--record"]
    command += ["--op", args.op, "--dtype", args.dtype, "--target", args.target]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nrecording the launches failed")
    return done.stdout.splitlines()[-1]


def _read(text: str) -> dict[Build, list[str]]:
    """Read launches and their targets from what `_recorded` returned."""
    builds = {}
    for fields in json.loads(text):
        targets = fields.pop("targets")
        pairs = {key: tuple((k, v) for k, v in fields[key]) for key in ("types", "constants")}
        lists = {key: tuple(fields[key]) for key in ("aligned", "ones")}
        builds[Build(**fields | pairs | lists)] = targets
    return builds


def _wanted(build: Build, args: argparse.Namespace) -> bool:
    line = describe(asdict(build) | {"dtype": build.dtype})
    unwanted = args.without and re.search(args.without, line)
    return args.kernel in build.kernel and (build.hot or not args.hot) and not unwanted


def _build_all(builds: dict[Build, list[str]], workers: int) -> list[dict]:
    """Build every launch; return the rows, and print failures as they come."""
    rows = []
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(build_one, build, target)
            for build, found in builds.items()
            for target in found
        ]
        for job in as_completed(jobs):
            rows.append(job.result())
            if "failure" in rows[-1]:
                print(
                    f"FAILED {describe(rows[-1])} for {rows[-1]['target']}: {rows[-1]['failure']}",
                    flush=True,
                )
    return rows


def _build_with(python: str, launches: str, args: argparse.Namespace, folder: Path) -> dict:
    """Build the same launches with another interpreter's Triton; return its report."""
    file = folder / "launches.json"
    report = folder / "rows.json"
    file.write_text(launches)
    command = [python, "-m", "kernels.compile", "--launches", str(file), "--kernel", args.kernel]
    command += ["--json", str(report), "--workers", str(args.workers)]
    if args.hot:
        command.append("--hot")
    if args.without:
        command += ["--without", args.without]
    done = subprocess.run(command, capture_output=True, text=True)
    if not report.exists():
        raise SystemExit(f"{done.stdout}{done.stderr}\n{python} built nothing")
    for line in done.stdout.splitlines():
        if line.startswith(("triton", "FAILED")):
            print(line, flush=True)
    return json.loads(report.read_text())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.compile", description=__doc__.split("\n\n")[2]
    )
    parser.add_argument(
        "--target", default=DEFAULT_TARGETS, help=f"comma-separated; of {', '.join(TARGETS)}"
    )
    parser.add_argument(
        "--dtype",
        default="fp16,bf16,fp32",
        help=f"of {','.join(DTYPES)}, the ops' tensors; comma-separated",
    )
    parser.add_argument(
        "--op", default=OPS, help=f"of {OPS.replace(',', ', ')}; comma-separated (default: all)"
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--without",
        help="leave out launches whose line in the table matches this regular expression",
    )
    parser.add_argument(
        "--hot",
        action="store_true",
        help="only the kernels that a training step spends its time in",
    )
    parser.add_argument("--json", type=new_file, help="also write the rows here")
    parser.add_argument(
        "--markdown", type=new_file, help="also write one line a kernel here, from fresh builds"
    )
    parser.add_argument("--also", help="a Python with another Triton that builds the same launches")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="builds at a time (default: one a CPU core)",
    )
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--launches", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    known = {"target": TARGETS, "dtype": DTYPES, "op": OPS.split(",")}
    for name, names in known.items():
        if unknown := [x for x in getattr(args, name).split(",") if x not in names]:
            parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(names)}")
    for path in (args.json, args.markdown):
        if path and path.is_dir():
            parser.error(f"{path} is a folder: name a file in it")
    if args.workers < 1:
        parser.error(f"--workers {args.workers} must be at least 1")
    if args.also and not shutil.which(args.also):
        parser.error(f"--also {args.also} is no Python that can be run")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = _parse(argv)
    if args.record:
        found = _record(args.op.split(","), args.dtype.split(","), args.target.split(","))
        print(
            json.dumps([asdict(build) | {"targets": targets} for build, targets in found.items()])
        )
        return 0
    launches = args.launches.read_text() if args.launches else _recorded(args)
    recorded = _read(launches)
    chosen = {build: targets for build, targets in recorded.items() if _wanted(build, args)}
    if not chosen:
        known = ", ".join(sorted({build.kernel for build in recorded}))
        print(
            f"no launch matches --kernel {args.kernel!r}, --hot and --without; the kernels are "
            f"{known}",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory() as folder:
        if args.markdown:
            os.environ["TRITON_CACHE_DIR"] = folder
        import triton

        print(
            f"triton {triton.__version__}, torch {torch.__version__}: {len(chosen)} launches",
            flush=True,
        )
        began = time.perf_counter()
        rows = _build_all(chosen, args.workers)
        # as another version's rows come: lists where there were tuples
        rows = json.loads(json.dumps(rows))
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        reports = [versions | {"commit": commit(), "date": today(), "rows": rows}]
        if args.also:
            reports.append(_build_with(args.also, launches, args, Path(folder)))
            reports.sort(key=lambda report: report["triton"])
    limits = {name: target.shared_block for name, target in TARGETS.items()}
    print(meaning(limits))
    print(f"\n{full_table(reports)}")
    failures = sum("failure" in row for report in reports for row in report["rows"])
    kernels = len({(row["module"], row["kernel"]) for row in rows})
    builds = sum(len(report["rows"]) for report in reports)
    print(
        f"\n{kernels} kernels, {builds} builds, {failures} failures, "
        f"{time.perf_counter() - began:.0f} s"
    )
    if args.json:
        args.json.write_text(json.dumps(reports[0] if len(reports) == 1 else reports, indent=1))
    if args.markdown:
        args.markdown.write_text(summary(reports, limits))
    return int(failures > 0)
