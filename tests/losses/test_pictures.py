"""Losses of pictures against published numbers, and the clipping of gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import models
from models import GaussianScene
from tests.helpers.compare import assert_close
from tests.helpers.golden import golden
from train.losses.pictures import Reconstruction, composite, kl, psnr, smooth_l1
from train.lpips import LPIPS, _unit, weight_shapes
from train.optimizer import GradClipper

PAIR = torch.rand(2, 2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights():
    """Random VGG16 weights in float64, scaled so that features keep their size.

    Two stages are dead in part.
    """
    generator = torch.Generator().manual_seed(1)
    made = {}
    for key, shape in weight_shapes().items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        scale = (
            0.1
            if key.endswith("bias")
            else math.sqrt(2 / (shape[1] * 9))
            if key.startswith("features")
            else 1.0
        )
        made[key] = value.abs() if key.startswith("lin") else value * scale
    made["features.28.bias"] -= 1.5  # most pixels: every channel of relu5_3 is zero
    return made


@pytest.fixture(scope="module")
def weights_file(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("lpips") / "vgg.safetensors"
    save_file(weights, file)
    return file


def lpips_by_hand(weights, picture, target):
    """torchvision's layer list, cut where LPIPS cuts it, without a guard."""
    layers = []
    channels = 3
    for width in [
        64,
        64,
        "M",
        128,
        128,
        "M",
        256,
        256,
        256,
        "M",
        512,
        512,
        512,
        "M",
        512,
        512,
        512,
    ]:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1, dtype=torch.float64), nn.ReLU()]
            channels = width
    vgg = nn.Sequential(*layers).requires_grad_(False)
    vgg.load_state_dict(
        {k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features")}
    )
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    total = 0
    a = (picture * 2 - 1 - shift) / scale
    b = (target * 2 - 1 - shift) / scale
    for i, layer in enumerate(vgg):
        a, b = layer(a), layer(b)
        if i in (3, 8, 15, 22, 29):
            head = weights[f"lin{(3, 8, 15, 22, 29).index(i)}.model.1.weight"]
            unit_a, unit_b = (
                x / (x.pow(2).sum(1, keepdim=True) + 1e-300).sqrt().add(1e-10) for x in (a, b)
            )
            total = total + F.conv2d((unit_a - unit_b) ** 2, head).mean((1, 2, 3))
    return total


def test_lpips_is_the_definition_and_so_is_its_gradient(weights, weights_file):
    ours, theirs = (PAIR[0].double().requires_grad_() for _ in range(2))
    target = PAIR[1].double()
    value = LPIPS(weights_file, torch.float64)(ours, target)
    expected = lpips_by_hand(weights, theirs, target)
    assert_close(value, expected, 1e-12)
    assert value.shape == (2,) and value.min() > 0.01
    value.sum().backward()
    expected.sum().backward()
    assert_close(ours.grad, theirs.grad, 1e-9, "gradient")
    assert_close(LPIPS(weights_file)(*PAIR), expected, 2e-5)


def test_lpips_of_dead_features_has_a_finite_gradient(weights, tmp_path):
    """The norm's square root has an infinite derivative where every channel is zero.

    ReLU's may hide it or not.
    """
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    _unit(x).sum().backward()
    assert x.grad.isfinite().all()
    dead = weights | {"features.2.bias": torch.full((64,), -1e3, dtype=torch.float64)}
    save_file({k: v.float() for k, v in dead.items()}, tmp_path / "dead.safetensors")
    picture = PAIR[0].clone().requires_grad_()
    LPIPS(tmp_path / "dead.safetensors")(picture, PAIR[1]).sum().backward()
    assert picture.grad.isfinite().all()


def test_lpips_is_frozen_and_moves_only_the_rendered_picture(weights_file):
    term = LPIPS(weights_file)
    assert not any(p.requires_grad for p in term.parameters()) and not list(term.buffers())
    picture, target = PAIR[0].clone().requires_grad_(), PAIR[1].clone().requires_grad_()
    term(picture, target).sum().backward()
    assert picture.grad.abs().max() > 0 and target.grad is None
    assert torch.equal(term(PAIR[0], PAIR[0]), torch.zeros(2))


def test_lpips_names_what_is_wrong_with_a_file(weights, tmp_path):
    file = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="w.safetensors is not a file"):
        LPIPS(file)
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, file)
    with pytest.raises(
        ValueError, match="w.safetensors lacks 30 of 31 tensors, first features.0.bias"
    ):
        LPIPS(file)
    save_file(weights | {"lin1.model.1.weight": torch.zeros(1, 64, 1, 1)}, file)
    with pytest.raises(
        ValueError,
        match=r"lin1.model.1.weight in .*w.safetensors has shape \(1, 64, 1, 1\), not \(1, 128",
    ):
        LPIPS(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="w.safetensors is truncated"):
        LPIPS(file)


