"""What the mesh decoder's measurements count."""

import torch

from kernels.bench import command as bench
from kernels.bench.case import Case, Work
from kernels.bench.mesh import _surface
from kernels.surface.isosurface import isosurface

CPU = torch.device("cpu")


def small(op: str) -> Case:
    (case,) = bench.cases(op, "small", ["fp32"], CPU)
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
    P, F, T = len(out.vertices), len(out.faces), len(out.tsdf_value)
    surface, picture = small("isosurface"), small("render_mesh")
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
