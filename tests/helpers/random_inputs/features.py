"""Random inputs of ops on features of voxels, and on their coordinates."""

import torch

from kernels.attention.op import segment_attention, window_attention
from kernels.attention.reference import segment_attention_reference, window_attention_reference
from kernels.conv.op import sparse_conv, subdivide_conv
from kernels.conv.order import octant_order, tap_order
from kernels.conv.reference import sparse_conv_reference, subdivide_conv_reference
from kernels.norm.gelu import gelu, gelu_reference
from kernels.norm.group import group_norm, group_norm_reference
from kernels.norm.layer import (
    add_layer_norm,
    layer_norm,
    layer_norm_reference,
)
from kernels.voxels.children import child_neighbours, parent_size
from kernels.voxels.curves import CURVES, serialized_windows, serialized_windows_reference
from kernels.voxels.hash import (
    build_table,
    lookup,
    lookup_reference,
    neighbours,
    neighbours_reference,
)
from kernels.voxels.pool import pool, pool_reference, pooling, unpool, unpool_reference
from kernels.voxels.window import Windows, window_partition, window_partition_reference
from tests.helpers.compare import TOLERANCE
from tests.helpers.random_inputs.choices import CANCELLED, Case, Draw
from tests.helpers.voxels import groups, lists


def norms(d: Draw) -> Case:
    """Layer norm with and without a bias, of a residual sum, and GELU."""
    dtype = d.dtype()
    N = d.number(0, 200)
    if d.pick(0, 1):
        C = d.width(d.pick(1, d.number(3, 300)), 1, 33, 48)
        eps = d.pick(1e-6, 1e-5)
        x = d.normal(N, C, dtype=dtype)
        if d.pick(0, 1):
            return Case(
                lambda x, *bias: layer_norm(x, eps, *bias),
                lambda x, *bias: layer_norm_reference(x, eps, *bias),
                [x, *[d.normal(C)] * d.pick(0, 1)],
                None,
                CANCELLED,
            )

        def reference(x, h):
            """The norm of the sum as it is rounded, which counts in rows of nearly equal values."""
            exact = x + h
            total = exact + (exact.detach().to(dtype).to(exact) - exact.detach())
            return total, layer_norm_reference(total, eps)

        return Case(
            lambda x, h: add_layer_norm(x, h, eps),
            reference,
            [x, d.normal(N, C, dtype=dtype)],
            None,
            CANCELLED,
        )
    shape = [N, *[d.width(d.number(1, 7), 1, 5)] * d.number(0, 2)]
    biases = [d.normal(shape[-1])] * d.pick(0, 1) if shape[-1] else []
    # torch's 1 + tanh cancels where x is far below 0
    x = d.normal(*shape, dtype=dtype, spread=3.0)
    return Case(gelu, gelu_reference, [x, *biases], None, CANCELLED)


