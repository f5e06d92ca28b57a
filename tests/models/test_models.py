"""The models against published numbers, and against themselves batched and looped."""

import math

import pytest
import torch

import models
from kernels import backend
from kernels.camera import Camera
from kernels.gaussian.splat import splat
from kernels.voxels.cache import SpatialCache
from models.layers import Block, block_windows, position_embedding
from models.vae import load_weights as load_into
from tests.helpers.compare import assert_close
from tests.helpers.golden import golden, load_weights
from tests.helpers.hardware import with_long_cases
from tests.helpers.models import (
    REPRESENTATION,
    T1,
    T2,
    batch,
    build,
    check_gradients,
    randomize,
    small_decoder,
    small_encoder,
)


def row_projections(model, x):
    """The model's output, and each block's output dotted with a ramp."""
    found = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: found.append(out.detach()))
        for block in model.blocks
    ]
    out = model(x)
    for hook in hooks:
        hook.remove()
    return out, [h @ torch.linspace(-1, 1, h.shape[1], device=h.device) for h in found]


@pytest.mark.parametrize(
    ("device", "case"),
    with_long_cases(["enc_swin_w8_hd64"], ["enc_swin_w4_hd16"]),
    indirect=["device"],
)
def test_encoder_matches_published(case, device):
    model, x, tensors = build(case, device)
    posterior, rows = row_projections(model, x)
    for i, row in enumerate(rows):
        assert_close(row, tensors[f"out/block{i}_rowproj"], T1, f"block {i}")
    assert_close(posterior.mean, tensors["out/mean"], T1, "mean")
    assert_close(posterior.logvar, tensors["out/logvar"], T1, "logvar")
    assert_close(posterior.mode().feats, tensors["out/z"], T1, "z")
    assert_close(
        posterior.sample(noise=tensors["out/eps"]).feats, tensors["out/z_sampled"], T1, "sample"
    )
    check_gradients(model, x, tensors, torch.cat([posterior.mean, posterior.logvar], dim=1))


@pytest.mark.parametrize(
    ("device", "case"),
    with_long_cases(["gs_official_rep"], ["gs_swin_w4"]),
    indirect=["device"],
)
def test_gaussian_decoder_matches_published(case, device):
    model, x, tensors = build(case, device)
    raw = model.fields(x).feats
    assert_close(raw, tensors["out/out_layer"], T1, "out_layer")
    assert model.config.scaling_shift == pytest.approx(tensors["out/scale_bias"].item(), rel=1e-6)
    assert model.config.opacity_shift == pytest.approx(tensors["out/opacity_bias"].item(), rel=1e-6)
    scenes = model(x)
    names = {
        "center": "xyz",
        "scale": "scaling",
        "rotation": "rotation",
        "opacity": "opacity",
        "color": "features_dc",
    }
    checked = 0
    for i, scene in enumerate(scenes):
        for ours, theirs in names.items():
            if f"out/obj{i}/{theirs}" in tensors:
                assert_close(
                    getattr(scene, ours), tensors[f"out/obj{i}/{theirs}"], T1, f"{i} {ours}"
                )
                checked += 1
    assert checked >= 5
    # the loss of the stored representation gradients: every field against an outer product, summed
    # over the objects
    published = {
        "xyz": "center",
        "scaling": "scale",
        "rotation": "rotation",
        "opacity": "opacity",
        "features": "color",
    }
    loss = 0.0
    for theirs, ours in published.items():
        values = torch.cat([getattr(scene, ours) for scene in scenes]).flatten(1)
        a = tensors[f"grad_rep/a_get_{theirs}"]
        b = tensors[f"grad_rep/b_get_{theirs}"]
        loss = loss + (values * torch.outer(a, b)).sum()
    grads = torch.autograd.grad(loss, [x.feats, model.out_layer.weight])
    assert_close(grads[0], tensors["grad_rep/in_feats"], T2, "grad_rep in_feats")
    assert_close(grads[1], tensors["grad_rep/param/out_layer.weight"], T2, "grad_rep out_layer")
    assert loss.item() == pytest.approx(tensors["grad_rep/loss"].item(), rel=1e-4, abs=1e-4)
    check_gradients(model, x, tensors, raw)


