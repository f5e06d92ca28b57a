"""Random radiance fields, views of them, and the gradients of their pictures."""

import torch

from kernels.camera import Camera


def voxels(sizes, resolution, rank, dim, device="cpu", seed=0, density=0.0, dtype=torch.float32):
    """Position, and trivec, density, sh that require gradients, of scenes of a few voxels around
    the middle; starts.
    """
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=rng, dtype=torch.float64)
    N = sum(sizes)
    block = torch.cartesian_prod(*[torch.arange(4)] * 3) + resolution // 2 - 2
    cells = [block[torch.randperm(64, generator=rng)[:n]] for n in sizes]
    position = (torch.cat([block[:0], *cells]) + 0.5) / resolution
    tensors = [
        1 + 0.3 * normal(N, rank, 3, dim),
        density + (1 + abs(density)) * normal(N, rank),
        normal(N, rank, 1, 3),
    ]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return (
        # 16 bits have too few digits for a place
        position.to(device, torch.promote_types(dtype, torch.float32)),
        [t.to(device, dtype).requires_grad_() for t in tensors],
        starts,
    )


def camera(V: int, width: int, height: int, resolution: int, device="cpu") -> Camera:
    """Views of the block of `voxels`, which fills most of them."""
    views = Camera.orbit(
        torch.arange(V) * 2.0 + 0.3,
        torch.arange(V) * 0.4 - 0.5,
        2.0,
        3.4 / resolution,
        width,
        height,
    )
    views.intrinsics[:, 0, 2] += 0.06  # an off-centre principal point
    views.intrinsics[:, 1, 2] -= 0.04
    return views.to(device)


def colors(V: int, device="cpu") -> torch.Tensor:
    """A background [V, 3] for each view."""
    return torch.linspace(0, 1, 3 * V, device=device).view(V, 3)


def safe_offset(
    position, starts, view: Camera, view_scene, resolution: int, dim: int
) -> torch.Tensor:
    """Random offsets [V, H, W] that keep every sample away from the faces of voxels, where fp32 and
    float64 may disagree.
    """
    view = view.to("cpu", torch.float64)
    position = position.detach().cpu().double()
    rng = torch.Generator().manual_seed(3)
    chosen = []
    origins, directions = view.rays()
    for v, s in enumerate(view_scene):
        low = position[starts[s] : starts[s + 1]] - 0.5 - 0.5 / resolution
        d = torch.nn.functional.normalize(directions[v].reshape(-1, 3), dim=1)
        a, b = (
            (low + side - origins[v]) / d[:, None] * (2 * dim * resolution)
            for side in (0, 1 / resolution)
        )
        near, far = torch.minimum(a, b).amax(2, True), torch.maximum(a, b).amin(2, True)
        t = torch.where(far > near - 0.1, torch.cat([near, far], 2), 0.0).flatten(1)
        t = torch.nn.functional.pad(t, (0, 1))
        candidates = torch.rand(100, len(d), generator=rng, dtype=torch.float64) * 0.9 + 0.05
        distance = ((t - candidates[..., None] + 0.5) % 1 - 0.5).abs().amin(2)
        chosen.append(candidates.gather(0, distance.argmax(0)[None]).view(view.height, view.width))
        assert distance.amax(0).min() > 2e-3
    return torch.stack(chosen).float() if chosen else torch.zeros(0, view.height, view.width)


def outputs(image) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Colour, alpha and depth of a picture."""
    assert image.normal is None
    return image.color, image.alpha, image.depth


def grads(image, inputs, scale: float = 1.0) -> list[torch.Tensor]:
    """Gradients of a random linear function of colour, alpha and depth."""
    rng = torch.Generator().manual_seed(5)
    upstream = [scale * torch.randn(t.shape, generator=rng).to(t) for t in outputs(image)]
    return list(torch.autograd.grad(outputs(image), inputs, upstream))


def simple(device, density: float = 30.0, dtype=torch.float32, sizes=(3, 4)):
    """Two scenes, two views and their arguments."""
    position, inputs, starts = voxels(sizes, 16, 2, 4, device, density=density, dtype=dtype)
    offset = torch.rand(2, 12, 15, generator=torch.Generator().manual_seed(4)).to(device)
    return (
        position,
        inputs,
        (starts, camera(2, 15, 12, 16, device), [1, 0], colors(2, device), 16, offset),
    )
