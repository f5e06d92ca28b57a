"""Choice of the implementation of an op, launch of every Triton kernel, copies to a device.

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
# multiprocessors of a card of each target, for tensors that are not on one
MULTIPROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
    "gfx1100": 96,
    "interpreter": 1,
}
# shared by all threads: on a GPU, autograd runs backward passes in threads of its own
_observers: list[Callable] = []


def name(tensor: Tensor) -> str:
    """Return the implementation that an op on `tensor` uses: "triton", "torch" or "interpreter".

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
    """Tell whether an op on `tensor` takes the torch path."""
    return name(tensor) == "torch"


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Run CPU tensors on `choice` inside the block: "torch" (the default) or "interpreter".

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
    """Return the GPU that tile sizes are chosen for: "sm_90", "gfx942", ...

    It is the GPU of `tensor`; for a CPU tensor it is what `assume` says.
    """
    if tensor.device.type == "cpu":
        return _assumed.get()
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def multiprocessors(tensor: Tensor) -> int:
    """Return how many multiprocessors (compute units) the GPU of `tensor` has.

    Of any other tensor's they are those of a card with the GPU that `target` says.
    """
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return MULTIPROCESSORS.get(target(tensor), 100)


@contextmanager
def assume(name: str) -> Iterator[None]:
    """Give CPU tensors the tile sizes of the GPU `name` inside the block.

    Outside, they get those that suit the interpreter.
    """
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """Launch a Triton kernel: `kernel[grid](*args, **constants)`.

    An empty grid launches nothing. `constants` are the kernel's constexpr arguments and launch
    options (num_warps, num_stages). Floating-point fusion is chosen here, in one place, because
    Triton's default for it depends on the version.
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
    """Call `observer(kernel, grid, args, constants)` before every launch inside the block.

    Launches of all threads count. Of nested blocks only the innermost is called.
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


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without waiting for it."""
    if device.type != "cpu":
        table = table.pin_memory()  # from pageable memory the copy would wait
    return table.to(device, non_blocking=True)


@torch.library.custom_op("trislat::table", mutates_args=())
def _table(numbers: list[int], columns: int, device: torch.device) -> Tensor:
    table = torch.tensor(numbers, dtype=torch.int64)
    return to_device(table.view(-1, columns), device)


@_table.register_fake
def _(numbers, columns, device):
    return torch.empty(len(numbers) // columns, columns, dtype=torch.int64, device=device)


def make_table(numbers: list[int], columns: int, device: torch.device) -> Tensor:
    """Return numbers of the host as int64 [n / columns, columns] on a device.

    Does not wait for the device. An op of its own, because pinned memory cannot be traced by
    torch.compile.
    """
    return torch.ops.trislat.table(numbers, columns, device)


def make_index(rows: list[int], device: torch.device) -> Tensor:
    """Return numbers of the host as int64 [n] on a device, to index with.

    Does not wait for the device; indexing with the list itself would.
    """
    return make_table(rows, 1, device).view(-1)
