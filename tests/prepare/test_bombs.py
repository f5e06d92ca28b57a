"""Small files that ask for much: refused by their numbers before memory is taken, or shared."""

import base64
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.mesh_files import (
    AXES,
    POINTS,
    TRIANGLE,
    Gltf,
    box,
    ply,
    png,
    quad,
    square,
    write_obj,
)
from tests.helpers.prepare import command, metadata
from train.meshes.budget import Budget
from train.meshes.pictures import decode
from train.meshes.read import content_hash, read_mesh
from train.meshes.surface import earlier_copies
from train.prepare.raycast import COPIES, Caster, camera_to_world
from train.prepare.voxelize import voxelize

MANY = 10**12


def refused(path: Path, message: str) -> None:
    """Both the hash and the reader, at most one of which may accept it, name file and reason."""
    with pytest.raises(ValueError, match=f"^{path.stem}[.].*{message}"):
        content_hash(path)
        read_mesh(path)


# numbers of rows

LISTS = "property list uchar int vertex_indices\n"


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian"])
@pytest.mark.parametrize("element", ["vertex", "face"])
def test_ply_of_more_rows_than_bytes(tmp_path, kind, element):
    path = ply(tmp_path / "a.ply", kind, f"element face 1\n{LISTS}", [], [])
    rows = {"vertex": b"element vertex 5", "face": b"element face 1"}[element]
    data = path.read_bytes()
    if element == "face":
        data = data.replace(b"element vertex 5", b"element vertex 0")
    path.write_bytes(data.replace(rows, f"element {element} {MANY}".encode()) + bytes(40))
    refused(path, f"truncated: element {element} (has|needs) {MANY if kind == 'ascii' else ''}")


def test_ply_list_longer_than_the_file(tmp_path):
    head = "element face 1\nproperty list uint int vertex_indices\n"
    rows = [("3d", tuple(p)) for p in POINTS.tolist()]
    long = [("I3i", (4_000_000_000, 0, 1, 2))]
    path = ply(tmp_path / "a.ply", "binary_little_endian", head, rows, long)
    refused(path, "truncated: it has 0 of 1 rows of element face")


def test_ply_rows_of_many_lengths_in_both_orders(tmp_path):
    rows = [("3d", tuple(p)) for p in POINTS.tolist()]
    head = "element face 3\nproperty list ushort uint vertex_indices\nproperty uchar red\n"
    head += "property list char short other\n"
    faces = [
        ("H4IBb2h", (4, 0, 1, 2, 3, 9, 2, 5, 6)),
        ("HBb", (0, 9, 0)),
        ("H3IBb1h", (3, 0, 1, 4, 9, 1, -5)),
    ]
    kinds = ("ascii", "binary_little_endian", "binary_big_endian")
    meshes = [read_mesh(ply(tmp_path / f"{k}.ply", k, head, rows, faces)) for k in kinds]
    for mesh in meshes:
        assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 4]]
        assert mesh.vertices.tolist() == POINTS.tolist()


def accessor(**fields) -> dict:
    return {"componentType": 5126, "type": "VEC3", "count": 3} | fields


def replaced(count: int) -> dict:
    """The sparse part of an accessor: so many rows are replaced."""
    indices = {"bufferView": 2, "componentType": 5121}
    return {"count": count, "indices": indices, "values": {"bufferView": 0}}


OVER = "would take 2160 MB of memory, over the limit of 501 MB"
ACCESSORS = {
    f"of 30000000 rows but no data, {OVER}": accessor(count=30_000_000),
    "needs 36000000 bytes of a buffer view of 36": accessor(bufferView=0, count=3_000_000),
    "has rows of 12 bytes every 4 bytes": accessor(bufferView=1),
    "replaces row 3 of 3": accessor(bufferView=0, sparse=replaced(1)),
    "needs 1000000 bytes of a buffer view of 1": accessor(bufferView=0, sparse=replaced(1_000_000)),
}


@pytest.mark.parametrize("message", ACCESSORS)
def test_accessors_of_more_rows_than_data(tmp_path, message):
    gltf = Gltf()
    data = np.asarray(TRIANGLE, "<f4").tobytes()
    gltf.view(data), gltf.view(data, byteStride=4), gltf.view(b"\3")
    gltf.document["accessors"] = [ACCESSORS[message]]
    path = gltf.save(tmp_path / "a.glb", [{"attributes": {"POSITION": 0}}])
    refused(path, f"cannot be read: node 0, mesh 0, primitive 0: accessor 0,? {message}")


