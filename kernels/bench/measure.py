"""Measure one case: compare its implementations, then time those that agree.

The floor of a pass is its lower bound by the roofline model, with the copy bandwidth and product
rates of this device, measured in the same run: per stage the larger of bytes / bandwidth and flops
/ rate, summed over stages that follow each other. `bytes` are every input read once and every
output written once, nothing an implementation chooses to keep; `flops` are those of matrix products
alone. So a fraction of 1 cannot be passed, except where inputs stay in a cache.

On a GPU, times are those of events on the stream. A wait is queued first, so the host is ahead of
the device and the gaps between calls are the device's own; an op that waits for the device itself
shows that in its time, as its user sees it. Input sets are rotated until their bytes are several
times the L2 cache.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count, pairwise
from statistics import median, quantiles

import torch
from torch import Tensor
from triton.errors import TritonError

from kernels import backend
from kernels.bench.case import DTYPES, INTERPRETED, NAIVE, OURS, Case, Impl, Work

# Two implementations of one function: largest difference over largest value, of outputs and of
# gradients
AGREEMENT = {torch.float16: 8e-3, torch.bfloat16: 6e-2, torch.float32: 1e-4, torch.float64: 1e-9}
# What an implementation may raise and be reported with, by name. torch's out-of-memory and compiler
# errors are RuntimeErrors
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ImportError,
    OSError,
    LookupError,
    TritonError,
)


@dataclass(frozen=True)
class Roofline:
    """Rates that a device reaches."""

    copy: float  # bytes per second, read + write
    product: dict[str, float]  # flops per second of a matrix product, by type

    def floor_us(self, stages: Sequence[Work], dtype: str) -> float:
        """Bound the time of stages that follow each other from below, in microseconds."""
        rate = self.product.get(dtype, self.product["fp32"])
        return 1e6 * sum(max(w.bytes / self.copy, w.flops / rate) for w in stages)


def spread(samples: Sequence[float]) -> tuple[float, float]:
    """Compute the median and the interquartile range."""
    if len(samples) == 1:
        return samples[0], 0.0
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return median(samples), high - low


@dataclass
class Timer:
    """Times calls on one device, as many as a median needs."""

    device: torch.device
    seconds: float = 0.25  # spent on one measurement, warm-up aside
    most: int = 200  # calls at most
    least: int = 5
    cuda: object = torch.cuda  # the module whose events and waits are used

    def _host(self, call: Callable[[int], object]) -> list[float]:
        began = time.perf_counter()
        samples = []
        for i in range(self.most):
            before = time.perf_counter()
            call(i)
            samples.append(1e6 * (time.perf_counter() - before))
            if i + 1 >= self.least and time.perf_counter() - began > self.seconds:
                break
        return samples

    def _events(self, call: Callable[[int], object], host_seconds: float) -> list[float]:
        samples = []
        numbers = count()
        while len(samples) < self.most and (
            len(samples) < self.least or sum(samples) < 1e6 * self.seconds
        ):
            events = [self.cuda.Event(enable_timing=True) for _ in range(21)]
            self.cuda.synchronize(self.device)
            self.cuda._sleep(int(2e9 * 1.5 * min(20 * host_seconds, 0.2)))  # cycles, at about 2 GHz
            events[0].record()
            for event in events[1:]:
                call(next(numbers))
                event.record()
            self.cuda.synchronize(self.device)
            samples += [1e3 * a.elapsed_time(b) for a, b in pairwise(events)]
        return samples

    def time(self, call: Callable[[int], object], on_host: bool = False) -> list[float]:
        """Time each call(i) in microseconds, after a warm-up (on a CPU if there is time)."""
        gpu = self.device.type == "cuda"
        for i in range(5 if gpu else int(self.seconds > 0)):
            call(i)
        if not gpu or on_host:
            return self._host(call)
        self.cuda.synchronize(self.device)
        before = time.perf_counter()
        for i in range(5):
            call(i)
        host_seconds = (time.perf_counter() - before) / 5
        return self._events(call, host_seconds)


def measure_roofline(timer: Timer, megabytes: int, edge: int) -> Roofline:
    """Time a copy of `megabytes` and products of `edge` x `edge` matrices on the timer's device."""
    torch.manual_seed(0)
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=timer.device).random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / (1e-6 * spread(timer.time(lambda i: target.copy_(source)))[0])
    product = {}
    for name, dtype in DTYPES.items():
        if timer.device.type == "cpu" and name != "fp32":
            continue  # 16-bit layers on a CPU multiply in fp32
        a, b = (torch.randn(edge, edge, device=timer.device).to(dtype) for _ in range(2))
        product[name] = 2 * edge**3 / (1e-6 * spread(timer.time(lambda i, a=a, b=b: a @ b))[0])
    return Roofline(copy, product)


