import math

import pytest
import torch

from kernels.camera import Camera
from tests.helpers.compare import assert_close


def test_from_blender_flips_the_camera_axes_and_inverts():
    # a camera at (0, -2, 0) that looks along +y with z up, as Blender writes it
    matrix = torch.tensor([[[1.0, 0, 0, 0], [0, 0, -1, -2], [0, 1, 0, 0], [0, 0, 0, 1]]])
    camera = Camera.from_blender(matrix, math.radians(40), 512, 512)
    assert_close(
        camera.extrinsics[0],
        torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 2], [0, 0, 0, 1]]),
        1e-6,
    )
    assert_close(camera.intrinsics[0, 0, 0], torch.tensor(1.3737387), 1e-6)
    assert_close(
        camera.intrinsics[0],
        torch.tensor([[1.3737387, 0, 0.5], [0, 1.3737387, 0.5], [0, 0, 1]]),
        1e-6,
    )
    assert_close(camera.center, torch.tensor([[0.0, -2, 0]]), 1e-6)


def test_from_blender_inverts_a_general_pose_and_takes_one_angle_per_view():
    camera = Camera.orbit(torch.rand(5) * 6, torch.rand(5) - 0.5, 1.7, 0.5, 64)
    matrix = torch.linalg.inv(camera.extrinsics.double()) * torch.tensor([1.0, -1, -1, 1]).double()
    again = Camera.from_blender(matrix, torch.linspace(0.4, 0.6, 5), 64, 64)
    assert_close(again.extrinsics, camera.extrinsics, 1e-6)
    assert_close(again.intrinsics[:, 0, 0], 0.5 / torch.tan(torch.linspace(0.2, 0.3, 5)), 1e-6)


@pytest.mark.parametrize("scale", [0.01, 2.0, 300.0])
def test_a_scale_changes_no_camera(scale):
    camera = Camera.orbit(torch.rand(3) * 6, torch.rand(3) - 0.5, 1.7, 0.5, 64)
    matrix = torch.linalg.inv(camera.extrinsics.double()) * torch.tensor([1.0, -1, -1, 1]).double()
    matrix[1:, :3, :3] *= scale
    again = Camera.from_blender(matrix, 0.5, 64, 64)
    assert_close(again.extrinsics, camera.extrinsics, 1e-6)
    assert_close(again.center, camera.center, 1e-6)


def test_orbit_follows_the_published_axes():
    yaw, pitch = torch.tensor([0.3, -2.0, 4.0]), torch.tensor([0.2, -1.2, 0.0])
    camera = Camera.orbit(yaw, pitch, 2.0, math.radians(30), 48)
    eye = 2 * torch.stack([yaw.sin() * pitch.cos(), yaw.cos() * pitch.cos(), pitch.sin()], -1)
    up = torch.tensor([[0.0, 0, 1]]).expand(3, 3)
    z = torch.nn.functional.normalize(-eye, dim=-1)
    x = torch.nn.functional.normalize(torch.linalg.cross(-up, -eye), dim=-1)
    rotation = torch.stack([x, torch.linalg.cross(z, x), z], 1)
    assert_close(camera.center, eye, 1e-6)
    assert_close(camera.extrinsics[:, :3, :3], rotation, 1e-6)
    uv, depth = camera.project(torch.tensor([[0.0, 0, 0], [0, 0, 0.1]]))
    assert_close(uv[:, 0], torch.full((3, 2), 0.5), 1e-6)
    assert_close(depth[:, 0], torch.full((3,), 2.0), 1e-6)
    assert (uv[:, 1, 1] < 0.5).all()  # up in the world is up in the picture: a smaller row


@pytest.mark.parametrize("pitch", [math.pi / 2, -math.pi / 2])
def test_orbit_at_the_poles_is_a_rotation(pitch):
    rotation = Camera.orbit(0.7, pitch, width=16).extrinsics[0, :3, :3]
    assert_close(rotation @ rotation.T, torch.eye(3), 1e-6)
    assert_close(torch.linalg.det(rotation), torch.tensor(1.0), 1e-6)


def test_project_known_points():
    intrinsics = torch.tensor([[[2.0, 0, 0.4], [0, 1.5, 0.6], [0, 0, 1]]])
    camera = Camera(torch.eye(4)[None], intrinsics, 100, 50)
    uv, depth = camera.project(torch.tensor([[0.3, -0.1, 2.0], [0, 0, 5.0]]))
    assert_close(uv[0], torch.tensor([[2 * 0.15 + 0.4, -1.5 * 0.05 + 0.6], [0.4, 0.6]]), 1e-6)
    assert_close(depth[0], torch.tensor([2.0, 5.0]), 1e-6)


def test_depth_is_along_the_view_and_negative_behind_it():
    camera = Camera.orbit([0.0, 1.0], [0.0, 0.4])
    _, depth = camera.project(torch.stack([camera.center, 2 * camera.center, -camera.center], 1))
    torch.testing.assert_close(depth, torch.tensor([[0.0, -2.0, 4.0]] * 2), atol=1e-5, rtol=0)