def test_faces_that_no_file_of_that_size_has(tmp_path, monkeypatch):
    monkeypatch.setattr("train.meshes.budget.FREE", 20_000_000)
    monkeypatch.setattr(Budget, "_hold", lambda self: None)
    gltf = Gltf()
    primitive = gltf.primitive(TRIANGLE, indices=gltf.array([0, 1, 2] * 300, "<u2"))
    turns = gltf.array(np.zeros((500, 3)))
    gltf.document["nodes"] = [
        {"mesh": 0, "extensions": {"EXT_mesh_gpu_instancing": {"attributes": {"SCALE": turns}}}}
    ]
    path = gltf.save(tmp_path / "a.glb", [primitive])
    refused(path, "primitive 0: a mesh of 150000 faces and 1500 vertices would take .* over the")
    gltf.document["nodes"] = [{"mesh": 0}] * 500
    gltf.document["scenes"] = [{"nodes": list(range(500))}]
    refused(gltf.save(tmp_path / "b.glb"), r"node \d+, mesh 0, primitive 0: a mesh of 300 faces")
    gltf.document["nodes"] = [{"mesh": 0}]
    gltf.document["scenes"] = [{"nodes": [0]}]
    gltf.document["meshes"] = [{"primitives": [primitive] * 500}]
    refused(gltf.save(tmp_path / "c.glb"), r"node 0, mesh 0, primitive \d+: a mesh of 300 faces")
    text = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf " + "1 2 3 " * 30_000
    (tmp_path / "a.obj").write_text(text)
    refused(tmp_path / "a.obj", "a mesh of 89998 faces and 3 vertices would take")


def test_nodes_that_are_their_own_children(tmp_path):
    for name, nodes in (
        ("circle", [{"children": [1]}, {"mesh": 0, "children": [0]}]),
        ("doubled", [{"children": [i + 1, i + 1]} for i in range(60)] + [{"mesh": 0}]),
    ):
        gltf = Gltf(nodes=nodes)
        path = gltf.save(tmp_path / f"{name}.glb", [gltf.primitive(TRIANGLE)])
        refused(path, r"node \d+ has two places in the scene")


# pictures


def picture(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says so many pixels and has the data of one row."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    row = (b"IDAT", zlib.compress(bytes(1 + 3 * width)))
    made = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), *chunks, row, (b"IEND", b"")):
        made += struct.pack(">I", len(data)) + kind + data
        made += struct.pack(">I", zlib.crc32(kind + data))
    return made


def test_pixels_are_weighed_before_they_are_decoded(tmp_path):
    message = "13000 x 13000 pixels would take 1352 MB of memory, over the limit of 500 MB"
    with pytest.raises(ValueError, match=f"^a: texture t cannot be read: {message} for files of 0"):
        decode(picture(13000, 13000), "a", "t")
    path = write_obj(tmp_path, "a", quad(), "newmtl m\nmap_Kd a.png\n")
    (tmp_path / "a.png").write_bytes(picture(13000, 13000))
    with pytest.raises(ValueError, match="^a.mtl: texture 'a.png' of material 'm' cannot be read:"):
        read_mesh(path)
    budget = Budget()
    budget.take(499_000_000, "what is there already")
    with pytest.raises(ValueError, match="cannot be read: 400 x 400 pixels would take 501 MB"):
        decode(picture(400, 400), "a", "t", budget)
    budget.size = 20_000  # files that large may hold it
    assert decode(picture(400, 400), "a", "t", budget).shape == (400, 400, 4)


@pytest.mark.parametrize("kind", ["zTXt", "iCCP", "iTXt"])
def test_text_in_a_picture_that_swells(kind):
    swollen = zlib.compress(bytes(4 << 20), 9)
    head = {"iTXt": b"k\0\1\0\0\0"}.get(kind, b"k\0\0")
    made = picture(1, 1, (kind.encode(), head + swollen))
    with pytest.raises(ValueError, match="^a: texture t cannot be read: .*large"):
        decode(made, "a", "t")