def tensors(result) -> list[Tensor]:
    """List the tensors of an output."""
    if isinstance(result, Tensor):
        return [result]
    return [item for item in result if isinstance(item, Tensor)]


def _wrt(case: Case, args: tuple) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad] + list(case.parameters)


def evaluate(case: Case, impl: Impl, args: tuple) -> tuple[list[Tensor], list[Tensor]]:
    """Run both passes; return the outputs and the gradients of inputs and parameters.

    Outputs are in the form of ours; the upstream gradient is fixed.
    """
    out = tensors(impl.restore(impl.run(*impl.prepare(*args))))
    if not case.backward:
        return [t.detach() for t in out], []
    differentiable = [t for t in out if t.requires_grad]
    grads = torch.autograd.grad(
        differentiable, _wrt(case, args), upstream(differentiable), allow_unused=True
    )
    return [t.detach() for t in out], [g for g in grads if g is not None]


def upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Draw gradients of the outputs, the same for every implementation and type."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=generator).to(t) for t in outputs]


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Divide the largest difference by the largest expected value; return the worst tensor's.

    inf for shapes or NaN that differ. Integers either equal (0) or do not (inf).
    """
    if len(actual) != len(expected):
        return float("inf")
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not b.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a.cpu().long(), b.cpu().long()) else float("inf"))
        elif b.numel():
            scale = max(b.double().abs().max().item(), 1e-30)
            off = (a.double().cpu() - b.double().cpu()).abs().max().item() / scale
            worst = max(worst, float("inf") if math.isnan(off) else off)
    return worst


def _sets(first: tuple, device: torch.device) -> int:
    """Count the input sets to rotate through: on a GPU several times the L2 cache."""
    if device.type != "cuda" or not tensors(first):
        return 2
    size = sum(t.numel() * t.element_size() for t in tensors(first))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(32, max(3, -(-4 * cache // max(size, 1))))


def input_sets(case: Case, device: torch.device, first: tuple) -> list[tuple]:
    """Make the input sets that calls rotate through; `first` is the first of them."""
    return [first, *(case.inputs(seed) for seed in range(1, _sets(first, device)))]


def forward_call(impl: Impl, sets: list[tuple]) -> Callable[[int], object]:
    """Make call(i), which runs the forward pass on the prepared inputs of set i."""
    prepared = [impl.prepare(*args) for args in sets]
    return lambda i: impl.run(*prepared[i % len(prepared)])


def backward_call(case: Case, impl: Impl, sets: list[tuple]) -> Callable[[int], object]:
    """Make call(i), which runs the backward pass alone of set i."""
    jobs = []
    for args in sets:
        prepared = tuple(  # leaves, so that what prepares them is not differentiated
            a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
            for a in impl.prepare(*args)
        )
        out = [t for t in tensors(impl.run(*prepared)) if t.requires_grad]
        jobs.append((out, _wrt(case, prepared), upstream(out)))

    def call(i: int):
        out, wrt, grads = jobs[i % len(jobs)]
        return torch.autograd.grad(out, wrt, grads, retain_graph=True, allow_unused=True)

    return call


def implementations(case: Case) -> dict[str, Impl | str]:
    """List ours, the naive reference where it is run, and the baselines, by name."""
    found = {OURS: Impl(case.ours, restore=case.restore)}
    if case.reference and case.naive:
        found[NAIVE] = Impl(case.reference)
    return found | case.baselines


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@dataclass
class _Missing:
    """Rows of what was not measured, each with the reason: the second half of the results."""

    case: Case
    rows: list[dict] = field(default_factory=list)

    def note(self, impl: str, why: str) -> None:
        case = self.case
        self.rows.append(
            {"op": case.op, "size": case.size, "dtype": case.dtype, "impl": impl, "why": why}
        )


def agreement(case: Case, first: tuple) -> tuple[dict[str, bool | None], list[dict]]:
    """Compare every implementation with ours on the inputs `first`.

    Returns for each that ran whether it agrees (ours: with any other; None: nothing to compare),
    and rows of those that did not run or disagree, with the reason.
    """
    ours = None
    agrees = {}
    missing = _Missing(case)
    for name, impl in implementations(case).items():
        if isinstance(impl, str):
            missing.note(name, impl)
            continue
        try:
            got = ([], []) if case.on_host else evaluate(case, impl, first)
        except FAILURES as error:
            missing.note(name, f"failed: {_why(error)}")
            continue
        agrees[name] = None
        if name == OURS:
            ours = got
        elif ours is not None:
            limit = impl.tolerance or AGREEMENT[DTYPES.get(case.dtype, torch.float32)]
            grads = (impl.compared(first, found) for found in (got[1], ours[1]))
            off = max(difference(got[0], ours[0]), difference(*grads))
            agrees[name] = off <= limit
            if not agrees[name]:
                missing.note(
                    name,
                    f"disagrees with {OURS} by {off:.2e} of the largest value, allowed {limit:.2e}",
                )
    compared = [verdict for name, verdict in agrees.items() if verdict is not None]
    if ours is not None and compared:
        agrees[OURS] = any(compared)
    return agrees, missing.rows


def measure(case: Case, timer: Timer, roofline: Roofline) -> tuple[list[dict], list[dict]]:
    """Measure a case; return its rows of the results, and rows of what was not measured and why.

    Implementations are compared before they are timed; one that disagrees is a row without a time.
    Only FAILURES are caught, and reported by name.
    """
    # so that no case runs into the limit of recompilations and falls back to eager unseen
    torch.compiler.reset()
    rows = []
    first = case.inputs(0)
    agrees, known = agreement(case, first)
    missing = _Missing(case, known)
    sets = input_sets(case, timer.device, first)
    passes = {case.forward_name: case.forward}
    if case.backward:
        passes["backward"] = case.backward
    for which, stages in passes.items():
        floor = roofline.floor_us(stages, case.dtype)
        for name, verdict in agrees.items():
            impl = implementations(case)[name]
            row = {
                "op": case.op,
                "pass": which,
                "size": case.size,
                "dtype": case.dtype,
                "impl": name,
                "median_us": None,
                "spread_us": None,
                "bytes": sum(work.bytes for work in stages),
                "flops": sum(work.flops for work in stages),
                "floor_us": floor,
                "fraction": None,
                "agrees": verdict,
            }
            rows.append(row)
            if verdict is False:
                continue
            try:
                if which == "backward":
                    call = backward_call(case, impl, sets)
                else:
                    call = forward_call(impl, sets)
                row["median_us"], row["spread_us"] = spread(timer.time(call, case.on_host))
            except FAILURES as error:
                missing.note(name, f"{which} failed: {_why(error)}")
                continue
            row["fraction"] = floor / row["median_us"] if floor else None
    return rows, missing.rows


def _in_double(value):
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def errors(case: Case) -> list[dict]:
    """Compare every implementation with the reference in float64.

    Returns rows with the largest difference over the largest value. On a CPU whose Triton
    interprets (TRITON_INTERPRET=1), ours is there twice: the torch path and the kernels.
    """
    args = case.inputs(0)
    exact = evaluate(case, Impl(case.reference), tuple(map(_in_double, args)))
    rows = []
    impls = implementations(case)
    # the interpreter's bf16 arithmetic is wrong
    if os.environ.get("TRITON_INTERPRET") == "1" and case.dtype != "bf16":
        impls = {OURS: impls.pop(OURS), INTERPRETED: Impl(case.ours, restore=case.restore)} | impls
    for name, impl in impls.items():
        row = {
            "op": case.op,
            "size": case.size,
            "dtype": case.dtype,
            "impl": name,
            "output": None,
            "gradient": None,
        }
        if isinstance(impl, str):
            row["why"] = impl
        else:
            try:
                with backend.use("interpreter") if name == INTERPRETED else nullcontext():
                    got = evaluate(case, impl, args)
                row["output"] = difference(got[0], exact[0])
                row["gradient"] = difference(got[1], exact[1]) if case.backward else None
            except FAILURES as error:
                row["why"] = f"failed: {_why(error)}"
        rows.append(row)
    return rows