def test_block_and_position_embedding_match_published(device):
    _, tensors = golden("ops_sparse")
    tensors = {k: v.to(device) for k, v in tensors.items()}
    block = Block(32, 2, 2, block_windows("swin", 4, 1), False, qk_rms_norm=True).to(device)
    load_into(block, load_weights(tensors, "block/sd/"), "block")
    cache = SpatialCache(tensors["coords"], None)
    # the small input tells eps 1e-6 from 1e-5
    for scale, name in ((1.0, "out"), (1e-3, "out_for_1e-3_input")):
        x = block(tensors["feats"].float() * scale, cache)
        assert_close(x, tensors[f"block/{name}"], T1, name)
    coords = torch.nn.functional.pad(tensors["ape/pos"], (1, 0)).int()
    order = torch.arange(len(coords), device=device)  # one voxel a sample: positions may repeat
    coords[:, 0] = order
    assert_close(
        position_embedding(SpatialCache(coords, None), 64),
        tensors["ape/out"],
        T1,
        "position embedding",
    )


def test_initialisation_zeroes_what_the_published_one_does():
    encoder = small_encoder()
    for name, value in encoder.named_parameters():
        assert (value == 0).all() == (name.endswith("bias") or name.startswith("out_layer")), name
    warm = small_encoder(logvar_init=-4.0)
    assert (warm.out_layer.bias[4:] == -4).all() and warm.out_layer.weight.std() > 0


def test_rescaling_makes_untrained_blocks_the_identity():
    torch.manual_seed(0)
    model = models.Encoder(16, 5, 32, 4, 2, num_heads=2, window_size=8)
    x = batch([40, 0, 7], "cpu")
    before = model.trunk(x.feats, x.cache)
    weight = model.input_layer.weight.clone()
    model.rescale(inputs=3.0, branches=0.0)
    assert torch.equal(model.input_layer.weight, 3 * weight)
    place = x.cache.get(position_embedding, 32)
    assert_close(model.trunk(x.feats, x.cache), model.input_layer(x.feats) + place, 1e-6)
    assert (before - model.trunk(x.feats, x.cache)).abs().max() > 0.1


@pytest.mark.parametrize("channels, width", [(16, 32), (16, 12), (1, 6)])
def test_a_principal_start_makes_latents_of_the_components_that_vary_most(channels, width):
    torch.manual_seed(0)
    mixed = torch.randn(channels, channels, dtype=torch.float64)
    features = torch.randn(5000, channels, dtype=torch.float64) @ mixed + 7
    mean = features.mean(0)
    covariance = torch.cov(features.T, correction=0).reshape(channels, channels)
    encoder = models.Encoder(16, channels, width, 4, 1, num_heads=1, logvar_init=-4.0).double()
    encoder.start_principal(mean, covariance, gain=2.0)
    hidden = encoder.input_layer(features)
    assert_close(hidden.mean(0), torch.zeros(width, dtype=torch.float64), 1e-9)
    kept = min(channels, width)
    read = min(4, kept)
    latents = torch.nn.functional.linear(hidden, encoder.out_layer.weight)
    _, values, right = torch.linalg.svd(features - mean, full_matrices=False)
    variances = values.square() / len(features)
    expected = (features - mean) @ right[:read].T
    expected = 2 * expected / (variances[:read] + 0.01 * variances[0]).sqrt()
    assert_close(latents[:, :read].abs(), expected.abs(), 1e-6)
    assert (latents[:, read:] == 0).all()
    logvar = encoder.out_layer.bias[4:]
    assert (logvar == -4).all()
    # components that are whitened are orthogonal, and those that hardly vary stay small
    spread = torch.linalg.eigvalsh(torch.cov(hidden.T, correction=0).reshape(width, width))
    assert spread.max() <= 4 and (spread > 1e-9).sum() == kept


