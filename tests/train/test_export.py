"""train.export: files that independent readers take, with what is up in a scene up in them."""

import io
import re

import numpy as np
import pytest
import torch
import trimesh
from plyfile import PlyData

from models import GaussianScene, MeshScene, RadianceDecoder, save_pretrained
from tests.helpers.meshes import ball, cameras
from train import export
from train.meshes.read import read_mesh
from train.meshes.write import AXES, gaussian_ply, mesh_glb, mesh_obj, scene_npz
from train.run.trained import open_trained

CPU = torch.device("cpu")
STANDARD = (
    "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
)


def gaussians(count=200) -> GaussianScene:
    rng = torch.Generator().manual_seed(3)
    rotation = torch.randn(count, 4, generator=rng)
    return GaussianScene(
        center=torch.rand(count, 3, generator=rng) - 0.5,
        scale=0.01 + 0.05 * torch.rand(count, 3, generator=rng),
        rotation=rotation / rotation.norm(dim=1, keepdim=True),
        opacity=torch.rand(count, 1, generator=rng),
        color=torch.randn(count, 1, 3, generator=rng),
    )


def surface() -> MeshScene:
    """A ball, the upper half of it with more red, a bump towards +x and one away from +y."""
    vertices, faces, _ = ball(12)
    vertices = vertices + 0.05 * vertices * (vertices[:, :1] > 0.2) * torch.tensor([1.0, 0.0, 0.0])
    vertices[:, 1] *= 1 + 0.3 * (vertices[:, 1] < 0)
    red = 0.2 + 0.6 * (vertices[:, 2] > 0)
    color = torch.stack([red, torch.full_like(red, 0.5), 0.1 + 0.2 * vertices[:, 0].abs()], 1)
    empty = torch.zeros(0)
    return MeshScene(vertices, faces, color, color, empty.view(0, 3), empty, empty.sum(), 64)


def read_gaussians(data: bytes, axes: str) -> GaussianScene:
    """Read a PLY with plyfile, and turn it back into the axes of a scene by rotation matrices."""
    ply = PlyData.read(io.BytesIO(data))
    assert [p.name for p in ply["vertex"].properties] == STANDARD.split()
    assert not ply.text and ply.byte_order == "<"
    columns = {name: torch.from_numpy(ply["vertex"][name].copy()) for name in STANDARD.split()}
    group = lambda *names: torch.stack([columns[name] for name in names], 1)
    back = torch.tensor(AXES[axes])
    w, x, y, z = (columns[f"rot_{i}"].double() for i in range(4))
    matrix = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    turned = back.double().T @ torch.stack(matrix, 1).view(-1, 3, 3)
    assert (group("nx", "ny", "nz") == 0).all()
    scene = GaussianScene(
        center=group("x", "y", "z") @ back,
        scale=group("scale_0", "scale_1", "scale_2").exp(),
        rotation=torch.zeros(len(w), 4),
        opacity=torch.sigmoid(columns["opacity"])[:, None],
        color=group("f_dc_0", "f_dc_1", "f_dc_2")[:, None],
    )
    scene.turned = turned
    return scene


def covariance(rotation, scale):
    return rotation @ torch.diag_embed(scale.double() ** 2) @ rotation.mT


def matrices(quaternions):
    """Rotation matrices of quaternions (w, x, y, z), by the formula v + 2 w u x v + 2 u x u x v."""
    w, u = quaternions[:, :1, None].double(), quaternions[:, 1:, None].double()
    basis = torch.eye(3, dtype=torch.float64).expand(len(w), 3, 3)
    cross = torch.linalg.cross(u.expand_as(basis), basis, dim=1)
    return basis + 2 * w * cross + 2 * torch.linalg.cross(u.expand_as(basis), cross, dim=1)


@pytest.mark.parametrize("axes", AXES)
def test_gaussians_are_read_back_as_they_were(axes):
    scene = gaussians()
    read = read_gaussians(gaussian_ply(scene, axes), axes)
    for name in ("center", "scale", "opacity", "color"):
        assert torch.allclose(getattr(read, name), getattr(scene, name), atol=2e-6), name
    expected = covariance(matrices(scene.rotation), scene.scale)
    assert torch.allclose(covariance(read.turned, read.scale), expected, atol=1e-8)


def test_splat_draws_what_was_written_as_it_drew_the_scene():
    scene = gaussians()
    read = read_gaussians(gaussian_ply(scene, "z-up"), "z-up")
    ply = PlyData.read(io.BytesIO(gaussian_ply(scene, "z-up")))["vertex"]
    read.rotation = torch.from_numpy(np.stack([ply[f"rot_{i}"] for i in range(4)], 1))
    camera = cameras(2, 48, 48)
    black = torch.zeros(2, 3)
    images = [one.render(camera, black).color for one in (scene, read)]
    assert images[0].amax() > 0.5 and torch.allclose(*images, atol=2e-5)


