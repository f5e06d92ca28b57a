"""The device of a run, its seeds and its signals."""

import os
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from train.run.machine import Interrupt, Machine, keep_freed_memory, machine, seed_all, seed_of


def test_a_machine_without_torchrun_is_one_rank():
    with machine("cpu") as here:
        assert (here.device.type, here.rank, here.world, here.is_main) == ("cpu", 0, 1, True)
        assert here.mean(torch.tensor([2.0])).tolist() == [2.0] and here.broadcast("x") == "x"


def test_means_and_agreement_over_ranks(monkeypatch):
    # another rank's numbers
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(5))
    monkeypatch.setattr(
        torch.distributed,
        "broadcast_object_list",
        lambda box, device: box.__setitem__(0, "rank 0's"),
    )
    here = Machine(torch.device("cpu"), 1, 2)
    assert (
        here.mean(torch.tensor([1.0, 3.0])).tolist() == [3.0, 4.0]
        and here.broadcast(None) == "rank 0's"
        and not here.is_main
    )


def test_freed_memory_is_kept_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert not keep_freed_memory()
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    assert keep_freed_memory() == (os.confstr("CS_GNU_LIBC_VERSION") is not None)
    for size in (1 << 26, (1 << 26) - (1 << 16)):  # aligned, an equal one need not fit in its place
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(size, dtype=torch.uint8).fill_(1)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 1000  # of 16384 pages
    if Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        assert " hg" in Path("/proc/self/smaps").read_text()  # a mapping asks for huge pages


ABSENT = [
    ("gpu", "device 'gpu' is none of cpu, cuda, cuda:0"),
    ("meta", "none of"),
    ("cuda:-1", "none of"),
    ("cuda:99", "GPUs"),
]


@pytest.mark.parametrize(("name", "message"), ABSENT)
def test_devices_that_are_not_there(name, message):
    with pytest.raises(ValueError, match=message), machine(name):
        pass


def test_seeds_of_neighbours_are_unrelated_and_repeatable():
    seeds = [
        seed_of(seed, step, place) for seed in range(3) for step in range(10) for place in range(10)
    ]
    assert len(set(seeds)) == 300 and seeds[5] == seed_of(0, 0, 5) and min(seeds) >= 0
    bits = np.array([[s >> b & 1 for b in range(63)] for s in seeds])
    assert abs(bits.mean() - 0.5) < 0.02  # counters would leave the high bits empty

    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    seed_all(1, 2)
    first = draws()
    assert draws() != first
    seed_all(1, 2)
    assert draws() == first


def test_a_second_interrupt_stops_at_once_and_handlers_come_back(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (
            interrupt.received == signal.SIGTERM
            and "stopping after this step" in capfd.readouterr().err
        )
        os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert Machine(torch.device("cpu"), 1, 2).is_main is False
