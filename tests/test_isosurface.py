"""Surfaces against the dense grid, the published one and geometry: closed, oriented, differentiable, scene by scene."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import backend
from kernels.cache import SpatialCache
from kernels.cubes import find_cubes, unravel
from kernels.isosurface import Surfaces, _forward, _reverse, flexicubes_reference, isosurface, isosurface_reference
from tests.conftest import assert_close, assert_same, golden
from tests.test_window import voxels

FLEXI = ["flexi_empty8", "flexi_random16", "flexi_random8_train", "flexi_sphere12_train", "flexi_sphere16"]
OFFSET = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)])
T1, T2 = 1e-5, 2e-5  # of the golden tensor's maximum: outputs, gradients


def full_grid(R):
    axis = torch.arange(R)
    return torch.nn.functional.pad(torch.cartesian_prod(axis, axis, axis), (1, 0)).int()


def corners(coords, R):
    """The vertex at each corner of each voxel, [N, 8]."""
    x, y, z = (coords[:, None, 1:] + OFFSET).unbind(-1)
    return (x * (R + 1) + y) * (R + 1) + z


def level_set(coords, R, distance, channels=101, seed=0):
    """Fields [N, channels] whose signed distance is `distance` of the corners, the rest small and random."""
    fields = 0.2 * torch.randn(len(coords), channels, generator=torch.Generator().manual_seed(seed))
    fields[:, :8] = distance((coords[:, None, 1:] + OFFSET) / R - 0.5) + 1 / R
    return fields


def sphere(x):
    return x.norm(dim=-1) - 0.31


def torus(x):
    return ((x[..., :2].norm(dim=-1) - 0.28) ** 2 + x[..., 2] ** 2).sqrt() - 0.11


def near(R, distance):
    """The voxels inside a surface and near it. (Where voxels end inside, there is a surface too: nothing is outside.)"""
    coords = full_grid(R)
    return coords[distance((coords[:, 1:] + 0.5) / R - 0.5) < 1.8 / R]


def grads(surfaces, fields, seed=0, scale=1.0):
    """Of random upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [t for t in surfaces if t.requires_grad]
    up = [scale * torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in outputs]
    return torch.autograd.grad(outputs, fields, up)[0]


def scene(surfaces, b) -> list[torch.Tensor]:
    """The parts of scene b, its faces counted from its own first vertex."""
    (v, w), (f, g), (t, u) = (s[b : b + 2].tolist() for s in surfaces[6:])
    return [
        surfaces.vertices[v:w], surfaces.faces[f:g] - v, surfaces.attributes[v:w], surfaces.regularizer[b : b + 1],
        surfaces.tsdf_position[t:u], surfaces.tsdf_value[t:u],
    ]  # fmt: skip


CASES = {
    "two scenes": ([60, 35], 5, 101, True),
    "inference": ([60, 35], 6, 101, False),
    "without color": ([90], 7, 53, True),
    "without color, inference": ([200], 7, 53, False),
    "empty scenes": ([0, 20, 0, 17, 0], 4, 101, True),
    "one voxel": ([1], 3, 101, True),
    "one cube": ([1, 1], 1, 53, False),
    "all cubes": ([27, 8], 3, 101, True),
    "no voxels": ([0, 0], 4, 101, True),
}


@pytest.mark.parametrize("counts, R, channels, training", CASES.values(), ids=CASES)
def test_equals_the_dense_grid(device, counts, R, channels, training):
    coords = voxels(counts, (R, R, R))
    fields = torch.randn(len(coords), channels, generator=torch.Generator().manual_seed(R), requires_grad=True)
    cache = SpatialCache(coords.to(device), len(counts))
    op = lambda f: isosurface(cache, f, R, training)
    assert_same(op, lambda f: isosurface_reference(coords, f, R, training, len(counts)), fields.detach().to(device).requires_grad_())


def golden_case(case):
    about, g = golden(case)
    g = {key: value.float() if value.is_floating_point() else value for key, value in g.items()}
    return about, g


