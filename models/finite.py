"""Weights whose values are not all finite: what finds them, and the error that names them."""

from collections.abc import Mapping

import torch
from torch import Tensor


class NotFinite(ValueError):
    """Weights, activations, a loss or gradients are not finite."""


def finite(t: Tensor) -> bool:
    """Whether every value is.

    It waits for the device, and takes none of its memory, so it works when that is full.
    """
    if not t.is_floating_point() or not t.numel():
        return True
    return bool(torch.stack(torch.aminmax(t.detach())).isfinite().all())


def portion(t: Tensor) -> str:
    """How many of a tensor's values are not finite, of how many: a clause."""
    bad = int((~t.detach().isfinite()).sum())
    return f"{bad:,} of {t.numel():,} values not finite"


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises NotFinite that names the first tensor which is not finite, and how many values."""
    bad = [name for name, t in tensors.items() if not finite(t)]
    if bad:
        more = f" (and {len(bad) - 1} other tensors of {len(tensors)})" if len(bad) > 1 else ""
        raise NotFinite(f"{source}: {bad[0]} has {portion(tensors[bad[0]])}{more}")
