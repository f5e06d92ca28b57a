"""Names in files of strangers: what they may reach, and what is no file."""

import json
import os

import numpy as np
import pytest

from tests.helpers.mesh_files import Gltf, box, png, quad, square, write_obj
from tests.helpers.prepare import SMALL, command, metadata
from train.meshes.files import below, read_file, read_lines
from train.meshes.read import content_hash, read_mesh

RED = np.full((2, 2, 3), (255, 0, 0), np.uint8)
ADVICE = "--root names the folder that files may lie in"


def test_below_follows_links_and_dots(tmp_path):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for folder in (root / "in", tmp_path / "out"):
        (folder / "a.png").write_bytes(b"a")
    (root / "within").symlink_to("in")
    (root / "away").symlink_to("../out")
    (root / "circle").symlink_to("circle")
    (tmp_path / "alias").symlink_to(root)
    for name in ("in/a.png", "in/../in/a.png", "within/a.png", "absent", "."):
        assert below(root, root / name) == root / name
        below(tmp_path / "alias", root / name)
        below(root, tmp_path / "alias" / name)
    for name in ("../out/a.png", "away/a.png", "in/../../out", "..", "../root2"):
        with pytest.raises(ValueError, match=f"^'.*{name}' leads out of {root}, to '"):
            below(root, root / name)
    with pytest.raises(ValueError, match="leads out of .*, to '/etc'"):
        below(root, root / "/etc")
    with pytest.raises(ValueError, match=r"a\\x00b' is no path: "):
        below(root, root / "a\0b")
    with pytest.raises(OSError):  # a circle of links
        read_file(below(root, root / "circle"))


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "file") == read_file(tmp_path / "link") == b"abc"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(ValueError, match=f"^{name} is not a file$"):
            read_file(tmp_path / name)


