"""Choose the number of threads that torch computes with on a CPU.

Threads of OpenMP spin where one of them waits for its core: beside a single other busy process two
threads on two cores are ten to a hundred times slower than one, and where tensors are small they
gain a tenth on an idle machine. So small models take one thread, large ones a thread a core. The
number changes how sums are rounded; a run records it.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from train.config import Config

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # in the order in which torch reads them
LARGE = 1 << 20  # numbers in the activations of a layer for which more threads pay


@dataclass(frozen=True)
class Threads:
    """A number of threads, and why it is that."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.number} thread{'s' if self.number != 1 else ''} ({self.reason})"


def available(root: Path = Path("/")) -> int:
    """Count the CPUs that this process may use, at least 1.

    They are those it is bound to, within the quota of its cgroup. `root` is where proc and sys are
    found.
    """
    bound = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, int(min(bound, _quota(root))))


def _quota(root: Path) -> float:
    """CPU time that the cgroup and those above it leave, in CPUs; infinite without a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    limits = [float("inf")]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup"
        for base in {mount, mount / controllers, mount / "cpu"}:
            # in a container the path may be the host's, and the container's own group be the root
            group = Path(path.strip("/"))
            limits += [_limit(base / g) for g in (group, *group.parents)]
    return min(limits)


def _limit(group: Path) -> float:
    """The quota of one cgroup, by the files of version 2 or 1."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (group / "cpu.cfs_period_us").read_text(encoding="utf-8")
        return float("inf") if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def choose(wanted: int, activations: int, environment: Mapping[str, str], cpus: int) -> Threads:
    """Choose the threads of a run: by the flag, else by the environment, else by size.

    `wanted` is the number of the flag or of the record (0: none). `activations` are the numbers
    that a layer makes in one micro-batch. Only the environment may exceed `cpus`.
    """
    if wanted > cpus:
        return Threads(
            cpus,
            f"the run says {wanted}, more than the CPUs of this process: sums are rounded "
            "otherwise",
        )
    if wanted:
        return Threads(wanted, "as the run says")
    for name in VARIABLES:
        if number := re.match(r"\s*[1-9]\d*", environment.get(name, "")):
            return Threads(int(number[0]), f"as {name} says")
    if activations < LARGE:
        return Threads(
            1, "tensors are small: more would gain little, and spin where another process is busy"
        )
    return Threads(cpus, "one a CPU of this process")


@contextmanager
def computing(config: Config, device: torch.device) -> Iterator[Threads]:
    """Choose the threads of a run and compute with them inside the block."""
    before = torch.get_num_threads()
    # a surface has about as many voxels as a plane; where a GPU computes, nothing here is large
    voxels = config.micro_batch * config.resolution**2 if device.type == "cpu" else 0
    cpus = max(1, available() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    threads = choose(config.threads, voxels * config.model.channels, os.environ, cpus)
    torch.set_num_threads(threads.number)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
