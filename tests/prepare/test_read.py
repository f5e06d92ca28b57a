"""GLB, glTF and PLY files, prepared, and their pictures compared with the known colours.

The files are written by trimesh or byte by byte.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial

from tests.helpers.mesh_files import FACES, MIXED, POINTS, TRIANGLE, Gltf, ply, square
from train.meshes.read import content_hash, read_mesh
from train.prepare import command as prepare
from train.prepare import raycast
from train.prepare.raycast import to_display, to_linear

# sides of a box in the file's axes
NORMALS = np.array([[-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]])
COLORS = np.array(
    [[200, 20, 20], [20, 180, 30], [30, 40, 220], [230, 200, 10], [160, 30, 200], [90, 200, 210]]
)
SIZE = np.array([1.0, 0.7, 0.5])
SMALL = [
    "--size",
    "24",
    "--views",
    "6",
    "--holdout-views",
    "1",
    "--resolution",
    "4",
    "--workers",
    "0",
    "--supersample",
    "1",
]


def side(k: int) -> trimesh.Trimesh:
    """One side of the box, of four vertices of its own."""
    normal = NORMALS[k]
    u = np.roll(np.abs(normal), 1)
    v = np.cross(normal, u)
    corners = (
        np.array([normal + a * u + b * v for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
        / 2
        * SIZE
    )
    return trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)


def whole() -> trimesh.Trimesh:
    return trimesh.util.concatenate([side(k) for k in range(6)])


def atlas() -> tuple[np.ndarray, np.ndarray]:
    """Draw a picture with a square for each side, and uv [24, 2] in the middle of the squares.

    As in trimesh, v goes upwards.
    """
    picture = np.zeros((8, 48, 3), np.uint8)
    for k, color in enumerate(COLORS):
        picture[:, 8 * k : 8 * k + 8] = color
    picture[4:] = 255 - picture[4:]
    uv = np.stack([(np.arange(6) + 0.5) / 6, np.full(6, 0.75)], 1).repeat(4, 0)
    return picture, uv


def textured() -> trimesh.Trimesh:
    picture, uv = atlas()
    mesh = whole()
    mesh.visual = TextureVisuals(
        uv=uv, material=PBRMaterial(baseColorTexture=Image.fromarray(picture))
    )
    return mesh


def factors() -> trimesh.Scene:
    scene = trimesh.Scene()
    for k in range(6):
        part = side(k)
        part.visual = TextureVisuals(
            material=PBRMaterial(name=f"m{k}", baseColorFactor=[*COLORS[k].tolist(), 255])
        )
        scene.add_geometry(part)
    return scene


def vertex_colors() -> trimesh.Trimesh:
    mesh = whole()
    mesh.visual = ColorVisuals(mesh, vertex_colors=COLORS.repeat(4, 0))
    return mesh


def moved() -> trimesh.Scene:
    """One square, put in place six times by nested nodes that turn, scale and shift it."""
    square = trimesh.Trimesh(
        [[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False
    )
    scene = trimesh.Scene()
    shift = trimesh.transformations.translation_matrix([5.0, -3, 1])
    scene.graph.update(frame_to="group", frame_from="world", matrix=shift @ np.diag([*SIZE / 2, 1]))
    for k, normal in enumerate(NORMALS):
        part = square.copy()
        part.visual = TextureVisuals(
            material=PBRMaterial(name=f"m{k}", baseColorFactor=[*COLORS[k].tolist(), 255])
        )
        turn = trimesh.geometry.align_vectors([0, 0, 1], normal)
        place = trimesh.transformations.translation_matrix(normal) @ turn
        scene.add_geometry(
            part, node_name=f"n{k}", geom_name=f"g{k}", parent_node_name="group", transform=place
        )
    return scene


def write_gltf(folder: Path, name: str, mesh) -> None:
    """A .gltf with its buffer and picture in files of their own."""
    files = trimesh.exchange.gltf.export_gltf(trimesh.Scene(mesh))
    document = json.loads(files.pop("model.gltf"))
    for buffer in document["buffers"]:
        data = files[buffer["uri"]]
        buffer["uri"] = f"{name} {buffer['uri']}"
        (folder / buffer["uri"]).write_bytes(data)
    if "images" in document:
        Image.fromarray(atlas()[0]).save(folder / f"{name}.png")
        document["images"] = [{"uri": f"{name}.png"}]
    (folder / f"{name}.gltf").write_text(json.dumps(document))


def prepared(path: Path, out: Path) -> Path:
    assert prepare.main([str(path), "--out", str(out), *SMALL]) == 0
    (folder,) = (out / "renders").iterdir()
    return folder


def check_pictures(folder: Path, colors: np.ndarray, up: str) -> None:
    """Check that every opaque pixel has the lit colour of a side that faces the camera.

    Every side is seen.
    """
    normals = NORMALS if up == "z" else np.stack([NORMALS[:, 0], -NORMALS[:, 2], NORMALS[:, 1]], 1)
    half = (SIZE if up == "z" else SIZE[[0, 2, 1]]) / 2
    light = raycast.AMBIENT + raycast.KEY * np.maximum(normals @ raycast.KEY_DIRECTION, 0)
    light = light + raycast.TOP * (1 + normals[:, 2]) / 2 + raycast.BOTTOM * (1 - normals[:, 2]) / 2
    lit = colors * 255 * light[:, None]
    seen = set()
    for frame in json.loads((folder / "transforms.json").read_text())["frames"]:
        with Image.open(folder / frame["file_path"]) as picture:
            pixels = np.asarray(picture, float)
        shown = pixels[pixels[..., 3] == 255][:, :3]
        distance = np.abs(shown[:, None] - lit).max(2)
        eye = np.array(frame["transform_matrix"])[:3, 3]
        here = set(distance.argmin(1).tolist())
        assert len(shown) > 20 and distance.min(1).max() <= 1.0
        assert here == {k for k in here if (eye - normals[k] * half) @ normals[k] > 0}
        seen |= here
    assert seen == set(range(6))


DISPLAY = COLORS / 255
LINEAR = to_display(DISPLAY)  # what glTF shows of a factor or vertex colour: those are linear light
KINDS = {
    "embedded texture": (textured, "glb", DISPLAY, "y"),
    "factors": (factors, "glb", LINEAR, "y"),
    "vertex colours": (vertex_colors, "glb", LINEAR, "y"),
    "scene graph": (moved, "glb", LINEAR, "y"),
    "files of its own": (textured, "gltf", DISPLAY, "y"),
    "binary PLY": (vertex_colors, "ply", DISPLAY, "z"),
    "ASCII PLY": (vertex_colors, "txt.ply", DISPLAY, "z"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_pictures_have_the_known_colours(tmp_path, kind):
    make, suffix, colors, up = KINDS[kind]
    path = tmp_path / f"box.{suffix}"
    if suffix == "gltf":
        write_gltf(tmp_path, "box", make())
    elif suffix == "txt.ply":
        path.write_bytes(trimesh.exchange.ply.export_ply(make(), encoding="ascii"))
    else:
        make().export(path)
    check_pictures(prepared(path, tmp_path / "out"), colors, up)


def test_the_curve_of_srgb():
    assert np.allclose(
        to_display(np.array([0, 0.0031308, 0.214041, 0.5, 1, 7])),
        [0, 0.04045, 0.5, 0.735357, 1, 1],
        atol=1e-5,
    )
    values = np.linspace(0, 1, 256)
    assert np.allclose(to_display(to_linear(values)), values, atol=1e-7)


def test_world_space_is_trimeshs(tmp_path):
    moved().export(tmp_path / "a.glb")
    mesh = read_mesh(tmp_path / "a.glb")
    theirs = trimesh.load_scene(tmp_path / "a.glb").to_mesh().triangles
    # back to y-up
    ours = mesh.vertices[mesh.faces] @ np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]).T
    key = lambda t: t.reshape(len(t), 9)[np.lexsort(t.reshape(len(t), 9).round(4).T)]
    assert np.allclose(key(ours), key(theirs), atol=1e-6)


# PLY, written by hand


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply_polygons_and_face_colours(tmp_path, kind):
    rows = [("3d", tuple(p)) for p in POINTS.tolist()]
    mesh = read_mesh(ply(tmp_path / "a.ply", kind, FACES, rows, MIXED))
    assert np.array_equal(mesh.vertices, POINTS), "z is up, as in the datasets"
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 4]] and mesh.materials[0].color == (
        0.8,
        0.8,
        0.8,
    )
    head = FACES + "".join(f"property uchar {c}\n" for c in ("red", "green", "blue", "alpha"))
    colored = [("B4i4B", (4, 0, 1, 2, 3, 255, 0, 51, 255)), ("B3i4B", (3, 0, 1, 4, 0, 102, 0, 9))]
    mesh = read_mesh(ply(tmp_path / "b.ply", kind, head, rows, colored))
    assert np.allclose(mesh.tint, np.array([[1, 0, 0.2], [1, 0, 0.2], [0, 0.4, 0]])[:, None])
    assert mesh.notes == ["b.ply: the alpha of its colours is not shown"] and mesh.materials[
        0
    ].color == (1, 1, 1)


def test_prepares_own_mesh_comes_back_as_it_was(tmp_path):
    vertex_colors().export(tmp_path / "a.glb")
    folder = prepared(tmp_path / "a.glb", tmp_path / "one")
    again = prepared(folder / "mesh.ply", tmp_path / "two")
    theirs, ours = (trimesh.load(f / "mesh.ply", process=False) for f in (folder, again))
    assert np.allclose(theirs.vertices, ours.vertices, atol=1e-6) and np.array_equal(
        theirs.faces, ours.faces
    )


# bad input


def small_glb(path: Path, **change) -> Path:
    gltf = Gltf(**change)
    return gltf.save(path, [gltf.primitive(TRIANGLE)])


def bad_files(folder: Path) -> dict[str, str]:
    """File name -> what is said of it."""
    name = lambda n: folder / n
    data = small_glb(name("x.glb")).read_bytes()
    said = {}
    short = f"truncated: its header says {len(data)} bytes, the file has 100"
    for length, message in ((8, "no GLB header in its 8 bytes"), (100, short)):
        name(f"cut{length}.glb").write_bytes(data[:length])
        said[f"cut{length}.glb"] = f"cannot be read: {message}"
    name("two.glb").write_bytes(data[:4] + b"\1" + data[5:])
    said["two.glb"] = "cannot be read: glTF version 1, not 2"
    name("x.glb").unlink()
    Gltf(nodes=[{}]).save(name("nomesh.glb"))
    said["nomesh.glb"] = "has no faces"
    gltf = Gltf()
    broken = TRIANGLE.copy()
    broken[1, 2] = np.nan
    gltf.save(name("nan.glb"), [gltf.primitive(broken)])
    said["nan.glb"] = "1 of 3 vertices are not finite, the first is vertex 2"
    gltf = Gltf()
    gltf.save(name("index.glb"), [gltf.primitive(TRIANGLE, indices=gltf.array([0, 1, 7], "<u4"))])
    said["index.glb"] = "primitive 0: a face uses vertex 7 of 3"
    gltf = Gltf()
    primitive = gltf.primitive(TRIANGLE)
    gltf.document["accessors"][0]["count"] = 30
    gltf.save(name("short.glb"), [primitive])
    said["short.glb"] = "primitive 0: accessor 0 needs 360 bytes of a buffer view of 36"
    small_glb(name("draco.glb"), extensionsRequired=["KHR_draco_mesh_compression"])
    said["draco.glb"] = (
        "cannot be read: it needs KHR_draco_mesh_compression, which is not supported"
    )
    small_glb(name("loop.glb"), nodes=[{"mesh": 0, "children": [1]}, {"children": [0]}])
    said["loop.glb"] = "cannot be read: node 0 has two places in the scene"
    gltf = Gltf(images=[{"bufferView": 0, "name": "bark"}], textures=[{"source": 0}])
    gltf.view(b"not a picture")
    gltf.document["materials"] = [
        {"name": "tree", "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}
    ]
    gltf.save(name("picture.glb"), [square(gltf, material=0)])
    said["picture.glb"] = "texture 'bark' of material 'tree' cannot be read: it is no picture"
    write_gltf(folder, "gone", textured())
    name("gone.png").unlink()
    said["gone.gltf"] = "primitive 0: 'gone.png' does not exist"
    write_gltf(folder, "half", vertex_colors())
    for buffer in folder.glob("half*.bin"):
        buffer.write_bytes(buffer.read_bytes()[:10])
    said["half.gltf"] = "primitive 0: buffer 1 has 10 of its 288 bytes"
    for file, text, message in (
        ("list.gltf", "[]", "it is not glTF 2.0"),
        ("word.gltf", "{", "Expecting property name"),
    ):
        name(file).write_text(text)
        said[file] = f"cannot be read: {message}"
    rows = [("3d", tuple(p)) for p in POINTS.tolist()]
    ply(name("cloud.ply"), "ascii", "", rows, [])
    said["cloud.ply"] = "has no faces: 5 vertices alone are no surface"
    for kind in ("ascii", "binary_little_endian"):
        ply(name(f"{kind}.ply"), kind, FACES, rows, MIXED[:1])
        said[f"{kind}.ply"] = "cannot be read: truncated: it has 1 of 2 rows of element face"
    ply(name("vertex.ply"), "binary_big_endian", FACES, rows[:2], [])
    said["vertex.ply"] = "cannot be read: truncated: element vertex needs 120 bytes, 48 are left"
    ply(name("nan.ply"), "ascii", FACES, [*rows[:4], ("3d", (0, "nan", 0))], MIXED)
    said["nan.ply"] = "1 of 5 vertices are not finite, the first is vertex 5"
    ply(name("index.ply"), "ascii", FACES, rows, [MIXED[0], ("B3i", (3, 0, 1, 5))])
    said["index.ply"] = "a face uses vertex 5 of 5"
    ply(name("edge.ply"), "ascii", FACES, rows, [("B1i", (1, 0)), ("B2i", (2, 0, 1))])
    said["edge.ply"] = "has no faces: polygons without area: 2, not shown"
    ply(name("picture.ply"), "ascii", "comment TextureFile a b.png\n" + FACES, rows, MIXED)
    said["picture.ply"] = (
        "cannot be read: its texture 'a b.png' is not supported: convert it to GLB"
    )
    name("head.ply").write_bytes(b"ply\nformat ascii 1.0\n")
    said["head.ply"] = "cannot be read: no PLY header in its 21 bytes"
    flat = FACES.replace("face 2", "face 1")
    name("flat.ply").write_text(f"ply\nformat ascii 1.0\n{flat}end_header\n3 0 1 2\n")
    said["flat.ply"] = "has no vertices with x, y and z"
    name("zero.glb").write_bytes(b"")
    said["zero.glb"] = "is empty"
    return said


def test_bad_files_are_named_and_skipped(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    said = bad_files(tmp_path / "in")
    factors().export(tmp_path / "in" / "good.glb")
    assert prepare.main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, message in said.items():
        (line,) = (line for line in lines if line.startswith(f"skipped {tmp_path}/in/{name}"))
        assert message in line, line
    summary = f"1 objects (1 made, 0 there already), 6 views, {len(said)} skipped"
    assert any(line.startswith(summary) for line in lines)


def test_damaged_files_end_in_a_message(tmp_path):
    """Any byte changed: read or refused by name, never another exception."""
    rng = np.random.default_rng(0)
    factors().export(tmp_path / "a.glb")
    vertex_colors().export(tmp_path / "a.ply")
    for path in (tmp_path / "a.glb", tmp_path / "a.ply"):
        data = path.read_bytes()
        for _ in range(60):
            broken = bytearray(data)
            broken[rng.integers(min(len(data), 2500))] = rng.integers(256)
            path.write_bytes(broken)
            try:
                content_hash(path)
                read_mesh(path)
            except MemoryError:
                pass
            except ValueError as error:
                assert str(error).startswith(path.name)
