"""Random tensors of a shape."""

import torch

DTYPES = [torch.float32, torch.float16]


def normal(*shape, dtype=torch.float32, device=None, spread=1.0, seed=0):
    """Random normal numbers that require gradients; the shape is a part of the seed."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * spread
    return x.to(device, dtype).requires_grad_()
