"""python -m kernels.bench [OP ...] [--size small|base] [--dtype fp16,bf16] [--json PATH] [--errors]

Times every op forward and backward against its floor on this device and against every other
implementation that can be imported, in the same run, after checking that they agree
(kernels.bench.measure says how). On a CPU, what is measured is the torch path against the naive
reference: that says nothing about the kernels.

--errors prints instead, as they come, how far each implementation is from the reference in float64,
by type; on a CPU with TRITON_INTERPRET=1 the kernels too, interpreted. --warm compiles everything
and times nothing. --json writes {device, driver, torch, triton, python, commit, date, ceilings,
cases, missing}; PATH may be a folder, in which the file is named after the device. Exit status 1:
ours failed or two implementations disagree.

A new op is one line in OPS and a function `OP_cases(size, dtypes, device)` that yields
kernels.bench.case.Case.
"""

import argparse
import datetime
import importlib
import json
import math
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import triton

from kernels.bench.case import DTYPES, NAIVE, OURS, Case
from kernels.bench.measure import Ceilings, Clock, errors, measure, measure_ceilings, verdicts
from kernels.bench.peers import KNOWN, optional
from kernels.checks import new_file

# Op -> the module with its cases. Looked up by name, and only when asked for: kernels imports
# nothing that stands on it
OPS = {
    "window_attention": "kernels.bench.attention",
    "segment_attention": "kernels.bench.attention",
    "serialized_attention": "kernels.bench.attention",
    "rotary_attention": "kernels.bench.attention",
    "attention_rows": "kernels.bench.sweeps",
    "attention_window": "kernels.bench.sweeps",
    "attention_occupancy": "kernels.bench.sweeps",
    "layer_norm": "kernels.bench.norm",
    "add_layer_norm": "kernels.bench.norm",
    "gelu": "kernels.bench.norm",
    "ssim": "kernels.bench.norm",
    "build_table": "kernels.bench.voxels",
    "lookup": "kernels.bench.voxels",
    "neighbours": "kernels.bench.voxels",
    "window_partition": "kernels.bench.voxels",
    "partition_window": "kernels.bench.sweeps",
    "partition_extent": "kernels.bench.sweeps",
    "neighbours_extent": "kernels.bench.sweeps",
    "cache_hit": "kernels.bench.voxels",
    "splat": "kernels.bench.gaussian",
    "raymarch": "kernels.bench.radiance",
    "sparse_conv": "kernels.bench.mesh",
    "subdivide_conv": "kernels.bench.mesh",
    "group_norm": "kernels.bench.mesh",
    "pool": "kernels.bench.mesh",
    "isosurface": "kernels.bench.mesh",
    "render_mesh": "kernels.bench.mesh",
    "block": "train.bench",
    "trunk": "train.bench",
    "train_step": "train.bench",
}
COLUMNS = [
    "op",
    "pass",
    "size",
    "dtype",
    "impl",
    "median_us",
    "spread_us",
    "bytes",
    "flops",
    "floor_us",
    "fraction",
    "agrees",
]


