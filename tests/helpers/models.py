"""Small models, their inputs, and models with published weights."""

import math

import pytest
import torch

import models
from kernels.camera import Camera
from models.vae import load_weights as load_into
from tests.helpers.compare import assert_close
from tests.helpers.golden import golden, load_weights

# tolerances of outputs and of gradients, relative to the largest golden value
T1 = 1e-5
T2 = 2e-5
REPRESENTATION = {
    "lr": {"_rotation": 0.1},
    "voxel_size": 1.5,
    "num_gaussians": 4,
    "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4,
    "scaling_bias": 4e-3,
    "opacity_bias": 0.1,
    "scaling_activation": "softplus",
}


def build(case, device, **extra):
    """A model with the published weights of a golden case, its input, and the case's tensors."""
    meta, tensors = golden(case)
    tensors = {k: v.to(device) for k, v in tensors.items()}
    model = models.published_classes()[meta["cls"]](**meta["config"], **extra).to(device)
    load_into(model, load_weights(tensors), case)
    x = models.SparseTensor(tensors["in/feats"].clone().requires_grad_(), tensors["in/coords"])
    return model, x, tensors


def check_gradients(model, x, tensors, out):
    """Compare the gradients of a model and its input with those of a golden case."""
    loss = (
        out.double() * torch.outer(tensors["grad/a"].double(), tensors["grad/b"].double())
    ).sum()
    loss.backward()
    assert loss.item() == pytest.approx(tensors["grad/loss"].item(), rel=1e-4)
    assert_close(x.feats.grad, tensors["grad/in_feats"], T2, "in_feats")
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        if key.startswith("grad/param/"):
            assert_close(parameters[key.removeprefix("grad/param/")].grad, value, T2, key)
        if key.startswith("gradnorm/"):
            norm = parameters[key.removeprefix("gradnorm/")].grad.double().norm().item()
            assert norm == pytest.approx(value.item(), rel=2e-5), key


def small_encoder(**kwargs):
    """An encoder of two blocks."""
    return models.Encoder(16, 5, 32, 4, 2, num_heads=2, window_size=4, **kwargs)


def small_decoder(**kwargs):
    """A decoder to Gaussians of two blocks."""
    return models.GaussianDecoder(
        16, 32, 4, 2, num_heads=2, window_size=4, representation_config=REPRESENTATION, **kwargs
    )


def randomize(model):
    """Draw every parameter anew, so that none is zero; returns the model."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator).to(p) * 0.2
    return model


def batch(counts, device, channels=5, seed=0):
    """Samples of `counts` random voxels near each other, with random features."""
    generator = torch.Generator().manual_seed(seed)
    coords = []
    for sample, count in enumerate(counts):
        # few windows: the interpreter pays for each
        cells = torch.randperm(6**3, generator=generator)[:count]
        xyz = torch.stack([cells // 36, cells // 6 % 6, cells % 6], dim=1) + sample
        coords.append(torch.nn.functional.pad(xyz, (1, 0), value=sample))
    coords = torch.cat(coords).int()
    feats = torch.randn(len(coords), channels, generator=generator)
    return models.SparseTensor(feats.to(device), coords.to(device), batch_size=len(counts))


def small_mesh(use_color=True, **kwargs):
    """A decoder to meshes of one block."""
    return models.MeshDecoder(
        16,
        256,
        4,
        1,
        num_heads=4,
        window_size=4,
        mlp_ratio=0.5,
        representation_config={"use_color": use_color},
        **kwargs,
    )


def small_radiance(**representation):
    """A decoder to radiance fields of two blocks."""
    config = {"rank": 3, "dim": 4} | representation
    return models.RadianceDecoder(
        16, 32, 4, 2, num_heads=2, window_size=4, representation_config=config
    )


def cameras(views, device, size=24):
    """Views of the origin, one radian apart."""
    return Camera.orbit(
        list(map(float, range(views))), [0.1] * views, 2.0, math.radians(40), size, size
    ).to(device)
