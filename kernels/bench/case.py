"""What a benchmark case consists of: implementations, inputs, and the work that bounds them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


OURS = "trislat"


NAIVE = "naive reference"


INTERPRETED = "trislat, kernels interpreted"


@dataclass(frozen=True)
class Work:
    """What a stage cannot avoid."""

    bytes: float = 0  # every input once, every output once
    flops: float = 0  # of matrix products


@dataclass(frozen=True)
class Impl:
    """One implementation. What `prepare` does is not timed; `restore` brings its output into ours'
    form.
    """

    run: Callable  # (*prepared) -> tensor or tensors
    prepare: Callable = lambda *args: args  # (*inputs) -> prepared; differentiable
    restore: Callable = lambda out: out
    tolerance: float | None = None  # None: by type
    compared: Callable = lambda inputs, grads: grads  # what of the gradients, ours too, is compared


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
    peers: dict[str, Impl | str] = field(default_factory=dict)  # a string says why a peer is absent
    reference: Callable | None = None  # the naive one
    naive: bool = True  # whether the reference is also run at this size
    parameters: Sequence[Tensor] = ()  # differentiated beside the inputs
    on_host: bool = False  # measures the host's time of a call that leaves the device alone
    forward_name: str = "forward"
    restore: Callable = lambda out: out  # of ours, where outputs are not compared as they are
