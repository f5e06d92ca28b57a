"""Tiny whole runs of train.mesh on small parts of embedded objects.

Resuming to the bit, empty and broken fields, bad meshes.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image as Picture

import models
from models import MeshDecoder
from train import loop
from train.losses.geometry import SurfaceLoss
from train.mesh import BASE, PRESETS, SMALL, build
from train.run import checkpoint, report

TINY = (
    "--device cpu --image-size 24 --batch-size 2 --views 1 --holdout-views 2 --eval-objects 1 "
    "--sample-every 100 --warmup 0 "
    "--model.heads 2 --model.blocks 1 --model.mlp-ratio 0.25"
).split()


def train(data, out, *flags: str) -> list[dict]:
    loop.main(
        "mesh",
        PRESETS,
        build,
        [*TINY, "--data", str(data), "--out", str(out), *flags],
        loss=SurfaceLoss,
    )
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    train(data, out, "--steps", "3", "--final-lr", "1")
    return out


def test_a_run_leaves_shaded_pictures_scores_and_models(finished):
    weights = {
        name: weight for name, weight in vars(BASE.weights).items() if not name.endswith("lpips")
    }
    for row in map(json.loads, (finished / "log.jsonl").read_text().splitlines()):
        assert row["loss"] == pytest.approx(
            sum(weight * row[name] for name, weight in weights.items()), rel=1e-5
        )
    with Picture.open(finished / "samples" / "step_00000003.png") as picture:
        # 24 enlarged
        left = report.MARGIN
        top = 4 * report.LINE
        one = 96
        # shading, normals and colours, the true ones above ours
        assert picture.height == top + 6 * one
        # an object of each group
        grey = np.asarray(picture)[top : top + 2 * one, left : left + 2 * one]
    assert (grey == grey[..., :1]).all() and grey[one:].std() > 0
    surface = json.loads((finished / "evaluation.json").read_text())["surface"]
    assert surface.keys() == {"trained", "untrained"}
    for groups in surface.values():
        for score in groups.values():
            assert (
                0 < score["iou"] < 1
                and score["normal"] > 0
                and score["depth"] > 0
                and score["pictures"] == 2
            )
    assert isinstance(models.load_pretrained(finished / "checkpoints" / "decoder"), MeshDecoder)


def test_resumed_equals_straight_to_the_bit(finished, data, tmp_path):
    train(data, tmp_path / "parts", "--steps", "1", "--final-lr", "1")
    loop.main(
        "mesh",
        PRESETS,
        build,
        ["--resume", str(tmp_path / "parts"), "--steps", "3"],
        loss=SurfaceLoss,
    )
    whole, parts = (
        checkpoint.load(checkpoint.newest(run / "checkpoints"))[0]
        for run in (finished, tmp_path / "parts")
    )
    assert whole.keys() == parts.keys() and all(
        torch.equal(whole[name], parts[name]) for name in whole
    )


def change_fields(monkeypatch, change):
    """Let `change` replace what the decoder predicts in training.

    It is called with (call, fields [N, 101], object of each cube [N]). Call 0 is that which
    measures memory before the first step.
    """
    plain = MeshDecoder.fields
    calls = []

    def fields(self, z):
        cubes = plain(self, z)
        if not self.training:
            return cubes
        changed = cubes.replace(change(len(calls), cubes.feats, cubes.coords[:, 0]))
        calls.append(None)
        return changed

    monkeypatch.setattr(MeshDecoder, "fields", fields)


def test_an_object_without_a_surface_trains_with_the_others(data, tmp_path, monkeypatch):
    outside = torch.tensor([1.0] * 8 + [0.0] * 93)
    change_fields(monkeypatch, lambda call, fields, owner: fields + outside * (owner == 0)[:, None])
    for row in train(data, tmp_path / "one", "--steps", "2"):
        assert row["mask"] > 0 and row["tsdf"] > 0 and row["grad_norm"] > 0 and row["skipped"] == 0
    change_fields(monkeypatch, lambda call, fields, owner: fields + outside)
    for row in train(data, tmp_path / "all", "--steps", "2"):
        assert (
            row["mask"] == row["depth"] == row["l1"] == 0
            and row["tsdf"] > 0
            and row["skipped"] == 0
        )
        assert row["grad_norm"] > 0  # the signed distances bring the surface back


def test_a_field_that_is_not_a_number_skips_its_step(data, tmp_path, monkeypatch):
    broken = lambda call, fields, owner: (
        fields * torch.where((owner == 1)[:, None] & (call == 2), torch.nan, 1.0)
    )
    change_fields(monkeypatch, broken)
    log = train(data, tmp_path / "run", "--steps", "3")
    assert [row["skipped"] for row in log] == [0, 1, 1]
    assert log[1]["loss"] is None and log[2]["loss"] > 0
    tensors = checkpoint.load(checkpoint.newest(tmp_path / "run" / "checkpoints"))[0]
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_a_mesh_that_cannot_be_used_is_named(data, tmp_path, capsys):
    whole = {file: file.read_bytes() for file in data.rglob("mesh.ply")}

    def refused() -> str:
        with pytest.raises(SystemExit, match="2"):
            train(data, tmp_path / "run", "--steps", "1")
        return capsys.readouterr().err

    try:
        for file, content in whole.items():
            file.write_bytes(content[: len(content) // 2])
        message = refused()
        assert "mesh.ply cannot be read: truncated" in message and str(data / "renders") in message
        for file, content in whole.items():
            body = content.index(b"end_header\n") + len(b"end_header\n")
            file.write_bytes(content[:body] + np.float32([np.nan]).tobytes() + content[body + 4 :])
        assert "mesh.ply: 1 of " in (message := refused()) and "vertices are not finite" in message
        for file in whole:
            file.unlink()
        assert "mesh.ply is missing" in refused()
    finally:
        for file, content in whole.items():
            file.write_bytes(content)


def test_base_is_the_published_recipe():
    assert (BASE.steps, BASE.batch_size, BASE.views, BASE.micro_batch) == (290_000, 256, 1, 1)
    assert (BASE.optimizer, BASE.precision, BASE.resolution, BASE.image_size, BASE.ema) == (
        "adamw",
        "fp16",
        64,
        512,
        0.9999,
    )
    assert BASE.warmup == 0 and BASE.final_lr == 1 and SMALL.warmup > 100
    assert (BASE.model.channels, BASE.model.blocks, BASE.model.heads, BASE.model.logvar_init) == (
        768,
        12,
        12,
        None,
    )
