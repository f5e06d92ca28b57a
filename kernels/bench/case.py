"""Benchmark cases: the implementations of an op, their inputs, and the work that bounds them.

Other packages are compared where they are installed; an absent one gives the reason.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# Names of implementations in the results
OURS = "trislat"
NAIVE = "naive reference"
INTERPRETED = "trislat, kernels interpreted"

# Import names of the packages; the command prints which of them are there
KNOWN = ("spconv", "spconv_triton", "flex_gemm", "gsplat", "nvdiffrast", "flash_attn", "fused_ssim")


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


def optional(name: str) -> ModuleType | str:
    """Import a module, or say why it cannot be imported.

    It may not be installed, or be built for another torch or CUDA.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        return f"absent: {name} cannot be imported ({type(error).__name__}: {reason})"


def compiled(function: Callable, device: torch.device) -> Callable | str:
    """Compile a function with torch.compile for a GPU; for a CPU, say why not.

    On a CPU the compilation takes longer than everything that is measured. fullgraph: it raises
    where a part would run uncompiled unnoticed.
    """
    if device.type == "cpu":
        return "absent: torch.compile is measured on a GPU only"
    return inductor(function)


def inductor(function: Callable) -> Callable:
    """Compile a function so that its backward pass can run several times on one graph."""
    import torch._functorch.config

    # else the backward pass overwrites what it was given
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, fullgraph=True)
