"""Counting what makes the host wait for a GPU, on a machine without one too."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tests.helpers.fake_device import StandIn
from tests.helpers.hardware import GPU

# what torch says; when its mode is first set, it says more
WAIT = "called a synchronizing CUDA operation"


@contextmanager
def watch_reads() -> Iterator[list[str]]:
    """What waits for the device inside the block, as it happens: with a GPU torch's own warnings,
    otherwise names of functions that the stand-in ran.
    """
    if not GPU:
        before = StandIn.current.seen
        StandIn.current.seen = []
        try:
            yield StandIn.current.seen
        finally:
            StandIn.current.seen = before
        return
    seen: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: (
            seen.append(str(message)) if WAIT in str(message) else None
        )
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
