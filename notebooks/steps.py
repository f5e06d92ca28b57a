"""Steps of notebooks/measure.py: each runs commands and returns a result for JSON.

A step goes on from what lies in its state folder. Without data it is a rehearsal, which runs the
same commands in small.
"""

import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from jobs import Ended, Jobs

from kernels.bench import ops as kernel_ops
from kernels.bench import sweeps
from kernels.bench.case import OURS
from kernels.bench.command import ERROR_TABLE
from train import bench as model_ops
from train.decoders import DECODERS

OPS = (  # the most valuable first; train_step is a step of its own
    "window_attention sparse_conv splat raymarch subdivide_conv render_mesh isosurface layer_norm"
    " gelu group_norm ssim block trunk build_table neighbours window_partition"
    " add_layer_norm pool rotary_attention serialized_attention segment_attention lookup cache_hit"
    " attention_occupancy attention_rows attention_window neighbours_extent partition_window"
    " partition_extent"
).split()
# op -> the command that measures it
COMMANDS = dict.fromkeys(kernel_ops.OPS, "kernels.bench")
COMMANDS |= dict.fromkeys(model_ops.OPS, "train.bench")
# two coordinate sets are enough; what takes a minute to compile or compute is left to kernels.bench
BRIEF = ["--without-sizes", r"^(noisy sphere|rough sphere|blobs), N = \d+$"]
BRIEF += ["--without-impls", "naive|FlexAttention|padded"]
BATCH = {"gaussian": 8, "radiance": 4, "mesh": 2}  # objects in a timed step: `base`, 512^2 views
EXECUTED = "tests/test_notebooks.py::test_runs_from_top_to_bottom"  # measures for half an hour
PYTEST = [
    "-m",
    "pytest",
    "-q",
    "--tb=short",
    "-p",
    "no:cacheprovider",
    "-p",
    "tests.helpers.reports",
]
SMALL = {  # flags of the demos, for a rehearsal
    "gaussian": "--image-size 32 --views 1 --batch-size 1 --model.channels 32 --model.per-voxel 2",
    "radiance": "--image-size 16 --views 1 --batch-size 1 --model.channels 32",
}
# a mesh decoder has at least 256 channels, whose step takes a CPU too long
REHEARSED = {"training": "gaussian", "pictures": "radiance", "determinism": "gaussian"}


@dataclass
class Here:
    """Folder, data, commands and time limit of a step."""

    state: Path  # results, logs and run folders of these sources on this device
    data: Path | None  # None: a rehearsal
    jobs: Jobs
    cores: int
    until: float = 0.0  # time.monotonic() of the step's end

    def run(self, commands: dict, at_once: int = 1, share: float = 1.0) -> dict[str, Ended]:
        """Run commands of Python's, name -> arguments, in `share` of the step's time."""
        until = time.monotonic() + share * (self.until - time.monotonic())
        commands = {name: [sys.executable, *command] for name, command in commands.items()}
        return self.jobs.run(commands, until, at_once)

    def decoders(self, step: str) -> list[str]:
        """Name the decoders that a step trains."""
        return list(DECODERS) if self.data else [REHEARSED[step]]

    def ops(self) -> list[str]:
        """Name the ops that are measured."""
        return OPS if self.data else ["pool"]

    def size(self, preset: str, decoder: str) -> list[str]:
        """Make the flags of a training: a preset on DATA, or the demo in small."""
        if self.data:
            return ["--preset", preset, "--features", "rgb", "--data", str(self.data)]
        return SMALL[decoder].split()

    def folder(self, name: str) -> Path:
        """Empty the folder of a run and return its path."""
        folder = self.state / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def verdict(ended: dict[str, Ended], **found) -> dict:
    """Summarise how the commands of a step ended: passed where all ended well."""
    failed = {name: how.status for name, how in ended.items() if how.status}
    stopped = [name for name, how in ended.items() if how.status is None]
    status = "failed" if failed else "stopped" if stopped else "passed"
    counted = {"status": status, "exits": failed, "stopped": stopped}
    return {key: value for key, value in counted.items() if value} | found


def read(file: Path, default):
    """Read a JSON file; return the default where there is none."""
    return json.loads(file.read_text()) if file.is_file() else default


def lines(file: Path) -> list[str]:
    """Read the lines of a file; none where there is no file."""
    return file.read_text().splitlines() if file.is_file() else []


