"""The host waits for the device where it says it does, once, and nowhere in a backward pass."""

from collections.abc import Callable

import pytest
import torch

import models
from kernels.camera import Camera
from kernels.conv.order import octant_order, tap_order
from kernels.voxels.cache import SpatialCache
from kernels.voxels.children import child_neighbours
from kernels.voxels.curves import CURVES, serialized_windows
from kernels.voxels.hash import build_table, lookup, neighbours
from kernels.voxels.pool import pooling
from kernels.voxels.window import full_windows, window_partition
from tests.helpers.decoders import small_vae
from tests.helpers.device_waits import watch_waits
from tests.helpers.hardware import GPU
from tests.helpers.meshes import scenes
from tests.helpers.models import batch
from tests.helpers.random_inputs import DRAWS
from tests.helpers.random_inputs.choices import Draw
from tests.helpers.voxels import voxels
from train.decoders import DECODERS

pytestmark = pytest.mark.usefixtures("few_programs")
# all others none
READS = {"surfaces": 2, "rasters": 1, "mesh_pictures": 1, "gaussians": 1, "radiance": 1}
SEEDS = range(4, 9)


def reads(forward: Callable, inputs: list[torch.Tensor]) -> list[str]:
    """What waits in `forward`, which returns one tensor or several. In its backward pass nothing
    does.
    """
    with watch_waits() as seen:
        out = forward()
        outputs = [
            t
            for t in ([out] if isinstance(out, torch.Tensor) else out)
            if t is not None and t.requires_grad
        ]
        found = list(seen)
        torch.autograd.grad(
            outputs, inputs, [torch.ones_like(t) for t in outputs], allow_unused=True
        )
    assert seen == found
    return found


@pytest.mark.parametrize("name", [name for name in DRAWS if name != "coordinates"])
def test_ops(watched_device, name):
    counts = []
    for seed in SEEDS:
        print(f"{name}, seed {seed}")
        draw = Draw(seed, watched_device)
        draw.fast = GPU
        case = DRAWS[name](draw)
        counts.append(len(reads(lambda case=case: case.op(*case.tensors), case.tensors)))
    assert max(counts) == READS.get(name, 0)


def test_coordinates(watched_device):
    coords = voxels([40, 0, 20]).to(watched_device)
    asked = voxels([9]).to(watched_device)
    with watch_waits() as seen:
        cache = SpatialCache(coords, 3)
    assert len(seen) == 1
    with watch_waits() as seen:
        lookup(cache.get(build_table), asked)
        child_neighbours(cache.get(neighbours, 3))
        cache.subdivide().get(neighbours, 3)
        cache.get(tap_order, 3), cache.get(octant_order)
        window_partition(cache, 3, 4, 2), full_windows(cache)
        for mode in CURVES:
            assert serialized_windows(cache, 3, 16, mode, 4).uses is not None
    assert not seen
    with watch_waits() as seen:
        cache.pool(2), cache.pool(2), cache.get(pooling, 2)
    assert len(seen) == 1  # a coordinate set too


def cameras(device) -> tuple[Camera, list[int], torch.Tensor]:
    camera = Camera.orbit([0.0, 1.0, 2.0], [0.1, 0.2, 0.3], 2.0, 0.7, 16, 16).to(device)
    return camera, [2, 0, 2], torch.rand(3, 3, device=device)


@pytest.mark.parametrize("name", DECODERS)
def test_whole_models(watched_device, name):
    """From features to losses of pictures: the renderer's read, and those of a mesh's sizes."""
    vae = small_vae(name, blocks=2).to(watched_device)
    encoder = vae.encoder
    decoder = vae.decoder
    x = batch([6, 0, 4], watched_device)
    view = cameras(watched_device)

    def losses():
        posterior = encoder(x)
        scenes = decoder(posterior.sample())
        image = models.render(scenes, *view)
        return [
            image.color.square().mean(),
            posterior.logvar.mean(),
            *models.penalties(scenes).values(),
        ]

    assert len(reads(losses, list(vae.parameters()))) == 1 + READS["surfaces"] * (name == "mesh")


def test_a_batch_of_meshes(watched_device):
    vertices, faces, colors, starts, face_starts = scenes(watched_device)
    view, view_scene, light = cameras(watched_device)
    edges = [0, *starts[1:].tolist()]
    cut = lambda t, e: [t[a:b] for a, b in zip(e, e[1:], strict=False)]
    parts = cut(vertices, edges), cut(faces, face_starts), cut(colors, edges)
    none = vertices.new_zeros(0)
    made = [
        models.mesh.MeshScene(v, f, *c.split(3, 1), none.view(0, 3), none, none.sum(), 16)
        for v, f, c in zip(*parts, strict=True)
    ]

    def pictures():
        image = models.render(made, view, view_scene, light)
        return image.color, image.alpha, image.depth, image.normal

    assert len(reads(pictures, [vertices, colors])) == 1


def test_the_watch_sees(watched_device):
    """What it must not miss: values, masks, comparisons and copies, inside an op as well."""
    x = torch.arange(5, device=watched_device)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x[0]),
        lambda: x.tolist(),
        lambda: x[x > 2],
        lambda: x.nonzero(),
        lambda: x.cpu(),
        lambda: torch.equal(x, x + 1),
        lambda: x.masked_select(x > 1),
        lambda: torch.tensor([1], device=x.device),
        lambda: torch.tensor([1]).to(x.device),
        lambda: x.repeat_interleave(x),
        lambda: x.clone().index_put_((x > 1,), x[0]),
    ):
        with watch_waits() as seen:
            wait()
        assert len(seen) == 1
    with watch_waits() as seen:
        torch.tensor([1, 2]).cumsum(0).tolist(), x[x], torch.where(x > 1, x, 0)
        torch.tensor([3]).pin_memory().to(x.device, non_blocking=True)
    assert not seen
