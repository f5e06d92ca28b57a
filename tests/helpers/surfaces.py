"""Grids of voxels, their corners, and the gradients of surfaces extracted from them."""

import torch

# of a voxel's corners from its first
OFFSET = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)])


def grads(surfaces, fields, seed=0, scale=1.0):
    """The gradient of fields from random upstream gradients of every output."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [t for t in surfaces if t.requires_grad]
    up = [
        scale * torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)
        for t in outputs
    ]
    return torch.autograd.grad(outputs, fields, up)[0]


def full_grid(R):
    """Coordinates [R^3, 4] of every voxel of a grid."""
    axis = torch.arange(R)
    return torch.nn.functional.pad(torch.cartesian_prod(axis, axis, axis), (1, 0)).int()


def corners(coords, R):
    """The vertex at each corner of each voxel, [N, 8]."""
    x, y, z = (coords[:, None, 1:] + OFFSET).unbind(-1)
    return (x * (R + 1) + y) * (R + 1) + z
