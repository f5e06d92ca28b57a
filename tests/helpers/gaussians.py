"""Random Gaussians, views of them, and the gradients of their pictures."""

import torch

from kernels.camera import Camera


def scene(G: int, device, seed: int = 0, dtype=torch.float32) -> list[torch.Tensor]:
    """Gaussians around the origin, some needles, some large, some faint, that require gradients."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=rng, dtype=torch.float64)
    center = normal(G, 3) * 0.25
    scale = torch.exp(normal(G, 3) * 0.7 - 3.5)
    rotation = torch.nn.functional.normalize(normal(G, 4)) * (1 + 0.05 * normal(G, 1))
    tensors = [center, scale, rotation, torch.sigmoid(2 * normal(G, 1)), normal(G, 1, 3)]
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def camera(V: int, width: int, height: int, device="cpu") -> Camera:
    """Views around the origin with an off-centre principal point."""
    views = Camera.orbit(
        torch.arange(V) * 2.0, torch.arange(V) * 0.4 - 0.5, 2.0, 0.6, width, height
    )
    views.intrinsics[:, 0, 2] += 0.06  # an off-centre principal point
    views.intrinsics[:, 1, 2] -= 0.04
    return views.to(device)


def colors(V: int, device="cpu") -> torch.Tensor:
    """A background [V, 3] for each view."""
    return torch.linspace(0, 1, 3 * V, device=device).view(V, 3)


def both(image) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour and alpha of a picture."""
    return image.color, image.alpha


def grads(image, inputs, scale: float = 1.0) -> list[torch.Tensor]:
    """Gradients of a random linear function of colour and alpha."""
    rng = torch.Generator().manual_seed(5)
    upstream = [scale * torch.randn(t.shape, generator=rng).to(t) for t in both(image)]
    return list(torch.autograd.grad(both(image), inputs, upstream))
