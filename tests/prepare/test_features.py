"""train.prepare --features of a network: numbers against numpy, resuming, refusals, training."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from models import dinov2
from tests.helpers import numpy_vit
from tests.helpers.dinov2 import TINY, random_weights
from tests.helpers.prepare import SMALL, command, metadata
from tests.helpers.runs import TINY as TINY_RUN
from tests.helpers.runs import rows, train
from train.prepare import features
from train.prepare.features import read_points

NAME = "dinov2_tiny-28"
SIZE = TINY["registers"]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The file of a small network, which is called dinov2_tiny."""
    monkeypatch.setitem(dinov2.MODELS, "dinov2_tiny", SIZE)
    torch.save(random_weights(SIZE), tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def flags(weights, name=NAME) -> list:
    return [*SMALL, "--features", name, "--weights", weights, "--device", "cpu"]


def seen_by_numpy(tokens: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Bilinear lookup of tokens [y, x, C] at one place in [0, 1]^2, zero outside."""
    H, W, C = tokens.shape
    x, y = uv[0] * W - 0.5, uv[1] * H - 0.5
    total = np.zeros(C)
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < H and 0 <= column < W:
                total += tokens[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def expected(folder, points, views, pixels) -> np.ndarray:
    """The features of points [N, 3] by another way: numpy from the picture to the mean."""
    transforms = json.loads((folder / "transforms.json").read_text())
    weights = {name: t.numpy() for name, t in random_weights(SIZE).items()}
    settings = dict(blocks=2, heads=2, registers=4, antialias=True, offset=0.0)
    total = np.zeros((len(points), SIZE.channels))
    for frame in transforms["frames"][:views]:
        with Image.open(folder / frame["file_path"]) as picture:
            resized = picture.resize((pixels, pixels), Image.Resampling.LANCZOS)
        rgba = np.asarray(resized, np.float64) / 255
        colour = (rgba[..., :3] * rgba[..., 3:] - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        tokens = numpy_vit.forward(weights, colour.transpose(2, 0, 1), **settings)
        matrix = np.array(frame["transform_matrix"])
        local = (points - matrix[:3, 3]) @ matrix[:3, :3]  # OpenGL axes: the view goes along -z
        focal = 0.5 / np.tan(frame["camera_angle_x"] / 2)
        uv = 0.5 + focal * np.stack([local[:, 0], -local[:, 1]], 1) / -local[:, 2:]
        total += np.stack([seen_by_numpy(tokens, place) for place in uv])
    return total / views


def test_features_agree_with_numpy(pair, tmp_path, weights, capsys):
    out = tmp_path / "o"
    assert command(pair, "--out", out, *flags(weights), "--resolution", 4, 8) == 0
    text = capsys.readouterr().out
    assert "dinov2_tiny-28 on cpu: 2 objects (2 made, 0 there already), 6 views, 0 skipped" in text
    assert not list(out.glob("features/rgb*"))
    for row in metadata(out):
        sha = row["sha256"]
        for R in (4, 8):
            assert row[f"feature_{NAME}_{R}"] == "True"
            with np.load(out / f"features/{NAME}_{R}/{sha}.npz") as made:
                assert sorted(made.files) == ["indices", "patchtokens"]
                indices, tokens = made["indices"], made["patchtokens"]
            assert indices.dtype == np.uint8 and tokens.dtype == np.float16
            assert len(indices) == int(row[f"num_voxels_{R}"])
            points = (indices + 0.5) / R - 0.5
            assert np.allclose(read_points(out / f"voxels_{R}/{sha}.ply"), points, atol=1e-6)
            # three views: the fourth is held out
            wanted = expected(out / "renders" / sha, points, 3, 28)
            assert np.abs(tokens - wanted).max() < 1e-3 * np.abs(wanted).max()
            assert tokens.std(0).min() > 0.01


def test_an_interrupted_run_continues_to_the_same_features(pair, tmp_path, weights, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "o"
    for folder in (whole, out):
        assert command(pair, "--out", folder, *SMALL, "--features", "none") == 0
    assert command("--out", whole, *flags(weights)) == 0
    average = features.average
    calls = []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return average(*args)

    monkeypatch.setattr(features, "average", interrupted)
    assert command("--out", out, *flags(weights)) == 130
    assert [row[f"feature_{NAME}_4"] for row in metadata(out)].count("True") == 1
    assert command("--out", out, *flags(weights)) == 0 and len(calls) == 3
    assert command("--out", out, *flags(weights)) == 0 and len(calls) == 3
    for file in (whole / f"features/{NAME}_4").iterdir():
        assert (out / f"features/{NAME}_4" / file.name).read_bytes() == file.read_bytes()
    assert [r[f"feature_{NAME}_4"] for r in metadata(out)] == ["True", "True"]


def test_objects_that_cannot_be_used_cost_themselves_alone(pair, tmp_path, weights, capsys):
    out = tmp_path / "o"
    assert command(pair, "--out", out, *SMALL, "--features", "none") == 0
    bad, good = sorted(out.glob("renders/*"))
    voxels = out / f"voxels_4/{bad.name}.ply"
    view = bad / "001.png"
    whole = {file: file.read_bytes() for file in (voxels, view)}
    head, _, points = whole[voxels].partition(b"end_header\n")
    outside = np.frombuffer(points, "<f4").copy()
    outside[4] = 0.75
    nan = outside.copy()
    nan[4] = np.nan
    twice = np.concatenate([outside[:3], outside[:3], outside[6:]])
    for file, content, message in (
        (voxels, b"", "is not a binary PLY of points x, y, z"),
        (voxels, whole[voxels].replace(b"binary_little_endian", b"ascii"), "is not a binary PLY"),
        (voxels, whole[voxels][:-5], f"{len(points) - 5} bytes of points, not {len(points)}"),
        (voxels, head + b"end_header\n" + outside.tobytes(), ", 0.75, "),
        (voxels, head + b"end_header\n" + nan.tobytes(), "is outside the 4^3 grid"),
        (voxels, head + b"end_header\n" + twice.tobytes(), "two points are in one cell of the 4^3"),
        (view, whole[view][:40], "001.png is truncated"),
    ):
        file.write_bytes(content)
        assert command("--out", out, *flags(weights)) == 0
        text = capsys.readouterr().out
        assert message in text and str(file) in text and "1 skipped" in text
        assert {p.name for p in out.glob(f"features/{NAME}_4/*")} == {f"{good.name}.npz"}
        file.write_bytes(whole[file])
    voxels.unlink()
    assert command("--out", out, *flags(weights)) == 0
    assert f"{voxels} is missing" in capsys.readouterr().out


def test_flags_that_cannot_be(tmp_path, pair, weights, capsys):
    def refused(*arguments) -> str:
        assert command("--out", tmp_path / "o", *arguments) == 2
        return capsys.readouterr().err

    message = refused(pair, *SMALL, "--features", "dinov2_vits14_reg")
    assert (
        "--features dinov2_vits14_reg need --weights FILE: curl -LO https://dl.fbaipublicfiles.com/"
        "dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth" in message
    )
    assert "'dinov2_huge' are none of rgb, none, dinov2_vits14" in refused(
        *flags(weights, "dinov2_huge")
    )
    assert "27 pixels are not a multiple of 14" in refused(*flags(weights, "dinov2_tiny-27"))
    assert "features 'rgb-28' are none of" in refused(*flags(weights, "rgb-28"))
    assert "no MESHES, no --fetch" in refused(*SMALL)
    assert "--weights are for a network, not for --features rgb" in refused(
        pair, *SMALL, "--weights", weights
    )
    assert "o is not a folder: no dataset there" in refused(*flags(weights))
    assert "device 'tpu' is none of cpu, cuda" in refused(*flags(weights), "--device", "tpu")
    assert command(pair, "--out", tmp_path / "o", *flags(weights)) == 0
    torch.save(random_weights(SIZE, seed=1), tmp_path / "other.pth")
    message = refused(*flags(tmp_path / "other.pth"))
    assert "dinov2_tiny-28.json: these features were made with weights of sha256" in message


def test_a_point_outside_the_picture_adds_nothing():
    tokens = torch.ones(2, 2, 3)
    places = torch.tensor([[0.5, 0.5], [0.0, 0.5], [-0.5, 0.5], [0.25, 0.25], [-1.0, -1.0]])
    assert torch.equal(features.sample(tokens, places)[:, 0], torch.tensor([1, 0.5, 0, 1, 0]))


def test_training_reads_them(pair, tmp_path, weights, capsys):
    data = tmp_path / "o"
    views = ["--views", 5, "--holdout-views", 2]
    # a whole number of windows of 2 voxels
    assert command(pair, "--out", data, *flags(weights), *views) == 0
    own = "--resolution 4 --model.window 2 --eval-objects 1 --steps 2".split()
    train(*TINY_RUN, *own, "--data", data, "--features", NAME, "--out", tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 2
    assert f"{NAME} features [16] at 4^3" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "checkpoints" / "encoder.json").read_text())
    assert config["args"]["in_channels"] == 16
