"""Wrong input to public functions: refused at once, by name, with what was given and expected."""

import numpy as np
import pytest
import torch

import models
from kernels.attention.op import segment_attention, window_attention
from kernels.camera import Camera
from kernels.gaussian.splat import splat
from kernels.mesh.render import render_mesh
from kernels.norm.group import group_norm
from kernels.norm.layer import add_layer_norm, layer_norm
from kernels.radiance.raymarch import raymarch
from kernels.voxels.cache import SpatialCache
from kernels.voxels.coords import check_coords
from kernels.voxels.curves import serialized_windows
from kernels.voxels.pool import pool
from kernels.voxels.window import window_partition
from tests.helpers.decoders import LATENT, small_vae
from tests.helpers.models import batch, small_decoder, small_encoder, small_mesh
from train.decoders import DECODERS

MODELS = {"encoder": (small_encoder, 5)}
MODELS |= {name: (lambda name=name: small_vae(name).decoder, LATENT) for name in DECODERS}
X = torch.rand(4, 8)
STARTS = torch.tensor([0, 4], dtype=torch.int32)
COORDS = torch.tensor([[0, i, 0, 0] for i in range(4)], dtype=torch.int32)


@pytest.mark.parametrize("make, channels", MODELS.values(), ids=MODELS)
def test_models_name_the_type_of_features_and_their_own(make, channels):
    model = make()
    x = batch([5], "cpu", channels)
    for dtype in (torch.float16, torch.float64, torch.int32):
        with pytest.raises(
            ValueError, match=f"features are {dtype}, the model takes torch.float32: convert"
        ):
            model(x.replace(x.feats.to(dtype)))
    with pytest.raises(
        ValueError, match=r"features are torch.float32, the model takes torch.float64"
    ):
        model.double()(x)
    model(x.replace(x.feats.double()))


@pytest.mark.parametrize("make, channels", MODELS.values(), ids=MODELS)
def test_models_name_the_coordinate_beyond_their_grid(make, channels):
    model = make()
    last = model.resolution - 1
    feats = torch.zeros(1, channels)
    model(models.SparseTensor(feats, torch.tensor([[0, last, 0, last]], dtype=torch.int32)))
    for coordinate in (last + 1, 500):
        wrong = models.SparseTensor(feats, torch.tensor([[0, 0, coordinate, 0]], dtype=torch.int32))
        with pytest.raises(
            ValueError,
            match=f"coordinate {coordinate}, the model's resolution is {last + 1}: .* 0 to {last}",
        ):
            model(wrong)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda e, g: models.GaussianVAE(g, e),
            "GaussianVAE takes Encoder .*GaussianDecoder, not GaussianDecoder and Encoder",
        ),
        (
            lambda e, g: models.GaussianVAE(g, g),
            "GaussianVAE takes .*, not GaussianDecoder and GaussianDecoder",
        ),
        (
            lambda e, g: models.RadianceVAE(e, g),
            "RadianceVAE takes .*RadianceDecoder, not Encoder and GaussianDecoder",
        ),
        (
            lambda e, g: models.MeshVAE(None, g),
            "MeshVAE takes .*MeshDecoder, not NoneType and GaussianDecoder",
        ),
        (lambda e, g: models.VAE(e, None), "VAE takes .* Decoder, not Encoder and NoneType"),
    ],
)
def test_swapped_models(make, message):
    with pytest.raises(TypeError, match=message):
        make(small_encoder(), small_decoder())
    models.VAE(None, small_decoder())


@pytest.mark.parametrize("name", ["resolution", "in_channels", "latent_channels"])
@pytest.mark.parametrize("value", [-1, 0, 4.0])
def test_sizes_of_an_encoder(name, value):
    sizes = dict(
        resolution=16,
        in_channels=5,
        model_channels=32,
        latent_channels=4,
        num_blocks=1,
        num_heads=2,
    )
    with pytest.raises(ValueError, match=f"{name} must be a whole number, at least 1, not {value}"):
        models.Encoder(**sizes | {name: value})


