"""glTF and PLY files as exporters write them, beyond what the specifications ask."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.front import area, front
from tests.helpers.mesh_files import AXES, POINTS, SQUARE, TRIANGLE, UV, Gltf, ply, png, square
from train.meshes.read import read_mesh
from train.prepare.raycast import to_display

# from the left: red, green, blue, yellow
STRIP = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]]])
MIDDLE = np.full((4, 2), 0.5)


def textured(pixels=STRIP, sampler=None, info=None, **material) -> Gltf:
    """A document with a picture as texture 0 of material 0."""
    gltf = Gltf(samplers=[sampler or {}], textures=[{"source": 0, "sampler": 0}])
    gltf.document["images"] = [{"bufferView": gltf.view(png(pixels))}]
    base = {"baseColorTexture": {"index": 0} | (info or {})}
    gltf.document["materials"] = [{"pbrMetallicRoughness": base} | material]
    return gltf


def seen(path: Path, gltf: Gltf, uv=UV, at=(8, 8), **fields) -> np.ndarray:
    """The colour at a pixel of a square with the document's material."""
    return front(gltf.save(path, [square(gltf, uv, material=0, **fields)]))[at][:3]


# pictures


WRAPS = [  # wrap of u, filter, u: the colour
    (33071, 9728, 0.0, [1, 0, 0]),
    (33071, 9728, -3.0, [1, 0, 0]),
    (33071, 9729, 1.0, [1, 1, 0]),
    (33071, 9729, 7.5, [1, 1, 0]),
    (10497, 9728, 0.25, [0, 1, 0]),
    (10497, 9728, 1.375, [0, 1, 0]),
    (10497, 9729, 1.0, [1, 0.5, 0]),
    (33648, 9728, 1.125, [1, 1, 0]),
    (33648, 9729, 1.0, [1, 1, 0]),
    (33648, 9728, -0.375, [0, 1, 0]),
]


@pytest.mark.parametrize("wrap, kind, u, color", WRAPS)
def test_filters_and_borders(tmp_path, wrap, kind, u, color):
    gltf = textured(sampler={"wrapS": wrap, "magFilter": kind})
    assert np.allclose(seen(tmp_path / "a.glb", gltf, MIDDLE * 0 + [u, 0.5]), color, atol=0.01)
    # the other axis by itself
    gltf = textured(STRIP.transpose(1, 0, 2), {"wrapT": wrap, "magFilter": kind})
    assert np.allclose(seen(tmp_path / "a.glb", gltf, MIDDLE * 0 + [0.5, u]), color, atol=0.01)
    assert not read_mesh(tmp_path / "a.glb").notes


def test_a_texture_is_turned_about_its_corner_and_then_moved(tmp_path):
    corners = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]])
    move = {"rotation": np.pi / 2, "offset": [0, 1]}
    gltf = textured(corners, {"magFilter": 9728}, {"extensions": {"KHR_texture_transform": move}})
    picture = front(gltf.save(tmp_path / "a.glb", [square(gltf, material=0)]))[..., :3]
    # the corner (0, 0) shows (0, 1), what lies at the lower left
    assert picture[5, 5].round().tolist() == [0, 0, 1]
    assert picture[5, 10].round().tolist() == [1, 0, 0]
    move |= {"scale": [0.5, 0.25], "offset": [0, 0.75]}  # scaled before it is turned
    gltf = textured(STRIP, {"magFilter": 9728}, {"extensions": {"KHR_texture_transform": move}})
    picture = front(gltf.save(tmp_path / "a.glb", [square(gltf, material=0)]))[..., :3]
    assert np.allclose(picture[5:11, 8], [1, 0, 0], atol=0.01), "u is a quarter of v"


