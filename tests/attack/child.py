"""Run cases in forked children, one after the other, and judge each by its time, memory and end.

A case is written down before it runs, so that one which kills its child is known; another child
goes on with the next. Forked children have everything imported already.
"""

import json
import os
import resource
import shutil
import signal
import stat
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

FREE = 500_000_000  # bytes that reading may take, and so many more for each byte of its files:
A_BYTE = 50
SPARE = 4 << 30  # bytes of addresses beyond that: what is reserved and not used counts as nothing
SECONDS = 60  # that a case may take, on a busy machine
POLL = 0.005
LONGEST = 1000  # characters of a message
SHOWN = 300  # of which a report shows so many
RESULT = "result"
REFUSAL = "clear error"


@dataclass(frozen=True)
class Case:
    """One damaged set of files, made again by its seed."""

    family: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The end of a case: RESULT, REFUSAL, or a failure in words."""

    case: Case
    end: str
    text: str = ""

    @property
    def failed(self) -> bool:
        return self.end not in (RESULT, REFUSAL)


class Subject(Protocol):
    """A kind of file."""

    contained: bool  # nothing in FOLDER/outside may be opened
    limited: bool  # its reader limits the memory of the process, and says so

    def prepare(self, case: Case, folder: Path) -> None: ...  # write the files of a case
    def read(self, folder: Path) -> None: ...


def run(cases: Sequence[Case], subject: Subject, folder: Path) -> list[Outcome]:
    """Run every case in FOLDER/in; returns their outcomes."""
    outcomes = []
    journal = folder / "journal"
    while len(outcomes) < len(cases):
        journal.write_text("")
        left = cases[len(outcomes) :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
            child = os.fork()
        if not child:
            _serve(left, subject, folder, journal)
        outcomes += _watched(child, left, journal)
    return outcomes


def _watched(child: int, cases: Sequence[Case], journal: Path) -> list[Outcome]:
    """Wait for a child, or kill it; the outcomes of its cases up to the one it died of."""
    size = -1
    since = time.monotonic()
    status = None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if journal.stat().st_size != size:
            size = journal.stat().st_size
            since = time.monotonic()
        elif time.monotonic() - since > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(POLL)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    done = [Outcome(case, **line) for case, line in zip(cases, lines, strict=False)]
    if len(done) < len(cases):
        end = f"over {SECONDS} s" if status == 0 else f"killed by status {status}"
        done.append(Outcome(cases[len(done)], end))
    return done


def _serve(cases: Sequence[Case], subject: Subject, folder: Path, journal: Path) -> None:
    """Run cases until one ends this process; never returns."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    opened: list[str] = []
    secret = os.path.realpath(folder / "outside") + os.sep

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            place = os.path.realpath(os.fsdecode(arguments[0]))
            if place.startswith((secret, "/dev/zero")):
                opened.append(place)

    sys.addaudithook(watch)
    ended = 1
    try:
        with journal.open("a", buffering=1) as stream, open(os.devnull, "w") as nowhere:
            sys.stdout = sys.stderr = nowhere
            for case in cases:
                for name in ("in", "outside"):
                    shutil.rmtree(folder / name, ignore_errors=True)
                    (folder / name).mkdir()
                subject.prepare(case, folder / "in")
                opened.clear()
                end, text = _judged(subject, folder / "in")
                if opened and subject.contained:
                    end, text = "opened a file outside", opened[0]
                stream.write(json.dumps({"end": end, "text": text}) + "\n")
        ended = 0
    finally:
        os._exit(ended)


def _judged(subject: Subject, folder: Path) -> tuple[str, str]:
    """Read the files of a case: how that ended, and the message or the fault."""
    names = {str(folder), *(file.name for file in folder.rglob("*"))}
    allowed = FREE + A_BYTE * sum(
        file.lstat().st_size for file in folder.rglob("*") if stat.S_ISREG(file.lstat().st_mode)
    )
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = _memory("VmSize") + allowed + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    text = ""
    try:
        subject.read(folder)
        end = RESULT
    except ValueError as error:
        text = str(error)
        end = _clear(error, text, names, subject.limited)
    # whatever it is, it is the finding
    except BaseException as error:
        text = str(error)
        end = f"{type(error).__name__}, no ValueError"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    taken = _memory("VmHWM") - before
    if taken > allowed:
        end = f"{taken >> 20} MiB, over {allowed >> 20}"
    return end, text.encode(errors="backslashreplace").decode()[:SHOWN]


def _clear(error: ValueError, text: str, names: set[str], limited: bool) -> str:
    """REFUSAL for a message that names its file and is short; else what is wrong with it."""
    cause = error
    while cause is not None:
        refused = isinstance(cause, MemoryError) or "allocate memory" in str(cause)
        if refused and not limited:
            return "tried to take all memory"
        cause = cause.__cause__ or cause.__context__
    if not any(name in text for name in names):
        return "names no file"
    if "\n" in text:
        return "a message of several lines"
    if len(text) > LONGEST:
        return f"a message of {len(text)} characters"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "a message that cannot be printed"
    return REFUSAL


def _memory(name: str) -> int:
    """A size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def shown(outcome: Outcome) -> str:
    """A line on an outcome."""
    return " ".join(
        str(value) for value in (*asdict(outcome.case).values(), outcome.end, outcome.text)
    )
