"""The training loop of every decoder: `main` reads the flags, `fit` runs.

`train.trainer.Run.step` is the one function that trains.
"""

import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from models.finite import NotFinite
from train.flags import from_cli
from train.run import memory, report
from train.run.board import Board, check_installed
from train.run.folder import continued, launch, locked, new_folder
from train.run.machine import Interrupt, machine, world_size
from train.run.progress import Progress
from train.run.resume import SaveOnError, recovery_hint, resume_command, retried
from train.run.threads import computing
from train.scores import conclude, save_samples
from train.trainer import Build, Loss, PictureLoss, Presets, Run

PATIENCE = 20  # steps in a row that are skipped, at the least loss scale, before a run stops


def _any_rank_stops(run: Run, interrupt: Interrupt) -> bool:
    """Return whether any rank has received a signal to stop."""
    if run.here.world == 1:
        return bool(interrupt.received)  # nothing waits for the device
    received = torch.full((), float(interrupt.received), device=run.here.device)
    return run.here.mean(received).item() > 0


def fit(run: Run) -> None:
    """Train to the last step with a progress line, checkpoints and pictures, then conclude.

    Ctrl-C or SIGTERM ends the run after the step under way: it saves, says how to continue and
    exits with 128 + the signal. If an error ends the run, it saves first. Raises NotFinite on every
    rank after PATIENCE skipped steps in a row, and where what is to be saved is not finite.
    """
    config = run.config
    folder = run.folder
    is_main = run.here.is_main
    wanted = is_main and config.tensorboard
    if is_main:
        formula = report.formula(run.weights, run.off)
        data = run.objects.summary()
        header = report.header(run.script, config, run.here, run.vae, formula, data, folder)
        if run.memory:
            header = f"{header}\n{run.memory}"
            run.memory.write(folder)
        print(header, flush=True)
    with (
        Interrupt() as interrupt,
        SaveOnError(run.unsaved, run.save),
        report.Log(folder / "log.jsonl", run.done) if is_main else nullcontext() as log,
        Board(folder / "tensorboard" if wanted else None, run.done) as board,
        Progress(config.steps, run.done, shown=is_main) as progress,
    ):
        write = partial(retried, stopped=lambda: bool(interrupt.received))
        begin = time.perf_counter() - (log.seconds if is_main else 0)
        due = False
        for batches in run.objects.steps():
            row = run.step(batches)
            stop = _any_rank_stops(run, interrupt)
            last = run.done == config.steps or stop
            due |= run.done % config.save_every == 0
            # while steps are skipped, the weights may be why: saving them would push out sound ones
            saves = last or (due and not run.optimizer.stuck)
            if is_main:
                seconds = round(time.perf_counter() - begin, 3)
                write(partial(log.write, row | {"seconds": seconds}))
                board.row(row)
                progress.update(report.note(row), now=saves)
            if run.optimizer.stuck >= PATIENCE:
                steps = f"{PATIENCE} steps in a row were skipped, the last is step {run.done}"
                raise NotFinite(f"{steps}: {run.explain(batches)}")
            if saves:
                write(run.save)  # before the pictures: one that fails must not cost the steps
                due = False
            if is_main and (last or run.done % config.sample_every == 0):
                write(lambda: board.picture(save_samples(run), run.done))
                write(partial(report.curves, log.rows, run.weights, folder / "curves.png"))
            run.here.beat()
            if stop:
                break
    if run.done < config.steps:
        if is_main:
            print(f"stopped at step {run.done}; {resume_command(run.script, folder)}")
        raise SystemExit(128 + (interrupt.received or signal.SIGTERM))
    run.here.leave()  # what follows may take long
    if is_main:
        conclude(run)


def _message(script: str, rank: str, run: Run | None, error: BaseException) -> str:
    """Write the message of a run that an error ends: the error, and how to go on."""
    what = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
    lines = [f"python -m train.{script}{rank}: {what}"]
    if run and isinstance(error, NotFinite):
        lines.append(recovery_hint(script, run.folder))
    elif run:
        lines.append(resume_command(script, run.folder))
    if run and isinstance(error, MemoryError):
        lines.append("with --memory-gb N below what the device has, a step takes less at once")
    return "\n" + "\n".join(lines)


def _status(run: Run | None, error: BaseException) -> int:
    """The exit status of a run that an error ends."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if run and isinstance(error, NotFinite):
        return 3
    if run and isinstance(error, OSError | MemoryError):
        return 1
    return 2


def main(
    script: str,
    presets: Presets,
    build: Build,
    argv: Sequence[str] | None = None,
    loss: type[Loss] = PictureLoss,
) -> None:
    """Run the command line of a training script.

    Wrong flags, data, folders and files end with a message and status 2, whenever they are met; a
    disk that is full, or fails, and a device without memory with a message and status 1; numbers
    that are not finite with status 3, or 2 before the training; a second Ctrl-C, or one outside the
    training steps, with status 130. Once there is a folder, the message says how to go on.
    """
    config = from_cli(script, presets, argv, world_size())
    here = None
    run = None  # set once the run has its folder
    with ExitStack() as stack:
        try:
            if config.tensorboard:
                check_installed()
            here = stack.enter_context(machine(config.device, config.deterministic))
            launches = here.gather(launch())
            config = continued(script, presets, config, here, launches)
            folder = config.resume
            threads = stack.enter_context(computing(config, here.device))
            here = replace(here, threads=threads)
            config = replace(config, threads=config.threads or threads.number)
            if here.is_main and config.resume:
                stack.enter_context(locked(Path(config.resume)))  # before anything in it is read
            began = Run(script, config, build, here, loss)
            memory.fit(began)
            if here.is_main and not config.resume:
                folder = stack.enter_context(new_folder(script, config.out, launches))
            began.enter(Path(here.broadcast(folder)))
            run = began
            here.hint(resume_command(script, run.folder))
            fit(run)
        except (ValueError, OSError, MemoryError, KeyboardInterrupt) as error:
            if here is None or here.speaks():
                rank = here.name if here else ""
                print(_message(script, rank, run, error), file=sys.stderr)
            raise SystemExit(_status(run, error)) from error
        except RuntimeError as error:
            if here and here.echoes(error):
                raise SystemExit(1) from error
            # of the device, or a fault of ours: its traceback is wanted
            if run and here.speaks():
                print(resume_command(script, run.folder), file=sys.stderr)
            raise
