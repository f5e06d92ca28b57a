"""Worker processes: order, errors, deaths, signals to the group, and that none is left over."""

import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from tests.helpers.worker_tasks import respond
from train.data import loader
from train.workers import STOPS, Team, Worker, end, read_ahead

# Python 3.12 about fork
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture
def worker():
    one = Worker("reader 7", respond, multiprocessing.get_context(), STOPS)
    yield one
    one.end(grace=0)


def pid(worker: Worker) -> int:
    worker.ask("pid")
    return worker.answer()


def alive(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_answers_come_in_order_and_the_processes_end_with_the_iterator():
    before = set(multiprocessing.active_children())
    with closing(read_ahead("reader", respond, iter(range(99)), 3)) as answers:
        assert [next(answers) for _ in range(50)] == list(range(50))
        assert len(set(multiprocessing.active_children()) - before) == 3
        begin = time.perf_counter()
    assert set(multiprocessing.active_children()) == before and time.perf_counter() - begin < 2
    assert list(read_ahead("reader", respond, iter("abcde"), 2)) == list("abcde")
    assert (
        list(read_ahead("reader", respond, iter([]), 2)) == []
        and set(multiprocessing.active_children()) == before
    )


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_what_is_wrong_with_a_file_is_raised_in_its_place(worker, kind):
    for question in (1, kind, 2):
        worker.ask(question)
    assert worker.answer() == 1
    with pytest.raises(OSError if kind is not ValueError else ValueError, match="^what is wrong$"):
        worker.answer()
    assert worker.answer() == 2


DEATHS = {
    "die": "was ended by SIGKILL, perhaps because memory ran out: fewer --workers need less",
    "leave": "ended with status 3",
    TypeError: r"failed: TypeError: what is wrong \(worker_tasks.py, line \d+\)",
}


@pytest.mark.parametrize("question", DEATHS)
def test_a_death_is_one_line_that_names_the_process(capfd, worker, question):
    process = pid(worker)
    worker.ask(question)
    with pytest.raises(
        ChildProcessError, match=rf"^reader 7 \(process {process}\) {DEATHS[question]}$"
    ):
        worker.answer()
    with pytest.raises(ChildProcessError, match=rf"^reader 7 \(process {process}\) "):
        worker.ask(1), worker.answer()
    assert capfd.readouterr().err == ""


def test_a_death_ends_the_others():
    before = set(multiprocessing.active_children())
    answers = read_ahead("reader", respond, iter([1, 2, 3, "die", *range(9)]), 2)
    assert [next(answers) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ChildProcessError, match=r"^reader 1 \(process \d+\) was ended by SIGKILL"):
        next(answers)
    assert set(multiprocessing.active_children()) == before


def test_a_process_that_does_not_listen_is_killed(worker):
    process = pid(worker)
    worker.ask("sleep")
    begin = time.perf_counter()
    end([worker], grace=0.1)
    assert not alive(process) and time.perf_counter() - begin < 2


def test_a_program_ends_with_processes_that_it_never_ended():
    code = (
        "import multiprocessing as m; from train.workers import *; from tests.helpers.worker_tasks "
        "import respond; "
    )
    code += (
        "w = Worker('reader', respond, m.get_context(), STOPS); w.ask('pid'); "
        "print(w.answer()); w.ask('sleep')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0 and not alive(int(run.stdout)), run.stderr


@pytest.mark.parametrize("number", STOPS)
def test_what_stops_a_group_does_not_stop_it(worker, number):
    process = pid(worker)
    for _ in range(3):
        os.kill(process, number)
    worker.ask(5)
    assert worker.answer() == 5 and pid(worker) == process


@pytest.mark.parametrize("number", STOPS)
def test_nor_when_it_has_only_just_begun(number, monkeypatch):
    start = multiprocessing.get_context().Process.start

    def shot(self):
        start(self)
        os.kill(self.pid, number)

    monkeypatch.setattr(multiprocessing.get_context().Process, "start", shot)
    for _ in range(10):
        worker = Worker("reader", respond, multiprocessing.get_context(), STOPS)
        assert pid(worker) == worker._process.pid
        worker.end()


def test_a_question_that_kills_costs_itself_alone():
    before = set(multiprocessing.active_children())
    questions = [1, "die", 2, TypeError, ValueError, 3]
    with Team("reader", respond, 2) as team:
        found = dict(team.answers(questions))
    assert {q: found[q] for q in (1, 2, 3)} == {1: 1, 2: 2, 3: 3} and len(found) == 6
    assert re.fullmatch(
        r"reader \d \(process \d+\) was ended by SIGKILL, perhaps .*", str(found["die"])
    )
    assert re.fullmatch(
        r"reader \d \(process \d+\) failed: TypeError: what is wrong \(.*\)", str(found[TypeError])
    )
    assert (
        type(found["die"]) is type(found[TypeError]) is ChildProcessError
        and type(found[ValueError]) is ValueError
    )
    assert set(multiprocessing.active_children()) == before


def test_a_question_that_takes_too_long_costs_itself_alone():
    with Team("reader", respond, 2, seconds=0.5) as team:
        found = dict(team.answers([1, "sleep", 2, 3]))
        assert dict(team.answers([4, 5])) == {4: 4, 5: 5}
    message = str(found.pop("sleep"))
    assert re.fullmatch(r"reader \d \(process \d+\) did not end in 0.5 seconds", message)
    assert found == {1: 1, 2: 2, 3: 3} and not multiprocessing.active_children()


def test_batches_are_pinned_one_ahead(monkeypatch):
    events = []

    class Batch:
        def __init__(self, number):
            self.number = number

        def pin_memory(self):
            events.append((self.number, threading.current_thread() is threading.main_thread()))
            return self

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "set_device_index", events.append)
    pinned = loader._pinned(Batch(i) for i in range(4))
    assert next(pinned).number == 0
    assert [batch.number for batch in pinned] == [1, 2, 3]
    assert events == [3, *((i, False) for i in range(4))]
    closed = []

    def batches():
        try:
            yield from map(Batch, range(9))
        finally:
            closed.append(True)

    pinned = loader._pinned(batches())
    next(pinned)
    pinned.close()
    assert closed == [True]