def reaching(folder, name: str, kind: str):
    """A mesh of the folder whose texture or materials have that name."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "map_Kd":
        return write_obj(folder, "a", quad(), f"newmtl m\nmap_Kd {name}\n")
    if kind == "mtllib":
        return write_obj(folder, "a", f"mtllib {name}\n" + quad())
    gltf = Gltf(images=[{"uri": name}], textures=[{"source": 0}])
    gltf.document["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
    return gltf.save(folder / "a.glb", [square(gltf, material=0)])


OUTSIDE = {
    "map_Kd": "../textures/t.png",
    "mtllib": "../textures/t.mtl",
    "uri": "../textures/t.png",
    "uri ": "%2e%2e/textures/t.png",
    "uri  ": "..%5Ctextures%5Ct.png",
    "uri   ": "link/t.png",
    "map_Kd ": "link/t.png",
    "mtllib ": "link/T.MTL",
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_a_name_stays_below_the_root(tmp_path, kind):
    textures = tmp_path / "all" / "textures"
    textures.mkdir(parents=True)
    (textures / "t.png").write_bytes(png(RED))
    (textures / "t.mtl").write_text("newmtl m\nKd 1 0 0\n")
    path = reaching(tmp_path / "all" / "model", OUTSIDE[kind], kind.strip())
    (path.parent / "link").symlink_to(textures)
    for read in (read_mesh, content_hash):
        with pytest.raises(
            ValueError, match=f"leads out of {path.parent}, to '{textures}.*{ADVICE}"
        ):
            read(path)
    material = read_mesh(path, tmp_path / "all").materials[0]
    texture = (1, 1, 1) if material.texture is None else material.texture[0, 0, :3] / 255
    assert (np.array(material.color) * texture).tolist() == [1, 0, 0]
    before = content_hash(path, tmp_path / "all")
    (textures / "t.png").write_bytes(png(RED // 2))
    (textures / "t.mtl").write_text("newmtl m\nKd 0 1 0\n")
    assert content_hash(path, tmp_path / "all") != before


@pytest.mark.parametrize("kind", ["map_Kd", "uri"])
@pytest.mark.parametrize(
    "name", ["C:\\art\\t.png", "/home/me/t.png", "../t.png", "file:///x/t.png"]
)
def test_the_file_of_that_name_beside_the_mesh(tmp_path, kind, name):
    path = reaching(tmp_path / "in", name, kind)
    (path.parent / "t.png").write_bytes(png(RED))
    (tmp_path / "t.png").write_bytes(png(RED // 2))
    assert read_mesh(path).materials[0].texture[0, 0].tolist() == [255, 0, 0, 255]


def test_tiles_are_no_links_that_lead_out(tmp_path):
    path = reaching(tmp_path / "in", "t.1001.png", "map_Kd")
    (path.parent / "t.1001.png").write_bytes(png(RED))
    (tmp_path / "secret.png").write_bytes(png(RED))
    (path.parent / "t.1002.png").symlink_to("../secret.png")
    with pytest.raises(ValueError, match="t.1002.png' leads out of"):
        read_mesh(path)


def test_root_of_the_command(tmp_path, capsys):
    path = reaching(tmp_path / "all" / "model", "../t.png", "map_Kd")
    (tmp_path / "all" / "t.png").write_bytes(png(RED))
    (tmp_path / "away.obj").write_text(box()[0])
    (path.parent / "b.obj").symlink_to("../../away.obj")
    (tmp_path / "list.txt").write_text("model/a.obj\n")

    def skipped(*meshes) -> int:
        command(*meshes, "--out", tmp_path / "o", *SMALL)
        lines = capsys.readouterr().out.splitlines()
        return sum(line.startswith(f"skipped {tmp_path}") and ADVICE in line for line in lines)

    assert skipped(path) == 1
    assert skipped(path.parent) == 2, "the texture of a, and the link b"
    root = ("--root", tmp_path / "all")
    assert skipped(tmp_path / "list.txt", *root) == 0
    assert skipped(path, path.parent, *root) == 1, "the link b leads out of that as well"
    assert skipped(tmp_path / "all") == 1
    assert len(metadata(tmp_path / "o")) == 1
    assert skipped(path.parent, "--root", tmp_path) == 0
    assert len(metadata(tmp_path / "o")) == 2


NOWHERE = ["x" * 300 + ".png", "d/" * 1500 + "t.png", "\ud800.png", "a\0b.png"]


@pytest.mark.parametrize("name", NOWHERE, ids=["long", "deep", "surrogate", "nul"])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(ValueError, match="^a.glb cannot be read: "):
        read_mesh(reaching(tmp_path, json.loads(json.dumps(name)), "uri"))


def test_pipes_and_folders_are_no_textures(tmp_path):
    for name, kind in (("pipe.png", "map_Kd"), ("folder.png", "uri")):
        path = reaching(tmp_path, name, kind)
        os.mkfifo(tmp_path / name) if "pipe" in name else (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"{name}' .*does not exist"):
            read_mesh(path)
    (tmp_path / "folder.obj").mkdir()
    with pytest.raises(ValueError, match="^folder.obj is not a file$"):
        read_mesh(tmp_path / "folder.obj")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_every_ending_and_encoding(tmp_path, encoding):
    text = "a \\\nb\r\nc\r\rd \x0b e\\\n\\\nf"
    (tmp_path / "t").write_bytes(text.encode(encoding) + bytes(4))
    assert list(read_lines(tmp_path / "t")) == [(1, "a  b"), (3, "c"), (4, ""), (5, "d \x0b e  f")]
    (tmp_path / "t").write_bytes(b"\xff\xfea\0\0")
    with pytest.raises(ValueError, match="^t begins as utf-16-le and is not: truncated data$"):
        list(read_lines(tmp_path / "t"))


def test_a_picture_of_many_names_is_one(tmp_path):
    gltf = Gltf(images=[{"uri": name} for name in ("t.png", "./t.png", "x/../t.png")])
    gltf.document["textures"] = [{"source": i} for i in range(3)]
    (tmp_path / "x").mkdir()
    (tmp_path / "t.png").write_bytes(png(RED))
    slots = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": i}}} for i in range(3)]
    gltf.document["materials"] = slots
    mesh = read_mesh(gltf.save(tmp_path / "a.glb", [square(gltf, material=i) for i in range(3)]))
    assert len({id(material.texture) for material in mesh.materials}) == 1
