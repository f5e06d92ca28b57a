"""The data loader: batches in a sampler's order, read ahead by other processes.

For a GPU they are brought into pinned memory before they are needed.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import torch

from train.data.batch import Batch, collate
from train.data.dataset import Dataset
from train.data.sampler import Sampler
from train.workers import read_ahead


def loader(
    dataset: Dataset, sampler: Sampler, workers: int = 0, pin: bool = False
) -> Iterator[Batch]:
    """Yield batches without end, one per list of `sampler`, read by `workers` processes.

    With 0 workers this process reads them. `pin` puts them into pinned memory, for a GPU. What
    fails in a worker is raised here with its file's name; ChildProcessError where one died.
    They end with the iterator, and until then no SIGINT or SIGTERM to their process group ends
    them. No global random state is touched.
    """
    if workers:
        batches = read_ahead("data worker", partial(_read_alone, dataset), iter(sampler), workers)
        return _pinned(batches) if pin else batches
    batches = (_read(dataset, keys) for keys in sampler)
    return (batch.pin_memory() for batch in batches) if pin else batches


def _read(dataset: Dataset, keys: Sequence[tuple[int, int]]) -> Batch:
    return collate([dataset[key] for key in keys])


def _read_alone(dataset: Dataset, keys: Sequence[tuple[int, int]]) -> Batch:
    # the cores belong to training, and a pool of threads does not survive a fork
    torch.set_num_threads(1)
    return _read(dataset, keys)


def _pinned(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches in pinned memory.

    A thread brings each one there while the one before it is trained on.
    """
    device = torch.accelerator.current_device_index()  # a thread begins with the first
    with (
        closing(batches),
        ThreadPoolExecutor(1, "pin", torch.accelerator.set_device_index, (device,)) as thread,
    ):
        moving = None
        for batch in batches:
            before = moving
            moving = thread.submit(batch.pin_memory)
            if before:
                yield before.result()
        if moving:
            yield moving.result()
