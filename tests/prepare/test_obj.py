"""OBJ and MTL files as exporters and scanners write them: what is shown, noted and refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.front import front
from tests.helpers.mesh_files import quad, write_obj
from train.meshes.read import content_hash, read_mesh

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
STRIP = np.array([[RED, GREEN, BLUE, WHITE]], np.uint8).repeat(4, 0).repeat(4, 1)  # 16 x 4
GREY = (0.8, 0.8, 0.8)
BARE = "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\n"


def plain(color, size: int = 4) -> np.ndarray:
    return np.full((size, size, 3), color, np.uint8)


def middle(path: Path) -> list[float]:
    return front(path)[8, 8].round(2).tolist()


# opacity


TRANSPARENCY = {  # statements: the alpha that is seen, and the note
    "Tr 1\nmap_Kd q.png": (1, "material 'm' says Tr 1 and no d: it is shown opaque"),
    "Tr 1": (1, "material 'm' says Tr 1 and no d: it is shown opaque"),
    "Tr 0.75": (0.25, None),
    "Tr 0.75\nmap_Kd q.png": (0.25, None),
    "Tr 1\nd 0.5": (0.5, None),
}


@pytest.mark.parametrize("statements", TRANSPARENCY)
def test_tr_1_is_a_writers_mistake_and_other_values_are_not(tmp_path, statements):
    alpha, note = TRANSPARENCY[statements]
    path = write_obj(tmp_path, "q", quad(), f"newmtl m\nKd 1 0 0\n{statements}\n", plain(RED))
    assert front(path)[8, 8, 3] == pytest.approx(alpha, abs=0.01)
    assert read_mesh(path).notes == ([f"q.obj: {note}"] if note else [])


def test_a_part_that_is_not_seen_is_noted(tmp_path):
    text = quad() + quad(1.0, "glass")
    mtl = "newmtl m\nKd 1 1 1\nnewmtl glass\nTr 1\n"
    note = "material 'glass' is wholly transparent: its faces are not seen"
    assert read_mesh(write_obj(tmp_path, "q", text, mtl)).notes == [f"q.obj: {note}"]


# images


OPTIONS = {  # a map statement: the colour at the left of the middle, and the note
    "q.png": (GREEN, None),
    "-s 1 1 1 -o 0 0 0 -mm 0 1 q.png": (GREEN, None),
    "-blendu on -bm 1.0 -texres 512 q.png": (GREEN, None),
    "-o 0.5 0 0 q.png": (WHITE, None),
    "-o 0.5 q.png": (WHITE, None),
    "-s 0.5 q.png": (RED, None),
    "-s 0.25 1 1 -o 0.5 0 q.png": (BLUE, None),
    "-mm 1 -1 q.png": ((255, 0, 255), None),
    "-o 1.0 0 -clamp on q.png": (WHITE, None),
    "-type sphere -colorspace sRGB q.png": (GREEN, "texture option -type of material 'm' is not"),
    "-t 0 0 0 q.png": (GREEN, None),
    "-t 0.1 0 0 q.png": (GREEN, "texture option -t of material 'm' is not applied"),
    "q.png # the picture": (GREEN, None),
}


@pytest.mark.parametrize("value", OPTIONS)
def test_options_of_an_image(tmp_path, value):
    color, note = OPTIONS[value]
    path = write_obj(tmp_path, "q", quad(), f"newmtl m\nmap_Kd {value}\n", STRIP)
    assert np.allclose(front(path, 32)[16, 13, :3], np.array(color) / 255, atol=0.02)
    notes = read_mesh(path).notes
    assert len(notes) == (note is not None) + value.startswith("-type")  # two unknown options
    assert not note or f"q.obj: {note}" in notes[0]
    before = content_hash(path)
    Image.fromarray(plain(BLUE)).save(tmp_path / "q.png")
    assert content_hash(path) != before


def test_a_name_that_begins_like_an_option(tmp_path):
    path = write_obj(tmp_path, "q", quad(), "newmtl m\nmap_Kd -s 1 my red picture.png\n")
    Image.fromarray(plain(RED)).save(tmp_path / "my red picture.png")
    assert middle(path) == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="texture 'gone -x.png' of material 'm' does not exist"):
        read_mesh(write_obj(tmp_path, "q", quad(), "newmtl m\nmap_Kd -s 1 1 gone -x.png\n"))


def test_an_image_beside_the_mtl_comes_before_one_beside_the_obj(tmp_path):
    path = write_obj(tmp_path, "q", "mtllib mats/m.mtl\n" + quad())
    (tmp_path / "mats").mkdir()
    (tmp_path / "mats" / "m.mtl").write_text("newmtl m\nmap_Kd t.png\n")
    hashes = set()
    for place, color in (("t.png", BLUE), ("mats/t.png", RED), ("mats/t.png", GREEN)):
        Image.fromarray(plain(color)).save(tmp_path / place)
        assert np.allclose(front(path)[8, 8, :3], np.array(color) / 255, atol=0.01)
        hashes.add(content_hash(path))
    Image.fromarray(plain(WHITE)).save(tmp_path / "t.png")  # which is not shown
    hashes.add(content_hash(path))
    assert len(hashes) == 3


def test_opacity_from_another_image_and_channel(tmp_path):
    mask = np.zeros((4, 4, 4), np.uint8)
    mask[..., 1] = 102  # 0.4
    mask[..., 3] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for option, alpha in (("-imfchan g", 0.4), ("", 0.4 * 0.587)):
        mtl = f"newmtl m\nmap_Kd q.png\nmap_d {option} mask.png\n"
        path = write_obj(tmp_path, "q", quad(), mtl, plain(RED))
        assert front(path)[8, 8, 3] == pytest.approx(alpha, abs=0.01)


def test_tiles_of_an_image(tmp_path):
    text = "".join(f"v {u} 0 0\nv {u} 1 0\nvt {u} 0\nvt {u} 1\n" for u in range(4))
    text += "usemtl m\n" + "".join(
        f"f {a}/{a} {a + 2}/{a + 2} {a + 3}/{a + 3} {a + 1}/{a + 1}\n" for a in (1, 3, 5)
    )
    path = write_obj(tmp_path, "q", text, "newmtl m\nmap_Kd t.1001.png\n")
    for number, color in ((1001, RED), (1002, GREEN)):
        Image.fromarray(plain(color)).save(tmp_path / f"t.{number}.png")
    seen = front(path, 48)[24, [10, 24, 37], :3]
    assert np.allclose(seen, np.array([RED, GREEN, RED]) / 255, atol=0.02)
    assert read_mesh(path).notes == [
        "q.obj: tile 1003 of material 'm' does not exist; tile 1001 is shown"
    ]
    before = content_hash(path)
    Image.fromarray(plain(BLUE)).save(tmp_path / "t.1002.png")
    assert content_hash(path) != before
    (tmp_path / "t.1002.png").unlink()  # a single image is repeated
    assert np.allclose(front(path, 48)[24, 24, :3], [1, 0, 0], atol=0.02)
    assert not read_mesh(path).notes


def test_emission_is_added_to_what_is_reflected(tmp_path):
    mtl = "newmtl m\nKd 0.2 0.2 0.2\nKe 0.1 0.3 0\n"
    seen = front(write_obj(tmp_path, "q", quad(), mtl))[8, 8, :3] * 0.5
    assert np.allclose(seen, [0.2, 0.4, 0.1], atol=0.005)  # a light of 0.5 falls on Kd
    mtl = "newmtl m\nKd 0 0 0\nKe 0 0 0\nmap_Ke -o 0.5 0 q.png\n"
    path = write_obj(tmp_path, "q", quad(), mtl, STRIP)
    assert np.allclose(front(path, 32)[16, 13, :3] * 0.5, 1, atol=0.01), "placed by itself"
    before = content_hash(path)
    Image.fromarray(plain(RED)).save(tmp_path / "q.png")
    assert content_hash(path) != before


# vertex colours


def painted(*colors: str) -> str:
    corners = ("-1 -1 0", "1 -1 0", "1 1 0", "-1 1 0")
    rows = zip(corners, colors * (4 // len(colors)), strict=True)
    return "".join(f"v {corner} {color}\n" for corner, color in rows)


COLORED = {  # vertices and faces: the colour in the middle, and the note
    painted("0.5 0.25 1") + "f 1 2 3 4": ([0.5, 0.25, 1, 1], None),
    painted("128 64 0") + "f 1 2 3 4": (
        [0.5, 0.25, 0, 1],
        "vertex colours are taken as numbers from 0 to 255",
    ),
    BARE + "f 1 2 3 4\n#MRGB ff8040ffff8040ff\n#MRGB ff8040ffff8040ff": ([0.5, 0.25, 1, 1], None),
    BARE + "f 1 2 3 4\n#MRGB ff8040ffff8040ffff8040ff": (
        None,
        "#MRGB lines have 3 colours for 4 vertices",
    ),
    BARE + "f 1 2 3 4\n#MRGB ff80": ([*GREY, 1], ", line 6: #MRGB is not understood"),
    painted("0.5 0.5 0.5", "") + "usemtl none\nf 4 2 2 4\nf 1 2 3 4": (
        None,
        "material 'none' is defined nowhere; shown grey",
    ),
}


@pytest.mark.parametrize("text", COLORED)
def test_vertex_colours(tmp_path, text):
    color, note = COLORED[text]
    path = write_obj(tmp_path, "q", text)
    if color is not None:
        assert np.allclose(middle(path), color, atol=0.01)
    found = [said for said in read_mesh(path).notes if "without area" not in said]
    assert found == ([f"q.obj{'' if note[0] == ',' else ': '}{note}"] if note else [])


@pytest.mark.parametrize(
    "color, message",
    [
        ("nan 0 0", "q.obj, line 1: the vertex colour 'nan 0 0' is no number"),
        ("0.5 1.5 0", "q.obj: vertex 0 has the colour 0.5 1.5 0: neither all from 0 to 1 nor"),
        ("300 1 0", "q.obj: vertex 0 has the colour 300 1 0: neither all from 0 to 1 nor"),
        ("-0.5 0 0", "q.obj: vertex 0 has the colour -0.5 0 0, below 0"),
    ],
)
def test_vertex_colours_of_no_range(tmp_path, color, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        read_mesh(write_obj(tmp_path, "q", painted(color) + "f 1 2 3 4\n"))


def test_vertex_colours_multiply_a_material(tmp_path):
    text = painted("0.5 0.5 1") + "usemtl m\nf 1 2 3 4\n"
    assert middle(write_obj(tmp_path, "q", text, "newmtl m\nKd 0.5 1 1\n")) == [0.25, 0.5, 1, 1]
    assert middle(write_obj(tmp_path, "q", text, "newmtl m\nNs 10\n")) == [0.5, 0.5, 1, 1]


# text


MARKS = {"none": ("utf-8", b""), "utf-8": ("utf-8", b"\xef\xbb\xbf")} | {
    name: (name, mark) for name, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff"))
}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("first", ["mtllib q.mtl\n", ""])
def test_byte_order_marks_and_padding(tmp_path, mark, first):
    encoding, start = MARKS[mark]
    text = first + quad() + ("" if first else "mtllib q.mtl\n")
    (tmp_path / "q.obj").write_bytes(start + text.encode(encoding) + "\0\0".encode(encoding))
    mtl = "newmtl m\nKd 1 0 0\n"
    (tmp_path / "q.mtl").write_bytes(start + mtl.encode(encoding))
    assert middle(tmp_path / "q.obj") == [1, 0, 0, 1] and not read_mesh(tmp_path / "q.obj").notes


def test_comments_continued_lines_and_the_number_of_a_bad_one(tmp_path):
    text = "v -1 -1 0 # the lower left one\nv 1 -1 0#\nv 1 1 \\\n0\nv -1 1 0\nf 1 2 \\\n3 4 # all\n"
    for used, defined in (("a #1", "a #1"), ("a", "a # red"), ("a # red", "a")):
        used = f"mtllib q.mtl # the materials\n{text}usemtl {used}\nf 1 2 3\n"
        path = write_obj(tmp_path, "q", used)
        (tmp_path / "q.mtl").write_text(f"newmtl {defined}\nKd 1 0 0 # red\n")
        mesh = read_mesh(path)
        assert len(mesh.faces) == 3 and mesh.materials[0].color == (1, 0, 0) and not mesh.notes
    with pytest.raises(ValueError, match="^q.obj, line 8: "):
        read_mesh(write_obj(tmp_path, "q", text + "f 1 2 x\n"))


@pytest.mark.parametrize(
    "encoding, name", [("gb18030", "红"), ("latin-1", "Möbel"), ("utf-8", "é")]
)
def test_names_in_other_encodings(tmp_path, encoding, name):
    (tmp_path / "q.obj").write_text(f"mtllib q.mtl\n{quad(material=name)}", encoding="utf-8")
    (tmp_path / "q.mtl").write_bytes(f"newmtl {name}\nmap_Kd {name}.png\n".encode(encoding))
    Image.fromarray(plain(RED)).save(tmp_path / f"{name}.png")
    assert middle(tmp_path / "q.obj") == [1, 0, 0, 1] and not read_mesh(tmp_path / "q.obj").notes
    shutil.move(tmp_path / f"{name}.png", tmp_path / "E\u0301.PNG")  # decomposed, in capitals
    if name == "é":
        assert middle(tmp_path / "q.obj") == [1, 0, 0, 1]


ABSENT = {  # text of the OBJ, of the MTL, the notes
    "mtl": (
        "mtllib gone.mtl\n" + quad(),
        "",
        [
            ", line 1: material file 'gone.mtl' does not exist",
            ": material 'm' is defined nowhere; shown grey",
        ],
    ),
    "image": (quad(), "newmtl m\nmap_Kd\n", [": map_kd of material 'm' names no image"]),
    "lines": (quad() + "l 1 2\n", "newmtl m\n", [": its lines are not shown"]),
}


@pytest.mark.parametrize("case", ABSENT)
def test_what_is_absent_is_noted(tmp_path, case):
    text, mtl, notes = ABSENT[case]
    path = write_obj(tmp_path, "q", text, mtl)
    assert np.allclose(middle(path), [*GREY, 1], atol=0.01)
    assert read_mesh(path).notes == [f"q.obj{note}" for note in notes]
