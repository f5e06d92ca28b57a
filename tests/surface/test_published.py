"""Surfaces against numbers of the published implementation: dense grids and sparse voxels."""

import pytest
import torch

from kernels.surface.cubes import find_cubes, unravel
from kernels.surface.isosurface import isosurface
from kernels.surface.reference import flexicubes_reference
from tests.helpers.compare import assert_close
from tests.helpers.golden import golden
from tests.helpers.surfaces import corners, full_grid

FLEXI = [
    "flexi_empty8",
    "flexi_random16",
    "flexi_random8_train",
    "flexi_sphere12_train",
    "flexi_sphere16",
]
# tolerances as shares of the golden tensor's maximum
T1 = 1e-5  # outputs
T2 = 2e-5  # gradients


def golden_case(case):
    about, g = golden(case)
    g = {key: value.float() if value.is_floating_point() else value for key, value in g.items()}
    return about, g


@pytest.mark.parametrize("case", FLEXI)
def test_published_numbers_of_a_dense_grid(device, case):
    about, g = golden_case(case)
    R = about["resolution"]
    training = about["training"]
    coords = full_grid(R)
    vertex = corners(coords, R)
    parts = [
        g["in/sdf"][vertex] + 1 / R,
        g["in/deform"][vertex],
        g["in/weights21"],
        g["in/colors"][vertex],
    ]
    fields = torch.cat([p.flatten(1) for p in parts], 1).to(device).requires_grad_()
    vertices, faces, attributes, terms, *_ = torch.ops.trislat.isosurface(
        fields, coords.to(device), [R**3], R, training
    )
    assert torch.equal(faces.cpu(), g["out/faces"])
    assert_close(vertices, g["out/vertices"], T1)
    assert_close(attributes, g["out/vertex_colors"], T1)
    deviation = len(g["out/L_dev"]) * terms[1, 0]
    if "grad/w3" not in g:
        assert len(vertices) == 0 and deviation == 0
        return
    assert_close(deviation, g["out/L_dev"].sum(), T1)
    loss = (
        (torch.sin(9 * vertices) * g["grad/w3"].to(device)).sum()
        + deviation
        + attributes.square().sum()
    )
    assert_close(loss, g["grad/loss"], T1)
    grad = torch.autograd.grad(loss, fields)[0].cpu().double()
    sdf, deform, weights, color = grad.split([8, 24, 21, 48], 1)

    def per_vertex(value, channels):
        return value.new_zeros((R + 1) ** 3, channels).index_add(
            0, vertex.flatten(), value.reshape(-1, channels)
        )

    slope = (1 - torch.tanh(g["in/deform"].double()) ** 2) / (2 * R)
    rows = g["grad/surf_cube_rows"].long()
    pairs = {
        "sdf": (per_vertex(sdf, 1)[:, 0], g["grad/sdf"]),
        "position": (per_vertex(deform, 3), slope * g["grad/voxelgrid_vertices"]),
        "color": (per_vertex(color, 6).mean(0), g["grad/colors_mean"]),
        "beta": (weights[:, :12].sum(0), g["grad/beta_sum_per_edge"]),
        "alpha": (weights[:, 12:20].sum(0), g["grad/alpha_sum_per_corner"]),
        "beta rows": (weights[rows, :12], g["grad/beta_rows"]),
        "alpha rows": (weights[rows, 12:20], g["grad/alpha_rows"]),
    }
    if training:
        pairs["gamma"] = weights[rows, 20], g["grad/gamma_rows"]
    for what, (got, want) in pairs.items():
        assert_close(got, want, T2, what)


@pytest.mark.parametrize("case", FLEXI)
def test_the_reference_has_every_published_deviation(case):
    about, g = golden_case(case)
    R = about["resolution"]
    axis = torch.arange(R + 1)
    x = torch.cartesian_prod(axis, axis, axis) / R - 0.5 + torch.tanh(g["in/deform"]) / (2 * R)
    inputs = (
        t.double() for t in (x, g["in/sdf"], torch.sigmoid(g["in/colors"]), g["in/weights21"])
    )
    _, faces, _, deviation = flexicubes_reference(*inputs, R, about["training"])
    assert torch.equal(faces.int(), g["out/faces"])
    assert_close(deviation, g["out/L_dev"], T1)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_published_numbers_of_sparse_voxels(device, mode):
    _, g = golden_case("sparse2mesh_res16")
    coords = torch.nn.functional.pad(g["in/coords"], (1, 0)).to(device)
    fields = g["in/feats"].to(device).requires_grad_()
    out = isosurface(coords, fields, 16, mode == "train")
    assert torch.equal(out.faces.cpu(), g[f"{mode}/faces"])
    assert_close(out.vertices, g[f"{mode}/vertices"], T1)
    assert_close(out.attributes, g[f"{mode}/vertex_attrs"], T1)
    if mode == "eval":
        return
    assert_close(out.regularizer[0], g["train/reg_loss"], T1)
    assert_close(out.tsdf_position, g["train/tsdf_v"], T1)
    assert_close(out.tsdf_value, g["train/tsdf_s"], T1)
    loss = (
        out.regularizer.sum()
        + (torch.sin(9 * out.vertices) * g["train/w3"].to(device)).sum()
        + out.attributes.square().sum()
    )
    assert_close(loss, g["train/loss"], T1)
    assert_close(torch.autograd.grad(loss, fields)[0], g["train/grad_feats"], T2)


def test_vertices_and_corners_are_numbered_as_published():
    _, g = golden("ops_sparse")
    cubes = find_cubes(full_grid(5), torch.zeros(125, 53), 1, 5)
    assert torch.equal(cubes.voxel_corners, g["dense_grid5/cubes"])
    assert torch.equal(
        torch.stack(unravel(cubes.vertex_index, 6)[1:], 1).int(), g["dense_grid5/verts"]
    )
