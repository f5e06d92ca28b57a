"""Small mesh files of every format and what strangers and disks do to them: bytes flipped, ends
cut, parts of another type.
"""

import json
import struct
from pathlib import Path

import numpy as np

from tests.helpers.mesh_files import TRIANGLE, Gltf, box, png, square, write_obj

WORDS = [
    "",
    "-1",
    "0",
    "1e999",
    "nan",
    "3.5",
    "9" * 30,
    "x",
    "\u0663",
    "a/b/c",
    "1//",
    "..",
    "/",
    "list",
    "-halo",
]
VALUES = [
    None,
    True,
    -1,
    0,
    5,
    1 << 40,
    1e999,
    float("nan"),
    0.5,
    "",
    "x",
    "\ud800",
    "data:,",
    [],
    [[]],
    [5],
    {},
    {"a": 1},
]
POINTS = "0 0 0 9 9 9\n1 0 0 9 9 9\n1 1 0 9 9 9\n0 1 0 9 9 9\n"
HEADER = (
    "ply\nformat {} 1.0\nelement vertex 4\n{}{}element face 2\nproperty list uchar int "
    "vertex_indices\nend_header\n"
)


def pristine(folder: Path) -> list[Path]:
    """The files of a folder that are damaged: every mesh, and what an OBJ and a glTF name."""
    picture = np.full((4, 4, 4), 200, np.uint8)
    text, mtl = box()
    write_obj(
        folder,
        "colors",
        text + "vt 0 0\nvt 1 1\nvn 0 0 1\nf 1/1/1 2/2/1 4/1/1\n",
        mtl + "d 0.5\nTr 0.2\n",
    )
    write_obj(
        folder,
        "painted",
        text,
        "newmtl side0\nKd 1 1 1\nmap_Kd -clamp on painted.png\nmap_d painted.png\n",
        picture,
    )
    gltf = Gltf(
        images=[{"bufferView": 0}],
        textures=[{"source": 0, "sampler": 0}],
        samplers=[{"wrapS": 33071}],
    )
    gltf.view(png(picture))
    base = {
        "baseColorTexture": {"index": 0, "extensions": {"KHR_texture_transform": {"scale": [1, 2]}}}
    }
    gltf.document["materials"] = [{"name": "m", "alphaMode": "MASK", "pbrMetallicRoughness": base}]
    gltf.document["skins"] = [
        {
            "joints": [1, 2],
            "inverseBindMatrices": gltf.array(np.stack([np.eye(4)] * 2).reshape(2, 16)),
        }
    ]
    skinned = gltf.primitive(
        TRIANGLE,
        JOINTS_0=gltf.array([[0, 1, 0, 0]] * 3, "<u1"),
        WEIGHTS_0=gltf.array([[0.5, 0.5, 0, 0]] * 3),
        mode=5,
        COLOR_0=gltf.array([[1, 0, 0, 1]] * 3),
        NORMAL=gltf.array([[0, 0, 1]] * 3),
    )
    sparse = {"count": 1, "indices": {"bufferView": gltf.view(b"\2\0"), "componentType": 5123}}
    gltf.document["accessors"][gltf.array(TRIANGLE)]["sparse"] = sparse | {
        "values": {"bufferView": gltf.view(bytes(12))}
    }
    turned = {"translation": [1, 0, 0], "rotation": [0, 0, 0, 1]}
    same = {"matrix": np.eye(4).ravel().tolist()}
    gltf.document["nodes"] = [{"mesh": 0, "skin": 0}, {"children": [2]}, turned, {"mesh": 1} | same]
    gltf.document["scenes"] = [{"nodes": [0, 1, 3]}]
    gltf.document["meshes"] = [
        {"primitives": [skinned]},
        {"primitives": [square(gltf, material=0)]},
    ]
    gltf.save(folder / "whole.glb")
    document = gltf.document | {"buffers": [{"uri": "parts.bin", "byteLength": len(gltf.data)}]}
    (folder / "parts.bin").write_bytes(gltf.data)
    (folder / "parts.gltf").write_text(json.dumps(document))
    numbers = "".join(
        f"property {kind} {name}\n" for kind, names in (("float", "xyz"),) for name in names
    )
    colors = "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
    (folder / "text.ply").write_text(
        HEADER.format("ascii", numbers, colors) + POINTS + "3 0 1 2\n4 0 1 2 3\n"
    )
    rows = [
        struct.pack("<3f3B", *map(float, row.split()[:3]), 9, 9, 9) for row in POINTS.splitlines()
    ]
    faces = struct.pack("<B3iB4i", 3, 0, 1, 2, 4, 0, 1, 2, 3)
    (folder / "binary.ply").write_bytes(
        HEADER.format("binary_little_endian", numbers, colors).encode() + b"".join(rows) + faces
    )
    return sorted(file for file in folder.iterdir() if file.is_file())


def mesh_of(file: Path) -> Path:
    """The mesh to read where this file is damaged."""
    return file.with_suffix(
        {".mtl": ".obj", ".png": ".obj", ".bin": ".gltf"}.get(file.suffix, file.suffix)
    )


def _flip(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(min(len(data), 3000), size=rng.integers(1, 4)):
        changed[at] = rng.integers(256)
    return bytes(changed)


def _swap_word(data: bytes, rng: np.random.Generator) -> bytes:
    """Another word in a line of text: of a PLY's header, of an OBJ or MTL."""
    lines = data.split(b"\n")
    at = rng.integers(len(lines))
    words = lines[at].split(b" ")
    change = rng.integers(len(words))
    other = WORDS[rng.integers(len(WORDS))].encode()
    words[change : change + 1] = [other, other] if rng.random() < 0.1 else [other]
    lines[at] = b" ".join(words)
    return b"\n".join(lines)


def _places(value, found: list) -> list:
    """(container, key) of everything in a document."""
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        found.append((value, key))
        _places(inner, found)
    return found


def _swap_value(data: bytes, rng: np.random.Generator) -> bytes:
    """Something of another type, or absent, in the JSON of a glTF or GLB."""
    length = struct.unpack_from("<I", data, 12)[0] if data[:4] == b"glTF" else 0
    document = json.loads(data[20 : 20 + length] if length else data)
    places = _places(document, [])
    container, key = places[rng.integers(len(places))]
    if rng.random() < 0.2:
        del container[key]
    else:
        container[key] = VALUES[rng.integers(len(VALUES))]
    head = json.dumps(document).encode()
    if not length:
        return head
    rest = data[20 + length :]
    return (
        struct.pack("<4sIIII", b"glTF", 2, 20 + len(head) + len(rest), len(head), 0x4E4F534A)
        + head
        + rest
    )


def damaged(file: Path, data: bytes, rng: np.random.Generator) -> bytes:
    """What became of the data of a file of `pristine`."""
    ways = {
        ".obj": _swap_word,
        ".mtl": _swap_word,
        ".ply": _swap_word,
        ".glb": _swap_value,
        ".gltf": _swap_value,
    }
    way = rng.random()
    if way < 0.6 and file.suffix in ways:
        return ways[file.suffix](data, rng)
    return _flip(data, rng) if way < 0.85 else data[: rng.integers(len(data))]
