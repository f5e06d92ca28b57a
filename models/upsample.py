"""Sparse convolutions, group norm and the block that doubles the resolution.

N voxels with C channels have 8N children. Parameter names and shapes are those of the published
mesh decoder (microsoft/TRELLIS), so its checkpoints load unchanged. Parameters stay fp32; a layer
computes in its input's dtype, sums and statistics in fp32.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from kernels import (
    ConvTables,
    SpatialCache,
    backend,
    conv_tables,
    group_norm,
    neighbours,
    octant_tables,
    sparse_conv,
    subdivide_conv,
)
from models.layers import linear

SKIP_WEIGHTS = ("linear", "spconv")


class _Kernel(nn.Module):
    """Weight [Co, k, k, k, Ci] and bias [Co] of a convolution.

    Initial values are uniform in +-1 / sqrt(k^3 Ci), as spconv's.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        bound = (kernel_size**3 * in_channels) ** -0.5
        shape = out_channels, kernel_size, kernel_size, kernel_size, in_channels
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))


class SparseConv3d(nn.Module):
    """Submanifold convolution with an odd kernel size.

    Its parameters are `conv.weight` [Co, k, k, k, Ci] and `conv.bias` [Co]. `skip_weight` says how
    a 1x1x1 weight is read: "linear" as the matrix [Co, Ci] that its shape says; "spconv" as
    published models were trained, whose library reads the same memory as a matrix [Ci, Co] (its
    issue 450). Raises ValueError for an even kernel size and another skip_weight.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, skip_weight: str = "linear"
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} must be odd and at least 1")
        if skip_weight not in SKIP_WEIGHTS:
            raise ValueError(f"skip_weight {skip_weight!r} is not one of {', '.join(SKIP_WEIGHTS)}")
        self.kernel_size = kernel_size
        self.skip_weight = skip_weight
        self.conv = _Kernel(in_channels, out_channels, kernel_size)

    def forward(self, x: Tensor, cache: SpatialCache) -> Tensor:  # [N, Ci] -> [N, Co]
        weight = self.conv.weight
        bias = self.conv.bias
        if self.kernel_size > 1:
            taps = cache.get(neighbours, self.kernel_size)
            return sparse_conv(x, weight, bias, taps, tables=self._tables(x, cache))
        if self.skip_weight == "spconv":
            return linear(x, weight.view(weight.shape[4], weight.shape[0]).T, bias)
        return linear(x, weight.flatten(1), bias)

    def after_subdivision(self, x: Tensor, cache: SpatialCache) -> Tensor:  # [N, Ci] -> [8N, Co]
        """`forward` of x copied to the children of the cache's voxels, without the copies.

        For kernel size 3.
        """
        taps = cache.get(neighbours, 3)
        tables = self._tables(x, cache, after_subdivision=True)
        return subdivide_conv(x, self.conv.weight, self.conv.bias, taps, tables=tables)

    def _tables(
        self, x: Tensor, cache: SpatialCache, after_subdivision: bool = False
    ) -> ConvTables | None:
        """Tables of the convolution; that of a CPU tensor reads the neighbours alone."""
        if backend.is_torch(x):
            return None
        gradients = torch.is_grad_enabled()
        if after_subdivision:
            return cache.get(octant_tables, gradients)
        return cache.get(conv_tables, self.kernel_size, gradients)


class GroupNorm(nn.Module):
    """Group norm over all voxels of each sample, then SiLU."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels are not a multiple of {groups} groups")
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, cache: SpatialCache) -> Tensor:  # [N, C]
        return group_norm(x, self.weight, self.bias, cache.starts, self.groups, self.eps, silu=True)


class SubdivideBlock(nn.Module):
    """Replace every voxel by its 8 children: conv(act(conv(subdivided act(x)))) + skip(x).

    Here act is group norm, then SiLU. The children start as copies of their parent, so the first
    convolution and the skip read the parents. The last convolution starts at zero, as published.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int = 32, skip_weight: str = "linear"
    ):
        super().__init__()
        self.act_layers = nn.ModuleDict({"0": GroupNorm(in_channels, groups)})
        self.out_layers = nn.ModuleDict(
            {
                "0": SparseConv3d(in_channels, out_channels),
                "1": GroupNorm(out_channels, groups),
                "3": SparseConv3d(out_channels, out_channels),
            }
        )
        nn.init.zeros_(self.out_layers["3"].conv.weight)
        nn.init.zeros_(self.out_layers["3"].conv.bias)
        if in_channels != out_channels:
            self.skip_connection = SparseConv3d(in_channels, out_channels, 1, skip_weight)
        else:
            self.skip_connection = None

    def forward(self, x: Tensor, cache: SpatialCache) -> tuple[Tensor, SpatialCache]:
        """x [N, Ci] on the cache's voxels -> [8N, Co] and the cache of the children."""
        children = cache.subdivide()
        h = self.out_layers["0"].after_subdivision(self.act_layers["0"](x, cache), cache)
        h = self.out_layers["3"](self.out_layers["1"](h, children), children)
        skip = x if self.skip_connection is None else self.skip_connection(x, cache)
        h = rearrange(h, "(n child) c -> n child c", child=8) + skip[:, None]
        return rearrange(h, "n child c -> (n child) c"), children
