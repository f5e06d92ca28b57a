"""GLB and glTF 2.0 files as triangles (Khronos specification 2.0).

Scene transforms, instances, skins and the default weights of morph targets are applied. The base
colour is texture times factor times vertex colour, multiplied in linear light as the specification
says (textures are sRGB, factors and vertex colours linear). What cannot be shown as meant is a
ValueError with the file's name (compressed geometry, an unknown required extension) or a note
(points and lines, extensions that are not applied).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.meshes.budget import Budget
from train.meshes.colors import unit_colors
from train.meshes.gltf_data import GltfData
from train.meshes.gltf_extensions import DRACO, INSTANCING, VISIBILITY, lost, refused
from train.meshes.gltf_materials import Materials
from train.meshes.pictures import Placement
from train.meshes.surface import Finish, Mesh, assemble, finite, no_faces
from train.meshes.untrusted import MALFORMED, reason

TRIANGLES = 4
STRIP = 5
FAN = 6
TRANSFORMS = {"matrix", "rotation", "scale", "translation"}
PLACE = 600  # bytes of a matrix and of what a part of the mesh takes beside its arrays


def read_gltf(path: Path, root: Path, budget: Budget) -> Mesh:
    """Read a .glb or .gltf; a ValueError names the file and what is wrong with it.

    The files that it names lie below `root`.
    """
    data = GltfData(path, root, budget)
    try:
        return _Reader(data).mesh()
    except MALFORMED as error:
        if isinstance(error, ValueError) and str(error).startswith(path.name):
            raise
        raise ValueError(f"{path.name} cannot be read: {reason(error)}") from error


def gltf_files(path: Path, root: Path, budget: Budget) -> list[Path | None]:
    """List the buffers and images that a .glb or .gltf names; None for one that is absent."""
    return GltfData(path, root, budget).files()


@dataclass
class _Part:
    """One primitive at one node, in world space."""

    vertices: np.ndarray  # [P, 3]
    faces: np.ndarray  # [F, 3]
    normals: np.ndarray  # [P, 3], zero where the file gives none
    uv: np.ndarray  # [P, 2], v downwards
    emission_uv: np.ndarray  # [P, 2]
    tint: np.ndarray  # [P, 3] linear
    finish: Finish


class _Reader:
    def __init__(self, data: GltfData):
        self.data = data
        self.name = data.path.name
        self.notes: dict[str, None] = {}  # an ordered set
        self.materials = Materials(data, self.note)
        if unknown := refused(data.document):
            raise ValueError(f"it needs {', '.join(unknown)}, which is not supported")
        for extension in lost(data.document):
            self.note(f"what {extension} adds is not shown")

    def note(self, text: str) -> None:
        self.notes[f"{self.name}: {text}"] = None

    def mesh(self) -> Mesh:
        world, seen = self._world()
        parts = []
        for number in seen:
            node = self.data.entry("nodes", number)
            if "mesh" in node:
                parts += self._node(node, number, world)
        if not parts:
            raise ValueError(no_faces(self.name, self.notes))
        first = np.cumsum([0, *(len(p.vertices) for p in parts)])
        size = sum(len(p.faces) for p in parts)

        def corners(field: str, width: int, upwards: bool = False) -> np.ndarray:
            made = np.empty((size, 3, width), np.float32)
            row = 0
            for part in parts:
                values = getattr(part, field)
                if upwards:
                    values = np.stack([values[:, 0], 1 - values[:, 1]], 1)
                made[row : row + len(part.faces)] = finite(values)[part.faces]
                row += len(part.faces)
            return made

        uv = corners("uv", 2, upwards=True)
        glows = any(part.emission_uv is not part.uv for part in parts)
        emission_uv = corners("emission_uv", 2, upwards=True) if glows else None
        finishes = list({id(p.finish): p.finish for p in parts}.values())
        rows = {id(finish): row for row, finish in enumerate(finishes)}
        material = np.repeat([rows[id(p.finish)] for p in parts], [len(p.faces) for p in parts])
        return assemble(
            self.name,
            np.concatenate([p.vertices for p in parts]),
            np.concatenate([p.faces + start for p, start in zip(parts, first, strict=False)]),
            corners("normals", 3),
            uv,
            corners("tint", 3),
            material.astype(np.int32),
            [finish.material for finish in finishes],
            self.notes,
            emission_uv=emission_uv,
        )

    def _node(self, node: dict, number: int, world: dict[int, np.ndarray]) -> list[_Part]:
        """The parts of a node's mesh; a ValueError names the mesh and its primitive."""
        parts = []
        where = f"mesh {node['mesh']}"
        try:
            skin = self._skin(node["skin"], world) if "skin" in node else None
            mesh = self.data.entry("meshes", node["mesh"])
            weights = node.get("weights", mesh.get("weights"))
            places = self._instances(node, world[number])
            for i, primitive in enumerate(mesh["primitives"]):
                where = f"mesh {node['mesh']}, primitive {i}"
                parts += self._parts(primitive, places, skin, weights)
        except MALFORMED as error:
            raise ValueError(f"node {number}, {where}: {reason(error)}") from error
        return parts

    # the scene

    def _world(self) -> tuple[dict[int, np.ndarray], list[int]]:
        """Transforms [4, 4] of all nodes, by their numbers, and the nodes that the scene shows.

        Joints may stand outside the scene.
        """
        nodes = self.data.document.get("nodes") or []
        children = {c for node in nodes for c in node.get("children", ())}
        top = sorted(set(range(len(nodes))) - children)
        roots = top
        if self.data.document.get("scenes"):
            roots = self.data.entry("scenes", self.data.document.get("scene", 0)).get("nodes", [])
        world = {}
        shown = []
        still = np.eye(4)
        todo = [(number, still, True) for number in reversed(roots)]
        while todo:
            number, parent, visible = todo.pop()
            node = self.data.entry("nodes", number)
            if number in world:
                raise ValueError(f"node {number} has two places in the scene")
            world[number] = _moved(parent, node)
            visible &= node.get("extensions", {}).get(VISIBILITY, {}).get("visible", True)
            if visible:
                shown.append(number)
            below = reversed(node.get("children", []))
            todo += [(child, world[number], visible) for child in below]
        todo = [(number, still) for number in top if number not in world]
        while todo:
            number, parent = todo.pop()
            if number not in world:
                node = self.data.entry("nodes", number)
                world[number] = _moved(parent, node)
                todo += [(child, world[number]) for child in node.get("children", [])]
        return world, shown

    def _instances(self, node: dict, matrix: np.ndarray) -> list[np.ndarray]:
        """The transforms [4, 4] at which a node's mesh is shown."""
        extension = node.get("extensions", {}).get(INSTANCING)
        if extension is None or "skin" in node:
            return [matrix]
        columns = {
            name: self.data.accessor(extension["attributes"][key]).astype(float)
            for name, key in (
                ("translation", "TRANSLATION"),
                ("rotation", "ROTATION"),
                ("scale", "SCALE"),
            )
            if key in extension["attributes"]
        }
        counts = sorted({len(values) for values in columns.values()})
        if len(counts) != 1:
            raise ValueError(f"its instances have columns of {counts} rows")
        self.data.budget.check(counts[0] * PLACE, f"{counts[0]} instances of mesh {node['mesh']}")
        return [
            matrix @ _local({name: values[row] for name, values in columns.items()})
            for row in range(counts[0])
        ]

    def _skin(self, number: int, world: dict[int, np.ndarray]) -> np.ndarray:
        """The matrices [J, 4, 4] by which joints move a vertex."""
        skin = self.data.entry("skins", number)
        outside = [joint for joint in skin["joints"] if joint not in world]
        if outside:
            raise ValueError(f"joint {outside[0]} of skin {number} is no node with a place")
        joints = np.stack([world[j] for j in skin["joints"]])
        if "inverseBindMatrices" in skin:
            inverse = self.data.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4)
            if len(inverse) < len(joints):
                raise ValueError(
                    f"skin {number} has {len(inverse)} inverse bind matrices for {len(joints)} "
                    "joints"
                )
            # columns first in the file
            joints = joints @ inverse[: len(joints)].transpose(0, 2, 1)
        return joints

    # a primitive

    def _parts(
        self,
        primitive: dict,
        places: list[np.ndarray],
        skin: np.ndarray | None,
        weights: list[float] | None,
    ) -> Iterator[_Part]:
        """The triangles of a primitive at each of its places; none where it shows nothing."""
        mode = primitive.get("mode", TRIANGLES)
        attributes = primitive["attributes"]
        if mode not in (TRIANGLES, STRIP, FAN):
            self.note("its points and lines are not shown")
            return
        if "POSITION" not in attributes:
            self.note("a primitive without positions is not shown")
            return
        self._refuse_draco(primitive)
        vertices = self._attribute(primitive, "POSITION", weights)
        normals = self._attribute(primitive, "NORMAL", weights)
        P = len(vertices)
        index = np.arange(P)
        if "indices" in primitive:
            index = self.data.accessor(primitive["indices"])[:, 0].astype(np.int64)
        if len(index) and index.max() >= P:
            raise ValueError(f"a face uses vertex {index.max()} of {P}")
        faces = _triangles(index, mode)
        if skin is not None:
            moved = self._skinned(attributes, skin)
            if moved is not None:  # the node's own transform does not apply
                places = [moved]
        color = self._attribute(primitive, "COLOR_0", weights, raw=True)
        tint = np.ones((P, 3)) if color is None else self._tint(color)
        finish = self.materials[primitive.get("material"), color is not None]
        material = finish.material
        self.data.budget.take(len(places) * PLACE, f"{len(places)} instances")
        self.data.budget.take_faces(len(places) * len(faces), len(places) * P)
        uv = self._uv(primitive, weights, finish.placement, material.texture is not None, P)
        glows = material.emission_texture is not None
        emission_uv = uv
        if glows:
            emission_uv = self._uv(primitive, weights, finish.emission_placement, glows, P)
        for matrix in places:
            linear = matrix[..., :3, :3]
            placed = np.einsum("...ij,...j->...i", linear, vertices) + matrix[..., :3, 3]
            turned = np.zeros((P, 3))
            if normals is not None:
                turned = np.einsum("...ji,...j->...i", np.linalg.pinv(linear), normals)
            yield _Part(placed, faces, turned, uv, emission_uv, tint, finish)

    def _refuse_draco(self, primitive: dict) -> None:
        """ValueError for a primitive whose data are compressed; some have others beside."""
        used = [*primitive["attributes"].values()]
        if "indices" in primitive:
            used.append(primitive["indices"])
        entries = [self.data.entry("accessors", number) for number in used]
        plain = all("bufferView" in entry or "sparse" in entry for entry in entries)
        if DRACO in primitive.get("extensions", {}) and not plain:
            raise ValueError(f"its geometry is compressed ({DRACO}), which is not supported")

    def _attribute(
        self, primitive: dict, name: str, weights: list[float] | None, raw: bool = False
    ) -> np.ndarray | None:
        """An attribute, moved by the morph targets that have a weight; None where it is absent.

        Floating point, but as the file has it if `raw`.
        """
        attributes = primitive["attributes"]
        if name not in attributes:
            return None
        values = self.data.accessor(attributes[name])
        values = values if raw else values.astype(float)
        targets = primitive.get("targets") or []
        if not targets or not weights:
            return values
        if len(weights) != len(targets):
            raise ValueError(f"{len(weights)} weights for {len(targets)} morph targets")
        for weight, target in zip(weights, targets, strict=True):
            if weight and name in target:
                change = self.data.accessor(target[name])
                if change.shape != values.shape:
                    raise ValueError(
                        f"a morph target changes {len(change)} rows of the {len(values)} of {name}"
                    )
                values = values + float(weight) * change
        return values

    def _tint(self, color: np.ndarray) -> np.ndarray:
        """Vertex colours [P, 3] in [0, 1], linear."""
        if color.shape[1] == 4:
            alpha, _ = unit_colors(color[:, 3:], "alpha of vertex")
            if len(alpha) and alpha.min() < 1:
                self.note("the alpha of vertex colours is not shown")
        tint, note = unit_colors(color[:, :3], "vertex")
        if note:
            self.note(note)
        return tint

    def _skinned(self, attributes: dict, skin: np.ndarray) -> np.ndarray | None:
        """The transform [P, 4, 4] of each vertex that joints move; None where none are named.

        Four joints and weights a set, in as many sets as there are.
        """
        sets = sorted(int(n[8:]) for n in attributes if re.fullmatch(r"WEIGHTS_\d+", n))
        sets = [n for n in sets if f"JOINTS_{n}" in attributes]
        if not sets:
            return None
        weight = np.concatenate([self.data.accessor(attributes[f"WEIGHTS_{n}"]) for n in sets], 1)
        joint = np.concatenate([self.data.accessor(attributes[f"JOINTS_{n}"]) for n in sets], 1)
        weight = weight.astype(float)
        joint = joint.astype(np.int64)
        if not np.isfinite(weight).all():
            row = int(np.flatnonzero(~np.isfinite(weight).all(1))[0])
            raise ValueError(f"vertex {row} hangs on its joints by {weight[row].tolist()}")
        free = weight.sum(1) <= 0
        if free.any():
            self.note(f"vertices without weight: {free.sum()}, which follow their first joint")
            weight[free] = 0
            weight[free, 0] = 1
        joint[weight == 0] = 0  # exporters leave any number there
        if joint.size and joint.max() >= len(skin):
            raise ValueError(f"a vertex hangs on joint {joint.max()} of {len(skin)}")
        matrix = np.zeros((len(weight), 4, 4))
        for column in range(weight.shape[1]):
            matrix += weight[:, column, None, None] * skin[joint[:, column]]
        return matrix / weight.sum(1)[:, None, None]

    def _uv(
        self,
        primitive: dict,
        weights: list[float] | None,
        placement: Placement,
        textured: bool,
        P: int,
    ) -> np.ndarray:
        """Texture coordinates [P, 2], v downwards, where a material places its texture."""
        uv = self._attribute(primitive, f"TEXCOORD_{placement.coordinates}", weights)
        if uv is None:
            if textured:
                self.note("faces of a textured material have no texture coordinates")
            return np.zeros((P, 2))
        return placement(uv)


