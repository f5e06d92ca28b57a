"""Measure everything on a GPU, in as many minutes as there are.

    python notebooks/measure.py OUT DATA [--minutes 8]   DATA of train.prepare: 64^3, `rgb` features
    python notebooks/measure.py OUT --rehearse           the same in small, a minute on any machine

The most valuable first: tests in parallel; errors of fp32, fp16 and bf16 against float64; training
steps at `base` with every kernel's time; ops beside their floors and every baseline that can be
imported; a step beside the published composition; short trainings at `small` with pictures; the
same bits twice; compute-sanitizer, where it is.

--minutes is the whole budget. Every step has a share of it and is stopped at its limit; what it has
by then is kept, and the last steps are left out where time is short. A second call goes on where
the first ended: tests that passed, ops that were measured and steps that passed are not run again.
What it goes on from lies in --work, beside the compiled kernels, by device, versions and the
content of the sources.

OUT gets <device>.json (for notebooks/results), errors.md, logs.tar.gz and a picture of each
decoder, written anew while steps run. Exit status 1: a step failed; in a rehearsal, also one that
was stopped or left out.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]  # it runs where nothing was installed

import steps  # noqa: E402
import torch  # noqa: E402
from jobs import Jobs, Step, allotted  # noqa: E402
from PIL import Image  # noqa: E402

from kernels.bench.environment import environment, file_name  # noqa: E402
from train.decoders import DECODERS  # noqa: E402

PLAN = {  # the most valuable first: the least seconds of each, and its share of what is left
    "tests": (60, 40),
    "errors": (25, 8),
    "training": (50, 14),
    "ops": (50, 20),
    "train_step": (20, 4),
    "pictures": (30, 8),
    "determinism": (20, 4),
    "sanitizer": (20, 4),
}
BESIDE = ("tests", "training", "determinism")  # run beside the others in a rehearsal: half the time
PICTURE = 1_000_000  # bytes of a picture at most
PACK = 20.0  # seconds between two packings


def sources() -> str:
    """Hash the content of all sources, to twelve digits."""
    digest = hashlib.sha256()
    for folder in ("kernels", "models", "train", "tests", "notebooks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def fitted(source: Path, target: Path, most: int = PICTURE) -> None:
    """Copy a picture, smaller where it has more than `most` bytes."""
    shutil.copy(source, target)
    while target.stat().st_size > most:
        with Image.open(target) as picture:
            width, height = (max(1, 7 * edge // 10) for edge in picture.size)
            smaller = picture.convert("RGB").resize((width, height))
        smaller.save(target)


class Record:
    """Results of all calls on one device so far, and OUT, where they are shown."""

    def __init__(self, out: Path, state: Path, facts: dict):
        self.out = out
        self.state = state
        self.facts = facts
        self.packed = 0.0
        self.lock = threading.Lock()
        self.steps = steps.read(state / "steps.json", {})
        (state / "logs").mkdir(parents=True, exist_ok=True)

    def note(self, step: str, result: dict) -> None:
        """Keep and show a step's result."""
        with self.lock:
            self.steps[step] = result
            (self.state / "steps.json").write_text(json.dumps(self.steps))
            self._pack()

    def pack(self, every: float = 0.0) -> None:
        """Show what there is, if that was not done within `every` seconds."""
        with self.lock:
            if time.monotonic() - self.packed >= every:
                self._pack()

    def _pack(self) -> None:  # OUT: at most six files, whole at any moment
        measured = steps.read(self.state / "bench.json", {})
        times = {"ceilings": {}, "cases": [], "missing": []}
        times = {key: measured.get(key, empty) for key, empty in times.items()}
        partial = self.out / ".partial"
        for name in DECODERS:
            if (self.state / f"{name}.png").is_file():
                fitted(self.state / f"{name}.png", partial.with_suffix(".png"))
                partial.with_suffix(".png").replace(self.out / f"{name}.png")
        if (self.state / "errors.md").is_file():
            shutil.copy(self.state / "errors.md", partial)
            partial.replace(self.out / "errors.md")
        with tarfile.open(partial, "w:gz") as tar:
            runs = self.state.glob("runs/*/log.jsonl")
            for file in sorted([*self.state.glob("*.json*"), *self.state.glob("logs/*"), *runs]):
                tar.add(file, file.relative_to(self.state))
        partial.replace(self.out / "logs.tar.gz")
        whole = self.facts | times | {"steps": {n: self.steps[n] for n in PLAN if n in self.steps}}
        partial.write_text(json.dumps(whole, indent=1) + "\n")
        partial.replace(self.out / file_name(self.facts["device"]))
        self.packed = time.monotonic()


