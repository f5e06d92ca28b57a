"""Properties of every decoder in the table, and a fourth one that a test adds to it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import models
from kernels import Camera
from models import Encoder, GaussianScene
from models.vae import VAE, Decoder
from tests.helpers.compare import assert_close
from tests.helpers.decoders import CHANNELS, RESOLUTION, features, small_vae
from train import loop
from train.config import Config
from train.decoders import DECODERS, Recipe
from train.losses.pictures import PictureLoss
from train.presets import demo
from train.run import checkpoint

TINY = (  # 16 bit, as on a GPU
    "--deterministic --precision bf16 --resolution 16 --image-size 24 --batch-size 2 "
    "--micro-batch 1 --views 1 --holdout-views 2 --eval-objects 1 --warmup 0 --final-lr 1 "
    "--sample-every 100 --features rgb"
).split()


def view(count: int) -> Camera:
    return Camera.orbit([float(i) for i in range(count)], [0.2] * count, 2.0, 0.7, 24, 24)


def tensors(scene) -> dict[str, torch.Tensor]:
    return {name: t for name, t in vars(scene).items() if isinstance(t, torch.Tensor)}


def presets_build_the_vae_of_the_table(name: str, data: Path, tmp_path: Path) -> None:
    for config in DECODERS[name].presets.values():
        with torch.device("meta"):
            assert type(DECODERS[name].build(config, CHANNELS)) is models.DECODERS[name]


def batched_equals_looped_with_empty_samples(name: str, data: Path, tmp_path: Path) -> None:
    vae = small_vae(name).eval()
    x = features([6, 0, 5])
    latents = vae.encoder(x).mode()
    scenes = vae.decoder(latents)
    for sample in (0, 2):
        rows = x.coords[:, 0] == sample
        coords = x.coords[rows].clone()
        coords[:, 0] = 0
        (alone,) = vae.decoder(models.SparseTensor(latents.feats[rows], coords))
        for field, value in tensors(alone).items():
            assert_close(tensors(scenes[sample])[field], value, 2e-5, f"{sample} {field}")
    with torch.no_grad():
        light = torch.rand(3, 3)
        together = models.render(scenes, view(3), [2, 0, 1], light)
        first = models.render(scenes[2:], view(3)[:1], [0], light[:1])
    assert_close(together.color[:1], first.color, 1e-5)
    assert torch.equal(together.color[2], light[2, :, None, None].expand(3, 24, 24))


def nothing_to_see_is_the_background(name: str, data: Path, tmp_path: Path) -> None:
    posterior, scenes = small_vae(name)(features([0, 0]))
    assert posterior.mean.shape == (0, 4) and len(scenes) == 2
    assert all(value == 0 for value in models.penalties(scenes).values())
    assert (models.render(scenes, view(2), [0, 1], torch.ones(2, 3)).color == 1).all()


def every_parameter_learns(name: str, data: Path, tmp_path: Path) -> None:
    vae = small_vae(name).train()
    posterior, scenes = vae(features([6, 0, 5]))
    image = models.render(scenes, view(2), [0, 2], torch.ones(2, 3))
    penalties = sum(models.penalties(scenes).values())
    (image.color.square().mean() + posterior.logvar.mean() + penalties).backward()
    for parameter, p in vae.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), parameter


def save_and_load(name: str, data: Path, tmp_path: Path) -> None:
    decoder = small_vae(name).decoder
    models.save_pretrained(decoder, tmp_path / "decoder")
    again = models.load_pretrained(tmp_path / "decoder")
    assert type(again) is models.DECODERS[name].DECODER and again.args == decoder.args
    for key, value in decoder.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def train(name: str, out: Path, *flags: str) -> tuple[dict[str, torch.Tensor], dict]:
    recipe = DECODERS[name]
    loop.main(name, recipe.presets, recipe.build, [*map(str, flags)], recipe.loss)
    return checkpoint.load(checkpoint.newest(out / "checkpoints"))


def runs_repeat_and_resume_to_the_bit(name: str, data: Path, tmp_path: Path) -> None:
    flags = [*TINY, *DECODERS[name].smallest.split(), "--data", data]
    straight, state = train(name, tmp_path / "a", *flags, "--steps", 3, "--out", tmp_path / "a")
    train(name, tmp_path / "b", *flags, "--steps", 2, "--out", tmp_path / "b")
    parts, again = train(name, tmp_path / "b", "--resume", tmp_path / "b", "--steps", 3)
    assert state == again and state["step"] == 3 and state["optimizer"]["skipped"] == 0
    assert straight.keys() == parts.keys()
    assert all(torch.equal(t, parts[key]) for key, t in straight.items())
    scores = json.loads((tmp_path / "a" / "evaluation.json").read_text())["psnr"]
    assert {"trained", "untrained", "silhouette"} <= scores.keys()
    assert (tmp_path / "a" / "samples" / "step_00000003.png").is_file()


CHECKS = [
    presets_build_the_vae_of_the_table,
    batched_equals_looped_with_empty_samples,
    nothing_to_see_is_the_background,
    every_parameter_learns,
    save_and_load,
    runs_repeat_and_resume_to_the_bit,
]


def test_the_tables_of_models_and_of_training_have_the_same_decoders():
    assert list(models.DECODERS) == list(DECODERS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder(name, check, data, tmp_path):
    check(name, data, tmp_path)


# a fourth decoder: a dot of fixed size in each voxel, of which the colour and opacity are learned


@dataclass(frozen=True)
class DotsConfig:
    size: float = 0.02  # world units

    @classmethod
    def parse(cls, published: dict) -> "DotsConfig":
        return cls(**published)

    @property
    def fields(self) -> dict[str, int]:
        return {"color": 3, "opacity": 1}


class DotsScene(GaussianScene):
    @classmethod
    def penalties(cls, scenes: Sequence["DotsScene"]) -> dict[str, torch.Tensor]:
        return {}


class DotsDecoder(Decoder):
    NAME = "DotsDecoder"
    CONFIG = DotsConfig

    def forward(self, z: models.SparseTensor) -> list[DotsScene]:
        color, opacity = self.fields(z).feats.split([3, 1], dim=1)
        center = (z.coords[:, 1:].to(color.dtype) + 0.5) / self.resolution - 0.5
        scale = torch.full_like(center, self.config.size)
        rotation = color.new_tensor([1.0, 0, 0, 0]).expand(len(color), 4)
        rows = (center, scale, rotation, opacity.sigmoid(), color[:, None])
        parts = [row.split(z.cache.counts) for row in rows]
        return [DotsScene(*scene) for scene in zip(*parts, strict=True)]


class DotsVAE(VAE):
    DECODER = DotsDecoder


def build_dots(config: Config, in_channels: int) -> DotsVAE:
    decoder = DotsDecoder(representation_config={"size": 0.02}, **config.trunk())
    return DotsVAE(Encoder(in_channels=in_channels, **config.trunk()), decoder)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_fourth_decoder_needs_a_line_in_each_table(check, data, tmp_path, monkeypatch):
    presets = {"demo": demo(Config(), steps=2, resolution=RESOLUTION)}
    smallest = "--model.blocks 1 --model.channels 16 --model.heads 1"
    monkeypatch.setitem(models.DECODERS, "dots", DotsVAE)
    monkeypatch.setitem(DECODERS, "dots", Recipe(presets, build_dots, PictureLoss, smallest))
    check("dots", data, tmp_path)
