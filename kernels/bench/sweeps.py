"""Sweeps over one variable: attention, windows and neighbours by rows, window size and occupancy.

Notebooks plot these. The variable is written `name = value` in a case's size, beside `N = rows`.
Work and baselines are those of kernels.bench.attention and kernels.bench.voxels, without the naive
references and without FlexAttention, which would be compiled again for every point.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kernels.bench.attention import WINDOW, attention_case, sizes, voxels
from kernels.bench.case import Case
from kernels.bench.shells import batch, occupied, shell
from kernels.bench.voxels import SHIFT, neighbours_case, partition_case
from kernels.voxels.coords import LIMIT

# resolutions of a sphere: N grows with their square
GRIDS = {"small": (8, 16, 32), "base": (16, 32, 48, 64, 96, 128)}
SIDES = {"small": (4, 8, 16), "base": (4, 8, 12, 16)}  # of windows
ROWS = {"small": (8, 32, 128, 512), "base": (8, 16, 32, 64, 128, 256, 512)}  # in each window of 8^3
TOTAL = {"small": 2048, "base": 16384}  # rows in all, at every occupancy


def _sweep(
    op: str,
    points: dict[str, tuple[Tensor, int]],
    size: str,
    dtypes: list[str],
    device: torch.device,
) -> Iterator[Case]:
    """Measure attention at points: name -> coordinates and window."""
    for name, (coords, window) in points.items():
        for dtype in dtypes:
            case = attention_case(
                "window_attention", name, dtype, coords, *sizes(size), device, window
            )
            baselines = {
                baseline: impl
                for baseline, impl in case.baselines.items()
                if "FlexAttention" not in baseline
            }
            yield replace(case, op=op, baselines=baselines, naive=False)


def attention_rows_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure spheres of growing resolution: N rows, windows about equally full."""
    points = {f"grid = {grid}": (batch(shell("sphere", grid)), WINDOW) for grid in GRIDS[size]}
    return _sweep("attention_rows", points, size, dtypes, device)


def attention_window_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the first coordinate set in windows of growing size."""
    coords = next(iter(voxels(size).values()))
    return _sweep(
        "attention_window",
        {f"window = {w}": (coords, w) for w in SIDES[size]},
        size,
        dtypes,
        device,
    )


def attention_occupancy_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure as many rows in fewer and fuller windows of 8^3.

    Surfaces have 50 to 120 rows a window.
    """
    points = {
        f"rows = {n}": (batch(occupied(TOTAL[size] // n, n, WINDOW)), WINDOW) for n in ROWS[size]
    }
    return _sweep("attention_occupancy", points, size, dtypes, device)


def _sphere(size: str) -> tuple[Tensor, int]:
    """Make voxels of one sample, and the size of the grid they fill."""
    grid = 16 if size == "small" else 64
    return batch(shell("sphere", grid)), grid


def partition_window_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the partition of the same voxels into windows of growing size."""
    coords, _ = _sphere(size)
    for window in SIDES[size]:
        yield partition_case(
            "partition_window",
            f"window = {window}, N = {len(coords)}",
            coords.to(device),
            window,
            window // 2,
        )


def _spread(size: str) -> Iterator[tuple[str, Tensor, int]]:
    """Move the same voxels further and further apart.

    The share of cells that hold one falls with the cube of the extent.
    """
    coords, grid = _sphere(size)
    for factor in (1, 2, 4, 8, 16, 64):
        if (extent := grid * factor) <= LIMIT:
            apart = coords.clone()
            apart[:, 1:] *= factor
            yield f"extent = {extent}, N = {len(coords)}", apart, extent


def partition_extent_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the partition of voxels ever further apart.

    It scans a grid of the whole extent, until sorting N keys is cheaper.
    """
    for name, coords, _ in _spread(size):
        yield partition_case("partition_extent", name, coords.to(device), WINDOW, SHIFT)


def neighbours_extent_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the neighbours of voxels ever further apart.

    The table is a volume of the whole extent, until a hash table is smaller.
    """
    for name, coords, extent in _spread(size):
        yield neighbours_case("neighbours_extent", name, coords.to(device), extent, naive=False)
