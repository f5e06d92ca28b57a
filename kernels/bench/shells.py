"""Voxel shells with the window statistics of real surfaces: N voxels on a grid of `resolution`^3.

A voxel is active where the surface f = 0 crosses it: f changes sign among its eight corners. At
64^3 and windows of 8^3 a plain surface fills a window with 50 to 80 of its 512 voxels and nearly
always less than 128; noise, interiors and thin layers bring windows above 256. Seeds are fixed: the
same name gives the same voxels.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Field = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _waves(seed: int, frequency: float) -> Field:
    """Make a smooth random field of unit variance: 24 plane waves."""
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=(24, 3)) * (frequency * np.pi)
    phase = generator.uniform(0, 2 * np.pi, 24)
    amplitude = generator.normal(size=24) / np.sqrt(24)

    def field(x, y, z):
        return sum(
            a * np.cos(d[0] * x + d[1] * y + d[2] * z + p)
            for d, p, a in zip(direction, phase, amplitude, strict=True)
        )

    return field


def _sphere(radius: float, noise: float = 0.0, seed: int = 0, frequency: float = 3.0) -> Field:
    waves = _waves(seed, frequency)
    return lambda x, y, z: (
        np.sqrt(x * x + y * y + z * z) - radius + (noise * waves(x, y, z) if noise else 0.0)
    )


def _rotated_box(x, y, z):
    sides = 0.8 * x + 0.6 * y, -0.48 * x + 0.64 * y + 0.6 * z, 0.36 * x - 0.48 * y + 0.8 * z
    return np.maximum.reduce([abs(side) for side in sides]) - 0.30


def _gyroid(x, y, z):
    sheet = (
        np.sin(14 * x) * np.cos(14 * y)
        + np.sin(14 * y) * np.cos(14 * z)
        + np.sin(14 * z) * np.cos(14 * x)
    )
    return np.maximum(np.sqrt(x * x + y * y + z * z) - 0.48, abs(sheet) - 0.35)


def _blobs(x, y, z):
    return np.maximum(np.sqrt(x * x + y * y + z * z) - 0.49, _waves(1, 6)(x, y, z) - 0.1)


FIELDS: dict[str, Field] = {
    "sphere": _sphere(0.48),
    "small sphere": _sphere(0.30),
    "rotated box": _rotated_box,
    "noisy sphere": _sphere(0.40, 0.05, 0, 3),
    "rough sphere": _sphere(0.40, 0.08, 1, 6),
    "gyroid": _gyroid,
    "blobs": _blobs,
}


def shell(field: str | Field, resolution: int = 64) -> Tensor:  # [N, 3] int32, sorted by x, y, z
    """List the active voxels of one of FIELDS, or of a function of x, y, z in [-0.5, 0.5].

    Raises ValueError for an unknown name.
    """
    if isinstance(field, str):
        if field not in FIELDS:
            raise ValueError(f"shell {field!r} is not one of {', '.join(FIELDS)}")
        field = FIELDS[field]
    edge = np.linspace(-0.5, 0.5, resolution + 1)
    active = []
    for x in range(resolution):  # slab by slab: a grid of 256^3 corners would take gigabytes
        inside = field(*np.meshgrid(edge[x : x + 2], edge, edge, indexing="ij")) > 0
        corners = np.stack(
            [
                inside[i, j : j + resolution, k : k + resolution]
                for i in (0, 1)
                for j in (0, 1)
                for k in (0, 1)
            ]
        )
        yz = np.argwhere(corners.any(0) & ~corners.all(0))
        active.append(np.concatenate([np.full((len(yz), 1), x), yz], 1))
    return torch.from_numpy(np.concatenate(active)).int()


# [windows * rows, 3] int32, sorted by x, y, z
def occupied(windows: int, rows: int, window: int = 8, seed: int = 0) -> Tensor:
    """Draw `rows` voxels in each of `windows` cubes.

    Raises ValueError for more rows than a cube has cells.
    """
    cells = window**3
    if rows > cells:
        raise ValueError(f"{rows} rows do not fit a window of {window}^3 = {cells} voxels")
    generator = torch.Generator().manual_seed(seed)
    edge = math.ceil(windows ** (1 / 3))
    cell = torch.rand(windows, cells, generator=generator).argsort(1)[:, :rows]
    cube = torch.arange(windows)[:, None].expand(-1, rows)
    digits = lambda i, base: torch.stack([i // base**2, i // base % base, i % base], -1)
    xyz = (digits(cube, edge) * window + digits(cell, window)).view(-1, 3)
    size = edge * window
    return xyz[((xyz[:, 0] * size + xyz[:, 1]) * size + xyz[:, 2]).argsort()].int()


def batch(*samples: Tensor) -> Tensor:  # [N, 4] int32: batch, x, y, z
    """Stack samples [n, 3] below each other, the sample's index in front."""
    return torch.cat(
        [torch.nn.functional.pad(xyz, (1, 0), value=b) for b, xyz in enumerate(samples)]
    )
