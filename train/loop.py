"""The training loop of every decoder: `main` reads the flags, `fit` runs, `Run.step` is the one
function that trains.

A step takes `batch_size` objects over all ranks, in micro-batches. What it draws (views, posterior
noise, backgrounds) depends only on the seed, the step and the object's place in the batch, so
neither the number of ranks nor an interruption changes it; where the rays of a radiance field start
depends on the rank too. Loss terms are means over a micro-batch, as published, averaged over
micro-batches and ranks.
"""

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from models.finite import NotFinite
from train.config import Config, from_cli
from train.evaluate import conclude
from train.losses.objective import Compare
from train.losses.pictures import Pictures
from train.run import report
from train.run.folder import locked, new_folder
from train.run.machine import Interrupt, machine, world_size
from train.run.progress import Progress
from train.run.resume import Rescue, way_back, way_on
from train.run.threads import computing
from train.trainer import Build, Run

PATIENCE = 20  # steps in a row that are skipped, at the least loss scale, before a run stops


def fit(run: Run) -> None:
    """Train to the last step with a progress line, checkpoints and pictures, then conclude.

    Ctrl-C or SIGTERM end the run after the step under way: it saves, says how to continue and exits
    with 128 + the signal. An error saves first. Raises NotFinite on every rank after PATIENCE
    skipped steps in a row, and where what is to be saved is not finite.
    """
    config, here, folder = run.config, run.here, run.folder
    if here.leads:
        loss = run.recipe
        data = run.objects.summary()
        print(report.header(run.script, config, here, run.vae, loss, data, folder), flush=True)
    with (
        Interrupt() as interrupt,
        Rescue(run.unsaved, run.save),
        report.Log(folder / "log.jsonl", run.done) if here.leads else nullcontext() as log,
        Progress(config.steps, run.done, shown=here.leads) as progress,
    ):
        begin = time.perf_counter() - (log.seconds if here.leads else 0)
        due = False
        for batches in run.objects.steps():
            row = run.step(batches)
            stop = (
                here.mean(torch.full((), float(interrupt.received), device=here.device)).item() > 0
            )
            last = run.done == config.steps or stop
            due |= run.done % config.save_every == 0
            # weights that may be why steps are skipped would push sound ones out
            saves = last or (due and not run.optimizer.stuck)
            if here.leads:
                log.write(row | {"seconds": round(time.perf_counter() - begin, 3)})
                progress.update(report.note(row), now=saves)
            if run.optimizer.stuck >= PATIENCE:
                steps = f"{PATIENCE} steps in a row were skipped, the last is step {run.done}"
                raise NotFinite(f"{steps}: {run.why(batches)}")
            if saves:
                run.save()  # before the pictures: what is wrong with one must not cost the steps
                due = False
            if here.leads and (last or run.done % config.sample_every == 0):
                run.sample()
                report.curves(log.rows, run.weights, folder / "curves.png")
            if stop:
                break
    if run.done < config.steps:
        if here.leads:
            print(f"stopped at step {run.done}; {way_on(run.script, folder)}")
        raise SystemExit(128 + (interrupt.received or signal.SIGTERM))
    if here.leads:
        conclude(run)


def main(
    script: str,
    presets: Mapping[str, Config],
    build: Build,
    argv: Sequence[str] | None = None,
    compare: Compare = Pictures,
) -> None:
    """The command line of a training script.

    Wrong flags, data, folders and files end with a message and status 2, whenever they are met; a
    disk that is full, or fails, with a message and status 1; numbers that are not finite with
    status 3, or 2 before the training; a second Ctrl-C with status 130. Once there is a folder, the
    message says how to go on.
    """
    config = from_cli(script, presets, argv, world_size())
    here = run = None
    with ExitStack() as stack:
        try:
            here = stack.enter_context(machine(config.device, config.deterministic))
            folder = config.resume
            threads = stack.enter_context(computing(config, here.device))
            here = replace(here, threads=threads)
            config = replace(config, threads=config.threads or threads.number)
            if here.leads and config.resume:
                stack.enter_context(locked(Path(config.resume)))  # before anything in it is read
            began = Run(script, config, build, here, compare)
            if here.leads and not config.resume:
                folder = stack.enter_context(new_folder(script, config.out))
            began.enter(Path(here.agree(folder)))
            run = began
            fit(run)
        except (ValueError, OSError, KeyboardInterrupt) as error:
            stopped = isinstance(error, KeyboardInterrupt)
            diverged = run is not None and isinstance(error, NotFinite)
            what = "interrupted" if stopped else f"error: {error}"
            lines = [f"python -m train.{script}: {what}"]
            if run:
                lines.append((way_back if diverged else way_on)(script, run.folder))
            if here is None or here.leads or not diverged:  # all ranks have diverged, one says so
                print("\n" + "\n".join(lines), file=sys.stderr)
            failed = 1 if run and isinstance(error, OSError) else 2
            raise SystemExit(130 if stopped else 3 if diverged else failed) from error
        except RuntimeError:  # of the device, or a fault of ours: its traceback is wanted
            if run:
                print(way_on(script, run.folder), file=sys.stderr)
            raise