def cases(op: str, size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """The cases of one op of OPS; KeyError for another name."""
    return getattr(importlib.import_module(OPS[op]), f"{op}_cases")(size, dtypes, device)


def device_name(device: torch.device) -> str:
    """As the vendor calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return (
        f"{found[1] if found else platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )


def file_name(name: str) -> str:
    """The device in lower case: nvidia-h100-80gb-hbm3.json."""
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower())) + ".json"


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return (
        done.stdout.strip().splitlines()[0]
        if done.returncode == 0 and done.stdout.strip()
        else "unknown"
    )


def facts(device: torch.device) -> dict:
    """What the numbers depend on beside the code."""
    driver = "none"
    if device.type == "cuda":
        driver = torch.version.hip or _ask(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    commit = _ask("git", "rev-parse", "--short=12", "HEAD")
    changed = _ask("git", "status", "--porcelain", "--untracked-files=no") not in ("unknown", "")
    return {
        "device": device_name(device),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit + ("+changes" if changed else ""),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def lines(rows: list[dict]) -> Iterator[str]:
    """One case and pass as text: the floor, then every implementation."""
    head = None
    for row in rows:
        key = row["op"], row["pass"], row["size"], row["dtype"]
        if key != head:
            head = key
            yield (
                f"{row['op']} {row['pass']}  {row['size']}  {row['dtype']}   floor "
                f"{row['floor_us']:.1f} us"
            )
        time = "DISAGREES, not timed" if row["agrees"] is False else "failed, see below"
        if row["median_us"] is not None:
            time = f"{row['median_us']:>12.1f} us +- {row['spread_us']:.1f}"
            time += f"   {100 * row['fraction']:.1f} % of the floor" if row["fraction"] else ""
        yield f"    {row['impl']:<50} {time}"


ERROR_TABLE = "| op | size | type | implementation | output | gradient |\n|---|---|---|---|---|---|"


def error_line(row: dict) -> str:
    """Markdown: largest difference over largest value, of the output and of the worst gradient."""
    number = lambda x: "-" if x is None else f"{x:.1e}"
    found = [row["why"], "-"] if "why" in row else [number(row["output"]), number(row["gradient"])]
    return "| " + " | ".join([row["op"], row["size"], row["dtype"], row["impl"], *found]) + " |"


def defaults(device: torch.device) -> tuple[str, list[str]]:
    """Size and types that a device is measured with."""
    return ("base", ["fp16", "bf16"]) if device.type == "cuda" else ("small", ["fp32"])


def start(device: torch.device, seconds: float = 0.25) -> tuple[Clock, Ceilings]:
    """The clock, `seconds` a measurement, and this device's ceilings now.

    0 seconds on a CPU: one call and small ceilings, to see that it runs.
    """
    clock = Clock(device, seconds, least=5 if seconds else 1)
    small = (128, 1024) if seconds else (8, 256)
    return clock, measure_ceilings(clock, *((1024, 8192) if device.type == "cuda" else small))


def run(
    ops: Sequence[str],
    size: str,
    dtypes: list[str],
    device: torch.device,
    seconds: float = 0.25,
    report: Callable[[str], object] = print,
    after: Callable[[dict], object] = lambda result: None,
    keep: Callable[[Case], Case | None] = lambda case: case,
) -> dict:
    """Measure ops of OPS on one device: what --json writes, as a dict.

    `report` takes each line of text; `after` the result so far after every case, so that a crash
    loses one case, not the run; `keep` what of a case is measured, see `without`.
    """
    clock, ceilings = start(device, seconds)
    products = ", ".join(
        f"{name} product {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings.product.items()
    )
    report(f"ceilings measured now: copy {ceilings.copy / 1e9:.3g} GB/s, {products}\n")
    limits = {"copy_bytes_per_s": ceilings.copy, "product_flops_per_s": ceilings.product}
    result = facts(device) | {"ceilings": limits, "cases": [], "missing": []}
    for op in ops:
        for case in filter(None, map(keep, cases(op, size, dtypes, device))):
            rows, missing = measure(case, clock, ceilings)
            for line in [*lines(rows), *(f"    {row['impl']:<50} {row['why']}" for row in missing)]:
                report(line)
            result["cases"] += rows
            result["missing"] += missing
            after(result)
    return result


def without(sizes: str | None, impls: str | None) -> Callable[[Case], Case | None]:
    """What leaves out cases whose size, and of the others what implementations' names match."""

    def keep(case: Case) -> Case | None:
        if sizes and re.search(sizes, case.size):
            return None
        out = lambda name: bool(impls and re.search(impls, name))
        peers = {name: impl for name, impl in case.peers.items() if not out(name)}
        return replace(case, peers=peers, naive=case.naive and not out(NAIVE))

    return keep


def kept(result: dict, path: Path, ops: Sequence[str]) -> dict:
    """The result beside what the file already has of other ops, if that is of the same device,
    versions and commit.
    """
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(
        before.get(key) != result[key] for key in ("device", "driver", "torch", "triton", "commit")
    ):
        return result
    return result | {
        key: [r for r in before[key] if r["op"] not in ops] + result[key]
        for key in ("cases", "missing")
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("op", nargs="*", help=f"of {', '.join(OPS)} (default: all)")
    parser.add_argument(
        "--size", choices=("small", "base"), help="default: base on a GPU, small on a CPU"
    )
    parser.add_argument(
        "--dtype",
        help=f"of {','.join(DTYPES)}; comma-separated (default: fp16,bf16 on a GPU, fp32 on a "
        "CPU; --errors: all)",
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--seconds", type=float, default=0.25, help="spent on one measurement, warm-up aside"
    )
    parser.add_argument(
        "--json",
        type=new_file,
        help="write the results here, in a folder to a file named after the device; "
        "what that has of other ops on the same device, versions and commit stays",
    )
    for flag, what in (
        ("--without-sizes", "leave out cases whose size matches"),
        ("--without-impls", "leave out peers, and the naive reference, whose name matches"),
    ):
        parser.add_argument(flag, metavar="REGEX", help=what)
    instead = parser.add_mutually_exclusive_group()
    for flag, what in (
        ("--errors", "print errors against float64 instead of times"),
        ("--warm", "run everything once, for what compiles; several commands may do it at once"),
    ):
        instead.add_argument(flag, action="store_true", help=what)
    args = parser.parse_args(argv)
    if not 0 <= args.seconds < math.inf:
        parser.error(f"--seconds {args.seconds} must be finite and at least 0")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size, dtypes = ("small", list(DTYPES)) if args.errors else defaults(args.device)
    args.size, args.op = args.size or size, args.op or list(OPS)
    args.dtype = args.dtype.split(",") if args.dtype else dtypes
    for given, known in ((args.op, OPS), (args.dtype, DTYPES)):
        if unknown := [x for x in given if x not in known]:
            parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return args


def _chosen(args: argparse.Namespace) -> Iterator[Case]:
    keep = without(args.without_sizes, args.without_impls)
    for op in args.op:
        yield from filter(None, map(keep, cases(op, args.size, args.dtype, args.device)))


def _errors(args: argparse.Namespace) -> int:
    print(
        "\nLargest difference from float64 over the largest value, of the output and of the "
        "worst gradient.\n"
    )
    print(ERROR_TABLE, flush=True)
    reasons = {}
    failed = False
    for case in _chosen(args):
        if case.reference is None:
            continue
        for row in errors(case):
            if row.get("why", "failed").startswith("failed"):
                print(error_line(row), flush=True)
            else:
                reasons[f"- {row['impl']}: {row['why']}"] = None
            failed = failed or (row["impl"] == OURS and "why" in row)
    print("\n".join(["", *(["Not run:", "", *reasons] if reasons else [])]))
    return int(failed)


def _warm(args: argparse.Namespace) -> int:
    failed = False
    for case in _chosen(args):
        began = time.perf_counter()
        _, missing = verdicts(case, case.inputs(0))
        seconds = time.perf_counter() - began
        print(f"{case.op}  {case.size}  {case.dtype}  {seconds:.1f} s", flush=True)
        for row in missing:
            print(f"    {row['impl']:<50} {row['why']}", flush=True)
            failed = failed or row["impl"] == OURS
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = _parse(argv)
    print(", ".join(f"{key} {value}" for key, value in facts(args.device).items()))
    if args.device.type == "cpu" and not args.errors and not args.warm:
        print(
            "A CPU: the torch path is measured against the naive reference, not the Triton kernels."
        )
    print(
        "peers: "
        + "; ".join(
            f"{name} {'absent' if isinstance(optional(name), str) else 'present'}" for name in KNOWN
        )
    )
    if args.errors or args.warm:
        return _errors(args) if args.errors else _warm(args)
    if args.json and args.json.is_dir():
        args.json /= file_name(device_name(args.device))

    def save(result: dict) -> None:
        if args.json:
            args.json.write_text(json.dumps(kept(result, args.json, args.op), indent=1) + "\n")

    keep = without(args.without_sizes, args.without_impls)
    say = lambda line: print(line, flush=True)
    result = run(args.op, args.size, args.dtype, args.device, args.seconds, say, save, keep)
    failed = any(row["impl"] == OURS for row in result["missing"])
    return int(failed or any(row["agrees"] is False for row in result["cases"]))
