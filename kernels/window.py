"""Coordinates -> windows (skeleton: the partition follows)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Windows:
    """Rows grouped into segments that attend to themselves: M windows over N rows, empty windows included."""

    order: Tensor  # [N] int32: the row at each window-sorted position
    starts: Tensor  # [M + 1] int32: window m owns the sorted positions starts[m] : starts[m + 1]
    bound: int  # no window has more rows than this (its volume, or N for full attention); known without reading the device