def test_lpips_names_pictures_it_cannot_compare(weights_file):
    term = LPIPS(weights_file)
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\) with \(1, 3, 32, 33\)"):
        term(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 33))
    with pytest.raises(ValueError, match=r"16 pixels or more, not \(32, 15\)"):
        term(torch.zeros(1, 3, 32, 15), torch.zeros(1, 3, 32, 15))


def test_reconstruction_terms(weights_file):
    assert Reconstruction()(*PAIR).keys() == {"l1", "ssim"}
    with_lpips = Reconstruction(weights_file)
    terms = with_lpips(*PAIR)
    assert terms.keys() == {"l1", "ssim", "lpips"}
    assert torch.equal(terms["lpips"], with_lpips.lpips(*PAIR).mean())
    assert all(abs(value) < 1e-6 for value in with_lpips(PAIR[0], PAIR[0]).values())
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 48\) and target \(1, 3, 32, 48\)"):
        with_lpips(PAIR[0], PAIR[1, :1])


def test_the_gaussian_recipe_gives_the_published_loss_and_gradients():
    case, t = golden("loss_gs_trainer")
    leaf = lambda name: t[name].float().requires_grad_()
    mean, logvar, rendered = leaf("in/mean"), leaf("in/logvar"), leaf("in/rec_image")
    raw = [(leaf(f"in/obj{i}/_scaling"), leaf(f"in/obj{i}/_opacity")) for i in range(2)]
    target = composite(
        torch.cat([t["in/gt_image"], t["in/gt_alpha"][:, None]], dim=1).float(), t["in/bg_color"]
    )
    # the published activations, over all Gaussians of an uneven batch at once
    bias = 0.004 + math.log(-math.expm1(-0.004))
    scale = [torch.sqrt(F.softplus(s + bias).square() + 9e-4**2) for s, _ in raw]
    opacity = [torch.sigmoid(o + math.log(0.1 / 0.9)) for _, o in raw]
    any_of = lambda s, *shape: torch.zeros(len(s), *shape)  # what no penalty reads
    penalties = models.penalties(
        [
            GaussianScene(any_of(s, 3), s, any_of(s, 4), o, any_of(s, 1, 3))
            for s, o in zip(scale, opacity, strict=True)
        ]
    )
    terms = Reconstruction()(rendered, target)
    terms |= {
        "kl": kl(mean, logvar),
        "reg_vol": penalties["volume"],
        "reg_opacity": penalties["opacity"],
    }
    factors = {"l1": 1, "ssim": case["lambda_ssim"], "kl": case["lambda_kl"]}
    factors |= {
        "reg_vol": case["regularizations"]["lambda_vol"],
        "reg_opacity": case["regularizations"]["lambda_opacity"],
    }
    loss = sum(factors[name] * term for name, term in terms.items())
    for name, value in (terms | {"loss": loss}).items():
        torch.testing.assert_close(
            value.detach(),
            t[f"terms/{name}"],
            rtol=1e-5,
            atol=0,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    loss.backward()
    grads = {"grad/mean": mean, "grad/logvar": logvar, "grad/rec_image": rendered}
    grads |= {
        f"grad/obj{i}/{field}": raw[i][j]
        for i in range(2)
        for j, field in enumerate(("_scaling", "_opacity"))
    }
    for name, tensor in grads.items():
        difference = (tensor.grad - t[name]).abs().max()
        assert difference <= 2e-5 * t[name].abs().max(), f"{name} differs by {difference:.2e}"


def test_image_losses_agree_with_the_published_ones():
    _, t = golden("loss_image")
    a, b = t["img1"].float(), t["img2"].float()
    close = lambda value, name, atol=2e-6: torch.testing.assert_close(
        value, t[name], atol=atol, rtol=0
    )
    close((a - b).abs().mean(), "l1")
    close(Reconstruction()(a, b)["l1"], "l1")
    for beta in (1.0, 0.1, 0.00195312, 0.00781250):
        close(
            smooth_l1(a, b, {0.00195312: 1 / 512, 0.00781250: 1 / 128}.get(beta, beta)),
            f"smooth_l1_beta_{beta:.8f}",
        )
    close(psnr(a.reshape(1, 6, 48, 64), b.reshape(1, 6, 48, 64))[0], "psnr", 1e-4)


def test_psnr_inside_a_mask():
    a, b = PAIR
    mask = torch.zeros(2, 1, 32, 48, dtype=torch.bool)
    mask[0, :, 5:9, 7:20] = True
    error = (a[0, :, 5:9, 7:20] - b[0, :, 5:9, 7:20]).square().mean()
    got = psnr(a, b, mask)
    assert got[0].item() == pytest.approx(-10 * math.log10(error), abs=1e-4) and got[1].isnan()
    assert psnr(a, a).isinf().all()


def test_kl_without_voxels_is_zero():
    assert kl(torch.zeros(0, 8), torch.zeros(0, 8)) == 0
    with pytest.raises(ValueError, match=r"\(2, 8\) and logvar \(2, 4\)"):
        kl(torch.zeros(2, 8), torch.zeros(2, 4))


def test_composite_is_straight_alpha():
    image = torch.tensor([0.2, 0.4, 0.6, 0.25]).view(1, 4, 1, 1)
    expected = torch.tensor([0.05 + 0.75, 0.1, 0.15]).view(1, 3, 1, 1)
    torch.testing.assert_close(composite(image, torch.tensor([[1.0, 0.0, 0.0]])), expected)
    with pytest.raises(ValueError, match=r"\(1, 3, 1, 1\) on \(1, 3\)"):
        composite(image[:, :3], torch.zeros(1, 3))


@pytest.mark.parametrize("name", ["grad_clip_adaptive", "grad_clip_adaptive_nomax"])
def test_clipper_follows_the_published_one(name):
    case, t = golden(name)
    clipper = GradClipper(case["max_norm"], case["clip_percentile"], case["buffer_size"])
    parameter = nn.Parameter(torch.zeros(8))
    same = lambda value, key, i: torch.testing.assert_close(
        torch.tensor(value, dtype=torch.float32), t[key][i], rtol=1e-6, atol=0, equal_nan=True
    )
    for i, grad in enumerate(t["grads"]):
        if i == len(t["grads"]) // 2:  # an interruption changes nothing
            state = clipper.state_dict()
            clipper = GradClipper(case["max_norm"], case["clip_percentile"], case["buffer_size"])
            clipper.load_state_dict(state)
        parameter.grad = grad.clone()
        same(clipper([parameter]), "returned_norm", i)
        # stored: no limit is nan
        same(math.nan if math.isinf(clipper.limit) else clipper.limit, "max_norm_after_call", i)
        same(parameter.grad.norm().item(), "clipped_norm", i)
        state = clipper.state_dict()
        assert len(state["norms"]) == t["buffer_length"][i] and state["next"] == t["buffer_ptr"][i]
    torch.testing.assert_close(torch.tensor(state["norms"]), t["final_buffer"], rtol=1e-6, atol=0)


def test_clipper_state_is_a_copy_both_ways():
    clipper = GradClipper(1.0, 95, 2)
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    clipper([parameter])
    state = clipper.state_dict()
    clipper([parameter])
    assert state["norms"] == [1.0]
    clipper.load_state_dict(state)
    clipper([parameter])
    assert state["norms"] == [1.0]
    with pytest.raises(ValueError, match="remembers 3 norms, the saved one 2"):
        GradClipper(buffer=3).load_state_dict(state)


@pytest.mark.parametrize("values", [(0.0, 95, 10), (1.0, 101, 10), (1.0, 95, 0)])
def test_clipper_refuses_impossible_values(values):
    with pytest.raises(ValueError, match="must exceed 0, percentile"):
        GradClipper(*values)
