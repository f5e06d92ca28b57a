"""Windows along space-filling curves: codes and key lists against loops and published numbers."""

import math

import pytest
import torch

from kernels import backend
from kernels.voxels.cache import SpatialCache
from kernels.voxels.curves import (
    CURVES,
    curve_code_reference,
    curve_codes,
    serialized_windows,
    serialized_windows_reference,
)
from tests.helpers.golden import golden
from tests.helpers.voxels import lists, voxels

CASES = {
    "even": ([168, 110, 128], 64, "z_order", 0, 0),
    "shift along the curve": ([168, 110, 128], 64, "z_order", 32, 0),
    "shift backwards": ([70, 33], 20, "hilbert", -50, 0),
    "shift of the curve": ([168, 110], 50, "z_order_transposed", 0, 16),
    "per axis, odd window": ([101, 7], 13, "hilbert_transposed", 3, (1, 0, 5)),
    "one window": ([90, 20], 4096, "hilbert", 5, 0),
    "one row a window": ([20], 1, "z_order", 4, 0),
    "just above a window": ([33, 32, 31], 32, "z_order", 16, 0),
    "one row": ([1], 4, "hilbert", 2, 0),
    "no rows": ([0], 4, "z_order", 2, 0),
    "no samples": ([], 4, "z_order", 2, 0),
    "empty samples": ([0, 30, 0, 9, 0], 8, "hilbert", 4, 2),
}


@pytest.mark.parametrize(
    "counts, window, mode, shift_sequence, shift_window", CASES.values(), ids=CASES
)
def test_windows_equal_the_loop(device, counts, window, mode, shift_sequence, shift_window):
    coords = voxels(counts)
    windows = serialized_windows(
        coords.to(device), len(counts), window, mode, shift_sequence, shift_window
    )
    expected = serialized_windows_reference(
        coords, len(counts), window, mode, shift_sequence, shift_window
    )
    assert lists(windows) == expected
    for tensor in (windows.order, windows.starts, windows.keys, windows.key_starts, *windows.uses):
        assert tensor.dtype == torch.int32
    assert sorted(windows.order.tolist()) == list(range(len(coords)))
    assert windows.bound >= max((len(q) for q, _ in expected), default=0)
    for queries, keys in expected:
        assert set(queries) <= set(keys) and len(set(keys)) == len(keys)
    slots, starts = (t.tolist() for t in windows.uses)
    keys = windows.keys.tolist()
    for row, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
        assert slots[a:b] == [slot for slot, key in enumerate(keys) if key == row]


@pytest.mark.parametrize("mode", CURVES)
def test_codes_equal_the_loop_and_the_published(device, mode):
    _, tensors = golden("ops_serialized")
    coords = torch.nn.functional.pad(tensors["code_coords"], (1, 0))
    codes = curve_codes(SpatialCache(coords.to(device)), mode).cpu()
    assert torch.equal(codes, tensors[f"code/{mode.upper()}"])
    ends = [
        (y, x, z) if mode.endswith("transposed") else (x, y, z) for _, x, y, z in coords.tolist()
    ]
    assert codes.tolist() == [curve_code_reference(*c, mode.startswith("hilbert")) for c in ends]


@pytest.mark.parametrize("mode", CURVES)
def test_curves_fill_a_cube(device, mode):
    """Each voxel once: the Hilbert curve steps to neighbours, z-order goes octant by octant."""
    grid = torch.arange(8, dtype=torch.int32)
    coords = torch.nn.functional.pad(torch.cartesian_prod(grid, grid, grid), (1, 0))
    codes = curve_codes(SpatialCache(coords.to(device)), mode).cpu()
    assert sorted(codes.tolist()) == list(range(512))
    path = coords[codes.argsort(), 1:]
    if mode.startswith("hilbert"):
        assert (path.diff(dim=0).abs().sum(1) == 1).all()
    else:
        assert (path[:64] < 4).all() and path[1].tolist() == [0, 0, 1]


