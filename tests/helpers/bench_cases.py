"""A benchmark case of an op that needs no kernel."""

import torch

from kernels.bench.case import Case, Work


def square(**changes) -> Case:
    """x -> x^2, with what the test changes."""
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
