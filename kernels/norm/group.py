"""Group norm over each sample's voxels, with SiLU fused: N voxels, C channels in groups, B samples.

A group's statistics are those of its channels over all voxels of one sample. A sample's rows are
shared by a fixed number of programs, whatever their number: one launch a pass for the whole batch,
nothing waits for the device. Partial means and squares are merged in a fixed order (Chan et al.,
Updating Formulae and a Pairwise Algorithm for Computing Sample Variances,
1979), so means far from zero cost no digits. Inputs are fp16, bf16 or fp32; arithmetic is fp32.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.checks import check_eps, check_tensors

TILE = 2048  # elements of a program's step, so that nothing spills; not yet measured on a GPU
PROGRAMS = 128  # that share the rows of a sample; not yet measured on a GPU
MOST_CHANNELS = 4096  # a row must fit in a program


@triton.jit
def _partial_statistics(
    x_ptr,
    starts_ptr,
    part_ptr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
    P: tl.constexpr,
):
    """part [B, P, 2, C]: mean and squared deviations of each channel over the program's rows: tiles
    p, p + P, ... of sample b.
    """
    p, b = tl.program_id(0), tl.program_id(1)
    begin = tl.load(starts_ptr + b).to(tl.int64)
    end = tl.load(starts_ptr + b + 1).to(tl.int64)
    c = tl.arange(0, TILE_C)
    # the program's first row: means start from it, so those of equal values stay what they are
    own = begin + p * ROWS
    mean = tl.load(x_ptr + own * C + c, mask=c < tl.where(own < end, C, 0), other=0.0).to(
        tl.float32
    )
    squares = tl.zeros([TILE_C], tl.float32)
    seen = 0.0
    for first in range(begin + p * ROWS, end, P * ROWS):
        n = first + tl.arange(0, ROWS)
        live = (n < end)[:, None] & (c < C)[None, :]  # [ROWS, TILE_C]
        x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
        count = tl.minimum(end - first, ROWS).to(tl.float32)
        deviation = tl.where(live, x - mean[None, :], 0.0)
        # from the mean so far to that of these rows, [TILE_C]
        step = tl.sum(deviation, 0) * (1.0 / count)
        deviation = tl.where(live, deviation - step[None, :], 0.0)
        total = seen + count
        squares += tl.sum(deviation * deviation, 0) + step * step * (seen * count / total)
        mean += step * (count / total)
        seen = total
    part = part_ptr + (b * P + p) * 2 * C + c
    tl.store(part, mean, mask=c < C)
    tl.store(part + C, squares, mask=c < C)


@triton.jit
def _merge_statistics(
    part_ptr,
    starts_ptr,
    mean_ptr,
    rstd_ptr,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_W: tl.constexpr,
    P: tl.constexpr,
):
    """A program: mean and reciprocal deviation [B, GROUPS] of one group of one sample."""
    g, b = tl.program_id(0), tl.program_id(1)
    W: tl.constexpr = C // GROUPS
    rows = tl.load(starts_ptr + b + 1) - tl.load(starts_ptr + b)
    p, w = tl.arange(0, P), tl.arange(0, TILE_W)
    # rows of program p: its turns, and its share of the last turn
    full = rows // (P * ROWS)
    rest = rows % (P * ROWS)
    # [P, 1]
    count = (full * ROWS + tl.minimum(tl.maximum(rest - p * ROWS, 0), ROWS)).to(tl.float32)[:, None]
    part = part_ptr + (b * P + p)[:, None] * 2 * C + g * W + w[None, :]
    live = (p >= 0)[:, None] & (w < W)[None, :]
    means = tl.load(part, mask=live, other=0.0)  # [P, TILE_W]
    squares = tl.load(part + C, mask=live, other=0.0)
    elements = tl.maximum(rows, 1).to(tl.float32) * W
    # one of the means; from it that of equal values is exact
    some = tl.load(part_ptr + b * P * 2 * C + g * W)
    offsets = tl.where(live, count * (means - some), 0.0)
    mean = some + tl.div_rn(tl.sum(tl.sum(offsets, 1), 0), elements)
    squares += tl.where(live, count * (means - mean) * (means - mean), 0.0)
    variance = tl.div_rn(tl.sum(tl.sum(squares, 1), 0), elements)
    tl.store(mean_ptr + b * GROUPS + g, mean)
    tl.store(rstd_ptr + b * GROUPS + g, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _group_norm_fwd(
    x_ptr,
    weight_ptr,
    bias_ptr,
    starts_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
    P: tl.constexpr,
):
    p, b = tl.program_id(0), tl.program_id(1)
    begin = tl.load(starts_ptr + b).to(tl.int64)
    end = tl.load(starts_ptr + b + 1).to(tl.int64)
    c = tl.arange(0, TILE_C)
    group = b * GROUPS + c // (C // GROUPS)
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)  # [TILE_C]
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    for first in range(begin + p * ROWS, end, P * ROWS):
        n = first + tl.arange(0, ROWS)
        live = (n < end)[:, None] & (c < C)[None, :]  # [ROWS, TILE_C]
        x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
        if SILU:
            y = y * _sigmoid(y)
        tl.store(y_ptr + n[:, None] * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _inner_gradient(x_ptr, dy_ptr, at, live, weight, bias, mean, rstd, SILU: tl.constexpr):
    """The normed rows, and the gradient of the affine result before the SiLU."""
    normed = (tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) - mean[None, :]) * rstd[
        None, :
    ]
    dz = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)  # zero where not live
    if SILU:
        z = normed * weight[None, :] + bias[None, :]
        s = _sigmoid(z)
        dz *= s * (1.0 + z * (1.0 - s))
    return normed, dz


@triton.jit
def _partial_gradients(
    x_ptr,
    weight_ptr,
    bias_ptr,
    starts_ptr,
    mean_ptr,
    rstd_ptr,
    dy_ptr,
    part_ptr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
    P: tl.constexpr,
):
    """part [B, P, 2, C]: the program's share of the sums over rows of dz * normed and dz."""
    p, b = tl.program_id(0), tl.program_id(1)
    begin = tl.load(starts_ptr + b).to(tl.int64)
    end = tl.load(starts_ptr + b + 1).to(tl.int64)
    c = tl.arange(0, TILE_C)
    group = b * GROUPS + c // (C // GROUPS)
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros([TILE_C], tl.float32), tl.zeros([TILE_C], tl.float32)
    for first in range(begin + p * ROWS, end, P * ROWS):
        n = first + tl.arange(0, ROWS)
        live = (n < end)[:, None] & (c < C)[None, :]
        normed, dz = _inner_gradient(
            x_ptr, dy_ptr, n[:, None] * C + c[None, :], live, weight, bias, mean, rstd, SILU
        )
        dweight += tl.sum(dz * normed, 0)
        dbias += tl.sum(dz, 0)
    part = part_ptr + (b * P + p) * 2 * C + c
    tl.store(part, dweight, mask=c < C)
    tl.store(part + C, dbias, mask=c < C)


