"""Checkpoint files: published state dicts, saving and loading, and files that are wrong."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import models
from tests.helpers.compare import assert_close
from tests.helpers.golden import GOLDEN
from tests.helpers.models import randomize, small_decoder, small_encoder


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("manifest_*.json")), ids=lambda file: file.stem)
def test_full_size_models_take_the_published_state_dicts(file):
    manifest = json.loads(file.read_text())
    with torch.device("meta"):
        model = models.published_classes()[manifest["class"].removeprefix("Elastic")](
            **manifest["args"]
        )
    own = model.state_dict()
    assert {t["name"]: tuple(t["shape"]) for t in manifest["state_dict"]} == {
        k: tuple(v.shape) for k, v in own.items()
    }
    assert sum(p.numel() for p in model.parameters()) == manifest["num_parameters"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    published = {
        t["name"]: torch.empty(t["shape"], dtype=getattr(torch, t["dtype"]), device="meta")
        for t in manifest["state_dict"]
    }
    model.load_state_dict(published, strict=True, assign=True)


def test_save_and_load(tmp_path):
    for model in (randomize(small_encoder(logvar_init=-2.0)), randomize(small_decoder())):
        models.save_pretrained(model, tmp_path / "sub" / "model")
        again = models.load_pretrained(tmp_path / "sub" / "model")
        assert again.args == model.args and again.state_dict().keys() == model.state_dict().keys()
        assert all(
            torch.equal(a, b)
            for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
        )


def test_a_full_disk_leaves_the_saved_model(tmp_path, monkeypatch):
    model = small_encoder()
    models.save_pretrained(model, tmp_path / "m")
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(tensors, file):
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(models.vae, "save_checked", full)
    with pytest.raises(OSError, match=r"could not write .*m.safetensors: No space left"):
        models.save_pretrained(randomize(model), tmp_path / "m")
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_published_names_and_fp16_files_load(tmp_path):
    decoder = randomize(small_decoder())
    models.save_pretrained(decoder, tmp_path / "m")
    config = (
        (tmp_path / "m.json")
        .read_text()
        .replace("SLatGaussianDecoder", "ElasticSLatGaussianDecoder")
    )
    (tmp_path / "m.json").write_text(config)
    weights = load_file(tmp_path / "m.safetensors")
    save_file({k: v.half() for k, v in weights.items()}, tmp_path / "m.safetensors")
    again = models.load_pretrained(tmp_path / "m")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert_close(again.out_layer.weight, decoder.out_layer.weight, 1e-3)


def test_bad_checkpoints_name_what_is_wrong(tmp_path):
    prefix = tmp_path / "m"
    with pytest.raises(ValueError, match="m.json is not there"):
        models.load_pretrained(prefix)
    models.save_pretrained(small_encoder(), prefix)
    config = tmp_path / "m.json"
    weights = tmp_path / "m.safetensors"
    good = config.read_text()
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="m.safetensors is truncated"):
        models.load_pretrained(prefix)
    weights.write_bytes(data)
    config.write_text(good.replace('"model_channels": 32', '"model_channels": 64'))
    with pytest.raises(
        ValueError, match=r"blocks.0.attn.to_out.bias has shape \(32,\), the model's is \(64,\)"
    ):
        models.load_pretrained(prefix)
    config.write_text(good.replace("SLatEncoder", "SLatUnknown"))
    with pytest.raises(ValueError, match="SLatUnknown"):
        models.load_pretrained(prefix)
    config.write_text(good.replace('"window_size": 4', '"window_size": 0'))
    with pytest.raises(ValueError, match="m.json: arguments do not fit SLatEncoder: window_size 0"):
        models.load_pretrained(prefix)
    config.write_text(good.replace('"window_size"', '"window_sise"'))
    with pytest.raises(ValueError, match="window_sise"):
        models.load_pretrained(prefix)
    for blocks in (1, 3, 10**9, 1e9, "2", None):
        config.write_text(good.replace('"num_blocks": 2', f'"num_blocks": {json.dumps(blocks)}'))
        said = rf"m.json: num_blocks is {blocks!r}, but \S*m.safetensors holds 2 blocks"
        with pytest.raises(ValueError, match=said):
            models.load_pretrained(prefix)
    config.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        models.load_pretrained(prefix)
