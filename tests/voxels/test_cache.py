"""SpatialCache: its numbers, its errors and the row that they name, its memory."""

import gc
import weakref

import pytest
import torch

from kernels.voxels.cache import SpatialCache
from kernels.voxels.hash import build_table, neighbours
from kernels.voxels.window import full_windows, window_partition
from tests.helpers.golden import golden
from tests.helpers.voxels import voxels


def rows(*values):
    return torch.tensor(values, dtype=torch.int32).reshape(-1, 4)


def test_what_the_host_knows(device):
    cache = SpatialCache(rows([0, 5, 1, 2], [0, 0, 9, 0], [2, 1, 1, 1]).to(device), 5)
    assert cache.counts == [2, 0, 1, 0, 0] and cache.batch_size == 5 and len(cache) == 3
    assert cache.extent == (6, 10, 3)
    assert cache.starts.tolist() == [0, 2, 2, 3, 3, 3] and cache.starts.dtype == torch.int32


def test_batch_size_follows_from_the_last_row(device):
    cache = SpatialCache(rows([1, 0, 0, 0], [3, 0, 0, 0]).to(device))
    assert cache.counts == [0, 1, 0, 1] and cache.starts.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("batch_size", [None, 0, 3])
def test_no_rows(device, batch_size):
    cache = SpatialCache(rows().to(device), batch_size)
    assert cache.counts == [0] * (batch_size or 0) and cache.starts.tolist() == [0] * (
        (batch_size or 0) + 1
    )
    assert len(window_partition(cache, cache.batch_size, 4, 2)) == cache.batch_size
    assert neighbours(cache).shape == (0, 27) and len(full_windows(cache).order) == 0


WRONG = {
    "3 columns": (
        torch.zeros(5, 3, dtype=torch.int32),
        "batch column is missing: coords are .5, 3.*functional.pad",
    ),
    "5 columns": (torch.zeros(2, 5, dtype=torch.int32), r"\[N, 4\].*got \[2, 5\]"),
    "float": (torch.zeros(2, 4), "must be torch.int32, got torch.float32"),
    "int64": (torch.zeros(2, 4, dtype=torch.int64), "must be torch.int32, got torch.int64"),
    "negative": (
        rows([0, 1, 1, 1], [0, 2, -3, 1], [0, -1, 0, 0]),
        r"row 1 of coords is \[0, 2, -3, 1\]: negative",
    ),
    "negative batch": (rows([-1, 1, 1, 1]), r"row 0 of coords is \[-1, 1, 1, 1\]: negative"),
    "above 1023": (
        rows([0, 1023, 1, 1], [0, 0, 0, 1024]),
        r"row 1 of coords is \[0, 0, 0, 1024\]: above 1023",
    ),
    "unsorted": (
        rows([0, 1, 1, 1], [1, 0, 0, 0], [0, 2, 2, 2]),
        r"row 2 of coords is \[0, 2, 2, 2\] after \[1, 0, 0, 0\]",
    ),
    "beyond the batch": (
        rows([0, 1, 1, 1], [2, 0, 0, 0]),
        r"row 1 of coords is \[2, 0, 0, 0\]: batch_size is 2",
    ),
    "twins": (
        rows([0, 1, 2, 3], [0, 3, 2, 1], [1, 3, 2, 1], [1, 1, 2, 3], [1, 3, 2, 1], [1, 1, 2, 3]),
        r"rows 2 and 4 of coords are the same voxel \[1, 3, 2, 1\]",
    ),
}


@pytest.mark.parametrize("coords, message", WRONG.values(), ids=WRONG)
def test_wrong_coords_are_refused_by_row(device, coords, message):
    with pytest.raises(ValueError, match=message):
        SpatialCache(coords.to(device), 2)


def test_more_samples_than_are_counted_need_a_batch_size(device):
    coords = rows([1500, 0, 0, 0]).to(device)
    with pytest.raises(ValueError, match="give batch_size for more than 1024"):
        SpatialCache(coords)
    assert sum(SpatialCache(coords, 1501).counts) == 1
    with pytest.raises(ValueError, match="batch_size must be a whole number, at least 0, not -1"):
        SpatialCache(coords, -1)


def test_made_once_for_every_function_and_arguments(device):
    cache = SpatialCache(rows([0, 0, 0, 0], [0, 0, 0, 1]).to(device))

    def windows(cache, size, shift):
        return window_partition(cache, cache.batch_size, size, shift)

    for block in range(12):
        cache.get(windows, 4, 2 * (block % 2))
    assert (cache.hits, cache.misses) == (10, 2)
    assert cache.get(windows, 4, 2) is cache.get(windows, 4, 2)
    assert cache.get(neighbours, 3) is cache.get(neighbours, 3)  # and the table that it needs
    assert cache.misses == 4 and cache.get(build_table).size == [1, 1, 1, 2]


