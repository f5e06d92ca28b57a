"""Augmentation: what it changes describes the changed object exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels import Camera, splat
from kernels.views import SH0
from tests.helpers.datasets import AA, make
from train.data.augment import KINDS, LEAST_RANGE, Augmentation, rotations
from train.data.batch import Item
from train.data.dataset import EMBEDDED, Dataset
from train.data.readers import CHANNELS
from train.losses.pictures import composite
from train.prepare.voxelize import Features, voxelize

SIDE = 8


def opened(augment, **options):
    own = dict(resolution=16, features="rgb", image_size=32, meshes=True)
    return Dataset([EMBEDDED], augment=augment, **own | options)


def pictures(center, scale, color, camera, background):
    """Render Gaussians along the axes, so that a rotation of the cube permutes their sizes."""
    count = len(center)
    rotation = center.new_tensor([[1, 0, 0, 0]]).expand(count, 4)
    opacity = torch.linspace(0.2, 1, count, dtype=center.dtype)[:, None]
    sh = (color - 0.5)[:, None] / SH0
    views = [0] * len(camera)
    return splat(center, scale, rotation, opacity, sh, [0, count], camera, views, background)


def tetrahedron(rng):
    """Triangles in the unit cube, with a colour for each corner."""
    vertices = torch.from_numpy(rng.uniform(-0.45, 0.45, (4, 3)))
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]], dtype=torch.int32)
    return vertices, faces, torch.from_numpy(rng.uniform(0, 1, (4, 3)))


def features_of(vertices, faces, points, weights, colors, normals):
    """Prepare `rgb` features of a mesh from surface points of two views."""
    cells = voxelize(vertices.numpy(), faces.numpy(), SIDE)
    own = Features(cells, voxelize(vertices.numpy(), faces.numpy(), 2 * SIDE), SIDE)
    for view in range(2):
        rows = slice(view, None, 3)
        own.add_view(points[rows], weights[rows], colors[rows], normals[rows])
    return torch.from_numpy(cells), torch.from_numpy(own.result()).float()


def surface_points(vertices, faces, rng, count=3000):
    corners = vertices.numpy()[faces.numpy()[rng.integers(len(faces), size=count)]]
    share = rng.dirichlet([1, 1, 1], count)
    return (corners * share[..., None]).sum(1)


@pytest.mark.parametrize("turn", range(24))
def test_features_of_a_turned_object_are_those_that_preparing_it_makes(turn):
    rng = np.random.default_rng(turn)
    vertices, faces, _ = tetrahedron(rng)
    points = surface_points(vertices, faces, rng)
    weights = rng.uniform(0.1, 1, len(points))
    colors = rng.uniform(0, 1, (len(points), 3))
    normals = rng.normal(size=(len(points), 3))
    change = replace(Augmentation.draw("colour", turn, 0, 0), rotation=rotations()[turn])
    matrix = change.rotation.double()
    coords, features = features_of(vertices, faces, points, weights, colors, normals)
    camera = Camera(torch.eye(4)[None], torch.eye(3)[None], 1, 1)
    item = Item("one", coords, features, camera, torch.zeros(1, 4, 1, 1), (vertices.float(), faces))
    ours = change.item(item, SIDE)
    mapped = change.color(torch.from_numpy(colors).float()).double().numpy()
    its = matrix.numpy()
    expected = features_of(
        vertices @ matrix.T, faces, points @ its.T, weights, mapped, normals @ its.T
    )
    assert torch.equal(ours.coords, expected[0])
    assert features.shape[1] == CHANNELS["rgb"]
    torch.testing.assert_close(ours.features, expected[1], rtol=0, atol=3e-3)  # halves: 2^-10
    torch.testing.assert_close(ours.mesh[0], (vertices @ matrix.T).float())


@pytest.mark.parametrize("turn", [1, 7, 16, 23])
def test_a_turned_object_looks_the_same_to_a_turned_camera(turn):
    rng = torch.Generator().manual_seed(turn)
    rand = lambda *size: torch.rand(*size, generator=rng, dtype=torch.float64)
    center = rand(40, 3) * 0.8 - 0.4
    scale = rand(40, 3) * 0.1 + 0.02
    color = rand(40, 3)
    camera = Camera.orbit(torch.arange(3) * 2.0, torch.arange(3) * 0.4, 2.0, 0.7, 24, 24)
    camera = camera.to(torch.float64)
    background = rand(3, 3)
    change = replace(Augmentation.draw("none", 0, 0, 0), rotation=rotations()[turn])
    matrix = change.rotation.double()
    before = pictures(center, scale, color, camera, background)
    turned = (center @ matrix.T, scale @ matrix.abs().T, color)
    after = pictures(*turned, change.camera(camera), background)
    torch.testing.assert_close(after.color, before.color, rtol=0, atol=1e-12)
    assert (pictures(*turned, camera, background).color - before.color).abs().max() > 0.1


@pytest.mark.parametrize("white", [0.0, 1.0])
def test_colours_change_before_or_after_rendering(white):
    rng = torch.Generator().manual_seed(3)
    rand = lambda *size: torch.rand(*size, generator=rng, dtype=torch.float64)
    center = rand(40, 3) * 0.8 - 0.4
    scale = rand(40, 3) * 0.1 + 0.02
    color = rand(40, 3)
    camera = Camera.orbit(torch.zeros(1), torch.zeros(1), 2.0, 0.7, 24, 24).to(torch.float64)
    background = torch.full((1, 3), white, dtype=torch.float64)
    change = Augmentation.draw("colour", 0, 0, 2)
    assert (change.gain != 1).all()  # every second draw is the identity
    black = pictures(center, scale, color, camera, torch.zeros(1, 3, dtype=torch.float64))
    straight = torch.cat([black.color / black.alpha.clamp(min=1e-300), black.alpha], 1)
    changed = pictures(center, scale, change.color(color), camera, background).color
    ours = composite(change.image(straight), background)
    torch.testing.assert_close(changed, ours, rtol=0, atol=1e-12)
    assert (changed - composite(straight, background)).abs().max() > 0.05


def test_colours_stay_in_range_and_what_no_view_saw_stays_zero():
    plain = opened("none")[0]
    unseen = (plain.features[:, 34:42] == 0) & (plain.features[:, 42:] == 1)
    assert unseen.any()
    for draw in range(20):
        item = opened("colour")[0, draw]
        change = Augmentation.draw("colour", 0, draw, 0)
        assert torch.equal(item.image, change.image(opened("none")[0, draw].image))
        colors = torch.cat(
            [
                item.features[:, :3],
                item.features[:, 10:34],
            ],
            1,
        )
        assert 0 <= colors.min() and colors.max() <= 1.001
        assert 0 <= item.image.min() and item.image.max() <= 1
        assert (item.features[:, 10:34].unflatten(1, (8, 3))[unseen] == 0).all()
        assert torch.equal(item.features[:, 3:10], plain.features[:, 3:10])


def test_draws_are_maps_of_the_unit_interval_and_rotations():
    drawn = [Augmentation.draw("both", seed, 0, 0) for seed in range(300)]
    assert len({tuple(change.rotation.flatten().tolist()) for change in drawn}) == 24
    assert 100 < sum((change.gain == 1).all().item() for change in drawn) < 200
    for change in drawn:
        ends = torch.stack([change.offset, change.offset + change.gain])
        assert -1e-6 <= ends.min() and ends.max() <= 1 + 1e-6
        assert change.gain.abs().min() >= LEAST_RANGE
        assert sorted(change.channels.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_depends_on_seed_epoch_and_object_alone(kind):
    data = opened(kind)
    for key in ((0, 0), (3, 5)):
        a = data[key]
        b = opened(kind)[key]
        c = data.item(key[0])
        assert torch.equal(a.features, b.features) and torch.equal(a.image, b.image)
        assert torch.equal(a.camera.extrinsics, b.camera.extrinsics)
        assert torch.equal(c.features, opened("none").item(key[0]).features)
        rows = a.coords[:, 0] * 256 + a.coords[:, 1] * 16 + a.coords[:, 2]
        assert (rows.diff() > 0).all()
    shapes = {tuple(data[0, draw].coords.flatten().tolist()) for draw in range(8)}
    hues = {data[0, draw].features[:, :3].sum().item() for draw in range(8)}
    assert (len(shapes) > 1) == (kind in ("rotate", "both"))
    assert (len(hues) > 1) == (kind != "none")  # a rotation changes the order of summing
    other = opened(kind, seed=1)
    same = [torch.equal(other[0, draw].features, data[0, draw].features) for draw in range(8)]
    assert all(same) == (kind == "none")


def test_wrong_kinds_and_other_features_are_refused():
    with pytest.raises(ValueError, match=r"augment 'color' is not one of none, colour, rotate"):
        opened("color")
    with pytest.raises(ValueError, match=r"augment both is exact for rgb features alone"):
        Dataset([EMBEDDED], resolution=16, features="dinov2_vitl14_reg", augment="both")


def test_features_of_another_layout_are_refused(tmp_path):
    own = dict(resolution=8, features="rgb", image_size=24, augment="colour")
    said = f"object {AA} has 6 channels of features; --augment changes rgb features, which have 50"
    with pytest.raises(ValueError, match=said):
        Dataset([make(tmp_path / "data", [AA])], **own)[0]