def tests(here: Here) -> dict:
    """Run the tests in parallel processes, notebooks apart; leave out those that passed before."""
    reports = here.state / "tests.jsonl"
    passed = here.state / "passed.jsonl"
    passed.write_text("".join(f"{line}\n" for line in lines(reports)))  # it stays as it is
    command = [*PYTEST, "--reports", str(reports), "--passed", str(passed)]
    if find_spec("xdist"):
        command += ["-n", str(max(1, here.cores - 2)), "--dist", "load"]
    command += ["--deselect", EXECUTED] if here.data else ["tests/test_camera.py"]
    ended = here.run({"tests": command})
    rows = {row["id"]: row for row in map(json.loads, lines(reports))}
    bad = {name: row for name, row in rows.items() if row["outcome"] == "failed"}
    if ended["tests"].status == 5 and not bad:  # pytest's "nothing to run": all passed before
        ended["tests"] = Ended(0, ended["tests"].seconds)
    return verdict(
        ended,
        counts=dict(Counter(row["outcome"] for row in rows.values())),
        seconds_of_work=round(sum(row["s"] for row in rows.values()), 1),
        failures={name: row["why"].strip().splitlines()[-1:] for name, row in bad.items()},
    )


def errors(here: Here) -> dict:
    """Compare every op with float64, each in a process of its own; sweeps are left out."""
    cases = kernel_ops.OPS | model_ops.OPS
    ops = [op for op in here.ops() if cases[op].__module__ != sweeps.__name__]
    done = read(here.state / "errors.json", [])
    flags = ["--errors", "--size", "small", "--without-impls", "FlexAttention"]
    commands = {f"errors-{op}": ["-m", COMMANDS[op], op, *flags] for op in ops if op not in done}
    ended = here.run(commands, here.cores)
    done += [op for op in ops if f"errors-{op}" in ended and ended[f"errors-{op}"].status == 0]
    (here.state / "errors.json").write_text(json.dumps(done))
    logs = [line for op in ops for line in lines(here.state / "logs" / f"errors-{op}.log")]
    rows = [line for line in logs if line.startswith("| ") and line not in ERROR_TABLE]
    (here.state / "errors.md").write_text("\n".join([ERROR_TABLE, *rows]) + "\n")
    return verdict(ended, rows=len(rows), failures=[line for line in rows if "| failed" in line])


def training(here: Here) -> dict:
    """Time training steps: compiled side by side where there are several, then timed alone."""
    file = lambda decoder: here.state / f"training-{decoder}.json"
    decoders = here.decoders("training")
    left = [decoder for decoder in decoders if "kernels" not in read(file(decoder), {})]

    def command(decoder: str, kept: Path, *more: str) -> list[str]:
        batch = ["--batch-size", str(BATCH[decoder]), "--micro-batch", str(BATCH[decoder])]
        size = here.size("base", decoder) + (batch if here.data else [])
        return ["-m", "train.timing", decoder, "--json", str(kept), *more, *size]

    compiled = here.state / "compiled.json"
    few = ["--warm-up", "1", "--steps"]
    warm = {f"training-{d}-warm": command(d, compiled.with_stem(d), *few, "0") for d in left}
    if len(warm) > 1:
        here.run(warm, here.cores, share=0.5)
    few = [] if here.data else [*few, "1"]
    ended = here.run({f"training-{d}": command(d, file(d), *few) for d in left})
    found = {decoder: read(file(decoder), {}) for decoder in decoders}
    for row in found.values():
        row["kernels"] = row.get("kernels", [])[:30]  # all of them are in the file
    return verdict(ended, decoders=found)


def ops(here: Here) -> dict:
    """Time ops: compiled side by side where there are several, then timed alone."""
    flags = ["--dtype", "fp16", "--seconds", "0.03"] if here.data else ["--seconds", "0"]
    left = [op for op in here.ops() if op not in read(here.state / "ops.json", {})]
    command = lambda op: ["-m", COMMANDS[op], op, *flags, *BRIEF, "--warm"]
    if len(left) > 1:
        here.run({f"ops-{op}-warm": command(op) for op in left}, here.cores, share=0.5)
    return timed(here, "ops", here.ops(), [*flags, *BRIEF])


def train_step(here: Here) -> dict:
    """Time a training step beside the step as the published code composes it."""
    flags = ["--dtype", "fp16", "--seconds", "0.5"] if here.data else ["--seconds", "0"]
    return timed(here, "train_step", ["train_step"], flags)


