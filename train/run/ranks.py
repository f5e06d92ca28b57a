"""The ranks of a run: they join, watch each other, and end together with one word of the cause.

Without a watch a rank that dies leaves the others with an error of the network, or on a GPU with a
call that never returns. So a thread of every rank tells the others each second that it lives and
where its program is, and looks whether they do.
"""

import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

# seconds in which a rank begins a batch or ends a step: what rank 0 saves and draws is in them
TIMEOUT = 1200.0
LATER = 60.0  # seconds more until the process group says the same, in its own words
BEAT = 1.0  # seconds between two looks
GRACE = 20.0  # seconds to save and end in, once a rank has failed; torchrun gives 30
VERDICT = 5.0  # seconds in which the watch finds a rank that is gone
OWN = Path(__file__).parents[2]
PACKAGES = ("kernels", "models", "train")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"


class Ranks:
    """The watch of one rank over the others, through the store that they met at.

    `hint` is how to go on, printed after the cause.
    """

    def __init__(self, store: dist.Store, rank: int, world: int):
        self.rank = rank
        self.world = world
        self.hint = ""
        self._store = dist.PrefixStore("watch", store)
        self._store.set_timeout(timedelta(seconds=GRACE))
        self._last = time.monotonic()
        self._end: float | None = None  # when this process ends, whatever it does
        self._told = False  # why the run ends
        self._unknown = set(range(world)) - {rank}
        self._near: dict[int, int] = {}  # processes of other ranks on this host
        self._left = threading.Event()
        self._said = 0
        self._alone = False  # the store is gone: another call would print its C++ frames again
        self._say()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Note that this rank goes on."""
        self._last = time.monotonic()

    def leave(self) -> None:
        """End the watch: this rank needs the others no more, and they not it."""
        if self._left.is_set():
            return
        self._left.set()
        self._thread.join()
        if not self._alone:
            with suppress(RuntimeError):  # the store may be gone just now
                self._say(left=True)

    def first(self) -> bool:
        """Return whether this rank is the first to fail: it alone says why.

        From here on it hears no SIGTERM, which torchrun sends to the ranks that are left.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        before = self._count(1)
        return before is None or before == 1  # without a store better twice than never

    def echoes(self, error: RuntimeError) -> bool:
        """Return whether an error only says that another rank has failed; the cause is printed."""
        text = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in text and "NCCL" not in text:
            return False
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end = time.monotonic() + VERDICT
        while not self._failed() and time.monotonic() < end:
            time.sleep(BEAT / 10)
        if not self._failed():
            self._fail(f"rank {self.rank} lost the others: {text.splitlines()[0]}")
        return True

    def _failed(self) -> bool:
        return bool(self._count(0)) or self._told

    def _count(self, more: int) -> int | None:
        """Count ranks that have failed, and add to them; None where the store is gone."""
        if not self._alone:
            try:
                return self._store.add("failed", more)
            except RuntimeError:
                self._alone = True
        return None

    def _fail(self, cause: str) -> None:
        if self.first():
            lines = [f"\nthe run of {self.world} ranks ends: {cause}", self.hint]
            print("\n".join(line for line in lines if line), file=sys.stderr, flush=True)
        self._told = True

    def _watch(self) -> None:
        while not self._left.wait(BEAT):
            try:
                self._look()
            except RuntimeError:
                self._alone = True
            if self._alone and not self._told:  # torchrun holds the store, or rank 0 without it
                self._fail("the process in which the ranks met is gone")
                os.kill(os.getpid(), signal.SIGTERM)  # so that it saves where it still can
            if self._end is not None and time.monotonic() > self._end:
                os._exit(1)  # the main thread waits for what never comes

    def _look(self) -> None:
        if not self._alone:
            self._say()
        if self._failed() or self._alone:
            self._end = self._end or time.monotonic() + GRACE
            return
        seconds = time.monotonic() - self._last
        for rank in [rank for rank in self._unknown if self._store.check([str(rank)])]:
            self._unknown.discard(rank)
            said = self._read(rank)
            if said["host"] == _host():
                self._near[rank] = said["process"]
        for rank, process in self._near.items():
            if _is_gone(process) and not self._read(rank)["left"] and not self._failed():
                what = "it was killed, perhaps because memory ran out"
                self._fail(f"rank {rank} (process {process}) is gone: {what}")
                return
        if seconds > TIMEOUT:
            before = [self._read(rank) for rank in range(self.world)]
            time.sleep(2 * BEAT)
            self._say()
            places = [_described(rank, self._read(rank), then) for rank, then in enumerate(before)]
            self._fail(f"nothing goes on since {seconds:.0f} s: {', '.join(places)}")

    def _say(self, left: bool = False) -> None:
        self._said += 1
        said = {"process": os.getpid(), "host": _host(), "place": _place()}
        said |= {"left": left, "number": self._said}
        self._store.set(str(self.rank), json.dumps(said))

    def _read(self, rank: int) -> dict:
        return json.loads(self._store.get(str(rank)))


def _is_gone(process: int) -> bool:
    """Return whether a process of this host is no more."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _host() -> str:
    """Name what process numbers are unique in; where Linux does not say, no two ranks share it.

    Names of hosts are often the same in containers.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{boot.strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {os.getpid()}"


def _described(rank: int, said: dict, before: dict) -> str:
    """Say where a rank is, by what it said now and a while ago."""
    silent = "" if said["number"] > before["number"] else " and says nothing"
    return f"rank {rank} is in {said['place']}{silent}"


def _place() -> str:
    """The innermost line of ours that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if any(file.is_relative_to(OWN / package) for package in PACKAGES):
            return f"{frame.f_code.co_name} ({file.relative_to(OWN)}, line {frame.f_lineno})"
        frame = frame.f_back
    return "a library"


@contextmanager
def joined(backend: str, rank: int, world: int) -> Iterator[Ranks]:
    """Join the ranks of a run, watch them, and leave at the end.

    Raises OSError where they do not meet in TIMEOUT seconds.
    """
    patience = timedelta(seconds=TIMEOUT + LATER)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=patience))
        # torchrun keeps its store: ranks that start again would read addresses of dead ones. Its
        # counts differ between hosts
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"start {os.environ.get(RESTARTS)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise OSError(f"rank {rank} did not meet the other ranks of {world}: {first}") from error
    ranks = Ranks(store.clone(), rank, world)
    failed = True
    try:
        yield ranks
        failed = False
    except SystemExit:  # said already
        failed = False
        raise
    finally:
        if failed:
            ranks.first()
        dist.destroy_process_group()
        ranks.leave()
