"""The device of a run, its ranks, its seeds, and the signals that stop it."""

import ctypes
import os
import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from train.run.ranks import Ranks, joined
from train.run.threads import Threads

# glibc's settings M_TRIM_THRESHOLD and M_MMAP_MAX
TRIM_THRESHOLD = -1
MMAP_MAX = -4
FREE = 1 << 30  # bytes of freed memory that a process keeps at the end of its heap
HUGE_PAGES = 14  # Linux's advice MADV_HUGEPAGE
HUGE_PAGE = 1 << 21  # bytes


def world_size() -> int:
    """The number of ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Machine:
    """One rank of a run."""

    device: torch.device
    rank: int
    world: int
    threads: Threads | None = None  # that torch computes with on the CPU
    ranks: Ranks | None = None  # the watch over the others, where there are some

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """The rank in words, for messages; empty where there is one alone."""
        return f" (rank {self.rank} of {self.world})" if self.world > 1 else ""

    def beat(self) -> None:
        """Note that this rank goes on."""
        if self.ranks:
            self.ranks.beat()

    def hint(self, text: str) -> None:
        """Say how the run goes on, wherever it ends."""
        if self.ranks:
            self.ranks.hint = text

    def leave(self) -> None:
        """Need the other ranks no more."""
        if self.ranks:
            self.ranks.leave()

    def speaks(self) -> bool:
        """Return whether this rank says why the run ends: the first that fails does."""
        return self.ranks is None or self.ranks.first()

    def echoes(self, error: RuntimeError) -> bool:
        """Return whether an error only says that another rank has failed."""
        return self.ranks is not None and self.ranks.echoes(error)

    def mean(self, values: Tensor) -> Tensor:
        """Average over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    def broadcast(self, value):
        """Give rank 0's value to every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value) -> list:
        """Give the values of all ranks, in their order, to every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


def named_device(name: str | None) -> torch.device:
    """The device of a --device flag; without one a GPU, if there is one.

    Raises ValueError for a name that is none, and for a GPU that is absent.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name is None:
        name = "cuda" if gpus else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(
            f"device {name!r} is none of cpu, cuda, cuda:0, cuda:1 ... (cuda on AMD too)"
        )
    device = torch.device(name)
    if device.type == "cpu":
        return device
    index = local if device.index is None else device.index
    if index >= gpus:
        raise ValueError(
            f"device {name!r}, GPU number {index}: torch {torch.__version__} sees {gpus} GPUs"
        )
    return torch.device("cuda", index)


def keep_freed_memory() -> bool:
    """Keep freed memory for the next tensors; returns whether the C library can, as glibc does.

    By default glibc returns large tensors to the system, which then zeroes every page of the next
    ones: that takes longer than most arithmetic on them. What the user set (MALLOC_...) stands.
    """
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    kept = bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, FREE))
    if kept:
        _grow_heap(library, FREE // 2)
    return kept


def _grow_heap(library: ctypes.CDLL, size: int) -> None:
    """Add `size` bytes to the heap, of huge pages where Linux gives them when asked.

    A step on a CPU walks through its memory a few times, and addresses of small pages take 6 % of
    it. Pages that are never used take no memory.
    """
    address = ctypes.c_void_p
    library.sbrk.restype = library.malloc.restype = address
    end = library.sbrk(0)
    block = library.malloc(ctypes.c_size_t(size))
    first = -(-end // HUGE_PAGE) * HUGE_PAGE
    last = library.sbrk(0)
    if last > first:  # otherwise it had the room, or got none
        library.madvise(address(first), ctypes.c_size_t(last - first), HUGE_PAGES)
    library.free(address(block))


@contextmanager
def machine(device: str | None, deterministic: bool = False) -> Iterator[Machine]:
    """Join the ranks, if torchrun started several, and leave them at the end.

    Raises ValueError for a device that is absent.
    """
    chosen = named_device(device)
    rank = int(os.environ.get("RANK", 0))
    world = world_size()
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if deterministic:
        # cuBLAS reads it when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    try:
        with joined(backend, rank, world) if world > 1 else nullcontext() as ranks:
            yield Machine(chosen, rank, world, ranks=ranks)
    finally:
        if deterministic:  # not always: the call imports torch's compiler, which takes seconds
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def seed_of(*numbers: int) -> int:
    """Make a 63-bit seed from several numbers.

    Neighbouring steps or objects get unrelated random streams.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_all(*numbers: int) -> None:
    """Seed torch (every device), numpy and Python from the same numbers.

    Called at the start of each step with the step's number, so what a step draws depends on nothing
    before it: a resumed run repeats an uninterrupted one without any generator's state being
    stored.
    """
    seed = seed_of(*numbers)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Interrupt:
    """Catch Ctrl-C and SIGTERM, so that the run stops after the step under way.

    A second Ctrl-C stops at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received = 0  # the signal's number

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        # print is not reentrant
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")

    def __enter__(self) -> "Interrupt":
        self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
