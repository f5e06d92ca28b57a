"""Textured meshes from OBJ, GLB, glTF and PLY files: `read_mesh`, `content_hash`, `normalize`.

Everything is flat after reading: F triangles over P vertices, and per corner a normal, a texture
coordinate and a tint. z is up in the datasets and in PLY, y in OBJ and glTF: their (x, y, z)
becomes (x, -z, y). Nothing is repaired or thrown away silently: what cannot be shown as its author
meant it is a ValueError with the file's name, or a line in `Mesh.notes`.
"""

import hashlib
from pathlib import Path

import numpy as np

from train.meshes.budget import Budget
from train.meshes.files import read_file
from train.meshes.gltf import gltf_files, read_gltf
from train.meshes.obj import obj_files, read_obj
from train.meshes.ply import read_ply
from train.meshes.surface import Mesh
from train.meshes.untrusted import reading

READABLE = (".obj", ".glb", ".gltf", ".ply")
# by an application, which makes GLB of them
CONVERTIBLE = (".fbx", ".usd", ".usda", ".usdc", ".usdz", ".blend", ".dae", ".3ds")


def read_mesh(path: Path, root: Path | None = None) -> Mesh:
    """Read one file of READABLE; a ValueError names the file and what is wrong with it.

    The files that it names lie below `root`, without one below its own folder.
    """
    if path.suffix.lower() in CONVERTIBLE:
        raise ValueError(
            f"{path.name}: {path.suffix} needs Blender: python -m train.prepare --blender PROGRAM "
            "converts it, PROGRAM being the path of your Blender"
        )
    if path.suffix.lower() not in READABLE:
        raise ValueError(
            f"{path.name}: unknown extension {path.suffix or '(none)'}; known are "
            f"{', '.join(READABLE)}"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty")
    root = path.parent if root is None else root
    budget = Budget()
    reader = {".obj": read_obj, ".ply": read_ply}.get(path.suffix.lower(), read_gltf)
    with reading(path.name), budget.enforced():
        # what is not finite is refused
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return reader(path, root, budget)


def content_hash(path: Path, root: Path | None = None) -> str:
    """Hash a mesh file with every file that it names (MTL, images, glTF buffers): sha256.

    Of a file that names none it is the file's own. Raises OSError for what is no file, ValueError,
    with its name, for a file whose names cannot be read.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is not a file")  # a pipe or a device would never end
    budget = Budget()
    budget.count(path)
    with reading(path.name), budget.enforced():
        return _digest(path, path.parent if root is None else root, budget)


def _digest(path: Path, root: Path, budget: Budget) -> str:
    digest = hashlib.sha256(read_file(path))
    parts = []
    if path.suffix.lower() == ".obj":
        parts = obj_files(path, root)
    elif path.suffix.lower() in (".glb", ".gltf"):
        parts = gltf_files(path, root, budget)
    known = {None: b"absent"}
    for part in parts:  # each by its own digest: where one ends counts, and whether it is there
        if part not in known:
            known[part] = hashlib.sha256(budget.read(part)).digest()
        digest.update(known[part])
    return digest.hexdigest()


def normalize(mesh: Mesh) -> tuple[float, np.ndarray]:
    """Move a mesh into [-0.5, 0.5]^3 in place, its largest side 1 and its box centred.

    Returns (scale, offset [3]), which transforms.json records: p becomes p * scale + offset. Raises
    ValueError for a mesh that is a point, or too small or large for double precision.
    """
    low = mesh.vertices.min(0)
    high = mesh.vertices.max(0)
    with np.errstate(over="ignore"):
        side = (high - low).max()
    if not side > 0:
        raise ValueError(f"all {len(mesh.vertices)} vertices are the same point")
    if not 1e-150 < side < 1e150:
        raise ValueError(
            f"its largest side is {side:.3g}, too small or too large for double precision"
        )
    scale = 1 / side
    offset = -(low + high) / 2 * scale
    mesh.vertices = mesh.vertices * scale + offset
    return float(scale), offset
