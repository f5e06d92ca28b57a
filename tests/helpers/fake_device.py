"""A GPU's stand-in on a machine without one: tensors that say they lie elsewhere, so that what
moves between is seen.

What torch decides by device is decided as for a GPU: which path an op takes, what is copied, what
is refused. The numbers are a CPU's. It notes what torch's sync debug mode reports of a GPU, and
copies from memory that is not pinned, whether the caller says that it does not wait for them or
not: a large one waits.
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
WAITS = {
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
# 0-d tensors
READ = {
    "masked_fill": "Tensor",
    "masked_fill_": "Tensor",
    "index_fill": "int_Tensor",
    "index_fill_": "int_Tensor",
}
INDEXED = {
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index",
    "_unsafe_index_put",
}


class Away(Tensor):
    """A tensor of the stand-in; `inner` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=DEVICE, **layout
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return StandIn.current.run(function, args, kwargs or {})

    def __getitem__(self, index):
        return super().__getitem__(_indices_of_host(index))

    def __setitem__(self, index, value):
        if isinstance(value, int | float):
            value = _on_host(value, self.dtype)
        super().__setitem__(_indices_of_host(index), value)

    def __repr__(self, **_) -> str:
        return f"Away({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo):
        return Away(self.inner.detach().clone()).requires_grad_(self.requires_grad)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data, dtype=None, device=None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)


def _on_host(data, dtype: torch.dtype | None = None) -> Tensor:
    with _disable_current_modes():
        return _tensor(data, dtype=dtype)


def _indices_of_host(index):
    """Sequences as what torch makes of them: tensors on the host, which are then copied."""
    if isinstance(index, tuple):
        return tuple(_indices_of_host(i) for i in index)
    return _on_host(list(index)) if isinstance(index, list | range | np.ndarray) else index


class StandIn(TorchDispatchMode):
    """Runs what is asked of the stand-in's tensors on a CPU, and notes in `seen` by name what would
    wait for a GPU.
    """

    current: "StandIn"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        # by storage, kept so that its number is not given to another
        self.pinned: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function, args, kwargs):
        if function.namespace == "trislat":  # what is in an op of ours counts too
            with self:
                return OPDEFS[function.name()]._init_fn(*args, **kwargs)
        with self:  # what is made of others; below autograd it is not yet
            out = function.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        given = kwargs.get("device")
        name = function.overloadpacket.__name__
        away = any(isinstance(t, Away) for t in tensors)
        if name == "_pin_memory":
            return self._pin(*args)
        if name == "is_pinned":
            return self._is_pinned(*args)
        if name in ("_to_copy", "copy_"):
            self._note_copy(name, *args[:2], **kwargs)
        elif away:
            self._note(function, name, args, kwargs)
        to_away = away if given is None else torch.device(given).type == DEVICE.type
        if given is not None:
            kwargs_inner = kwargs | {"device": torch.device("cpu")}
        else:
            kwargs_inner = kwargs
        out = function(*_inner(args), **_inner(kwargs_inner))
        if not to_away:
            return out
        out = tree_map_only(Tensor, lambda t: t if isinstance(t, Away) else Away(t), out)
        return return_and_correct_aliasing(function, args, kwargs, out)

    def _pin(self, tensor: Tensor, *_) -> Tensor:
        pinned = tensor.clone()
        self.pinned[pinned.untyped_storage()._cdata] = pinned
        return pinned

    def _is_pinned(self, tensor: Tensor, *_) -> bool:
        return not isinstance(tensor, Away) and tensor.untyped_storage()._cdata in self.pinned

    def _note_copy(
        self,
        name: str,
        target: Tensor,
        source: Tensor | None = None,
        non_blocking=False,
        device=None,
        **_,
    ) -> None:
        """copy_(target, source), or _to_copy(target) to a device."""
        if name == "_to_copy":
            begin = isinstance(target, Away)
            end = isinstance(target, Away) if device is None else device.type == DEVICE.type
            source = target
        else:
            begin, end = isinstance(source, Away), isinstance(target, Away)
        if (
            begin != end
            and source.numel()
            and not (non_blocking and (begin or self._is_pinned(source)))
        ):
            self.seen.append(name)

    def _note(self, function, name: str, args, kwargs) -> None:
        foreign = lambda t: isinstance(t, Tensor) and not isinstance(t, Away)
        if name in INDEXED:
            self.seen += [name] * self._waits_of_index(name, *args[:3])
            return
        if any(foreign(t) and t.ndim for t in tree_leaves((args, kwargs))):
            raise RuntimeError(f"{function} of tensors on the host and on the device")
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        read = READ.get(name) == function._overloadname and isinstance(args[-1], Away)
        if name in WAITS or unsized or read:
            self.seen.append(name)

    def _waits_of_index(
        self, name: str, tensor: Tensor, indices, value: Tensor | None = None
    ) -> int:
        """Masks are counted, indices copied, and a number that is stored too, but where a mask
        alone says where.
        """
        known = [t for t in indices if t is not None]
        masks = sum(t.dtype in (torch.bool, torch.uint8) for t in known)
        copies = sum(
            not isinstance(t, Away) for t in known if t.dtype not in (torch.bool, torch.uint8)
        )
        number = value is not None and not isinstance(value, Away)
        if number and masks == len(known) == 1:
            return 0
        return masks + copies + number


def _inner(values):
    return tree_map_only(Away, lambda t: t.inner, values)


_tensor = torch.tensor
_as_tensor = torch.as_tensor
_launch = backend.launch
_autocast = torch.is_autocast_enabled


def _made(function):
    """Of torch.tensor and torch.as_tensor: made on the host, then copied."""

    def make(data, *, dtype=None, device=None, **rest):
        made = function(data, dtype=dtype, **rest)
        return made if device is None else made.to(device)

    return make


def _run_kernel(kernel, grid, *args, **constants) -> None:
    """In the interpreter, which reads what it interprets: that does not count."""
    if any(isinstance(a, Tensor) and not isinstance(a, Away) for a in args) and 0 not in grid:
        raise RuntimeError(f"{kernel} was given a tensor on the host")
    with _disable_current_modes():
        _launch(kernel, grid, *_inner(args), **constants)


@contextmanager
def standin() -> Iterator[torch.device]:
    """The stand-in's device, on which tensors can be made while the block runs."""
    with (
        patch.object(torch, "tensor", _made(_tensor)),
        patch.object(torch, "as_tensor", _made(_as_tensor)),
        patch.object(
            torch,
            "is_autocast_enabled",
            lambda kind=None: kind != DEVICE.type and _autocast(kind or "cuda"),
        ),
        patch.object(backend, "launch", _run_kernel),
        patch.object(backend, "target", lambda tensor: "interpreter"),
        StandIn() as StandIn.current,
    ):
        yield DEVICE
