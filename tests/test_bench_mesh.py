"""What the mesh decoder's measurements count, and how they call other people's convolutions."""

import sys
import types

import pytest
import torch

from kernels import bench
from kernels.bench_mesh import _flex_gemm, _spconv, _surface
from kernels.cache import SpatialCache
from kernels.conv import sparse_conv
from kernels.hash import neighbours
from kernels.isosurface import isosurface
from kernels.measure import Case, Work
from kernels.shells import batch, shell

CPU = torch.device("cpu")


def small(op: str) -> Case:
    (case,) = bench.cases(op, "small", ["fp32"], CPU)
    return case


def test_bytes_of_group_norm_and_pooling_by_hand():
    # a shell of 272 voxels, 8 children each, 32 channels of fp32: twice in, once out; backward x and dy twice in, dx out
    norm = small("group_norm")
    assert norm.size == "sphere 8^3, 2176 x 32"
    assert (norm.forward, norm.backward) == ([Work(3 * 2176 * 32 * 4)], [Work(5 * 2176 * 32 * 4)])
    # 56 cells hold those 272 voxels; 64 channels
    pooled = small("pool")
    assert pooled.size == "sphere 8^3, 272 -> 56 x 64"
    assert pooled.forward == pooled.backward == [Work((272 + 56) * 64 * 4)]


def test_bytes_of_a_surface_and_its_picture_by_hand():
    out = isosurface(*_surface("small", CPU), True)
    P, F, T = len(out.vertices), len(out.faces), len(out.tsdf_value)
    surface, picture = small("isosurface"), small("render_mesh")
    assert surface.size == f"3584 cubes of 16^3, {F} faces"  # 56 voxels, 64 cubes each, 101 numbers a cube
    # a vertex has a place and 6 attributes, a face 3 indices, a corner near the surface a place and a value
    assert surface.forward == surface.backward == [Work(4 * (3584 * 101 + 9 * P + 3 * F + 4 * T))]
    assert picture.size == f"{F} faces, 48^2"
    # places and colours in, 11 floats a pixel out; backward all of it twice
    moved = 4 * (6 * P + 3 * F + 11 * 48 * 48)
    assert (picture.forward, picture.backward) == ([Work(moved)], [Work(2 * moved)])
    assert picture.reference is not None and picture.naive


class Convolution(torch.nn.Module):
    """SubMConv3d with its neighbours in the input's dictionary, as spconv keeps them: a layer adds to a copy."""

    made = 0

    def __init__(self, Ci, Co, kernel_size, indice_key):
        super().__init__()
        self.key = indice_key
        self.weight, self.bias = torch.nn.Parameter(torch.zeros(Co, 3, 3, 3, Ci)), torch.nn.Parameter(torch.zeros(Co))

    def forward(self, x):
        known = dict(x.indice_dict)
        if self.key not in known:
            Convolution.made += 1
            known[self.key] = neighbours(x.indices, 3)
        return types.SimpleNamespace(features=sparse_conv(x.features, self.weight, self.bias, known[self.key]), indice_dict=known)


def voxels_of_spconv(features, indices, spatial_shape, batch_size, indice_dict):
    assert (spatial_shape, batch_size) == ([8, 8, 8], 1)
    return types.SimpleNamespace(features=features, indices=indices, indice_dict=indice_dict)


def conv3d_of_flex_gemm(feats, coords, shape, weight, bias, neighbor_cache):
    assert shape == (1, 1, 8, 8, 8)
    if neighbor_cache is None:
        Convolution.made += 1
        neighbor_cache = neighbours(coords, 3)
    return sparse_conv(feats, weight, bias, neighbor_cache), neighbor_cache


@pytest.mark.parametrize("package", ["spconv", "spconv_triton", "flex_gemm"])
def test_convolutions_of_others_get_our_weights_and_make_their_neighbours_once(monkeypatch, package):
    cache, generator = SpatialCache(batch(shell("sphere", 8))), torch.Generator().manual_seed(0)
    spconv = types.SimpleNamespace(SubMConv3d=Convolution, SparseConvTensor=voxels_of_spconv)
    flex_gemm = types.SimpleNamespace(sparse_submanifold_conv3d=conv3d_of_flex_gemm)
    for name, module in ((f"{package}.pytorch", spconv), ("flex_gemm.ops.spconv", flex_gemm)):
        for parent in (name.split(".")[0], ".".join(name.split(".")[:-1])):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Convolution, "made", 0)
    peer = _flex_gemm(cache) if package == "flex_gemm" else _spconv(package, cache, 4, 6, "fp32", CPU)
    near = neighbours(cache.coords, 3)
    for _ in range(2):
        shapes = (272, 4), (6, 3, 3, 3, 4), (6,)
        x, weight, bias = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
        got, expected = peer.run(x, weight, bias), sparse_conv(x, weight, bias, near)
        assert torch.equal(got, expected)
        grads = [torch.autograd.grad(out.square().sum(), (x, weight, bias)) for out in (got, expected)]
        assert all(map(torch.equal, *grads))
    assert Convolution.made == 1
