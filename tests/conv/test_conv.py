"""Sparse convolution, also after a subdivision, against sums over taps and published numbers."""

import pytest
import torch

from kernels import backend
from kernels.bench.shells import batch, shell
from kernels.conv import launch
from kernels.conv.op import octant_weights, sparse_conv, subdivide_conv
from kernels.conv.order import octant_order, octants, tap_order
from kernels.conv.reference import sparse_conv_reference, subdivide_conv_reference
from kernels.conv.tables import ConvTables, conv_tables, list_pairs, octant_tables, sort_rows
from kernels.voxels.cache import SpatialCache
from kernels.voxels.children import child_neighbours
from kernels.voxels.hash import build_table, neighbours
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.golden import golden
from tests.helpers.voxels import voxels

FLOAT = torch.float32
HALF = torch.float16


def inputs(counts, CI, CO, k=3, dtype=FLOAT, device=None, extent=(7, 6, 8)):
    """A cache of dense random voxels, x, and an fp32 weight and bias whose outputs are about 1."""
    cache = SpatialCache(voxels(counts, extent).to(device), len(counts))
    generator = torch.Generator().manual_seed(CI + CO)
    x = torch.randn(len(cache), CI, generator=generator)
    weight = torch.randn(CO, k, k, k, CI, generator=generator)
    weight /= (k**3 * CI) ** 0.5
    bias = torch.randn(CO, generator=generator)
    return cache, *(t.to(device).requires_grad_() for t in (x.to(dtype), weight, bias))


@pytest.mark.parametrize(
    "counts, CI, CO, k, dtype",
    [
        ([0, 260, 0, 41], 20, 36, 3, FLOAT),  # several tiles, empty samples
        ([50], 40, 200, 3, HALF),  # more channels than a program holds
        ([1], 6, 4, 3, FLOAT),
        ([0, 0], 6, 4, 3, HALF),
        ([9, 5], 6, 4, 1, FLOAT),
        ([13], 5, 3, 5, FLOAT),
    ],
    ids=str,
)
def test_sparse_conv(device, counts, CI, CO, k, dtype):
    cache, *args = inputs(counts, CI, CO, k, dtype, device)
    assert_same(
        sparse_conv,
        sparse_conv_reference,
        *args,
        cache.get(neighbours, k),
        tolerance=2 * conv_tolerance(dtype),
    )


def conv_tolerance(dtype):
    return {FLOAT: 2e-6, HALF: 2e-3}[dtype]


@pytest.mark.parametrize(
    "counts, CI, CO, dtype",
    [
        ([0, 30, 0, 11], 20, 36, FLOAT),
        ([21], 40, 24, HALF),
        ([1], 20, 36, FLOAT),
        ([0, 0], 40, 24, HALF),
    ],
    ids=str,
)
def test_subdivide_conv(device, counts, CI, CO, dtype):
    cache, *args = inputs(counts, CI, CO, 3, dtype, device)
    taps = cache.get(neighbours, 3)
    order = cache.get(octant_order)
    children = neighbours(cache.subdivide().coords)  # searched for, not derived
    op = lambda x, weight, bias, _: subdivide_conv(x, weight, bias, taps, order=order)
    assert_same(op, subdivide_conv_reference, *args, children, tolerance=2 * conv_tolerance(dtype))


def test_published_convolution(device):
    tensors = {key: t.to(device) for key, t in golden("ops_sparse")[1].items()}
    cache = SpatialCache(tensors["coords"])
    wrt = [tensors[key].float().requires_grad_() for key in ("feats", "conv3/weight", "conv3/bias")]
    y = sparse_conv(*wrt, cache.get(neighbours, 3), order=cache.get(tap_order, 3))
    assert_close(y, tensors["conv3/out"], 1e-5)
    grads = torch.autograd.grad(y, wrt, tensors["conv3/grad_out"].float())
    assert_close(grads[0], tensors["conv3/grad_in"], 2e-5)
    assert_close(grads[1], tensors["conv3/grad_weight"], 2e-5)
    assert_close(grads[2], tensors["conv3/grad_out"].double().sum(0), 2e-5)