def test_a_value_of_none_is_remembered():
    made = []
    cache = SpatialCache(rows())
    assert cache.get(made.append) is None and cache.get(made.append) is None
    assert made == [cache]


def scattered(seed=0):
    return voxels([70, 0, 40], (9, 12, 7), seed)


def test_children_are_published_children(device):
    tensors = golden("ops_sparse")[1]
    fine = SpatialCache(tensors["coords"].to(device)).subdivide()
    assert torch.equal(fine.coords.cpu(), tensors["subdivide/coords"])
    same = SpatialCache(fine.coords)
    assert (
        fine.counts == same.counts
        and torch.equal(fine.starts, same.starts)
        and fine.batch_size == 3
    )
    assert fine.extent == same.extent


@pytest.mark.parametrize("case, factor", [("down0", 2), ("down1", 4)])
def test_pooled_voxels_are_the_published_ones(device, case, factor):
    tensors = golden("ops_sparse")[1]
    coarse, index = SpatialCache(tensors["coords"].to(device)).pool(factor)
    assert torch.equal(coarse.coords.cpu(), tensors[f"{case}/coords"])
    assert (
        torch.equal(index.cpu(), tensors[f"{case}/idx"])
        and index.dtype == coarse.coords.dtype == torch.int32
    )


@pytest.mark.parametrize("factor", [1, 2, 3, 1024])
def test_pool_against_a_set(device, factor):
    coords = scattered()
    cache = SpatialCache(coords.to(device), 4)
    coarse, index = cache.pool(factor)
    expected = sorted(
        {(b, x // factor, y // factor, z // factor) for b, x, y, z in coords.tolist()}
    )
    assert [tuple(c) for c in coarse.coords.tolist()] == expected
    assert [expected[i] for i in index.tolist()] == [
        (b, *(c // factor for c in xyz)) for b, *xyz in coords.tolist()
    ]
    same = SpatialCache(coarse.coords, 4)
    assert (coarse.counts, coarse.extent, coarse.batch_size) == (same.counts, same.extent, 4)
    assert torch.equal(coarse.starts, same.starts)


def test_down_up_and_down_again_shares(device):
    cache = SpatialCache(scattered().to(device))
    half, index = cache.pool(2)
    eighth, _ = half.pool(4)
    up, up_index = eighth.unpool(4)
    assert up is half and up.unpool(2)[0] is cache and up.unpool(2)[1] is index
    assert up_index is half.pool(4)[1]
    fine = cache.subdivide()
    table = fine.get(build_table)
    assert fine.pool(2)[0] is cache and fine.pool(2)[1].tolist() == [
        n // 8 for n in range(len(fine))
    ]
    del fine
    # though nobody held the finer cache meanwhile
    assert cache.subdivide().get(build_table) is table
    quarter, _ = cache.pool(4)
    assert quarter is not half and quarter.unpool(4)[0] is cache


def test_a_family_is_freed_with_its_last_cache():
    cache = SpatialCache(scattered())
    fine = weakref.ref(cache.subdivide().coords)
    coarse = cache.pool(2)[0]
    del cache
    assert fine() is not None and len(coarse.unpool(2)[0].subdivide()) == 8 * 110
    gc.disable()
    try:
        del coarse
        assert fine() is None
    finally:
        gc.enable()


def test_scales_without_rows_and_scales_that_do_not_exist(device):
    cache = SpatialCache(rows().to(device), 2)
    assert len(cache.subdivide()) == 0 and cache.subdivide().counts == [0, 0]
    coarse, index = cache.pool(2)
    assert coarse.counts == [0, 0] and len(coarse) == len(index) == 0
    with pytest.raises(ValueError, match="pool factor must be a whole number, at least 1, not 0"):
        cache.pool(0)
    with pytest.raises(ValueError, match="not pooled by 4; factors that made them: .2.$"):
        coarse.unpool(4)
    with pytest.raises(ValueError, match="not pooled by 2; factors that made them: none"):
        cache.unpool(2)
    with pytest.raises(ValueError, match="children of coordinate 512 lie beyond 1023"):
        SpatialCache(rows([0, 1, 512, 3]).to(device)).subdivide()
    assert SpatialCache(rows([0, 1, 511, 3]).to(device)).subdivide().extent == (4, 1024, 8)