def attention(d: Draw) -> Case:
    """In windows, with and without the norm and the rotation, and among the lists of keys along a
    curve.
    """
    dtype = d.dtype()
    H, D = d.width((d.number(1, 2), 8 * d.number(1, 8)), (1, 16), (2, 24))
    if d.pick(0, 0, 1):
        cache = d.cache(150 if d.fast else 60)
        arguments = d.number(1, 40), d.pick(*CURVES), d.number(0, 5), d.number(0, 3)
        windows = serialized_windows(cache, cache.batch_size, *arguments)
        N = len(cache)
    else:
        lengths = d.lengths(400 if d.fast else 80)
        N = sum(lengths)
        most = max(lengths, default=0)
        order = torch.randperm(N, generator=d.rng).int().to(d.device)
        windows = Windows(order, d.starts(lengths), d.pick(most, N, most + 300))
    tensors = [d.normal(N, 3, H, D, dtype=dtype)]
    keys = ("q_gamma", "k_gamma")
    if d.pick(0, 0, 1):
        tensors += [d.normal(H, D) for _ in keys]
    phases = None
    scale = d.pick(None, 0.4)
    if d.pick(0, 0, 1):
        angles = d.normal(N, D // 2).detach()
        phases = torch.polar(torch.ones_like(angles), angles)

    def op(qkv, *gamma):
        return window_attention(
            qkv, windows, scale=scale, phases=phases, **dict(zip(keys, gamma, strict=False))
        )

    def reference(qkv, *gamma):
        exact = None if phases is None else phases.cpu().to(torch.complex128)
        return window_attention_reference(qkv, windows, scale, *(gamma or (None, None)), exact)

    # rows that are normed and scaled by gamma have scores D ** 0.5 times as large, and their
    # rounding too
    return Case(
        op, reference, tensors, 2 * TOLERANCE[dtype] if len(tensors) > 1 else None, CANCELLED
    )


def segments(d: Draw) -> Case:
    dtype = d.dtype()
    H, D = d.width((d.number(1, 2), 8 * d.number(1, 8)), (2, 24))
    queries = d.lengths(300 if d.fast else 60)
    keys = [d.number(0, 60) for _ in queries]
    q_starts, k_starts = d.starts(queries), d.starts(keys)
    tensors = [d.normal(sum(n), H, D, dtype=dtype) for n in (queries, keys, keys)]
    op, slow = segment_attention, segment_attention_reference
    return Case(
        lambda *x: op(*x, q_starts, k_starts),
        lambda *x: slow(*x, q_starts, k_starts),
        tensors,
        None,
        CANCELLED,
    )


def convolution(d: Draw) -> Case:
    cache = d.cache(60 if d.fast else 30)
    dtype = d.dtype()
    k = d.pick(1, 3, 3)
    CI, CO = d.width((d.number(1, 40), d.number(1, 40)), (6, 4))
    subdivided = k == 3 and d.pick(False, True)
    tensors = [
        d.normal(len(cache), CI, dtype=dtype),
        d.normal(CO, k, k, k, CI, spread=(k**3 * CI) ** -0.5),
    ]
    tensors += [d.normal(CO)] * d.pick(0, 1)
    near = cache.get(neighbours, k)
    ordered = d.pick(False, True)
    order = (
        None if not ordered else cache.get(octant_order) if subdivided else cache.get(tap_order, k)
    )
    op, fine = (subdivide_conv, child_neighbours(near)) if subdivided else (sparse_conv, near)
    slow = subdivide_conv_reference if subdivided else sparse_conv_reference
    return Case(
        lambda x, w, b=None: op(x, w, b, near, order=order),
        lambda x, w, b=None: slow(x, w, b, fine.cpu()),
        tensors,
        # the weight, and for children sums of its taps, are rounded to the features' type, which
        # the reference does not do
        {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype],
        CANCELLED,
    )


def group_norms(d: Draw) -> Case:
    lengths = d.lengths(120)
    dtype = d.dtype()
    silu = d.pick(False, True)
    groups_, size = d.width((d.number(1, 4), d.number(2, 20)), (3, 2), (4, 4))
    C = groups_ * size
    tensors = [d.normal(sum(lengths), C, dtype=dtype), d.normal(C), d.normal(C)]
    starts = d.starts(lengths)
    op, slow = group_norm, group_norm_reference
    arguments = starts, groups_
    return Case(
        lambda *x: op(*x, *arguments, silu=silu),
        lambda *x: slow(*x, *arguments, silu=silu),
        tensors,
        None,
        CANCELLED,
    )


def scales(d: Draw) -> Case:
    cache = d.cache(100, 9)
    table = cache.get(pooling, d.number(1, 4))
    dtype = d.dtype()
    C = d.width(d.number(1, 50), 5, 33)
    index = table.index.cpu()
    S = len(table)
    op, slow, rows = d.pick((pool, pool_reference, len(cache)), (unpool, unpool_reference, S))
    return Case(
        lambda x: op(x, table), lambda x: slow(x, index, S), [d.normal(rows, C, dtype=dtype)]
    )


def coordinates(d: Draw) -> Case:
    """Tables, neighbours, their children's, cubes and curves: equal, not close."""
    cache = d.cache(60, d.pick(5, 6, 11))
    B = 0
    B = cache.batch_size
    coords = cache.coords.cpu()
    k = d.pick(1, 3, 5)
    window = d.number(1, 7)
    shift = d.number(-4, 4)
    curve = d.number(1, 40), d.pick(*CURVES), d.number(-9, 9), d.number(0, 4)
    asked = (torch.randint(-2, 12, (d.number(0, 40), 4), generator=d.rng)).int()

    def ours():
        fine = child_neighbours(neighbours(cache, parent_size(k)), k) if len(cache) < 30 else None
        found = lookup(build_table(cache), asked.to(d.device))
        cubes = window_partition(cache, B, window, shift)
        line = serialized_windows(cache, B, *curve)
        return (
            found.tolist(),
            neighbours(cache, k).tolist(),
            None if fine is None else fine.tolist(),
            groups(cubes),
            lists(line),
        )

    def expected():
        fine = (
            neighbours_reference(cache.subdivide().coords.cpu(), k).tolist()
            if len(cache) < 30
            else None
        )
        cubes = window_partition_reference(coords, B, window, shift)
        line = serialized_windows_reference(coords, B, *curve)
        near = neighbours_reference(coords, k).tolist()
        return (
            lookup_reference(coords, asked).tolist(),
            near,
            fine,
            [rows for _, rows in cubes],
            line,
        )

    return Case(ours, expected, [])
