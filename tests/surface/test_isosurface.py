"""Surfaces against the dense grid and geometry: closed, oriented, differentiable, batched."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import backend
from kernels.surface.isosurface import _forward, _reverse, isosurface
from kernels.surface.reference import isosurface_reference
from kernels.voxels.cache import SpatialCache
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.surfaces import OFFSET, full_grid, grads
from tests.helpers.voxels import voxels


def level_set(coords, R, distance, channels=101, seed=0):
    """Fields [N, channels] of the signed distance `distance`, the rest small and random."""
    fields = 0.2 * torch.randn(len(coords), channels, generator=torch.Generator().manual_seed(seed))
    fields[:, :8] = distance((coords[:, None, 1:] + OFFSET) / R - 0.5) + 1 / R
    return fields


def sphere(x):
    return x.norm(dim=-1) - 0.31


def torus(x):
    return ((x[..., :2].norm(dim=-1) - 0.28) ** 2 + x[..., 2] ** 2).sqrt() - 0.11


def near(R, distance):
    """The voxels inside a surface and near it. (Where voxels end inside, there is a surface too:
    nothing is outside.)
    """
    coords = full_grid(R)
    return coords[distance((coords[:, 1:] + 0.5) / R - 0.5) < 1.8 / R]


def scene(surfaces, b) -> list[torch.Tensor]:
    """The parts of scene b, its faces counted from its own first vertex."""
    (v, w), (f, g), (t, u) = (s[b : b + 2].tolist() for s in surfaces[6:])
    return [
        surfaces.vertices[v:w],
        surfaces.faces[f:g] - v,
        surfaces.attributes[v:w],
        surfaces.regularizer[b : b + 1],
        surfaces.tsdf_position[t:u],
        surfaces.tsdf_value[t:u],
    ]


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
    fields = torch.randn(len(coords), channels, generator=torch.Generator().manual_seed(R))
    cache = SpatialCache(coords.to(device), len(counts))
    op = lambda f: isosurface(cache, f, R, training)
    assert_same(
        op,
        lambda f: isosurface_reference(coords, f, R, training, len(counts)),
        fields.detach().to(device).requires_grad_(),
    )


def euler_characteristic(vertices, faces):
    """The Euler characteristic of a closed, oriented surface.

    Fails where an edge is not there exactly once in each direction.
    """
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).long()
    forth = edges[:, 0] * len(vertices) + edges[:, 1]
    back = edges[:, 1] * len(vertices) + edges[:, 0]
    assert len(forth.unique()) == len(forth) and torch.equal(
        forth.sort().values, back.sort().values
    )
    assert len(faces.unique()) == len(vertices)
    return len(vertices) - len(edges) // 2 + len(faces)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("distance, holes", [(sphere, 2), (torus, 0)], ids=["sphere", "torus"])
def test_a_closed_surface_with_normals_outward(device, distance, holes, training):
    R = 18
    coords = near(R, distance)
    out = isosurface(coords.to(device), level_set(coords, R, distance).to(device), R, training)
    vertices = out.vertices.cpu()
    faces = out.faces.cpu()
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
    # multiples of 1: the means are exact
    fields[:, :8] = 8 * box((coords[:, None, 1:] + OFFSET) / 8 - 0.5) + 1 / 8
    out = isosurface(coords.to(device), fields.to(device), 8, True)
    assert (out.tsdf_value == 0).any()
    assert euler_characteristic(out.vertices.cpu(), out.faces.cpu()) == 2
    a, b, c = out.vertices.cpu()[out.faces.cpu().long()].unbind(1)
    assert torch.linalg.det(torch.stack([a, b, c], 1)).min() > -1e-6


def test_an_untrained_decoder_shows_the_boundary_of_its_voxels(device):
    """All raw values are 0, so the signed distance is -1 / R and the surface outside the voxels."""
    R = 8
    coords = torch.tensor([[0, 3, 3, 3], [1, 0, 3, 3]], dtype=torch.int32)
    out = isosurface(coords.to(device), torch.zeros(2, 101, device=device), R, False)
    assert torch.equal(out.tsdf_value.cpu(), torch.full((16,), -1 / R)) and bool(
        (out.attributes == 0.5).all()
    )
    # grid edges outward from a corner, but for those on the border
    assert out.face_starts.tolist() == [0, 2 * 24, 2 * (24 + 12)]
    low, high = scene(out, 0)[0].cpu().aminmax(dim=0)
    # a grid edge is crossed at 1 / 9 of its length, a cube's three crossings average to a third of
    # that along each axis
    assert_close(low, torch.full((3,), 3 / R - 0.5 - 1 / R / 9), 1e-5)
    assert_close(high, torch.full((3,), 4 / R - 0.5 + 1 / R / 9), 1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_finite_differences(training):
    coords = voxels([9, 7], (3, 4, 3))
    fields = torch.randn(
        len(coords),
        101,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(3),
        requires_grad=True,
    )
    up = [torch.randn_like(t) for t in isosurface(coords, fields, 4, training) if t.requires_grad]

    def value(f):
        outputs = [t for t in isosurface(coords, f, 4, training) if t.is_floating_point()]
        return sum((t * u).sum() for t, u in zip(outputs, up, strict=True))

    grad = torch.autograd.grad(value(fields), fields)[0]
    for channels in (
        slice(0, 8),
        slice(8, 32),
        slice(32, 44),
        slice(44, 52),
        slice(52, 53),
        slice(53, 101),
    ):
        step = torch.zeros_like(fields)
        step[:, channels] = torch.randn_like(step[:, channels]) * 1e-6
        difference = (value(fields.detach() + step) - value(fields.detach() - step)) / 2
        assert_close(difference, (grad * step).sum(), 2e-5, f"channels {channels}")


def test_batched_equals_looped(device):
    R = 6
    counts = [40, 0, 25, 90]
    coords = voxels(counts, (R, R, R)).to(device)
    fields = (
        torch.randn(len(coords), 101, generator=torch.Generator().manual_seed(1))
        .to(device)
        .requires_grad_()
    )
    whole = isosurface(SpatialCache(coords, 5), fields, R, True)
    grad = torch.autograd.grad(
        [whole.vertices.sum() + whole.attributes.square().sum(), whole.regularizer.sum()], fields
    )[0]
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
    fields = (
        torch.randn(150, 101, generator=torch.Generator().manual_seed(2))
        .to(device)
        .requires_grad_()
    )
    first, second = (isosurface(coords, fields, 7, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    once = grads(first, fields)
    again = grads(second, fields)
    scaled = grads(isosurface(coords, fields, 7, True), fields, 0, 2.0**20)
    assert (
        torch.equal(once, again)
        and torch.equal(once * 2**20, scaled)
        and bool((once != 0).float().mean() > 0.9)
    )


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("counts", [[30, 12], [0, 20, 0], [0], []], ids=str)
def test_no_surface(device, counts, training):
    """No vertices, a regularizer that is defined, and no gradient through the mesh."""
    coords = voxels(counts, (5, 5, 5)).to(device)
    fields = (
        torch.rand(len(coords), 101, generator=torch.Generator().manual_seed(4)).to(device) + 0.5
    )
    fields.requires_grad_()
    cache = SpatialCache(coords, len(counts))
    out = isosurface(cache, fields, 5, training)
    assert (
        out.vertices.shape == (0, 3)
        and out.faces.shape == (0, 3)
        and out.attributes.shape == (0, 6)
    )
    want = (
        isosurface_reference(coords.cpu(), fields.detach().cpu(), 5, training, len(counts))
        if counts
        else out
    )
    assert_close(out.regularizer, want.regularizer, 1e-5)
    assert all(t.tolist() == [0] * (len(counts) + 1) for t in (out.vertex_starts, out.face_starts))
    grad = torch.autograd.grad(
        [out.vertices.sum() + out.attributes.sum(), out.tsdf_value.sum()], fields
    )[0]
    assert torch.equal(grad[:, 8:], torch.zeros_like(grad[:, 8:])) and bool((grad[:, :8] > 0).all())
    regularizer = isosurface(cache, fields, 5, training).regularizer
    grad = torch.autograd.grad(regularizer.sum(), fields)[0]
    exact = fields.detach().cpu().double().requires_grad_()
    if counts:  # here the penalties of spread and of size stand alone
        want = isosurface_reference(coords.cpu(), exact, 5, training, len(counts)).regularizer
        assert_close(grad, torch.autograd.grad(want.sum(), exact)[0], 2e-5)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize(
    "channels", [slice(0, 8), slice(8, 32), slice(32, 53), slice(53, 101), slice(0, 101)], ids=str
)
def test_nan_stays_where_it_is(device, channels):
    coords = voxels([30, 30], (5, 5, 5)).to(device)
    fields = (
        torch.randn(60, 101, generator=torch.Generator().manual_seed(5)).to(device).requires_grad_()
    )
    want = isosurface(coords, fields, 5, True)
    spoilt = fields.detach().clone()
    spoilt[7, channels] = float("nan")
    out = isosurface(coords, spoilt.requires_grad_(), 5, True)
    assert all(torch.equal(a, b) for a, b in zip(scene(out, 1), scene(want, 1), strict=True))
    assert out.regularizer.isnan().tolist() == [True, False] or channels == slice(32, 53)
    grad = torch.autograd.grad(
        out.vertices[out.vertex_starts[1] :].sum() + out.regularizer[1], spoilt
    )[0]
    assert torch.equal(
        grad[30:],
        torch.autograd.grad(
            want.vertices[want.vertex_starts[1] :].sum() + want.regularizer[1], fields
        )[0][30:],
    )


class Largest(TorchDispatchMode):
    """The size of the largest tensor of floats that an operation returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.size = max(self.size, t.numel())
        return out


