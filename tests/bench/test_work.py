"""Work that the benchmarks count, by hand, and the voxels they are measured on."""

import pytest
import torch

from kernels.bench.attention import attention_work
from kernels.bench.case import Case, Work
from kernels.bench.conv import conv_work, parents_read
from kernels.bench.gaussian import splat_cases
from kernels.bench.mesh import _surface
from kernels.bench.ops import OPS
from kernels.bench.radiance import raymarch_work
from kernels.bench.shells import batch, shell
from kernels.surface.isosurface import isosurface
from kernels.voxels.cache import SpatialCache
from kernels.voxels.hash import neighbours
from kernels.voxels.window import window_partition

CPU = torch.device("cpu")
LARGE = (
    "neighbours",
    "lookup",
    "build_table",
    "window_partition",
    "cache_hit",
    "isosurface",
    "render_mesh",
)
CONVS = ("sparse_conv", "subdivide_conv")  # some seconds: their numbers are made on the CPU
# Voxels at 64^3 and the most in a window of 8^3: the published times are of these sets
VOXELS = {
    "sphere": (17792, 138),
    "noisy sphere": (13362, 145),
    "rough sphere": (21441, 245),
    "blobs": (47452, 272),
    "small sphere": (6920, 121),
}


@pytest.mark.parametrize("name", VOXELS)
def test_a_name_gives_the_same_voxels(name):
    coords = batch(shell(name))
    lengths = [window_partition(coords, 1, 8, shift).lengths for shift in (0, 4)]
    assert (len(coords), max(int(n.max()) for n in lengths)) == VOXELS[name]


def test_an_unknown_shell_is_refused():
    with pytest.raises(ValueError, match="'cube' is not one of sphere"):
        shell("cube")


def test_bytes_and_flops_of_attention_by_hand():
    # windows of 1 and 3 rows; 16 channels
    forward, backward = attention_work(N=4, squares=10, H=2, D=8, width=2)
    assert forward.bytes == 3 * 4 * 16 * 2 + 4 * 16 * 2 + 2 * 4 * 4  # qkv, out, fp32 log-sum-exp
    # qkv, out, dout, lse -> dqkv
    assert backward.bytes == 3 * 4 * 16 * 2 + 2 * 4 * 16 * 2 + 2 * 4 * 4 + 3 * 4 * 16 * 2
    # two products, five
    assert forward.flops == 2 * 2 * 16 * 10 and backward.flops == 5 * 2 * 16 * 10


def test_bytes_and_flops_of_the_other_decoders_by_hand():
    # 10 voxels of 2 floats, 3 pixels of 5; again with gradients
    assert raymarch_work(10, 2, 3) == (Work(4 * (20 + 15)), Work(4 * (40 + 30)))
    # 3 rows of 4 channels to 5 rows of 2, 7 pairs; 27 taps of weights; fp16
    forward, backward = conv_work((3, 5), 7, 4, 2, 2)
    assert forward == Work(2 * (12 + 10 + 216), 2 * 7 * 4 * 2) and backward == Work(
        2 * (24 + 10 + 432), 4 * 7 * 4 * 2
    )
    # two voxels side by side: of 16 children, the 8 at the shared face read both parents, the
    # others their own
    children = SpatialCache(
        torch.tensor([[0, 4, 4, 4], [0, 5, 4, 4]], dtype=torch.int32)
    ).subdivide()
    assert parents_read(children.get(neighbours, 3)) == 8 * 2 + 8


def test_bytes_of_a_splat_by_hand():
    (case,) = splat_cases("small", ["fp32"], CPU)
    # 14 numbers a Gaussian, 4 a pixel
    assert case.forward == [Work(4 * 14 * 1216 + 4 * 4 * 64 * 64)]


def small(op: str) -> Case:
    (case,) = OPS[op]("small", ["fp32"], CPU)
    return case


def test_bytes_of_group_norm_and_pooling_by_hand():
    # a shell of 272 voxels, 8 children each, 32 channels of fp32: twice in, once out; backward x
    # and dy twice in, dx out
    norm = small("group_norm")
    assert norm.size == "sphere 8^3, 2176 x 32"
    assert (norm.forward, norm.backward) == ([Work(3 * 2176 * 32 * 4)], [Work(5 * 2176 * 32 * 4)])
    # 56 cells hold those 272 voxels; 64 channels
    pooled = small("pool")
    assert pooled.size == "sphere 8^3, 272 -> 56 x 64"
    assert pooled.forward == pooled.backward == [Work((272 + 56) * 64 * 4)]


def test_bytes_of_a_surface_and_its_picture_by_hand():
    out = isosurface(*_surface("small", CPU), True)
    P = len(out.vertices)
    F = len(out.faces)
    T = len(out.tsdf_value)
    surface = small("isosurface")
    picture = small("render_mesh")
    # 56 voxels, 64 cubes each, 101 numbers a cube
    assert surface.size == f"3584 cubes of 16^3, {F} faces"
    # a vertex has a place and 6 attributes, a face 3 indices, a corner near the surface a place and
    # a value
    assert surface.forward == surface.backward == [Work(4 * (3584 * 101 + 9 * P + 3 * F + 4 * T))]
    assert picture.size == f"{F} faces, 48^2"
    # places and colours in, 11 floats a pixel out; backward all of it twice
    moved = 4 * (6 * P + 3 * F + 11 * 48 * 48)
    assert (picture.forward, picture.backward) == ([Work(moved)], [Work(2 * moved)])
    assert picture.reference is not None and picture.naive


def check_case(op, size):
    case = next(iter(OPS[op](size, ["fp32"], CPU)))
    assert case.op == op and case.forward and case.size


@pytest.mark.parametrize("op", [op for op in OPS if op != "splat"])
def test_every_op_has_cases_of_both_sizes(op):
    for size in ("small", "base"):
        if op in LARGE + CONVS and size == "base":
            continue  # seconds of voxelising or extracting at 256^3
        check_case(op, size)


@pytest.mark.slow
@pytest.mark.parametrize("op", CONVS)
def test_large_cases(op):
    check_case(op, "base")