@pytest.mark.parametrize("case", FLEXI)
def test_published_numbers_of_a_dense_grid(device, case):
    about, g = golden_case(case)
    R, training = about["resolution"], about["training"]
    coords = full_grid(R)
    vertex = corners(coords, R)
    parts = [g["in/sdf"][vertex] + 1 / R, g["in/deform"][vertex], g["in/weights21"], g["in/colors"][vertex]]
    fields = torch.cat([p.flatten(1) for p in parts], 1).to(device).requires_grad_()
    vertices, faces, attributes, terms, *_ = torch.ops.trislat.isosurface(fields, coords.to(device), [R**3], R, training)
    assert torch.equal(faces.cpu(), g["out/faces"])
    assert_close(vertices, g["out/vertices"], T1)
    assert_close(attributes, g["out/vertex_colors"], T1)
    deviation = len(g["out/L_dev"]) * terms[1, 0]
    if "grad/w3" not in g:
        assert len(vertices) == 0 and deviation == 0
        return
    assert_close(deviation, g["out/L_dev"].sum(), T1)
    loss = (torch.sin(9 * vertices) * g["grad/w3"].to(device)).sum() + deviation + attributes.square().sum()
    assert_close(loss, g["grad/loss"], T1)
    grad = torch.autograd.grad(loss, fields)[0].cpu().double()
    sdf, deform, weights, color = grad.split([8, 24, 21, 48], 1)

    def per_vertex(value, channels):
        return value.new_zeros((R + 1) ** 3, channels).index_add(0, vertex.flatten(), value.reshape(-1, channels))

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
    inputs = (t.double() for t in (x, g["in/sdf"], torch.sigmoid(g["in/colors"]), g["in/weights21"]))
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
    loss = out.regularizer.sum() + (torch.sin(9 * out.vertices) * g["train/w3"].to(device)).sum() + out.attributes.square().sum()
    assert_close(loss, g["train/loss"], T1)
    assert_close(torch.autograd.grad(loss, fields)[0], g["train/grad_feats"], T2)


def test_vertices_and_corners_are_numbered_as_published():
    _, g = golden("ops_sparse")
    cubes = find_cubes(full_grid(5), torch.zeros(125, 53), 1, 5)
    assert torch.equal(cubes.rows, g["dense_grid5/cubes"])
    assert torch.equal(torch.stack(unravel(cubes.vertex, 6)[1:], 1).int(), g["dense_grid5/verts"])


def euler_characteristic(vertices, faces):
    """Of a closed surface whose faces agree in orientation: every edge is there once in each direction."""
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).long()
    forth, back = edges[:, 0] * len(vertices) + edges[:, 1], edges[:, 1] * len(vertices) + edges[:, 0]
    assert len(forth.unique()) == len(forth) and torch.equal(forth.sort().values, back.sort().values)
    assert len(faces.unique()) == len(vertices)
    return len(vertices) - len(edges) // 2 + len(faces)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("distance, holes", [(sphere, 2), (torus, 0)], ids=["sphere", "torus"])
def test_a_closed_surface_with_normals_outward(device, distance, holes, training):
    R = 18
    coords = near(R, distance)
    out = isosurface(coords.to(device), level_set(coords, R, distance).to(device), R, training)
    vertices, faces = out.vertices.cpu(), out.faces.cpu()
    assert euler_characteristic(vertices, faces) == holes
    assert distance(vertices).abs().max() < 0.7 / R  # displacements are below 0.1 / R on average
    a, b, c = vertices[faces.long()].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    middle = ((a + b + c) / 3).requires_grad_()
    outward = torch.autograd.grad(distance(middle).sum(), middle)[0]
    big = normal.norm(dim=1) > 0.02 / R**2
    assert big.float().mean() > 0.95 and ((normal * outward).sum(1)[big] > 0).float().mean() > 0.995
    volume = (torch.linalg.det(torch.stack([a, b, c], 1)) / 6).sum()
    true = 4 / 3 * torch.pi * 0.31**3 if holes else 2 * torch.pi**2 * 0.28 * 0.11**2
    assert abs(volume / true - 1) < 0.15
    assert bool((out.attributes > 0).all() and (out.attributes < 1).all())


