"""Features between scales: pooling, unpooling, subdividing, by loops and published numbers."""

import pytest
import torch

from kernels import backend
from kernels.voxels.cache import SpatialCache
from kernels.voxels.pool import Pooling, pool, pool_reference, pooling, unpool, unpool_reference
from models import SparseTensor
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.golden import golden
from tests.helpers.voxels import voxels

# rows of each sample
COUNTS = {"none": [0, 0], "one": [1], "gaps": [70, 0, 40, 0], "tiles": [90, 3]}


def cached(counts, device, extent=(9, 12, 7)):
    return SpatialCache(voxels(counts, extent, 3).to(device), len(counts))


def normal(*shape, dtype=torch.float32, device=None, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return x.to(device, dtype).requires_grad_()


def both(op, reference, x, groups: Pooling):
    assert_same(lambda x: op(x, groups), lambda x: reference(x, groups.index.cpu(), len(groups)), x)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    "factor, C, dtype",
    [(2, 33, torch.float32), (4, 300, torch.float32), (2, 33, torch.float16)],
    ids=str,
)
def test_against_loops(device, counts, factor, C, dtype):
    cache = cached(counts, device)
    groups = cache.get(pooling, factor)
    both(pool, pool_reference, normal(len(cache), C, dtype=dtype, device=device), groups)
    both(unpool, unpool_reference, normal(len(groups), C, dtype=dtype, device=device), groups)


def test_a_coarse_row_without_children(device):
    index, order, starts = (
        torch.tensor(t, dtype=torch.int32, device=device)
        for t in ([3, 1, 3], [1, 0, 2], [0, 0, 1, 1, 3])
    )
    groups = Pooling(index, order, starts)
    x = normal(3, 5, device=device)
    assert torch.equal(pool(x, groups)[[0, 2]], torch.zeros(2, 5, device=device))
    both(pool, pool_reference, x, groups)
    y = normal(4, 5, device=device)
    both(unpool, unpool_reference, y, groups)
    (grad,) = torch.autograd.grad(unpool(y, groups).sum(), y)
    assert torch.equal(grad.sum(1), torch.tensor([0.0, 5.0, 0.0, 10.0], device=device))


def test_groups_are_made_once_and_read_nothing(device, monkeypatch):
    cache = cached([70, 0, 40], device)
    cache.pool(2)
    # the one way in which a coordinate set is read
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    groups = cache.get(pooling, 2)
    monkeypatch.undo()
    assert cache.get(pooling, 2) is groups
    assert torch.equal(
        groups.index[groups.order.long()].cpu(), groups.index.cpu().sort(stable=True)[0]
    )
    assert groups.order.dtype == groups.starts.dtype == torch.int32 and groups.starts[-1] == 110
    assert all(0 < n <= 8 for n in groups.starts.diff().tolist())


@pytest.mark.parametrize("case, factor", [("down0", 2), ("down1", 4)])
def test_published_features_but_for_their_extra_child(device, case, factor):
    tensors = {k: v.to(device) for k, v in golden("ops_sparse")[1].items()}
    fine = SparseTensor(tensors["feats"].float(), tensors["coords"])
    coarse = fine.pool(factor)
    assert torch.equal(coarse.coords, tensors[f"{case}/coords"])
    children = fine.cache.get(pooling, factor).starts.diff()[:, None]
    published = coarse.feats * children / (children + 1)
    assert_close(published, tensors[f"{case}/feats"], 1e-6)
    ramp = torch.linspace(-1, 1, 32, device=device)
    up = coarse.replace(tensors[f"{case}/feats"]).unpool(factor)
    assert up.cache is fine.cache
    assert_close(up.feats @ ramp, tensors[f"{case}/up_feats_rowproj"], 1e-5)


def test_subdivided_features_are_repeated(device):
    tensors = golden("ops_sparse")[1]
    coarse = SparseTensor(
        tensors["feats"].float().to(device).requires_grad_(), tensors["coords"].to(device)
    )
    fine = coarse.subdivide()
    assert (
        torch.equal(fine.coords.cpu(), tensors["subdivide/coords"])
        and fine.batch_size == coarse.batch_size
    )
    assert torch.equal(fine.feats, coarse.feats.repeat_interleave(8, dim=0))
    weight = torch.randn(fine.feats.shape, generator=torch.Generator().manual_seed(0)).to(device)
    (grad,) = torch.autograd.grad((fine.feats * weight).sum(), coarse.feats)
    assert_close(grad, weight.view(-1, 8, 32).sum(1), 1e-6)
    back = fine.pool(2)
    assert back.cache is coarse.cache and torch.equal(back.feats, coarse.feats)


