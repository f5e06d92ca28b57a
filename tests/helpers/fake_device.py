"""A fake device on a machine without a GPU: its tensors say that they lie on another device.

So tests see what would move between the host and a GPU, and what would make the host wait. What
torch decides by device is decided as for a GPU: which path an op takes, what is copied, what is
refused. The numbers are computed on the CPU. A wait is noted where torch's sync debug mode reports
one on a GPU, and for every copy from memory that is not pinned: a large one waits even where the
caller asks that it does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from kernels import backend

DEVICE = torch.device("meta")  # the one device beside the CPU that every torch knows

# ops of torch whose result, or its size, the host must read
READING_OPS = {
    "_local_scalar_dense",
    "equal",
    "allclose",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "histc",
    "multinomial",
    "_linalg_check_errors",
    "_linalg_eigvals",
}
# ops with an overload whose last argument, a 0-d tensor, the host reads
READING_OVERLOADS = {
    "masked_fill": "Tensor",
    "masked_fill_": "Tensor",
    "index_fill": "int_Tensor",
    "index_fill_": "int_Tensor",
}
INDEXING_OPS = {
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index",
    "_unsafe_index_put",
}
MASKS = (torch.bool, torch.uint8)

# torch's and ours, before the fake device replaces them
_tensor = torch.tensor
_as_tensor = torch.as_tensor
_launch = backend.launch
_autocast = torch.is_autocast_enabled


class FakeTensor(Tensor):
    """A tensor on the fake device; `values` is a tensor on the CPU that holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        return Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, device=DEVICE, **layout
        )

    def __init__(self, values: Tensor):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return FakeDevice.current.run(function, args, kwargs or {})

    def __getitem__(self, index):
        return super().__getitem__(_sequences_to_host(index))

    def __setitem__(self, index, value):
        if isinstance(value, int | float):
            value = _on_host(value, self.dtype)
        super().__setitem__(_sequences_to_host(index), value)

    def __repr__(self, **_) -> str:
        return f"FakeTensor({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo):
        return FakeTensor(self.values.detach().clone()).requires_grad_(self.requires_grad)

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data, dtype=None, device=None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)


def _on_host(data, dtype: torch.dtype | None = None) -> Tensor:
    with _disable_current_modes():
        return _tensor(data, dtype=dtype)


def _sequences_to_host(index):
    """An index as torch takes it: sequences become tensors on the host, which are then copied."""
    if isinstance(index, tuple):
        return tuple(_sequences_to_host(part) for part in index)
    if isinstance(index, list | range | np.ndarray):
        return _on_host(list(index))
    return index


