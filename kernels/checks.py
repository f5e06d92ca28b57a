"""Checks of arguments that ops and commands share, and the type that an op computes in.

None reads a tensor, so none waits for a GPU; `host_list` is the exception.
"""

import argparse
import math
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from kernels import backend

# numbers that the host needs: a list, or a tensor, which is read (on a GPU the host waits for it)
Host = list[int] | Tensor


def check_tensors(**values: object) -> None:
    """Raise TypeError with the name of the first value that is not a tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")


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


def check_floating(*tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are floating point and on the device of the first."""
    for value in tensors:
        check_devices(tensors[0], value)
        if not value.is_floating_point():
            raise ValueError(f"all tensors must be floating point, not {value.dtype}")


def check_devices(*tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    here = tensors[0].device
    for value in tensors:
        if value.device != here:
            raise ValueError(f"all tensors must be on one device, not on {here} and {value.device}")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number, `least` or more."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}")


def check_eps(eps: float) -> None:
    """Raise ValueError unless `eps` is finite and at least 0."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, not {eps}")


def host_list(name: str, values: Host) -> list[int]:
    """Return the values as a list of int; a tensor is read.

    Raises TypeError for what has no values, ValueError for a value that is not whole.
    """
    values = values.tolist() if isinstance(values, Tensor) else values
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of whole numbers or such a tensor, not {values!r}")
    values = list(values)
    for value in values:
        if not isinstance(value, Integral):
            raise ValueError(f"{name} must hold whole numbers, not {value!r}")
    return [int(value) for value in values]


def new_file(text: str) -> Path:
    """Return the path of a file or folder to write, given as an argument of a command.

    Raises argparse's error with the name of the folder if that is not there.
    """
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} for {path.name}")
    return path