def test_a_principal_start_refuses_moments_of_other_features():
    encoder = small_encoder()
    width = encoder.input_layer.in_features
    with pytest.raises(ValueError, match=rf"mean is \[3\], the features need \[{width}\]"):
        encoder.start_principal(torch.zeros(3), torch.eye(width))
    with pytest.raises(ValueError, match=rf"covariance is \[3, 3\], .* need \[{width}, {width}\]"):
        encoder.start_principal(torch.zeros(width), torch.eye(3))


@pytest.mark.parametrize("mode", ["swin", "full"])
def test_batched_equals_looped_with_empty_samples(device, mode):
    encoder = randomize(small_encoder(attn_mode=mode)).to(device)
    decoder = randomize(small_decoder(attn_mode=mode)).to(device)
    x = batch([40, 0, 1, 57, 0], device)
    posterior = encoder(x)
    scenes = decoder(posterior.mode())
    assert [len(s.center) for s in scenes] == [160, 0, 4, 228, 0]
    for sample, rows in enumerate(x.split()):
        if not len(rows):
            continue
        coords = x.coords[x.coords[:, 0] == sample].clone()
        coords[:, 0] = 0
        alone = encoder(models.SparseTensor(rows, coords))
        mine = posterior.mean[x.coords[:, 0] == sample]
        assert_close(mine, alone.mean, 2e-6, f"sample {sample}")
        for name in ("center", "scale", "rotation", "opacity", "color"):
            assert_close(
                getattr(scenes[sample], name), getattr(decoder(alone.mode())[0], name), 1e-5, name
            )


def test_no_voxels_at_all(device):
    vae = models.GaussianVAE(small_encoder(), small_decoder()).to(device)
    posterior, scenes = vae(batch([0, 0], device))
    assert posterior.mean.shape == (0, 4) and [len(s.center) for s in scenes] == [0, 0]
    assert all(v == 0 for v in models.penalties(scenes).values())
    camera = Camera.orbit([0.0, 1.0], [0.1, 0.2], 2.0, math.radians(40), 20, 20).to(device)
    background = torch.tensor([[0.25, 0.5, 1.0], [1.0, 1.0, 1.0]], device=device)
    image = models.render(scenes, camera, [0, 1], background)
    assert torch.equal(image.color, background[:, :, None, None].expand(2, 3, 20, 20))


def test_render_batches_scenes_and_views_in_one_launch(kernel_device):
    decoder = randomize(small_decoder()).to(kernel_device)
    scenes = decoder(batch([3, 2, 4, 1], kernel_device, channels=4))
    camera = Camera.orbit([0.0, 1.0, 2.0, 3.0], [0.1] * 4, 2.0, math.radians(40), 24, 24).to(
        kernel_device
    )
    background = torch.zeros(4, 3, device=kernel_device)
    with backend.count_launches() as four:
        together = models.render(scenes, camera, [0, 1, 2, 3], background)
    with backend.count_launches() as one:
        alone = scenes[2].render(camera[2:3], background[:1])
    assert four == one and sum(one.values()) > 0
    assert_close(together.color[2:3], alone.color, 1e-6, "color")


def test_scenes_render_with_the_low_pass_filter_of_their_decoder():
    representation = REPRESENTATION | {"2d_filter_kernel_size": 5.0}
    decoder = randomize(
        models.GaussianDecoder(
            16, 32, 4, 2, num_heads=2, window_size=4, representation_config=representation
        )
    )
    (scene,) = decoder(batch([3], "cpu", channels=4))
    camera = Camera.orbit(0.3, 0.1, width=24)
    background = torch.zeros(1, 3)
    gaussians = (
        scene.center,
        scene.scale,
        scene.rotation,
        scene.opacity,
        scene.color,
        [0, 12],
        camera,
        [0],
        background,
    )
    color = scene.render(camera, background).color
    assert torch.equal(color, splat(*gaussians, kernel_size=5.0).color) and not torch.equal(
        color, splat(*gaussians).color
    )


