"""Training runs in processes of their own, of one rank or several, which tests kill.

They are forked from a process that has imported everything: starting Python would take ten times
as long as such a run. `torchrun` stands for the program of that name: it starts the ranks, ends
them when one has failed, and starts them again.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  what the first optimiser would import in every run
import torch.distributed as dist

from train import loop
from train.decoders import DECODERS
from train.losses.objective import Objective
from train.run import ranks, report

MODULE = "tests.helpers.forks"
KILL = 8.0  # seconds from torchrun's SIGTERM to its SIGKILL, there 30


def fail(fault: str, at: int) -> None:
    """Let this process fail in its forward pass number `at`."""
    whole = Objective.forward
    calls = 0

    def forward(self, *args):
        nonlocal calls
        calls += 1
        if calls == at:
            if fault in ("SIGKILL", "SIGSTOP", "SIGTERM"):
                os.kill(os.getpid(), signal.Signals[fault])
            elif fault == "exit":
                os._exit(5)
            elif fault == "hang":
                ranks.TIMEOUT = 2 * ranks.BEAT
                time.sleep(1000)
            else:
                raise {"value": ValueError, "device": RuntimeError, "bug": KeyError}[fault](
                    "what is wrong"
                )
        return whole(self, *args)

    Objective.forward = forward


def _light(self, x, noise, batch, background):
    """A forward pass through every weight and nothing else, in the place of Objective's."""
    loss = sum(p.square().mean() for p in self.vae.parameters())
    return loss, {"loss": loss, **dict.fromkeys(self.weights, loss), "psnr": 20 - loss}


def _serve(
    script: str,
    flags: Sequence,
    said: Path,
    folder: Path,
    environment: dict,
    fault: str,
    timeout: float,
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    if fault != "light":
        report.curves = lambda *_: None  # seconds of drawing, which nothing here meets
    ranks.TIMEOUT = timeout
    ranks.GRACE = KILL / 2
    if fault == "light":
        Objective.forward = _light
        report.POINTS = 200  # that the rows of the curves are soon as many as they may be
    elif fault:
        name, at = fault.split(":")
        fail(name, int(at))
    recipe = DECODERS[script]
    status = 0
    try:
        loop.main(script, recipe.presets, recipe.build, [*map(str, flags)], recipe.loss)
    except SystemExit as stopped:
        status = stopped.code
    except BaseException:  # as the interpreter does with what nobody catches, Ctrl-C too
        sys.excepthook(*sys.exc_info())
        status = 1
    # as a program ends, but for taking its modules apart, which takes seconds
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Fork:
    """A run in a process group of its own; `said` is the file of what it prints.

    `fault` is "NAME:N", what happens in forward pass N, or "light": a model that computes nothing.
    """

    def __init__(
        self,
        script: str,
        flags: Sequence,
        said: Path,
        folder: Path | None = None,
        environment: dict | None = None,
        fault: str = "",
        timeout: float = ranks.TIMEOUT,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([MODULE])
        self.said = said
        args = (script, flags, said, folder or said.parent, environment or {}, fault, timeout)
        self._process = context.Process(target=_serve, args=args)
        self._process.start()

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.exitcode

    @property
    def pid(self) -> int:
        """The number of the process, and of its group."""
        return self._process.pid

    def wait(self, seconds: float) -> int | None:
        """Wait for the end; its status, None where it does not come in time."""
        self._process.join(seconds)
        return self.status

    def send(self, number: signal.Signals, group: bool = False) -> None:
        """Send a signal to the run, or to its data workers too."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self._process.pid, number)

    def end(self) -> None:
        """Kill what is left of it."""
        self.send(signal.SIGKILL, group=True)
        self._process.join()


@contextmanager
def torchrun(
    script: str,
    flags: Sequence,
    folder: Path,
    restarts: int = 0,
    fault: str = "",
    victim: int = 1,
    world: int = 2,
    agent: bool = True,
    timeout: float = ranks.TIMEOUT,
    leaves: Path | None = None,
) -> Iterator[Callable[[float], list[list[int]]]]:
    """Start ranks as torchrun does; yields what waits for them, and returns their statuses.

    They are those of each start. In the first of them rank `victim` has the fault. What the ranks
    print is in FOLDER/said. Without an `agent` something else starts them, and rank 0 holds
    what they meet at. With `leaves`, torchrun dies once that file is there.
    """
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    port = stores[0].port
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    if agent:
        shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        shared["TORCHELASTIC_RUN_ID"] = "none"
        shared["GROUP_WORLD_SIZE"] = "1"
    else:
        stores.clear()  # the port is free again
    running: list[Fork] = []

    def start(count: int) -> None:
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if agent:
                error = folder / "none_x" / f"attempt_{count}" / str(rank) / "error.json"
                own["TORCHELASTIC_RESTART_COUNT"] = str(count)
                own["TORCHELASTIC_ERROR_FILE"] = str(error)
            damage = fault if count == 0 and rank == victim else ""
            running.append(
                Fork(script, flags, folder / "said", folder, shared | own, damage, timeout),
            )

    def wait(seconds: float) -> list[list[int]]:
        statuses = []
        end = time.monotonic() + seconds
        for count in range(restarts + 1):
            if count:
                start(count)
            while time.monotonic() < end:
                if leaves and leaves.is_file():
                    stores.clear()
                found = [fork.status for fork in running]
                if all(status == 0 for status in found) or any(found):
                    break
                time.sleep(0.05)
            for fork in running:
                if fork.status is None and stores:
                    fork.send(signal.SIGTERM)
            for fork in running:
                if fork.wait(KILL if stores else max(0.0, end - time.monotonic())) is None:
                    fork.end()
            statuses.append([fork.status for fork in running])
            running.clear()
            if not any(statuses[-1]):
                break
        return statuses

    try:
        start(0)
        yield wait
    finally:
        for fork in running:
            fork.end()
