"""The four published models at full size: loaded with --init or --encoder, fine-tuned, saved."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.golden import GOLDEN
from train import loop
from train.data.dataset import EMBEDDED
from train.decoders import DECODERS

SUFFIX = {"gaussian": "gs", "radiance": "rf", "mesh": "mesh"}
VOXELS = 12


def manifest(part: str) -> dict:
    return json.loads((GOLDEN / f"manifest_slat_{part}.json").read_text())


def layout(part: str) -> dict[str, tuple]:
    """The name of each published tensor, with its shape and dtype."""
    return {
        t["name"]: (tuple(t["shape"]), getattr(torch, t["dtype"]))
        for t in manifest(part)["state_dict"]
    }


def publish(part: str, folder) -> str:
    """Write random weights as the two published files; returns their prefix."""
    torch.manual_seed(len(part))
    weights = {
        name: torch.randn(shape).mul_(0.02).to(dtype)
        for name, (shape, dtype) in layout(part).items()
    }
    save_file(weights, folder / f"{part}.safetensors")
    content = {"name": manifest(part)["class"], "args": manifest(part)["args"]}
    (folder / f"{part}.json").write_text(json.dumps(content))
    return str(folder / part)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The encoder, and a dataset of a few voxels at 64^3 with features of 1024 channels."""
    root = tmp_path_factory.mktemp("published")
    publish("encoder", root)
    with (EMBEDDED / "metadata.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["feature_rgb_16"] == "True"]
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    chosen = [*train[:2], test[0]]
    features = root / "data" / "features" / "dinov2_vitl14_reg"
    features.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for row in chosen:
        name = row["sha256"]
        with np.load(EMBEDDED / "features" / "rgb_16" / f"{name}.npz") as stored:
            indices = 4 * stored["indices"][:VOXELS]
        tokens = rng.normal(size=(VOXELS, 1024)).astype(np.float16)
        np.savez(features / f"{name}.npz", indices=indices, patchtokens=tokens)
        shutil.copytree(EMBEDDED / "renders" / name, root / "data" / "renders" / name)
        row |= {"feature_dinov2_vitl14_reg": "True", "num_voxels": VOXELS}
    with (root / "data" / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(chosen[0]))
        writer.writeheader()
        writer.writerows(chosen)
    return root


def saved(file) -> dict[str, tuple]:
    """The name of each tensor of a file, with its shape and dtype."""
    with safe_open(file, framework="pt") as content:
        tensors = ((name, content.get_tensor(name)) for name in content.keys())
        return {name: (tuple(t.shape), t.dtype) for name, t in tensors}


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_the_published_models_are_fine_tuned_and_saved_as_they_were(folder, tmp_path, name):
    """The Gaussian decoder with its encoder, the others on the frozen encoder, as published."""
    part = f"decoder_{SUFFIX[name]}"
    decoder = publish(part, tmp_path)
    encoder = "--init" if name == "gaussian" else "--encoder"
    flags = (
        f"--preset base --device cpu --data {folder / 'data'} --out {tmp_path / 'run'} "
        f"{encoder} {folder / 'encoder'} --init {decoder} --steps 2 --batch-size 1 "
        "--image-size 64 --holdout-views 1 --eval-objects 1 --workers 0 --precision fp32 --ema 0"
    )
    recipe = DECODERS[name]
    loop.main(name, recipe.presets, recipe.build, flags.split(), recipe.loss)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and log[1]["skipped"] == 0 and log[0]["loss"] != log[1]["loss"]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert saved(checkpoints / "decoder.safetensors") == layout(part)
    before, after = (
        load_file(f"{decoder}.safetensors"),
        load_file(checkpoints / "decoder.safetensors"),
    )
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) > len(before) / 2
    args = json.loads((checkpoints / "decoder.json").read_text())["args"]
    assert args["use_fp16"] and args["num_blocks"] == 12
    if name == "gaussian":
        assert saved(checkpoints / "encoder.safetensors") == layout("encoder")
    else:
        assert not (checkpoints / "encoder.safetensors").exists()
