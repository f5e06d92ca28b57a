"""GLB and glTF 2.0 files as triangles (Khronos specification 2.0): scene transforms, instances and
skins applied.

Of a material the base colour is taken: texture times factor times vertex colour, multiplied in
linear light as the specification says (textures are sRGB, factors and vertex colours linear); of
the old specular-glossiness extension, the diffuse colour. What cannot be shown as meant is a
ValueError with the file's name (compressed geometry, an unknown required extension) or a note
(points and lines, morph targets, texture borders that do not repeat).
"""

import base64
import binascii
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from train.meshes.surface import GREY, Material, Mesh, assemble, decode, find
from train.meshes.untrusted import MALFORMED, expect, reason

TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
REPEAT = 10497
TRIANGLES = 4
STRIP = 5
FAN = 6
GLOSSINESS = "KHR_materials_pbrSpecularGlossiness"
# of those that a file may require
UNDERSTOOD = {"KHR_texture_transform", "EXT_texture_webp", "KHR_mesh_quantization"}
TABLES = (
    "accessors",
    "buffers",
    "bufferViews",
    "images",
    "materials",
    "meshes",
    "nodes",
    "samplers",
    "scenes",
    "skins",
    "textures",
)
KINDS = {  # of the fields of their entries that are read, wherever they stand in one
    str: ("uri", "type", "alphaMode"),
    int: (
        "byteLength",
        "byteOffset",
        "byteStride",
        "buffer",
        "bufferView",
        "componentType",
        "count",
        "index",
        "material",
        "mesh",
        "mode",
        "sampler",
        "skin",
        "source",
        "texCoord",
        "inverseBindMatrices",
    ),
    list: ("children", "nodes", "joints", "primitives", "baseColorFactor", "diffuseFactor"),
    dict: (
        "attributes",
        "extensions",
        "sparse",
        "pbrMetallicRoughness",
        "baseColorTexture",
        "diffuseTexture",
    ),
}
KIND_OF = {field: kind for kind, fields in KINDS.items() for field in fields}
FEW = 1 << 26  # values of an accessor without data of its own: nothing in the file limits them


def read_gltf(path: Path) -> Mesh:
    """Read a .glb or .gltf; a ValueError names the file and what is wrong with it."""
    document, binary = _document(path)
    try:
        return _Reader(path, document, binary).mesh()
    except MALFORMED as error:
        if isinstance(error, ValueError) and str(error).startswith(path.name):
            raise
        raise ValueError(f"{path.name} cannot be read: {reason(error)}") from error


def gltf_files(path: Path) -> list[str]:
    """The files that a .glb or .gltf names: buffers and images."""
    document, _ = _document(path)
    entries = [entry for table in ("buffers", "images") for entry in document.get(table) or []]
    return [
        unquote(entry["uri"])
        for entry in entries
        if not entry.get("uri", "data:").startswith("data:")
    ]


def _document(path: Path) -> tuple[dict, bytes | None]:
    """The JSON of a file and, of a GLB, its binary chunk."""
    data = path.read_bytes()
    binary = None
    if not data:
        raise ValueError(f"{path.name} is empty")
    try:
        if path.suffix.lower() == ".glb":
            if len(data) < 12 or data[:4] != b"glTF":
                raise ValueError(f"no GLB header in its {len(data)} bytes")
            version, length = struct.unpack_from("<II", data, 4)
            if version != 2:
                raise ValueError(f"glTF version {version}, not 2")
            if len(data) < length:
                raise ValueError(
                    f"truncated: its header says {length} bytes, the file has {len(data)}"
                )
            chunks = {}
            at = 12
            while at + 8 <= length:
                size, kind = struct.unpack_from("<I4s", data, at)
                chunks.setdefault(kind, data[at + 8 : at + 8 + size])
                at += 8 + size
            if b"JSON" not in chunks:
                raise ValueError(f"no JSON chunk in its {length} bytes")
            data = chunks[b"JSON"]
            binary = chunks.get(b"BIN\0")
        document = json.loads(data)
        if not isinstance(document, dict) or not str(document["asset"]["version"]).startswith("2"):
            raise ValueError("it is not glTF 2.0")
        for table in TABLES:
            for i, entry in enumerate(expect(document.get(table) or [], list, table)):
                _check(expect(entry, dict, f"{table}[{i}]"), f"{table}[{i}]")
    except MALFORMED as error:
        raise ValueError(f"{path.name} cannot be read: {reason(error)}") from error
    return document, binary


