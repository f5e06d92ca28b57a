"""GLB and glTF 2.0 files as triangles (Khronos specification 2.0).

Scene transforms, instances and skins are applied. Of a material the base colour is taken: texture
times factor times vertex colour, multiplied in linear light as the specification says (textures are
sRGB, factors and vertex colours linear); of the old specular-glossiness extension, the diffuse
colour. What cannot be shown as meant is a ValueError with the file's name (compressed geometry, an
unknown required extension) or a note (points and lines, morph targets, texture borders that do not
repeat).
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from train.meshes.gltf_data import GLOSSINESS, UNDERSTOOD, GltfData
from train.meshes.surface import GREY, Material, Mesh, assemble, decode, find
from train.meshes.untrusted import MALFORMED, reason

REPEAT = 10497
TRIANGLES = 4
STRIP = 5
FAN = 6


def read_gltf(path: Path) -> Mesh:
    """Read a .glb or .gltf; a ValueError names the file and what is wrong with it."""
    data = GltfData(path)
    try:
        return _Reader(data).mesh()
    except MALFORMED as error:
        if isinstance(error, ValueError) and str(error).startswith(path.name):
            raise
        raise ValueError(f"{path.name} cannot be read: {reason(error)}") from error


def gltf_files(path: Path) -> list[Path | None]:
    """List the buffers and images that a .glb or .gltf names; None for one that is absent."""
    document = GltfData(path).document
    entries = [entry for table in ("buffers", "images") for entry in document.get(table) or []]
    uris = [entry["uri"] for entry in entries if "uri" in entry]
    names = [unquote(uri) for uri in uris if not uri.startswith("data:")]
    return [find(path.parent, name) for name in names]


@dataclass
class _Part:
    """One primitive at one node, in world space."""

    vertices: np.ndarray  # [P, 3]
    faces: np.ndarray  # [F, 3]
    normals: np.ndarray  # [P, 3], zero where the file gives none
    uv: np.ndarray  # [P, 2], v downwards
    tint: np.ndarray  # [P, 3] linear
    material: Material


class _Reader:
    def __init__(self, data: GltfData):
        self.data = data
        self.name = data.path.name
        self.notes: dict[str, None] = {}  # an ordered set
        self.pictures: dict[int, np.ndarray] = {}
        required = set(data.document.get("extensionsRequired", ()))
        unknown = {
            e for e in required if e not in UNDERSTOOD and not e.startswith("KHR_materials_")
        }
        if unknown:
            raise ValueError(f"it needs {', '.join(sorted(unknown))}, which is not supported")

    def note(self, text: str) -> None:
        self.notes[f"{self.name}: {text}"] = None

    def mesh(self) -> Mesh:
        world = self._world()
        parts = []
        for number, matrix in world.items():
            node = self.data.entry("nodes", number)
            if "mesh" in node:
                skin = self._skin(node["skin"], world) if "skin" in node else None
                for primitive in self.data.entry("meshes", node["mesh"])["primitives"]:
                    parts += self._part(primitive, matrix, skin)
        if not parts:
            raise ValueError(f"{self.name} has no faces")
        first = np.cumsum([0, *(len(p.vertices) for p in parts)])

        def corners(field: str) -> np.ndarray:
            return np.concatenate([getattr(p, field)[p.faces] for p in parts])

        uv = corners("uv")
        uv[..., 1] = 1 - uv[..., 1]
        return assemble(
            self.name,
            np.concatenate([p.vertices for p in parts]),
            np.concatenate([p.faces + start for p, start in zip(parts, first, strict=False)]),
            corners("normals"),
            uv,
            corners("tint"),
            np.repeat(np.arange(len(parts)), [len(p.faces) for p in parts]),
            [p.material for p in parts],
            self.notes,
        )

    # the scene

    def _world(self) -> dict[int, np.ndarray]:
        """Transforms [4, 4] of all nodes of the scene to show, by node number."""
        nodes = self.data.document.get("nodes") or []
        if self.data.document.get("scenes"):
            roots = self.data.entry("scenes", self.data.document.get("scene", 0)).get("nodes", [])
        else:
            roots = sorted(
                set(range(len(nodes))) - {c for node in nodes for c in node.get("children", ())}
            )
        world = {}
        todo = [(number, np.eye(4)) for number in reversed(roots)]
        while todo:
            number, parent = todo.pop()
            node = self.data.entry("nodes", number)
            if number in world:
                raise ValueError(f"node {number} has two places in the scene")
            world[number] = parent @ _local(node)
            todo += [(child, world[number]) for child in reversed(node.get("children", []))]
        return world

    def _skin(self, number: int, world: dict[int, np.ndarray]) -> np.ndarray:
        """The matrices [J, 4, 4] by which joints move a vertex."""
        skin = self.data.entry("skins", number)
        joints = np.stack([world[j] for j in skin["joints"]])
        if "inverseBindMatrices" in skin:
            inverse = self.data.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4)
            joints = joints @ inverse.transpose(0, 2, 1)  # columns first in the file
        return joints

    def _part(self, primitive: dict, matrix: np.ndarray, skin: np.ndarray | None) -> list[_Part]:
        """The triangles of a primitive in world space; none where it shows nothing."""
        mode = primitive.get("mode", TRIANGLES)
        attributes = primitive["attributes"]
        if mode not in (TRIANGLES, STRIP, FAN):
            self.note("its points and lines are not shown")
            return []
        if "POSITION" not in attributes:
            self.note("a primitive without positions is not shown")
            return []
        if primitive.get("targets"):
            self.note("morph targets are not applied")
        vertices = self._attribute(attributes, "POSITION")
        normals = self._attribute(attributes, "NORMAL")
        color = self._attribute(attributes, "COLOR_0")
        P = len(vertices)
        index = np.arange(P)
        if "indices" in primitive:
            index = self.data.accessor(primitive["indices"])[:, 0].astype(np.int64)
        if len(index) and index.max() >= P:
            raise ValueError(f"a face uses vertex {index.max()} of {P}")
        faces = _triangles(index, mode)
        if skin is not None:  # the node's own transform does not apply
            matrix = self._skinned(attributes, skin)
        linear = matrix[..., :3, :3]
        vertices = np.einsum("...ij,...j->...i", linear, vertices) + matrix[..., :3, 3]
        if normals is None:
            normals = np.zeros((P, 3))
        else:
            normals = np.einsum("...ji,...j->...i", np.linalg.pinv(linear), normals)
        material, place = self._material(primitive.get("material"), color is not None)
        uv = self._uv(attributes, place, material, P)
        tint = np.ones((P, 3)) if color is None else color[:, :3]
        if color is not None and color.shape[1] == 4 and color[:, 3].min() < 1:
            self.note("the alpha of vertex colours is not shown")
        return [_Part(vertices, faces, normals, uv, tint, material)]

    def _attribute(self, attributes: dict, name: str) -> np.ndarray | None:
        if name not in attributes:
            return None
        return self.data.accessor(attributes[name]).astype(float)

    def _skinned(self, attributes: dict, skin: np.ndarray) -> np.ndarray:
        """The transform [P, 4, 4] of each vertex that joints move."""
        weight = self._attribute(attributes, "WEIGHTS_0")
        joint = self._attribute(attributes, "JOINTS_0")
        if weight is None or joint is None:
            raise ValueError("a primitive that a skin moves has no WEIGHTS_0 or no JOINTS_0")
        if len(joint) and joint.max() >= len(skin):
            raise ValueError(f"a vertex hangs on joint {joint.max():.0f} of {len(skin)}")
        matrix = np.einsum("pk,pkij->pij", weight, skin[joint.astype(int)])
        return matrix / np.maximum(weight.sum(1), 1e-12)[:, None, None]

    def _uv(self, attributes: dict, place: dict, material: Material, P: int) -> np.ndarray:
        """Texture coordinates [P, 2], v downwards."""
        uv = self._attribute(attributes, f"TEXCOORD_{place.get('texCoord', 0)}")
        if uv is None and material.texture is not None:
            self.note("faces of a textured material have no texture coordinates")
        if uv is None:
            uv = np.zeros((P, 2))
        else:
            uv = uv * place.get("scale", (1, 1)) + place.get("offset", (0, 0))
        outside = len(uv) and not (-1e-3 <= uv.min() and uv.max() <= 1 + 1e-3)
        if place.get("clamped") and outside:
            self.note("a texture that ends at its border is repeated instead")
        return uv

    # materials

    def _material(self, number: int | None, colored: bool) -> tuple[Material, dict]:
        """A material, and how its texture is placed: texCoord, offset, scale, clamped."""
        if number is None:
            return Material((1.0, 1.0, 1.0), linear=True) if colored else Material(GREY), {}
        material = self.data.entry("materials", number)
        base = material.get("pbrMetallicRoughness", {})
        factor = "baseColorFactor"
        slot = "baseColorTexture"
        if GLOSSINESS in material.get("extensions", {}):
            base = material["extensions"][GLOSSINESS]
            factor = "diffuseFactor"
            slot = "diffuseTexture"
        r, g, b, opacity = (float(x) for x in base.get(factor, (1, 1, 1, 1)))
        texture = None
        place = {}
        mode = material.get("alphaMode", "OPAQUE")
        if slot in base:
            texture, place = self._texture(base[slot], material.get("name", number))
        if mode == "MASK":
            cutoff = material.get("alphaCutoff", 0.5)
            if texture is None:
                opacity = float(opacity >= cutoff)
            else:
                texture[..., 3] = np.where(texture[..., 3] / 255 * opacity >= cutoff, 255, 0)
                opacity = 1.0
        elif mode != "BLEND":
            opacity = 1.0
            if texture is not None:
                texture[..., 3] = 255
        return Material((r, g, b), min(max(opacity, 0.0), 1.0), texture, linear=True), place

    def _texture(self, info: dict, material) -> tuple[np.ndarray, dict]:
        texture = self.data.entry("textures", info["index"])
        place = dict(info)
        place |= info.get("extensions", {}).get("KHR_texture_transform", {})
        if place.get("rotation"):
            raise ValueError(
                f"texture of material {material!r} is turned by {place['rotation']}, which is "
                "not supported"
            )
        sampler = {}
        if "sampler" in texture:
            sampler = self.data.entry("samplers", texture["sampler"])
        place["clamped"] = {sampler.get("wrapS", REPEAT), sampler.get("wrapT", REPEAT)} != {REPEAT}
        webp = texture.get("extensions", {}).get("EXT_texture_webp", {})
        source = webp.get("source", texture.get("source"))
        if source is None:
            raise ValueError(
                f"texture of material {material!r} is in no format that can be read: {texture}"
            )
        if source not in self.pictures:
            self.pictures[source] = self._picture(source, material)
        return self.pictures[source].copy(), place

    def _picture(self, number: int, material) -> np.ndarray:
        image = self.data.entry("images", number)
        if "bufferView" in image:
            data = self.data.view(image["bufferView"])
        else:
            data = self.data.file(image["uri"])
        uri = image.get("uri", "")
        short_uri = uri if len(uri) < 99 else ""
        label = repr(image.get("name") or short_uri or number)
        return decode(data, self.name, f"{label} of material {material!r}")


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
