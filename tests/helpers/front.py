"""A mesh file as it is seen, for tests of colours and areas."""

from pathlib import Path

import numpy as np

from train.meshes.read import normalize, read_mesh
from train.meshes.surface import Mesh
from train.prepare.raycast import Caster, camera_to_world


def front(path: Path, size: int = 16) -> np.ndarray:
    """The mesh seen from its front, without the light there: RGBA in [0, 1].

    The front is the file's +z where y is up (OBJ, glTF), -y where z is (PLY).
    """
    mesh = read_mesh(path)
    normalize(mesh)
    picture = Caster(mesh).render(camera_to_world(-np.pi / 2, 0), size, 1)[0] / 255
    picture[..., :3] /= 0.5
    return picture


def area(mesh: Mesh) -> float:
    """The area of all triangles."""
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)