def test_down_up_and_down_again_share_what_was_made(device):
    """Two nested levels, whose cached maps the published code confuses.

    There 8 voxels -> 4 -> 1 come back as 4.
    """
    x = SparseTensor(normal(110, 5, device=device), voxels([70, 0, 40], (9, 12, 7), 3).to(device))
    half = x.pool(2)
    quarter = half.pool(2)
    up = quarter.unpool(2)
    assert up.cache is half.cache and up.unpool(2).cache is x.cache and len(up.unpool(2)) == 110
    made = x.cache.misses, half.cache.misses
    again = up.unpool(2).pool(2)
    assert again.cache is half.cache and again.pool(2).cache is quarter.cache
    assert (x.cache.misses, half.cache.misses) == made
    assert_close(again.pool(2).feats, quarter.feats, 1e-6)  # a mean of equal rows is that row
    (through,) = torch.autograd.grad(up.unpool(2).feats.sum(), x.feats)
    children = (half.cache.get(pooling, 2).starts.diff(), x.cache.get(pooling, 2).starts.diff())
    leaves = torch.zeros(len(quarter), device=device).index_add_(
        0, half.cache.pool(2)[1], children[1].float()
    )
    parent = x.cache.pool(2)[1].long()
    grand = half.cache.pool(2)[1].long()
    expected = leaves[grand][parent] / children[0][grand][parent] / children[1][parent]
    assert_close(through[:, 0], expected, 1e-5)


def test_the_same_bits_twice(device):
    groups = cached([90, 3], device).get(pooling, 4)
    x = normal(93, 33, device=device)
    y = normal(len(groups), 33, device=device)
    for op, value in ((pool, x), (unpool, y)):
        runs = [
            (out := op(value, groups), *torch.autograd.grad(out.sin().sum(), value))
            for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_sums_of_16_bit_rows_are_taken_in_fp32(device):
    index = torch.zeros(8, dtype=torch.int32)
    order = torch.arange(8, dtype=torch.int32)
    groups = Pooling(
        *(t.to(device) for t in (index, order, torch.tensor([0, 8], dtype=torch.int32)))
    )
    # their sum is more than fp16 holds
    large = torch.full((8, 2), 2e4, dtype=torch.float16, device=device)
    assert pool(large, groups).tolist() == [[2e4, 2e4]]
    one = torch.ones(1, 2, dtype=torch.float16, device=device, requires_grad=True)
    upstream = torch.tensor([1024.0] + [0.4] * 7, dtype=torch.float16, device=device)[
        :, None
    ].expand(8, 2)
    (grad,) = torch.autograd.grad(unpool(one, groups), one, upstream)
    assert grad.tolist() == [[1027, 1027]]  # in fp16 every 0.4 is lost


def test_registered_and_compiled(device):
    groups = cached([20, 5], device).get(pooling, 2)
    x = normal(25, 33, device=device)
    y = normal(len(groups), 33, device=device)
    args = groups.index, groups.order, groups.starts
    if backend.name(x) != "interpreter":
        torch.library.opcheck(torch.ops.trislat.pool_sum.default, (x, *args, True))
        torch.library.opcheck(torch.ops.trislat.pool_copy.default, (y, *args, False))

    def loss(x):
        return unpool(pool(x, groups).sin(), groups).square().sum()

    (grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    assert torch.equal(grad, *torch.autograd.grad(loss(x), x))


def test_what_does_not_fit_is_named(device):
    groups = cached([20, 5], device).get(pooling, 2)
    with pytest.raises(ValueError, match=r"a row for each of 25 fine voxels, got \[24, 3\]"):
        pool(torch.zeros(24, 3, device=device), groups)
    with pytest.raises(
        ValueError, match=rf"a row for each of {len(groups)} coarse voxels, got \[25, 3\]"
    ):
        unpool(torch.zeros(25, 3, device=device), groups)
    with pytest.raises(ValueError, match=r"fine voxels, got \[25\]"):
        pool(torch.zeros(25, device=device), groups)
    with pytest.raises(ValueError, match="got torch.int64"):
        pool(torch.zeros(25, 3, device=device, dtype=torch.int64), groups)
    with pytest.raises(ValueError, match="not pooled by 2"):
        SparseTensor(torch.zeros(25, 3, device=device), cache=cached([20, 5], device)).unpool(2)