def test_the_collapse_is_exact():
    cache, x, weight, bias = inputs([40, 0, 17], 7, 5)
    args = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    plain = sparse_conv(
        args[0].repeat_interleave(8, 0), *args[1:], neighbours(cache.subdivide().coords)
    )
    collapsed = subdivide_conv(*args, neighbours(cache))
    assert_close(collapsed, plain, 1e-13)
    up = torch.randn_like(plain)
    for ours, theirs in zip(
        *(torch.autograd.grad(y, args, up) for y in (collapsed, plain)), strict=True
    ):
        assert_close(ours, theirs, 1e-13)


def test_each_tap_is_in_one_matrix_of_each_octant():
    weight = 2.0 ** torch.arange(27, dtype=torch.float64).view(1, 3, 3, 3, 1)
    octants = octant_weights(weight).view(8, 8).long()
    # sums of distinct bits: every tap once, none twice
    assert octants.sum(1).tolist() == [2**27 - 1] * 8
    # a corner tap alone reaches the diagonal parent
    assert octants[0, 0] == 1 and octants[7, 7] == 1 << 26
    assert octants[0, 7] == sum(
        1 << 9 * i + 3 * j + k for i in (1, 2) for j in (1, 2) for k in (1, 2)
    )


def test_weights_are_summed_in_fp32_and_rounded_once(device):
    """With x one-hot, outputs are single summed weights."""
    cache = SpatialCache(torch.tensor([[0, 1, 1, 1]], dtype=torch.int32, device=device))
    weight = torch.randn(6, 3, 3, 3, 1, generator=torch.Generator().manual_seed(0)).to(device)
    y = subdivide_conv(torch.ones(1, 1, dtype=HALF, device=device), weight, None, neighbours(cache))
    # each octant's matrices; its own parent is the opposite corner
    own = octant_weights(weight.double()).view(6, 8, 8)
    expected = torch.stack([own[:, o, 7 - o] for o in range(8)])
    assert torch.equal(y, expected.float().half())
    rounded_first = octant_weights(weight.half()).view(6, 8, 8)
    assert not torch.equal(y, torch.stack([rounded_first[:, o, 7 - o] for o in range(8)]))


def test_rows_without_neighbours_but_themselves(device):
    coords = torch.tensor([[0, 4 * i, 0, 8] for i in range(9)], dtype=torch.int32, device=device)
    x = torch.randn(9, 6, device=device, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, 6, device=device)
    y = sparse_conv(x, weight, None, neighbours(coords))
    assert_close(y, x @ weight[:, 1, 1, 1].T, 1e-6)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_close(dx, weight[:, 1, 1, 1].sum(0).expand(9, 6), 1e-6)


def test_batched_equals_looped(device):
    cache, x, weight, bias = inputs([20, 0, 7], 6, 4, device=device)
    weight = weight.detach()
    bias = bias.detach()
    order = cache.get(octant_order)
    for op, factor in ((sparse_conv, 1), (subdivide_conv, 8)):
        whole = op(x, weight, bias, neighbours(cache), order=order if factor == 8 else order[0])
        up = torch.randn_like(whole)
        (dx,) = torch.autograd.grad(whole, x, up)
        for first, end in ((0, 20), (20, 27)):
            alone = op(x[first:end], weight, bias, neighbours(cache.coords[first:end].contiguous()))
            rows = slice(factor * first, factor * end)
            assert_close(whole[rows], alone, 1e-6)
            assert_close(dx[first:end], torch.autograd.grad(alone, x, up[rows])[0][first:end], 1e-6)


