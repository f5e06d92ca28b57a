"""Counting what makes the host wait for a GPU, on a machine without one too."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import backend
from tests.conftest import GPU

WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere", "masked_select",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc",
}  # fmt: skip


class _Watch(TorchDispatchMode):
    """Notes the names of what would wait, in the implementations of our ops too; CPU tensors stand for a GPU's, except those
    that are made of Python numbers without naming a device, and what is computed from such alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.quiet = False
        self.host: dict[int, Tensor] = {}  # by storage, kept so that its number is not given to another

    def note(self, name: str) -> None:
        if not self.quiet:
            self.seen.append(name)

    def on_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.host

    def keep(self, tensor: Tensor) -> Tensor:
        self.host[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "trislat":  # an op that is called here would run unseen
            with self:
                return OPDEFS[function.name()]._init_fn(*args, **kwargs)
        out = function(*args, **kwargs)
        inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = function.overloadpacket.__name__
        if name == "lift_fresh" or (inputs and all(map(self.on_host, inputs))):
            return torch.utils._pytree.tree_map_only(Tensor, self.keep, out)
        by_mask = name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in _indices(args))
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITS or by_mask or unsized:
            self.note(name)
        return out


def _indices(args) -> list[Tensor]:
    return [t for t in args[1] if t is not None] if len(args) > 1 and isinstance(args[1], list | tuple) else []


@contextmanager
def watch_reads() -> Iterator[list[str]]:
    """What waits for the device inside the block, as it happens: with a GPU torch's own warnings, otherwise names of functions.

    A kernel that is interpreted reads what it interprets: that does not count.
    """
    if GPU:
        seen: list[str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: seen.append(str(message))
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield seen
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return
    watch = _Watch()
    launch, tolist, cpu, to, tensor = backend.launch, Tensor.tolist, Tensor.cpu, Tensor.to, torch.tensor

    def quietly(function, *args, **kwargs):
        before, watch.quiet = watch.quiet, True
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                return function(*args, **kwargs)
        finally:
            watch.quiet = before

    def read(function):
        def run(t, *args, **kwargs):
            if not watch.on_host(t):
                watch.note(function.__name__)
            return quietly(function, t, *args, **kwargs)

        return run

    def copy(t, *args, **kwargs):  # from pageable memory: waits unless it is told not to
        moves = watch.on_host(t) and any(isinstance(a, torch.device) for a in (*args, kwargs.get("device")))
        if not moves:
            return to(t, *args, **kwargs)
        if not kwargs.get("non_blocking"):
            watch.note("to")
        return t.clone() if watch.quiet else _away(watch, to(t, *args, **kwargs))

    def make(*args, device=None, **kwargs):
        if device is None:
            return tensor(*args, **kwargs)
        watch.note("tensor")
        return _away(watch, tensor(*args, device=device, **kwargs))

    with (
        patch.object(backend, "launch", lambda *args, **kwargs: quietly(launch, *args, **kwargs)),
        patch.object(Tensor, "tolist", read(tolist)),
        patch.object(Tensor, "cpu", read(cpu)),
        patch.object(Tensor, "to", copy),
        patch.object(torch, "tensor", make),
        watch,
    ):
        yield watch.seen


def _away(watch: _Watch, tensor: Tensor) -> Tensor:
    """No longer the host's."""
    watch.host.pop(tensor.untyped_storage()._cdata, None)
    return tensor