def test_materials_share_their_pictures(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = 200
    gltf = Gltf(images=[{"bufferView": 0}] * 3, textures=[{"source": i} for i in range(3)])
    gltf.view(png(pixels))
    modes = [{"alphaMode": "MASK", "alphaCutoff": i / 10} for i in range(8)]
    modes += [{"alphaMode": "BLEND"}, {}, {"emissiveFactor": [1, 1, 1]}]
    for i, mode in enumerate(modes):
        slot = {"index": i % 3}
        mode["pbrMetallicRoughness"] = {"baseColorTexture": slot}
        mode["emissiveTexture"] = slot
    gltf.document["materials"] = modes
    primitives = [square(gltf, material=i) for i in range(len(modes))]
    mesh = read_mesh(gltf.save(tmp_path / "a.glb", primitives))
    pictures = [m.texture for m in mesh.materials] + [mesh.materials[-1].emission_texture]
    assert len({id(picture) for picture in pictures}) == 1
    write_obj(tmp_path, "t", "", "", pixels)
    write_obj(tmp_path, "u", "", "", pixels[::-1])
    words = ("map_Kd t.png", "map_Kd t.png\nmap_d u.png", "map_Kd -mm 0.1 1 t.png\nmap_Ke u.png")
    mtl = "".join(f"newmtl m{i}\n{words[i % 3]}\n" for i in range(30))
    faces = "".join(f"usemtl m{i}\nf 1/1 2/2 3/3\n" for i in range(30))
    path = write_obj(tmp_path, "a", quad() + faces, mtl)
    materials = read_mesh(path).materials
    assert len({id(m.texture) for m in materials if m.texture is not None}) == 2
    assert len({id(m.emission_texture) for m in materials if m.emission_texture is not None}) == 1


def test_pictures_with_masks_count(tmp_path, monkeypatch):
    monkeypatch.setattr("train.meshes.budget.FREE", 200_000)
    monkeypatch.setattr("train.meshes.budget.A_BYTE", 0)
    monkeypatch.setattr(Budget, "_hold", lambda self: None)
    write_obj(tmp_path, "b", "", "", np.zeros((64, 64, 4), np.uint8))
    mtl = "".join(f"newmtl m{i}\nmap_Kd a.png\nmap_d -mm 0.{i} 1 b.png\n" for i in range(9))
    faces = quad(material="m0") + "".join(f"usemtl m{i}\nf 1/1 2/2 3/3\n" for i in range(9))
    path = write_obj(tmp_path, "a", faces, mtl, np.zeros((64, 64, 4), np.uint8))
    refused(path, "a texture with its map_d would take 1 MB of memory, over the limit of 1 MB")


# one place


def test_faces_in_one_place_are_cast_and_cut_once():
    vertices = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0.3], [0, 0.5, 0], [0.2, 0.5, 0.1]])
    vertices = np.concatenate([vertices, vertices])
    first = np.array([[0, 1, 2], [1, 2, 3]], np.int32)
    turned = np.array([[4, 5, 6], [6, 5, 4], [1, 0, 2]], np.int32)
    faces = np.concatenate([first, *[turned] * 300])
    copies = earlier_copies(vertices, faces)
    assert copies[:2].tolist() == [0, 0] and copies[2:].tolist() == list(range(1, 901))
    assert np.array_equal(voxelize(vertices, faces, 32), voxelize(vertices, first, 32))
    mesh = read_back(vertices, faces)
    caster = Caster(mesh)
    assert len(caster.kept) == 1 + COPIES
    image, points = caster.render(camera_to_world(0.3, 1.0), 32, 1)
    plain, _ = Caster(read_back(vertices, first)).render(camera_to_world(0.3, 1.0), 32, 1)
    assert np.array_equal(image, plain) and image.any()
    few = Caster(read_back(vertices, faces[: 1 + COPIES]))
    assert few.kept is None, "as they are, where there are few"


def read_back(vertices: np.ndarray, faces: np.ndarray):
    """A grey mesh of these faces."""
    from train.meshes.surface import Z_UP, Material, assemble

    F = len(faces)
    zero = np.zeros((F, 3, 3))
    return assemble(
        "a", vertices, faces, zero, zero[..., :2], zero + 1, np.zeros(F), [Material()], up=Z_UP
    )


# kinds and depths of JSON


def document(tmp_path: Path, **fields) -> Path:
    made = Gltf()
    primitive = made.primitive(TRIANGLE)
    data = "data:;base64," + base64.b64encode(made.data).decode()
    content = {"buffers": [{"byteLength": len(made.data), "uri": data}], "nodes": [{"mesh": 0}]}
    whole = made.document | content | {"meshes": [{"primitives": [primitive]}]} | fields
    (tmp_path / "a.gltf").write_text(json.dumps(whole))
    return tmp_path / "a.gltf"