def _triangles(index: np.ndarray, mode: int) -> np.ndarray:
    """[F, 3] of a list, a strip (every other triangle turned) or a fan."""
    if mode == TRIANGLES:
        if len(index) % 3:
            raise ValueError(f"{len(index)} indices are no whole number of triangles")
        return index.reshape(-1, 3)
    k = np.arange(max(len(index) - 2, 0))
    if not len(k):
        return index[:0].reshape(0, 3)
    if mode == FAN:
        return np.stack([index[k * 0], index[k + 1], index[k + 2]], 1)
    odd = k % 2
    return np.stack([index[k], index[k + 1 + odd], index[k + 2 - odd]], 1)


def _moved(parent: np.ndarray, node: dict) -> np.ndarray:
    """The transform of a node below `parent`: the same array where it has none of its own."""
    return parent @ _local(node) if TRANSFORMS & node.keys() else parent


def _local(node: dict) -> np.ndarray:
    if "matrix" in node:
        return np.array(node["matrix"], float).reshape(4, 4).T
    x, y, z, w = np.array(node.get("rotation", (0, 0, 0, 1)), float)
    turn = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    local = np.eye(4)
    local[:3, :3] = np.array(turn) * np.array(node.get("scale", (1, 1, 1)), float)
    local[:3, 3] = node.get("translation", (0, 0, 0))
    return local
