"""Run commands side by side within a time limit, and share the time among the steps of a plan."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

GRACE = 15.0  # seconds to save what there is, after the first signal


@dataclass(frozen=True)
class Step:
    """A part of a plan, which is a list with the most valuable first."""

    name: str
    least: float  # seconds below which it is not worth beginning
    share: float  # of the time that is left after everybody's least


def allotted(left: float, steps: Sequence[Step]) -> float | None:
    """Compute the seconds of the first of the steps; None where `left` seconds are too few.

    Every step gets its least, and its share of what is left after that. Where the least of all is
    more than there is, the last steps get nothing.
    """
    steps = list(steps)
    while steps and sum(step.least for step in steps) > left:
        steps.pop()
    if not steps:
        return None
    extra = left - sum(step.least for step in steps)
    return steps[0].least + extra * steps[0].share / sum(step.share for step in steps)


@dataclass(frozen=True)
class Ended:
    """The end of a command."""

    status: int | None  # exit status, negative for a signal; None: stopped, or never begun
    seconds: float


class _Running:
    def __init__(self, command: Sequence[str], log: Path, cwd: Path, environment: Mapping):
        self.began = time.monotonic()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def signal(self, number: int) -> None:
        """Send a signal to the command alone: what it started is its own to end."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """End the command with everything that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Jobs:
    """Runs commands in a folder with an environment."""

    logs: Path  # NAME.log of every command
    cwd: Path
    environment: Mapping[str, str]
    meanwhile: Callable[[], object] = lambda: None  # called again and again while commands run
    grace: float = GRACE
    stopped: threading.Event = field(default_factory=threading.Event)  # set: every limit is now

    def run(
        self, commands: Mapping[str, Sequence[str]], until: float, at_once: int = 1
    ) -> dict[str, Ended]:
        """Run commands and return how each ended; what runs at `until` is stopped.

        `until` is a time of time.monotonic. May be called by several threads. What is stopped gets
        SIGINT, and what is left of its process group SIGKILL after a grace. No group is left
        behind, whatever ends this.
        """
        waiting = dict(commands)
        running = {}
        ended = {}
        with ExitStack() as stack:
            while (waiting or running) and time.monotonic() < until and not self.stopped.is_set():
                while waiting and len(running) < at_once:
                    name = next(iter(waiting))
                    command = waiting.pop(name)
                    log = self.logs / f"{name}.log"
                    running[name] = _Running(command, log, self.cwd, self.environment)
                    stack.callback(running[name].kill)
                self._collect(running, ended)
                self.meanwhile()
                time.sleep(0.1)
            ended |= {name: Ended(None, job.seconds()) for name, job in running.items()}
            ended |= {name: Ended(None, 0.0) for name in waiting}
            for job in running.values():
                job.signal(signal.SIGINT)
            last = time.monotonic() + self.grace
            while running and time.monotonic() < last:
                self._collect(running, {})
                time.sleep(0.1)
        return {name: ended[name] for name in commands}

    def _collect(self, running: dict[str, _Running], ended: dict[str, Ended]) -> None:
        for name, job in list(running.items()):
            status = job.process.poll()
            if status is not None:
                ended[name] = Ended(status, job.seconds())
                job.kill()  # what it left behind
                del running[name]
