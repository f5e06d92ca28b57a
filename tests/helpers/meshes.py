"""Meshes that tests share."""

import math

import torch

from kernels.camera import Camera
from kernels.mesh.clip import projection, to_clip
from kernels.mesh.packing import make_mesh_layout


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
    """Views of the origin from different sides."""
    return Camera.orbit(
        torch.arange(V) * 2.0 + 0.3, torch.arange(V) * 0.4 - 0.5, radius, 0.7, width, height
    )


def positions(vertices: torch.Tensor, width: int, height: int, radius: float = 2.0) -> torch.Tensor:
    """Clip positions of one view, in fp32."""
    matrix = projection(cameras(1, width, height, radius), 1.0, 3.0, torch.float64)[0]
    return (vertices.double() @ matrix[:, :3].T + matrix[:, 3]).float()


def batch(device):
    """Three scenes, the middle one empty, and five views of them: positions that require a
    gradient, faces, layout.
    """
    a = soup(14, 1)
    b = ball(3)
    starts = [0, len(a[0]), len(a[0]), len(a[0]) + len(b[0])]
    face_starts = [0, len(a[1]), len(a[1]), len(a[1]) + len(b[1])]
    view_scene = [2, 0, 1, 2, 0]
    layout = make_mesh_layout(starts, face_starts, view_scene, device)
    vertices = torch.cat([a[0], b[0]]).to(device)
    faces = torch.cat([a[1], b[1]]).to(device)
    clip = to_clip(vertices, projection(cameras(5, 18, 12), 1.0, 3.0).to(device), layout.vertices)
    return clip.detach().requires_grad_(), faces, layout


FIELDS = ("alpha", "depth", "normal", "color", "normal_map")
VIEWS = [2, 1, 0, 2]


def pictures(image) -> list[torch.Tensor]:
    """All pictures of an image."""
    return [getattr(image, name) for name in FIELDS]


def scenes(device, dtype=torch.float32):
    """Three scenes, the middle one without faces, and no last vertices used: tensors, starts of
    vertices and faces.
    """
    a = soup(12, 1)
    b = ball(3)
    vertices, colors = (
        torch.cat([a[i], torch.full((2, 3 + 3 * (i > 0)), 0.1), b[i]]).to(device, dtype)
        for i in (0, 2)
    )
    faces = torch.cat([a[1], b[1]]).to(device)
    starts = torch.tensor([0, len(a[0]), len(a[0]) + 2, len(vertices)])
    return (
        vertices.requires_grad_(),
        faces,
        colors.requires_grad_(),
        starts,
        [0, len(a[1]), len(a[1]), len(faces)],
    )


def gradients(image, inputs, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Of a random linear loss; the graph stays."""
    rng = torch.Generator().manual_seed(5)
    upstream = [scale * torch.randn(t.shape, generator=rng).to(t) for t in pictures(image)]
    return torch.autograd.grad(pictures(image), inputs, upstream, retain_graph=True)
