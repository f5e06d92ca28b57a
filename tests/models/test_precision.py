"""Sixteen-bit activations with fp32 weights, through models, renderer and training step."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from kernels import backend
from tests.helpers.compare import assert_close
from tests.helpers.models import batch, randomize, small_decoder, small_encoder
from tests.helpers.runs import TINY
from train import loop
from train.draws import draw
from train.flags import from_cli
from train.gaussian import PRESETS, build
from train.optimizer import LossScale
from train.run.machine import Machine

CPU = Machine(torch.device("cpu"), 0, 1)
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def start(tmp_path):
    """A function that makes tiny runs of the Gaussian VAE on the embedded objects.

    Output layers are not zero, so that gradients reach every weight.
    """

    def warm(config, channels):
        vae = build(config, channels)
        for part in vae.children():
            torch.nn.init.normal_(part.out_layer.weight, std=0.05)
        return vae

    def make(*flags, make_vae=warm) -> loop.Run:
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        config = from_cli("gaussian", PRESETS, [*TINY, "--out", str(out), *flags])
        return loop.Run("gaussian", config, make_vae, CPU)

    return make


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_trunk_computes_in_16_bits_and_everything_else_in_fp32(device, dtype):
    if dtype == torch.bfloat16 and backend.name(torch.empty(0, device=device)) == "interpreter":
        pytest.skip("Triton's interpreter gets bf16 wrong")
    encoder = randomize(small_encoder()).to(device)
    decoder = randomize(small_decoder()).to(device)
    vae = models.GaussianVAE(encoder, decoder)
    x = batch([30, 0, 12], device)
    noise = torch.zeros(42, 4, device=device)
    exact = [encoder(x).mean, decoder.fields(encoder(x).mode()).feats]
    vae.set_activation_dtype(dtype)
    seen: dict[str, set] = {}

    def note(name):
        def hook(module, args, out):
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
            seen.setdefault(name, set()).update(t.dtype for t in tensors)

        return hook

    hooks = [
        m.register_forward_hook(note(name))
        for name, m in vae.named_modules()
        if ".blocks." in name or "layer" in name
    ]
    posterior, scenes = vae(x, noise)
    for hook in hooks:
        hook.remove()
    inside = {name: found for name, found in seen.items() if ".blocks." in name}
    layers = 4 * 8  # a block, attention and MLP, their four linear layers, and what holds two
    assert len(inside) == layers and all(found == {dtype} for found in inside.values()), inside
    assert seen["encoder.input_layer"] == seen["decoder.out_layer"] == {torch.float32}
    fields = ("center", "scale", "rotation", "opacity", "color")
    outputs = [
        posterior.mean,
        posterior.logvar,
        *(getattr(scene, field) for scene in scenes for field in fields),
    ]
    assert {t.dtype for t in outputs} == {torch.float32}
    limit = 1e-2 if dtype == torch.float16 else 8e-2
    assert_close(posterior.mean, exact[0], limit, "mean")
    assert_close(decoder.fields(posterior.mode()).feats, exact[1], limit, "fields")
    sum(t.square().sum() for t in outputs).backward()
    assert all(
        p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in vae.parameters()
    )


def gradients(run: loop.Run, log2: float) -> torch.Tensor:
    """All gradients of one micro-batch at a loss scale, as they are accumulated, [P]."""
    run.optimizer.scale = LossScale(log2)
    micro = next(run.objects.steps())[0]
    run.objects.sampler.step = 0
    x = run._voxels(micro)
    noise, background = draw(run.config, run.here, 0, 0, x, micro.view_scene)
    loss, _ = run.objective(x, noise, micro, background)
    run.optimizer.backward(loss)
    taken = torch.cat([p.grad.flatten() for p in run.vae.parameters()])
    for p in run.vae.parameters():
        p.grad = None
    return taken


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_a_loss_times_2_to_the_20_are_exactly_that_multiple(start, precision):
    run = start("--precision", precision)
    once = gradients(run, 0)
    scaled = gradients(run, 20)
    assert once.abs().max() > 0 and torch.equal(once * 2.0**20, scaled)


def test_what_fp16_gradients_need_the_scale_for(start):
    exact = gradients(start("--precision", "fp32"), 0)
    run = start("--precision", "fp16")
    error = {
        log2: ((gradients(run, log2) * 2.0**-log2 - exact).norm() / exact.norm()).item()
        for log2 in (0, 10, 20, 32)
    }
    assert error[20] < 2e-3 and error[10] < 2e-3, error  # rounding: 4.6e-4 when this was written
    assert error[0] > 2 * error[20], error  # gradients of activations sink below what fp16 holds
    assert not math.isfinite(error[32])  # or rise above it


def train(run: loop.Run, steps: int) -> list[dict]:
    batches = run.objects.steps()
    return [run.step(next(batches)) for _ in range(steps)]


def finite(row: dict) -> bool:
    return all(math.isfinite(value) for value in row.values())


def test_fp16_checkpoint_files_train_in_fp32_for_100_steps(start, tmp_path):
    """fp16 files load as fp32: in AdamW fp16 parameters turn into NaN, because its eps is zero."""
    source = start().vae
    for part, model in source.named_children():
        models.save_pretrained(model, tmp_path / part)
        weights = {
            key: value.half() for key, value in load_file(tmp_path / f"{part}.safetensors").items()
        }
        save_file(weights, tmp_path / f"{part}.safetensors")
    loaded = lambda config, channels: models.GaussianVAE(
        *(models.load_pretrained(tmp_path / p) for p in ("encoder", "decoder"))
    )
    as_loaded = "--model.start published --model.input-gain 1 --model.branch-gain 1".split()
    flags = "--precision fp16 --lr 1e-4 --steps 100 --final-lr 1".split()
    run = start(*flags, *as_loaded, make_vae=loaded)
    before = {name: p.detach().clone() for name, p in run.vae.named_parameters()}
    assert all(
        p.dtype == torch.float32 and torch.equal(p, p.half().float()) for p in before.values()
    )
    log = train(run, 100)
    assert len(log) == 100 and all(map(finite, log)) and run.optimizer.skipped == 0
    assert run.optimizer.scale.log2 == pytest.approx(20.1)
    for name, p in run.vae.named_parameters():
        assert (
            p.dtype == torch.float32 and p.isfinite().all() and not torch.equal(p, before[name])
        ), name
    assert all(t.isfinite().all() for t in run.optimizer.tensors().values())


def test_a_scale_that_overflows_falls_until_steps_are_taken(start):
    run = start("--precision", "fp16")
    run.optimizer.scale = LossScale(32.0)
    before = [p.detach().clone() for p in run.vae.parameters()]
    log = [train(run, 1)[0]]
    assert (
        not math.isfinite(log[0]["grad_norm"])
        and run.optimizer.scale.log2 == 31
        and run.optimizer.skipped == 1
    )
    assert all(torch.equal(p, b) for p, b in zip(run.vae.parameters(), before, strict=True))
    for _ in range(12):
        log += train(run, 1)
    taken = [row["step"] for row in log if math.isfinite(row["grad_norm"])]
    assert len(taken) > 3 and all(p.isfinite().all() for p in run.vae.parameters())
    assert run.optimizer.scale.log2 == pytest.approx(32 - run.optimizer.skipped + 1e-3 * len(taken))
    assert not any(torch.equal(p, b) for p, b in zip(run.vae.parameters(), before, strict=True))
