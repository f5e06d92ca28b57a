"""Sparse convolutions, group norm and pooling of the mesh decoder: N voxels, C channels.

Flops of a convolution are those of the neighbours that exist, 2 Ci Co each; the form that reads
parents after a subdivision needs about a quarter of them and is held against its own, smaller
number. Compulsory bytes: rows and weights once.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels import (
    SpatialCache,
    conv_tables,
    group_norm,
    neighbours,
    octant_tables,
    pool,
    pooling,
    sparse_conv,
    subdivide_conv,
)
from kernels.bench.case import DTYPES, Case, Impl, Work, optional
from kernels.bench.shells import batch, shell
from kernels.conv.reference import sparse_conv_reference, subdivide_conv_reference
from kernels.norm.group import group_norm_reference
from kernels.voxels.pool import pool_reference

GROUPS = 32
EPS = 1e-5


def _levels(size: str) -> tuple[str, SpatialCache, list[tuple[int, int]]]:
    """Name the latents; give their voxels and the channels of the two upsampling blocks."""
    if size == "small":
        return "sphere 8^3", SpatialCache(batch(shell("sphere", 8))), [(64, 32), (32, 32)]
    return "noisy sphere", SpatialCache(batch(shell("noisy sphere"))), [(768, 192), (192, 96)]


def _random(
    shape: tuple, dtype: str, device: torch.device, seed: int, scale: float = 1.0
) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(device, DTYPES[dtype]).requires_grad_()


def conv_work(rows: tuple[int, int], pairs: int, Ci: int, Co: int, width: int) -> tuple[Work, Work]:
    """Count the work of both passes from rows[0] input to rows[1] output rows.

    `pairs` are those of an output row and a neighbour.
    """
    x = rows[0] * Ci
    y = rows[1] * Co
    weight = 27 * Ci * Co
    flops = 2 * pairs * Ci * Co
    return Work(width * (x + y + weight), flops), Work(width * (2 * x + y + 2 * weight), 2 * flops)


def _spconv(
    package: str, cache: SpatialCache, Ci: int, Co: int, dtype: str, device: torch.device
) -> Impl | str:
    """Run the submanifold convolution of spconv, or of spconv_triton, which has the same names.

    Neighbours are made once.
    """
    module = optional(f"{package}.pytorch")
    if isinstance(module, str):
        return module
    conv = module.SubMConv3d(Ci, Co, 3, indice_key="bench").to(device, DTYPES[dtype])
    shape = [max(cache.extent)] * 3
    known = {}

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        voxels = module.SparseConvTensor(
            x, cache.coords, shape, cache.batch_size, indice_dict=known
        )
        out = torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (voxels,))
        known.update(out.indice_dict)  # a layer adds to a copy of its input's
        return out.features

    return Impl(run)


def _flex_gemm(cache: SpatialCache) -> Impl | str:
    """Run the convolution of FlexGEMM, its neighbours made once too.

    The order of its arguments differs between versions, their names do not.
    """
    module = optional("flex_gemm.ops.spconv")
    if isinstance(module, str):
        return module
    shape = torch.Size([cache.batch_size, 1, *[max(cache.extent)] * 3])
    known = [None]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out, known[0] = module.sparse_submanifold_conv3d(
            x, cache.coords, shape, weight=weight, bias=bias, neighbor_cache=known[0]
        )
        return out

    return Impl(run)


def _inputs(N: int, Ci: int, Co: int, dtype: str, device: torch.device) -> Callable[[int], tuple]:
    def make(seed: int) -> tuple:
        weight = _random((Co, 3, 3, 3, Ci), dtype, device, seed + 1, (27 * Ci) ** -0.5)
        return (
            _random((N, Ci), dtype, device, seed),
            weight,
            _random((Co,), dtype, device, seed + 2),
        )

    return make


def sparse_conv_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the second convolution of each upsampling block, on the children."""
    name, cache, channels = _levels(size)
    cache = SpatialCache(cache.coords.to(device))
    for _, C in channels:
        cache = cache.subdivide()
        near = cache.get(neighbours, 3)
        tables = cache.get(conv_tables, 3)
        pairs = int((near >= 0).sum())
        N = len(cache)
        for dtype in dtypes:
            forward, backward = conv_work((N, N), pairs, C, C, DTYPES[dtype].itemsize)
            yield Case(
                op="sparse_conv",
                size=f"{name}, {N} x {C} -> {C}",
                dtype=dtype,
                forward=[forward],
                backward=[backward],
                inputs=_inputs(N, C, C, dtype, device),
                ours=lambda x, w, b, n=near, t=tables: sparse_conv(x, w, b, n, tables=t),
                reference=lambda x, w, b, n=near: sparse_conv_reference(x, w, b, n),
                baselines={
                    name: _spconv(name, cache, C, C, dtype, device)
                    for name in ("spconv", "spconv_triton")
                }
                | {"flex_gemm": _flex_gemm(cache)},
            )


