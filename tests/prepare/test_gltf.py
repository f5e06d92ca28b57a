"""glTF and GLB, written part by part, against what the specification says.

Geometry, skins, materials and pictures.
"""

import base64

import numpy as np
import pytest

from tests.helpers.front import front
from tests.helpers.mesh_files import SQUARE, TRIANGLE, UV, Gltf, png, square
from train.meshes.read import content_hash, read_mesh

ZUP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], float)


def test_strips_fans_and_lists_without_indices(tmp_path):
    gltf = Gltf()
    strip = SQUARE[[0, 1, 3, 2]]
    shapes = [
        gltf.primitive(strip, mode=5),
        gltf.primitive(SQUARE, mode=6),
        gltf.primitive(SQUARE[[0, 1, 2, 0, 2, 3]]),
    ]
    points = gltf.primitive(SQUARE, mode=0)
    mesh = read_mesh(gltf.save(tmp_path / "a.glb", [*shapes, points]))
    corners = mesh.vertices[mesh.faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert np.allclose(normal, [0, -4, 0]), "all six triangles face the same way"
    assert mesh.notes == ["a.glb: its points and lines are not shown"]


def test_strides_sparse_values_and_normalised_integers(tmp_path):
    gltf = Gltf()
    mixed = np.zeros((3, 5), "<f4")
    mixed[:, :3] = TRIANGLE
    mixed[:, 3:] = 9
    position = gltf.array(TRIANGLE)
    gltf.document["accessors"][position] |= {
        "bufferView": gltf.view(mixed.tobytes(), byteStride=20)
    }
    sparse = {
        "count": 1,
        "indices": {"bufferView": gltf.view(np.array([2], "<u2").tobytes()), "componentType": 5123},
    }
    sparse["values"] = {"bufferView": gltf.view(np.array([0, 3, 0], "<f4").tobytes())}
    gltf.document["accessors"][position]["sparse"] = sparse
    color = gltf.array(np.array([[65535, 0, 0, 65535]] * 3), "<u2", normalized=True)
    primitive = {"attributes": {"POSITION": position, "COLOR_0": color}}
    mesh = read_mesh(gltf.save(tmp_path / "a.glb", [primitive]))
    assert (
        np.allclose(mesh.vertices, [[0, 0, 0], [1, 0, 0], [0, 0, 3]])
        and (mesh.tint == [1, 0, 0]).all()
        and not mesh.notes
    )


def test_a_skin_moves_its_vertices_and_the_node_does_not(tmp_path):
    gltf = Gltf()
    inverse = np.eye(4)
    inverse[3, 0] = -1  # column by column: bound at x = 1
    skin = {
        "joints": [1, 2],
        "inverseBindMatrices": gltf.array(np.stack([np.eye(4), inverse]).reshape(2, 16)),
    }
    joints = gltf.array([[0, 1, 0, 0]] * 3, "<u1")
    weights = gltf.array([[1, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.5, 0, 0]])
    gltf.document |= {"skins": [skin], "scenes": [{"nodes": [0, 1]}]}
    turned = [0, 0, np.sqrt(0.5), np.sqrt(0.5)]  # a quarter turn about z
    gltf.document["nodes"] = [
        {"mesh": 0, "skin": 0, "translation": [50, 0, 0]},
        {"children": [2]},
        {"translation": [1, 0, 0], "rotation": turned},
    ]
    primitive = gltf.primitive(
        [[0, 0, 0], [2, 0, 0], [2, 0, 0]], JOINTS_0=joints, WEIGHTS_0=weights
    )
    mesh = read_mesh(gltf.save(tmp_path / "a.glb", [primitive]))
    assert np.allclose(
        mesh.vertices, np.array([[0, 0, 0], [1, 1, 0], [1.5, 0.5, 0]]) @ ZUP.T, atol=1e-6
    )


def test_base_colour_is_texture_times_factor_times_vertex_colour_in_linear_light(tmp_path):
    gltf = Gltf()
    texel = np.array([200, 150, 90])
    factor = np.array([0.9, 0.3, 0.5])
    tint = np.array([0.5, 0.8, 0.25])
    gltf.document |= {
        "images": [
            {"bufferView": gltf.view(png(np.full((4, 4, 3), texel))), "mimeType": "image/png"}
        ]
    }
    base = {"baseColorFactor": [*factor, 0.1], "baseColorTexture": {"index": 0}}
    gltf.document |= {"textures": [{"source": 0}], "materials": [{"pbrMetallicRoughness": base}]}
    primitive = square(gltf, material=0, COLOR_0=gltf.array(np.tile(tint, (4, 1))))
    seen = front(gltf.save(tmp_path / "a.glb", [primitive]))[8, 8]
    linear = (
        np.where(
            texel / 255 <= 0.04045, texel / 255 / 12.92, ((texel / 255 + 0.055) / 1.055) ** 2.4
        )
        * factor
        * tint
    )
    assert np.allclose(seen, [*(1.055 * linear ** (1 / 2.4) - 0.055), 1], atol=2.1 / 255), (
        "alpha of OPAQUE is ignored"
    )


# red at the top left
QUARTERS = (
    np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]).repeat(4, 0).repeat(4, 1)
)


