"""train.prepare on meshes and settings that cannot be used, and on copies."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.mesh_files import box, quad, write_obj
from tests.helpers.prepare import SMALL, command, metadata
from train.prepare import objects

GOOD = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
BAD = {
    "no faces": (GOOD, "", "bad.obj has no faces"),
    "nan": (
        GOOD.replace("v 1", "v nan") + "f 1 2 3\n",
        "",
        "bad.obj: 1 of 3 vertices are not finite, the first is vertex 2",
    ),
    "no texture": (
        quad(),
        "newmtl m\nmap_Kd gone.png\n",
        "bad.obj: bad.mtl: texture 'gone.png' of material 'm' does not exist",
    ),
    "bad texture": (
        quad(),
        "newmtl m\nmap_Kd bad.obj\n",
        "bad.obj: bad.mtl: texture 'bad.obj' of material 'm' cannot be read",
    ),
    "empty": ("", "", "bad.obj is empty"),
    "index": (GOOD + "f 1 2 4\n", "", "bad.obj, line 4: '4' points at row 4 of 3"),
    "words": ("v 0 0 zero\n", "", "bad.obj, line 1: could not convert string to float: 'zero'"),
    "point": (
        "v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n",
        "",
        "bad.obj: all 3 vertices are the same point",
    ),
    "invisible": (
        quad(),
        "newmtl m\nd 0\n",
        "bad.obj: every view is empty: all surfaces are transparent",
    ),
    "opacity": (
        quad(),
        "newmtl m\nd much\n",
        "bad.obj: bad.mtl: material 'm': could not convert string to float: 'much'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_mesh_is_named_and_skipped(pair, tmp_path, capsys, case):
    text, mtl, message = BAD[case]
    bad = write_obj(tmp_path / "bad", "bad", text, mtl)
    message = f"skipped {bad.parent}/{message}"
    assert command(bad, "--out", tmp_path / "o", *SMALL) == 1, "all failed"
    assert message in capsys.readouterr().out
    assert not [p for p in (tmp_path / "o").rglob("*") if p.suffix in (".png", ".partial", ".csv")]
    assert command(bad, pair / "a.obj", "--out", tmp_path / "o", *SMALL) == 0, (
        "the other one was made"
    )
    output = capsys.readouterr().out
    assert message in output and "1 objects (1 made, 0 there already), 4 views, 1 skipped" in output


def test_other_bad_input(pair, tmp_path, capsys):
    (tmp_path / "x.stl").write_text("solid")
    for length in (0, 3, 12, 40):
        (tmp_path / f"{length}.glb").write_bytes((b"glTF\2\0\0\0" + bytes(60))[:length])
    for name in ("copy.obj", "a.mtl"):
        shutil.copy(pair / name.replace("copy", "a"), tmp_path / name)
    files = [
        tmp_path / "x.stl",
        *(tmp_path / f"{n}.glb" for n in (0, 3, 12, 40)),
        pair / "a.obj",
        tmp_path / "copy.obj",
    ]
    assert command(*files, pair / "gone.obj", "--out", tmp_path / "o", *SMALL) == 0
    output = capsys.readouterr().out
    messages = [
        "x.stl: unknown extension .stl",
        "0.glb is empty",
        "3.glb cannot be read",
        "12.glb cannot be read",
    ]
    messages += ["40.glb cannot be read", "copy.obj: the same mesh", "in/gone.obj: No such file"]
    assert all(f"skipped {tmp_path}/{m}" in output for m in messages) and "7 skipped" in output
    assert (
        command(pair / "gone.obj", "--out", tmp_path / "none") == 1
        and not (tmp_path / "none").exists()
    )


def textured(folder: Path, red: int) -> Path:
    image = np.full((2, 2, 3), (red, 50, 50), np.uint8)
    return write_obj(folder, "cube", quad(), "newmtl m\nmap_Kd cube.png\n", image)


def test_objects_are_the_same_only_with_their_materials_and_textures(tmp_path, capsys):
    first, second = textured(tmp_path / "in/a", 10), textured(tmp_path / "in/b", 200)
    third = textured(tmp_path / "in/c", 200)
    assert first.read_bytes() == second.read_bytes()
    assert command(tmp_path / "in", "--out", tmp_path / "o", *SMALL) == 0
    output = capsys.readouterr().out
    assert (
        "2 objects (2 made" in output
        and f"skipped {third}: the same mesh, materials and textures as {second}" in output
    )
    rows = metadata(tmp_path / "o")
    assert [row["local_path"] for row in rows] == ["a/cube.obj", "b/cube.obj"]
    reds = [
        np.load(tmp_path / f"o/features/rgb_4/{row['sha256']}.npz")["patchtokens"][:, 0].max()
        for row in rows
    ]
    assert reds[0] < 0.1 < 0.4 < reds[1]


def test_a_broken_copy_does_not_stand_for_a_good_one(tmp_path, capsys):
    good = textured(tmp_path / "in/good", 10)
    (tmp_path / "in/bad").mkdir()
    for name in ("cube.obj", "cube.mtl"):  # without its texture
        shutil.copy(good.with_name(name), tmp_path / "in/bad" / name)
    box_file = write_obj(tmp_path, "box", box()[0])
    (tmp_path / "box.ply").write_bytes(box_file.read_bytes())
    assert (
        command(tmp_path / "in", tmp_path / "box.ply", box_file, "--out", tmp_path / "o", *SMALL)
        == 0
    )
    output = capsys.readouterr().out
    assert (
        f"skipped {tmp_path}/in/bad/cube.obj: cube.mtl: texture 'cube.png'" in output
        and f"skipped {tmp_path}/box.ply" in output
    )
    assert "2 objects (2 made, 0 there already), 8 views, 2 skipped" in output
    assert [row["local_path"] for row in metadata(tmp_path / "o")] == ["box.obj", "good/cube.obj"]


def test_no_progress_bar_among_the_lines_of_a_file(pair, tmp_path, capsys):
    assert command(pair, pair / "gone.obj", "--out", tmp_path / "o", *SMALL) == 0
    output = capsys.readouterr()
    assert output.out.startswith(
        f"skipped {pair / 'gone.obj'}: No such file or directory\n2 objects"
    )
    assert "\r" not in output.err and [
        line.split("  ")[:2] for line in output.err.splitlines()
    ] == [["object 1 of 3", "gone"], ["object 3 of 3", "b"]]
    # as many as SMALL says
    assert "the training must be told: --holdout-views 1 (its default is 4)" in output.out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--views", 4, "--holdout-views", 4], "4 held-out views of 4 leave none to train on"),
        (["--holdout-views", -1], "-1 held-out views: must not be negative"),
        (["--out", Path(__file__)], f"--out {__file__} cannot be a folder: File exists"),
        (
            ["--out", Path(__file__) / "o"],
            f"--out {__file__}/o cannot be a folder: Not a directory",
        ),
        (["--resolution", 300], "resolution (300,) is not in 2 to 256"),
        (["--size", 4], "size 4 is not in 8 to 4096"),
    ],
)
def test_impossible_settings(pair, tmp_path, capsys, flags, message):
    assert command(pair, "--out", tmp_path / "o", *flags) == 2
    assert message in capsys.readouterr().err


def test_no_meshes_and_no_embree(tmp_path, capsys, monkeypatch):
    assert command(tmp_path, "--out", tmp_path / "o") == 2
    assert f"{tmp_path} holds no .obj, .glb, .gltf, .ply, .fbx" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "embreex", None)
    monkeypatch.setattr(objects.importlib.util, "find_spec", lambda name: None)
    assert command(tmp_path, "--out", tmp_path / "o") == 2
    assert "needs embreex and mapbox-earcut: pip install '.[prepare]'" in capsys.readouterr().err
