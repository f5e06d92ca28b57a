"""Reference sparse convolution in plain torch: any float dtype, autograd."""

import torch
from torch import Tensor


def sparse_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor
) -> Tensor:
    """The sum over taps of all rows, gathered and multiplied."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])  # row -1 is zero
    y = sum(
        padded[near.long()] @ w.T
        for near, w in zip(neighbours.T, weight.flatten(1, 3).unbind(1), strict=True)
    )
    return y if bias is None else y + bias


def subdivide_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, child_neighbours: Tensor
) -> Tensor:
    """The convolution of 8 copies of each row; it takes the children's own map."""
    return sparse_conv_reference(x.repeat_interleave(8, 0), weight, bias, child_neighbours)
