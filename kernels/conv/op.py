"""Submanifold sparse convolution as an implicit matrix product over a neighbour map.

N voxels, K taps, Ci -> Co channels. Output voxels are the input's; tap (i, j, k) of a voxel reads
the voxel at coord + (i - r, j - r, k - r), if there is one (Graham et al., 3D Semantic Segmentation
with Submanifold Sparse Convolutional Networks, arXiv 1711.10275). Rows that have the same taps are
brought together (`tap_order`), and a tile of rows skips the taps that none of them has. The input
gradient is the same product over the mirrored map: the map of a voxel set holds m under tap t of n
where it holds n under the opposite tap of m. Nothing is added atomically, results are
deterministic.

After a subdivision all 8 children of a parent exist and are equal, so a child's 3x3x3 kernel covers
2x2x2 parents, with the weights of the taps that fall into one parent summed: 8 taps instead of up
to 27, and the children's features are never made. The sums are a linear map of the weight, and the
weight's gradient the transposed map of theirs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import triton
from kernels.checks import check_dtype, wide, wide_dtype
from kernels.conv import cpu as gathered
from kernels.conv import tiles as kernel
from kernels.conv.order import child_rows, octants

LISTED = 128  # rows of a tile of which a weight gradient knows whether it has a tap
PROGRAMS = 512  # of a weight gradient, shares of the rows included; not yet measured on a GPU
# channels of a program: wide and narrow accumulator
WIDTHS = ((128, 64), (128, 0), (64, 32), (64, 0), (32, 0), (16, 0))


class Tile(NamedTuple):
    """The tile of a program, of a product or of a weight gradient."""

    rows: int  # rows; of a weight gradient, input channels
    step: int  # input channels at a time; of a weight gradient, rows
    widest: int  # channels of the output, or of the gradient
    num_warps: int
    num_stages: int


def _tiles(dtype: torch.dtype, target: str) -> tuple[Tile, Tile]:
    """Tiles of products and of weight gradients.

    Not yet measured on a GPU: chosen so that nothing spills and shared memory suffices.
    """
    if target == "interpreter":  # a program costs milliseconds whatever its size
        return Tile(256, 256, 192, 4, 1), Tile(256, 128, 192, 4, 1)
    # no tensor cores on NVIDIA: full fp32 products hold their operands in registers
    if dtype == torch.float32:
        return Tile(64, 16, 64, 4, 3), Tile(128, 16, 64, 8, 3)
    if target.startswith("gfx"):
        return Tile(128, 32, 192, 8, 2), Tile(128, 32, 192, 8, 2)
    # A product's row is the third load of a chain (list, taps, row), a weight gradient's the
    # fourth: Triton gives each load of a chain the same share of the stages, so that 7 and 9 stages
    # put a row two steps ahead, 4 and 5 one step.
    if target.startswith("sm_8"):
        return Tile(128, 32, 192, 8, 7), Tile(128, 32, 128, 8, 9)
    if target == "sm_90":
        return Tile(128, 64, 192, 8, 7), Tile(128, 32, 192, 8, 9)
    return Tile(128, 64, 192, 8, 4), Tile(128, 32, 192, 8, 5)


def _widths(channels: int, widest: int) -> tuple[int, int]:
    """The wide and the narrow part of a program's channels.

    They cover all channels with the least padding, then with the fewest programs.
    """
    fitting = [w for w in WIDTHS if sum(w) <= widest]
    return min(fitting, key=lambda w: triton.cdiv(channels, sum(w)) * (sum(w) + 16))


class Taps(NamedTuple):
    """The map of the rows that a product gathers: R rows in G groups, T taps."""

    rows: Tensor  # [R, G, T] int32: the row of the other side under each tap, -1 for none
    order: Tensor | None  # [G, R] int32: the order in which tiles take the rows

    def lists(self, rows: int) -> tuple[Tensor, Tensor]:
        """The taps of each tile of `rows` rows, in two forms.

        [G, tiles, 1 + T] int32: how many taps a tile has, and which; [G * T, tiles] int8: 1 where a
        tile has a tap.
        """
        R, G, T = self.rows.shape
        tiles = triton.cdiv(R, rows)
        taps = self.rows.new_empty(G, tiles, 1 + T)
        some = self.rows.new_empty(G * T, tiles, dtype=torch.int8)
        pad = triton.next_power_of_2(T)
        args = (self.rows, self.order, taps, some, R)
        backend.launch(
            kernel._list_taps, (tiles, G), *args, G=G, T=T, PAD_T=pad, ROWS=rows, num_warps=4
        )
        return taps, some


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: Taps, back: bool, mirror: bool
) -> Tensor:
    """The sum over taps of x's rows times the weight [Co, M, Ci]: [R * G, C].

    `back` multiplies by the weight's transpose; `mirror` takes the taps in the opposite order.
    """
    R, G, T = taps.rows.shape
    CO, _, CI = weight.shape
    if backend.is_torch(x):
        rows = taps.rows.flip(2) if mirror else taps.rows
        matrices = weight.transpose(0, 1) if back else weight.permute(1, 2, 0)
        with torch.autocast(x.device.type, enabled=False):
            return gathered.product(x, matrices, bias, rows)
    C, A = (CI, CO) if back else (CO, CI)
    tile, _ = _tiles(x.dtype, backend.target(x))
    wide, narrow = _widths(C, tile.widest)
    lists, _ = taps.lists(tile.rows)
    out = x.new_empty(R * G, C)
    grid = (triton.cdiv(R, tile.rows) * triton.cdiv(C, wide + narrow), G)
    args = (x, weight, bias, taps.rows, taps.order, lists, out, R)
    backend.launch(
        kernel._conv_product,
        grid,
        *args,
        G=G,
        T=T,
        CI=CI,
        CO=CO,
        BACK=back,
        MIRROR=mirror,
        ROWS=tile.rows,
        STEP=min(tile.step, max(16, triton.next_power_of_2(A))),
        WIDE=wide,
        NARROW=narrow,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _weight_gradient(x: Tensor, grad: Tensor, taps: Taps) -> Tensor:
    """The sum over rows of grad [R * G, Co] times the row of x [S, Ci] under each tap.

    Returns [Co, M, Ci] in fp32 (fp64 where x is).
    """
    R, G, T = taps.rows.shape
    CI = x.shape[1]
    CO = grad.shape[1]
    if backend.is_torch(x):
        with torch.autocast(x.device.type, enabled=False):
            return gathered.weight_gradient(x, grad, taps.rows)
    _, tile = _tiles(x.dtype, backend.target(x))
    wide, narrow = _widths(CO, tile.widest)
    rows = min(tile.rows, max(16, triton.next_power_of_2(CI)))
    some = taps.lists(LISTED)[1]
    # the tiles that have a tap, in order
    listed = some.sort(dim=1, descending=True, stable=True).indices.int()
    blocks = triton.cdiv(CI, rows) * triton.cdiv(CO, wide + narrow)
    shares = max(1, min(PROGRAMS // (blocks * G * T), some.shape[1]))
    part = x.new_empty(shares, G * T, CI, CO, dtype=torch.float32)
    count = some.sum(1, dtype=torch.int32)
    args = (x, grad, taps.rows, taps.order, count, listed, part, R, some.shape[1])
    backend.launch(
        kernel._conv_weight_gradient,
        (blocks, G * T, shares),
        *args,
        G=G,
        T=T,
        CI=CI,
        CO=CO,
        ROWS=LISTED,
        STEP=tile.step,
        TILE_A=rows,
        WIDE=wide,
        NARROW=narrow,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return part.sum(0).permute(2, 0, 1).contiguous()


def _forward_taps(neighbours: Tensor, order: Tensor | None, subdivided: bool) -> Taps:
    if subdivided:
        return Taps(octants(neighbours), None if order is None else order[1:])
    return Taps(neighbours[:, None], order)


@torch.library.custom_op("trislat::sparse_conv", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    order: Tensor | None,
    subdivided: bool,
) -> Tensor:
    """weight [Co, M, Ci] is rounded to x's type; M = K, or 64 summed ones of subdivided voxels."""
    taps = _forward_taps(neighbours, order, subdivided)
    return _product(x, weight.to(x.dtype), bias, taps, back=False, mirror=False)