def timed(here: Here, name: str, chosen: list[str], flags: list[str]) -> dict:
    """Time ops one after another into bench.json; an op that ends the process loses no other.

    NAME.json remembers with which status each op ended the process, 0 where it did not. Ops that
    follow each other in one command share a process.
    """
    file = here.state / "bench.json"
    known = here.state / f"{name}.json"
    done = read(known, {})
    ended = {}
    turn = 0
    left = [op for op in chosen if op not in done]
    while left and time.monotonic() < here.until:
        turn += 1
        module = COMMANDS[left[0]]
        together = list(takewhile(lambda op, module=module: COMMANDS[op] == module, left))
        command = ["-m", module, *together, *flags, "--json", str(file)]
        ended |= here.run({f"{name}-{turn}": command})
        begun = {row["op"] for row in read(file, {"cases": []})["cases"]}
        last = max((i for i, op in enumerate(together) if op in begun), default=0)
        done |= dict.fromkeys(together[:last], 0)
        status = ended[f"{name}-{turn}"].status
        if status is not None:  # that op is the last of all or ended it; stopped, it is run again
            whole = last + 1 == len(together) and status in (0, 1)
            done[together[last]] = 0 if whole else status
        known.write_text(json.dumps(done))
        left = [op for op in left if op not in done]
    found = read(file, {"cases": [], "missing": []})
    of_these = lambda key: [row for row in found[key] if row["op"] in chosen]
    rows = of_these("cases")
    missing = of_these("missing")
    named = lambda row: f"{row['op']}, {row['size']}: {row['impl']}"
    wrong = {
        "broke": {op: status for op, status in done.items() if status},
        "disagree": list(dict.fromkeys(named(row) for row in rows if row["agrees"] is False)),
        "failed": [f"{named(row)}: {row['why']}" for row in missing if row["impl"] == OURS],
    }
    result = verdict(ended, rows=len(rows), left=left, **wrong)
    return result | ({"status": "failed"} if any(wrong.values()) else {})


def pictures(here: Here) -> dict:
    """Train every decoder for a while and keep a picture of each.

    They run side by side. A training that is stopped draws a picture of where it is, which is
    enough.
    """
    flags = ["--steps", "2", "--eval-objects", "1"]
    if here.data:
        flags = "--steps 300 --sample-every 100 --warmup 20 --eval-objects 4 --workers 2".split()
        flags += ["--batch-size", "4", "--micro-batch", "4"]
    folders = {decoder: here.folder(decoder) for decoder in here.decoders("pictures")}
    commands = {}
    for decoder, folder in folders.items():
        given = [*here.size("small", decoder), *flags, "--out", str(folder)]
        commands[f"small-{decoder}"] = ["-m", f"train.{decoder}", *given]
    ended = here.run(commands, here.cores)
    found = {}
    for decoder, folder in folders.items():
        log = lines(folder / "log.jsonl")
        drawn = sorted((folder / "samples").glob("*.png"))
        found[decoder] = {"steps": len(log), "last": json.loads(log[-1]) if log else None}
        how = ended[f"small-{decoder}"]
        if drawn:
            shutil.copy(drawn[-1], here.state / f"{decoder}.png")
            if how.status is None:
                ended[f"small-{decoder}"] = Ended(0, how.seconds)
    return verdict(ended, decoders=found)


def determinism(here: Here) -> dict:
    """Train every decoder twice from one seed: weights and pictures must be the same bits."""
    flags = ["--deterministic", "--eval-objects", "1", "--steps", "20" if here.data else "2"]
    decoders = here.decoders("determinism")
    twice = {name: here.folder(name) for d in decoders for name in (f"{d}-a", f"{d}-b")}
    commands = {}
    for name, folder in twice.items():
        decoder = name[:-2]
        small = [] if here.data else SMALL[decoder].split()
        commands[f"same-{name}"] = ["-m", f"train.{decoder}", *small, *flags, "--out", str(folder)]
    result = verdict(here.run(commands, here.cores))
    differ = [d for d in decoders if not same_bits(twice[f"{d}-a"], twice[f"{d}-b"])]
    if result["status"] == "passed" and differ:
        result["status"] = "failed"
    return result | {"differ": differ}


def same_bits(first: Path, second: Path) -> bool:
    """Compare the checkpoints and pictures of two run folders."""
    patterns = "checkpoints/*.safetensors", "samples/*.png"
    found = lambda folder: [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    content = lambda folder: {file.relative_to(folder): file.read_bytes() for file in found(folder)}
    return bool(found(first)) and content(first) == content(second)


def sanitizer(here: Here) -> dict:
    """Run random cases of every op under memcheck and racecheck."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"status": "absent", "why": "there is no compute-sanitizer here"}
    commands = {}
    for tool in ("memcheck", "racecheck"):
        checked = [program, "--tool", tool, "--error-exitcode", "1", sys.executable]
        commands[tool] = [*checked, *PYTEST, "-m", "sanitizer", "--cases", "2"]
    # without torch's cache every tensor is an allocation of its own, and reading beyond it is seen
    uncached = dict(here.jobs.environment) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    jobs = replace(here.jobs, environment=uncached)
    return verdict(jobs.run(commands, here.until, 2))
