"""Time training steps as they are trained, data loading apart, and profile a few of them.

    python -m train.timing DECODER --json FILE [--steps N] [--warm-up N] [flags of train.DECODER]

The profile has every kernel's calls and time, and how long the device was busy; beside it stands
the most memory that was held. Results are written as they come, so what is stopped keeps what it
has. `--steps 0` only compiles: several of these run at once before one is timed alone.

On a CPU the profile is that of torch's functions, those they call included: no word on a GPU.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from models.files import write_whole
from train.data.batch import Batch
from train.decoders import DECODERS
from train.flags import from_cli
from train.run.machine import machine
from train.run.threads import computing
from train.trainer import Run

Interval = tuple[str, float, float]  # name, start and end in microseconds


def busy(intervals: Iterable[Interval]) -> float:
    """Sum the microseconds in which at least one of the intervals runs."""
    total = 0.0
    end = float("-inf")
    for _, start, stop in sorted(intervals, key=lambda interval: interval[1:]):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def by_name(intervals: Iterable[Interval], steps: int) -> list[dict]:
    """List calls and milliseconds of each kernel in one of `steps` steps, the longest first."""
    found: dict[str, list[float]] = {}
    for name, start, end in intervals:
        found.setdefault(name, []).append(end - start)
    rows = [
        {"kernel": name, "calls": len(times) / steps, "ms": round(sum(times) / 1e3 / steps, 4)}
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


class Timed:
    """Steps of a run, timed one by one with the device waited for."""

    def __init__(self, run: Run):
        self.run = run
        self.gpu = run.here.device.type == "cuda"

    def _wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.run.here.device)

    def ms(self, step: list[Batch]) -> float:
        """Time one step in milliseconds."""
        self._wait()
        began = time.perf_counter()
        self.run.step(step)
        self._wait()
        return 1e3 * (time.perf_counter() - began)

    def measured(self, steps: list[list[Batch]]) -> dict:
        """Time the steps, and measure the most memory that they held."""
        device = self.run.here.device
        if self.gpu:
            torch.cuda.reset_peak_memory_stats(device)
        times = [self.ms(step) for step in steps]
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if self.gpu else None
        voxels = sum(len(batch.coords) for step in steps for batch in step) / len(steps)
        return {
            "median_ms": median(times),
            "best_ms": min(times),
            "worst_ms": max(times),
            "steps": len(steps),
            "voxels": voxels,
            "peak_gib": peak,
        }

    def profiled(self, steps: list[list[Batch]]) -> dict:
        """Profile the steps: wall time, busy time and every kernel, of one step on average."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.gpu else [])]
        with profile(activities=activities) as found:
            wall = [self.ms(step) for step in steps]
        where = DeviceType.CUDA if self.gpu else DeviceType.CPU
        intervals = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in found.events()
            if event.device_type == where and not getattr(event, "is_user_annotation", False)
        ]
        return {
            "profiled_ms": sum(wall) / len(steps),
            "busy_ms": busy(intervals) / 1e3 / len(steps),
            "calls": len(intervals) / len(steps),
            "kernels": by_name(intervals, len(steps)),
        }


def measure(run: Run, warm_up: int, steps: int, profiled: int) -> Iterator[dict]:
    """Yield the results so far: after the first steps, the timed ones, and the profiled ones."""
    batches = iter(run.objects.steps())
    timed = Timed(run)
    config = run.config
    first = [timed.ms(next(batches)) for _ in range(warm_up)]
    result = {
        "decoder": run.script,
        "preset": config.preset,
        "precision": config.precision,
        "batch_size": config.batch_size,
        "micro_batch": config.micro_batch,
        "resolution": config.resolution,
        "image_size": config.image_size,
        "first_ms": first[0],
        "warm_up_ms": sum(first),
    }
    yield result
    if steps:
        kept = [next(batches) for _ in range(steps)]  # loaded before the clock
        result |= timed.measured(kept)
        yield result
        yield result | timed.profiled(kept[:profiled])


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("python -m train.timing", allow_abbrev=False)
    parser.add_argument("decoder", choices=list(DECODERS))
    parser.add_argument("--json", type=Path, required=True, help="where the results are written")
    parser.add_argument("--warm-up", type=int, default=6, help="steps before the clock")
    parser.add_argument("--steps", type=int, default=12, help="timed ones; 0 only compiles")
    args, flags = parser.parse_known_args(argv)
    if args.warm_up < 1 or args.steps < 0:
        parser.error(f"--warm-up {args.warm_up} must be above 0, --steps {args.steps} not below 0")
    return args, flags


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args, flags = _parse(argv)
    recipe = DECODERS[args.decoder]
    config = from_cli(args.decoder, recipe.presets, flags)
    where = machine(config.device, config.deterministic)
    with tempfile.TemporaryDirectory() as folder, where as here, computing(config, here.device):
        config = replace(config, out=folder, steps=args.warm_up + args.steps)
        run = Run(args.decoder, config, recipe.build, here, recipe.loss)
        for result in measure(run, args.warm_up, args.steps, min(3, args.steps)):
            write_whole(args.json, json.dumps(result, indent=1) + "\n")
            shown = {key: value for key, value in result.items() if key != "kernels"}
            text = lambda value: f"{value:.5g}" if isinstance(value, float) else str(value)
            print(", ".join(f"{key} {text(value)}" for key, value in shown.items()), flush=True)
        for row in result.get("kernels", [])[:20]:
            print(f"{row['ms']:9.3f} ms  {row['calls']:7.1f} x  {row['kernel'][:100]}", flush=True)


if __name__ == "__main__":
    main()
