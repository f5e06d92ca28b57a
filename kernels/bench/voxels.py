"""Coordinates: tables, lookups, the 27-neighbour map, windows, and hits of the spatial cache.

N voxels of one object. Compulsory bytes: coordinates 16 N, an int32 answer 4 bytes each; table
entries are counted once per row that is found, whatever holds them. Without a backward pass,
without floating-point numbers.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels import SpatialCache, Windows, build_table, lookup, window_partition
from kernels.bench.case import Case, Impl, Work, optional
from kernels.bench.shells import batch, shell
from kernels.voxels.coords import pack
from kernels.voxels.hash import lookup_reference, neighbours_reference

WINDOW = 8
SHIFT = 4
# from here on the references, dictionaries in Python, would take longer than everything else
NAIVE_ROWS = 5000


def _ball(radius: float) -> Callable:
    return lambda x, y, z: (x * x + y * y + z * z) ** 0.5 - radius


def coordinate_sets(size: str) -> dict[str, tuple[Tensor, int]]:
    """Make coordinates [N, 4] and their resolution, by name.

    The last set has an extent that no dense volume spans.
    """
    if size == "small":
        sets = {"2k in 24^3": (shell("sphere", 24), 24), "9k in 48^3": (shell("sphere", 48), 48)}
        wide = sets["9k in 48^3"]
    else:
        sets = {
            "20k in 64^3": (shell("rough sphere"), 64),
            "60k in 128^3": (shell(_ball(0.44), 128), 128),
        }
        sets["200k in 256^3"] = wide = (shell(_ball(0.402), 256), 256)
    factor = 1024 // wide[1]
    sets[f"{len(wide[0]) // 1000}k in 1024^3"] = (wide[0] * factor, 1024)
    return {name: (batch(xyz), resolution) for name, (xyz, resolution) in sets.items()}


def _cases(op: str, size: str, device: torch.device, make: Callable) -> Iterator[Case]:
    for name, (coords, resolution) in coordinate_sets(size).items():
        coords = coords.to(device)
        made = make(coords, SpatialCache(coords), resolution, len(coords) < NAIVE_ROWS)
        yield Case(op=op, size=f"{name}, N = {len(coords)}", dtype="int32", **made)


def _copies(coords: Tensor) -> Callable[[int], tuple]:
    return lambda seed: (coords.clone(),)


class SortedTable:
    """Sorted 64-bit keys, searched by bisection (torch.searchsorted): no table at all."""

    def __init__(self, coords: Tensor):
        self.keys, self.rows = pack(coords).sort()

    def find(self, queries: Tensor) -> Tensor:
        """Find the rows of queries [..., 4], -1 where absent."""
        keys = torch.where((queries >= 0).all(-1), pack(queries), -1)
        at = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        return torch.where(self.keys[at] == keys, self.rows[at], -1).int()

    def neighbours(self, coords: Tensor) -> Tensor:
        """Find the rows of the 27 neighbours: [N, 27]."""
        axis = torch.arange(-1, 2, dtype=torch.int32, device=coords.device)
        taps = torch.cartesian_prod(axis.new_zeros(1), axis, axis, axis)
        return self.find(coords[:, None] + taps)


def build_table_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the table of coordinates; tables are compared by what is found in them."""

    def make(coords: Tensor, cache: SpatialCache, resolution: int, naive: bool) -> dict:
        return dict(
            inputs=_copies(coords),
            ours=lambda coords: build_table(cache),
            forward=[Work(20 * len(coords))],
            baselines={
                "torch.sort of keys": Impl(SortedTable, restore=lambda table: table.find(coords))
            },
            restore=lambda table: lookup(table, coords),
        )

    return _cases("build_table", size, device, make)


