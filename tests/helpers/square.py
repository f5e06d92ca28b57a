"""A benchmark case that costs nothing: x -> x^2 for three numbers."""

import torch

from kernels.bench.case import Case, Work


def square(**changes) -> Case:
    """Make the case, with fields replaced by `changes`."""
    case = dict(
        op="square",
        size="3",
        dtype="fp32",
        forward=[Work(24)],
        backward=[Work(36)],
        ours=lambda x: x * x,
        inputs=lambda seed: (torch.arange(3.0).add(seed).requires_grad_(),),
        reference=lambda x: x**2,
    )
    return Case(**case | changes)
