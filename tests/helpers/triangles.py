"""Meshes that tests share."""

import math

import torch

from kernels.camera import Camera


def soup(
    F: int, seed: int = 0, spread: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vertices [2 F, 3] around the origin, faces [F, 3] between near ones of them, attributes [2 F,
    6].
    """
    rng = torch.Generator().manual_seed(seed)
    vertices = torch.rand(2 * F, 3, generator=rng) * 2 * spread - spread
    faces = (
        torch.randint(0, 2 * F, (F, 3), generator=rng, dtype=torch.int32)
        if F
        else torch.zeros(0, 3, dtype=torch.int32)
    )
    return vertices, faces, torch.rand(2 * F, 6, generator=rng)


def ball(n: int, radius: float = 0.4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A closed sphere of about 4 n^2 faces with small waves: vertices, faces that turn outwards,
    attributes.
    """
    theta = torch.linspace(0, math.pi, n + 1)[1:-1]
    phi = torch.arange(2 * n) * math.pi / n
    t, p = (x.flatten() for x in torch.meshgrid(theta, phi, indexing="ij"))
    ring = torch.stack([t.sin() * p.cos(), t.sin() * p.sin(), t.cos()], 1)
    poles = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    vertices = torch.cat(
        [ring * (radius + 0.03 * (5 * t).sin() * (3 * p).cos())[:, None], poles * radius]
    )
    i = torch.arange(n - 2)[:, None] * 2 * n
    j = torch.arange(2 * n)
    k = (j + 1) % (2 * n)
    a, b, c, d = ((i + x).flatten() for x in (j, k, j + 2 * n, k + 2 * n))
    top = len(ring)
    last = (n - 2) * 2 * n
    faces = torch.cat(
        [
            torch.stack([a, c, b], 1),
            torch.stack([b, c, d], 1),
            torch.stack([torch.full_like(j, top), j, k], 1),
            torch.stack([torch.full_like(j, top + 1), last + k, last + j], 1),
        ]
    )
    rng = torch.Generator().manual_seed(1)
    return vertices, faces.int(), torch.rand(len(vertices), 6, generator=rng)


def cameras(V: int, width: int, height: int, radius: float = 2.0) -> Camera:
    return Camera.orbit(
        torch.arange(V) * 2.0 + 0.3, torch.arange(V) * 0.4 - 0.5, radius, 0.7, width, height
    )
