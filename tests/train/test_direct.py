"""Direct supervision against loops over voxels, and surfaces whose distances are known."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from kernels import SH0, Camera
from models import GaussianScene, MeshScene, RadianceScene
from tests.helpers.compare import assert_close
from tests.helpers.meshes import ball
from tests.helpers.runs import TINY, fresh, refused, rows, same_run, train
from train import loop
from train.data.batch import Batch, Meshes
from train.losses import direct
from train.losses.direct import direct_terms, surface_points
from train.losses.objective import MEANS

R = 8
COORDS = torch.tensor([[0, 1, 2, 3], [0, 7, 0, 5], [2, 4, 4, 4]], dtype=torch.int32)


def batch_of(coords, features, meshes=None, objects=3) -> Batch:
    camera = Camera.orbit([0.0], [0.0], 2.0, 0.7, 16, 16)
    image = torch.zeros(1, 4, 16, 16)
    names = [str(i) for i in range(objects)]
    return Batch(features, coords, objects, camera, [0], image, names, meshes)


def rgb_features(seed: int = 0) -> torch.Tensor:
    """Sub-cells of three voxels: some seen, some full and unseen, some empty."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.rand(3, 50, generator=rng, dtype=torch.float64)
    features[:, 42:] = (features[:, 42:] > 0.4).double()
    features[:, 34:42] *= (features[:, 34:42] > 0.3) * features[:, 42:]
    return features


def gaussians(K: int = 5) -> tuple[list, callable]:
    rng = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.rand(*shape, generator=rng, dtype=torch.float64)
    middle = (COORDS[:, None, 1:] + 0.5) / R - 0.5
    center = (middle + (draw(3, K, 3) - 0.5) / R).reshape(-1, 3)
    scale, opacity, color = 0.3 / R * draw(3 * K, 3), draw(3 * K, 1), draw(3 * K, 1, 3)
    cut = [slice(0, 2 * K), slice(0, 0), slice(2 * K, 3 * K)]
    scenes = [GaussianScene(center[s], scale[s], None, opacity[s], color[s]) for s in cut]

    def at(n: int, place: np.ndarray) -> tuple[float, np.ndarray]:
        left, total, mixed = 1.0, 0.0, np.zeros(3)
        for k in range(n * K, n * K + K):
            away = (place - center[k].numpy()) * R
            spread = (scale[k].numpy() * R) ** 2 + direct.BLUR**2
            weight = opacity[k].item() * math.exp(-0.5 * (away**2 / spread).sum())
            left *= 1 - weight
            total += weight
            mixed += weight * (color[k, 0].numpy() * SH0 + 0.5)
        return 1 - left, mixed / (total + 1e-2)

    return scenes, at


def radiance(rank: int = 3, n: int = 8) -> tuple[list, callable]:
    rng = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    trivec, density, color = draw(3, rank, 3, n), 20 * draw(3, rank), draw(3, rank, 1, 3)
    position = (COORDS[:, 1:] + 0.5) / R
    cut = [slice(0, 2), slice(0, 0), slice(2, 3)]
    scenes = [RadianceScene(position[s], trivec[s], density[s], color[s], R) for s in cut]

    def at(v: int, place: np.ndarray) -> tuple[float, np.ndarray]:
        inside = (place + 0.5) * R - COORDS[v, 1:].numpy()
        taps = (np.arange(n) + 0.5) / n
        products = np.ones(rank)
        for axis in range(3):
            products *= [np.interp(inside[axis], taps, vector) for vector in trivec[v, :, axis]]
        depth = math.log1p(math.exp((density[v].numpy() * products).sum()))
        raw = SH0 * (color[v, :, 0].numpy() * products[:, None]).sum(0)
        return 1 - math.exp(-depth * 0.5 / R), 1 / (1 + np.exp(-raw))

    return scenes, at


