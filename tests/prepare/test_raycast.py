"""Cameras, surface voxels and ray-cast colours of train.prepare.command."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.camera import Camera
from tests.helpers.mesh_files import quad, write_obj
from train.meshes.read import normalize, read_mesh
from train.meshes.surface import Material, Mesh
from train.prepare import raycast
from train.prepare.objects import frame_order
from train.prepare.raycast import Caster, camera_to_world, direction
from train.prepare.voxelize import voxelize

# from -y, where an OBJ's +z looks, and from +y
FRONT = camera_to_world(-np.pi / 2, 0)
BACK = camera_to_world(np.pi / 2, 0)
SIDE = 0.5  # light on a vertical surface that the key light does not reach
RED = (255, 0, 0)
GREEN = (0, 255, 0)
BLUE = (0, 0, 255)
WHITE = (255, 255, 255)


def view(path: Path, pose: np.ndarray, size: int = 32, samples: int = 4) -> np.ndarray:
    mesh = read_mesh(path)
    normalize(mesh)
    return Caster(mesh).render(pose, size, samples)[0]


# cameras


def test_directions_are_the_published_ones():
    assert np.allclose(direction(1, 150), (np.pi, -1.3393399), atol=2e-7)
    assert np.allclose(direction(100, 150), (0.9326603, 0.5890310), atol=2e-7)
    assert np.isclose(direction(5, 10, 0.0, 0.25)[0], 2 * np.pi * (0.625 + 0.25))


def test_poses_look_at_the_origin_with_z_up():
    poses = np.stack([camera_to_world(*direction(i, 7, 0.3, 0.8)) for i in range(7)])
    assert np.allclose(np.linalg.det(poses[:, :3, :3]), 1)
    camera = Camera.from_blender(torch.from_numpy(poses).float(), float(raycast.FOV), 32, 32)
    uv, depth = camera.project(torch.tensor([[0.0, 0, 0], [0, 0, 0.1]]))
    pixels = uv if uv.max() > 1.5 else uv * 32
    assert torch.allclose(pixels[:, 0], torch.full((7, 2), 16.0), atol=1e-3)
    assert torch.allclose(depth[:, 0].flatten(), torch.full((7,), 2.0), atol=1e-5)
    assert (pixels[:, 1, 1] < 16).all(), "a point above the origin is shown below it"


@pytest.mark.parametrize("distance", [2.0, 0.6, 0.3])
@pytest.mark.parametrize(("size", "samples"), [(33, 1), (20, 3)])
def test_rays_that_are_not_cast_would_have_missed(monkeypatch, size, samples, distance):
    """A small triangle, seen in all places of the picture, from afar and from within its box."""
    monkeypatch.setattr(raycast, "RAYS", 200)  # several bands
    rng = np.random.default_rng([size, samples])
    shown = 0
    for _ in range(12):
        vertices = rng.uniform(-0.6, 0.6, (1, 3)) + rng.normal(0, 0.1, (3, 3))
        corners = (np.zeros((1, 3, 3)), np.zeros((1, 3, 2)), np.ones((1, 3, 3)))
        one = np.zeros(1, np.int32)
        mesh = Mesh(vertices, np.array([[0, 1, 2]], np.int32), *corners, one, [Material()])
        pose = camera_to_world(*rng.uniform(-1.5, 1.5, 2))
        pose[:3, 3] *= distance / 2
        caster = Caster(mesh)
        image, points = caster.render(pose, size, samples)
        with monkeypatch.context() as patched:
            patched.setattr(Caster, "_window", lambda self, pose, size: (0, size, 0, size))
            whole, all_points = caster.render(pose, size, samples)
        assert np.array_equal(image, whole)
        assert all(np.array_equal(a, b) for a, b in zip(points, all_points, strict=True))
        top, bottom, left, right = caster._window(pose, size)
        shown += bool(image.any()) and (bottom - top) * (right - left) < size * size
    assert shown or distance < 0.5


def test_held_out_views_are_spread_and_come_last():
    order = frame_order(20, 4)
    assert sorted(order) == list(range(20)) and order[-4:] == [2, 7, 12, 17]
    assert frame_order(5, 0) == [0, 1, 2, 3, 4]


# voxels


def meets_exactly(triangle: list[list[Fraction]], low: list[int]) -> bool:
    """Test whether a triangle, clipped by the closed unit cube at `low`, leaves anything; exact."""
    polygon = triangle
    for axis in range(3):
        for sign, bound in ((1, low[axis]), (-1, -(low[axis] + 1))):
            kept = []
            for i, a in enumerate(polygon):
                b = polygon[i - 1]
                da, db = sign * a[axis] - bound, sign * b[axis] - bound
                if (da < 0) != (db < 0):
                    t = db / (db - da)
                    kept.append([y + t * (x - y) for x, y in zip(a, b, strict=True)])
                if da >= 0:
                    kept.append(a)
            polygon = kept
    return len(polygon) > 0


def voxels_exactly(vertices, faces, resolution: int) -> np.ndarray:
    cells = []
    for face in faces:
        triangle = [
            [(Fraction(float(x)) + Fraction(1, 2)) * resolution for x in vertices[i]] for i in face
        ]
        ranges = [range(resolution)] * 3
        cells += [
            (x, y, z)
            for x in ranges[0]
            for y in ranges[1]
            for z in ranges[2]
            if meets_exactly(triangle, [x, y, z])
        ]
    return np.unique(np.array(cells).reshape(-1, 3), axis=0)


GRID = np.arange(-3, 4) / 8  # coordinates on cell planes of 8^3 and in the middle of cells of 4^3


@pytest.mark.parametrize("resolution", [1, 3, 4, 8])
def test_voxels_agree_with_exact_clipping(resolution):
    rng = np.random.default_rng(resolution)
    # vertices, edges and planes that only touch cells; some triangles are degenerate
    on_planes = rng.choice(GRID, (6, 3, 3))
    on_planes[0, :, 0] = 0.25  # a wall in a cell plane
    on_planes[1, :, :2] = 0.125  # a segment along an edge of cells
    on_planes[2] = on_planes[2, :1]  # a point
    if resolution == 3:
        on_planes = on_planes[:0]  # a third is no float: nothing touches exactly
    anywhere = rng.uniform(-0.49, 0.49, (4, 3, 3))
    tiny = rng.uniform(-0.4, 0.4, (8, 1, 3)) + rng.uniform(-0.02, 0.02, (8, 3, 3))
    for triangles in (on_planes, np.concatenate([anywhere, tiny])):
        vertices = triangles.reshape(-1, 3)
        faces = np.arange(3 * len(triangles)).reshape(-1, 3)
        expected = voxels_exactly(vertices, faces, resolution)
        assert np.array_equal(voxelize(vertices, faces, resolution), expected.reshape(-1, 3))


def test_a_wall_in_a_cell_plane_has_two_sides_and_the_cube_clips():
    wall = np.array([[0.0, -0.4, -0.4], [0, 0.4, -0.4], [0, -0.4, 0.4]])
    assert set(voxelize(wall, np.array([[0, 1, 2]]), 4)[:, 0]) == {1, 2}
    assert set(voxelize(wall + [0.5, 0, 0], np.array([[0, 1, 2]]), 4)[:, 0]) == {3}
    assert set(voxelize(wall + [7.0, 0, 0], np.array([[0, 1, 2]]), 4)[:, 0]) == {3}
    assert voxelize(wall, np.zeros((0, 3), int), 4).shape == (0, 3)


# colours

# 4 x 4, red at the top left
CORNERS = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8).repeat(2, 0).repeat(2, 1)
TEXTURED = "newmtl m\nKd 0 0 0\nmap_Kd q.png\n"  # the image replaces Kd


@pytest.mark.parametrize("uv", [0.0, -3.0])
def test_a_texture_is_the_right_side_up(tmp_path, uv):
    path = write_obj(tmp_path, "q", quad(uv=uv), TEXTURED, CORNERS)
    near, far = (8, 8), (23, 23)  # pixels inside the four quarters
    front = view(path, FRONT)
    for (y, x), color in zip([near, (8, 23), (23, 8), far], (RED, GREEN, BLUE, WHITE), strict=True):
        assert np.abs(front[y, x] - np.array([*color, 510]) * SIDE).max() <= 1
    back = view(path, BACK) / 255.0  # mirrored, and the key light falls on it
    lit = SIDE + raycast.KEY * raycast.KEY_DIRECTION[1]
    for (y, x), color in zip([near, (8, 23), (23, 8), far], (GREEN, RED, WHITE, BLUE), strict=True):
        assert np.allclose(back[y, x, :3], np.array(color) / 255 * lit, atol=3e-3)


def test_alpha_is_coverage_and_edges_keep_their_colour(tmp_path):
    image = view(write_obj(tmp_path, "q", quad(), "newmtl m\nKd 0.8 0.4 0.3\n"), FRONT, 33, 8)
    width = 1 / (2 * 2 * np.tan(np.deg2rad(20)))  # of the frame, that the square takes
    assert abs(image[..., 3].mean() / 255 - width**2) < 4e-3
    edge = (image[..., 3] > 0) & (image[..., 3] < 255)
    assert edge.any() and (image[~edge & (image[..., 3] == 0)] == 0).all()
    assert (
        image[image[..., 3] > 0][:, :3] == np.rint(np.array([0.8, 0.4, 0.3]) * SIDE * 255)
    ).all()


def test_transparent_layers_are_composited(tmp_path):
    text = quad(0.1, "glass") + quad(0.0, "wall", half=0.25)
    image = view(
        write_obj(
            tmp_path, "q", text, "newmtl glass\nKd 1 0 0\nd 0.25\nnewmtl wall\nKd 0 1 0\nTr 0\n"
        ),
        FRONT,
    )
    assert np.allclose(image[16, 16] / 255, [0.25 * SIDE, 0.75 * SIDE, 0, 1], atol=3e-3)
    assert np.allclose(image[16, 7] / 255, [SIDE, 0, 0, 0.25], atol=3e-3), (
        "glass with nothing behind: red, a quarter opaque"
    )


def test_transparent_texels_are_holes(tmp_path):
    texture = np.full((4, 4, 4), 255, np.uint8)
    texture[:, :2] = (255, 0, 0, 0)  # red that must not bleed out of the hole
    text = quad(0.1, "m") + quad(0.0, "wall", half=0.25)
    image = view(
        write_obj(tmp_path, "q", text, TEXTURED + "newmtl wall\nKd 0 0 1\n", texture), FRONT
    )
    assert image[16, 9, 3] == 0
    assert np.allclose(image[16, 12] / 255, [0, 0, SIDE, 1], atol=3e-3)
    assert np.allclose(image[16, 22] / 255, [SIDE] * 3 + [1], atol=3e-3)
    assert np.ptp(image[6, 18:26, :3].astype(int), axis=-1).max() == 0


def test_the_smooth_normal_shades_and_follows_the_viewer(tmp_path):
    # the file's normal points away from the viewer
    text = "v -1 -1 0\nv 1 -1 0\nv 0 1 0\nvn 0 0.6 -0.8\nf 1//1 2//1 3//1\n"
    mesh = read_mesh(write_obj(tmp_path, "t", text))
    normalize(mesh)
    normals = Caster(mesh).render(FRONT, 8, 1)[1][3]
    assert len(normals) and np.allclose(normals, [0, -0.8, -0.6], atol=1e-6)


def test_polygons_negative_indices_and_any_case_of_names(tmp_path):
    path = write_obj(
        tmp_path, "p", quad().replace("\n", "\r\n"), "newmtl m\nmap_Kd -clamp on TEX\\Q.PNG\n"
    )
    (tmp_path / "tex").mkdir()
    Image.fromarray(CORNERS).save(tmp_path / "q.png")
    mesh = read_mesh(path)
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3]] and mesh.materials[0].texture.shape == (
        4,
        4,
        4,
    )


def test_glb_with_node_transform_is_the_obj(tmp_path):
    import trimesh

    square = trimesh.Trimesh(
        [[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False
    )
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(CORNERS))
    square.visual = trimesh.visual.TextureVisuals(
        uv=[[0, 0], [1, 0], [1, 1], [0, 1]], material=material
    )
    turn = trimesh.transformations.rotation_matrix(np.pi / 2, [0, 1, 0])  # to face +x
    scene = trimesh.Scene()
    scene.add_geometry(square, transform=turn)
    scene.export(tmp_path / "q.glb")
    obj = view(write_obj(tmp_path, "q", quad(), TEXTURED, CORNERS), FRONT)
    glb = view(tmp_path / "q.glb", camera_to_world(0, 0))
    lit = SIDE + raycast.KEY * raycast.KEY_DIRECTION[0]
    assert np.array_equal(obj[..., 3], glb[..., 3])
    assert np.allclose(glb[..., :3], obj[..., :3] / SIDE * lit, atol=2.5)


def test_texture_look_up_interpolates_and_wraps():
    texture = np.zeros((2, 2, 4), np.uint8)
    texture[0, 0] = 255
    texture[1, 1] = (0, 0, 0, 255)
    uv = np.array([[0.25, 0.75], [0.5, 0.5], [0.0, 0.75], [1.25, -0.25]])
    expected = [[1, 1, 1, 1], [0.5, 0.5, 0.5, 0.5], [1, 1, 1, 0.5], [1, 1, 1, 1]]
    assert np.allclose(raycast.sample(texture, uv), expected)


def test_a_ray_passes_many_layers():
    z = np.linspace(-0.4, 0.4, 5)
    square = np.array([[-0.5, 0, -0.5], [0.5, 0, -0.5], [0.5, 0, 0.5]])
    vertices = np.concatenate([square + [0, y, 0] for y in z])
    F = len(z)
    zero = np.zeros((F, 3, 3), np.float32)
    faces = np.arange(3 * F).reshape(F, 3)
    mesh = Mesh(
        vertices, faces, zero, zero[..., :2], zero + 1, np.zeros(F, int), [Material((1, 1, 1), 0.5)]
    )
    image, (_, weights, _, _) = Caster(mesh).render(FRONT, 9, 1)
    assert image[4, 5, 3] == round(255 * (1 - 0.5**F))
    assert np.allclose(np.unique(weights.round(6)), 0.5 ** np.arange(F, 0, -1), atol=2e-6)
    assert np.isclose(weights.sum(), image[..., 3].sum() / 255, rtol=1e-2)


def test_no_surface_is_passed_twice():
    """Rounding can put a ray's next start before the face it just passed.

    That happens to some 1 in 10^4 of tilted ones.
    """
    rng = np.random.default_rng(1)
    square = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]]) + [
        0.013,
        0.007,
        0.0123,
    ]
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    zero = np.zeros((2, 3, 3), np.float32)
    for _ in range(60):
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0].T
        mesh = Mesh(
            square @ turn,
            faces,
            zero,
            zero[..., :2],
            zero + 1,
            np.zeros(2, int),
            [Material((1, 1, 1), 0.5)],
        )
        weights = Caster(mesh).render(
            camera_to_world(rng.uniform(0, 6), rng.uniform(-1.4, 1.4)), 128, 1
        )[1][1]
        assert np.allclose(weights, 0.5)