TYPES = {
    "nodes[0].matrix has 3 entries, not 16": {"nodes": [{"mesh": 0, "matrix": [1, 2, 3]}]},
    "nodes[0].rotation[1] is 'x', not a finite number": {
        "nodes": [{"mesh": 0, "rotation": [0, "x", 0, 1]}]
    },
    "nodes[0].scale[0] is inf, not a finite number": {
        "nodes": [{"mesh": 0, "scale": [float("inf"), 1, 1]}]
    },
    "nodes[0].translation is 5, not a list": {"nodes": [{"mesh": 0, "translation": 5}]},
    "nodes[0].children[0] is [1], not a whole number": {"nodes": [{"children": [[1]]}]},
    "nodes[0].extensions.KHR_node_visibility is 5, not an object": {
        "nodes": [{"mesh": 0, "extensions": {"KHR_node_visibility": 5}}]
    },
    "scenes[0].nodes is {}, not a list": {"scenes": [{"nodes": {}}]},
    "scene is 'x', not a whole number": {"scene": "x"},
    "meshes[0].primitives[0] is [], not an object": {"meshes": [{"primitives": [[]]}]},
    "meshes[0].primitives[0].attributes.POSITION is '0', not a whole": {
        "meshes": [{"primitives": [{"attributes": {"POSITION": "0"}}]}]
    },
    "extensionsRequired[0] is {}, not text": {"extensionsRequired": [{}]},
    "asset is '2.0', not an object": {"asset": "2.0"},
    "materials[0].alphaCutoff is '1', not a finite number": {"materials": [{"alphaCutoff": "1"}]},
    "samplers[0].wrapS is [], not a whole number": {"samplers": [{"wrapS": []}]},
    "baseColorFactor[3] is nan, not a finite number": {
        "materials": [{"pbrMetallicRoughness": {"baseColorFactor": [1, 1, 1, float("nan")]}}]
    },
}


@pytest.mark.parametrize("message", TYPES)
def test_gltf_fields_of_other_types(tmp_path, message):
    path = document(tmp_path, **TYPES[message])
    with pytest.raises(ValueError) as caught:
        read_mesh(path)
    assert str(caught.value).startswith("a.gltf cannot be read: ") and message in str(caught.value)


TEXTS = {
    "it is nested too deeply": "[" * 100_000,
    "it is nested too deeply ": '{"a":' * 100_000,
    "it is nested too deeply  ": '{"asset":{"version":"2"},"skins":[{"a":'
    + "[" * 980
    + "]" * 980
    + "}]}",
    "a number in it has too many digits": '{"asset":' + "9" * 5000 + "}",
    "scene is -9+[.]{3}9+[.]{3}, not": '{"asset":{"version":"2"},"scene":-' + "9" * 400 + "}",
    "Expecting value": "\0\0",
}


@pytest.mark.parametrize("message", TEXTS, ids=range(len(TEXTS)))
def test_json_that_python_cannot_take(tmp_path, message):
    (tmp_path / "a.gltf").write_text(TEXTS[message])
    refused(tmp_path / "a.gltf", f"cannot be read: {message.strip()}")


@pytest.mark.parametrize("name", ["a.obj", "a.ply"])
def test_numbers_of_many_digits(tmp_path, name):
    digits = "9" * 5000
    text = f"v 0 0 0\nf 1 1 {digits}\n"
    if name == "a.ply":
        text = f"ply\nformat ascii 1.0\nelement vertex {digits}\n{AXES}end_header\n"
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, "a number in it has too many digits")


# whole runs


@pytest.mark.slow
def test_an_object_that_takes_too_long_is_named_and_the_others_are_made(tmp_path, capsys):
    rng = np.random.default_rng(0)
    corners = rng.normal(size=(6000, 3)) * 1e-4 + np.tile(POINTS[:3], (2000, 1))
    text = "".join(f"v {x} {y} {z}\n" for x, y, z in corners)
    text += "".join(f"f {3 * i + 1} {3 * i + 2} {3 * i + 3}\n" for i in range(2000))
    long = write_obj(tmp_path, "long", text)
    good = write_obj(tmp_path, "good", *box())
    out = ("--out", tmp_path / "o", "--workers", 1, "--size", 16, "--views", 9)
    assert command(long, good, *out, "--seconds-per-object", 8) == 0
    said = capsys.readouterr().out
    assert f"skipped {long}: worker 0 (process" in said
    assert "did not end in 8 seconds: --seconds-per-object says how long" in said
    assert [row["local_path"] for row in metadata(tmp_path / "o")] == ["good.obj"]
    assert not list((tmp_path / "o").rglob("*.partial"))


@pytest.mark.parametrize("seconds", ["-1", "inf", "nan"])
def test_time_limits_that_are_none(tmp_path, capsys, seconds):
    path = write_obj(tmp_path, "a", *box())
    assert command(path, "--out", tmp_path / "o", "--seconds-per-object", seconds) == 2
    assert f"--seconds-per-object {seconds} is not a number" in capsys.readouterr().err


def test_memory_that_no_check_foresees_is_a_refusal():
    code = "from train.meshes.budget import Budget\n"
    code += "with Budget().enforced():\n    bytes(300_000_000)\n    bytes(700_000_000)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert "MemoryError" in run.stderr and "line 4" in run.stderr
