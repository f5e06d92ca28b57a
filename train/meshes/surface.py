"""Triangles with colours, whatever the file's format, and what the readers of formats share."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from train.meshes.pictures import Placement, Sampler

HUGE = 1e15
CHUNK = 1 << 16  # rows
GREY = (0.8, 0.8, 0.8)  # a face without a material, as most viewers show it
# (x, y, z) becomes (x, -z, y); the datasets are z-up
Y_UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], float)
Z_UP = np.eye(3)


@dataclass
class Material:
    """The colour of a surface: a texture times `color` and `opacity`, and the light that it emits.

    Textures are uint8 RGBA [H, W, 4], rows from the top. Emission is `emission` times its texture.
    """

    color: tuple[float, float, float] = GREY
    opacity: float = 1.0
    texture: np.ndarray | None = None
    # glTF: colours multiply in linear light; `color` and the mesh's `tint` are given in it
    linear: bool = False
    sampler: Sampler = Sampler()  # of `texture`
    emission: tuple[float, float, float] = (0.0, 0.0, 0.0)
    emission_texture: np.ndarray | None = None
    emission_sampler: Sampler = Sampler()
    unlit: bool = False  # no light falls on it: its colour is what is seen


@dataclass
class Finish:
    """A material, and where its textures lie on a surface."""

    material: Material
    placement: Placement = Placement()
    emission_placement: Placement = Placement()


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
    # [F, 3, 2] float32 of emission textures; None: as `uv`
    emission_uv: np.ndarray | None = None


def assemble(
    name: str,
    vertices,
    faces,
    normals,
    uv,
    tint,
    material,
    materials,
    notes=(),
    up=Y_UP,
    emission_uv=None,
) -> Mesh:
    """Check triangles, drop unused vertices and turn the mesh to z-up.

    Shared by the readers of all formats. Raises ValueError that names the file.
    """
    if len(faces) == 0:
        raise ValueError(no_faces(name, notes))
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"{name}: a face uses vertex {faces.max() + 1} of {len(vertices)}")
    known = np.zeros(len(vertices), bool)
    known[faces] = True
    used = np.flatnonzero(known)
    faces = (np.cumsum(known) - 1).astype(np.int32)[faces]
    vertices = vertices[used]
    bad = np.flatnonzero(~np.isfinite(vertices).all(1))
    if len(bad):
        raise ValueError(
            f"{name}: {len(bad)} of {len(vertices)} vertices are not finite, the first is "
            f"vertex {used[bad[0]] + 1}"
        )
    numbers = np.array([[*m.color, *m.emission, m.opacity] for m in materials])
    if not (np.abs(numbers) < HUGE).all():
        raise ValueError(f"{name}: a material's colour, emission or opacity is not finite")
    # of normals, texture coordinates and tints that are no numbers
    with np.errstate(over="ignore", invalid="ignore"):
        return Mesh(
            vertices=vertices @ up.T,
            faces=faces.reshape(-1, 3),
            normals=finite(normals, up),
            uv=finite(uv),
            tint=finite(tint),
            material=np.asarray(material, np.int32),
            materials=materials,
            notes=list(notes),
            emission_uv=None if emission_uv is None else finite(emission_uv),
        )


def earlier_copies(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Count for each face [F, 3] the earlier ones with the same corners, in any order: [F].

    `vertices` [P, 3] are compared by their numbers, each three of them mixed to one of 64 bits.
    """
    bits = (np.asarray(vertices, np.float64) + 0.0).view(np.uint64)  # -0.0 becomes 0.0
    mixed = np.zeros(len(bits), np.uint64)
    for axis in range(3):  # splitmix64 (Steele, Lea and Flood 2014)
        mixed += bits[:, axis] + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    key = mixed[faces[:, 0]] + mixed[faces[:, 1]] + mixed[faces[:, 2]]
    order = np.argsort(key, kind="stable")
    key = key[order]
    place = np.arange(len(key))
    begins = np.ones(len(key), bool)
    begins[1:] = key[1:] != key[:-1]
    count = np.empty(len(key), np.int64)
    count[order] = place - np.maximum.accumulate(np.where(begins, place, 0))
    return count


def no_faces(name: str, notes: Iterable[str]) -> str:
    """Say that a file has no faces, and what was noted last, which may be why."""
    why = "".join(f": {note.removeprefix(f'{name}: ')}" for note in list(notes)[-1:])
    return f"{name} has no faces{why}"


def finite(values: np.ndarray, turn: np.ndarray | None = None) -> np.ndarray:
    """Values in float32, 0 for what is not finite or has no finite square there.

    Vectors are turned by the matrix `turn` [3, 3] if there is one. Values that are float32 already
    are changed in place.
    """
    made = values if values.dtype == np.float32 else np.empty(values.shape, np.float32)
    for first in range(0, len(values), CHUNK):  # a few MB at once, and not the file's times ten
        rows = slice(first, first + CHUNK)
        part = values[rows] if turn is None else values[rows] @ turn.T
        made[rows] = np.where(np.abs(part) < HUGE, part, 0)
    return made
