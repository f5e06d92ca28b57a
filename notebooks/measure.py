"""python notebooks/measure.py OUT DATA [STEP ...]          DATA: a dataset of train.prepare
   python notebooks/measure.py OUT --rehearse [STEP ...]    the same commands in small, on any machine

Everything that is measured on a GPU, one step after another, none above ten minutes; a step that fails loses no other.
OUT gets a log of every step, <device>.json and errors.md for notebooks/results, and the runs with their pictures and curves.
Exit status 1: a step failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 600  # seconds a step may take
BENCH = {
    "attention": "window_attention segment_attention serialized_attention rotary_attention",
    "passes": "layer_norm add_layer_norm rms_norm gelu ssim sparse_conv subdivide_conv group_norm pool",
    "coordinates": "build_table lookup neighbours window_partition cache_hit partition_window partition_extent neighbours_extent",
    "renderers": "splat raymarch isosurface render_mesh",
    "sweeps": "attention_rows attention_window attention_occupancy",
    "training": "block trunk train_step",  # train_step: beside the step as the published code composes it
}
DECODERS = {"gaussian": 1500, "radiance": 1000, "mesh": 500}  # steps of the short trainings
REHEARSED = {  # of BENCH
    "attention": "rotary_attention", "passes": "gelu", "coordinates": "lookup", "renderers": "render_mesh",
    "sweeps": "attention_rows", "training": "train_step",
}  # fmt: skip

Commands = list[list[str]]  # each a command of python's


def steps(out: Path, data: str | None) -> dict[str, Commands]:
    """The commands of every step, in order; without data the rehearsal's."""
    real = data is not None
    few = [] if real else ["tests/test_gelu.py", "tests/test_outlines.py"]
    plan: dict[str, Commands] = {"tests": [["-m", "pytest", "-q", *few]]}
    random = ["-m", "pytest", "-q", "-m", "sanitizer", "--cases", "5" if real else "1"]
    for tool in ("memcheck", "racecheck"):
        plan[tool] = [random + ([] if real else ["-k", "norms or similarity"])]
    for name, ops in BENCH.items():
        chosen = (ops if real else REHEARSED[name]).split()
        plan[name] = [["-m", "kernels.bench", *chosen, "--seconds", "0.1" if real else "0.01", "--json", str(out)]]
    plan["errors"] = [["-m", "kernels.bench", *([] if real else ["gelu"]), "--errors"]]
    for decoder, length in DECODERS.items():
        size = ["--preset", "small", "--data", str(data), "--sample-every", "250"] if real else ["--eval-objects", "1"]
        run = ["-m", f"train.{decoder}", *size, "--out", str(out / decoder)]
        plan[decoder] = [[*run, "--steps", str(length if real else 2)]]
    plan["determinism"] = [
        ["-m", f"train.{decoder}", "--deterministic", "--eval-objects", "1", "--steps", "20" if real else "2"]
        + ["--out", str(out / f"{decoder}-{turn}")]
        for decoder in DECODERS for turn in ("first", "second")
    ]  # fmt: skip
    return plan


def checked(tool: str) -> list[str]:
    """compute-sanitizer with that tool, if it is there."""
    if shutil.which("compute-sanitizer"):
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    print("compute-sanitizer is absent: the tests run without it")
    return []


def run(name: str, commands: Commands, out: Path) -> bool:
    """Run a step into OUT/name.log and print its last lines; whether all its commands passed in time."""
    prefix = checked(name) if name in ("memcheck", "racecheck") else []
    # without torch's cache every tensor is an allocation of its own, and reading beyond it is seen
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if prefix else {})
    began, log = time.monotonic(), out / ("errors.md" if name == "errors" else f"{name}.log")
    with log.open("w") as file:
        for command in commands:
            print("+", *prefix, "python", *command, flush=True)
            left = LIMIT - (time.monotonic() - began)
            try:
                command = [*prefix, sys.executable, *command]
                done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=left)
            except subprocess.TimeoutExpired:
                print(f"  {name}: more than {LIMIT} s, stopped", flush=True)
                return False
            if done.returncode:
                break
    last = [*log.read_text().splitlines()[-3:], f"{time.monotonic() - began:.0f} s"]
    print("".join(f"  {line}\n" for line in last), end="", flush=True)
    return done.returncode == 0 and (name != "determinism" or same_bits(out))


def same_bits(out: Path) -> bool:
    """Whether both runs of every decoder ended with the same weights."""
    weights = lambda decoder, turn: (out / f"{decoder}-{turn}" / "checkpoints" / "decoder.safetensors").read_bytes()
    differ = [decoder for decoder in DECODERS if weights(decoder, "first") != weights(decoder, "second")]
    print(f"  {', '.join(differ)} differ" if differ else "  all decoders: the same bits twice")
    return not differ


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("data", nargs="?", help="folder of a dataset of train.prepare")
    parser.add_argument("step", nargs="*", help=f"of {', '.join(steps(Path(), ''))} (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="small sizes and the embedded objects instead of DATA")
    args = parser.parse_intermixed_args()  # steps may follow --rehearse
    if args.rehearse and args.data:
        args.data, args.step = None, [args.data, *args.step]
    if not args.rehearse and not (args.data and Path(args.data, "metadata.csv").is_file()):
        parser.error(f"{args.data} is no dataset: it has no metadata.csv (or give --rehearse)")
    args.out.mkdir(parents=True, exist_ok=True)
    plan = steps(args.out.resolve(), None if args.rehearse else str(Path(args.data).resolve()))
    if unknown := [name for name in args.step if name not in plan]:
        parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(plan)}")
    failed = [name for name in args.step or plan if not run(name, plan[name], args.out.resolve())]
    print(f"failed: {', '.join(failed)}" if failed else "every step passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