@pytest.mark.parametrize("texture", [False, True])
def test_emission(tmp_path, texture):
    gltf = textured(np.full((2, 2, 3), 90), emissiveFactor=[1, 0.2, 0.0])
    material = gltf.document["materials"][0]
    material["pbrMetallicRoughness"]["baseColorFactor"] = [0, 0, 0, 1]
    true = to_display(np.array([1, 0.2, 0]))
    if texture:  # with coordinates of its own
        gltf.document["textures"].append({"source": 1})
        gltf.document["images"].append({"bufferView": gltf.view(png(STRIP))})
        material["emissiveTexture"] = {"index": 1, "texCoord": 1}
        strength = {"KHR_materials_emissive_strength": {"emissiveStrength": 0.5}}
        material |= {"extensions": strength, "emissiveFactor": [1, 1, 1]}
        true = to_display(np.array([0, 0.5, 0]))
    second = {"TEXCOORD_1": gltf.array(MIDDLE * 0 + [0.375, 0.5])}
    found = seen(tmp_path / "a.glb", gltf, **second) * 0.5  # no light falls on it
    assert np.allclose(found, true, atol=0.005)


def test_an_unlit_material_is_seen_as_it_is(tmp_path):
    gltf = textured(np.full((2, 2, 3), 90), extensions={"KHR_materials_unlit": {}})
    gltf.document["extensionsRequired"] = ["KHR_materials_unlit"]
    assert np.allclose(seen(tmp_path / "a.glb", gltf) * 0.5, 90 / 255, atol=0.005)
    assert not read_mesh(tmp_path / "a.glb").notes


def test_materials_share_their_pictures(tmp_path):
    gltf = textured()
    base = gltf.document["materials"][0]
    gltf.document["materials"] = [base | {"name": str(i)} for i in range(3)]
    mesh = read_mesh(
        gltf.save(tmp_path / "a.glb", [square(gltf, material=i) for i in (0, 1, 2, 0)])
    )
    assert len(mesh.materials) == 3
    assert all(material.texture is mesh.materials[0].texture for material in mesh.materials)


# vertex colours


def test_vertex_colours_of_gltf_in_their_range(tmp_path):
    gltf = Gltf()
    color = gltf.array([[128, 64, 0]] * 3, "<u1")  # without `normalized`, which is an error
    mesh = read_mesh(gltf.save(tmp_path / "a.glb", [gltf.primitive(TRIANGLE, COLOR_0=color)]))
    assert np.allclose(mesh.tint, np.array([128, 64, 0]) / 255)
    for value, message in ((np.nan, "has the colour nan 0 0, no number"), (7.5, "7.5 0 0")):
        gltf = Gltf()
        color = gltf.array([[0, 0, 0], [value, 0, 0], [0, 0, 0]])
        gltf.save(tmp_path / "a.glb", [gltf.primitive(TRIANGLE, COLOR_0=color)])
        with pytest.raises(
            ValueError, match="a.glb cannot be read: node 0, mesh 0, primitive 0: vertex 1 has the "
        ) as e:
            read_mesh(tmp_path / "a.glb")
        assert message in str(e.value)


COLOR = "property {} red\nproperty {} green\nproperty {} blue\n"
FACE = "element face 1\nproperty list uchar int vertex_indices\n"
PLY = [  # type, colour in the file: colour that is seen or an error, the note
    ("uchar", (128, 64, 0), [0.502, 0.251, 0], None),
    ("int", (128, 64, 0), [0.502, 0.251, 0], "0 to 255"),
    ("ushort", (128, 64, 0), [0.502, 0.251, 0], "0 to 255"),
    ("ushort", (32896, 16448, 0), [0.502, 0.251, 0], None),
    ("int", (32896, 16448, 0), [0.502, 0.251, 0], "0 to 65535"),
    ("float", (0.5, 0.25, 0), [0.5, 0.25, 0], None),
    ("float", (128, 64, 0), [0.502, 0.251, 0], "0 to 255"),
    ("double", (0.5, 0.25, "nan"), "face 0 has the colour 0.5 0.25 nan, no number", None),
    ("float", (1.5, 0, 0), "face 0 has the colour 1.5 0 0: neither all from 0 to 1", None),
    ("int", (-1, 0, 0), "face 0 has the colour -1 0 0, below 0", None),
    ("int", (99999, 0, 0), "face 0 has the colour 99999 0 0: neither", None),
]