def parents_read(below: Tensor) -> int:
    """Count pairs of a child and a parent that it reads, from the children's neighbours [8N, 27].

    A pair counts once, whatever its taps.
    """
    total = 0
    for part in torch.where(below >= 0, below // 8, -1).split(1 << 16):
        distinct = (part.sort(1).values.diff(dim=1) != 0).sum() + len(part)
        total += int(distinct - (part < 0).any(1).sum())
    return total


def subdivide_conv_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the first convolution of each upsampling block, from the parents.

    The baseline copies each parent to its children.
    """
    name, cache, channels = _levels(size)
    cache = SpatialCache(cache.coords.to(device))
    for Ci, Co in channels:
        children = cache.subdivide()
        near = cache.get(neighbours, 3)
        below = children.get(neighbours, 3)
        tables = cache.get(octant_tables)
        pairs = parents_read(below)
        for dtype in dtypes:
            forward, backward = conv_work(
                (len(cache), len(children)), pairs, Ci, Co, DTYPES[dtype].itemsize
            )
            yield Case(
                op="subdivide_conv",
                size=f"{name}, {len(cache)} x {Ci} -> {len(children)} x {Co}",
                dtype=dtype,
                forward=[forward],
                backward=[backward],
                inputs=_inputs(len(cache), Ci, Co, dtype, device),
                ours=lambda x, w, b, n=near, t=tables: subdivide_conv(x, w, b, n, tables=t),
                reference=lambda x, w, b, n=below: subdivide_conv_reference(x, w, b, n),
                baselines={
                    "subdivide, then sparse_conv": Impl(
                        lambda x, w, b, n=below: sparse_conv(x.repeat_interleave(8, 0), w, b, n)
                    )
                },
            )
        cache = children


def group_norm_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the norm with SiLU before the second convolution of the first block.

    Forward reads x twice; backward x and dy twice.
    """
    name, cache, channels = _levels(size)
    children = SpatialCache(cache.coords.to(device)).subdivide()
    C = channels[0][1]
    N = len(children)
    starts = children.starts
    affine = lambda seed: tuple(_random((C,), "fp32", device, seed + i) for i in (1, 2))
    for dtype in dtypes:
        row = N * C * DTYPES[dtype].itemsize
        yield Case(
            op="group_norm",
            size=f"{name}, {N} x {C}",
            dtype=dtype,
            forward=[Work(3 * row)],
            backward=[Work(5 * row)],
            inputs=lambda seed, d=dtype: (_random((N, C), d, device, seed), *affine(seed)),
            ours=lambda x, w, b: group_norm(x, w, b, starts, GROUPS, EPS, silu=True),
            reference=lambda x, w, b: group_norm_reference(
                x, w.to(x), b.to(x), starts, GROUPS, EPS, True
            ),
        )


def pool_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the mean of 2^3 voxels. Forward x -> y; backward dy -> dx."""
    name, cache, channels = _levels(size)
    cache = SpatialCache(cache.coords.to(device))
    C = channels[0][0]
    coarse, index = cache.pool(2)
    made = pooling(cache, 2)
    for dtype in dtypes:
        moved = (len(cache) + len(coarse)) * C * DTYPES[dtype].itemsize
        yield Case(
            op="pool",
            size=f"{name}, {len(cache)} -> {len(coarse)} x {C}",
            dtype=dtype,
            forward=[Work(moved)],
            backward=[Work(moved)],
            inputs=lambda seed, d=dtype: (_random((len(cache), C), d, device, seed),),
            ours=lambda x: pool(x, made),
            reference=lambda x: pool_reference(x, index, len(coarse)),
            naive=size == "small",
        )
