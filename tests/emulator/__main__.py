"""python -m tests.emulator OP: the work of every launch of an op, counted where no GPU is.

The cases are those of `kernels.bench`, forward and backward, compiled for a GPU's target and
executed on the CPU, so that counts and measured times stand beside each other. Every time is a
bound of counted work, not a measurement. --json writes {what, triton, torch, commit, date, rows}:
a row a launch, with the times by resource in times_us, and the fewest microseconds
that the pass can take by kernels.bench's count of bytes and products in floor_us.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from kernels.bench.case import DTYPES, Case, Work
from kernels.bench.environment import commit, today
from kernels.bench.ops import OPS
from kernels.checks import new_file
from tests.emulator.launch import emulated
from tests.emulator.model import GPUS, Gpu, bound

WHAT = "a bound of counted work, not a measurement"


def floor_us(work: list[Work], gpu: Gpu) -> float:
    """Return the time of the stages of a pass, one after another, that bytes or products take."""
    peak = gpu.units * gpu.clock * gpu.tensor
    return 1e6 * sum(max(stage.bytes / gpu.memory, stage.flops / peak) for stage in work)


def count(case: Case, gpu: str) -> Iterator[dict]:
    """Yield a row for every launch of a case."""
    reports = []
    with emulated(GPUS[gpu].target, seen=reports.append):
        inputs = case.inputs(0)
        out = case.ours(*inputs)
        forward = len(reports)
        if case.backward:
            tensors = [out] if isinstance(out, torch.Tensor) else list(out)
            outputs = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
            wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
            upstream = [torch.randn_like(t) for t in outputs]
            torch.autograd.grad(outputs, [*wanted, *case.parameters], upstream, allow_unused=True)
    for i, report in enumerate(reports):
        which, work = ("forward", case.forward) if i < forward else ("backward", case.backward)
        row = {"op": case.op, "pass": which, "size": case.size, "dtype": case.dtype, "gpu": gpu}
        yield row | bound(report, gpu) | {"floor_us": round(floor_us(work, GPUS[gpu]), 3)}


def describe(row: dict) -> str:
    """Write the row of a launch as lines of text."""
    share = lambda n, best: f"{n:,} ({100 * best / n:.0f} % ideal)" if n else "none"
    classes = ", ".join(f"{name} {n:,}" for name, n in row["classes"].items())
    return (
        f"  {row['kernel']}  grid {row['grid']} x {row['warps']} warps: "
        f"{row['bound_us']:.2f} us by {row['bottleneck']}\n"
        f"    {row['instructions']:,} instructions: {classes}\n"
        f"    sectors {share(row['sectors'], row['sectors_ideal'])}, wavefronts "
        f"{share(row['wavefronts'], row['wavefronts_ideal'])}, {row['bytes'] / 1e6:.2f} MB, "
        f"{row['tensor_flops'] / 1e9:.3f} GFLOP\n"
        f"    {row['registers']} registers, {row['spilled']} bytes spilled, {row['shared']} bytes "
        f"shared, {row['blocks']} blocks a multiprocessor, {row['waves']} waves, "
        f"{100 * row['full']:.0f} % full"
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=WHAT)
    parser.add_argument("op", choices=sorted(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--size", choices=["small", "base"], default="small")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--gpu", default="h100", help=f"of {', '.join(GPUS)}; comma-separated")
    parser.add_argument("--json", type=new_file, help="also write the rows here")
    args = parser.parse_args(argv)
    gpus = args.gpu.split(",")
    if unknown := [gpu for gpu in gpus if gpu not in GPUS]:
        parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(GPUS)}")
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    rows = []
    for gpu in gpus:
        for case in OPS[args.op](args.size, [args.dtype], torch.device("cpu")):
            head = None
            for row in count(case, gpu):
                rows.append(row)
                if head != (head := row["pass"]):
                    print(f"{case.op} {head}  {case.size}  {case.dtype}  {gpu}: {WHAT}")
                print(describe(row), flush=True)
    if args.json:
        Path(args.json).write_text(
            json.dumps(
                {"what": WHAT, **versions, "commit": commit(), "date": today(), "rows": rows},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