@pytest.mark.parametrize("kind, color, true, note", PLY)
def test_ply_colours_in_their_range(tmp_path, kind, color, true, note):
    rows = [("", tuple(p)) for p in POINTS.tolist()]
    head = FACE + COLOR.format(kind, kind, kind)
    path = ply(tmp_path / "a.ply", "ascii", head, rows, [("", (3, 0, 1, 2, *color))])
    if isinstance(true, str):
        with pytest.raises(ValueError, match=f"^a.ply: {true}"):
            read_mesh(path)
        return
    mesh = read_mesh(path)
    assert np.allclose(mesh.tint, true, atol=2e-3) and mesh.materials[0].color == (1, 1, 1)
    assert [said.partition("numbers from ")[2] for said in mesh.notes] == ([note] if note else [])


def test_ply_names_of_colours_and_of_coordinates_without_a_texture(tmp_path):
    text = "ply\nformat ascii 1.0\nelement vertex 3\n" + AXES
    names = ("diffuse_red", "diffuse_green", "diffuse_blue", "s", "t")
    text += "".join(f"property float {name}\n" for name in names) + FACE + "end_header\n"
    text += "".join(f"{x:g} {y:g} 0 0.5 0.25 1 0 0\n" for x, y, _ in TRIANGLE) + "3 0 1 2\n"
    (tmp_path / "a.ply").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as editors save it
    mesh = read_mesh(tmp_path / "a.ply")
    assert np.allclose(mesh.tint, [0.5, 0.25, 1])
    assert mesh.notes == ["a.ply: it has texture coordinates (s t) and no texture"]


@pytest.mark.parametrize("kind", ["ascii", "binary_big_endian"])
def test_ply_strips(tmp_path, kind):
    head = "element tristrips 1\nproperty list int int vertex_indices\n"
    rows = [("3d", tuple(p)) for p in [*POINTS[[0, 1, 3, 2]].tolist(), [5, 0, 0]]]
    strip = (0, 1, 2, 3, -1, 0, 0, 1, 4)  # a second strip, whose first triangle joins
    path = ply(tmp_path / "a.ply", kind, head, rows, [(f"i{len(strip)}i", (len(strip), *strip))])
    assert read_mesh(path).faces.tolist() == [[0, 1, 2], [1, 3, 2], [0, 4, 1]]
    bad = (0, 1, 9)
    path = ply(tmp_path / "a.ply", kind, head, rows, [("i3i", (3, *bad))])
    with pytest.raises(ValueError, match="^a.ply: a face uses vertex 9 of 5"):
        read_mesh(path)


# skins and morph targets

JOINTS = [{"mesh": 0, "skin": 0}, {"translation": [5, 0, 0]}, {"translation": [5, 4, 0]}]


def skinned(path: Path, weights, joints, **sets):
    gltf = Gltf(nodes=JOINTS, skins=[{"joints": [1, 2]}], scenes=[{"nodes": [0]}])
    arrays = {name: gltf.array(value, kind) for name, (value, kind) in sets.items()}
    moved = gltf.primitive(
        TRIANGLE, JOINTS_0=gltf.array(joints, "<u2"), WEIGHTS_0=gltf.array(weights), **arrays
    )
    mesh = read_mesh(gltf.save(path, [moved, gltf.primitive(SQUARE[:3])]))
    return mesh.vertices @ np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]), mesh.notes


