"""Group norm over each sample's voxels, with SiLU fused: N voxels, C channels in groups, B samples.

A group's statistics are those of its channels over all voxels of one sample. A fixed number of
programs shares the rows of a sample, however many they are: one launch a pass for the whole batch,
and nothing waits for the device. Partial means and squares are merged in a fixed order (Chan et
al., Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979), so means far
from zero cost no digits. Inputs are fp16, bf16 or fp32; arithmetic is fp32.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend
from kernels.backend import triton
from kernels.checks import check_dtype, check_eps, check_tensors, wide, wide_dtype
from kernels.norm import group_tiles

TILE = 2048  # elements of a program's step; not yet measured on a GPU
BLOCKS = 2  # programs of 8 warps a multiprocessor and sample; not yet measured on a GPU
MOST_CHANNELS = 4096  # a row must fit in a program


def _tiles(x: Tensor) -> dict[str, int]:
    """Rows and padded channels of a program's step, and programs per sample.

    Those of a sample are as many in any batch: its result is the same to the bit.
    """
    TILE_C = triton.next_power_of_2(x.shape[1])
    programs = BLOCKS * backend.multiprocessors(x)
    return {"ROWS": max(1, TILE // TILE_C), "TILE_C": TILE_C, "P": programs}


def _empty_statistics(x: Tensor, samples: int, groups: int) -> tuple[Tensor, Tensor]:
    """Space for mean and reciprocal deviation, each [B, groups]."""
    mean = x.new_empty(samples, groups, dtype=wide_dtype(x))
    return mean, torch.empty_like(mean)


def _samples(starts: Tensor, *tensors: Tensor) -> Iterator[tuple]:
    """The number of each sample that has rows, and its rows of every tensor, for the torch path."""
    for b, (first, end) in enumerate(pairwise(starts.tolist())):
        if first < end:
            yield b, *(t[first:end] for t in tensors)


def _forward_torch(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x)
    mean, rstd = _empty_statistics(x, len(starts) - 1, groups)
    mean.zero_()
    rstd.zero_()
    for b, rows, out in _samples(starts, x, y):
        cube = wide(rows).view(len(rows), groups, -1)
        variance, mean[b] = torch.var_mean(cube, dim=(0, 2), correction=0)
        rstd[b] = (variance + eps).rsqrt()
        normed = (cube - mean[b, :, None]) * rstd[b, :, None]
        z = normed.view(rows.shape) * weight + bias
        out.copy_(F.silu(z) if silu else z)
    return y, mean, rstd


def _backward_torch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x)
    dweight = mean.new_zeros(x.shape[1])
    dbias = mean.new_zeros(x.shape[1])
    for b, rows, up, out in _samples(starts, x, dy, dx):
        cube = (len(rows), groups, -1)
        normed = (wide(rows).view(cube) - mean[b, :, None]) * rstd[b, :, None]
        normed = normed.view(rows.shape)
        dz = wide(up)
        if silu:
            dz = torch.ops.aten.silu_backward(dz, normed * weight + bias)
        product = dz * normed
        dweight += product.sum(0)
        dbias += dz.sum(0)
        g = (dz * weight).view(cube)
        along = (product * weight).view(cube).mean((0, 2))[:, None]
        offset = g.mean((0, 2))[:, None]
        d = (g - normed.view(cube) * along - offset) * rstd[b, :, None]
        out.copy_(d.view(rows.shape))
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


@torch.library.custom_op("trislat::group_norm", mutates_args=())
def _group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, C], mean and reciprocal deviation [B, groups]."""
    if backend.is_torch(x):
        return _forward_torch(x, weight, bias, starts, groups, eps, silu)
    C = x.shape[1]
    B = len(starts) - 1
    tiles = _tiles(x)
    P = tiles["P"]
    y = torch.empty_like(x)
    mean, rstd = _empty_statistics(x, B, groups)
    part = x.new_empty(B, P, 2, C, dtype=torch.float32)
    args = (x, starts, part)
    # with 8 warps ptxas spills there
    warps = 16 if tiles["TILE_C"] >= 1024 and backend.target(x) == "sm_100" else 8
    backend.launch(group_tiles._partial_statistics, (P, B), *args, C=C, **tiles, num_warps=warps)
    args = (part, starts, mean, rstd, eps)
    merge = dict(TILE_W=triton.next_power_of_2(C // groups), P=P)
    backend.launch(
        group_tiles._merge_statistics, (groups, B), *args, C=C, GROUPS=groups, **merge, num_warps=4
    )
    args = (x, weight, bias, starts, mean, rstd, y)
    constants = dict(C=C, GROUPS=groups, SILU=silu, **tiles)
    backend.launch(group_tiles._group_norm_fwd, (P, B), *args, **constants, num_warps=8)
    return y, mean, rstd


@torch.library.custom_op("trislat::group_norm_backward", mutates_args=())
def _group_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, each in its input's dtype."""
    if backend.is_torch(x):
        return _backward_torch(dy, x, weight, bias, starts, mean, rstd, groups, silu)
    C = x.shape[1]
    B = len(starts) - 1
    tiles = _tiles(x)
    grid = (tiles["P"], B)
    constants = dict(C=C, GROUPS=groups, SILU=silu, **tiles, num_warps=8)
    dx = torch.empty_like(x)
    part = x.new_empty(B, tiles["P"], 2, C, dtype=torch.float32)
    args = (x, weight, bias, starts, mean, rstd, dy)
    backend.launch(group_tiles._partial_gradients, grid, *args, part, **constants)
    sums = part.sum(1)  # [B, 2, C]
    elements = (starts[1:] - starts[:-1]).clamp(min=1) * (C // groups)
    along = (sums * weight).view(B, 2, groups, C // groups).sum(3) / elements[:, None, None]
    backend.launch(group_tiles._group_norm_bwd, grid, *args, along, dx, **constants)
    dweight = sums[:, 0].sum(0)
    dbias = sums[:, 1].sum(0)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


@_group_norm.register_fake
def _(x, weight, bias, starts, groups, eps, silu):
    return torch.empty_like(x), *_empty_statistics(x, starts.shape[0] - 1, groups)


@_group_norm_backward.register_fake
def _(dy, x, weight, bias, starts, mean, rstd, groups, silu):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx, inputs, output):
    x, weight, bias, starts, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, starts, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dy, *_):
    args = *ctx.saved_tensors, ctx.groups, ctx.silu
    return *torch.ops.trislat.group_norm_backward(dy.contiguous(), *args), None, None, None, None


_group_norm.register_autograd(_differentiate, setup_context=_save)


def group_norm(
    x: Tensor,  # [N, C] fp16, bf16 or fp32
    weight: Tensor,  # [C] of any float dtype
    bias: Tensor,  # [C]
    starts: Tensor,  # [B + 1] int32, first 0, last N: sample b owns rows starts[b] : starts[b + 1]
    groups: int = 32,
    eps: float = 1e-5,
    *,
    silu: bool = False,
) -> Tensor:  # [N, C], as x
    """Group norm over all voxels of each sample, affine, in fp32; then SiLU if `silu`.

    Wu and He, Group Normalization, arXiv 1803.08494. Samples may be empty. Gradients of weight and
    bias are summed in a fixed order. Raises ValueError, naming both sizes, for channels that are no
    multiple of the groups or more than 4096, weights of another size, another rank or dtype, and an
    eps that is negative or not finite; TypeError for what is no tensor.
    """
    check_tensors(x=x, weight=weight, bias=bias, starts=starts)
    check_eps(eps)
    if x.ndim != 2:
        raise ValueError(f"x must be [N, C], got {list(x.shape)}")
    check_dtype(x)
    C = x.shape[1]
    if groups < 1 or C < 1 or C % groups:
        raise ValueError(f"{C} channels are not a multiple of {groups} groups")
    if C > MOST_CHANNELS:
        raise ValueError(f"{C} channels: at most {MOST_CHANNELS} fit in a program")
    if weight.shape != (C,) or bias.shape != (C,):
        raise ValueError(
            f"weight {list(weight.shape)} and bias {list(bias.shape)} must be [{C}], the "
            "channels of x"
        )
    if starts.ndim != 1 or len(starts) < 1 or starts.dtype != torch.int32:
        raise ValueError(f"starts must be [B + 1] int32, got {list(starts.shape)} {starts.dtype}")
    tensors = [t.contiguous() for t in (x, weight, bias, starts)]
    return torch.ops.trislat.group_norm(*tensors, groups, eps, silu)[0]


def group_norm_reference(x, weight, bias, starts, groups=32, eps=1e-5, silu=False):
    """Group norm from the mean and the variance of one sample after the other."""
    pieces = [x[:0] * weight + bias]
    for a, b in pairwise(starts.tolist()):
        if a < b:
            cube = x[a:b].reshape(b - a, groups, -1)
            centred = cube - cube.mean((0, 2), keepdim=True)
            deviation = (centred.square().mean((0, 2), keepdim=True) + eps).sqrt()
            pieces.append((centred / deviation).flatten(1) * weight + bias)
    y = torch.cat(pieces)
    return y * torch.sigmoid(y) if silu else y
