"""Command line of benchmarks: `python -m kernels.bench`, and others with ops of their own.

Times every op forward and backward beside its floor on this device and every other implementation
that can be imported, in the same run, after checking that they agree (kernels.bench.measure says
how). On a CPU, what is measured is the torch path against the naive reference: that says nothing
about the kernels.

--errors prints instead, as they come, how far each implementation is from the reference in float64,
by type; on a CPU with TRITON_INTERPRET=1 the kernels too, interpreted. --warm compiles everything
and times nothing. --json writes {device, driver, torch, triton, python, commit, date, ceilings,
cases, missing}; PATH may be a folder, in which the file is named after the device. Exit status 1:
ours failed or two implementations disagree.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from kernels.bench.case import DTYPES, KNOWN, NAIVE, OURS, Case, Cases, optional
from kernels.bench.environment import device_name, environment, file_name
from kernels.bench.measure import Roofline, Timer, agreement, errors, measure, measure_roofline
from kernels.checks import new_file

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
ERROR_TABLE = "| op | size | type | implementation | output | gradient |\n|---|---|---|---|---|---|"
# Results of different ops share a file only where these are equal
SAME_RUN = ("device", "driver", "torch", "triton", "commit")

Filter = Callable[[Case], Case | None]  # the part of a case that is measured; None: nothing


def format_rows(rows: list[dict]) -> Iterator[str]:
    """Write the rows of one case as text: the floor of each pass, then every implementation."""
    head = None
    for row in rows:
        key = row["op"], row["pass"], row["size"], row["dtype"]
        if key != head:
            head = key
            floor = f"floor {row['floor_us']:.1f} us"
            yield f"{row['op']} {row['pass']}  {row['size']}  {row['dtype']}   {floor}"
        if row["agrees"] is False:
            result = "DISAGREES, not timed"
        elif row["median_us"] is None:
            result = "failed, see below"
        else:
            result = f"{row['median_us']:>12.1f} us +- {row['spread_us']:.1f}"
            if row["fraction"]:
                result += f"   {100 * row['fraction']:.1f} % of the floor"
        yield f"    {row['impl']:<50} {result}"


def _reason(row: dict) -> str:
    return f"    {row['impl']:<50} {row['why']}"


def error_line(row: dict) -> str:
    """Write a Markdown row: largest difference over largest value, of output and worst gradient."""
    number = lambda x: "-" if x is None else f"{x:.1e}"
    if "why" in row:
        found = [row["why"], "-"]
    else:
        found = [number(row["output"]), number(row["gradient"])]
    return "| " + " | ".join([row["op"], row["size"], row["dtype"], row["impl"], *found]) + " |"


def defaults(device: torch.device) -> tuple[str, list[str]]:
    """Choose the size and the types that a device is measured with."""
    return ("base", ["fp16", "bf16"]) if device.type == "cuda" else ("small", ["fp32"])


def start(device: torch.device, seconds: float = 0.25) -> tuple[Timer, Roofline]:
    """Make the timer, with `seconds` for a measurement, and measure this device's roofline.

    0 seconds on a CPU: one call each and small arrays, to see that it runs.
    """
    timer = Timer(device, seconds, least=5 if seconds else 1)
    if device.type == "cuda":
        return timer, measure_roofline(timer, megabytes=1024, edge=8192)
    if seconds:
        return timer, measure_roofline(timer, megabytes=128, edge=1024)
    return timer, measure_roofline(timer, megabytes=8, edge=256)


def run(
    ops: Mapping[str, Cases],
    size: str,
    dtypes: list[str],
    device: torch.device,
    seconds: float = 0.25,
    report: Callable[[str], object] = print,
    after: Callable[[dict], object] = lambda result: None,
    keep: Filter = lambda case: case,
) -> dict:
    """Measure ops on one device and return the dict that --json writes.

    `report` takes each line of text. `after` gets the result so far after every case, so that a
    crash loses one case and not the run. `keep` chooses what is measured of a case, see
    `exclude`.
    """
    timer, roofline = start(device, seconds)
    rates = [f"{name} product {rate / 1e12:.3g} TFLOP/s" for name, rate in roofline.product.items()]
    copy = f"copy {roofline.copy / 1e9:.3g} GB/s"
    report(f"ceilings measured now: {', '.join([copy, *rates])}\n")
    limits = {"copy_bytes_per_s": roofline.copy, "product_flops_per_s": roofline.product}
    result = environment(device) | {"ceilings": limits, "cases": [], "missing": []}
    for case in _selected(ops, size, dtypes, device, keep):
        rows, missing = measure(case, timer, roofline)
        for line in [*format_rows(rows), *map(_reason, missing)]:
            report(line)
        result["cases"] += rows
        result["missing"] += missing
        after(result)
    return result


def _selected(
    ops: Mapping[str, Cases], size: str, dtypes: list[str], device: torch.device, keep: Filter
) -> Iterator[Case]:
    for cases in ops.values():
        yield from filter(None, map(keep, cases(size, dtypes, device)))


def exclude(sizes: str | None, impls: str | None) -> Filter:
    """Make a filter from two regular expressions.

    It drops cases whose size matches `sizes`, and baselines (the naive reference among them) whose
    name matches `impls`.
    """

    def keep(case: Case) -> Case | None:
        if sizes and re.search(sizes, case.size):
            return None
        out = lambda name: bool(impls and re.search(impls, name))
        baselines = {name: impl for name, impl in case.baselines.items() if not out(name)}
        return replace(case, baselines=baselines, naive=case.naive and not out(NAIVE))

    return keep


def merge(result: dict, path: Path, ops: Iterable[str]) -> dict:
    """Add the other ops that a file has to a result of `ops`.

    A file of another device, version or commit adds nothing.
    """
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(before.get(key) != result[key] for key in SAME_RUN):
        return result
    others = lambda key: [row for row in before[key] if row["op"] not in ops]
    return result | {key: others(key) + result[key] for key in ("cases", "missing")}


def _parse(ops: Mapping[str, Cases], prog: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[1])
    parser.add_argument("op", nargs="*", help=f"of {', '.join(ops)} (default: all)")
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
    parser.add_argument(
        "--without-sizes", metavar="REGEX", help="leave out cases whose size matches"
    )
    parser.add_argument(
        "--without-impls",
        metavar="REGEX",
        help="leave out baselines, and the naive reference, whose name matches",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--errors", action="store_true", help="print errors against float64 instead of times"
    )
    instead.add_argument(
        "--warm",
        action="store_true",
        help="run everything once, for what compiles; several commands may do it at once",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.seconds < math.inf:
        parser.error(f"--seconds {args.seconds} must be finite and at least 0")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size, dtypes = ("small", list(DTYPES)) if args.errors else defaults(args.device)
    args.size = args.size or size
    args.op = args.op or list(ops)
    args.dtype = args.dtype.split(",") if args.dtype else dtypes
    for given, known in ((args.op, ops), (args.dtype, DTYPES)):
        if unknown := [x for x in given if x not in known]:
            parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return args


def _print_errors(cases: Iterable[Case]) -> int:
    """Print the table of errors against float64; return the exit status."""
    print(
        "\nLargest difference from float64 over the largest value, of the output and of the "
        "worst gradient.\n"
    )
    print(ERROR_TABLE, flush=True)
    reasons = {}
    failed = False
    for case in cases:
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


def _warm_up(cases: Iterable[Case]) -> int:
    """Run every implementation once; return the exit status."""
    failed = False
    for case in cases:
        began = time.perf_counter()
        _, missing = agreement(case, case.inputs(0))
        seconds = time.perf_counter() - began
        print(f"{case.op}  {case.size}  {case.dtype}  {seconds:.1f} s", flush=True)
        for row in missing:
            print(_reason(row), flush=True)
            failed = failed or row["impl"] == OURS
    return int(failed)


def _installed() -> str:
    present = lambda name: "absent" if isinstance(optional(name), str) else "present"
    return "; ".join(f"{name} {present(name)}" for name in KNOWN)


def main(ops: Mapping[str, Cases], prog: str, argv: list[str] | None = None) -> int:
    """Run the command `prog`, which measures `ops`; return its exit status."""
    args = _parse(ops, prog, argv)
    chosen = {op: ops[op] for op in args.op}
    keep = exclude(args.without_sizes, args.without_impls)
    print(", ".join(f"{key} {value}" for key, value in environment(args.device).items()))
    if args.device.type == "cpu" and not args.errors and not args.warm:
        print(
            "A CPU: the torch path is measured against the naive reference, not the Triton kernels."
        )
    print(f"baselines: {_installed()}")
    if args.errors or args.warm:
        cases = _selected(chosen, args.size, args.dtype, args.device, keep)
        return _print_errors(cases) if args.errors else _warm_up(cases)
    if args.json and args.json.is_dir():
        args.json /= file_name(device_name(args.device))

    def save(result: dict) -> None:
        if args.json:
            whole = merge(result, args.json, args.op)
            args.json.write_text(json.dumps(whole, indent=1) + "\n")

    say = lambda line: print(line, flush=True)
    result = run(chosen, args.size, args.dtype, args.device, args.seconds, say, save, keep)
    failed = any(row["impl"] == OURS for row in result["missing"])
    return int(failed or any(row["agrees"] is False for row in result["cases"]))
