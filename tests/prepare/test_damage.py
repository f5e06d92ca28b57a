"""Untrusted files: a bad one is named, costs itself alone, and reaches nothing outside."""

import ast
import base64
import json
import multiprocessing
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from tests.helpers.damaged_files import damaged, mesh_of, pristine
from tests.helpers.datasets import AA, enormous, make, opened
from tests.helpers.mesh_files import (
    FACES,
    MIXED,
    POINTS,
    TRIANGLE,
    Gltf,
    box,
    ply,
    quad,
    square,
    write_obj,
)
from tests.helpers.prepare import command, metadata
from tests.helpers.source_files import SOURCES
from train.meshes.pictures import decode
from train.meshes.read import content_hash, read_mesh

SMALL = (
    "--size",
    8,
    "--views",
    2,
    "--holdout-views",
    1,
    "--resolution",
    4,
    "--workers",
    0,
    "--supersample",
    1,
)


def test_thirty_damaged_meshes_and_a_good_one(tmp_path, capsys):
    rng = np.random.default_rng(14)
    meshes = {}
    for i in range(30):
        folder = tmp_path / "in" / f"{i:02d}"
        folder.mkdir(parents=True)
        files = pristine(folder)
        victim = files[rng.integers(len(files))]
        victim.write_bytes(damaged(victim, victim.read_bytes(), rng))
        meshes[mesh_of(victim)] = victim
    good = write_obj(tmp_path / "in", "good", *box((1, 0.3, 0.2)))
    (tmp_path / "list.txt").write_text(
        "\n".join(str(m.relative_to(tmp_path)) for m in [*meshes, good])
    )
    assert command(tmp_path / "list.txt", "--root", tmp_path, "--out", tmp_path / "o", *SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    made = {row["local_path"] for row in metadata(tmp_path / "o")}
    assert "in/good.obj" in made
    for mesh, victim in meshes.items():
        said = [line for line in lines if line.startswith(f"skipped {mesh}")]
        assert len(said) + (str(mesh.relative_to(tmp_path)) in made) == 1, f"{victim}: {said}"


def gltf(change) -> dict:
    made = Gltf()
    primitive = made.primitive(TRIANGLE)
    data = "data:;base64," + base64.b64encode(made.data).decode()
    content = {"buffers": [{"byteLength": len(made.data), "uri": data}], "nodes": [{"mesh": 0}]}
    document = made.document | content | {"meshes": [{"primitives": [primitive]}]}
    change(document)
    return document


def put(*path, value):
    def change(document):
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


NO_DATA = {"componentType": 5126, "type": "VEC3", "count": 1 << 40}
GLTF = {
    "buffers[0].uri is 5, not text": put("buffers", 0, "uri", value=5),
    "buffers is 5, not a list": put("buffers", value=5),
    "images[0] is 'x', not an object": put("images", value=["x"]),
    "meshes[0].primitives is {}, not a list": put("meshes", 0, "primitives", value={}),
    "accessors[0].count is -3, not a whole number from 0 up": put(
        "accessors", 0, "count", value=-3
    ),
    "accessors[0].count is True, not a whole number": put("accessors", 0, "count", value=True),
    "bufferViews[0].byteOffset is -4, not": put("bufferViews", 0, "byteOffset", value=-4),
    "node 0, mesh 7: it uses number 7 of its 1 meshes": put("nodes", 0, "mesh", value=7),
    "node 0, mesh 0, primitive 0: accessor 0, of 1099511627776 rows but no data, would take": put(
        "accessors", 0, value=NO_DATA
    ),
    "node 0, mesh 0, primitive 0: it has no 'attributes'": put(
        "meshes", 0, "primitives", value=[{}]
    ),
    "it has no 'asset'": lambda document: document.pop("asset"),
}


@pytest.mark.parametrize("message", GLTF)
def test_gltf_of_other_types(tmp_path, message):
    file = tmp_path / "a.gltf"
    file.write_text(json.dumps(gltf(lambda document: None)))
    read_mesh(file)
    file.write_text(json.dumps(gltf(GLTF[message])))
    with pytest.raises(ValueError, match="^a.gltf cannot be read: " + re.escape(message)):
        read_mesh(file)


MTL = {
    "d": "d '' is no number",
    "Kd": "Kd '' is no number",
    "Kd nan 0 0": "Kd 'nan 0 0' is no number",
    "Tr": "Tr '' is no number",
    "Ke inf": "Ke 'inf' is no number",
}


@pytest.mark.parametrize("statement", MTL)
def test_mtl_statements_without_their_numbers(tmp_path, statement):
    path = write_obj(tmp_path, "a", quad(), f"newmtl m\n{statement}\n")
    with pytest.raises(ValueError, match=f"^a.mtl: material 'm': {MTL[statement]}"):
        read_mesh(path)


PLY = {
    "property int vertex_indices": "the corners of a face are a list",
    "property list uchar float vertex_indices": "the corners of a face are a list of whole numbers",
    "property list float int vertex_indices": "the length of a list is a whole number",
    "property list uchar int red": "red is a number, not a list",
    "property wide x": "is not understood",
    "property list uchar int": "is not understood",
    "property uchar a\nproperty uchar a": "there is a property of that name already",
}


@pytest.mark.parametrize("properties", PLY)
@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian"])
def test_ply_properties_of_other_types(tmp_path, properties, kind):
    rows = [("3d", tuple(p)) for p in POINTS.tolist()]
    path = ply(tmp_path / "a.ply", kind, f"element face 2\n{properties}\n", rows, MIXED)
    with pytest.raises(
        ValueError, match=f"^a.ply cannot be read: header line '.*' ?.*{PLY[properties]}"
    ):
        read_mesh(path)


def test_ply_rows_without_columns_and_numbers_that_do_not_fit(tmp_path):
    rows = [("3d", tuple(p)) for p in POINTS.tolist()]
    path = ply(tmp_path / "a.ply", "ascii", FACES + "element none 1000000000000\n", rows, MIXED)
    assert len(read_mesh(path).faces) == 3  # at once
    path = ply(tmp_path / "a.ply", "ascii", FACES, rows, [MIXED[0], ("", (3, 0, 1, "1e99"))])
    with pytest.raises(
        ValueError, match="^a.ply cannot be read: 1e[+]99 is no number of type int32"
    ):
        read_mesh(path)
    path = ply(tmp_path / "a.ply", "ascii", "element face -1\n", rows, [])
    with pytest.raises(
        ValueError,
        match="^a.ply cannot be read: header line 'element face -1': a negative number of rows",
    ):
        read_mesh(path)


# pictures

EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n%%EndComments\n24 24 "
    b"scale\nshowpage\n%%EOF\n"
)