def test_what_is_no_neighbour_is_not_read(device):
    cache, x, weight, bias = inputs([60], 6, 4, device=device, extent=(9, 8, 9))
    taps = neighbours(cache)
    spoilt = x.detach().clone()
    spoilt[17] = torch.nan
    reached = (taps == 17).any(1)
    assert 1 < reached.sum() < 30
    assert torch.equal(sparse_conv(spoilt, weight, bias, taps).isnan().all(1), reached)
    assert torch.equal(sparse_conv(spoilt, weight, bias, taps).isnan().any(1), reached)
    fine = (neighbours(cache.subdivide()) // 8 == 17).any(1)
    assert torch.equal(subdivide_conv(spoilt, weight, bias, taps).isnan().any(1), fine)


def test_rows_are_summed_in_several_steps(device, monkeypatch):
    """More channels and more rows than a step; the weight's gradient in several shares."""
    tile = launch.Tile(16, 16, 64, 4, 1)
    monkeypatch.setattr(launch, "product_tiles", lambda *_: [tile])
    monkeypatch.setattr(launch, "_gradient_tile", lambda *_: launch.Tile(16, 8, 64, 4, 1))
    monkeypatch.setattr(backend, "multiprocessors", lambda _: 54)
    monkeypatch.setattr("kernels.conv.tables.PAIRED", 16)
    monkeypatch.setattr("kernels.conv.cpu.CHUNK", 16)
    cache, *args = inputs([23, 14], 40, 12, device=device, extent=(4, 4, 4))
    tables = None if backend.is_torch(args[0]) else cache.get(conv_tables, 3)
    for given in ({"order": cache.get(tap_order, 3)}, {"tables": tables}):
        op = lambda *a, given=given: sparse_conv(*a, **given)
        assert_same(op, sparse_conv_reference, *args, cache.get(neighbours, 3), tolerance=4e-6)


@pytest.mark.parametrize("k, gradients", [(1, True), (3, True), (3, False), (5, True)])
def test_tables_say_what_their_map_says(kernel_device, k, gradients):
    cache, *args = inputs([70, 0, 41], 6, 4, k, device=kernel_device)
    tables = cache.get(conv_tables, k, gradients)
    assert (tables.pairs is not None) == gradients
    # plane by plane, each in its own order
    assert tables.forward.rows.shape == ((k, k * k, 111) if k > 1 else (1, 1, 111))
    op = lambda *a: sparse_conv(*a, tables=tables)
    assert_same(op, sparse_conv_reference, *args, cache.get(neighbours, k), tolerance=4e-6)


def test_many_rows_go_through_all_taps_at_once(kernel_device, monkeypatch):
    monkeypatch.setattr("kernels.conv.tables.PLANES", 100)
    cache, *args = inputs([70, 0, 41], 6, 4, device=kernel_device)
    tables = cache.get(conv_tables, 3)
    assert tables.forward.rows.shape == (1, 27, 111)
    assert torch.equal(tables.forward.order[0], cache.get(tap_order, 3))
    op = lambda *a: sparse_conv(*a, tables=tables)
    assert_same(op, sparse_conv_reference, *args, cache.get(neighbours, 3), tolerance=4e-6)


@pytest.mark.parametrize("gradients", [True, False])
def test_tables_of_octants(kernel_device, gradients):
    cache, *args = inputs([0, 30, 0, 11], 20, 36, device=kernel_device)
    tables = cache.get(octant_tables, gradients)
    near = cache.get(neighbours, 3)
    children = neighbours(cache.subdivide().coords)
    op = lambda x, weight, bias, _: subdivide_conv(x, weight, bias, near, tables=tables)
    assert_same(op, subdivide_conv_reference, *args, children, tolerance=4e-6)


def test_pairs_are_those_of_the_map_in_order(kernel_device, monkeypatch):
    monkeypatch.setattr("kernels.conv.tables.PAIRED", 32)
    cache = SpatialCache(voxels([70, 0, 41], (7, 6, 8)).to(kernel_device))
    near = cache.get(neighbours, 3)
    for taps in (near[:, None], octants(near), near[:0, None]):
        pairs = list_pairs(taps)
        G, T = taps.shape[1:]
        for m, (under, own) in enumerate(pairs.rows.transpose(0, 1)):
            rows = (taps[:, m // T, m % T] >= 0).nonzero()[:, 0]
            count = int(pairs.count[m])
            assert count == len(rows)
            assert torch.equal(under[:count], taps[rows, m // T, m % T])
            assert torch.equal(own[:count].long(), rows * G + m // T)


def test_sorted_rows_need_few_taps(kernel_device):
    """Tiles of a shell's rows, sorted, list few taps that a row lacks; as they come, many."""
    cache = SpatialCache(batch(shell("sphere", 12)).to(kernel_device)).subdivide()
    taps = cache.get(neighbours, 3)
    order = cache.get(tap_order, 3)
    assert sorted(order.tolist()) == list(range(len(cache)))

    def executed(rows):
        return launch._list_taps(rows, 64)[..., 0].sum().item() * 64

    needed = (taps >= 0).sum().item()
    planes = executed(cache.get(conv_tables, 3).forward)
    whole = executed(sort_rows(taps[:, None], order))
    assert needed <= planes < 1.1 * needed and planes < whole < 1.25 * needed
    assert executed(sort_rows(taps[:, None], None)) > 1.35 * needed
    listed = launch._list_taps(sort_rows(taps[:, None], order), 64)
    first = (taps[order[:64].long()] >= 0).any(0)
    assert listed[0, 0, 1 : 1 + int(first.sum())].tolist() == first.nonzero()[:, 0].tolist()


def test_orders_of_octants(device):
    cache = SpatialCache(voxels([70, 0, 20], (8, 9, 7)).to(device))
    order = cache.get(octant_order).long()
    taps = cache.get(neighbours, 3)
    assert torch.equal(order[0], cache.get(tap_order, 3).long())
    present = torch.cat([taps[:, None] >= 0, octants(taps).repeat(1, 1, 4)[..., :27] >= 0], 1)
    for group, rows in enumerate(order):
        assert sorted(rows.tolist()) == list(range(90))
        masks = [tuple(m) for m in present[rows, group].tolist()]
        # each set of taps once
        assert sum(a != b for a, b in zip(masks, masks[1:], strict=False)) == len(set(masks)) - 1


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_childrens_neighbours_follow_from_their_parents(device, kernel_size):
    fine = SpatialCache(voxels([8, 0, 3], (3, 2, 3)).to(device), 4).subdivide()
    assert torch.equal(fine.get(neighbours, kernel_size), neighbours(fine.coords, kernel_size))
    assert not [make for make, _ in fine._scale.made if make is build_table]


def test_children_of_children_and_children_without_siblings(device):
    fine = SpatialCache(voxels([6, 5], (3, 2, 3)).to(device)).subdivide()
    assert fine.parent.parent is None and fine.subdivide().parent is fine
    assert torch.equal(neighbours(fine.subdivide()), neighbours(fine.subdivide().coords))
    # a set that pools to a parent but misses one of its children
    some = SpatialCache(fine.coords[1:].contiguous())
    coarse, _ = some.pool(2)
    assert some.parent is None and coarse.subdivide().parent is coarse
    assert torch.equal(neighbours(some), neighbours(some.coords))


@pytest.mark.parametrize("with_tables", [False, True])
def test_the_same_bits_twice_and_one_launch_for_a_batch(kernel_device, with_tables):
    cache, *wrt = inputs([9, 0, 30], 6, 4, device=kernel_device)
    expected = {"_list_taps": 2, "_conv_product": 2, "_conv_weight_gradient": 1}
    if with_tables:  # a launch for each plane of taps
        given = {"tables": cache.get(conv_tables, 3)}
        expected["_conv_product"] = 6
    else:
        given = {"order": cache.get(tap_order, 3)}
        expected["_list_pairs"] = 1
    cache.get(neighbours, 3)
    runs = []
    for _ in range(2):
        with backend.count_launches() as launches:
            y = sparse_conv(*wrt, cache.get(neighbours, 3), **given)
            runs.append((y, *torch.autograd.grad(y.square().sum(), wrt)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert launches == expected


def test_gradients_of_fp32_weights_do_not_overflow_in_fp16(device):
    cache, x, weight, bias = inputs([40], 6, 4, dtype=HALF, device=device, extent=(4, 4, 4))
    y = sparse_conv(x, weight, bias, neighbours(cache))
    up = torch.full_like(y, 30000.0)
    dweight, dbias = torch.autograd.grad(y, [weight, bias], up)
    assert dweight.dtype == dbias.dtype == FLOAT and dbias.tolist() == [40 * 30000.0] * 4
    assert dweight.isfinite().all()


def test_bf16_on_the_torch_path():
    cache, x, weight, bias = inputs([30], 12, 8, dtype=torch.bfloat16)
    assert_same(sparse_conv, sparse_conv_reference, x, weight, bias, cache.get(neighbours, 3))


def test_strides_of_every_argument(device):
    cache, x, weight, bias = inputs([20, 4], 6, 4, device=device)
    taps = cache.get(neighbours, 3)
    order = cache.get(octant_order)
    spread = lambda t: torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]  # every other number
    for op, given in ((sparse_conv, order[0]), (subdivide_conv, order)):
        plain = op(x, weight, bias, taps, order=given)
        assert torch.equal(op(*map(spread, (x, weight, bias, taps)), order=spread(given)), plain)


def test_gradients_in_double_precision():
    cache, *args = inputs([5, 0, 2], 2, 3, extent=(2, 2, 2))
    args = [t.detach().double().requires_grad_() for t in args]
    for op in (sparse_conv, subdivide_conv):
        assert torch.autograd.gradcheck(
            lambda *a, op=op: op(*a, cache.get(neighbours, 3)), args, fast_mode=True
        )


def test_registered_as_torch_asks_and_compiles(device):
    cache, x, weight, bias = inputs([6, 3], 6, 4, device=device)
    taps = cache.get(neighbours, 3)
    order = cache.get(octant_order)

    def both(x, weight, bias):
        y = sparse_conv(x, weight, None, taps)
        return y.sum() + subdivide_conv(x, weight, bias, taps, order=order).square()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(x, weight, bias)
    assert torch.equal(compiled, both(x, weight, bias))
    compiled.sum().backward()
    if backend.is_torch(x):
        torch.library.opcheck(
            torch.ops.trislat.sparse_conv,
            (x, weight.detach().flatten(1, 3), bias, taps, order[0], False, []),
        )
        summed = octant_weights(weight.detach())
        torch.library.opcheck(
            torch.ops.trislat.sparse_conv, (x, summed.requires_grad_(), None, taps, order, True, [])
        )


def test_wrong_input_is_refused(device):
    x = torch.zeros(5, 4, device=device)
    weight = torch.zeros(2, 3, 3, 3, 4, device=device)
    bias = torch.zeros(2, device=device)
    taps = torch.full((5, 27), -1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="kernel size 3 has 27 taps, neighbours has 125"):
        sparse_conv(x, weight, bias, taps.new_zeros(5, 125))
    with pytest.raises(ValueError, match="kernel size 2 must be odd"):
        sparse_conv(x, weight[:, :2, :2, :2], bias, taps[:, :8])
    with pytest.raises(ValueError, match="x has 4 channels, the weight takes 3"):
        sparse_conv(x, weight[..., :3], bias, taps)
    with pytest.raises(ValueError, match="x has 5 rows, neighbours has 4"):
        subdivide_conv(x, weight, bias, taps[:4])
    with pytest.raises(
        ValueError, match=r"weight must be \[Co, k, k, k, Ci\], got \[2, 3, 3, 2, 4\]"
    ):
        sparse_conv(x, weight[:, :, :, :2], bias, taps)
    with pytest.raises(ValueError, match=r"bias \[1\] must be \[2\]"):
        sparse_conv(x, weight, bias[:1], taps)
    with pytest.raises(ValueError, match=r"\[N, K\] int32, got \[5, 27\] torch.int64"):
        sparse_conv(x, weight, bias, taps.long())
    with pytest.raises(ValueError, match=r"order must hold 9 x 5 int32 rows, got \[5\]"):
        subdivide_conv(x, weight, bias, taps, order=taps[:, 0])
    wide = SpatialCache(voxels([6]).to(device))
    wide = sort_rows(wide.get(neighbours, 3)[:, None], None)
    with pytest.raises(ValueError, match=r"tables must hold 27 x 5 rows, got \[1, 27, 6\]"):
        sparse_conv(x, weight, bias, taps, tables=ConvTables(wide, None, None))
    with pytest.raises(ValueError, match=r"tables must hold 64 x 5 rows, got \[1, 27, 6\]"):
        subdivide_conv(x, weight, bias, taps, tables=ConvTables(wide, None, None))
    with pytest.raises(ValueError, match="kernel size 3, the weight has 1"):
        subdivide_conv(x, weight[:, :1, :1, :1], bias, taps[:, :1])
    with pytest.raises(ValueError, match="fp16, bf16 or fp32.*int32"):
        sparse_conv(x.int(), weight, bias, taps)
    with pytest.raises(
        ValueError, match=r"parents' neighbours must be \[N, 27\].*kernel size 5, got \[5, 125\]"
    ):
        child_neighbours(taps.new_zeros(5, 125), 5)
