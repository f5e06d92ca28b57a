"""Windows: the partition against a dictionary and the published one, and what attention needs."""

import re

import pytest
import torch

from kernels import backend
from kernels.voxels import window
from kernels.voxels.cache import SpatialCache
from kernels.voxels.window import full_windows, window_partition, window_partition_reference
from tests.helpers.golden import golden
from tests.helpers.voxels import groups, voxels

CASES = {
    "even": ([300, 211], 8, 0),
    "half shift": ([300, 211], 8, 4),
    "odd window": ([300, 1], 5, 2),
    "negative shift": ([300, 40], 5, -2),
    "per axis": ([200, 0, 100], (4, 2, 8), (1, 0, 3)),
    "beyond a window": ([100], 3, (7, -11, 3)),
    "one voxel windows": ([50], 1, 0),
    "one window": ([700, 20], 64, 0),
    "one row": ([1], 4, 2),
    "no rows": ([], 4, 2),
    "empty samples": ([0, 30, 0, 9, 0], 4, 2),
}


@pytest.mark.parametrize("counts, size, shift", CASES.values(), ids=CASES)
def test_partition_equals_the_dictionary(device, counts, size, shift):
    coords = voxels(counts)
    windows = window_partition(coords.to(device), len(counts), size, shift)
    expected = window_partition_reference(coords, len(counts), size, shift)
    assert groups(windows) == [rows for _, rows in expected]
    assert windows.order.dtype == windows.starts.dtype == torch.int32
    assert windows.starts[0] == 0 and windows.starts[-1] == len(coords)
    assert windows.bound >= max([len(rows) for _, rows in expected], default=0)
    assert windows.lengths.tolist() == windows.starts.diff().tolist() and len(windows) == len(
        windows.lengths
    )
    assert windows.segment.tolist() == [
        m for m, n in enumerate(windows.lengths.tolist()) for _ in range(n)
    ]


@pytest.mark.parametrize("size, shift", [(4, 2), (5, -1), ((4, 2, 8), (1, 0, 3))], ids=str)
def test_the_sorted_partition_is_the_scanned_one(device, monkeypatch, size, shift):
    coords = voxels([150, 0, 90]).to(device)
    scanned = window_partition(coords, 3, size, shift)
    monkeypatch.setattr(window, "DENSE_CELLS", 0)
    by_sort = window_partition(coords, 3, size, shift)
    assert torch.equal(by_sort.order, scanned.order) and torch.equal(by_sort.starts, scanned.starts)


def test_wide_extents_are_sorted(device):
    """A grid of 2e8 cells is not made: few voxels far apart."""
    coords = voxels([60, 0, 40], (900, 3, 1000))
    windows = window_partition(coords.to(device), 3, 64, 32, extent=(900, 3, 1000))
    grid = window._grid((900, 3, 1000), [64] * 3, [32] * 3)
    assert 3 * grid[0] * grid[1] * grid[2] * 64**3 > window.DENSE_CELLS
    starts = windows.starts.tolist()
    order = windows.order.tolist()
    assert (starts[0], starts[-1], len(windows)) == (0, 100, 3 * grid[0] * grid[1] * grid[2])
    for (b, x, y, z), rows in window_partition_reference(coords, 3, 64, 32):
        m = ((b * grid[0] + x) * grid[1] + y) * grid[2] + z
        assert order[starts[m] : starts[m + 1]] == rows