def test_a_forward_pass_builds_two_partitions(device):
    encoder = models.Encoder(16, 5, 32, 4, 12, num_heads=2, window_size=4).to(device)
    x = batch([30], device)
    encoder(x)
    partitions = 2  # shift 0 and shift window / 2
    assert x.cache.misses == partitions + 1  # and the position embedding
    assert x.cache.hits == 12 - partitions


def test_gradients_pass_through_half_precision(device):
    encoder = randomize(small_encoder(use_fp16=True)).to(device)
    x = batch([50, 20], device)
    half = encoder(x)
    encoder.set_activation_dtype(torch.float32)
    exact = encoder(x)
    assert half.mean.dtype == torch.float32
    assert_close(half.mean, exact.mean, 2e-2, "mean")
    half.mean.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in encoder.parameters()
    )


def test_checkpointing_blocks_changes_nothing(device):
    x = batch([50], device)
    grads = []
    for use in (False, True):
        encoder = randomize(small_encoder(use_checkpoint=use)).to(device).train()
        encoder(x).mean.square().sum().backward()
        grads.append([p.grad for p in encoder.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_the_scale_bias_is_the_size_of_an_untrained_gaussian():
    for activation, inverse in (("softplus", torch.nn.functional.softplus), ("exp", torch.exp)):
        for bias in (4e-3, 0.5, 800.0):  # expm1(800) is more than a float holds
            config = REPRESENTATION | {"scaling_bias": bias, "scaling_activation": activation}
            shift = models.gaussian.GaussianConfig.parse(config).scaling_shift
            assert inverse(torch.tensor(shift, dtype=torch.float64)).item() == pytest.approx(bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "model_channels 32 is not a multiple of num_heads 5"),
        ({"window_size": 0}, "window_size 0"),
        (
            {"attn_mode": "swim"},
            "attn_mode 'swim' is not one of full, swin, shift_window, shift_sequence, shift_order",
        ),
        ({"pe_mode": "sine"}, "pe_mode 'sine' is not one of ape, rope"),
    ],
)
def test_impossible_trunks(change, message):
    with pytest.raises(ValueError, match=message):
        models.Encoder(16, 5, 32, 4, 2, **({"num_heads": 2, "window_size": 4} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_gausians": 3}, "num_gausians"),
        ({"voxel_size": 1.0}, "voxel_size 1.0"),
        ({"voxel_size": math.nan}, "voxel_size nan"),
        ({"opacity_bias": 1.5}, "opacity_bias 1.5"),
        ({"scaling_bias": math.nan}, "scaling_bias nan"),
        ({"scaling_bias": math.inf}, "scaling_bias inf"),
        ({"scaling_activation": "relu"}, "relu"),
        ({"lr": {"_color": 1.0}}, "_color"),
    ],
)
def test_impossible_representations(change, message):
    with pytest.raises(ValueError, match=message):
        models.GaussianDecoder(
            16, 32, 4, 2, num_heads=2, representation_config=REPRESENTATION | change
        )


def test_wrong_inputs_name_both_numbers():
    x = batch([10], "cpu")
    with pytest.raises(ValueError, match=r"\(9, 5\).*10"):
        x.replace(x.feats[:9])
    with pytest.raises(ValueError, match="5 channels, the model takes 4"):
        small_decoder()(x)
    with pytest.raises(ValueError, match="4 latent channels, the decoder takes 8"):
        other = models.GaussianDecoder(
            16, 32, 8, 2, num_heads=2, representation_config=REPRESENTATION
        )
        models.GaussianVAE(small_encoder(), other)
    with pytest.raises(ValueError, match="none at all"):
        models.penalties([])