@pytest.mark.parametrize(
    "axes, up", [("y-down", (0, -1, 0)), ("y-up", (0, 1, 0)), ("z-up", (0, 0, 1))]
)
def test_what_is_up_stays_up(axes, up):
    """A Gaussian above another is above it in the file, and right-handed axes stay right-handed."""
    center = torch.tensor([[0.0, 0.0, -0.2], [0.0, 0.0, 0.3]])
    scene = gaussians(2)
    scene.center = center
    read = PlyData.read(io.BytesIO(gaussian_ply(scene, axes)))["vertex"]
    points = np.stack([read[name] for name in "xyz"], 1)
    assert np.allclose(points[1] - points[0], 0.5 * np.array(up), atol=1e-6)
    assert np.linalg.det(np.array(AXES[axes])) == pytest.approx(1)


def test_opacities_of_0_and_1_have_finite_logits():
    scene = gaussians(2)
    scene.opacity = torch.tensor([[0.0], [1.0]])
    logits = PlyData.read(io.BytesIO(gaussian_ply(scene)))["vertex"]["opacity"]
    assert np.allclose(logits, [-16.6355, 16.6355], atol=1e-3)


def loaded(scene: MeshScene, kind: str) -> trimesh.Trimesh:
    data = mesh_glb(scene) if kind == "glb" else mesh_obj(scene)
    scene = trimesh.load_scene(io.BytesIO(data), file_type=kind, process=False)
    (mesh,) = scene.geometry.values()
    assert np.array_equal(scene.graph[scene.graph.nodes_geometry[0]][0], np.eye(4))
    return mesh


@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_a_mesh_is_read_back_with_y_up_and_faces_outwards(kind):
    scene = surface()
    mesh = loaded(scene, kind)
    x, y, z = scene.vertices.double().numpy().T
    assert np.allclose(mesh.vertices, np.stack([x, z, -y], 1), atol=1e-6)
    assert np.array_equal(mesh.faces, scene.faces.numpy())
    assert mesh.is_watertight and mesh.volume > 0.1
    visual = mesh.visual  # of a mesh with a material trimesh keeps colours as an attribute
    colors = visual.vertex_colors if kind == "obj" else visual.vertex_attributes["color"]
    red = np.asarray(colors)[:, 0].astype(float)
    above = mesh.vertices[:, 1] > 0.01
    assert red[above].min() > red[mesh.vertices[:, 1] < -0.01].max()
    # trimesh weights the normals of faces by angles, ours by areas
    theirs = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).vertex_normals
    assert (mesh.vertex_normals * theirs).sum(1).min() > 0.95


@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_our_own_reader_gives_the_scene_back(tmp_path, kind):
    scene = surface()
    file = tmp_path / f"ball.{kind}"
    file.write_bytes(mesh_glb(scene) if kind == "glb" else mesh_obj(scene))
    mesh = read_mesh(file)
    corners = mesh.vertices[mesh.faces]
    assert np.allclose(corners, scene.vertices.numpy()[scene.faces.numpy()], atol=1e-6)
    tint = torch.from_numpy(np.asarray(mesh.tint)).float()
    color = scene.color[scene.faces.long()]
    expected = torch.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    assert torch.allclose(tint, expected if kind == "glb" else color, atol=1e-5)
    assert mesh.materials[mesh.material[0]].unlit == (kind == "glb")
    assert not mesh.notes


def test_a_mesh_without_colours_has_none_in_its_file():
    scene = surface()
    scene.color = None
    assert b"COLOR_0" not in mesh_glb(scene) and b"unlit" not in mesh_glb(scene)
    first = mesh_obj(scene).decode().splitlines()[1].split()
    assert first[0] == "v" and len(first) == 4


def test_an_npz_holds_every_tensor_of_a_scene():
    scene = surface()
    with np.load(io.BytesIO(scene_npz(scene))) as arrays:
        assert arrays["kind"] == "MeshScene" and arrays["resolution"] == 64
        for name in ("vertices", "faces", "color", "normal", "tsdf_value"):
            assert np.array_equal(arrays[name], getattr(scene, name).numpy())