def test_skins_with_free_vertices_more_joints_and_other_primitives(tmp_path):
    weights = [[0, 0, 0, 0], [0, 2, 0, 0], [0.5, 0, 0, 0]]
    joints = [[1, 0, 0, 0], [0, 1, 99, 7], [0, 0, 0, 0]]  # 99 has no weight
    more = {
        "WEIGHTS_1": ([[0] * 4, [0] * 4, [0.5, 0, 0, 0]], "<f4"),
        "JOINTS_1": ([[0] * 4, [0] * 4, [1, 0, 0, 0]], "<u1"),
    }
    # the joints stand outside the scene
    vertices, notes = skinned(tmp_path / "a.glb", weights, joints, **more)
    moved = TRIANGLE + [[5, 4, 0], [5, 4, 0], [5, 2, 0]]
    assert np.allclose(vertices, [*moved, *SQUARE[:3]]), "a primitive without joints stays"
    assert notes == ["a.glb: vertices without weight: 1, which follow their first joint"]
    weights[1][1] = np.nan
    with pytest.raises(ValueError, match="primitive 0: vertex 1 hangs on its joints by"):
        skinned(tmp_path / "a.glb", weights, joints)


MORPHS = [  # weights of the mesh, of the node: the height
    ([1, 0], None, 6),
    ([1, 0], [0, 0], 2),
    (None, [0.5, 0], 4),
    ([0, 0], None, 2),
    (None, None, 2),
    ([0.25, 0.5], None, 5),
]


@pytest.mark.parametrize("mesh, node, height", MORPHS)
def test_default_weights_of_morph_targets(tmp_path, mesh, node, height):
    gltf = Gltf()
    targets = [{"POSITION": gltf.array([[0, 0, 0]] * 2 + [[0, y, 0]] * 2)} for y in (4, 4)]
    color = [{"COLOR_0": gltf.array([[-1, 0, 0]] * 4)}, {}]
    primitive = square(gltf, COLOR_0=gltf.array([[1, 0, 0]] * 4))
    primitive["targets"] = [a | b for a, b in zip(targets, color, strict=True)]
    gltf.document["meshes"] = [{"primitives": [primitive]} | ({"weights": mesh} if mesh else {})]
    shown = read_mesh(gltf.save(tmp_path / "a.glb", **({"weights": node} if node else {})))
    assert np.ptp(shown.vertices[:, 2]) == pytest.approx(height) and not shown.notes
    used = (node or mesh or [0])[0]
    assert np.allclose(shown.tint[..., 0], 1 - used)


def test_weights_that_are_not_as_many_as_the_targets(tmp_path):
    gltf = Gltf()
    primitive = gltf.primitive(TRIANGLE, targets=[{"POSITION": gltf.array(TRIANGLE)}])
    gltf.document["meshes"] = [{"primitives": [primitive], "weights": [1, 1]}]
    with pytest.raises(ValueError, match="2 weights for 1 morph targets"):
        read_mesh(gltf.save(tmp_path / "a.glb"))


# extensions


def test_instances_are_shown_and_hidden_nodes_are_not(tmp_path):
    gltf = Gltf(extensionsUsed=["EXT_mesh_gpu_instancing"], scenes=[{"nodes": [0, 1]}])
    turned = [0, 0, np.sqrt(0.5), np.sqrt(0.5)]
    attributes = {
        "TRANSLATION": gltf.array([[0, 0, 0], [5, 0, 0], [0, 5, 0]]),
        "ROTATION": gltf.array([turned] * 3),
        "SCALE": gltf.array([[1, 1, 1], [2, 2, 2], [1, 1, 1]]),
    }
    placed = {"EXT_mesh_gpu_instancing": {"attributes": attributes}}
    hidden = {"KHR_node_visibility": {"visible": False}}
    gltf.document["nodes"] = [
        {"mesh": 0, "extensions": placed, "translation": [0, 0, 1]},
        {"children": [2], "extensions": hidden},
        {"mesh": 0},
    ]
    mesh = read_mesh(gltf.save(tmp_path / "a.glb", [square(gltf)]))
    assert area(mesh) == pytest.approx(4 + 16 + 4) and not mesh.notes
    assert mesh.vertices[:, 0].max() == pytest.approx(7)
    gltf.document["accessors"][attributes["SCALE"]]["count"] = 2
    with pytest.raises(ValueError, match=r"its instances have columns of \[2, 3\] rows"):
        read_mesh(gltf.save(tmp_path / "a.glb"))


