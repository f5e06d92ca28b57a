"""Command line of `python -m kernels.profile`: the time of every kernel of an op, on a GPU.

    python -m kernels.profile OP [--size base] [--dtype fp16] [--only REGEX] [--json FILE]
    python -m kernels.profile OP --rehearse      in small on any machine: its times say nothing

Runs both passes of an op's benchmark cases (kernels.bench.ops) and prints for each pass its time by
events on the stream beside its floor on this device, then every kernel that torch's profiler saw:
time, bytes a second, registers, spills, shared memory and how many blocks a multiprocessor holds.

Not yet measured on a GPU: this command has only been rehearsed on a CPU. Where there is no GPU,
`python -m tests.emulator OP` counts what one would do.

--json writes {device, driver, torch, triton, python, commit, date, ceilings, kernels}; PATH may be
a folder, in which the file is named after the device. A row of `kernels` is {op, kernel, pass,
dtype, size, calls, us, bytes, flops, registers, spilled, shared, blocks, floor_us}; `us` and
`bytes` are those of all its calls in one pass. The row of a whole pass has the kernel "all", the
bytes and flops that no implementation avoids, and the floor that follows from them. The bytes of a
kernel are those of the memory that its tensors lie in, each once: more than it moves where it uses
a part, less where it reads some again; its floor is their copy. null: not known, as the flops of
one kernel are, and the registers of those that are not Triton's.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from kernels import backend
from kernels.bench.case import DTYPES, Case, Cases, Impl
from kernels.bench.command import start
from kernels.bench.environment import device_name, environment, file_name
from kernels.bench.measure import (
    Roofline,
    Timer,
    backward_call,
    forward_call,
    input_sets,
    spread,
)
from kernels.checks import new_file
from kernels.compile.build import TARGETS, blocks_per_unit, machine_code

ALL = "all"  # the kernel of a row about a whole pass
RUNS = 10  # profiled calls of a pass
HEAD = ("kernel", "calls", "us", "floor", "GB/s", "TFLOP/s", "regs", "spilled", "shared", "blocks")
LINE = "    {:<44} {:>6} {:>10} {:>9} {:>7} {:>8} {:>5} {:>8} {:>7} {:>7}"


@dataclass(frozen=True)
class Facts:
    """How a kernel was built and what it was given; None: not known."""

    bytes: int | None = None
    registers: int | None = None
    spilled: int | None = None  # instructions that touch local memory
    shared: int | None = None  # bytes of a block
    blocks: int | None = None  # that a multiprocessor holds at once


def memory(args: Iterable) -> int:
    """Sum the bytes of the memory that tensors lie in, each once."""
    storages = [a.untyped_storage() for a in args if isinstance(a, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def facts(kernel, grid: tuple, args: tuple, constants: dict) -> Facts:
    """Read what was compiled for a launch; of an interpreted kernel only the bytes are known."""
    given = memory(args)
    tensor = next((a for a in args if isinstance(a, Tensor)), None)
    target = None if tensor is None else TARGETS.get(backend.target(tensor))
    if target is None or not hasattr(kernel, "warmup"):
        return Facts(given)
    # what was compiled for this launch before is found again, nothing runs
    compiled = kernel.warmup(*args, grid=grid, **({"enable_fp_fusion": True} | constants))
    code = machine_code(compiled, target)
    shared = compiled.metadata.shared
    blocks = blocks_per_unit(target, code["registers"], shared, compiled.metadata.num_warps)
    return Facts(given, code["registers"], code["spills"], shared, blocks)


def launches(call: Callable[[int], object]) -> list[tuple[str, Facts]]:
    """Name the kernels of ours that call(0) launches, in their order, with what they are."""
    seen = []

    def note(*launch) -> None:
        seen.append(launch)

    with backend.observe(note):
        call(0)
    return [(launch[0].fn.__name__, facts(*launch)) for launch in seen]


def profiled(call: Callable[[int], object], device: torch.device, runs: int) -> list:
    """Return what torch's profiler saw on the device in `runs` calls, in the order of their starts.

    On a CPU, those are torch's functions, with those that they call.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as found:
        for i in range(runs):
            call(i)
        if gpu:
            torch.cuda.synchronize(device)
    where = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [
        event
        for event in found.events()
        if event.device_type == where and not getattr(event, "is_user_annotation", False)
    ]
    return sorted(events, key=lambda event: event.time_range.start)