def test_no_grid_of_floats(kernel_device):
    R = 24
    coords = voxels([60, 0, 40], (R, R, R)).to(kernel_device)
    fields = torch.randn(100, 101, generator=torch.Generator().manual_seed(6)).to(kernel_device)
    with Largest() as largest:
        *outputs, starts, saved = _forward(fields, coords, [60, 0, 40], R, True)
        grad = [torch.ones_like(outputs[i]) for i in (0, 2, 3, 4, 5)]
        _reverse(*grad, fields, coords, starts, saved, R, True)
    assert len(fields) * 101 <= largest.size < 3 * R**3


def test_a_batch_is_one_launch_of_each_kernel(kernel_device):
    counts = []
    for B in (1, 4):
        coords = voxels([20] * B, (4, 4, 4)).to(kernel_device)
        fields = (
            torch.randn(20 * B, 101, generator=torch.Generator().manual_seed(7))
            .to(kernel_device)
            .requires_grad_()
        )
        with backend.count_launches() as count:
            grads(isosurface(coords, fields, 4, True), fields)
        counts.append(dict(count))
    assert (
        counts
        == [
            {
                "_average": 1,
                "_dual_fwd": 1,
                "_sum_pieces": 4,
                "_dual_bwd": 1,
                "_vertex_bwd": 1,
                "_fields_bwd": 1,
            }
        ]
        * 2
    )