@pytest.mark.parametrize("store", ["view", "data", "file"])
def test_where_a_picture_may_be_and_which_way_up(tmp_path, store):
    gltf = Gltf()
    data = png(QUARTERS)
    (tmp_path / "a b.png").write_bytes(data)
    image = {
        "view": {"bufferView": gltf.view(data), "mimeType": "image/png"},
        "data": {"uri": "data:image/png;base64," + base64.b64encode(data).decode()},
        "file": {"uri": "a%20b.png"},
    }[store]
    gltf.document |= {"images": [image], "textures": [{"source": 0}]}
    gltf.document["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
    path = gltf.save(tmp_path / "a.glb", [square(gltf, material=0)])
    seen = front(path)
    expected = [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert np.allclose([seen[5, 5], seen[5, 10], seen[10, 5], seen[10, 10]], expected, atol=0.02)
    before = content_hash(path)
    (tmp_path / "a b.png").write_bytes(png(QUARTERS[::-1]))
    assert (content_hash(path) != before) == (store == "file")


def test_other_texture_coordinates_moved_and_clamped(tmp_path):
    gltf = Gltf(extensionsRequired=["KHR_texture_transform"])
    gltf.document |= {
        "images": [{"bufferView": gltf.view(png(QUARTERS))}],
        "textures": [{"source": 0, "sampler": 0}],
    }
    gltf.document["samplers"] = [{"wrapS": 33071}]
    move = {"offset": [0.5, 0.0], "scale": [0.25, 0.25], "texCoord": 1}
    info = {"index": 0, "texCoord": 0, "extensions": {"KHR_texture_transform": move}}
    gltf.document["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": info}}]
    path = tmp_path / "a.glb"
    primitive = square(gltf, material=0, uv=UV + 7, TEXCOORD_1=gltf.array(UV))
    seen = front(gltf.save(path, [primitive]))
    assert np.allclose(seen[6:10, 6:10], [0, 1, 0, 1], atol=0.02) and not read_mesh(path).notes
    move |= {"scale": [0.75, 1], "offset": [0.5, 0]}
    seen = front(gltf.save(path, [primitive]))
    # u from 0.5 to 1.25: at the border it stays, and is not repeated
    assert np.allclose(seen[5, 5:12], [0, 1, 0, 1], atol=0.02) and not read_mesh(path).notes


@pytest.mark.parametrize(
    "mode, left, right", [("OPAQUE", 1, 1), ("MASK", 0, 1), ("BLEND", 0.2, 0.4)]
)
def test_alpha_modes(tmp_path, mode, left, right):
    gltf = Gltf()
    pixels = np.full((4, 4, 4), 255)
    pixels[:, :2, 3] = 102
    pixels[:, 2:, 3] = 204
    gltf.document |= {
        "images": [{"bufferView": gltf.view(png(pixels))}],
        "textures": [{"source": 0}],
    }
    base = {"baseColorTexture": {"index": 0}, "baseColorFactor": [1, 1, 1, 0.5]}
    gltf.document["materials"] = [
        {"pbrMetallicRoughness": base, "alphaMode": mode, "alphaCutoff": 0.3}
    ]
    seen = front(gltf.save(tmp_path / "a.glb", [square(gltf, material=0)]))
    assert np.allclose([seen[8, 4, 3], seen[8, 11, 3]], [left, right], atol=0.01)


def test_materials_of_other_kinds(tmp_path):
    gltf = Gltf(extensionsRequired=["KHR_materials_pbrSpecularGlossiness"])
    gloss = {"KHR_materials_pbrSpecularGlossiness": {"diffuseFactor": [0.2, 0.4, 0.6, 1]}}
    gltf.document["materials"] = [
        {"extensions": gloss, "pbrMetallicRoughness": {"baseColorFactor": [1, 0, 0, 1]}}
    ]
    faces = [gltf.primitive(TRIANGLE, material=0), gltf.primitive(TRIANGLE)]
    mesh = read_mesh(gltf.save(tmp_path / "a.glb", faces))
    assert mesh.materials[0].color == (0.2, 0.4, 0.6) and mesh.materials[0].linear
    assert mesh.materials[1].color == (0.8, 0.8, 0.8) and not mesh.materials[1].linear
