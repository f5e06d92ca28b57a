"""Dense, hashed and sorted tables from coordinates to rows, and neighbour maps, by dictionaries."""

import pytest
import torch

from kernels import backend
from kernels.voxels import hash
from kernels.voxels.cache import SpatialCache
from kernels.voxels.coords import check_coords
from kernels.voxels.hash import (
    build_table,
    lookup,
    lookup_reference,
    neighbours,
    neighbours_reference,
)
from tests.helpers.hardware import GPU
from tests.helpers.voxels import voxels

COORDS = {
    "two samples": lambda: voxels([300, 211]),
    "empty samples": lambda: voxels([0, 40, 0, 30, 0]),
    "one row": lambda: voxels([1]),
    "no rows": lambda: voxels([]),
    "full": lambda: voxels([4 * 3 * 5, 2], (4, 3, 5)),
    "far corners": lambda: torch.tensor(
        [
            [0, 0, 0, 0],
            [0, 0, 0, 1023],
            [0, 1023, 1023, 1023],
            [1, 1023, 1023, 1022],
            [1, 1023, 1023, 1023],
        ],
        dtype=torch.int32,
    ),
}


@pytest.fixture(params=["dense", "keys"])
def table_kind(request, monkeypatch):
    """Force either kind of table where arithmetic would choose the other one."""
    if request.param == "keys":
        monkeypatch.setattr(hash, "DENSE_EXTENT", 0)
    return request.param


def queries(coords, seed=0):
    """The rows shuffled, near misses, and coordinates outside every range."""
    generator = torch.Generator().manual_seed(seed)
    present = coords[torch.randperm(len(coords), generator=generator)]
    near = present + torch.randint(-1, 2, present.shape, generator=generator, dtype=torch.int32)
    big = 2**31 - 1
    wild = [
        [0, -1, 0, 0],
        [0, 0, 0, -big],
        [0, 1024, 0, 0],
        [0, 0, 1024, 0],
        [0, 0, -1, 1024],
        [-1, 0, 0, 0],
    ]
    wild += [[big, 0, 0, 0], [9, 1, 1, 1], [big] * 4, [-big] * 4]
    return torch.cat([present, near, torch.tensor(wild, dtype=torch.int32)])


@pytest.mark.parametrize("make", COORDS.values(), ids=COORDS)
def test_lookup(device, table_kind, make):
    coords = make()
    table = build_table(coords.to(device))
    if table_kind == "keys":
        assert table.kind == ("sorted" if backend.is_torch(coords.to(device)) else "hash")
    asked = queries(coords)
    found = lookup(table, asked.to(device))
    assert found.dtype == torch.int32 and torch.equal(found.cpu(), lookup_reference(coords, asked))
    assert lookup(table, asked[:0].to(device)).shape == (0,)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("make", COORDS.values(), ids=COORDS)
def test_neighbours(device, table_kind, make, kernel_size):
    coords = make()[:120]
    found = neighbours(coords.to(device), kernel_size)
    assert found.dtype == torch.int32 and torch.equal(
        found.cpu(), neighbours_reference(coords, kernel_size)
    )


def test_the_middle_tap_is_the_row_and_opposite_taps_mirror(device):
    coords = voxels([200, 100])
    taps = neighbours(coords.to(device)).cpu().long()
    rows = torch.arange(len(coords))
    assert torch.equal(taps[:, 13], rows)
    for tap in range(27):
        there = taps[:, tap] >= 0
        assert torch.equal(taps[taps[there, tap], 26 - tap], rows[there])


def test_tap_order_is_x_slowest(device):
    coords = torch.tensor(
        [[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]], dtype=torch.int32, device=device
    )
    assert [int((neighbours(coords)[0] == row).nonzero()) for row in (1, 2, 3)] == [4, 10, 12]


@pytest.mark.sanitizer
def test_a_crowded_hash_table_probes_past_others(kernel_device, monkeypatch):
    """Every key starts at the same slot."""
    monkeypatch.setattr(hash, "DENSE_EXTENT", 0)
    coords = voxels([60], (4, 4, 4))
    table = build_table(coords.to(kernel_device))
    assert len(table.keys) == 128 and int((table.keys >= 0).sum()) == 60
    used = (table.keys.cpu() >= 0).nonzero().flatten()
    assert torch.equal(table.rows.cpu()[used].sort().values, torch.arange(60, dtype=torch.int32))
    first = [splitmix(int(k)) % 128 for k in table.keys.cpu()[used]]
    # some were displaced
    assert any(slot != start for slot, start in zip(used.tolist(), first, strict=True))
    assert torch.equal(
        lookup(table, coords.to(kernel_device)).cpu(), torch.arange(60, dtype=torch.int32)
    )


