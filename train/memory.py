"""Print what a training step takes in memory, as a Markdown table of presets and decoders.

    python -m train.memory --memory-gb 24 --voxels 20000

Parameters, optimiser and gradients are those of the models. Activations are what a forward pass
keeps for its backward pass, and, where blocks are recomputed, what one of them keeps; they are
counted on this machine with a hollow sphere of 200 voxels and with half of it, and taken to
`--voxels` voxels an object. Beside them stands what was chosen to fit (train.run.memory). The
working space of single operations comes on top, within the tenth that stays free. Without LPIPS;
the time of a step is not measured.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from kernels import Camera
from models import VAE
from train.config import PRECISIONS, Config
from train.data.batch import Item
from train.data.readers import CHANNELS
from train.decoders import DECODERS, Recipe
from train.losses import Loss
from train.optimizer import GradClipper, LossScale, Optimizer
from train.run.machine import named_device
from train.run.memory import GB, Activations, Plan, choose, kept

RADIUS = 0.06  # of the sphere that is measured: 200 voxels at 64^3
PRESETS = ("small", "base")


def _sphere(config: Config, radius: float) -> Item:
    """A hollow sphere with random features, views of noise, and an octahedron as its true mesh."""
    generator = torch.Generator().manual_seed(0)
    axis = (torch.arange(config.resolution) + 0.5) / config.resolution - 0.5
    distance = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).norm(dim=0)
    shell = (distance - radius).abs() < 0.5 / config.resolution
    coords = shell.nonzero().int()
    features = torch.randn(len(coords), CHANNELS[config.features], generator=generator)
    size = config.image_size
    image = torch.rand(config.views, 4, size, size, generator=generator)
    camera = Camera.orbit([0.3 * v for v in range(config.views)], [0.3] * config.views, width=size)
    vertices = radius * torch.cat([torch.eye(3), -torch.eye(3)])
    faces = [[0, 1, 2], [1, 3, 2], [3, 4, 2], [4, 0, 2], [1, 0, 5], [3, 1, 5], [4, 3, 5], [0, 4, 5]]
    mesh = (vertices, torch.tensor(faces, dtype=torch.int32))
    return Item("sphere", coords, features, camera, image, mesh)


def _kept(vae: VAE, loss: Loss, item: Item, device: torch.device, recompute: bool) -> Activations:
    """Count an object and half of its voxels; the rest, as 16-bit weights, counts as of views."""
    vae.encoder.use_checkpoint = vae.decoder.use_checkpoint = recompute
    whole = len(item.coords)
    half = whole // 2
    views = len(item.image)
    part = replace(item, coords=item.coords[:half], features=item.features[:half])
    most = kept(vae, loss, item, device).total([whole], views)
    fewer = kept(vae, loss, part, device).total([half], views)
    voxel = (most - fewer) / (whole - half)
    return Activations(voxel, max(most - voxel * whole, 0) / views)


def plan(recipe: Recipe, config: Config, voxels: int, limit: float, device: torch.device) -> Plan:
    """Choose how a preset fits `limit` bytes; ValueError where it does not."""
    torch.manual_seed(0)
    vae = recipe.build(config, CHANNELS[config.features])
    vae.set_activation_dtype(PRECISIONS[config.precision])
    vae.to(device).train()
    loss = recipe.loss(None)
    item = _sphere(config, RADIUS)
    parameters = list(vae.named_parameters())
    optimizer = Optimizer(
        parameters, GradClipper(), LossScale(0, 0, 0), muon=config.optimizer == "muon"
    )

    def measured(recompute: bool) -> Activations:
        whole = _kept(vae, loss, item, device, False)
        if not recompute:
            return whole
        less = _kept(vae, loss, item, device, True)
        block = (whole.voxel - less.voxel) / (2 * config.model.blocks)
        return replace(less, voxel=less.voxel + block)

    size = sum(p.nbytes for _, p in parameters)
    start = Plan(
        parameters=size,
        gradients=size,
        optimizer=optimizer.bytes(),
        need=Activations(0.0, 0.0),
        voxels=[voxels] * config.micro_batch,
        views=config.views,
        limit=limit,
        recompute=config.model.recompute,
        parts=1,
        measured=device.type == "cuda",
    )
    return choose(start, measured)


def row(name: str, config: Config, found: Plan | ValueError) -> str:
    """A line of the table."""
    cells = [config.preset, name]
    if isinstance(found, ValueError):
        return "| " + " | ".join([*cells, str(found), "", "", ""]) + " |"
    parts = f"{found.parts} parts" if found.parts > 1 else "whole"
    cells += [
        f"{found.parameters / 4e6:.0f} M",
        f"{found.total / GB:.1f} GB ({found.weights / GB:.1f} + {found.activations / GB:.1f})",
        f"{'recomputed' if found.recompute else 'kept'}; {config.micro_batch} objects, {parts}",
        "not yet measured on a GPU",
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m train.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory-gb", type=float, default=24.0, help="of the card [24]")
    parser.add_argument("--voxels", type=int, default=20_000, help="of each object [20000]")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="[all]")
    parser.add_argument("--decoder", choices=list(DECODERS), action="append", help="[all]")
    args = parser.parse_args(argv)
    if not 0 < args.memory_gb < math.inf or args.voxels < 1:
        parser.error(f"--memory-gb {args.memory_gb} and --voxels {args.voxels} must exceed 0")
    device = named_device(None)
    step = f"step (weights, optimiser + activations), {args.voxels:,} voxels an object"
    print(f"| preset | decoder | parameters | {step} | blocks; micro-batch | time of a step |")
    print("|---|---|---|---|---|---|")
    for preset in args.preset or PRESETS:
        for name in args.decoder or DECODERS:
            recipe = DECODERS[name]
            config = recipe.presets[preset]
            try:
                found = plan(recipe, config, args.voxels, args.memory_gb * GB, device)
            except ValueError as error:
                found = error
            print(row(name, config, found), flush=True)


if __name__ == "__main__":
    main()