@pytest.mark.parametrize("make", [gaussians, radiance])
def test_sub_cells_are_those_of_a_loop(make):
    scenes, at = make()
    features = rgb_features()
    entropy = difference = 0.0
    for v in range(3):
        for s in range(8):
            side = np.array([s >> 2, s >> 1 & 1, s & 1])
            place = (COORDS[v, 1:].numpy() + 0.25 + 0.5 * side) / R - 0.5
            occupancy, color = at(v, place)
            occupancy = min(max(occupancy, 1e-4), 1 - 1e-4)
            full, seen = features[v, 42 + s] > 0, features[v, 34 + s] > 0
            if seen or not full:
                entropy -= math.log(occupancy if full else 1 - occupancy) / 24
            if seen:
                true = features[v, 10 + 3 * s : 13 + 3 * s].numpy()
                difference += np.abs(color - true).mean() / 24
    terms = direct_terms(scenes, batch_of(COORDS, features), R)
    assert_close(terms["occupancy"], torch.tensor(entropy, dtype=torch.float64), 1e-7)
    assert_close(terms["sub_color"], torch.tensor(difference, dtype=torch.float64), 1e-7)


@pytest.mark.parametrize("make", [gaussians, radiance])
def test_sub_cells_of_parts_add_up_and_gradients_are_right(make):
    scenes, _ = make()
    batch = batch_of(COORDS, rgb_features())
    whole = direct_terms(scenes, batch, R)
    cut = {
        0: (COORDS[:2], slice(0, 2)),
        2: (COORDS[2:] - COORDS[2:] * torch.tensor([1, 0, 0, 0]), slice(2, 3)),
    }
    total = dict.fromkeys(whole, 0.0)
    for i, (coords, own) in cut.items():
        part = direct_terms([scenes[i]], batch_of(coords, batch.features[own], objects=1), R)
        for name, value in part.items():
            assert MEANS[name] == "voxels"
            total[name] += value * len(coords) / 3
    for name, value in whole.items():
        assert_close(total[name], value, 1e-12)
    names = [name for name, t in vars(scenes[0]).items() if isinstance(t, torch.Tensor)][1:]
    inputs = [getattr(scenes[0], name).requires_grad_() for name in names]

    def loss(*values):
        changed = replace(scenes[0], **dict(zip(names, values, strict=True)))
        return sum(direct_terms([changed, *scenes[1:]], batch, R).values())

    assert torch.autograd.gradcheck(loss, inputs)


# surfaces


def sphere(radius: float, n: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    vertices, faces, _ = ball(n)
    return torch.nn.functional.normalize(vertices, dim=1) * radius, faces


def seen_sphere(faces_of=lambda faces: faces, radius: float = 0.3, resolution: int = 16) -> Batch:
    """A sphere whose voxels saw normals that point outwards, in a batch after another object."""
    vertices, faces = sphere(radius)
    cells = ((vertices + 0.5) * resolution).int().unique(dim=0)
    near = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3).int()
    cells = (cells[:, None] + near).flatten(0, 1).unique(dim=0)
    features = torch.zeros(len(cells) + 1, 50)
    middle = (cells + 0.5) / resolution - 0.5
    features[1:, 3:6] = torch.nn.functional.normalize(middle, dim=1)
    coords = torch.nn.functional.pad(torch.cat([cells[:1], cells]), (1, 0), value=1)
    coords[0, 0] = 0
    other = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0, 0.1, 0]])
    meshes = Meshes(
        torch.cat([other, vertices]),
        torch.cat([torch.tensor([[0, 1, 2]]).int(), faces_of(faces)]),
        [0, 3, 3 + len(vertices)],
        [0, 1, 1 + len(faces)],
    )
    return batch_of(coords, features, meshes, 2)


def turn_half(faces: torch.Tensor) -> torch.Tensor:
    """Turn every second face inside out."""
    faces = faces.clone()
    faces[::2] = faces[::2].flip(1)
    return faces


def decoded(radius: float, grow: float = 0.0) -> MeshScene:
    """A decoded sphere, with distances of corners near it."""
    vertices, faces = sphere(radius)
    rng = torch.Generator().manual_seed(0)
    way = torch.nn.functional.normalize(torch.randn(6000, 3, generator=rng), dim=1)
    length = radius + 0.06 * (torch.rand(6000, 1, generator=rng) - 0.5)
    value = (length - radius + grow)[:, 0].requires_grad_()
    return MeshScene(
        vertices.requires_grad_(), faces, None, None, way * length, value, torch.zeros(()), 64
    )


EMPTY = MeshScene(
    torch.zeros(0, 3),
    torch.zeros(0, 3, dtype=torch.int32),
    None,
    None,
    torch.zeros(0, 3),
    torch.zeros(0),
    torch.zeros(()),
    64,
)


