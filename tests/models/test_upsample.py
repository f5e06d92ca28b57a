"""The mesh decoder's upsampling: published numbers, and the block against its plain form."""

import pytest
import torch
import torch.nn.functional as F

from kernels.conv.reference import sparse_conv_reference
from kernels.norm.group import group_norm_reference
from kernels.voxels.cache import SpatialCache
from kernels.voxels.hash import neighbours
from models.upsample import GroupNorm, SparseConv3d, SubdivideBlock
from tests.helpers.compare import assert_close
from tests.helpers.golden import golden
from tests.helpers.voxels import voxels


def test_published_convolutions(device):
    tensors = golden("ops_sparse")[1]
    cache = SpatialCache(tensors["coords"].to(device))
    x = tensors["feats"].to(device).float()
    for name, size in (("conv3", 3), ("conv1", 1)):
        layer = SparseConv3d(32, 16, size, skip_weight="spconv").to(device)
        layer.conv.load_state_dict(
            {key: tensors[f"{name}/{key}"].float() for key in ("weight", "bias")}
        )
        assert_close(layer(x, cache), tensors[f"{name}/out"], 1e-5)
    weight = layer.conv.weight
    bias = layer.conv.bias
    layer.skip_weight = "linear"
    assert_close(layer(x, cache), F.linear(x, weight[:, 0, 0, 0], bias), 1e-6)
    assert layer(x.half(), cache).dtype == torch.float16
    assert_close(layer(x.half(), cache), layer(x, cache), 4e-3)


def plain_block(block: SubdivideBlock, x, cache):
    """The published order of operations, on the copies."""
    children = cache.subdivide()
    first, norm, last = (block.out_layers[i] for i in "013")
    act = block.act_layers["0"]
    h = group_norm_reference(
        x, act.weight, act.bias, cache.starts, act.groups, silu=True
    ).repeat_interleave(8, 0)
    h = sparse_conv_reference(h, first.conv.weight, first.conv.bias, neighbours(children.coords))
    h = group_norm_reference(h, norm.weight, norm.bias, children.starts, norm.groups, silu=True)
    h = sparse_conv_reference(h, last.conv.weight, last.conv.bias, neighbours(children.coords))
    skip = block.skip_connection
    return h + (
        x if skip is None else F.linear(x, skip.conv.weight.flatten(1), skip.conv.bias)
    ).repeat_interleave(8, 0)


@pytest.mark.parametrize("channels", [(8, 4), (4, 4)])
def test_a_block_is_its_plain_form(channels):
    torch.manual_seed(0)
    block = SubdivideBlock(*channels, groups=2).double()
    assert not block.out_layers["3"].conv.weight.any() and not block.out_layers["3"].conv.bias.any()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    cache = SpatialCache(voxels([30, 0, 9]), 4)
    x = torch.randn(39, channels[0], dtype=torch.float64, requires_grad=True)
    y, children = block(x, cache)
    assert children is cache.subdivide() and y.shape == (8 * 39, channels[1])
    wrt = [x, *block.parameters()]
    up = torch.randn_like(y)
    assert_close(y, plain_block(block, x, cache), 1e-11)
    grads = [torch.autograd.grad(out, wrt, up) for out in (y, plain_block(block, x, cache))]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, 1e-10)


def test_parameters_have_published_names_and_shapes():
    block = SubdivideBlock(128, 32)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes == {
        "act_layers.0.weight": (128,),
        "act_layers.0.bias": (128,),
        "out_layers.0.conv.weight": (32, 3, 3, 3, 128),
        "out_layers.0.conv.bias": (32,),
        "out_layers.1.weight": (32,),
        "out_layers.1.bias": (32,),
        "out_layers.3.conv.weight": (32, 3, 3, 3, 32),
        "out_layers.3.conv.bias": (32,),
        "skip_connection.conv.weight": (32, 1, 1, 1, 128),
        "skip_connection.conv.bias": (32,),
    }
    weight = block.out_layers["0"].conv.weight
    assert 0.9 < weight.abs().max() * (27 * 128) ** 0.5 <= 1


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="kernel_size 2 must be odd"):
        SparseConv3d(4, 4, 2)
    with pytest.raises(ValueError, match="skip_weight 'other' is not one of linear, spconv"):
        SparseConv3d(4, 4, 1, "other")
    with pytest.raises(ValueError, match="48 channels are not a multiple of 32 groups"):
        GroupNorm(48)