@triton.jit
def _group_norm_bwd(
    x_ptr,
    weight_ptr,
    bias_ptr,
    starts_ptr,
    mean_ptr,
    rstd_ptr,
    dy_ptr,
    along_ptr,
    dx_ptr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
    P: tl.constexpr,
):
    """along [B, 2, GROUPS]: the group's means of weight * dz * normed and of weight * dz."""
    p, b = tl.program_id(0), tl.program_id(1)
    begin = tl.load(starts_ptr + b).to(tl.int64)
    end = tl.load(starts_ptr + b + 1).to(tl.int64)
    c = tl.arange(0, TILE_C)
    group = c // (C // GROUPS)
    mean = tl.load(mean_ptr + b * GROUPS + group, mask=c < C, other=0.0)  # [TILE_C]
    rstd = tl.load(rstd_ptr + b * GROUPS + group, mask=c < C, other=0.0)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    along = tl.load(along_ptr + 2 * b * GROUPS + group, mask=c < C, other=0.0)
    offset = tl.load(along_ptr + (2 * b + 1) * GROUPS + group, mask=c < C, other=0.0)
    for first in range(begin + p * ROWS, end, P * ROWS):
        n = first + tl.arange(0, ROWS)
        live = (n < end)[:, None] & (c < C)[None, :]
        at = n[:, None] * C + c[None, :]
        normed, dz = _inner_gradient(x_ptr, dy_ptr, at, live, weight, bias, mean, rstd, SILU)
        dx = (dz * weight[None, :] - normed * along[None, :] - offset[None, :]) * rstd[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)


