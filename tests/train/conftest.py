"""Shared by the tests of training runs."""

import csv
import shutil

import numpy as np
import pytest

from tests.helpers.runs import fresh
from train.data.dataset import EMBEDDED


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