def test_an_eps_by_the_name_of_a_png_starts_nothing(tmp_path, monkeypatch):
    started = []
    drawn = Image.new("RGB", (24, 24)).im
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *args, **more: started.append(args) or drawn
    )
    (tmp_path / "a.png").write_bytes(EPS)
    with Image.open(tmp_path / "a.png") as image:
        image.load()
    assert len(started) == 1, "what it would have done"
    path = write_obj(tmp_path, "a", quad(), "newmtl m\nmap_Kd a.png\n")
    refusal = r"it is no picture \(PNG, WEBP, JPEG, TGA, BMP, TIFF, GIF, DDS\)"
    with pytest.raises(
        ValueError, match=f"^a.mtl: texture 'a.png' of material 'm' cannot be read: {refusal}$"
    ):
        read_mesh(path)
    model = Gltf(images=[{"uri": "a.png"}], textures=[{"source": 0}])
    model.document["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
    with pytest.raises(ValueError, match=refusal):
        read_mesh(model.save(tmp_path / "a.glb", [square(model, material=0)]))
    root = make(tmp_path / "data")
    (root / "renders" / AA / "000.png").write_bytes(EPS)
    with pytest.raises(
        ValueError,
        match=r"000.png is truncated or not a picture: it is no picture \(PNG, WEBP, JPEG\)",
    ):
        opened(root).item(AA)
    assert len(started) == 1


def test_pictures_are_opened_by_format_everywhere():
    for file in [file for file in SOURCES if "from PIL import" in file.read_text()]:
        calls = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
        ]
        for call in calls:
            if ast.unparse(call.func) in ("Image.open", "Picture.open", "PIL.Image.open"):
                assert "formats" in [keyword.arg for keyword in call.keywords], (
                    f"{file.name}:{call.lineno}"
                )


@pytest.mark.parametrize("name", ["PNG", "WEBP", "JPEG", "TGA", "BMP", "TIFF", "GIF", "DDS"])
def test_textures_of_every_format(tmp_path, name):
    Image.new("RGB", (4, 6), (200, 0, 0)).save(tmp_path / "t", name)
    pixels = decode(tmp_path / "t", "a", "t")
    assert pixels.shape == (6, 4, 4) and abs(pixels[..., 0].astype(int) - 200).max() < 9


def test_a_texture_of_too_many_pixels(tmp_path):
    make(tmp_path, [AA])
    enormous(tmp_path)
    data = (tmp_path / "renders" / AA / "000.png").read_bytes()
    with pytest.raises(
        ValueError,
        match=r"^a: texture t cannot be read: Image size \(900000000 pixels\) exceeds limit of "
        r"17895",
    ):
        decode(data, "a", "t")


