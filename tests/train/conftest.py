"""Shared by the tests of training runs."""

import csv
import shutil

import numpy as np
import pytest

from tests.helpers.mesh_files import box, write_obj
from tests.helpers.prepare import command
from tests.helpers.runs import TINY, fresh
from train import loop
from train.data.dataset import EMBEDDED
from train.decoders import DECODERS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two training objects and one of another split, each cut down to 30 voxels."""
    root = tmp_path_factory.mktemp("data")
    with (EMBEDDED / "metadata.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["feature_rgb_16"] == "True"]
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    chosen = [*train[:2], test[0]]
    for row in chosen:
        name = f"features/rgb_16/{row['sha256']}.npz"
        with np.load(EMBEDDED / name) as stored:
            kept = {key: stored[key][:30] for key in stored.files}
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(root / name, **kept)
        shutil.copytree(EMBEDDED / "renders" / row["sha256"], root / "renders" / row["sha256"])
        row["num_voxels_16"] = "30"
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(chosen[0]))
        writer.writeheader(), writer.writerows(chosen)
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of six steps that other tests look at and start from."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    fresh(out, "--steps", "6", "--save-every", "3")
    return out


@pytest.fixture(scope="session")
def frozen(finished):
    """A radiance run of one step on the encoder of `finished`, in its folder of runs."""
    out = finished.parent / "field"
    recipe = DECODERS["radiance"]
    common = TINY[: TINY.index("--model.per-voxel")]  # what fits both kinds of decoder
    flags = f"--steps 1 --encoder {finished} --out {out} {recipe.smallest}".split()
    loop.main("radiance", recipe.presets, recipe.build, [*common, *flags], recipe.loss)
    return out


@pytest.fixture(scope="session")
def boxes(tmp_path_factory):
    """Two mesh files, the dataset that train.prepare makes of them, and a run of two steps."""
    folder = tmp_path_factory.mktemp("boxes")
    for name, size in (("tall", (0.4, 1.0, 0.5)), ("flat", (1.0, 0.3, 0.7))):
        write_obj(folder / "meshes", name, *box(size))
    settings = "--size 32 --views 6 --holdout-views 2 --resolution 8 --workers 0 --supersample 1"
    assert command(folder / "meshes", "--out", folder / "data", *settings.split()) == 0
    own = "--resolution 8 --features rgb --model.window 4 --eval-objects 1 --steps 2".split()
    fresh(folder / "run", "--data", folder / "data", *own)
    return folder
