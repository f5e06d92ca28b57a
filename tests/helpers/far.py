"""Tensors of more than 2^31 elements, without the memory or the time that they take.

On a GPU they are allocated, and every program runs. In Triton's interpreter they are memory that is
reserved and not touched: a page is there once something is written to it. Of a grid of many
programs only the first and the last of each axis run there, whose rows lie beyond 2^31 elements.
"""

import inspect
import itertools
import math
import mmap
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

FAR = 1 << 31  # elements: a 32-bit offset ends here
MANY = 64  # programs along an axis that are all run
MAPPED = 64 << 20  # bytes from which memory is reserved and not touched
NORESERVE = 0x4000  # of Linux; mmap.MAP_NORESERVE from Python 3.13
GIB = 70  # memory of a GPU on which all of the tests fit


def far_tensor(rows: Tensor) -> Tensor:
    """Make a tensor of zeros that has more than 2^31 elements and ends with `rows`."""
    width = rows[0].numel()
    x = zeros(FAR // width + 2 * len(rows), *rows.shape[1:], like=rows)
    x[-len(rows) :] = rows
    return x


def zeros(*shape: int, like: Tensor) -> Tensor:
    """Allocate zeros; many of them, on a CPU, as fresh pages of memory that is not touched.

    They are asked of the operating system: a training run may have told the C library to serve
    large tensors from memory that was freed, which is not zero.
    """
    size = math.prod(shape) * like.element_size()
    if like.is_cuda or size < MAPPED:
        return like.new_zeros(*shape)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    pages = mmap.mmap(-1, size, flags=private)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def _run_ends(self, *args, **kwargs) -> None:
    """Run the first and the last programs of a grid: in place of GridExecutor.__call__.

    It does not copy arguments to a host and back either, which would touch them all.
    """
    from triton.runtime import interpreter

    known = inspect.getfullargspec(self.fn)
    kwargs = {key: value for key, value in kwargs.items() if key in known.args}
    scope = interpreter._patch_lang(self.fn)
    scope.set_attr(sys.modules[self.fn.__module__], "range", _typed_range)
    try:
        given = inspect.getcallargs(self.fn, *args, **kwargs)
        given = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in given.items()
        }
        grid = (*self.grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        for program in itertools.product(*map(_ends, grid)):
            interpreter.interpreter_builder.set_grid_idx(*program)
            self.fn(**given)
    finally:
        scope.restore()


def _typed_range(*bounds) -> Iterator:
    """Count in 64 bits where a bound has 64, as a compiled loop does; the interpreter forgets."""
    from triton.language import int64, tensor
    from triton.runtime.interpreter import TensorHandle

    wide = any(getattr(bound, "dtype", None) == int64 for bound in bounds)
    for value in range(*map(operator.index, bounds)):
        yield tensor(TensorHandle(np.array([value]), int64), int64) if wide else value


def _ends(programs: int) -> list[int]:
    if programs <= MANY:
        return list(range(programs))
    return [0, programs - 2, programs - 1]


@contextmanager
def far_memory(device: torch.device) -> Iterator[None]:
    """Inside the block, tensors of more than 2^31 elements are affordable on `device`."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory >> 30
        if memory < GIB:
            pytest.skip(f"needs a GPU of {GIB} GiB, this one has {memory}")
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    patch = pytest.MonkeyPatch()
    patch.setattr(GridExecutor, "__call__", _run_ends)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        patch.undo()
