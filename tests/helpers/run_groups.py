"""Training runs in process groups of their own, and what becomes of them after a signal.

tests/prepare/test_groups.py starts this module:

    python -m tests.helpers.run_groups FOLDER FLAGS...

Reads lines "SIGNAL WORKERS WHOM" (the group, its leader or a worker of it), and for each starts a
run in a process group of its own, sends the signal once a step is logged, and prints what came of
it as a line of JSON. The runs are forked from this process, which has done nothing but import.
"""

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch._dynamo  # noqa: F401  what the first optimiser would import in every run

from tests.helpers.runs import train
from train.run import report

STEPS = 4000
SAVE_EVERY = 3000  # no save before the signal
# seconds, on a machine that has much else to do
START = 120.0
END = 20.0


def members(group: int) -> list[int]:
    """The living processes of a group, its leader first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):  # gone since
            continue
        if int(own) == group and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found, key=lambda process: (process != group, process))


def until(holds, seconds: float) -> bool:
    """Whether it came to hold in time."""
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(held)


def leave(status: int) -> None:
    """End as a program ends, but for taking its modules apart, which takes seconds."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def shoot(out: Path, number: int, workers: int, whom: str, flags: list[str]) -> dict:
    """Start a run, send it the signal, and tell what it left."""
    leader = os.fork()
    if not leader:
        os.setsid()
        said = os.open(out.with_suffix(".said"), os.O_CREAT | os.O_WRONLY)
        os.dup2(said, 1), os.dup2(said, 2)
        more = ["--workers", workers, "--steps", STEPS, "--save-every", SAVE_EVERY, "--out", out]
        status = 77  # nothing stopped it
        try:
            train(*flags, *more)
        except SystemExit as stopped:
            status = stopped.code
        leave(status)
    log = out / "log.jsonl"
    until(lambda: log.is_file() and log.read_text().count("\n") > 1, START)
    before = members(leader)
    if whom == "group":
        os.killpg(leader, number)
    else:
        os.kill(leader if whom == "leader" else before[-1], number)
    status = os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])
    alone = until(lambda: not members(leader), END)
    saved = sorted(file.name for file in (out / "checkpoints").glob("step_*.safetensors"))
    result = dict(
        processes=len(before), status=status, gone=alone, steps=log.read_text().count("\n")
    )
    return result | dict(saved=saved, worker=before[-1], said=out.with_suffix(".said").read_text())


def main() -> None:
    """Answer line by line."""
    report.curves = lambda *_: None  # seconds of drawing, which no signal meets
    folder = Path(sys.argv[1])
    flags = sys.argv[2:]
    for i, line in enumerate(sys.stdin):
        name, workers, whom = line.split()
        print(
            json.dumps(shoot(folder / f"run{i}", signal.Signals[name], int(workers), whom, flags)),
            flush=True,
        )
    leave(0)


if __name__ == "__main__":
    main()
