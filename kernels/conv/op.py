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

import torch
from torch import Tensor

from kernels import backend
from kernels.checks import check_dtype, wide, wide_dtype
from kernels.conv import cpu as gathered
from kernels.conv.launch import product, weight_gradient
from kernels.conv.order import child_rows, octants
from kernels.conv.tables import ConvTables, TapPairs, TapRows, list_pairs, sort_rows


def _taps(neighbours: Tensor, subdivided: bool) -> Tensor:
    return octants(neighbours) if subdivided else neighbours[:, None]


@torch.library.custom_op("trislat::sparse_conv", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    order: Tensor | None,
    subdivided: bool,
    tables: list[Tensor],
) -> Tensor:
    """weight [Co, M, Ci] is rounded to x's type; M = K, or 64 summed ones of subdivided voxels.

    `tables` are those of a ConvTables, one after the other, or none.
    """
    weight = weight.to(x.dtype)
    if backend.is_torch(x):
        taps = _taps(neighbours, subdivided)
        with torch.autocast(x.device.type, enabled=False):
            return gathered.product(x, weight.permute(1, 2, 0), bias, taps)
    if tables:
        rows = TapRows(*tables[:2])
    else:
        if subdivided and order is not None:
            order = order[1:]
        rows = sort_rows(_taps(neighbours, subdivided), order)
    return product(x, weight, bias, rows, groups=8 if subdivided else 1)


def _gathered_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    subdivided: bool,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """`_conv_backward` on CPU tensors."""
    dx = x.new_empty(0)
    dweight = weight.new_empty(0)
    if of_x:
        taps = child_rows(neighbours) if subdivided else neighbours.flip(1)[:, None]
        dx = gathered.product(grad, weight.to(x.dtype).transpose(0, 1), None, taps)
    if of_weight:
        dweight = gathered.weight_gradient(x, grad, _taps(neighbours, subdivided)).to(weight.dtype)
    return dx, dweight