def test_points_lie_evenly_on_the_surface_and_normals_point_outwards():
    point, normal, known = surface_points(seen_sphere(turn_half), 1, 16)
    assert known.all()
    assert_close(point.norm(dim=1), torch.full((len(point),), 0.3), 5e-3)
    assert ((point * normal).sum(1) > 0.29).all()
    octants = torch.bincount((point > 0).long() @ torch.tensor([4, 2, 1]), minlength=8)
    assert ((octants / len(point) - 1 / 8).abs() < 2e-3).all()


def test_a_point_that_no_view_saw_has_no_outer_side():
    batch = seen_sphere()
    left = batch.coords[:, 1] < 8
    batch.features[left] = 0
    point, _, known = surface_points(batch, 1, 16)
    assert torch.equal(known, point[:, 0] >= 0)


@pytest.mark.parametrize("faces_of", [lambda faces: faces, turn_half])
def test_distances_of_a_sphere(faces_of):
    compare = partial(direct_terms, batch=seen_sphere(faces_of), resolution=16)
    right = compare([EMPTY, decoded(0.3)])
    assert right["distance"] < 0.05 and right["surface"] < 0.05 and right["surface_normal"] < 2e-3
    # means over two objects, the first of which is empty
    shifted = compare([EMPTY, decoded(0.3, grow=0.5 / 64)])
    assert_close(shifted["distance"], torch.tensor(0.25), 0.02)
    larger = compare([EMPTY, decoded(0.3 + 1 / 64)])
    assert_close(larger["surface"], torch.tensor(0.5), 0.02)
    inside_out = decoded(0.3)
    inside_out.faces = inside_out.faces.flip(1)
    assert_close(compare([EMPTY, inside_out])["surface_normal"], torch.tensor(1.0), 2e-3)


def test_gradients_shrink_a_sphere_that_is_too_large():
    scene = decoded(0.3 + 1 / 64, grow=-0.5 / 64)
    terms = direct_terms([EMPTY, scene], seen_sphere(), 16)
    (terms["surface"] + terms["distance"]).backward()
    outwards = (scene.vertices.grad * scene.vertices).sum(1)
    assert (outwards >= 0).all() and (outwards > 0).float().mean() > 0.2
    # corners say that they lie deeper than they do: the true surface is smaller
    assert (scene.tsdf_value.grad <= 0).float().mean() > 0.95


def test_features_of_other_channels_are_refused():
    scenes, _ = gaussians()
    with pytest.raises(ValueError, match="49 channels of features are not the 50 of rgb"):
        direct_terms(scenes, batch_of(COORDS, rgb_features()[:, 1:]), R)


def test_meshes_are_asked_for():
    with pytest.raises(ValueError, match="no meshes"):
        direct_terms([EMPTY], batch_of(COORDS[:1], torch.zeros(1, 50), objects=1), 16)


# runs


def test_the_first_steps_render_nothing_and_a_run_goes_on_to_the_same_bits(
    tmp_path, capsys, monkeypatch
):
    shown = []
    whole = loop.Run.step

    def step(self, batches):
        row = whole(self, batches)
        shown.append((self.done, "psnr" in row))
        return row

    monkeypatch.setattr(loop.Run, "step", step)
    flags = ["--direct", "3", "--save-every", "2", "--final-lr", "1"]
    log = fresh(tmp_path / "straight", *flags, "--steps", "5")
    assert shown == [(1, False), (2, False), (3, False), (4, True), (5, True)]
    assert {"occupancy", "sub_color", "volume", "opacity", "kl"} <= log[2].keys()
    assert "l1" not in log[2] and "l1" in log[3] and "occupancy" not in log[3]
    fresh(tmp_path / "parts", *flags, "--steps", "2")
    train("--resume", tmp_path / "parts", "--steps", "5")
    same_run(tmp_path / "parts", tmp_path / "straight")
    assert len(rows(tmp_path / "parts")) == 5


def test_what_it_needs_is_said(capsys, tmp_path):
    flags = [*TINY, "--out", tmp_path / "run", "--steps", 2]
    assert "direct -1 must not be negative" in refused(capsys, *flags, "--direct", -1)
    said = refused(capsys, *flags, "--direct", 1, "--features", "dinov2_vitl14_reg")
    assert "direct 1 needs rgb features" in said