def _check(value, where: str) -> None:
    """ValueError that says where a field is of another kind than KINDS says."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in KIND_OF:
                expect(inner, KIND_OF[name], f"{where}.{name}")
            if name == "extensions":  # others may mean other things by the same names
                inner = {
                    extension: inner[extension]
                    for extension in (GLOSSINESS, *UNDERSTOOD)
                    if extension in inner
                }
            if name != "extras":
                _check(inner, f"{where}.{name}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check(inner, f"{where}[{i}]")


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
    def __init__(self, path: Path, document: dict, binary: bytes | None):
        self.path = path
        self.name = path.name
        self.document = document
        self.binary = binary
        self.notes: dict[str, None] = {}  # an ordered set
        self.pictures: dict[int, np.ndarray] = {}
        self.buffers: dict[int, bytes] = {}
        required = set(document.get("extensionsRequired", ()))
        unknown = {
            e for e in required if e not in UNDERSTOOD and not e.startswith("KHR_materials_")
        }
        if unknown:
            raise ValueError(f"it needs {', '.join(sorted(unknown))}, which is not supported")

    def note(self, text: str) -> None:
        self.notes[f"{self.name}: {text}"] = None

    def _entry(self, table: str, number: int) -> dict:
        entries = self.document.get(table) or []
        if type(number) is not int or not 0 <= number < len(entries):
            raise ValueError(f"it uses number {number!r} of its {len(entries)} {table}")
        return entries[number]

    def mesh(self) -> Mesh:
        world = self._world()
        parts = []
        for number, matrix in world.items():
            node = self._entry("nodes", number)
            if "mesh" in node:
                skin = self._skin(node["skin"], world) if "skin" in node else None
                for primitive in self._entry("meshes", node["mesh"])["primitives"]:
                    parts += self._part(primitive, matrix, skin)
        if not parts:
            raise ValueError(f"{self.name} has no faces")
        first = np.cumsum([0, *(len(p.vertices) for p in parts)])
        corners = lambda field: np.concatenate([getattr(p, field)[p.faces] for p in parts])
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
        """Node number -> its transform [4, 4], of all nodes of the scene to show."""
        nodes = self.document.get("nodes") or []
        if self.document.get("scenes"):
            roots = self._entry("scenes", self.document.get("scene", 0)).get("nodes", [])
        else:
            roots = sorted(
                set(range(len(nodes))) - {c for node in nodes for c in node.get("children", ())}
            )
        world = {}
        todo = [(number, np.eye(4)) for number in reversed(roots)]
        while todo:
            number, parent = todo.pop()
            node = self._entry("nodes", number)
            if number in world:
                raise ValueError(f"node {number} has two places in the scene")
            world[number] = parent @ _local(node)
            todo += [(child, world[number]) for child in reversed(node.get("children", []))]
        return world

    def _skin(self, number: int, world: dict[int, np.ndarray]) -> np.ndarray:
        """What each joint does to a vertex, [J, 4, 4]."""
        skin = self._entry("skins", number)
        joints = np.stack([world[j] for j in skin["joints"]])
        if "inverseBindMatrices" in skin:
            joints = joints @ self._accessor(skin["inverseBindMatrices"]).reshape(
                -1, 4, 4
            ).transpose(0, 2, 1)
        return joints

    def _part(self, primitive: dict, matrix: np.ndarray, skin: np.ndarray | None) -> list[_Part]:
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
        get = lambda name: (
            self._accessor(attributes[name]).astype(float) if name in attributes else None
        )
        vertices, normals, color = get("POSITION"), get("NORMAL"), get("COLOR_0")
        P = len(vertices)
        index = (
            self._accessor(primitive["indices"])[:, 0].astype(np.int64)
            if "indices" in primitive
            else np.arange(P)
        )
        if len(index) and index.max() >= P:
            raise ValueError(f"a face uses vertex {index.max()} of {P}")
        faces = _triangles(index, mode)
        if skin is not None:  # the node's own transform does not apply
            weight, joint = get("WEIGHTS_0"), get("JOINTS_0")
            if weight is None or joint is None:
                raise ValueError("a primitive that a skin moves has no WEIGHTS_0 or no JOINTS_0")
            if len(joint) and joint.max() >= len(skin):
                raise ValueError(f"a vertex hangs on joint {joint.max():.0f} of {len(skin)}")
            matrix = np.einsum("pk,pkij->pij", weight, skin[joint.astype(int)])
            matrix = matrix / np.maximum(weight.sum(1), 1e-12)[:, None, None]
        vertices = np.einsum("...ij,...j->...i", matrix[..., :3, :3], vertices) + matrix[..., :3, 3]
        if normals is None:
            normals = np.zeros((P, 3))
        else:
            normals = np.einsum("...ji,...j->...i", np.linalg.pinv(matrix[..., :3, :3]), normals)
        material, coords = self._material(primitive.get("material"), color is not None)
        uv = get(f"TEXCOORD_{coords.get('texCoord', 0)}")
        if material.texture is not None and uv is None:
            self.note("faces of a textured material have no texture coordinates")
        uv = (
            np.zeros((P, 2))
            if uv is None
            else uv * coords.get("scale", (1, 1)) + coords.get("offset", (0, 0))
        )
        if coords.get("clamped") and len(uv) and not (-1e-3 <= uv.min() and uv.max() <= 1 + 1e-3):
            self.note("a texture that ends at its border is repeated instead")
        tint = np.ones((P, 3)) if color is None else color[:, :3]
        if color is not None and color.shape[1] == 4 and color[:, 3].min() < 1:
            self.note("the alpha of vertex colours is not shown")
        return [_Part(vertices, faces, normals, uv, tint, material)]

    # materials

    def _material(self, number: int | None, colored: bool) -> tuple[Material, dict]:
        """A material, and where its texture takes its coordinates: texCoord, offset, scale,
        clamped.
        """
        if number is None:
            return Material((1.0, 1.0, 1.0), linear=True) if colored else Material(GREY), {}
        material = self._entry("materials", number)
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
        texture = self._entry("textures", info["index"])
        place = dict(info)
        place |= info.get("extensions", {}).get("KHR_texture_transform", {})
        if place.get("rotation"):
            raise ValueError(
                f"texture of material {material!r} is turned by {place['rotation']}, which is "
                "not supported"
            )
        sampler = self._entry("samplers", texture["sampler"]) if "sampler" in texture else {}
        place["clamped"] = {sampler.get("wrapS", REPEAT), sampler.get("wrapT", REPEAT)} != {REPEAT}
        source = (
            texture.get("extensions", {})
            .get("EXT_texture_webp", {})
            .get("source", texture.get("source"))
        )
        if source is None:
            raise ValueError(
                f"texture of material {material!r} is in no format that can be read: {texture}"
            )
        if source not in self.pictures:
            image = self._entry("images", source)
            data = (
                self._view(image["bufferView"])
                if "bufferView" in image
                else self._file(image["uri"])
            )
            label = repr(
                image.get("name")
                or (image.get("uri", "") if len(image.get("uri", "")) < 99 else "")
                or source
            )
            self.pictures[source] = decode(data, self.name, f"{label} of material {material!r}")
        return self.pictures[source].copy(), place

    # numbers

    def _file(self, uri: str) -> bytes:
        if uri.startswith("data:"):
            head, _, body = uri.partition(",")
            try:
                return (
                    base64.b64decode(body, validate=True)
                    if head.endswith(";base64")
                    else unquote(body).encode("latin-1")
                )
            except binascii.Error as error:
                raise ValueError(f"data of {head} is not base64: {error}") from error
        found = find(self.path.parent, unquote(uri))
        if found is None:
            raise ValueError(f"{unquote(uri)!r} does not exist")
        return found.read_bytes()

    def _buffer(self, number: int) -> bytes:
        if number not in self.buffers:
            buffer = self._entry("buffers", number)
            data = (
                self._file(buffer["uri"])
                if "uri" in buffer
                else self.binary
                if number == 0
                else None
            )
            if data is None:
                raise ValueError(f"buffer {number} has no data")
            if len(data) < buffer["byteLength"]:
                raise ValueError(
                    f"buffer {number} has {len(data)} of its {buffer['byteLength']} bytes"
                )
            self.buffers[number] = data
        return self.buffers[number]

    def _view(self, number: int) -> bytes:
        view = self._entry("bufferViews", number)
        begin = view.get("byteOffset", 0)
        length = view["byteLength"]
        data = self._buffer(view["buffer"])[begin : begin + length]
        if len(data) < length:
            raise ValueError(f"buffer view {number} has {len(data)} of its {length} bytes")
        return data

    def _accessor(self, number: int) -> np.ndarray:
        """[count, width] of integers or, normalised ones included, floats."""
        entry = self._entry("accessors", number)
        if entry["componentType"] not in TYPES or entry["type"] not in WIDTHS:
            raise ValueError(
                f"accessor {number} is of {entry['componentType']} {entry['type']}, which glTF "
                "2.0 does not know"
            )
        dtype = np.dtype(TYPES[entry["componentType"]])
        width = WIDTHS[entry["type"]]
        count = entry["count"]
        if "bufferView" in entry:
            stride = (
                self._entry("bufferViews", entry["bufferView"]).get("byteStride")
                or dtype.itemsize * width
            )
            data = self._view(entry["bufferView"])
            begin = entry.get("byteOffset", 0)
            values = _strided(data, begin, count, width, stride, dtype, number)
        elif count * width > FEW:
            raise ValueError(f"accessor {number} has {count} rows but no data")
        else:
            values = np.zeros((count, width), dtype)
        if sparse := entry.get("sparse"):
            rows, new = sparse["indices"], sparse["values"]
            kind = np.dtype(TYPES[rows["componentType"]])
            data = self._view(rows["bufferView"])
            begin = rows.get("byteOffset", 0)
            count = sparse["count"]
            at = _strided(data, begin, count, 1, kind.itemsize, kind, number)[:, 0]
            data = self._view(new["bufferView"])
            begin = new.get("byteOffset", 0)
            values[at] = _strided(data, begin, count, width, dtype.itemsize * width, dtype, number)
        if entry.get("normalized") and dtype.kind in "iu":
            values = np.maximum(values / np.iinfo(dtype).max, -1.0)
        return values


def _strided(
    data: bytes, begin: int, count: int, width: int, stride: int, dtype: np.dtype, number: int
) -> np.ndarray:
    needed = begin + (stride * (count - 1) + dtype.itemsize * width if count else 0)
    if needed > len(data) or min(begin, count) < 0:
        raise ValueError(f"accessor {number} needs {needed} bytes of a buffer view of {len(data)}")
    if not count:
        return np.zeros((0, width), dtype)
    return np.ndarray((count, width), dtype, data, begin, (stride, dtype.itemsize)).copy()


def _triangles(index: np.ndarray, mode: int) -> np.ndarray:
    """[F, 3] of a list, a strip (every other triangle turned) or a fan."""
    if mode == TRIANGLES:
        if len(index) % 3:
            raise ValueError(f"{len(index)} indices are no whole number of triangles")
        return index.reshape(-1, 3)
    k = np.arange(max(len(index) - 2, 0))
    if mode == FAN:
        return (
            np.stack([index[k * 0], index[k + 1], index[k + 2]], 1)
            if len(k)
            else index[:0].reshape(0, 3)
        )
    odd = k % 2
    return (
        np.stack([index[k], index[k + 1 + odd], index[k + 2 - odd]], 1)
        if len(k)
        else index[:0].reshape(0, 3)
    )


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
