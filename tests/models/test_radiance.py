"""The radiance decoder: published numbers, batched and looped, impossible configurations."""

import math

import pytest
import torch

import models
from kernels import backend
from tests.helpers.compare import assert_close
from tests.helpers.models import (
    T1,
    batch,
    build,
    cameras,
    check_gradients,
    randomize,
    small_radiance,
)

FIELDS = ("position", "trivec", "density", "color")


def test_radiance_decoder_matches_published(device):
    model, x, tensors = build("rf_swin_w4", device)
    raw = model.fields(x).feats
    assert_close(raw, tensors["out/out_layer"], T1, "out_layer")
    scenes = model(x)
    assert len(scenes) == 3
    for i, scene in enumerate(scenes):
        assert (
            torch.equal(scene.position, tensors[f"out/obj{i}/position"]) and scene.resolution == 16
        )
        # published scenes are octree leaves
        assert (tensors[f"out/obj{i}/depth"] == math.log2(scene.resolution)).all()
    for ours, theirs in (("trivec", "trivec"), ("density", "density"), ("color", "features_dc")):
        assert_close(getattr(scenes[2], ours), tensors[f"out/obj2/{theirs}"], T1, ours)
    check_gradients(model, x, tensors, raw)


def test_density_scale_multiplies_densities_alone():
    plain = randomize(small_radiance())
    scaled = randomize(small_radiance(density_scale=50.0))
    x = batch([20], "cpu", channels=4)
    ours = scaled(x)[0]
    theirs = plain(x)[0]
    assert torch.equal(ours.density, theirs.density * 50) and torch.equal(
        ours.trivec, theirs.trivec
    )


def test_ranks_start_equal_as_published_unless_they_are_spread(device):
    x = batch([20], device, channels=4)
    for std in (0.0, 0.5):
        torch.manual_seed(0)
        decoder = small_radiance(trivec_std=std).to(device)
        scene = decoder(x)[0]
        image = scene.render(cameras(1, device, 16), torch.zeros(1, 3, device=device))
        (image.color * torch.linspace(0, 1, 16, device=device)).sum().backward()
        # of the three densities, after 3 ranks x 3 axes x 4 numbers
        gradient = decoder.out_layer.weight.grad[36:39]
        assert gradient.abs().max() > 0 and torch.equal(gradient[0], gradient[1]) == (std == 0)
        assert (
            scene.trivec.std().item() == pytest.approx(std, abs=0.15) and (scene.density == 0).all()
        )


def test_batched_equals_looped_with_empty_samples(device):
    decoder = randomize(small_radiance(density_scale=30.0)).to(device)
    x = batch([30, 0, 1, 40, 0], device, channels=4)
    scenes = decoder(x)
    assert [len(scene.position) for scene in scenes] == [30, 0, 1, 40, 0]
    for sample, rows in enumerate(x.split()):
        if len(rows):
            coords = x.coords[x.coords[:, 0] == sample].clone()
            coords[:, 0] = 0
            alone = decoder(models.SparseTensor(rows, coords))[0]
            for name in FIELDS:
                assert_close(
                    getattr(scenes[sample], name), getattr(alone, name), 1e-5, f"{sample} {name}"
                )
    background = torch.rand(5, 3, device=device)
    with torch.no_grad():
        together = models.render(scenes, cameras(5, device, 16), [0, 1, 2, 3, 4], background)
        assert torch.equal(together.color[4], background[4, :, None, None].expand(3, 16, 16))
        alone = scenes[3].render(cameras(5, device, 16)[3:4], background[3:4])
    assert_close(together.color[3:4], alone.color, 1e-6, "color")


def test_no_voxels_at_all(device):
    vae = models.RadianceVAE(
        models.Encoder(16, 5, 32, 4, 2, num_heads=2, window_size=4), small_radiance()
    ).to(device)
    posterior, scenes = vae(batch([0, 0], device))
    assert posterior.mean.shape == (0, 4) and models.penalties(scenes) == {}
    image = models.render(scenes, cameras(2, device, 20), [0, 1], torch.ones(2, 3, device=device))
    assert (image.color == 1).all() and (image.alpha == 0).all()


def test_render_batches_scenes_and_views_in_one_launch(kernel_device):
    decoder = randomize(small_radiance()).to(kernel_device)
    scenes = decoder(batch([3, 2, 4, 1], kernel_device, channels=4))
    camera = cameras(4, kernel_device, 16)
    background = torch.zeros(4, 3, device=kernel_device)
    with torch.no_grad(), backend.count_launches() as four:
        models.render(scenes, camera, [0, 1, 2, 3], background)
    with torch.no_grad(), backend.count_launches() as one:
        scenes[2].render(camera[2:3], background[:1])
    assert four == one and sum(one.values()) > 0


def test_offsets_are_drawn_for_training_and_fixed_for_pictures(device):
    decoder = randomize(small_radiance(density_scale=100.0)).to(device)
    scene = decoder(batch([60], device, channels=4))[0]
    camera = cameras(1, device, 16)
    background = torch.zeros(1, 3, device=device)
    with torch.no_grad():
        assert torch.equal(
            scene.render(camera, background).color, scene.render(camera, background).color
        )
    assert not torch.equal(
        scene.render(camera, background).color, scene.render(camera, background).color
    )
    torch.manual_seed(0)
    first = scene.render(camera, background).color
    torch.manual_seed(0)
    assert torch.equal(first, scene.render(camera, background).color)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 3}, "unknown keys .'ranks'.; known are .*rank"),
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"dim": 1}, "dim 1 at least 2"),
        ({"density_scale": 0.0}, "density_scale 0.0 must exceed 0"),
        ({"trivec_std": -1.0}, "trivec_std -1.0 be at least 0"),
    ],
)
def test_impossible_representations(change, message):
    with pytest.raises(ValueError, match=message):
        small_radiance(**change)


def test_scenes_of_several_resolutions_are_no_batch():
    x = batch([5], "cpu", channels=4)
    one = small_radiance()
    other = models.RadianceDecoder(
        32, 32, 4, 2, num_heads=2, representation_config={"rank": 3, "dim": 4}
    )
    with pytest.raises(ValueError, match=r"different resolutions: \[16, 32\]"):
        models.render([*one(x), *other(x)], cameras(2, "cpu"), [0, 1], torch.zeros(2, 3))