def carry_out(names: list[str], here: steps.Here, record: Record, end: float) -> None:
    """Run steps, one after another, until `end` of time.monotonic()."""
    plan = [Step(name, *PLAN[name]) for name in names if not passed(record, name)]
    print("".join(f"{name}: passed before\n" for name in names if passed(record, name)), end="")
    while plan and not here.jobs.stopped.is_set():
        step = plan[0]
        seconds = allotted(end - time.monotonic(), plan)
        plan = plan[1:]
        if seconds is None:
            before = record.steps.get(step.name, {})
            record.note(step.name, before or {"status": "left out", "why": "no time"})
            print(f"{step.name}: left out, no time", flush=True)
            continue
        began = time.monotonic()
        here.until = began + seconds
        print(f"{step.name}: at most {seconds:.0f} s", flush=True)
        result = getattr(steps, step.name)(here)
        took = {"seconds": round(time.monotonic() - began, 1), "limit": round(seconds, 1)}
        record.note(step.name, result | took)
        print(f"{step.name}: {brief(result)} ({took['seconds']} s)", flush=True)


def side_by_side(lanes: list[list[str]], here: steps.Here, record: Record, end: float) -> None:
    """Carry out lists of steps at once; what ends one list, or this, ends all their commands."""
    with ThreadPoolExecutor(len(lanes)) as pool:
        try:
            begun = [pool.submit(carry_out, lane, replace(here), record, end) for lane in lanes]
            for lane in begun:
                lane.result()
        finally:
            here.jobs.stopped.set()


def passed(record: Record, name: str) -> bool:
    """Return true where nothing of a step is left to do."""
    return record.steps.get(name, {}).get("status") in ("passed", "absent")


def brief(result: dict) -> str:
    """Shorten a step's result to one line."""
    text = ", ".join(f"{key} {value}" for key, value in result.items() if value not in ([], {}))
    return text if len(text) <= 300 else text[:300] + " ..."


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PLAN]:
        known = ", ".join(PLAN)
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {known}")
    return names


def _parse(argv: list[str] | None) -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trislat-measure"
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path, nargs="?", help="folder of a dataset of train.prepare")
    parser.add_argument("--minutes", type=float, default=8, help="the whole budget (default: 8)")
    parser.add_argument("--only", type=_names, help="steps to run, with commas between")
    parser.add_argument("--skip", type=_names, default=[], help="steps to leave out")
    goes_on = f"what a second call goes on from (default: {cache})"
    parser.add_argument("--work", type=Path, help=goes_on)
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--rehearse", action="store_true", help="everything in small, without DATA")
    args = parser.parse_intermixed_args(argv)  # DATA may follow a flag
    if args.rehearse == (args.data is not None):
        parser.error("give DATA to measure, or --rehearse, and not both")
    if args.data and not (args.data / "metadata.csv").is_file():
        parser.error(f"{args.data} is no dataset: it has no metadata.csv")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no GPU: nothing can be measured (--rehearse runs on any machine)")
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes} must exceed 0")
    if args.work is None and not args.rehearse:
        args.work = cache
    return args


def _environment(work: Path) -> dict[str, str]:
    """Compiled kernels are kept; processes side by side do not fight for the cores."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    caches = {"TRITON_CACHE_DIR": work / "triton", "TORCHINDUCTOR_CACHE_DIR": work / "inductor"}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    kept = {name: os.environ.get(name, str(folder)) for name, folder in caches.items()}
    return dict(os.environ) | kept | threads | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = _parse(argv)
    end = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # with what cleans up
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = environment(device) | ({"commit": args.commit} if args.commit else {})
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as rehearsal:
        work = args.work or Path(rehearsal)
        name = file_name(facts["device"]).removesuffix(".json")
        known = [name, facts["torch"], facts["triton"], sources()]
        state = work / "-".join(known if args.data else [*known, "rehearsal"])
        record = Record(args.out, state, facts)
        jobs = Jobs(state / "logs", ROOT, _environment(work), lambda: record.pack(PACK))
        cores = len(os.sched_getaffinity(0))
        here = steps.Here(state, args.data and args.data.resolve(), jobs, cores)
        names = [name for name in PLAN if name in (args.only or PLAN) and name not in args.skip]
        # what is timed wants the machine for itself; the times of a rehearsal say nothing
        beside = [name for name in names if args.rehearse and name in BESIDE]
        lanes = [[name for name in names if name not in beside], beside]
        try:
            side_by_side(lanes, here, record, end)
        finally:
            record.pack()
    failed = [name for name in names if record.steps[name]["status"] == "failed"]
    rest = [name for name in names if not passed(record, name)]
    print(f"not passed: {', '.join(rest)}" if rest else "every step passed", flush=True)
    return int(bool(rest if args.rehearse else failed))


if __name__ == "__main__":
    sys.exit(main())