def test_distances_of_exactly_zero_are_outside(device):
    """Vertices on the surface: quads that begin there are wound like the others."""
    box = lambda x: ((x * 8).abs().amax(-1) - 2) / 8
    coords = full_grid(8)
    fields = torch.zeros(len(coords), 53)
    fields[:, :8] = 8 * box((coords[:, None, 1:] + OFFSET) / 8 - 0.5) + 1 / 8  # multiples of 1: the means are exact
    out = isosurface(coords.to(device), fields.to(device), 8, True)
    assert (out.tsdf_value == 0).any()
    assert euler_characteristic(out.vertices.cpu(), out.faces.cpu()) == 2
    a, b, c = out.vertices.cpu()[out.faces.cpu().long()].unbind(1)
    assert torch.linalg.det(torch.stack([a, b, c], 1)).min() > -1e-6


def test_an_untrained_decoder_shows_the_boundary_of_its_voxels(device):
    """All raw values zero: the signed distance is -1 / R at every corner, and the surface lies wholly outside the voxels."""
    R, coords = 8, torch.tensor([[0, 3, 3, 3], [1, 0, 3, 3]], dtype=torch.int32)
    out = isosurface(coords.to(device), torch.zeros(2, 101, device=device), R, False)
    assert torch.equal(out.tsdf_value.cpu(), torch.full((16,), -1 / R)) and bool((out.attributes == 0.5).all())
    assert out.face_starts.tolist() == [0, 2 * 24, 2 * (24 + 12)]  # grid edges outward from a corner, but for those on the border
    low, high = scene(out, 0)[0].cpu().aminmax(dim=0)
    # a grid edge is crossed at 1 / 9 of its length, a cube's three crossings average to a third of that along each axis
    assert_close(low, torch.full((3,), 3 / R - 0.5 - 1 / R / 9), 1e-5)
    assert_close(high, torch.full((3,), 4 / R - 0.5 + 1 / R / 9), 1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_finite_differences(training):
    coords = voxels([9, 7], (3, 4, 3))
    fields = torch.randn(len(coords), 101, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    up = [torch.randn_like(t) for t in isosurface(coords, fields, 4, training) if t.requires_grad]

    def value(f):
        return sum((t * u).sum() for t, u in zip((t for t in isosurface(coords, f, 4, training)[:6] if t.is_floating_point()), up))

    grad = torch.autograd.grad(value(fields), fields)[0]
    for channels in (slice(0, 8), slice(8, 32), slice(32, 44), slice(44, 52), slice(52, 53), slice(53, 101)):
        step = torch.zeros_like(fields)
        step[:, channels] = torch.randn_like(step[:, channels]) * 1e-6
        difference = (value(fields.detach() + step) - value(fields.detach() - step)) / 2
        assert_close(difference, (grad * step).sum(), 2e-5, f"channels {channels}")


def test_batched_equals_looped(device):
    R, counts = 6, [40, 0, 25, 90]
    coords = voxels(counts, (R, R, R)).to(device)
    fields = torch.randn(len(coords), 101, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    whole = isosurface(SpatialCache(coords, 5), fields, R, True)
    grad = torch.autograd.grad([whole.vertices.sum() + whole.attributes.square().sum(), whole.regularizer.sum()], fields)[0]
    for b, rows in enumerate(fields.detach().split([*counts, 0])):
        mine = coords[coords[:, 0] == b].clone()
        mine[:, 0] = 0
        rows = rows.clone().requires_grad_()
        alone = isosurface(SpatialCache(mine, 1), rows, R, True)
        assert all(torch.equal(x, y) for x, y in zip(scene(whole, b), scene(alone, 0), strict=True))
        loss = [alone.vertices.sum() + alone.attributes.square().sum(), alone.regularizer.sum()]
        assert torch.equal(torch.autograd.grad(loss, rows)[0], grad[coords[:, 0] == b])


def test_twice_the_same_bits_and_linear_in_the_upstream_gradient(device):
    coords = voxels([100, 50], (7, 7, 7)).to(device)
    fields = torch.randn(150, 101, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
    first, second = isosurface(coords, fields, 7, True), isosurface(coords, fields, 7, True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    once, again, scaled = grads(first, fields), grads(second, fields), grads(isosurface(coords, fields, 7, True), fields, 0, 2.0**20)
    assert torch.equal(once, again) and torch.equal(once * 2**20, scaled) and bool((once != 0).float().mean() > 0.9)
