"""Score a trained checkpoint by a named protocol, beside floors and a ceiling.

python -m train.evaluate runs/gaussian-001 --protocol held-out
python -m train.evaluate RUN --data DIR --meshes MESHES --protocol trellis-r2-fov40 --lpips FILE
python -m train.evaluate PREFIX --encoder PREFIX --data DIR --protocol trellis2-normal4
torchrun --nproc-per-node 8 -m train.evaluate RUN --data DIR --protocol trellis2-normal4

The protocol is printed with every number that it has, and written beside the scores. An interrupted
call goes on where it stopped; the numbers do not depend on how many ranks share the work.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from models.files import write_whole
from train.evaluate import kept, tables
from train.evaluate.job import SPLITS, Job
from train.evaluate.measure import OURS, Record
from train.evaluate.protocols import MESH, PROTOCOLS, VIEWS
from train.flags import OneLineParser, exit_status
from train.run import report
from train.run.folder import locked, made
from train.run.machine import Machine, machine
from train.run.progress import Progress

COMMAND = "python -m train.evaluate"
OUT = "evaluations"  # folder of the evaluations that are given none


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    as_written = argparse.RawDescriptionHelpFormatter
    p = OneLineParser(COMMAND, description=__doc__, formatter_class=as_written)
    p.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="the folder of a finished run, or a decoder's PREFIX.json + PREFIX.safetensors",
    )
    p.add_argument(
        "--encoder",
        type=Path,
        help="the encoder of a decoder's prefix, or where a run's frozen one is now",
    )
    p.add_argument(
        "--data",
        action="append",
        metavar="DIR",
        help="dataset folder; may be repeated (default: that of the run)",
    )
    p.add_argument(
        "--protocol",
        default="trellis-r2-fov40",
        metavar="NAME",
        help=f"{', '.join(PROTOCOLS)} (default: trellis-r2-fov40)",
    )
    p.add_argument(
        "--out",
        type=Path,
        help=f"folder of the scores (default: {OUT}/CHECKPOINT-PROTOCOL); an unfinished evaluation "
        "there goes on",
    )
    p.add_argument(
        "--meshes",
        type=Path,
        metavar="FOLDER",
        help="where train.prepare read the meshes, for true colours (default: the dataset)",
    )
    p.add_argument(
        "--truth",
        choices=(MESH, VIEWS),
        help="true colours: cast from the source mesh, or the dataset's held-out views",
    )
    p.add_argument("--size", type=int, help="pixels a side, where not the protocol's")
    p.add_argument("--samples", type=int, help="points on a surface, where not the protocol's")
    p.add_argument("--lpips", type=Path, metavar="FILE", help="LPIPS weights (train.lpips)")
    p.add_argument(
        "--split", choices=tuple(SPLITS), default="all", help="objects to score (default: all)"
    )
    p.add_argument("--objects", type=int, help="score only the first so many")
    p.add_argument(
        "--holdout-views", type=int, help="held-out views an object (default: as the run)"
    )
    p.add_argument(
        "--no-floors", action="store_true", help="score the checkpoint alone: no floors, no ceiling"
    )
    p.add_argument(
        "--batch", type=int, default=4, help="objects decoded and drawn at once (default: 4)"
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 2 for what cannot be, 130 where interrupted.

    What was scored until then is kept, and the same command goes on.
    """
    args = parser().parse_args(arguments)
    here = None

    def ranks() -> None:
        nonlocal here
        with machine(args.device) as here:
            run(args, here)

    again = "interrupted: the same command goes on"
    return exit_status(COMMAND, ranks, again, lambda: here is None or here.is_main)


def run(args: argparse.Namespace, here: Machine) -> None:
    """Score all objects, print the table and write it.

    Rank 0 alone writes. Raises ValueError or OSError, on every rank, for what cannot be.
    """
    job = _agreed(here, lambda: Job(args, here.device))
    folder = args.out or Path(OUT) / f"{job.trained.label}-{args.protocol}"
    with ExitStack() as stack:
        found = _agreed(here, lambda: _enter(folder, job, stack) if here.is_main else None)
        found = here.broadcast(found)
        if here.is_main:
            print(job.protocol.text())
            print(f"objects: {job.truth.dataset.summary()}", flush=True)
        records = found | _score(job, found, args.batch, here, folder)
        if here.is_main:
            _conclude(job, [records[name] for name in job.names], folder, here)


def _agreed(here: Machine, step):
    """Do a step; where one rank fails, all raise ValueError with what the first of them says."""
    error = result = None
    try:
        result = step()
    except (ValueError, OSError) as failed:
        error = str(failed)
    first = next((one for one in here.gather(error) if one is not None), None)
    if first is not None:
        raise ValueError(first)
    return result


def _enter(folder: Path, job: Job, stack: ExitStack) -> dict[str, Record]:
    """Take the folder, and read what an earlier call has left there."""
    stack.enter_context(made(folder))
    stack.enter_context(locked(folder))
    stack.callback(kept.tidy, folder)
    kept.check_settings(folder, job.settings)
    return kept.read_records(folder, job.names)


def _score(
    job: Job, found: dict[str, Record], batch: int, here: Machine, folder: Path
) -> dict[str, Record]:
    """Score the objects that have no scores yet, a batch a rank at a time.

    What is in a batch does not depend on the ranks or on what is there: so its bits do not either.
    """
    batches = [job.names[first : first + batch] for first in range(0, len(job.names), batch)]
    todo = [names for names in batches if not all(name in found for name in names)]
    done = len(job.names) - sum(map(len, todo))
    new: dict[str, Record] = {}
    with Progress(len(job.names), done, "object", here.is_main) as progress:
        for turn in _turns(todo, here.world):
            own = turn[here.rank] if here.rank < len(turn) else []
            scored = _agreed(here, lambda own=own: job.evaluator.records(own) if own else [])
            if here.is_main and not new:
                kept.write_settings(folder, job.settings)
            for records in here.gather(scored):
                for record in records:
                    new[record.name] = record
                    if here.is_main:
                        kept.write_record(folder, record)
                if records:
                    first, value = next(iter(records[-1].scores[OURS].items()))
                    progress.update(f"{first} {value:.2f}", count=len(records))
    return new


def _turns(batches: list[list[str]], world: int) -> Iterator[list[list[str]]]:
    for first in range(0, len(batches), world):
        yield batches[first : first + world]


def _conclude(job: Job, records: list[Record], folder: Path, here: Machine) -> None:
    """Print the means, and write them, the line of each object and the worst ones' pictures."""
    found = tables.summary(records)
    missing = job.not_computed()
    device = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "CPU"
    content = {"path": job.trained.path} | job.settings
    content |= {
        "objects": len(records),
        "left_out": dict(job.truth.dataset.skipped),
        "not_computed": missing,
        "scores": {
            split: {row: report.jsonable(values) for row, values in rows.items()}
            for split, rows in found.items()
        },
        "versions": {"torch": torch.__version__, "device": device},
    }
    tables.write_objects(records, folder / "objects.csv")
    tables.draw_worst(
        records, job.evaluator.shown, f"{job.protocol.name}: the worst", folder / "worst.png"
    )
    write_whole(folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
    print(tables.table(found))
    for line in missing:
        print(line)
    print(f"(every object in {folder / 'objects.csv'}, the worst in {folder / 'worst.png'})")
