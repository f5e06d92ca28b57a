"""train.prepare: rgb features, the layout, resuming, bad input; and the embedded dataset."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.camera import Camera
from tests.helpers.mesh_files import box, write_obj
from tests.helpers.prepare import SMALL, command, metadata
from train.data.metadata import ply_count, write_metadata
from train.meshes.read import normalize, read_mesh
from train.prepare import command as prepare
from train.prepare import raycast
from train.prepare.raycast import Caster
from train.prepare.voxelize import Features, voxelize

ASSETS = Path(prepare.__file__).parents[1] / "assets"


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


def test_features_that_no_training_accepts_are_refused():
    grid = Features(np.array([[1, 2, 3]]), np.array([[2, 4, 6]]), 4)
    inside = np.array([[1.1, 2.1, 3.1]]) / 4 - 0.5
    grid.add_view(inside, np.ones(1), np.full((1, 3), np.nan), np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"the features of voxel \[1, 2, 3\] are not finite"):
        grid.result()


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


def test_webp_views_are_the_same_pixels(pair, tmp_path, capsys):
    png, webp = tmp_path / "png", tmp_path / "webp"
    assert command(pair, "--out", png, *SMALL) == 0
    assert command(pair, "--out", webp, *SMALL, "--pictures", "webp") == 0
    (own, *_) = sorted((webp / "renders").iterdir())
    frames = json.loads((own / "transforms.json").read_text())["frames"]
    names = [frame["file_path"] for frame in frames]
    assert names == [f"{i:03d}.webp" for i in range(len(names))] and names
    for name in names:
        with (
            Image.open(own / name) as ours,
            Image.open(png / own.relative_to(webp) / name.replace("webp", "png")) as theirs,
        ):
            assert ours.format == "WEBP"
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert command(pair, "--out", webp, *SMALL) == 1
    assert "was made with pictures webp, not png: choose another --out" in capsys.readouterr().out


def tree(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


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
    write_metadata(out, [])
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
        assert ply_count(demo / f"voxels_16/{sha}.ply") == len(data["indices"])
        with Image.open(renders / "019.png") as image:
            assert image.size == (128, 128) and image.mode == "RGBA"
        assert b"element face" in (renders / "mesh.ply").read_bytes()[:200]
    assert sum(p.stat().st_size for p in demo.rglob("*") if p.is_file()) < 12e6