@pytest.mark.parametrize("case", range(5))
def test_published_serialization(device, case):
    meta, tensors = golden("ops_serialized")
    config = meta["configs"][f"cfg{case}"]
    coords = tensors["coords"].to(device)
    shift = config["shift_sequence"], config["shift_window"]
    windows = serialized_windows(coords, 3, config["window_size"], config["mode"].lower(), *shift)
    assert torch.equal(windows.keys.cpu(), tensors[f"cfg{case}/fwd_indices"])
    assert windows.key_starts.diff().tolist() == tensors[f"cfg{case}/seq_lens"].tolist()
    found = lists(windows)
    assert [int(coords[rows[0], 0]) for rows, _ in found] == tensors[
        f"cfg{case}/seq_batch_indices"
    ].tolist()
    begins = windows.key_starts.tolist()
    back = {
        row: begins[m] + keys.index(row) for m, (rows, keys) in enumerate(found) for row in rows
    }
    assert [back[row] for row in range(len(coords))] == tensors[f"cfg{case}/bwd_indices"].tolist()


@pytest.mark.parametrize("n, window", [(425, 3), (850, 3)])
def test_the_last_row_is_not_lost(n, window):
    """Where n / windows * windows falls below n in floating point."""
    runs = -(-n // window)
    assert math.floor(n / runs * runs) == n - 1
    windows = serialized_windows(voxels([n], (16, 16, 16)), 1, window)
    assert windows.starts[-1] == n and windows.starts.diff().max() <= window


def test_batched_equals_looped(device):
    coords = voxels([120, 0, 75])
    whole = lists(serialized_windows(coords.to(device), 3, 16, "hilbert", 8))
    looped = []
    offset = 0
    for b in range(3):
        part = coords[coords[:, 0] == b].clone()
        part[:, 0] = 0
        for both in lists(serialized_windows(part.to(device), 1, 16, "hilbert", 8)):
            looped.append(tuple([row + offset for row in rows] for rows in both))
        offset += len(part)
    assert whole == looped


def test_one_launch_whatever_the_batch(kernel_device):
    with backend.count_launches() as launches:
        serialized_windows(voxels([30, 40, 50]).to(kernel_device), 3, 16)
    assert launches["_codes"] == 1


def test_compiles_without_breaking_the_graph(device):
    cache = SpatialCache(voxels([40, 30]).to(device))

    def serialize(coords):
        windows = serialized_windows(cache, 2, 16, "hilbert", 8)
        return (
            coords + 1,
            windows.order,
            windows.starts,
            windows.keys,
            windows.key_starts,
            *windows.uses,
        )

    compiled = torch.compile(serialize, fullgraph=True, backend="aot_eager")
    pairs = zip(compiled(cache.coords), serialize(cache.coords), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    torch.library.opcheck(torch.ops.trislat.curve_codes, (cache.coords, [1, 0, 2], True, False))


def test_wrong_input_is_refused():
    coords = voxels([10])
    with pytest.raises(ValueError, match="window must be a whole number, at least 1, not 0"):
        serialized_windows(coords, 1, 0)
    with pytest.raises(
        ValueError, match="mode 'peano' is not one of z_order, z_order_transposed, hilbert"
    ):
        serialized_windows(coords, 1, 4, "peano")
    with pytest.raises(ValueError, match="shift_window -1 must be at least 0"):
        serialized_windows(coords, 1, 4, shift_window=-1)
    with pytest.raises(ValueError, match="shift_window needs 1 or 3 numbers, one per axis, got 2"):
        serialized_windows(coords, 1, 4, shift_window=(1, 1))
    with pytest.raises(ValueError, match="batch_size 2 of a cache over 1"):
        serialized_windows(SpatialCache(coords), 2, 4)
    coords[-1, 2] = 1020
    with pytest.raises(ValueError, match="coordinate 1020 shifted by 16 is beyond 1023"):
        serialized_windows(coords, 1, 4, shift_window=16)
    serialized_windows(coords, 1, 4, shift_window=(16, 3, 16))
