"""Colours of vertices and faces in the range that their writer meant."""

import numpy as np

ROUNDING = 1e-3  # above 1: a colour that was rounded up, not one of another range


def unit_colors(values: np.ndarray, what: str) -> tuple[np.ndarray, str | None]:
    """Scale colours [n, channels] to [0, 1], and say how where that is a guess: (colours, note).

    Whole numbers are of their type's range (8 and 16 bits), but of 0 to 255 where none is larger
    in a wider type. Floating point is of 0 to 1, but of 0 to 255 where all are whole numbers and
    one is above 1. Raises ValueError that names `what` and its row for any other number.
    """
    values = np.asarray(values)
    if not values.size:
        return values.astype(float), None
    bad = np.flatnonzero(~np.isfinite(values.astype(float)).all(1))
    if len(bad):
        raise ValueError(f"{what} {bad[0]} has the colour {_shown(values[bad[0]])}, no number")
    top = values.max()
    low = np.flatnonzero((values < 0).any(1))
    if len(low):
        raise ValueError(f"{what} {low[0]} has the colour {_shown(values[low[0]])}, below 0")
    whole = bool((values == np.rint(values)).all())
    if values.dtype.kind in "iu" and values.dtype.itemsize == 1:
        return values / 255, None
    if values.dtype.kind == "f" and top <= 1 + ROUNDING:
        return values.clip(0, 1).astype(float), None
    if whole and top <= 255:
        return values / 255, f"{what} colours are taken as numbers from 0 to 255"
    if values.dtype.kind in "iu" and top <= 65535:
        guessed = values.dtype.itemsize > 2
        note = f"{what} colours are taken as numbers from 0 to 65535" if guessed else None
        return values / 65535, note
    row = int(np.flatnonzero((values == top).any(1))[0])
    raise ValueError(
        f"{what} {row} has the colour {_shown(values[row])}: neither all from 0 to 1 nor all whole "
        "numbers from 0 to 255"
    )


def _shown(row: np.ndarray) -> str:
    return " ".join(f"{value:.6g}" for value in row.tolist())