class FakeDevice(TorchDispatchMode):
    """Runs ops on fake tensors on the CPU; `waits` names those that would wait for a GPU."""

    current: "FakeDevice"

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        # by storage; the tensor is kept so that its storage's number is not used again
        self.pinned: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function, args, kwargs):
        """Compute an op, note whether it waits, and put its result where a GPU would have it."""
        if function.namespace == "trislat":  # the waits inside an op of ours count too
            with self:
                return OPDEFS[function.name()]._init_fn(*args, **kwargs)
        with self:  # an op that consists of others arrives here whole where autograd did not act
            out = function.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out

        name = function.overloadpacket.__name__
        if name == "_pin_memory":
            return self._pin(*args)
        if name == "is_pinned":
            return self._is_pinned(*args)

        fake = any(isinstance(t, FakeTensor) for t in tree_leaves((args, kwargs)))
        if name in ("_to_copy", "copy_"):
            self._note_copy(name, *args[:2], **kwargs)
        elif fake:
            self._note_wait(function, name, args, kwargs)

        options = kwargs
        device = kwargs.get("device")
        if device is not None:
            fake = torch.device(device).type == DEVICE.type
            options = kwargs | {"device": torch.device("cpu")}
        out = function(*_values(args), **_values(options))
        if not fake:
            return out
        wrap = lambda t: t if isinstance(t, FakeTensor) else FakeTensor(t)
        out = tree_map_only(Tensor, wrap, out)
        return return_and_correct_aliasing(function, args, kwargs, out)

    def _pin(self, tensor: Tensor, *_) -> Tensor:
        pinned = tensor.clone()
        self.pinned[pinned.untyped_storage()._cdata] = pinned
        return pinned

    def _is_pinned(self, tensor: Tensor, *_) -> bool:
        on_host = not isinstance(tensor, FakeTensor)
        return on_host and tensor.untyped_storage()._cdata in self.pinned

    def _note_copy(
        self,
        name: str,
        target: Tensor,
        source: Tensor | None = None,
        non_blocking=False,
        device=None,
        **_,
    ) -> None:
        """Note copy_(target, source), or _to_copy(target) to a device, if it moves and waits."""
        to_fake = isinstance(target, FakeTensor)
        if name == "_to_copy":
            source = target
            if device is not None:
                to_fake = device.type == DEVICE.type
        from_fake = isinstance(source, FakeTensor)
        if from_fake == to_fake or not source.numel():
            return
        if non_blocking and (from_fake or self._is_pinned(source)):
            return
        self.waits.append(name)

    def _note_wait(self, function, name: str, args, kwargs) -> None:
        """Note an op on fake tensors if it waits; refuse one that also takes the host's."""
        if name in INDEXING_OPS:
            self.waits += [name] * self._waits_of_index(*args[1:3])
            return
        for tensor in tree_leaves((args, kwargs)):
            on_host = isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor)
            if on_host and tensor.ndim:
                raise RuntimeError(f"{function} of tensors on the host and on the device")
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        overload = READING_OVERLOADS.get(name) == function._overloadname
        reads_last = overload and isinstance(args[-1], FakeTensor)
        if name in READING_OPS or unsized or reads_last:
            self.waits.append(name)

    def _waits_of_index(self, indices, value: Tensor | None = None) -> int:
        """The number of waits of an index: the host counts each mask and copies each index.

        A number that is stored is copied too, unless a single mask says where.
        """
        known = [t for t in indices if t is not None]
        masks = sum(t.dtype in MASKS for t in known)
        copied = sum(t.dtype not in MASKS and not isinstance(t, FakeTensor) for t in known)
        stores_number = value is not None and not isinstance(value, FakeTensor)
        if stores_number and masks == len(known) == 1:
            return 0
        return masks + copied + stores_number


def _values(arguments):
    return tree_map_only(FakeTensor, lambda t: t.values, arguments)


def _made_on_host(function):
    """torch.tensor or torch.as_tensor, which make a tensor on the host, then copy it."""

    def make(data, *, dtype=None, device=None, **rest):
        made = function(data, dtype=dtype, **rest)
        return made if device is None else made.to(device)

    return make


def _run_kernel(kernel, grid, *args, **constants) -> None:
    """Launch a kernel in the interpreter, whose own reads of its arguments do not count."""
    on_host = any(isinstance(a, Tensor) and not isinstance(a, FakeTensor) for a in args)
    if on_host and 0 not in grid:
        raise RuntimeError(f"{kernel} was given a tensor on the host")
    with _disable_current_modes():
        _launch(kernel, grid, *_values(args), **constants)


def _autocast_enabled(kind: str | None = None) -> bool:
    return kind != DEVICE.type and _autocast(kind or "cuda")


@contextmanager
def fake_device() -> Iterator[torch.device]:
    """The fake device, on which tensors can be made while the block runs."""
    with (
        patch.object(torch, "tensor", _made_on_host(_tensor)),
        patch.object(torch, "as_tensor", _made_on_host(_as_tensor)),
        patch.object(torch, "is_autocast_enabled", _autocast_enabled),
        patch.object(backend, "launch", _run_kernel),
        patch.object(backend, "target", lambda tensor: "interpreter"),
        FakeDevice() as FakeDevice.current,
    ):
        yield DEVICE
