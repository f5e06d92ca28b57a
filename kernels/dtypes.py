"""Floating-point types: the ones that ops accept, and the one that they compute in."""

import torch
from torch import Tensor

from kernels import backend


def wide_dtype(x: Tensor) -> torch.dtype:
    """The type of arithmetic on x: fp32, or fp64 where x is fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """x in the type of arithmetic on it: 16 bits become fp32, fp32 and fp64 stay."""
    return x.to(wide_dtype(x))


def check_dtype(x: Tensor) -> None:
    """Raises ValueError for types other than fp16, bf16 and fp32; the torch path takes fp64 too."""
    kernels = (torch.float16, torch.bfloat16, torch.float32)
    if x.dtype not in kernels and not (x.dtype == torch.float64 and backend.is_torch(x)):
        raise ValueError(
            f"x must be fp16, bf16 or fp32 (fp64: on the torch path), got {x.dtype} on "
            f"{backend.name(x)}"
        )
