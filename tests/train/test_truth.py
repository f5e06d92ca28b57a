"""True pictures of a protocol show what its cameras see, and its normals are known."""

import math

import numpy as np
import pytest
import torch

from kernels import Camera, render_mesh
from tests.helpers.mesh_files import box, write_obj
from tests.helpers.prepare import SMALL, command
from train.data.dataset import Dataset
from train.evaluate.measure import camera_normals
from train.evaluate.protocols import PROTOCOLS, chosen
from train.evaluate.truth import Truth, poses
from train.prepare.raycast import camera_to_world

SIZE = 48


def test_cast_pictures_are_those_of_the_cameras_that_models_are_drawn_from(tmp_path):
    write_obj(tmp_path / "meshes", "plank", *box((1.0, 0.5, 0.2)))
    assert command(tmp_path / "meshes", "--out", tmp_path / "data", *SMALL) == 0
    options = dict(resolution=4, features="rgb", image_size=SIZE, views="holdout", meshes=True)
    dataset = Dataset([tmp_path / "data"], holdout_views=1, **options)
    protocol = chosen("trellis-r2-fov40", SIZE, None, None, 0)
    truth = Truth(protocol, dataset, tmp_path / "meshes")
    truth.check(dataset.names, surfaces=True)
    item = dataset.item(0)
    pictures = truth.pictures(item)
    vertices, faces = item.mesh
    camera = protocol.camera(torch.device("cpu"))
    starts = [0, len(vertices)], [0, len(faces)]
    drawn = render_mesh(vertices, faces, None, *starts, camera, [0] * len(camera), ssaa=4)
    assert pictures.shape == (8, 4, SIZE, SIZE)
    assert (pictures[:, 3] - drawn.alpha[:, 0]).abs().mean() < 0.01 < pictures[:, 3].mean() / 5
    mirrored = pictures[:, 3].flip(2) - drawn.alpha[:, 0]
    assert mirrored.abs().mean() > 0.03
    # six colours, and not one in all views
    assert pictures[:, :3, SIZE // 2, SIZE // 2].std(0).max() > 0.1


def test_poses_are_the_inverse_of_the_dataset_s_cameras():
    pose = np.stack([camera_to_world(0.3, 0.2), camera_to_world(4.0, -1.1)])
    camera = Camera.from_blender(torch.from_numpy(pose), 0.7, SIZE, SIZE)
    assert np.abs(poses(camera) - pose).max() < 1e-6


def test_normals_are_in_camera_axes_and_point_away():
    camera = Camera.orbit([0.4, 2.0], [0.5, -0.7], 10.0, math.radians(6), SIZE)
    towards = camera.center / camera.center.norm(dim=1, keepdim=True)
    flat = torch.full((2, 3, SIZE, SIZE), 0.5)
    flat[:, :, 10:30, 10:30] = (towards[:, :, None, None] + 1) / 2  # of a plate that faces it
    for turned in (flat, 1 - flat):  # on either side
        found = camera_normals(turned, camera)
        wanted = torch.tensor([0.5, 0.5, 1.0])[:, None, None].expand(3, 20, 20)
        assert (found[:, :, 10:30, 10:30] - wanted).abs().max() < 1e-5
        assert (found[:, :, :9] - 0.5).abs().max() < 1e-6


def test_the_second_protocol_s_cameras_are_those_that_it_names():
    camera = chosen("trellis2-normal4", None, None, None, 0).camera(torch.device("cpu"))
    first = 10 * torch.tensor(
        [math.sin(math.pi / 6) * math.cos(math.pi / 6), math.cos(math.pi / 6) ** 2, 0.5]
    )
    assert (camera.center[0] - first).abs().max() < 1e-5 and len(camera) == 4
    half = 10 * math.tan(math.radians(3))  # of what is seen at the origin
    uv, depth = camera.project(torch.tensor([[0.0, 0.0, 0.0]]))
    assert torch.allclose(uv, torch.full_like(uv, 0.5)) and torch.allclose(depth, depth * 0 + 10)
    assert camera.intrinsics[0, 0, 0] == pytest.approx(10 / (2 * half))


def test_every_number_of_a_protocol_is_printed_and_a_changed_one_says_so():
    text = PROTOCOLS["trellis2-normal4"].text()
    for number in ("(30, 30)", "(300, 30)", "radius 10", "6 degrees", "512 x 512", "1,000,000"):
        assert number in text
    text = PROTOCOLS["trellis-r2-fov40"].text()
    for number in ("radius 2,", "40 degrees", "512 x 512", "black", "sigma 1.5", "100,000"):
        assert number in text
    changed = chosen("trellis2-normal4", 64, 2000, None, 0)
    assert changed.name == "trellis2-normal4 (changed: size 64, not 512; samples 2000, not 1000000)"
    assert "2,000 points" in changed.text() and "1,000,000" not in changed.text()
    assert chosen("trellis2-normal4", 512, None, None, 0) == PROTOCOLS["trellis2-normal4"]
