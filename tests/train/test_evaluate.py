"""The command train.evaluate: each protocol, floors and ceiling, going on, and what it refuses."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import models
from tests.helpers.mesh_files import box, write_obj
from tests.helpers.prepare import command as prepare
from tests.helpers.runs import fresh
from train.data.dataset import Dataset
from train.data.metadata import ply_mesh
from train.data.readers import CHANNELS
from train.decoders import DECODERS
from train.evaluate.command import main
from train.evaluate.measure import AGAIN, OURS, RESAMPLED, SILHOUETTE, UNTRAINED
from train.evaluate.protocols import PROTOCOLS
from train.flags import from_cli
from train.lpips import weight_shapes

ROOT = Path(__file__).parents[2]
SIZES = {"plank": (1.0, 0.3, 0.1), "cube": (1.0, 1.0, 1.0), "slab": (0.2, 1.0, 1.0)}
SMALL = "--device cpu --size 32 --holdout-views 2".split()


def evaluate(*arguments) -> int:
    return main([*map(str, arguments)])


def scores(folder) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Meshes of three boxes in six colours, and a dataset of them: 4^3, views of 32 pixels."""
    folder = tmp_path_factory.mktemp("prepared")
    for name, size in SIZES.items():
        write_obj(folder / "meshes", name, *box(size))
    flags = "--size 32 --views 5 --holdout-views 2 --resolution 4 --workers 0 --supersample 2"
    assert prepare(folder / "meshes", "--out", folder / "data", *flags.split()) == 0
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of one step on two training objects and another one."""
    out = tmp_path_factory.mktemp("runs") / "short"
    fresh(out, "--steps", "1", "--data", data)
    return out


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """The prefixes of an untrained decoder of a kind and of its encoder, made when asked for."""
    folder = tmp_path_factory.mktemp("prefixes")

    def made(kind: str) -> list:
        recipe = DECODERS[kind]
        flags = f"--device cpu --resolution 4 --model.window 4 {recipe.smallest}".split()
        torch.manual_seed(3)
        vae = recipe.build(from_cli(kind, recipe.presets, flags), CHANNELS["rgb"])
        for part, model in vae.named_children():
            models.save_pretrained(model, folder / kind / part)
        return [folder / kind / "decoder", "--encoder", folder / kind / "encoder"]

    return made


def test_our_protocol_gives_the_numbers_that_a_run_ends_with(run, tmp_path, capsys):
    """And files of them: a line an object and renderer, the worst objects drawn."""
    out = tmp_path / "scores"
    flags = "--protocol held-out --device cpu --batch 2".split()
    assert evaluate(run, *flags, "--out", out) == 0
    ran = json.loads((run / "evaluation.json").read_text())["psnr"]
    found = scores(out)["scores"]
    for split, group in (("train", "held-out views"), ("test", "held-out objects")):
        for row, name in ((OURS, "trained"), (UNTRAINED, "untrained")):
            wanted = ran[name][group]
            own = found[split][row]
            assert own["psnr"] == pytest.approx(wanted["full"], abs=1e-3)
            assert own["psnr_inside"] == pytest.approx(wanted["inside"], abs=1e-3)
        assert found[split][OURS]["objects"] * 4 == wanted["pictures"]
    lines = list(csv.DictReader((out / "objects.csv").read_text().splitlines()))
    assert len(lines) == 3 * 4 and {line["split"] for line in lines} == {"train", "test"}
    with Image.open(out / "worst.png") as picture:
        assert picture.height > 2 * 96
    text = capsys.readouterr().out
    assert PROTOCOLS["held-out"].notes[0] in text and f"{found['test'][OURS]['psnr']:.2f}" in text


def test_views_of_the_dataset_can_be_the_truth_where_they_are_the_cameras(run, tmp_path):
    out = tmp_path / "out"
    truth = "--truth views --no-floors --objects 1".split()
    assert evaluate(run, *SMALL, *truth, "--out", out) == 0
    content = scores(out)
    changed = "trellis-r2-fov40 (changed: size 32, not 512; truth views, not mesh)"
    assert content["protocol"]["name"] == changed
    (row,) = content["scores"]["train"].values()
    assert 0 < row["ssim"] < 1 and row["psnr"] > 3 and "lpips" not in row
    assert any("LPIPS: not computed" in line for line in content["not_computed"])
    assert any("a gaussian decoder has no surface" in line for line in content["not_computed"])


def test_the_truth_is_cast_from_the_meshes_and_its_ceiling_is_the_datasets_own_views(
    prepared, prefix, tmp_path, capsys
):
    """A mesh decoder is scored by colours, normals and distances; what was scored is kept."""
    out = tmp_path / "out"
    data = ["--data", prepared / "data", "--meshes", prepared / "meshes"]
    flags = [*prefix("mesh"), *data, *SMALL, "--samples", "400", "--out", out]
    flags += "--batch 1 --objects 2".split()
    assert evaluate(*flags) == 0
    rows = scores(out)["scores"]["train"]
    # the same renderer, size and rays a pixel as the dataset's: the same bytes
    assert rows[AGAIN]["psnr"] is None and rows[AGAIN]["ssim"] == pytest.approx(1, abs=1e-4)
    kept = {file.name: json.loads(file.read_text()) for file in (out / "objects").iterdir()}
    assert all(one["scores"][AGAIN]["psnr"] == math.inf for one in kept.values())
    ours = rows[OURS]
    assert ours["psnr"] < rows[SILHOUETTE]["psnr"] and 5 < ours["normal_psnr"] < 40
    assert ours["cd"] > rows[RESAMPLED]["cd"] and rows[RESAMPLED]["f_0.05"] > 0.5
    assert any(row.startswith("one Gaussian a voxel") for row in rows) and len(rows) == 6
    before = {file: file.read_bytes() for file in (out / "objects").iterdir()}
    gone, *stay = sorted(before)
    gone.unlink()
    stay[0].write_text(stay[0].read_text()[:40])  # cut short
    report = (out / "evaluation.json").read_bytes()
    (out / "evaluation.json").unlink()
    assert evaluate(*flags) == 0
    assert {file: file.read_bytes() for file in (out / "objects").iterdir()} == before
    assert (out / "evaluation.json").read_bytes() == report
    capsys.readouterr()
    assert evaluate(*flags, "--lpips", prepared / "data" / "metadata.csv") == 2
    assert evaluate(*flags, "--no-floors") == 2
    assert (
        "an evaluation with floors True, not False: choose another --out" in capsys.readouterr().err
    )


def test_normals_and_distances_of_the_second_protocol(prepared, prefix, tmp_path):
    flags = [*prefix("mesh"), "--protocol", "trellis2-normal4", "--data", prepared / "data", *SMALL]
    flags += ["--objects", 2]
    assert evaluate(*flags, "--samples", 500, "--out", tmp_path / "a") == 0
    rows = scores(tmp_path / "a")["scores"]["train"]
    assert rows[RESAMPLED]["md"] < 1e-25 and rows[RESAMPLED]["md_f1_1e-08"] == 1
    assert rows[RESAMPLED]["cd2_f1_1e-08"] < 0.1 < rows[OURS]["md"] * 1e4
    assert rows.keys() == {OURS, UNTRAINED, RESAMPLED} and "psnr" not in rows[OURS]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--protocol", "toys4k"], "--protocol 'toys4k' is none of trellis-r2-fov40, "),
        (["--protocol", "trellis2-normal4"], "is a gaussian decoder, which has none"),
        (["--size", "8"], "--size 8 is below the 16 pixels"),
        (["--size", "100000"], "--size 100000 is over 8192"),
        (["--split", "val"], "invalid choice: 'val'"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--protocol", "held-out", "--truth", "mesh"], "the views of held-out are the dataset's"),
        (["--protocol", "held-out", "--samples", "5"], "held-out has no points on surfaces"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--lpips", "absent"], "LPIPS weights: absent is not a file"),
        (["--meshes", "absent"], "--meshes absent is not a folder"),
        ([], "3 of 3 objects have no source mesh, the first is "),
        (["--truth", "views"], "views are 32 pixels wide, trellis-r2-fov40 (changed: truth views"),
        (["--protocol", "held-out", "--out", "table/x"], "table/x cannot be made: Not a directory"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    prepared, prefix, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table").touch()
    given = [*prefix("gaussian"), "--data", prepared / "data", "--device", "cpu"]
    given += ["--holdout-views", 2, "--out", tmp_path / "out", *flags]
    try:
        status = evaluate(*given)
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_a_scene_that_is_not_finite_is_no_gap_in_the_mean(prepared, prefix, tmp_path, capsys):
    file, _, encoder = prefix("gaussian")
    model = models.load_pretrained(file)
    model.out_layer.bias.data[:] = 3e38
    models.save_pretrained(model, tmp_path / "huge")
    data = ["--data", prepared / "data", "--protocol", "held-out", "--holdout-views", 2]
    out = ["--device", "cpu", "--out", tmp_path / "out"]
    assert evaluate(tmp_path / "huge", "--encoder", encoder, *data, *out) == 2
    assert "the trained scene of object " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_object_without_its_mesh_or_with_another_is_named(prepared, prefix, tmp_path, capsys):
    shutil.copytree(prepared, tmp_path / "own")
    data, meshes = tmp_path / "own" / "data", tmp_path / "own" / "meshes"
    names = Dataset([data], resolution=4, features="rgb", image_size=32).names
    known = [*prefix("mesh"), "--data", data, *SMALL, "--samples", 50, "--out", tmp_path / "out"]
    plain = ["--protocol", "trellis2-normal4", "--no-floors"]
    surface = data / "renders" / names[0] / "mesh.ply"
    surface.write_bytes(ply_mesh(np.zeros((3, 3)), np.array([[0, 1, 2]])))
    assert evaluate(*known, *plain) == 2
    error = capsys.readouterr().err
    assert f"{surface}: a surface of 1 triangles without area has no points" in error
    assert not (tmp_path / "out").exists()  # nothing was scored
    (data / "renders" / names[1] / "mesh.ply").unlink()
    assert evaluate(*known, "--protocol", "trellis2-normal4") == 2
    error = capsys.readouterr().err
    assert "1 of 3 objects have no mesh.ply" in error and names[1][:12] in error
    gaussian = [*prefix("gaussian"), "--data", data, "--meshes", meshes, *SMALL]
    (meshes / "cube.obj").write_text((meshes / "slab.obj").read_text())
    assert evaluate(*gaussian, "--out", tmp_path / "out", "--batch", 1) == 2
    error = capsys.readouterr().err
    assert f"{meshes / 'cube.obj'} is not the mesh of object " in error
    (meshes / "cube.obj").unlink()
    assert evaluate(*gaussian, "--out", tmp_path / "other") == 2
    assert "1 of 3 objects have no source mesh, the first is cube" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    assert evaluate(*known, "--truth", "views", "--out", tmp_path / "full") == 2
    assert [file.name for file in (tmp_path / "full").iterdir() if file.name[0] != "."] == [
        "thesis.txt"
    ]


@pytest.mark.slow
def test_two_ranks_give_the_same_files_as_one(prepared, prefix, tmp_path):
    """To the bit, though each scores other objects than it would alone; LPIPS as well."""
    weights = {
        name: torch.rand(shape) / max(1, math.prod(shape[1:]))
        for name, shape in weight_shapes().items()
    }
    save_file(weights, tmp_path / "lpips.safetensors")
    data = ["--data", prepared / "data", "--meshes", prepared / "meshes", *SMALL, "--batch", 2]
    data += ["--lpips", tmp_path / "lpips.safetensors"]
    flags = [*map(str, [*prefix("mesh"), *data, "--samples", 300, "--out"])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = "-m torch.distributed.run --standalone --nproc-per-node 2 -m train.evaluate".split()
    for name, command in (("one", ["-m", "train.evaluate"]), ("two", both)):
        run = [sys.executable, *command, *flags, str(tmp_path / name)]
        subprocess.run(run, cwd=tmp_path, env=environment, check=True, timeout=600)
    one, two = (
        {
            file.relative_to(tmp_path / name): file.read_bytes()
            for file in (tmp_path / name).rglob("*")
            if file.is_file()
        }
        for name in ("one", "two")
    )
    rows = scores(tmp_path / "two")["scores"]["train"]
    assert rows[OURS]["lpips"] > 0 and rows[AGAIN]["lpips"] < 1e-9 < rows[OURS]["normal_lpips"]
    assert one == two and len([file for file in one if file.parent.name == "objects"]) == 3
