"""What the doors of ops and commands check alike. None of it reads a tensor: nothing waits for a
GPU, host lists apart.
"""

import argparse
import math
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path

from torch import Tensor

# numbers that the host needs: a list or, read at once, a tensor (on a GPU the host waits for it)
Host = list[int] | Tensor


def check_tensors(**values: object) -> None:
    """Raises TypeError that names the first value which is no tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raises ValueError for what is no whole number, and below `least`."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}")


def check_eps(eps: float) -> None:
    """Raises ValueError for an epsilon whose root is not finite."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, not {eps}")


def host_list(name: str, values: Host) -> list[int]:
    """The values as a list. A tensor is read; TypeError for what has no values, ValueError for one
    that is not whole.
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
    """A command's argument that names a file to write, or a folder; the argparse error names the
    folder that is not there.
    """
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} for {path.name}")
    return path
