"""Waits for the device in a training step.

It waits for the voxels and the renderer of every micro-batch, the norm of the gradient and the row
of means.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from kernels.camera import Camera
from tests.helpers.device_waits import watch_waits
from tests.helpers.models import randomize, small_encoder
from train.data.batch import Batch, collate
from train.decoders import DECODERS
from train.flags import from_cli
from train.lpips import weight_shapes
from train.optimizer import GradClipper, LossScale, Optimizer
from train.run.latents import Latents
from train.run.machine import Machine
from train.trainer import Run

TINY = (
    "--device cpu --resolution 16 --image-size 16 --batch-size 2 --micro-batch 1 --views 1 "
    "--holdout-views 2 --eval-objects 1 --warmup 0 "
    "--model.blocks 1"
).split()
# of a micro-batch: its voxels, the renderer's; of a mesh the true one's picture, and numbers of
# corners, cubes, faces
READS = {"mesh": 1 + 2 + 1 + 1}
STEP = 2  # the norm that is clipped, the row of the log


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    """A file of random weights."""
    file = tmp_path_factory.mktemp("lpips") / "vgg.safetensors"
    save_file({key: 0.05 * torch.randn(shape) for key, shape in weight_shapes().items()}, file)
    return file


def small(batch: Batch) -> Batch:
    """Cut a batch of one object down: a few of its voxels and of the faces of its mesh."""
    meshes = batch.meshes and replace(
        batch.meshes, faces=batch.meshes.faces[:9], face_starts=[0, 9]
    )
    return replace(batch, features=batch.features[:3], coords=batch.coords[:3], meshes=meshes)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in DECODERS if name != "gaussian"]


@pytest.mark.parametrize("name", ["gaussian", *SLOW])
def test_a_step(watched_device, name, data, lpips, tmp_path):
    recipe = DECODERS[name]
    flags = ["--data", str(data), "--lpips", str(lpips), "--out", str(tmp_path / "run")]
    config = from_cli(name, recipe.presets, [*TINY, *recipe.smallest.split(), *flags], 1)
    run = Run(name, config, recipe.build, Machine(watched_device, 0, 1), recipe.loss)
    batches = [small(collate([run.objects.train[i]])).pin_memory() for i in range(2)]
    with watch_waits() as seen:
        row = run.step(batches)
    assert row["skipped"] == 0 and len(seen) == READS.get(name, 1 + 1) * len(batches) + STEP


def test_the_way_of_a_batch(watched_device, tmp_path):
    """A batch goes from pinned memory to latents of a frozen encoder.

    Their files are compared with an object's voxels once.
    """
    coords = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 0], [1, 0, 0, 5]], dtype=torch.int32)
    view = Camera.orbit([0.0, 1.0, 2.0], 0.3, width=8)
    host = Batch(torch.ones(3, 5), coords, 2, view, [0, 1, 1], torch.zeros(3, 4, 8, 8), ["a", "b"])
    latents = Latents(randomize(small_encoder()).to(watched_device), tmp_path)
    latents(host.to(watched_device))  # makes the files
    for compared in (2, 0):
        with watch_waits() as seen:
            batch = host.pin_memory().to(watched_device, non_blocking=True)
            assert not seen and len(batch.camera[[2, 0]]) == 2 and len(batch.camera[1]) == 1
            assert not seen and latents(batch).feats.shape == (3, 4)
        assert len(seen) == 1 + compared
    with watch_waits() as seen:
        host.to(watched_device)
    assert len(seen) == 5


@pytest.mark.parametrize("muon", [False, True])
def test_an_optimiser(watched_device, muon):
    """The first step makes what is kept."""
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)])}).to(
        watched_device
    )
    scale = LossScale()
    optimizer = Optimizer(model.named_parameters(), GradClipper(buffer=1), scale, muon=muon)
    for _ in range(2):
        with watch_waits() as seen:
            optimizer.backward(model["blocks"][0](torch.ones(2, 4, device=watched_device)).sum())
            optimizer.step(1e-3)
        assert len(seen) == 1