@torch.library.custom_op("trislat::sparse_conv_backward", mutates_args=())
def _conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    order: Tensor | None,
    subdivided: bool,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dx [N, Ci], and dweight [Co, M, Ci] in weight's type, summed in fp32.

    Either is empty, [0], where it is not asked for.
    """
    dx = x.new_empty(0)
    dweight = weight.new_empty(0)
    if of_x:
        if subdivided:
            taps = Taps(child_rows(neighbours), None if order is None else order[:1])
        else:
            taps = Taps(neighbours[:, None], order)
        dx = _product(grad, weight.to(x.dtype), None, taps, back=True, mirror=not subdivided)
    if of_weight:
        taps = _forward_taps(neighbours, order, subdivided)
        dweight = _weight_gradient(x, grad, taps).to(weight.dtype)
    return dx, dweight


@_conv.register_fake
def _(x, weight, bias, neighbours, order, subdivided):
    return x.new_empty((8 if subdivided else 1) * x.shape[0], weight.shape[0])


@_conv_backward.register_fake
def _(grad, x, weight, neighbours, order, subdivided, of_x, of_weight):
    dx = torch.empty_like(x) if of_x else x.new_empty(0)
    dweight = torch.empty_like(weight) if of_weight else weight.new_empty(0)
    return dx, dweight


def _save(ctx, inputs, output):
    x, weight, bias, neighbours, order, ctx.subdivided = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, neighbours, order)


def _differentiate(ctx, grad):
    of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
    args = *ctx.saved_tensors, ctx.subdivided, of_x, of_weight
    dx, dweight = torch.ops.trislat.sparse_conv_backward(grad.contiguous(), *args)
    dbias = None
    if of_bias:
        dbias = grad.sum(0, dtype=wide_dtype(grad)).to(ctx.bias_dtype)
    return dx if of_x else None, dweight if of_weight else None, dbias, None, None, None


_conv.register_autograd(_differentiate, setup_context=_save)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    order: Tensor | None,
    orders: int,
) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must be [N, Ci], got {list(x.shape)}")
    check_dtype(x)
    if weight.ndim != 5 or len(set(weight.shape[1:4])) != 1 or 0 in weight.shape:
        raise ValueError(f"weight must be [Co, k, k, k, Ci], got {list(weight.shape)}")
    k = weight.shape[1]
    if k % 2 == 0:
        raise ValueError(f"the weight's kernel size {k} must be odd")
    if weight.shape[4] != x.shape[1]:
        raise ValueError(f"x has {x.shape[1]} channels, the weight takes {weight.shape[4]}")
    if neighbours.ndim != 2 or neighbours.dtype != torch.int32:
        raise ValueError(
            f"neighbours must be [N, K] int32, got {list(neighbours.shape)} {neighbours.dtype}"
        )
    if neighbours.shape[1] != k**3:
        raise ValueError(
            f"the weight's kernel size {k} has {k**3} taps, neighbours has {neighbours.shape[1]}"
        )
    if len(neighbours) != len(x):
        raise ValueError(f"x has {len(x)} rows, neighbours has {len(neighbours)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias {list(bias.shape)} must be [{weight.shape[0]}], the weight's output channels"
        )
    if order is not None and (order.numel() != orders * len(x) or order.dtype != torch.int32):
        raise ValueError(
            f"order must hold {orders} x {len(x)} int32 rows, got {list(order.shape)} {order.dtype}"
        )


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    order: Tensor | None,
    subdivided: bool,
) -> Tensor:
    given = (None if t is None else t.contiguous() for t in (x, weight, bias, neighbours, order))
    return torch.ops.trislat.sparse_conv(*given, subdivided)


def sparse_conv(
    x: Tensor,  # [N, Ci] fp16, bf16 or fp32
    weight: Tensor,  # [Co, k, k, k, Ci] of any float dtype, k odd; taps along x, y, z
    bias: Tensor | None,  # [Co]
    neighbours: Tensor,  # [N, k^3] int32: the row under each tap, -1 for none
    *,
    # [N] int32: `tap_order` of the same voxels; the result does not depend on it
    order: Tensor | None = None,
) -> Tensor:  # [N, Co], as x
    """Submanifold convolution of the features of a voxel set, on the same voxels.

    A row becomes bias + the sum over taps of weight[:, i, j, k] @ the row of x under tap (i, j, k):
    a cross-correlation, as torch's conv3d. The weight is rounded to x's dtype, sums are fp32, and
    the weight's gradient is summed in fp32 and returned in the weight's dtype. `neighbours` must be
    a map that `kernels.neighbours` makes: its rows are not range-checked, and the gradient of x
    relies on its symmetry. Raises ValueError, naming both sizes, where the weight's kernel size or
    channels, bias, neighbours and x do not fit together.
    """
    _check(x, weight, bias, neighbours, order, 1)
    return _run(x, weight.flatten(1, 3), bias, neighbours, order, False)


def octant_weights(
    weight: Tensor,  # [Co, 3, 3, 3, Ci]
) -> Tensor:  # [Co, 64, Ci]
    """The 2x2x2 matrices of each child: sums over the taps that fall into the same parent.

    Along an axis a child in the lower half has tap 0 in the parent before and taps 1, 2 in its own;
    one in the upper half has taps 0, 1 in its own and tap 2 in the parent after. Linear, so
    autograd's gradient is the transposed map.
    """
    for axis in (1, 3, 5):  # becomes (octant bit, parent)
        before, own, after = weight.unbind(axis)
        lower = torch.stack([before, own + after], axis)
        upper = torch.stack([before + own, after], axis)
        weight = torch.stack([lower, upper], axis)
    return weight.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(1, 6)


def subdivide_conv(
    x: Tensor,  # [N, Ci] fp16, bf16 or fp32: on the parents
    weight: Tensor,  # [Co, 3, 3, 3, Ci] of any float dtype
    bias: Tensor | None,  # [Co]
    parent_neighbours: Tensor,  # [N, 27] int32
    *,
    # [9, N] int32: `octant_order` of the parents; the result does not depend on it
    order: Tensor | None = None,
) -> Tensor:  # [8N, Co], as x
    """Convolution of x copied to the 8 children of every voxel, without making the copies.

    The children of row n are rows 8n to 8n + 7, z fastest, as `SpatialCache.subdivide` makes them.
    The same function of the same weight with about a quarter of the products; weights are summed in
    fp32 (fp64 stays) and rounded to x's dtype once. Raises ValueError as sparse_conv, and for a
    kernel size other than 3.
    """
    _check(x, weight, bias, parent_neighbours, order, 9)
    if weight.shape[1] != 3:
        raise ValueError(
            f"a convolution after a subdivision has kernel size 3, the weight has {weight.shape[1]}"
        )
    summed = octant_weights(wide(weight))
    return _run(x, summed, bias, parent_neighbours, order, True)
