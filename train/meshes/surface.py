"""Triangles with colours, whatever the file's format, and what the readers of formats share."""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from train.meshes.untrusted import TEXTURES, load_picture, open_picture

HUGE = 1e15
GREY = (0.8, 0.8, 0.8)  # a face without a material, as most viewers show it
# (x, y, z) becomes (x, -z, y); the datasets are z-up
Y_UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], float)
Z_UP = np.eye(3)


@dataclass
class Material:
    """The colour of a surface: a texture times `color` and `opacity`.

    `texture` is uint8 RGBA [H, W, 4], rows from the top.
    """

    color: tuple[float, float, float] = GREY
    opacity: float = 1.0
    texture: np.ndarray | None = None
    # glTF: colours multiply in linear light; `color` and the mesh's `tint` are given in it
    linear: bool = False


@dataclass
class Mesh:
    """Triangles in a z-up frame; `normals` is zero at corners whose file gives none."""

    vertices: np.ndarray  # [P, 3] float64, every one used by a face
    faces: np.ndarray  # [F, 3] int32
    normals: np.ndarray  # [F, 3, 3] float32, corner normals
    uv: np.ndarray  # [F, 3, 2] float32, v upwards
    tint: np.ndarray  # [F, 3, 3] float32, vertex colours, 1 where the file has none
    material: np.ndarray  # [F] int32 into `materials`
    materials: list[Material]
    notes: list[str] = field(default_factory=list)


def assemble(
    name: str, vertices, faces, normals, uv, tint, material, materials, notes=(), up=Y_UP
) -> Mesh:
    """Check triangles, drop unused vertices and turn the mesh to z-up.

    Shared by the readers of all formats. Raises ValueError that names the file.
    """
    if len(faces) == 0:
        raise ValueError(f"{name} has no faces")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"{name}: a face uses vertex {faces.max() + 1} of {len(vertices)}")
    used, faces = np.unique(faces, return_inverse=True)
    vertices = vertices[used]
    bad = np.flatnonzero(~np.isfinite(vertices).all(1))
    if len(bad):
        raise ValueError(
            f"{name}: {len(bad)} of {len(vertices)} vertices are not finite, the first is "
            f"vertex {used[bad[0]] + 1}"
        )
    if not all(np.isfinite([*m.color, m.opacity]).all() for m in materials):
        raise ValueError(f"{name}: a material's colour or opacity is not finite")
    # of normals, texture coordinates and tints that are no numbers
    with np.errstate(over="ignore", invalid="ignore"):
        return Mesh(
            vertices=vertices @ up.T,
            faces=faces.reshape(-1, 3).astype(np.int32),
            normals=_finite(normals @ up.T),
            uv=_finite(uv),
            tint=_finite(tint),
            material=np.asarray(material, np.int32),
            materials=materials,
            notes=list(notes),
        )


def _finite(values) -> np.ndarray:
    """In float32, 0 for what is not finite or has no finite square there."""
    return np.where(np.abs(values) < HUGE, values, 0).astype(np.float32)


def find(folder: Path, name: str) -> Path | None:
    """Find a file that another one names, with either slash and in any case.

    Such files travelled through Windows. An absolute path is of the author's machine: only the file
    of that name beside the mesh is taken for it.
    """
    path = PurePosixPath(name.strip().strip('"').replace("\\", "/"))
    absolute = path.is_absolute() or PureWindowsPath(path).drive
    for candidate in ([] if absolute else [folder / path]) + [folder / path.name]:
        if candidate.is_file():
            return candidate
        if candidate.parent.is_dir():
            for found in sorted(candidate.parent.iterdir()):
                if found.name.lower() == candidate.name.lower() and found.is_file():
                    return found
    return None


def decode(data: Path | bytes, owner: str, name: str) -> np.ndarray:
    """Decode a picture: uint8 RGBA [H, W, 4].

    Raises ValueError, "OWNER: texture NAME ...", where it cannot be read.
    """
    try:
        with open_picture(data, TEXTURES) as image:
            return np.asarray(load_picture(image).convert("RGBA"))
    except ValueError as error:
        raise ValueError(f"{owner}: texture {name} cannot be read: {error}") from error
