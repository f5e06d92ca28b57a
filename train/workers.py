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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from itertools import cycle
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
# by the name of a signal, not all of which every system has
PERHAPS = {
    "SIGKILL": ", perhaps because memory ran out: fewer --workers need less",
    "SIGBUS": ", perhaps because shared memory is full: enlarge /dev/shm",
}


class _Begun(Enum):
    """The word of a process that has begun on a question."""

    BEGUN = "begun"


BEGUN = _Begun.BEGUN


@dataclass(frozen=True)
class _Failure:
    """Stands in the place of an answer."""

    # None: of another kind, and the last words of its process
    kind: type[ValueError] | type[OSError] | None
    message: str


class Worker:
    """A process that answers one question after the other with `answer(question)`.

    It ignores the signals `ignored` from its first moment on: its parent hears them and decides. If
    it `tells`, BEGUN comes before each answer, once it has begun on the question. It ends when it
    is asked to, and within a second of its parent, however that ended. ValueError and OSError of
    `answer` are raised where the answer is awaited, and the process goes on; any other error ends
    it. What awaits an answer of a process that ended, killed or by such an error, raises
    ChildProcessError: one line that says which process it was and why.
    """

    def __init__(
        self,
        name: str,
        answer: Callable,
        context: BaseContext,
        ignored: Sequence[signal.Signals],
        tells: bool = False,
    ):
        self.name = name
        # multiprocessing.connection.wait says which of several has an answer
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, answer, ignored, tells), daemon=True
        )
        with _blocked(ignored):  # inherited: none comes before it is ignored
            self._process.start()
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
            raise ChildProcessError(f"{self} failed: {answer.message}")
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

    def __str__(self) -> str:
        return f"{self.name} (process {self._process.pid})"

    def _raise_death(self, error: Exception):
        self._process.join(1)  # its pipe closes just before it is gone
        code = self._process.exitcode
        if code is None:
            raise error
        if code < 0:
            name = signal.Signals(-code).name
            ended = f"was ended by {name}{PERHAPS.get(name, '')}"
        else:
            ended = f"ended with status {code}"
        raise ChildProcessError(f"{self} {ended}") from error


@contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Hold signals back inside the block, where the system can: Windows cannot."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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


class Team:
    """Processes that each have one question at a time, `answer(question)` being what they do.

    A process has `seconds` for a question, without them any time: one that takes longer is killed,
    and a new one goes on. Of signals to the group they ignore Ctrl-C alone. They end with the
    `with` statement. With no `workers` all is done in this process, in any time.
    """

    def __init__(self, name: str, answer: Callable, workers: int, seconds: float | None = None):
        self.name = name
        self.answer = answer
        self.workers = workers
        self.seconds = seconds
        self._context = multiprocessing.get_context("spawn")  # a fork with threads can hang
        self._idle: list[Worker] = []
        self._busy: dict[Connection, _Turn] = {}
        self._begun = 0  # processes

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *error) -> None:
        end([*self._idle, *(turn.worker for turn in self._busy.values())], grace=0)

    def answers(self, questions: Iterable[T]) -> Iterator[tuple[T, object]]:
        """Yield each question with its answer, as they come.

        In the place of an answer stands the error that Worker.answer raises, a ChildProcessError
        where a process died of the question, or a TimeoutError.
        """
        if not self.workers:
            yield from ((question, self.answer(question)) for question in questions)
            return
        waiting = deque(questions)
        while waiting or self._busy:
            while waiting and len(self._busy) < self.workers:
                worker = self._free()
                question = waiting.popleft()
                self._busy[worker.pipe] = _Turn(worker, question)
                worker.ask(question)
            ends = [turn.end for turn in self._busy.values() if turn.end is not None]
            patience = max(0.0, min(ends) - time.monotonic()) if ends else None
            ready = wait(list(self._busy), patience)
            late = [
                pipe
                for pipe, turn in self._busy.items()
                if pipe not in ready and turn.end is not None and turn.end <= time.monotonic()
            ]
            for pipe in [*ready, *late]:
                turn = self._busy[pipe]
                result = self._result(turn, pipe in late)
                if result is BEGUN:
                    turn.end = time.monotonic() + self.seconds if self.seconds else None
                    continue
                del self._busy[pipe]
                yield turn.question, result

    def _free(self) -> Worker:
        """A process without a question."""
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            worker.end(grace=0)
        name = f"{self.name} {self._begun}"
        self._begun += 1
        return Worker(name, self.answer, self._context, STOPS[:1], tells=True)

    def _result(self, turn: "_Turn", late: bool):
        """What came of a question: an answer, BEGUN, or the error in its place."""
        try:
            if late:
                turn.worker.end(grace=0)
                raise TimeoutError(f"{turn.worker} did not end in {self.seconds:g} seconds")
            result = turn.worker.answer()
        except (ChildProcessError, TimeoutError) as error:
            turn.worker.end(grace=0)
            return error
        except (ValueError, OSError) as error:
            result = error
        if result is not BEGUN:
            self._idle.append(turn.worker)
        return result


@dataclass
class _Turn:
    """A process with its question."""

    worker: Worker
    question: object
    end: float | None = None  # of its time; None until it has begun, for starting is not its fault


def _serve(
    pipe: Connection, answer: Callable, ignored: Sequence[signal.Signals], tells: bool
) -> None:
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)  # forgets one that waits
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    with suppress(EOFError, ConnectionError):  # nobody asks any more
        while (question := pipe.recv()) is not None:
            if tells:
                pipe.send(BEGUN)
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

    Of a fork no pipe tells, for the parent's other children hold its end too, but the number of the
    parent changes; on Windows that number stays, and there is a handle that tells.
    """
    handle = multiprocessing.parent_process()
    while os.getppid() == parent and handle.is_alive():
        time.sleep(WATCH)
    os._exit(1)
