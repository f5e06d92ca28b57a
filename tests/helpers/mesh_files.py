"""Small textured meshes that tests of train.prepare write as files: OBJ, and GLB part by part."""

import io
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def write_obj(
    folder: Path, name: str, faces: str, materials: str = "", image: np.ndarray | None = None
) -> Path:
    """Write an OBJ, and its materials and its texture if given; returns the OBJ's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if image is not None:
        Image.fromarray(image).save(folder / f"{name}.png")
    if materials:
        (folder / f"{name}.mtl").write_text(materials)
        faces = f"mtllib {name}.mtl\n" + faces
    (folder / f"{name}.obj").write_text(faces)
    return folder / f"{name}.obj"


def quad(z: float = 0.0, material: str = "m", uv: float = 0.0, half: float = 0.5) -> str:
    """A square in OBJ axes that faces +z; its texture coordinates start at `uv`."""
    corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
    positions = [f"v {x} {y} {z}" for x, y in corners]
    textures = [f"vt {uv + x / half / 2 + 0.5} {uv + y / half / 2 + 0.5}" for x, y in corners]
    return "\n".join([*positions, *textures, f"usemtl {material}", "f -4/-4 -3/-3 -2/-2 -1/-1", ""])


def box(size=(1.0, 1.0, 1.0), colors: bool = True) -> tuple[str, str]:
    """A box in OBJ axes whose six sides have six colours: text of the OBJ and of the MTL."""
    v = [
        f"v {x * size[0] + 3} {y * size[1]} {z * size[2]}"
        for x in (0, 1)
        for y in (0, 1)
        for z in (0, 1)
    ]
    sides = ["1 2 4 3", "5 7 8 6", "1 5 6 2", "3 4 8 7", "1 3 7 5", "2 6 8 4"]  # -x +x -y +y -z +z
    f = [f"usemtl side{i}\nf {s}" for i, s in enumerate(sides)]
    mtl = [f"newmtl side{i}\nKd {0.2 + 0.1 * i} {0.9 - 0.1 * i} 0.5" for i in range(6)]
    return "\n".join(v + f) + "\n", "\n".join(mtl) + "\n"


class Gltf:
    """A document that grows: arrays become accessors, bytes become buffer views."""

    def __init__(self, **extra):
        self.data = b""
        self.document = {
            "asset": {"version": "2.0"},
            "bufferViews": [],
            "accessors": [],
            "scenes": [{"nodes": [0]}],
        } | extra

    def view(self, data: bytes, **extra) -> int:
        self.data += b"\0" * (-len(self.data) % 4)
        self.document["bufferViews"].append(
            {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data)} | extra
        )
        self.data += data
        return len(self.document["bufferViews"]) - 1

    def array(self, values, dtype="<f4", **extra) -> int:
        values = np.asarray(values, dtype)
        kind = {"f4": 5126, "u1": 5121, "u2": 5123, "u4": 5125, "i1": 5120, "i2": 5122}[
            values.dtype.str[1:]
        ]
        shape = {1: "SCALAR"} if values.ndim < 2 else {2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}
        entry = {
            "componentType": kind,
            "count": len(values),
            "type": shape[1 if values.ndim < 2 else values.shape[1]],
        }
        self.document["accessors"].append(
            entry | {"bufferView": self.view(values.tobytes())} | extra
        )
        return len(self.document["accessors"]) - 1

    def primitive(self, positions, **fields) -> dict:
        attributes = {"POSITION": self.array(positions)} | {
            k: fields.pop(k) for k in list(fields) if k.isupper()
        }
        return {"attributes": attributes} | fields

    def save(self, path: Path, primitives=(), **node) -> Path:
        self.document.setdefault("nodes", [{"mesh": 0} | node])
        self.document.setdefault("meshes", [{"primitives": list(primitives)}])
        self.document["buffers"] = [{"byteLength": len(self.data)}]
        head = json.dumps(self.document).encode()
        head += b" " * (-len(head) % 4)
        body = self.data + b"\0" * (-len(self.data) % 4)
        length = 12 + 8 + len(head) + 8 + len(body)
        chunks = (
            struct.pack("<I4s", len(head), b"JSON")
            + head
            + struct.pack("<I4s", len(body), b"BIN\0")
            + body
        )
        path.write_bytes(struct.pack("<4sII", b"glTF", 2, length) + chunks)
        return path


TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], float)
SQUARE = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], float)
UV = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], float)  # v downwards: the picture upright


def png(pixels) -> bytes:
    """The bytes of a PNG of these pixels."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, "png")
    return stream.getvalue()


def square(gltf: Gltf, uv=UV, **fields) -> dict:
    """A textured square as a primitive of a document."""
    return gltf.primitive(
        SQUARE, TEXCOORD_0=gltf.array(uv), indices=gltf.array([0, 1, 2, 0, 2, 3], "<u2"), **fields
    )


AXES = "property double x\nproperty double y\nproperty double z\n"
HEADER = "ply\nformat {} 1.0\ncomment made by hand\nelement vertex 5\n" + AXES + "{}end_header\n"
POINTS = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [2, 2, 2]], float)


def ply(path: Path, kind: str, head: str, rows: list, faces: list, end: bytes = b"") -> Path:
    """`rows` and `faces`: lists of (format characters, values) of each row."""
    order = {"binary_little_endian": "<", "binary_big_endian": ">"}.get(kind)
    text = HEADER.format(kind, head).encode()
    if order is None:
        text += (
            "\n".join(" ".join(map(str, values)) for _, values in [*rows, *faces]).encode() + b"\n"
        )
    else:
        text += b"".join(struct.pack(order + fmt, *values) for fmt, values in [*rows, *faces])
    path.write_bytes(text + end)
    return path


FACES = "element face 2\nproperty list uchar int vertex_indices\n"
MIXED = [("B4i", (4, 0, 1, 2, 3)), ("B3i", (3, 0, 1, 4))]