@torch.library.custom_op("trislat::sparse_conv_backward", mutates_args=())
def _conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    order: Tensor | None,
    subdivided: bool,
    tables: list[Tensor],
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dx [N, Ci], and dweight [Co, M, Ci] in weight's type, summed in fp32.

    Either is empty, [0], where it is not asked for.
    """
    if backend.is_torch(x):
        with torch.autocast(x.device.type, enabled=False):
            return _gathered_backward(grad, x, weight, neighbours, subdivided, of_x, of_weight)
    dx = x.new_empty(0)
    dweight = weight.new_empty(0)
    whole = len(tables) > 2
    if of_x:
        if whole:
            rows = TapRows(*tables[2:4])
        elif subdivided:
            rows = sort_rows(child_rows(neighbours), None if order is None else order[:1])
        else:
            rows = TapRows(*tables) if tables else sort_rows(neighbours[:, None], order)
        dx = product(grad, weight.to(x.dtype), None, rows, back=True, mirror=not subdivided)
    if of_weight:
        pairs = TapPairs(*tables[4:]) if whole else list_pairs(_taps(neighbours, subdivided))
        dweight = weight_gradient(x, grad, pairs).to(weight.dtype)
    return dx, dweight


@_conv.register_fake
def _(x, weight, bias, neighbours, order, subdivided, tables):
    return x.new_empty((8 if subdivided else 1) * x.shape[0], weight.shape[0])


@_conv_backward.register_fake
def _(grad, x, weight, neighbours, order, subdivided, tables, of_x, of_weight):
    dx = torch.empty_like(x) if of_x else x.new_empty(0)
    dweight = torch.empty_like(weight) if of_weight else weight.new_empty(0)
    return dx, dweight


def _save(ctx, inputs, output):
    x, weight, bias, neighbours, order, ctx.subdivided, tables = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, neighbours, order, *tables)


def _differentiate(ctx, grad):
    of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors  # once: a checkpoint unpacks them only once
    tables = list(saved[4:])
    dx, dweight = torch.ops.trislat.sparse_conv_backward(
        grad.contiguous(), *saved[:4], ctx.subdivided, tables, of_x, of_weight
    )
    dbias = None
    if of_bias:
        dbias = grad.sum(0, dtype=wide_dtype(grad)).to(ctx.bias_dtype)
    none = [None] * len(tables)
    return dx if of_x else None, dweight if of_weight else None, dbias, None, None, None, none


_conv.register_autograd(_differentiate, setup_context=_save)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    order: Tensor | None,
    orders: int,
    tables: ConvTables | None,
    matrices: int,
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
    if tables is not None and tables.forward.rows.numel() != matrices * len(x):
        raise ValueError(
            f"tables must hold {matrices} x {len(x)} rows, got {list(tables.forward.rows.shape)}"
        )


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    order: Tensor | None,
    subdivided: bool,
    tables: ConvTables | None,
) -> Tensor:
    given = (None if t is None else t.contiguous() for t in (x, weight, bias, neighbours, order))
    flat = [table for part in tables or () if part is not None for table in part]
    return torch.ops.trislat.sparse_conv(*given, subdivided, flat)


def sparse_conv(
    x: Tensor,  # [N, Ci] fp16, bf16 or fp32
    weight: Tensor,  # [Co, k, k, k, Ci] of any float dtype, k odd; taps along x, y, z
    bias: Tensor | None,  # [Co]
    neighbours: Tensor,  # [N, k^3] int32: the row under each tap, -1 for none
    *,
    # [N] int32: `tap_order` of the same voxels; the result does not depend on it
    order: Tensor | None = None,
    # `conv_tables` of the same voxels, in place of an order: then nothing is made in every call
    tables: ConvTables | None = None,
) -> Tensor:  # [N, Co], as x
    """Submanifold convolution of the features of a voxel set, on the same voxels.

    A row becomes bias + the sum over taps of weight[:, i, j, k] @ the row of x under tap (i, j, k):
    a cross-correlation, as torch's conv3d. The weight is rounded to x's dtype, sums are fp32, and
    the weight's gradient is summed in fp32 and returned in the weight's dtype. `neighbours` must be
    a map that `kernels.neighbours` makes: its rows are not range-checked, and the gradient of x
    relies on its symmetry. Raises ValueError, naming both sizes, where the weight's kernel size or
    channels, bias, neighbours and x do not fit together.
    """
    _check(x, weight, bias, neighbours, order, 1, tables, neighbours.shape[-1])
    return _run(x, weight.flatten(1, 3), bias, neighbours, order, False, tables)


def octant_weights(
    weight: Tensor,  # [Co, 3, 3, 3, Ci]
) -> Tensor:  # [Co, 64, Ci]
    """The 2x2x2 matrices of each child: sums over the taps that fall into the same parent.

    Along an axis a child in the lower half has tap 0 in the parent before and taps 1, 2 in its own;
    one in the upper half has taps 0, 1 in its own and tap 2 in the parent after. Linear, so
    autograd's gradient is the transposed map.
    """
    half = torch.arange(2, device=weight.device)
    tap = torch.arange(3, device=weight.device)
    # a child at 0 or 1 reads the child at that plus tap - 1, and a parent holds two children
    read = (half[:, None] + tap + 1) // 2 - half[:, None]  # [octant bit, tap]
    axis = (read[:, None] == half[:, None]).to(weight.dtype)  # [octant bit, parent, tap]
    x = axis[:, None, None, :, None, None, :, None, None]
    y = axis[:, None, None, :, None, None, :, None]
    z = axis[:, None, None, :, None, None, :]
    # the weights keep their type; a device without autocast has none to switch off
    known = torch.amp.is_autocast_available(weight.device.type)
    with torch.autocast(weight.device.type if known else "cpu", enabled=False):
        return (x * y * z).view(64, 27) @ weight.flatten(1, 3)


def subdivide_conv(
    x: Tensor,  # [N, Ci] fp16, bf16 or fp32: on the parents
    weight: Tensor,  # [Co, 3, 3, 3, Ci] of any float dtype
    bias: Tensor | None,  # [Co]
    parent_neighbours: Tensor,  # [N, 27] int32
    *,
    # [9, N] int32: `octant_order` of the parents; the result does not depend on it
    order: Tensor | None = None,
    # `octant_tables` of the parents, in place of an order: then nothing is made in every call
    tables: ConvTables | None = None,
) -> Tensor:  # [8N, Co], as x
    """Convolution of x copied to the 8 children of every voxel, without making the copies.

    The children of row n are rows 8n to 8n + 7, z fastest, as `SpatialCache.subdivide` makes them.
    The same function of the same weight with about a quarter of the products; weights are summed in
    fp32 (fp64 stays) and rounded to x's dtype once. Raises ValueError as sparse_conv, and for a
    kernel size other than 3.
    """
    _check(x, weight, bias, parent_neighbours, order, 9, tables, 64)
    if weight.shape[1] != 3:
        raise ValueError(
            f"a convolution after a subdivision has kernel size 3, the weight has {weight.shape[1]}"
        )
    summed = octant_weights(wide(weight))
    return _run(x, summed, bias, parent_neighbours, order, True, tables)
