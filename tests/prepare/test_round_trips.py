"""Meshes that trimesh writes in every format, read by us and by trimesh: the same surface.

Areas and corners agree to 1e-5, texture coordinates to 1e-5, colours to half a step of 8 bits.
"""

from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial, SimpleMaterial

from tests.helpers.front import area
from train.data.metadata import ply_mesh
from train.meshes.read import read_mesh
from train.meshes.surface import Mesh

UPRIGHT = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], float)  # of files whose y is up
FORMATS = {"obj": UPRIGHT, "glb": UPRIGHT, "gltf": UPRIGHT, "ply": np.eye(3)}
PICTURE = np.random.default_rng(1).integers(0, 256, (8, 16, 3), np.uint8)


def ball(textured: bool, suffix: str) -> trimesh.Trimesh:
    """A dented ball of 320 triangles with random colours, or random texture coordinates."""
    rng = np.random.default_rng(2)
    made = trimesh.creation.icosphere(subdivisions=2)
    vertices = made.vertices * rng.uniform(0.6, 1.4, (len(made.vertices), 1)) * [1, 2, 3]
    mesh = trimesh.Trimesh(vertices, made.faces, process=False)
    if textured:
        image = Image.fromarray(PICTURE)
        material = SimpleMaterial(image=image) if suffix == "obj" else None
        material = material or PBRMaterial(baseColorTexture=image)
        uv = rng.uniform(-1, 2, (len(vertices), 2))
        mesh.visual = TextureVisuals(uv=uv, material=material)
    else:
        colors = rng.integers(0, 256, (len(vertices), 4))
        colors[:, 3] = 255
        mesh.visual = ColorVisuals(mesh, vertex_colors=colors.astype(np.uint8))
    return mesh


def written(folder: Path, mesh: trimesh.Trimesh, suffix: str) -> Path:
    path = folder / f"ball.{suffix}"
    if suffix != "gltf":
        mesh.export(path)
        return path
    for name, data in trimesh.exchange.gltf.export_gltf(trimesh.Scene(mesh)).items():
        (folder / name.replace("model", "ball")).write_bytes(data)
    return path


def order(corners: np.ndarray) -> np.ndarray:
    """An order of triangles [F, 3, 3] that does not depend on the file's."""
    return np.lexsort(corners.reshape(len(corners), 9).round(4).T)


# a texture beside a PLY is refused
CASES = [(suffix, False) for suffix in FORMATS] + [(s, True) for s in FORMATS if s != "ply"]


@pytest.mark.parametrize("suffix, textured", CASES)
def test_what_trimesh_writes(tmp_path, suffix, textured):
    mesh = ball(textured, suffix)
    ours = read_mesh(written(tmp_path, mesh, suffix))
    assert area(ours) == pytest.approx(mesh.area, rel=1e-5)
    corners = ours.vertices[ours.faces]
    theirs = mesh.triangles @ FORMATS[suffix].T
    rows, columns = order(corners), order(theirs)
    assert np.allclose(corners[rows], theirs[columns], atol=1e-5)
    if textured:
        assert np.allclose(ours.uv[rows], mesh.visual.uv[mesh.faces][columns], atol=1e-5)
        (material,) = {id(m): m for m in ours.materials if m.texture is not None}.values()
        assert np.array_equal(material.texture[..., :3], PICTURE)
    else:
        colors = mesh.visual.vertex_colors[mesh.faces][columns][..., :3] / 255
        assert np.allclose(ours.tint[rows], colors, atol=0.5 / 255)
    assert not ours.notes


def test_what_we_write(tmp_path):
    mesh: Mesh = read_mesh(written(tmp_path, ball(False, "ply"), "ply"))
    (tmp_path / "mesh.ply").write_bytes(ply_mesh(mesh.vertices, mesh.faces))
    theirs = trimesh.load_mesh(tmp_path / "mesh.ply", process=False)
    assert np.allclose(theirs.vertices, mesh.vertices, atol=1e-6)
    assert np.array_equal(theirs.faces, mesh.faces)
    again = read_mesh(tmp_path / "mesh.ply")
    assert np.array_equal(again.faces, mesh.faces)
    assert np.allclose(again.vertices, mesh.vertices, atol=1e-6)
