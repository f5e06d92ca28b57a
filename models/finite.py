"""Checks for values that are not finite, and the error that names them."""

from collections.abc import Mapping

import torch
from torch import Tensor


class NotFinite(ValueError):
    """Weights, activations, a loss or gradients are not finite."""


def finite(t: Tensor) -> bool:
    """Return True if every value is finite.

    It waits for the device, and needs almost no memory there, so it works when that is full.
    """
    if not t.is_floating_point() or not t.numel():
        return True
    return bool(torch.stack(torch.aminmax(t.detach())).isfinite().all())


def portion(t: Tensor) -> str:
    """Text that says how many of a tensor's values are not finite."""
    bad = int((~t.detach().isfinite()).sum())
    return f"{bad:,} of {t.numel():,} values not finite"


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise NotFinite if a tensor is not finite; it names the first one and counts its values."""
    bad = [name for name, t in tensors.items() if not finite(t)]
    if bad:
        more = f" (and {len(bad) - 1} other tensors of {len(tensors)})" if len(bad) > 1 else ""
        raise NotFinite(f"{source}: {bad[0]} has {portion(tensors[bad[0]])}{more}")