def test_features_that_a_small_archive_makes_enormous(tmp_path, monkeypatch):
    root = make(tmp_path)
    monkeypatch.setattr("train.meshes.budget.FREE", 0)
    monkeypatch.setattr("train.meshes.budget.A_BYTE", 0)
    with pytest.raises(
        ValueError,
        match="a{64}.npz cannot be read: its arrays would take 1 MB of memory, over the limit of 0",
    ):
        opened(root).item(AA)


# names and what they lead to


def test_an_absolute_name_is_looked_for_beside_the_mesh_only(tmp_path):
    elsewhere = tmp_path / "private" / "a.png"
    elsewhere.parent.mkdir()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(elsewhere)
    path = write_obj(tmp_path / "in", "a", quad(), f"newmtl m\nmap_Kd {elsewhere}\n")
    with pytest.raises(ValueError, match="private/a.png' of material 'm' does not exist"):
        read_mesh(path)
    Image.new("RGB", (4, 4), (0, 0, 255)).save(tmp_path / "in" / "a.png")
    assert read_mesh(path).materials[0].texture[0, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("line", ["../a.obj", "/etc/a.obj", "b/../../a.obj", "a\\b.obj", "c:a.obj"])
def test_a_list_stays_below_its_root(tmp_path, capsys, line):
    (tmp_path / "in").mkdir()
    write_obj(tmp_path, "a", *box())
    (tmp_path / "in" / "l.txt").write_text(f"{line}\n")
    assert (
        command(
            tmp_path / "in" / "l.txt", "--root", tmp_path / "in", "--out", tmp_path / "o", *SMALL
        )
        == 2
    )
    assert (
        f"l.txt: {line!r} is no path below {tmp_path}/in" in capsys.readouterr().err
        and not (tmp_path / "o").exists()
    )


def test_what_is_no_file_and_names_of_any_bytes(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.obj")
    (tmp_path / "folder.obj").mkdir()
    strange = write_obj(tmp_path, "b", *box()).rename(tmp_path / "b\udcff.obj")
    good = write_obj(tmp_path, "good", *box())
    files = (tmp_path / "pipe.obj", strange, good)
    assert command(*files, "--out", tmp_path / "o", *SMALL) == 0
    output = capsys.readouterr().out
    assert f"skipped {tmp_path}/pipe.obj is not a file" in output
    assert (
        f"skipped {tmp_path}/b\\udcff.obj: its name is not UTF-8" in output
        and len(metadata(tmp_path / "o")) == 1
    )


def test_a_dataset_that_cannot_take_another_row_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "metadata.csv").write_text("sha256\n../../x\n")
    assert command(write_obj(tmp_path, "a", *box()), "--out", tmp_path / "o", *SMALL) == 2
    assert (
        "metadata.csv: sha256 of row 1 of 1 is '../../x', not 64 digits" in capsys.readouterr().err
    )
    assert not (tmp_path / "o" / "renders").exists()


@pytest.mark.parametrize("name", ["..", "a/../../b", "/etc", "a/b", ""])
def test_features_are_a_folder_of_the_dataset(tmp_path, name):
    with pytest.raises(ValueError, match=f"features {re.escape(repr(name))} is no name"):
        opened(make(tmp_path), features=name)


# processes


def test_an_object_that_kills_its_process_is_named_and_the_others_are_made(tmp_path, capsys):
    files = [
        write_obj(tmp_path, name, *box((1, 0.2 + 0.1 * i, 0.5))) for i, name in enumerate("abc")
    ]

    # as if an earlier run had begun: it vanishes when this one begins
    begun = tmp_path / "o" / "renders" / f"{content_hash(files[0])}.partial" / "000.png"
    begun.parent.mkdir(parents=True)
    begun.touch()

    def kill():
        while begun.exists() and not begun.stat().st_size:
            time.sleep(0.001)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGSEGV)

    killer = threading.Thread(target=kill)
    killer.start()
    many = (*SMALL, "--workers", 1, "--views", 99)
    assert command(*files, "--out", tmp_path / "o", *many) == 0
    killer.join()
    output = capsys.readouterr().out
    assert re.search(
        rf"skipped {files[0]}: worker 0 \(process \d+\) was ended by SIGSEGV\n", output
    ), output
    assert [row["local_path"] for row in metadata(tmp_path / "o")] == [
        "b.obj",
        "c.obj",
    ] and "1 skipped" in output
    assert not list((tmp_path / "o").rglob("*.partial")) and not multiprocessing.active_children()
    assert (
        command(*files, "--out", tmp_path / "o", *SMALL, "--views", 99) == 0
        and len(metadata(tmp_path / "o")) == 3
    )