def test_the_command_writes_the_scene_of_an_item_a_mesh_and_latents(boxes, tmp_path, capsys):
    run = boxes / "run"
    outs = [tmp_path / f"{name}.ply" for name in ("item", "mesh", "latent")]
    assert export.main([str(run), "tall", "--out", str(outs[0])]) == 0
    mesh = boxes / "meshes" / "tall.obj"
    assert export.main([str(run), str(mesh), "--out", str(outs[1]), "--axes", "y-down"]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert "gaussian -> " in capsys.readouterr().out
    trained = open_trained(run, CPU)
    voxels = np.indices((3, 1, 1)).reshape(3, -1).T.astype(np.uint8)
    feats = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    np.savez(tmp_path / "l.npz", coords=voxels, feats=feats)
    own = [str(run), "--latent", str(tmp_path / "l.npz"), "--out", str(outs[2]), "--axes", "y-up"]
    assert export.main(own) == 0
    scene = trained.decode(torch.from_numpy(voxels).int(), torch.from_numpy(feats))
    read = read_gaussians(outs[2].read_bytes(), "y-up")
    assert torch.allclose(read.center, scene.center, atol=1e-6)
    assert len(read.scale) == len(scene.scale) == 6


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """The prefix of an untrained decoder of radiance fields."""
    sizes = dict(resolution=8, model_channels=16, latent_channels=8, num_blocks=1, num_heads=1)
    prefix = tmp_path_factory.mktemp("field") / "decoder"
    save_pretrained(RadianceDecoder(**sizes, representation_config={"rank": 2}), prefix)
    return prefix


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tall", "flat.ply"], "tall is no checkpoint"),
        (["RUN", "--out", "x.ply"], "nothing to export"),
        (
            ["RUN", "tall", "--out", "x.glb"],
            "kind gaussian is not exported as glb, but as ply, npz",
        ),
        (
            ["FIELD", "--latent", "l.npz", "--out", "x.ply"],
            "kind radiance is not exported as ply, but as",
        ),
        (["RUN", "tall", "--out", "x"], "not exported as a file without ending"),
        (["RUN", "tall", "--out", "x.glb", "--format", "ply"], "ends in .glb, but --format is ply"),
        (["RUN", "tall", "--out", "x.npz", "--axes", "y-up"], "--axes y-up is for ply"),
        (["RUN", "tall", "--out", "gone/x.ply"], "gone is no folder"),
        (["RUN", "tall", "--out", "x.ply", "--views", "1"], "--views 1 is not in 2 to 1000"),
        (
            ["RUN", "--latent", "l", "--root", ".", "--out", "x.ply"],
            "decoded alone, without --root",
        ),
        (["RUN", "tall", "--out", "."], "is a folder, not a file"),
        (["RUN", "tall", "--latent", "l.npz", "--out", "x.ply"], "decoded alone, without tall"),
        (["RUN", "--latent", "l.npz", "--out", "x.ply"], "l.npz is missing"),
        (["RUN", "gone.obj", "--out", "x.ply"], "gone.obj is not there"),
        (["RUN", "tall", "--out", "x.ply", "--format", "fbx"], "invalid choice: 'fbx'"),
        (["RUN/checkpoints/decoder", "tall", "--out", "x.ply"], "names no encoder"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value)[-24:],
)
def test_wrong_input_ends_with_one_line_and_nothing_written(
    boxes, field, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(boxes / "run"), "FIELD": str(field)}
    filled = [re.sub("^(RUN|FIELD)", lambda m: places[m[0]], a) for a in arguments]
    filled += [] if "--out" in filled else ["--out", "y.ply"]
    try:
        status = export.main(filled)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and list(tmp_path.iterdir()) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("python -m train.export: ")
    assert re.search(re.escape(message), error), error


def test_a_surface_without_faces_and_numbers_that_are_not_finite_are_not_written(
    boxes, tmp_path, monkeypatch, capsys
):
    empty = surface()
    empty.faces = empty.faces[:0]
    broken = gaussians(4)
    broken.scale[2, 1] = torch.nan
    for scene, kind, suffix, message in (
        (empty, "mesh", "glb", "the decoded surface has no faces"),
        (broken, "gaussian", "ply", "decodes: scale has 1 of 12 values not finite"),
    ):
        monkeypatch.setattr("models.GaussianDecoder.forward", lambda *_, own=scene: [own])
        monkeypatch.setattr("train.run.trained._fitting", lambda *_, own=kind: own)
        file = tmp_path / f"x.{suffix}"
        arguments = [str(boxes / "run" / "checkpoints" / "decoder"), "--out", str(file)]
        latent = tmp_path / "l.npz"
        np.savez(latent, coords=np.zeros((1, 3), np.uint8), feats=np.zeros((1, 8), np.float32))
        assert export.main([*arguments, "--latent", str(latent)]) == 2
        assert message in capsys.readouterr().err and not file.exists()