def lookup_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure N queries next to the voxels, about half of them active."""

    def make(coords: Tensor, cache: SpatialCache, resolution: int, naive: bool) -> dict:
        table = build_table(cache)
        keys = SortedTable(coords)
        N = len(coords)
        offset = torch.tensor([0, 0, 1, 0], dtype=torch.int32, device=device)
        found = int((keys.find(coords + offset) >= 0).sum())
        return dict(
            inputs=lambda seed: (coords + offset,),
            ours=lambda q: lookup(table, q),
            forward=[Work(20 * N + 4 * found)],
            baselines={"torch.searchsorted": Impl(keys.find)},
            naive=naive,
            reference=lambda q: lookup_reference(coords, q).to(device),
        )

    return _cases("lookup", size, device, make)


def _spconv_map(package: str, resolution: int) -> Impl | str:
    """List the pairs of a 3^3 submanifold convolution with spconv.

    spconv_triton has the same names.
    """
    module = optional(f"{package}.pytorch")
    core = optional(f"{package}.core")
    if isinstance(module, str) or isinstance(core, str):
        return module if isinstance(module, str) else core
    one = [1, 1, 1]
    args = 1, [resolution] * 3, core.ConvAlgo.MaskImplicitGemm, [3, 3, 3], one, one, one, [0, 0, 0]
    pairs = lambda coords: module.ops.get_indice_pairs_implicit_gemm(coords, *args, subm=True)
    return Impl(pairs, restore=lambda found: found[2].T.sort(1).values)


def _flex_gemm_map(resolution: int) -> Impl | str:
    """Make FlexGEMM's neighbour cache of the same convolution.

    Versions differ in where it is made.
    """
    module = optional("flex_gemm.ops.spconv.submanifold_conv3d")
    if isinstance(module, str):
        newer = optional("flex_gemm.ops.spconv.submanifold_conv")
        if isinstance(newer, str):
            return module
        make = newer._compute_neighbor_cache_kernel_dilation
    else:
        make = module.SubMConv3dFunction._compute_neighbor_cache
    shape = torch.Size([1, 1, resolution, resolution, resolution])
    run = lambda coords: make(coords, shape, (3, 3, 3), (1, 1, 1))
    return Impl(run, restore=lambda cache: cache["neighbor_map"].view(torch.int32).sort(1).values)


def neighbours_case(op: str, size: str, coords: Tensor, resolution: int, naive: bool) -> Case:
    """Measure the map of a 3^3 kernel, its table included.

    Maps are compared as sets, because packages number the taps differently.
    """
    ordered = lambda found: found.sort(1).values
    cache = SpatialCache(coords)
    return Case(
        op=op,
        size=size,
        dtype="int32",
        inputs=_copies(coords),
        forward=[Work((16 + 27 * 4) * len(coords))],
        ours=lambda coords: torch.ops.trislat.neighbours(coords, *_build(cache), 3),
        restore=ordered,
        naive=naive,
        reference=lambda coords: ordered(neighbours_reference(coords).to(coords.device)),
        baselines={
            "torch.sort + torch.searchsorted": Impl(
                lambda coords: SortedTable(coords).neighbours(coords), restore=ordered
            ),
            "spconv": _spconv_map("spconv", resolution),
            "spconv_triton": _spconv_map("spconv_triton", resolution),
            "flex_gemm": _flex_gemm_map(resolution),
        },
    )


def neighbours_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the map on every coordinate set."""
    for name, (coords, resolution) in coordinate_sets(size).items():
        naive = len(coords) < NAIVE_ROWS
        yield neighbours_case(
            "neighbours", f"{name}, N = {len(coords)}", coords.to(device), resolution, naive
        )


def _build(cache: SpatialCache) -> tuple:
    table = build_table(cache)  # not memoised: cache.get would be
    return table.keys, table.rows, table.size, table.kind


def published_partition(
    coords: Tensor, window: int = WINDOW, shift: int = SHIFT
) -> tuple[Tensor, Tensor]:
    """Sort rows by window as published, with argsort and bincount and their waits.

    Returns the rows, and the lengths of the windows that are not empty.
    """
    moved = coords.clone().long()
    moved[:, 1:] = (moved[:, 1:] + shift) // window
    grid = (moved.amax(0) + 1).tolist()
    number = ((moved[:, 0] * grid[1] + moved[:, 1]) * grid[2] + moved[:, 2]) * grid[3] + moved[:, 3]
    order = number.argsort(stable=True)
    lengths = number.bincount()
    return order.int(), lengths[lengths > 0].int()


def partition_case(op: str, size: str, coords: Tensor, window: int, shift: int) -> Case:
    """Measure the windows of one sample.

    `starts` is written for every window, empty ones included.
    """
    cache = SpatialCache(coords)
    partition = lambda coords: window_partition(cache, 1, window, shift)
    windows = len(partition(coords))
    return Case(
        op=op,
        size=size,
        dtype="int32",
        inputs=_copies(coords),
        ours=partition,
        restore=lambda w: (w.order, w.lengths[w.lengths > 0]),
        forward=[Work(20 * len(coords) + 4 * windows)],
        baselines={
            "published path: argsort + bincount": Impl(
                lambda coords: published_partition(coords, window, shift)
            )
        },
    )


def window_partition_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure windows of 8^3, shifted by 4."""
    for name, (coords, _) in coordinate_sets(size).items():
        yield partition_case(
            "window_partition", f"{name}, N = {len(coords)}", coords.to(device), WINDOW, SHIFT
        )


def _windows(cache: SpatialCache, window: int, shift: int) -> Windows:
    return window_partition(cache, cache.batch_size, window, shift)


def cache_hit_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the host's time for windows that the cache already holds.

    Every block of a model after the first pays that.
    """
    coords, _ = next(iter(coordinate_sets(size).values()))
    cache = SpatialCache(coords.to(device))
    cache.get(_windows, WINDOW, SHIFT)
    yield Case(
        op="cache_hit",
        size="windows",
        dtype="int32",
        inputs=lambda seed: (),
        on_host=True,
        forward=[Work()],
        ours=lambda: cache.get(_windows, WINDOW, SHIFT),
    )