def splitmix(key):
    mask = 2**64 - 1
    h = (key + 0x9E3779B97F4A7C15) & mask
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
    return h ^ (h >> 31)


def test_the_first_slot_is_splitmix64(kernel_device, monkeypatch):
    monkeypatch.setattr(hash, "DENSE_EXTENT", 0)
    for coord in ([0, 0, 0, 0], [0, 3, 1, 4], [700, 1023, 5, 900]):
        table = build_table(torch.tensor([coord], dtype=torch.int32, device=kernel_device))
        b, x, y, z = coord
        slot = splitmix(((b * 1024 + x) * 1024 + y) * 1024 + z) % 2
        assert table.rows.tolist() == [0, -1][:: 1 if slot == 0 else -1]


def test_arithmetic_chooses_the_table():
    assert hash._is_dense(20000, [4, 64, 64, 64]) and hash._is_dense(900000, [2, 256, 256, 256])
    assert not hash._is_dense(900000, [8, 256, 256, 256])  # memory
    assert not hash._is_dense(900000, [1, 257, 1, 1])  # extent
    assert not hash._is_dense(1000, [1, 256, 256, 256])  # a volume for a handful of rows


def test_a_cache_shares_one_table(device):
    cache = SpatialCache(voxels([50, 20]).to(device))
    assert torch.equal(cache.get(neighbours, 3)[:, 13], cache.get(neighbours, 1)[:, 0])
    assert cache.misses == 3  # two maps and one table


def test_batched_equals_looped(device):
    parts = [voxels([90], seed=s) for s in (1, 2)]
    batch = parts[1].clone()
    batch[:, 0] = 1
    whole = neighbours(torch.cat([parts[0], batch]).to(device)).cpu()
    first, second = (neighbours(p.to(device)).cpu() for p in parts)
    assert torch.equal(whole, torch.cat([first, torch.where(second >= 0, second + 90, -1)]))


@pytest.mark.parametrize("rows", [2, 500])
def test_duplicates_name_their_pair(device, rows):
    coords = voxels([rows])
    coords[rows - 1] = coords[0]
    with pytest.raises(
        ValueError, match=rf"rows 0 and {rows - 1} of coords are the same voxel \[0, "
    ):
        build_table(coords.to(device))


def test_check_coords_of_random_batches(device):
    coords = voxels([33, 0, 21])
    known, starts = check_coords(coords.to(device), 4)
    assert known.counts == [33, 0, 21, 0] and starts.tolist() == [0, 33, 33, 54, 54]
    assert list(known.size) == [c + 1 for c in coords[:, 1:].amax(0).tolist()]


def test_compiles_without_breaking_the_graph(device, table_kind):
    cache = SpatialCache(voxels([40, 30]).to(device))
    table = build_table(cache)
    asked = queries(cache.coords.cpu()).to(device)

    def search(asked):
        return lookup(table, asked)

    assert torch.equal(
        torch.compile(search, fullgraph=True, backend="aot_eager")(asked), search(asked)
    )
    args = (table.keys, table.rows, table.size, table.kind)
    if table.kind != "hash":  # whose slots may differ from run to run
        torch.library.opcheck(torch.ops.trislat.build_table, (cache.coords, table.size, table.kind))
    torch.library.opcheck(torch.ops.trislat.lookup, (asked, *args))
    torch.library.opcheck(torch.ops.trislat.neighbours, (cache.coords, *args, 3))


def test_wrong_input_is_refused(device):
    coords = voxels([9]).to(device)
    for kernel_size in (0, 2, -3):
        with pytest.raises(ValueError, match=f"kernel_size {kernel_size} must be odd"):
            neighbours(coords, kernel_size)
    with pytest.raises(ValueError, match=r"\[M, 4\] int32, got \[9, 3\]"):
        lookup(build_table(coords), coords[:, 1:])
    with pytest.raises(ValueError, match="batch column is missing"):
        build_table(coords[:, 1:])


@pytest.mark.skipif(GPU, reason="a GPU tensor has one backend")
def test_a_hash_table_is_not_read_by_the_other_backend(kernel_device, monkeypatch):
    monkeypatch.setattr(hash, "DENSE_EXTENT", 0)
    coords = voxels([9])
    table = build_table(coords)
    with backend.use("torch"), pytest.raises(ValueError, match="cannot be read on the torch path"):
        lookup(table, coords)
