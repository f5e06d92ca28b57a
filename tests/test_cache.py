"""SpatialCache: what it knows, what it refuses and by which row, what it remembers."""

import pytest
import torch

from kernels import backend
from kernels.cache import SpatialCache
from kernels.hash import build_table, neighbours
from kernels.window import full_windows, window_partition


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
    assert cache.counts == [0] * (batch_size or 0) and cache.starts.tolist() == [0] * ((batch_size or 0) + 1)
    assert len(window_partition(cache, cache.batch_size, 4, 2)) == cache.batch_size
    assert neighbours(cache).shape == (0, 27) and len(full_windows(cache).order) == 0


WRONG = {
    "3 columns": (torch.zeros(5, 3, dtype=torch.int32), "batch column is missing: coords are .5, 3.*functional.pad"),
    "5 columns": (torch.zeros(2, 5, dtype=torch.int32), r"\[N, 4\].*got \[2, 5\]"),
    "float": (torch.zeros(2, 4), "must be torch.int32, got torch.float32"),
    "int64": (torch.zeros(2, 4, dtype=torch.int64), "must be torch.int32, got torch.int64"),
    "negative": (rows([0, 1, 1, 1], [0, 2, -3, 1], [0, -1, 0, 0]), r"row 1 of coords is \[0, 2, -3, 1\]: negative"),
    "negative batch": (rows([-1, 1, 1, 1]), r"row 0 of coords is \[-1, 1, 1, 1\]: negative"),
    "above 1023": (rows([0, 1023, 1, 1], [0, 0, 0, 1024]), r"row 1 of coords is \[0, 0, 0, 1024\]: above 1023"),
    "unsorted": (rows([0, 1, 1, 1], [1, 0, 0, 0], [0, 2, 2, 2]), r"row 2 of coords is \[0, 2, 2, 2\] after \[1, 0, 0, 0\]"),
    "beyond the batch": (rows([0, 1, 1, 1], [2, 0, 0, 0]), r"row 1 of coords is \[2, 0, 0, 0\]: batch_size is 2"),
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
    with pytest.raises(ValueError, match="batch_size -1 is negative"):
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


def test_one_read_to_build_and_none_after(device, monkeypatch):
    reads = []
    for name in ("item", "tolist", "nonzero", "cpu", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, f=original, n=name: (reads.append(n), f(self, *a))[1])
    coords = rows([0, 5, 1, 2], [0, 0, 9, 0], [1, 1, 1, 1]).to(device)
    cache = SpatialCache(coords, 2)
    assert reads == ["tolist"]
    if backend.name(coords) != "interpreter":  # which itself reads what it interprets
        cache.get(neighbours, 3)
        assert window_partition(cache, 2, 4, 2).segment.shape == (3,)
        full_windows(cache)
        assert reads == ["tolist"]
