"""Benchmark cases: the implementations of an op, their inputs, and the work that bounds them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# Names of implementations in the results
OURS = "trislat"
NAIVE = "naive reference"
INTERPRETED = "trislat, kernels interpreted"


@dataclass(frozen=True)
class Work:
    """Bytes and flops that a stage cannot avoid."""

    bytes: float = 0  # every input once, every output once
    flops: float = 0  # of matrix products


@dataclass(frozen=True)
class Impl:
    """One implementation of a case.

    `prepare` converts the inputs and is not timed; `restore` brings the output into the form of
    ours.
    """

    run: Callable  # (*prepared) -> tensor or tensors
    prepare: Callable = lambda *args: args  # (*inputs) -> prepared; differentiable
    restore: Callable = lambda out: out
    tolerance: float | None = None  # None: by type
    # (inputs, gradients) -> the part of the gradients that is compared, of ours too
    compared: Callable = lambda inputs, grads: grads


@dataclass(frozen=True)
class Case:
    """One op at one size and type."""

    op: str
    size: str
    dtype: str
    # seed -> arguments on the device; those that require a gradient get one
    inputs: Callable[[int], tuple]
    ours: Callable
    forward: Sequence[Work]
    backward: Sequence[Work] = ()  # empty: no backward pass
    # other implementations by name; a string says why one is absent
    baselines: dict[str, Impl | str] = field(default_factory=dict)
    reference: Callable | None = None  # the naive one
    naive: bool = True  # whether the reference is also run at this size
    parameters: Sequence[Tensor] = ()  # differentiated beside the inputs
    on_host: bool = False  # measures the host's time of a call that leaves the device alone
    forward_name: str = "forward"
    restore: Callable = lambda out: out  # of ours, where outputs are not compared as they are


# (size, types, device) -> the cases of one op; size is "small" or "base"
Cases = Callable[[str, list[str], torch.device], Iterator[Case]]