def test_noise_has_the_posterior_shape():
    posterior = small_encoder()(batch([9], "cpu"))
    with pytest.raises(ValueError, match=r"noise must be \[9, 4\], as the posterior, not \[1, 4\]"):
        posterior.sample(noise=torch.zeros(1, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda eps: layer_norm(X, eps),
        lambda eps: add_layer_norm(X, X, eps),
        lambda eps: group_norm(X, X[0], X[0], STARTS, 2, eps),
    ],
    ids=["layer_norm", "add_layer_norm", "group_norm"],
)
def test_eps(call):
    call(0.0)
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"eps must be finite and at least 0, not {eps}"):
            call(eps)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: SpatialCache(COORDS).pool(2.5),
            "pool factor must be a whole number, at least 1, not 2.5",
        ),
        (
            lambda: SpatialCache(COORDS, 2.5),
            "batch_size must be a whole number, at least 0, not 2.5",
        ),
        (
            lambda: serialized_windows(COORDS, 1, 2.5),
            "window must be a whole number, at least 1, not 2.5",
        ),
        (
            lambda: window_partition(COORDS, 1, [2, 2.5, 2]),
            "window must hold whole numbers, not 2.5",
        ),
    ],
)
def test_whole_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert SpatialCache(COORDS, np.int64(2)).counts == [4, 0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: check_coords(COORDS.tolist()), "coords must be a tensor, not list"),
        (lambda: models.SparseTensor(X.tolist(), COORDS), "feats must be a tensor, not list"),
        (lambda: layer_norm(X.tolist()), "x must be a tensor, not list"),
        (lambda: group_norm(X, X[0].tolist(), X[0], STARTS), "weight must be a tensor, not list"),
        (
            lambda: pool(None, SpatialCache(COORDS).get(models.sparse.pooling, 2)),
            "x must be a tensor, not NoneType",
        ),
        (
            lambda: window_attention(torch.rand(4, 3, 1, 8), None),
            "windows must be Windows, .*, not NoneType",
        ),
        (
            lambda: segment_attention(X[:, None], X[:, None], X[:, None], [0, 4], [0, 4]),
            "q_starts must be a tensor, not list",
        ),
        (
            lambda: window_partition(COORDS, 1, 2.5),
            "window must be a list of whole numbers or such a tensor, not 2.5",
        ),
        (
            lambda: Camera(torch.eye(4)[None].tolist(), torch.eye(3)[None], 8, 8),
            "extrinsics must be a tensor, not list",
        ),
    ],
)
def test_other_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def renderers():
    """Calls of each renderer that take a view_scene and a background."""
    camera = Camera.orbit(0.0, 0.0, width=8)
    light = torch.zeros(1, 3)
    gaussian = (
        torch.zeros(1, 3),
        torch.ones(1, 3),
        torch.eye(4)[:1],
        torch.ones(1, 1),
        torch.zeros(1, 1, 3),
    )
    voxel = (
        torch.full((1, 3), 0.5 + 1 / 32),
        torch.ones(1, 2, 3, 4),
        torch.ones(1, 2),
        torch.ones(1, 2, 1, 3),
    )
    mesh = torch.eye(3), torch.tensor([[0, 1, 2]]), torch.eye(3), [0, 3], [0, 1]
    return {
        "splat": lambda view_scene=(0,), background=light: splat(
            *gaussian, [0, 1], camera, view_scene, background
        ),
        "raymarch": lambda view_scene=(0,), background=light: raymarch(
            *voxel, [0, 1], camera, view_scene, background, 16
        ),
        "render_mesh": lambda view_scene=(0,): render_mesh(*mesh, camera, view_scene),
    }


@pytest.mark.parametrize("render", renderers().values(), ids=renderers())
def test_views_of_scenes_are_whole_numbers(render):
    for view_scene in ([0], (0,), torch.tensor([0]), np.array([0])):
        assert torch.equal(render(view_scene).alpha > 0, render().alpha > 0)
    for view_scene in ([0.7], torch.tensor([0.7])):
        with pytest.raises(ValueError, match="view_scene must hold whole numbers, not 0.[67]"):
            render(view_scene)
    for view_scene in (0, None, torch.tensor(0)):
        with pytest.raises(
            TypeError, match="view_scene must be a list of whole numbers or such a tensor, not"
        ):
            render(view_scene)


def test_backgrounds_are_tensors_and_scenes_a_list():
    found = renderers()
    for name in ("splat", "raymarch"):
        with pytest.raises(TypeError, match="background must be a tensor, not list"):
            found[name](background=[[0.0, 0.0, 0.0]])
    (scene,) = small_mesh()(batch([2], "cpu", 4))
    camera = Camera.orbit(0.0, 0.0, width=8)
    with pytest.raises(TypeError, match="background must be a tensor, not list"):
        scene.render(camera, [[0.0, 0.0, 0.0]])
    for call in (
        lambda: models.render(scene, camera, [0], torch.zeros(1, 3)),
        lambda: models.penalties(scene),
    ):
        with pytest.raises(TypeError, match="scenes must be a list of scenes, not MeshScene"):
            call()
