"""Choice of the implementation of an op, and the launch of every Triton kernel.

A GPU tensor (NVIDIA or AMD) takes the Triton kernels. A CPU tensor takes the vectorised torch path,
unless `with backend.use("interpreter")` sends it through the same kernels in Triton's interpreter,
which needs TRITON_INTERPRET=1 in the environment before Triton is first imported. Nothing falls
back silently.

Triton is imported here alone for the kernels. Where it is not installed, every import works and CPU
tensors take the torch path; an op that needs a kernel says that Triton is missing.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class _Absent:
    """A stand-in for Triton where it is not installed: decorators and constants do nothing."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args, **kwargs) -> "_Absent":
        return self


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Absent()

CHOICES = ("torch", "interpreter")
_cpu_choice: ContextVar[str] = ContextVar("_cpu_choice", default="torch")
_assumed: ContextVar[str] = ContextVar("_assumed", default="interpreter")
# of every thread: on a GPU, backward passes run in threads of autograd's
_observers: list[Callable] = []


def name(tensor: Tensor) -> str:
    """The implementation that an op on `tensor` uses: "triton", "torch" or "interpreter".

    Raises ImportError where that needs Triton and it is not installed.
    """
    chosen = _cpu_choice.get() if tensor.device.type == "cpu" else "triton"
    if chosen != "torch" and isinstance(triton, _Absent):
        raise ImportError(
            f"Triton is not installed: an op on a tensor of the device {tensor.device} needs it "
            "(pip install triton); tensors on a CPU can do without"
        )
    return chosen


def is_torch(tensor: Tensor) -> bool:
    return name(tensor) == "torch"


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Choose what CPU tensors run on inside the block: "torch" (the default) or "interpreter".

    Raises ValueError for another name, and where the interpreter was asked for but Triton was
    imported without it.
    """
    if choice not in CHOICES:
        raise ValueError(f"backend {choice!r} is not one of {', '.join(CHOICES)}")
    if choice == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend 'interpreter' needs TRITON_INTERPRET=1 in the environment before triton is "
            "imported"
        )
    token = _cpu_choice.set(choice)
    try:
        yield
    finally:
        _cpu_choice.reset(token)


def target(tensor: Tensor) -> str:
    """What tile sizes are chosen for: the GPU of `tensor` ("sm_90", "gfx942", ...); for a CPU
    tensor what `assume` says.
    """
    if tensor.device.type == "cpu":
        return _assumed.get()
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@contextmanager
def assume(name: str) -> Iterator[None]:
    """Inside the block, CPU tensors get the tile sizes of the GPU `name`; outside, those that suit
    the interpreter.
    """
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """Launch a Triton kernel: `kernel[grid](*args, **constants)`. An empty grid launches nothing.

    `constants` are the kernel's constexpr arguments and launch options (num_warps, num_stages).
    Floating-point fusion is chosen here, in one place, because Triton's default for it depends on
    the version.
    """
    if 0 in grid:
        return
    if _observers:
        _observers[-1](kernel, grid, args, constants)
    # a JITFunction; the interpreter's functions take no launch options
    if hasattr(kernel, "warmup"):
        constants.setdefault("enable_fp_fusion", True)
    device = next((a.device for a in args if isinstance(a, Tensor)), None)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


@contextmanager
def observe(observer: Callable) -> Iterator[None]:
    """Call `observer(kernel, grid, args, constants)` before every launch while the block runs, from
    any thread; the innermost block's alone.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


@contextmanager
def count_launches() -> Iterator[Counter]:
    """Count the launches inside the block by kernel name."""
    counts: Counter = Counter()
    with observe(lambda kernel, grid, args, constants: counts.update([kernel.fn.__name__])):
        yield counts