def test_order_does_not_depend_on_the_input_order(device):
    coords = voxels([200])
    shuffled = coords[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    a, b = (window_partition(c.to(device), 1, 4, 2) for c in (coords, shuffled))
    assert torch.equal(coords[a.order.cpu().long()], shuffled[b.order.cpu().long()])


@pytest.mark.parametrize("case", range(6))
def test_published_partition(device, case):
    meta, tensors = golden("ops_window_partition")
    config = meta["configs"][f"cfg{case}"]
    coords = tensors["coords"]
    windows = window_partition(
        coords.to(device),
        int(coords[:, 0].max()) + 1,
        config["window_size"],
        config["shift_window"],
    )
    ours = groups(windows)
    lengths = tensors[f"cfg{case}/seq_lens"].tolist()
    published = [p.tolist() for p in tensors[f"cfg{case}/fwd_indices"].split(lengths)]
    assert [set(rows) for rows in ours] == [set(rows) for rows in published]
    assert [int(coords[rows[0], 0]) for rows in ours] == tensors[
        f"cfg{case}/seq_batch_indices"
    ].tolist()
    rank = torch.empty(len(coords), dtype=torch.int32)
    for r, rows in enumerate(ours):
        rank[rows] = r
    assert torch.equal(rank, tensors[f"cfg{case}/window_id"])


def test_batched_equals_looped(device):
    coords = voxels([120, 0, 75])
    whole = groups(window_partition(coords.to(device), 3, 4, 2, extent=16))
    looped = []
    offset = 0
    for b in range(3):
        part = coords[coords[:, 0] == b].clone()
        part[:, 0] = 0
        looped += [
            [r + offset for r in rows]
            for rows in groups(window_partition(part.to(device), 1, 4, 2, extent=16))
        ]
        offset += len(part)
    assert whole == looped


def test_full_windows(device):
    starts = torch.tensor([0, 3, 3, 8], dtype=torch.int32, device=device)
    windows = full_windows(starts, 8)
    assert (
        groups(windows) == [[0, 1, 2], [3, 4, 5, 6, 7]] and windows.bound == 8 and len(windows) == 3
    )
    assert windows.segment.tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    coords = voxels([3, 0, 5]).to(device)
    cached = full_windows(SpatialCache(coords))
    assert groups(cached) == groups(windows) and cached.bound == 5
    with pytest.raises(ValueError, match="needs N"):
        full_windows(starts)


def test_two_launches_whatever_the_batch(kernel_device):
    with backend.count_launches() as launches:
        window_partition(voxels([30, 40, 50]).to(kernel_device), 3, 4, 2, extent=16)
    assert launches == {"_occupy": 1, "_rank": 1}


def test_rows_outside_the_promised_extent_write_nowhere(kernel_device, monkeypatch):
    coords = torch.tensor(
        [[0, 1, 1, 1], [0, 99, 0, 0], [7, 0, 0, 0], [0, -1, 0, 0]],
        dtype=torch.int32,
        device=kernel_device,
    )
    windows = window_partition(coords, 1, 4, 0, extent=4)
    assert windows.starts.tolist() == [0, 1] and windows.order.tolist() == [0, -1, -1, -1]
    monkeypatch.setattr("kernels.voxels.window.DENSE_CELLS", 0)
    by_sort = window_partition(coords, 1, 4, 0, extent=4)
    assert by_sort.starts.tolist() == [0, 1] and by_sort.order.tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("dense", [0, 1 << 25])
@pytest.mark.parametrize(
    "wrong", [[0, 4, 0, 0], [0, 0, 0, 9], [2, 0, 0, 0], [-1, 0, 0, 0], [0, 0, -1, 0]], ids=str
)
def test_the_torch_path_refuses_rows_outside_the_promised_extent(monkeypatch, dense, wrong):
    monkeypatch.setattr("kernels.voxels.window.DENSE_CELLS", dense)
    coords = torch.tensor([[0, 1, 1, 1], wrong], dtype=torch.int32)
    message = rf"row 1 of coords is {wrong}: outside the extent [4, 4, 5] of 2 samples"
    with pytest.raises(ValueError, match=re.escape(message)):
        window_partition(coords, 2, 3, extent=(4, 4, 5))


def test_the_torch_path_refuses_a_voxel_given_twice():
    coords = torch.tensor([[0, 1, 1, 1], [0, 2, 1, 1], [0, 1, 1, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="3 rows of coords name 2 voxels"):
        window_partition(coords, 1, 4, extent=4)


def test_an_extent_below_that_of_a_cache_is_refused(device):
    cache = SpatialCache(torch.tensor([[0, 1, 6, 2]], dtype=torch.int32, device=device))
    for extent in 4, (2, 6, 3):
        with pytest.raises(ValueError, match=r"is below \[2, 7, 3\], that of the voxels"):
            window_partition(cache, 1, 4, extent=extent)
    assert window_partition(cache, 1, 4, extent=(2, 7, 3)).order.tolist() == [0]


def test_compiles_without_breaking_the_graph(device):
    def partition(coords):
        windows = window_partition(coords, 2, 4, 2, extent=16)
        return windows.order, windows.starts, windows.segment

    coords = voxels([40, 30]).to(device)
    compiled = torch.compile(partition, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(coords), partition(coords), strict=True))
    torch.library.opcheck(
        torch.ops.trislat.window_partition, (coords, 2, [16] * 3, [4] * 3, [2] * 3)
    )


def test_wrong_input_is_refused():
    coords = voxels([10])
    with pytest.raises(ValueError, match="window 0 must be at least 1"):
        window_partition(coords, 1, 0)
    with pytest.raises(ValueError, match="window needs 1 or 3 numbers, one per axis, got 2"):
        window_partition(coords, 1, (4, 4))
    with pytest.raises(ValueError, match=r"batch column is missing: coords are \[10, 3\]"):
        window_partition(coords[:, 1:], 1, 4)
    with pytest.raises(ValueError, match="int64"):
        window_partition(coords.long(), 1, 4)
    with pytest.raises(ValueError, match=r"\[10, 3\] torch.int32"):
        window_partition(coords[:, 1:], 1, 4, extent=16)
    with pytest.raises(ValueError, match="batch_size 2 of a cache over 1"):
        window_partition(SpatialCache(coords), 2, 4)
    with pytest.raises(ValueError, match="extent 0 must be"):
        window_partition(coords, 1, 4, extent=0)
    with pytest.raises(ValueError, match="1073741824 windows, above 268435456"):
        window_partition(coords, 1, 1, extent=1024)
