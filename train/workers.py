"""Worker processes that answer questions, and end with the process that asks.

They read batches for a run, and meshes for train.prepare.command. Each has a pipe of its own and
shares no lock with another, so one that dies takes nothing along: whoever waits for its answer
learns at once that none will come, and why.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, cycle
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# what terminals and schedulers send to a whole process group
STOPS = (signal.SIGINT, signal.SIGTERM)
AHEAD = 2  # questions that a process has before their answers are needed
GRACE = 0.5  # seconds for the answer under way, of a process that is asked to end
WATCH = 0.5  # seconds between two looks at whether the parent lives
PERHAPS = {
    signal.SIGKILL: ", perhaps because memory ran out: fewer --workers need less",
    signal.SIGBUS: ", perhaps because shared memory is full: enlarge /dev/shm",
}


@dataclass(frozen=True)
class _Failure:
    """Stands in the place of an answer."""

    # None: of another kind, and the last words of its process
    kind: type[ValueError] | type[OSError] | None
    message: str


class Worker:
    """A process that answers one question after the other with `answer(question)`.

    It ignores the signals `ignored` from its first moment on: its parent hears them and decides. It
    ends when it is asked to, and within a second of its parent, however that ended. ValueError and
    OSError of `answer` are raised where the answer is awaited, and the process goes on; any other
    error ends it. What awaits an answer of a process that ended, killed or by such an error, raises
    ChildProcessError: one line that says which process it was and why.
    """

    def __init__(
        self, name: str, answer: Callable, context: BaseContext, ignored: Sequence[signal.Signals]
    ):
        self.name = name
        # multiprocessing.connection.wait says which of several has an answer
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, answer, ignored), daemon=True)
        # inherited: none comes before it is ignored
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ignored)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        atexit.register(self.end)  # before multiprocessing waits for what ignores its SIGTERM

    @property
    def alive(self) -> bool:
        """True while it can be asked."""
        return self._process.is_alive()

    def ask(self, question) -> None:
        """Hand over a question, to be answered after those before it."""
        with suppress(ConnectionError):  # what awaits the answer hears of the death
            self.pipe.send(question)

    def answer(self):
        """Wait for the answer to the oldest question; raises what stands in its place."""
        try:
            answer = self.pipe.recv()
        # the last two: of shared tensors, whose owner died since
        except (EOFError, OSError, RuntimeError) as error:
            self._raise_death(error)
        if not isinstance(answer, _Failure):
            return answer
        if answer.kind is None:
            raise ChildProcessError(f"{self._who()} failed: {answer.message}")
        raise answer.kind(answer.message)

    def end(self, grace: float = GRACE) -> None:
        """Tell the process to end, kill it after `grace` seconds, and wait until it is gone."""
        atexit.unregister(self.end)
        self._dismiss()
        self._process.join(grace)
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _dismiss(self) -> None:
        with suppress(OSError):  # it is gone already
            self.pipe.send(None)

    def _who(self) -> str:
        return f"{self.name} (process {self._process.pid})"

    def _raise_death(self, error: Exception):
        self._process.join(1)  # its pipe closes just before it is gone
        code = self._process.exitcode
        if code is None:
            raise error
        if code < 0:
            ended = f"was ended by {signal.Signals(-code).name}{PERHAPS.get(-code, '')}"
        else:
            ended = f"ended with status {code}"
        raise ChildProcessError(f"{self._who()} {ended}") from error


def end(workers: Sequence[Worker], grace: float = GRACE) -> None:
    """End several at once."""
    for worker in workers:
        worker._dismiss()
    for worker in workers:
        worker.end(grace)


def read_ahead(name: str, read: Callable, questions: Iterator, workers: int) -> Iterator:
    """Yield `read(question)` of every question, in their order, by `workers` processes.

    Some questions are answered before they are needed. The processes end with the iterator, whether
    it is closed, dropped or raises what Worker.answer raises.
    """
    context = multiprocessing.get_context()
    team = []
    turns = deque()
    try:
        for number in range(workers):
            team.append(Worker(f"{name} {number}", read, context, STOPS))
        for worker, question in zip(cycle(team), questions, strict=False):
            worker.ask(question)
            turns.append(worker)
            if len(turns) > AHEAD * workers:
                yield turns.popleft().answer()
        while turns:
            yield turns.popleft().answer()
    finally:
        end(team)


def answers(
    name: str, answer: Callable, questions: Sequence[T], workers: int
) -> Iterator[tuple[T, object]]:
    """Yield each question with its answer, as they come, from `workers` processes.

    A process has one question at a time. In the place of an answer stands the error that
    Worker.answer raises: a ChildProcessError where a process died of the question; a new one goes
    on. Of signals to the group they ignore Ctrl-C alone. They end with the iterator.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(questions)
    busy = {}
    idle = []
    begun = count()
    try:
        while waiting or busy:
            # a fork of a process with threads can hang: spawn
            while waiting and len(busy) < workers:
                while idle and not idle[-1].alive:
                    idle.pop().end(grace=0)
                worker = (
                    idle.pop()
                    if idle
                    else Worker(f"{name} {next(begun)}", answer, context, STOPS[:1])
                )
                busy[worker.pipe] = worker, waiting.popleft()
                worker.ask(busy[worker.pipe][1])
            for pipe in wait(list(busy)):
                worker, question = busy.pop(pipe)
                try:
                    result = worker.answer()
                    idle.append(worker)
                except ChildProcessError as error:
                    worker.end(grace=0)
                    result = error
                except (ValueError, OSError) as error:
                    idle.append(worker)
                    result = error
                yield question, result
    finally:
        end([*idle, *(worker for worker, _ in busy.values())], grace=0)


def _serve(pipe: Connection, answer: Callable, ignored: Sequence[signal.Signals]) -> None:
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)  # forgets one that waits
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    with suppress(EOFError, ConnectionError):  # nobody asks any more
        while (question := pipe.recv()) is not None:
            _reply(pipe, answer, question)


def _reply(pipe: Connection, answer: Callable, question) -> None:
    replied = False
    try:
        try:
            result = answer(question)
        except ValueError as error:
            result = _Failure(ValueError, str(error))
        except OSError as error:
            result = _Failure(OSError, str(error))
        pipe.send(result)
        replied = True
    # no handler: an error that nobody foresaw ends this process, once it has said what it was
    finally:
        if not replied:
            with suppress(OSError):
                pipe.send(_Failure(None, _last_words(sys.exception())))
            os._exit(1)


def _last_words(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} ({Path(place.filename).name}, line {place.lineno})"


def _leave_with(parent: int) -> None:
    """End this process once its parent is gone.

    A pipe does not tell, for the parent's other children hold its end too.
    """
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)