def by_kernel(
    events: Iterable, runs: int, known: list[tuple[str, Facts]]
) -> Iterator[tuple[str, float, float, Facts]]:
    """Yield (name, calls, microseconds, facts) of each kernel in one of `runs` calls.

    `known` are the launches of one call. One kernel built for several tile sizes is several here:
    its launches are told apart by their order, if as many were seen as are known.
    """
    times: dict[str, list[float]] = {}
    for event in events:
        duration = event.time_range.end - event.time_range.start
        times.setdefault(event.name, []).append(duration)
    found = []
    for name, durations in times.items():
        builds = [fact for launched, fact in known if launched == name]
        if len(durations) != runs * len(builds):
            only = builds[0] if len(set(builds)) == 1 else Facts()
            builds = [only]
        of_build: dict[Facts, list[float]] = {}
        for i, duration in enumerate(durations):
            of_build.setdefault(builds[i % len(builds)], []).append(duration)
        for fact, part in of_build.items():
            found.append((name, len(part) / runs, sum(part) / runs, fact))
    yield from sorted(found, key=lambda row: -row[2])


def rows(case: Case, timer: Timer, roofline: Roofline, runs: int = RUNS) -> Iterator[dict]:
    """Measure both passes of a case: a row for each pass, and one for each of its kernels."""
    sets = input_sets(case, timer.device, case.inputs(0))
    ours = Impl(case.ours, restore=case.restore)
    passes = {case.forward_name: (case.forward, forward_call(ours, sets))}
    if case.backward:
        passes["backward"] = case.backward, backward_call(case, ours, sets)
    for which, (stages, call) in passes.items():
        row = {"op": case.op, "kernel": ALL, "pass": which, "dtype": case.dtype, "size": case.size}
        row |= {"calls": 1.0, "us": spread(timer.time(call, case.on_host))[0]}
        least = Facts(sum(work.bytes for work in stages))
        flops = sum(work.flops for work in stages)
        floor = roofline.floor_us(stages, case.dtype)
        yield row | asdict(least) | {"flops": flops, "floor_us": floor}
        known = launches(call)
        for name, calls, us, fact in by_kernel(profiled(call, timer.device, runs), runs, known):
            row |= {"kernel": name, "calls": calls, "us": us} | asdict(fact)
            row |= {"flops": None, "floor_us": None}
            if fact.bytes is not None:
                row["bytes"] = calls * fact.bytes
                row["floor_us"] = 1e6 * row["bytes"] / roofline.copy
            yield dict(row)


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _rate(amount: float | None, us: float, unit: float) -> float | None:
    return amount / us / unit if amount and us else None


def table(rows: Iterable[dict]) -> Iterator[str]:
    """Write rows as text: a heading for each pass, then its kernels, the longest first."""
    for row in rows:
        if row["kernel"] == ALL:
            yield f"\n{row['op']} {row['pass']}  {row['size']}  {row['dtype']}"
            yield LINE.format(*HEAD)
        yield LINE.format(
            row["kernel"][:44],
            f"{row['calls']:g}",
            _number(row["us"], 1),
            _number(row["floor_us"], 1),
            _number(_rate(row["bytes"], row["us"], 1e3)),
            _number(_rate(row["flops"], row["us"], 1e6), 1),
            *(_number(row[key]) for key in ("registers", "spilled", "shared", "blocks")),
        )


def _parse(ops: Mapping[str, Cases], argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.profile", description=__doc__.split("\n\n")[2]
    )
    parser.add_argument("op", nargs="+", help=f"of {', '.join(ops)}")
    parser.add_argument("--size", choices=("small", "base"), help="default: base")
    parser.add_argument("--dtype", help=f"of {','.join(DTYPES)}; comma-separated (default: fp16)")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose size matches")
    parser.add_argument(
        "--json", type=new_file, help="write the rows here; in a folder, to a file of the device"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="in small on any machine: its times say nothing"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.rehearse:
        parser.error(
            "this command measures on a GPU and torch finds none; where there is none, `python -m "
            "tests.emulator OP` counts (--rehearse runs the command in small on any machine)"
        )
    args.size = args.size or ("small" if args.rehearse else "base")
    args.dtype = args.dtype.split(",") if args.dtype else ["fp32" if args.rehearse else "fp16"]
    for given, known in ((args.op, ops), (args.dtype, DTYPES)):
        if unknown := [x for x in given if x not in known]:
            parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only {args.only!r} is no regular expression: {error}")
    return args


def main(ops: Mapping[str, Cases], argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = _parse(ops, argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = environment(device)
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    if args.rehearse:
        print("A rehearsal: its times say nothing.")
    timer, roofline = start(device, 0.0 if args.rehearse else 0.25)
    limits = {"copy_bytes_per_s": roofline.copy, "product_flops_per_s": roofline.product}
    result |= {"ceilings": limits, "kernels": []}
    if args.json and args.json.is_dir():
        args.json /= f"profile-{file_name(device_name(device))}"
    for op in args.op:
        for case in ops[op](args.size, args.dtype, device):
            if not re.search(args.only, case.size):
                continue
            found = list(rows(case, timer, roofline, 1 if args.rehearse else RUNS))
            print("\n".join(table(found)), flush=True)
            result["kernels"] += found
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    if not result["kernels"]:
        print(f"no case of {', '.join(args.op)} has a size that matches {args.only!r}")
    return int(not result["kernels"])