def _tiles(x: Tensor) -> dict[str, int]:
    TILE_C = triton.next_power_of_2(x.shape[1])
    programs = 2 if backend.target(x) == "interpreter" else PROGRAMS
    return {"ROWS": max(1, TILE // TILE_C), "P": programs}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _samples(starts: Tensor, *tensors: Tensor):
    """The rows of each sample that has any, and its number: the torch path's loop."""
    for b, (first, end) in enumerate(pairwise(starts.tolist())):
        if first < end:
            yield b, *(t[first:end] for t in tensors)


@torch.library.custom_op("trislat::group_norm", mutates_args=())
def _group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, C], mean and reciprocal deviation [B, groups]."""
    C = x.shape[1]
    B = len(starts) - 1
    y = torch.empty_like(x)
    mean, rstd = _statistics(x, B, groups)
    if backend.is_torch(x):
        mean.zero_(), rstd.zero_()
        for b, rows, out in _samples(starts, x, y):
            cube = _wide(rows).view(len(rows), groups, -1)
            variance, mean[b] = torch.var_mean(cube, dim=(0, 2), correction=0)
            rstd[b] = (variance + eps).rsqrt()
            z = ((cube - mean[b, :, None]) * rstd[b, :, None]).view(-1, C) * weight + bias
            out.copy_(F.silu(z) if silu else z)
        return y, mean, rstd
    tiles = _tiles(x)
    TILE_C = triton.next_power_of_2(C)
    part = x.new_empty(B, tiles["P"], 2, C, dtype=torch.float32)
    backend.launch(
        _partial_statistics,
        (tiles["P"], B),
        x,
        starts,
        part,
        C=C,
        TILE_C=TILE_C,
        **tiles,
        num_warps=4,
    )
    pad = triton.next_power_of_2(C // groups)
    args = (part, starts, mean, rstd, eps)
    backend.launch(
        _merge_statistics, (groups, B), *args, C=C, GROUPS=groups, TILE_W=pad, **tiles, num_warps=4
    )
    args = (x, weight, bias, starts, mean, rstd, y)
    backend.launch(
        _group_norm_fwd,
        (tiles["P"], B),
        *args,
        C=C,
        GROUPS=groups,
        SILU=silu,
        TILE_C=TILE_C,
        **tiles,
        num_warps=4,
    )
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
    C = x.shape[1]
    B = len(starts) - 1
    dx = torch.empty_like(x)
    if backend.is_torch(x):
        dweight, dbias = mean.new_zeros(C), mean.new_zeros(C)
        for b, rows, up, out in _samples(starts, x, dy, dx):
            normed = (
                (_wide(rows).view(len(rows), groups, -1) - mean[b, :, None]) * rstd[b, :, None]
            ).view(-1, C)
            dz = _wide(up)
            if silu:
                dz = torch.ops.aten.silu_backward(dz, normed * weight + bias)
            product = dz * normed
            dweight += product.sum(0)
            dbias += dz.sum(0)
            g = (dz * weight).view(len(rows), groups, -1)
            along = (product * weight).view(g.shape).mean((0, 2))[:, None]
            out.copy_(
                (
                    (g - normed.view(g.shape) * along - g.mean((0, 2))[:, None]) * rstd[b, :, None]
                ).view(-1, C)
            )
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)
    tiles = _tiles(x)
    TILE_C = triton.next_power_of_2(C)
    # four warps of a wide row's six vectors spill in fp32 on sm_80
    warps = 8 if TILE_C > 512 else 4
    constants = dict(C=C, GROUPS=groups, SILU=silu, TILE_C=TILE_C, num_warps=warps, **tiles)
    part = x.new_empty(B, tiles["P"], 2, C, dtype=torch.float32)
    args = (x, weight, bias, starts, mean, rstd, dy)
    backend.launch(_partial_gradients, (tiles["P"], B), *args, part, **constants)
    sums = part.sum(1)  # [B, 2, C]
    elements = (starts[1:] - starts[:-1]).clamp(min=1) * (C // groups)
    along = (sums * weight).view(B, 2, groups, C // groups).sum(3) / elements[:, None, None]
    backend.launch(_group_norm_bwd, (tiles["P"], B), *args, along, dx, **constants)
    return dx, sums[:, 0].sum(0).to(weight.dtype), sums[:, 1].sum(0).to(bias.dtype)


def _statistics(x: Tensor, samples: int, groups: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(samples, groups, dtype=dtype), x.new_empty(samples, groups, dtype=dtype)


@_group_norm.register_fake
def _(x, weight, bias, starts, groups, eps, silu):
    return torch.empty_like(x), *_statistics(x, starts.shape[0] - 1, groups)


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
    """Group norm (Wu and He, arXiv 1803.08494) with statistics over all voxels of each sample,
    affine, in fp32; then SiLU.

    Samples may be empty. Gradients of weight and bias are summed in a fixed order. Raises
    ValueError, naming both sizes, for channels that are no multiple of the groups or more than
    4096, weights of another size, another rank or dtype, and an eps that is negative or not finite;
    TypeError for what is no tensor.
    """
    check_tensors(x=x, weight=weight, bias=bias, starts=starts)
    check_eps(eps)
    if x.ndim != 2:
        raise ValueError(f"x must be [N, C], got {list(x.shape)}")
    kernels = (torch.float16, torch.bfloat16, torch.float32)
    if x.dtype not in kernels and not (x.dtype == torch.float64 and backend.is_torch(x)):
        raise ValueError(
            f"x must be fp16, bf16 or fp32 (fp64: on the torch path), got {x.dtype} on "
            f"{backend.name(x)}"
        )
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
    args = (
        x.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        starts.contiguous(),
        groups,
        eps,
        silu,
    )
    return torch.ops.trislat.group_norm(*args)[0]


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, groups: int = 32, eps: float = 1e-5
) -> Tensor:
    """silu(group_norm(...)) in one pass."""
    return group_norm(x, weight, bias, starts, groups, eps, silu=True)


def group_norm_reference(x, weight, bias, starts, groups=32, eps=1e-5, silu=False):
    """One sample after the other, its mean and variance spelt out."""
    pieces = [x[:0] * weight + bias]
    for a, b in pairwise(starts.tolist()):
        if a < b:
            cube = x[a:b].reshape(b - a, groups, -1)
            centred = cube - cube.mean((0, 2), keepdim=True)
            deviation = (centred.square().mean((0, 2), keepdim=True) + eps).sqrt()
            pieces.append((centred / deviation).flatten(1) * weight + bias)
    y = torch.cat(pieces)
    return y * torch.sigmoid(y) if silu else y
