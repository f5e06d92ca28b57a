"""The watch on what makes the host wait for the device, on a machine without a GPU too."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tests.helpers.fake_device import FakeDevice
from tests.helpers.hardware import GPU

# torch's warning of a wait; when its mode is first set, it warns of something else too
WARNING = "called a synchronizing CUDA operation"


@contextmanager
def watch_waits() -> Iterator[list[str]]:
    """A list that grows with every wait inside the block.

    On a GPU it holds torch's own warnings, on the fake device the names of the ops that wait.
    """
    with _watch_gpu() if GPU else _watch_fake_device() as waits:
        yield waits


@contextmanager
def _watch_fake_device() -> Iterator[list[str]]:
    device = FakeDevice.current
    before = device.waits
    device.waits = []
    try:
        yield device.waits
    finally:
        device.waits = before


@contextmanager
def _watch_gpu() -> Iterator[list[str]]:
    waits: list[str] = []

    def note(message, *_):
        if WARNING in str(message):
            waits.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
