"""train.prepare: rgb features, the layout, resuming, bad input; and the embedded dataset."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.camera import Camera
from tests.helpers.mesh_files import box, quad, write_obj
from tests.helpers.prepare import command, metadata
from train.meshes.read import normalize, read_mesh
from train.prepare import command as prepare
from train.prepare import raycast
from train.prepare.raycast import Caster
from train.prepare.voxelize import Features, voxelize

ASSETS = Path(prepare.__file__).parents[1] / "assets"


SMALL = (
    "--size",
    16,
    "--views",
    4,
    "--holdout-views",
    1,
    "--resolution",
    4,
    "--workers",
    0,
    "--supersample",
    1,
)


# features


def test_features_of_a_cube(tmp_path):
    text, mtl = box()
    path = write_obj(tmp_path, "cube", text, mtl)
    assert command(path, "--out", tmp_path / "o", *SMALL, "--views", 40, "--holdout-views", 0) == 0
    (file,) = (tmp_path / "o/features/rgb_4").iterdir()
    data = np.load(file)
    assert data["indices"].dtype == np.uint8 and data["patchtokens"].dtype == np.float16
    assert len(data["indices"]) == 64 - 8
    rows = {
        tuple(i): t.astype(float)
        for i, t in zip(data["indices"].tolist(), data["patchtokens"], strict=True)
    }
    # (voxel in the middle of a side, axis, direction, which OBJ side, light on it): y up became z
    # up, z became -y
    key = raycast.KEY * raycast.KEY_DIRECTION
    cases = [
        ((1, 1, 3), 2, 1, 3, 0.6 + key[2]),
        ((3, 1, 2), 0, 1, 1, 0.5 + key[0]),
        ((1, 0, 1), 1, -1, 5, 0.5),
    ]
    for cell, axis, sign, side, light in cases:
        token = rows[cell]
        normal = np.zeros(3)
        normal[axis] = sign
        color = np.array([0.2 + 0.1 * side, 0.9 - 0.1 * side, 0.5]) * light
        assert np.allclose(token[:3], color, atol=2e-3)
        assert np.allclose(token[3:6], normal, atol=2e-3)
        assert (
            np.isclose(token[6 + axis], 0.5 * sign, atol=2e-3)
            and np.abs(np.delete(token[6:9], axis)).max() < 0.2
        )
        assert 0.2 < token[9] < 0.9
        s = np.arange(8)
        outer = (s >> (2 - axis)) % 2 == (sign > 0)  # the four sub-cells at the surface
        assert np.array_equal(token[42:] > 0, outer)
        assert np.array_equal(token[34:42] > 0, outer) and (token[34:42] <= token[9]).all()
        assert np.allclose(token[10:34].reshape(8, 3), outer[:, None] * color, atol=2e-3)
    assert rows[0, 0, 0][42:].sum() == 7  # a corner: all sub-cells but the inner one


def test_features_see_the_training_views_only(tmp_path):
    text, mtl = box()
    path = write_obj(tmp_path, "cube", text, mtl)
    assert command(path, "--out", tmp_path / "o", *SMALL, "--views", 6, "--holdout-views", 2) == 0
    (folder,) = (tmp_path / "o/renders").iterdir()
    transforms = json.loads((folder / "transforms.json").read_text())
    assert transforms["holdout"] == 2 and len(transforms["frames"]) == 6
    mesh = read_mesh(path)
    normalize(mesh)
    caster = Caster(mesh)
    made = np.load(tmp_path / f"o/features/rgb_4/{folder.name}.npz")["patchtokens"]
    for views, same in ((4, True), (6, False)):
        grid = Features(
            voxelize(mesh.vertices, mesh.faces, 4), voxelize(mesh.vertices, mesh.faces, 8), 4
        )
        for frame in transforms["frames"][:views]:
            grid.add_view(*caster.render(np.array(frame["transform_matrix"]), 16, 1)[1])
        assert np.allclose(made, grid.result(), atol=1e-2) == same


# the dataset


def test_layout_and_transforms_round_trip(tmp_path):
    # after scaling no side lies in a cell plane of 8^3 but the longest, in the cube's
    text, mtl = box((2.0, 0.9, 0.4))
    path = write_obj(tmp_path, "m", text, mtl)
    assert command(path, "--out", tmp_path / "o", *SMALL, "--size", 64, "--resolution", 8, 64) == 0
    (row,) = metadata(tmp_path / "o")
    sha = row["sha256"]
    out = tmp_path / "o"
    renders = tmp_path / "o/renders" / sha
    assert (
        row["rendered"] == row["voxelized"] == row["feature_rgb"] == row["feature_rgb_8"] == "True"
    )
    assert (
        float(row["aesthetic_score"]) >= 4.5
        and row["split"] == "train"
        and json.loads(row["captions"]) == []
    )
    transforms = json.loads((renders / "transforms.json").read_text())
    assert transforms["aabb"] == [[-0.5] * 3, [0.5] * 3] and np.isclose(transforms["scale"], 0.5)
    assert np.allclose(transforms["offset"], [-4 * 0.5, 0.2 * 0.5, -0.45 * 0.5])
    assert sorted(p.name for p in renders.iterdir()) == [
        *(f"{i:03d}.png" for i in range(4)),
        "mesh.ply",
        "transforms.json",
    ]
    import trimesh

    mesh = trimesh.load(renders / "mesh.ply", process=False)
    points = trimesh.load(out / f"voxels_8/{sha}.ply")
    assert np.allclose(
        mesh.bounds, [[-0.5, -0.1, -0.225], [0.5, 0.1, 0.225]]
    ) and mesh.faces.shape == (12, 3)
    indices = np.load(out / f"features/rgb_8/{sha}.npz")["indices"]
    assert len(indices) == int(row["num_voxels_8"]) and np.allclose(
        points.vertices, (indices + 0.5) / 8 - 0.5
    )
    assert len(trimesh.load(out / f"voxels/{sha}.ply").vertices) == int(row["num_voxels"])
    frames = transforms["frames"]
    poses = torch.tensor([f["transform_matrix"] for f in frames])
    camera = Camera.from_blender(poses, frames[0]["camera_angle_x"], 64, 64)
    for i, frame in enumerate(frames):
        alpha = np.asarray(Image.open(renders / frame["file_path"]))[..., 3] > 0
        corners, centers = (
            (uv if uv.max() > 1.5 else uv * 64)[i].numpy()
            for uv in (
                camera.project(torch.tensor(np.asarray(p.vertices), dtype=torch.float32))[0]
                for p in (mesh, points)
            )
        )
        shown = np.argwhere(alpha)[:, ::-1]
        assert (
            np.abs(corners.min(0) - shown.min(0)).max() < 1.5
            and np.abs(corners.max(0) - shown.max(0) - 1).max() < 1.5
        )
        x, y = np.floor(centers).astype(int).T
        assert alpha[y, x].all()


def tree(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def pair(tmp_path) -> Path:
    """A folder with two meshes."""
    for name, size in (("a", (1, 1, 0.5)), ("b", (1, 0.3, 0.5))):
        write_obj(tmp_path / "in", name, *box(size))
    return tmp_path / "in"


def test_an_interrupted_run_continues_to_the_same_dataset(pair, tmp_path, monkeypatch, capsys):
    assert command(pair, "--out", tmp_path / "whole", *SMALL) == 0
    calls = []
    render = Caster.render

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == 7:  # in the third view of the second object
            raise KeyboardInterrupt
        return render(self, *args)

    monkeypatch.setattr(Caster, "render", interrupted)
    assert command(pair, "--out", tmp_path / "o", *SMALL) == 130
    assert len(metadata(tmp_path / "o")) == 1
    assert sum(p.name == "transforms.json" for p in (tmp_path / "o").rglob("*")) == 1
    assert "the same command goes on" in capsys.readouterr().out
    assert command(pair, "--out", tmp_path / "o", *SMALL) == 0
    assert "2 objects (1 made, 1 there already)" in capsys.readouterr().out
    assert tree(tmp_path / "o") == tree(tmp_path / "whole")


def test_what_is_missing_or_changed_is_made_again(pair, tmp_path, capsys):
    out = tmp_path / "o"
    assert command(pair, "--out", out, *SMALL) == 0
    before = tree(out)
    next(out.glob("features/rgb_4/*.npz")).unlink()
    next(out.glob("renders/*/001.png")).write_bytes(b"")
    capsys.readouterr()
    assert command(pair, "--out", out, *SMALL) == 0
    assert tree(out) == before
    (pair / "a.mtl").write_text(box()[1].replace("0.5", "0.9"))
    assert command(pair, "--out", out, *SMALL) == 0
    assert (
        "2 objects (1 made, 1 there already)" in capsys.readouterr().out and len(metadata(out)) == 3
    )
    assert command(pair, "--out", out, *SMALL, "--size", 24) == 1
    assert "was made with size 16, not 24" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("renders/*/transforms.json", lambda text: text[: len(text) // 2]),
        ("renders/*/transforms.json", lambda text: b"[]"),
        ("renders/*/transforms.json", lambda text: text.replace(b'"frames"', b'"frame"')),
        ("voxels_4/*.ply", lambda text: b"not a ply"),
    ],
)
def test_what_was_damaged_is_made_again(pair, tmp_path, file, damage):
    out = tmp_path / "o"
    assert command(pair, "--out", out, *SMALL) == 0
    before = tree(out)
    damaged = next(out.glob(file))
    damaged.write_bytes(damage(damaged.read_bytes()))
    assert command(pair, "--out", out, *SMALL) == 0 and tree(out) == before


def test_scores_and_earlier_rows_of_metadata_stay(pair, tmp_path):
    out = tmp_path / "o"
    assert command(pair / "a.obj", "--out", out, *SMALL) == 0
    rows = metadata(out)
    rows[0] |= {"aesthetic_score": "6.5", "mine": "x"}
    prepare.write_metadata(out, [])
    with (out / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert command(pair, "--out", out, *SMALL) == 0
    after = {row["file_identifier"]: row for row in metadata(out)}
    assert (
        after["a.obj"]["aesthetic_score"] == "6.5"
        and after["a.obj"]["mine"] == "x"
        and after["b.obj"]["mine"] == ""
    )


def test_a_list_gives_splits_and_captions(pair, tmp_path):
    (tmp_path / "l.txt").write_text("# comment\n\nin/a.obj\ttest\tA box\nin/b.obj\n")
    assert command(tmp_path / "l.txt", "--root", tmp_path, "--out", tmp_path / "o", *SMALL) == 0
    rows = [(r["local_path"], r["split"], r["captions"]) for r in metadata(tmp_path / "o")]
    assert rows == [("in/a.obj", "test", '["A box"]'), ("in/b.obj", "train", "[]")]


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
    "no mtl": (
        "mtllib gone.mtl\n" + GOOD + "f 1 2 3\n",
        "",
        "bad.obj, line 1: material file 'gone.mtl' does not exist",
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
    (tmp_path / "in/bad/cube.obj").write_bytes(good.read_bytes())  # without its materials
    box_file = write_obj(tmp_path, "box", box()[0])
    (tmp_path / "box.ply").write_bytes(box_file.read_bytes())
    assert (
        command(tmp_path / "in", tmp_path / "box.ply", box_file, "--out", tmp_path / "o", *SMALL)
        == 0
    )
    output = capsys.readouterr().out
    assert (
        f"skipped {tmp_path}/in/bad/cube.obj, line 1: material file" in output
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
    assert f"{tmp_path} holds no .obj, .glb, .gltf, .ply file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "embreex", None)
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    assert command(tmp_path, "--out", tmp_path / "o") == 2
    assert "needs embreex: pip install '.[prepare]'" in capsys.readouterr().err


def test_workers_make_the_same_files(pair, tmp_path):
    write_obj(pair, "c", "")
    assert command(pair, "--out", tmp_path / "one", *SMALL) == 0
    assert command(pair, "--out", tmp_path / "two", *SMALL, "--workers", 2) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


# what ships with the repository


def test_the_embedded_dataset_is_whole():
    demo = ASSETS / "demo"
    rows = metadata(demo)
    assert len(rows) == 24 and sum(row["split"] == "test" for row in rows) == 4
    held_out = {
        line
        for line in (ASSETS / "eval_ids.txt").read_text().splitlines()
        if line and line[0] != "#"
    }
    assert len(held_out) == 40 and not held_out & {row["local_path"] for row in rows}
    attribution = (demo / "ATTRIBUTION.md").read_text()
    listed = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]]
        for line in attribution.splitlines()
        if ".obj`" in line
    ]
    assert sorted((file, split) for _, file, _, _, split in listed) == sorted(
        (row["local_path"].split("/")[-1], row["split"]) for row in rows
    )
    groups = {
        split: {(creator, category) for _, _, creator, category, s in listed if s == split}
        for split in ("train", "test")
    }
    assert not groups["train"] & groups["test"]
    for row in rows:
        sha = row["sha256"]
        renders = demo / "renders" / row["sha256"]
        transforms = json.loads((renders / "transforms.json").read_text())
        assert transforms["holdout"] == 4 and len(transforms["frames"]) == 20
        data = np.load(demo / f"features/rgb_16/{sha}.npz")
        assert (
            data["patchtokens"].shape == (int(row["num_voxels_16"]), 50)
            and np.isfinite(data["patchtokens"]).all()
        )
        assert prepare.ply_count(demo / f"voxels_16/{sha}.ply") == len(data["indices"])
        with Image.open(renders / "019.png") as image:
            assert image.size == (128, 128) and image.mode == "RGBA"
        assert b"element face" in (renders / "mesh.ply").read_bytes()[:200]
    assert sum(p.stat().st_size for p in demo.rglob("*") if p.is_file()) < 12e6