DRACO = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {"POSITION": 0}}}


def test_compressed_geometry_is_refused_by_name_unless_other_data_stand_beside(tmp_path):
    gltf = Gltf(extensionsUsed=list(DRACO))
    primitive = gltf.primitive(TRIANGLE, extensions=DRACO)
    assert not read_mesh(gltf.save(tmp_path / "a.glb", [primitive])).notes
    del gltf.document["accessors"][0]["bufferView"]
    with pytest.raises(ValueError, match="its geometry is compressed .KHR_draco_mesh_compression"):
        read_mesh(gltf.save(tmp_path / "a.glb"))
    gltf = Gltf()
    primitive = gltf.primitive(TRIANGLE)
    view = gltf.document["bufferViews"][0]
    view["extensions"] = {"EXT_meshopt_compression": {"buffer": 0, "count": 3}}
    assert not read_mesh(gltf.save(tmp_path / "a.glb", [primitive])).notes
    view["buffer"] = 1
    gltf.save(tmp_path / "a.glb")
    gltf.document["buffers"].append({"byteLength": 36})
    document = gltf.document | {"buffers": [*gltf.document["buffers"]]}
    document["buffers"][0] = {"byteLength": 36, "uri": "a.bin"}
    (tmp_path / "a.gltf").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="its data are compressed .EXT_meshopt_compression"):
        read_mesh(tmp_path / "a.gltf")


def test_pictures_in_formats_that_are_not_read_are_named(tmp_path):
    gltf = textured(np.full((2, 2, 3), 255))
    texture = gltf.document["textures"][0]
    texture["extensions"] = {"KHR_texture_basisu": {"source": 7}}
    assert (
        np.allclose(seen(tmp_path / "a.glb", gltf), 1, atol=0.01)
        and not read_mesh(tmp_path / "a.glb").notes
    )
    del texture["source"]
    with pytest.raises(ValueError, match="that can be read: KHR_texture_basisu is not supported"):
        read_mesh(gltf.save(tmp_path / "a.glb"))


def test_extensions_that_change_a_look_are_noted_wherever_they_stand(tmp_path):
    glass = {"KHR_materials_transmission": {"transmissionFactor": 1}}
    gltf = Gltf(extensions={"KHR_lights_punctual": {"lights": []}, "ACME_haze": {}})
    gltf.document["materials"] = [{"extensions": glass | {"KHR_materials_variants": {}}}]
    mesh = read_mesh(gltf.save(tmp_path / "a.glb", [gltf.primitive(TRIANGLE, material=0)]))
    assert mesh.notes == [
        f"a.glb: what {name} adds is not shown"
        for name in ("ACME_haze", "KHR_materials_transmission")
    ]
    gltf.document["extensionsRequired"] = ["ACME_haze"]
    with pytest.raises(ValueError, match="a.glb cannot be read: it needs ACME_haze, which is not"):
        read_mesh(gltf.save(tmp_path / "a.glb"))


def test_json_padded_with_nul(tmp_path):
    gltf = Gltf()
    data = gltf.save(tmp_path / "a.glb", [gltf.primitive(TRIANGLE)]).read_bytes()
    size = int.from_bytes(data[12:16], "little")
    head = data[20 : 20 + size].rstrip(b" ")
    padded = head + b"\0" * (size + 4 - len(head))
    whole = data[:8] + (len(data) + 4).to_bytes(4, "little") + len(padded).to_bytes(4, "little")
    (tmp_path / "a.glb").write_bytes(whole + data[16:20] + padded + data[20 + size :])
    assert len(read_mesh(tmp_path / "a.glb").faces) == 1