def test_rays_pass_through_the_pixel_centres():
    camera = Camera.orbit(torch.tensor([0.3, 1.0]), torch.tensor([0.5, -0.2]), 2.0, 0.7, 12, 7)
    camera.intrinsics[:, 0, 2] += 0.07
    origin, direction = camera.rays()
    assert direction.shape == (2, 7, 12, 3)
    for v in range(2):
        uv, depth = camera[v].project((origin[v] + 1.3 * direction[v]).reshape(-1, 3))
        j, i = torch.meshgrid(torch.arange(7), torch.arange(12), indexing="ij")
        assert_close(
            uv[0], torch.stack([(i + 0.5) / 12, (j + 0.5) / 7], -1).reshape(-1, 2).float(), 1e-5
        )
        assert_close(depth, torch.full((1, 84), 1.3), 1e-5)


def test_pixels_are_square():
    camera = Camera.orbit(0.0, 0.0, 2.0, 0.7, 64, 32)
    assert_close(camera.intrinsics[0, 0, 0] * 64, camera.intrinsics[0, 1, 1] * 32, 1e-6)


def test_select_join_and_move():
    camera = Camera.orbit(torch.arange(4.0), 0.1, width=8)
    assert (
        len(camera) == 4
        and len(camera[1]) == 1
        and len(camera[1:]) == 3
        and len(camera[[0, 3]]) == 2
    )
    assert torch.equal(camera[-1].extrinsics, camera.extrinsics[3:])
    assert torch.equal(Camera.cat([camera[:2], camera[2:]]).extrinsics, camera.extrinsics)
    assert [c.width for c in camera] == [8] * 4
    assert camera.to(torch.float64).intrinsics.dtype == torch.float64


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda e, k: Camera(e[0], k, 8, 8), r"extrinsics must be \[V, 4, 4\], not \[4, 4\]"),
        (
            lambda e, k: Camera(e, k[:, :2], 8, 8),
            r"intrinsics must be \[V, 3, 3\], not \[2, 2, 3\]",
        ),
        (lambda e, k: Camera(e, k[:1], 8, 8), "2 extrinsics but 1 intrinsics"),
        (lambda e, k: Camera(e, k.int(), 8, 8), "floating point, not torch.int32"),
        (lambda e, k: Camera(e, k, 0, 8), "width must be a whole number, at least 1, not 0"),
        (lambda e, k: Camera(e, k, 8, 8.5), "height must be a whole number, at least 1, not 8.5"),
        (lambda e, k: Camera(e, k, 8, float("nan")), "height must be .* not nan"),
        (
            lambda e, k: Camera.from_blender(e[0], 0.7, 8, 8),
            r"transform_matrix must be \[V, 4, 4\], not \[4, 4\]",
        ),
        (
            lambda e, k: Camera.from_blender(e * torch.tensor([1.0, 0])[:, None, None], 0.7, 8, 8),
            "transform_matrix 1 of 2 cannot be inverted",
        ),
        (
            lambda e, k: Camera.from_blender(
                e @ torch.diag(torch.tensor([1.0, 1, -1, 1])), 0.7, 8, 8
            ),
            "transform_matrix 0 of 2 is mirrored, stretched or skewed",
        ),
        (
            lambda e, k: Camera.from_blender(e + torch.eye(4).roll(1, 1) * 0.2, 0.7, 8, 8),
            "transform_matrix 0 of 2 is mirrored, stretched or skewed",
        ),
        (
            lambda e, k: Camera.from_blender(e, torch.ones(3), 8, 8),
            r"fov_x must be one number or \[2\], not \[3\]",
        ),
        (
            lambda e, k: Camera.orbit(torch.ones(2), torch.ones(3)),
            r"not \[\[2\], \[3\], \[\], \[\]\]",
        ),
        (
            lambda e, k: Camera.from_blender(e, math.nan, 8, 8),
            "fov_x must be above 0 and below 3.14159. radians, not nan",
        ),
        (
            lambda e, k: Camera.from_blender(e, torch.tensor([0.7, 40.0]), 8, 8),
            "fov_x must .* not 40",
        ),
        (
            lambda e, k: Camera.from_blender(e, 0.7, 8, 0),
            "height must be a whole number, at least 1, not 0",
        ),
        (
            lambda e, k: Camera.orbit(0.0, 0.0, fov=40.0),
            "fov must be above 0 and below 3.14159. radians, not 40",
        ),
        (lambda e, k: Camera.orbit(0.0, 0.0, fov=0), "fov must be .* not 0"),
        (
            lambda e, k: Camera.orbit([0.0, 1.0], 0.0, fov=torch.tensor([0.5, -1.0])),
            "fov must be .* not -1",
        ),
        (
            lambda e, k: Camera.orbit(math.nan, 0.0),
            "yaw must be above -inf and below inf radians, not nan",
        ),
        (
            lambda e, k: Camera.orbit(0.0, 20),
            "pitch must be above -1.57.* and below 1.57.* radians, not 20",
        ),
        (
            lambda e, k: Camera.orbit(0.0, 0.0, 0),
            "radius must be above 0 and below inf world units, not 0",
        ),
        (lambda e, k: Camera.orbit(0.0, 0.0, [1.0, -2.0]), "radius must be .* not -2"),
        (
            lambda e, k: Camera.orbit(0.0, 0.0, width=0),
            "width must be a whole number, at least 1, not 0",
        ),
        (
            lambda e, k: Camera.orbit(0.0, 0.0, height=0),
            "height must be a whole number, at least 1, not 0",
        ),
        (
            lambda e, k: Camera.cat([Camera(e, k, 8, 8), Camera(e, k, 8, 9)]),
            r"not of sizes \[\(8, 8\), \(8, 9\)\]",
        ),
    ],
)
def test_wrong_cameras_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.eye(4).repeat(2, 1, 1), torch.eye(3).repeat(2, 1, 1))
