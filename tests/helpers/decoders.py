"""A small untrained VAE of every decoder in the table."""

import torch

from models import VAE, SparseTensor
from train.decoders import DECODERS
from train.flags import from_cli

CHANNELS = 5  # of features
LATENT = 4
RESOLUTION = 16
# torch.compile breaks the graph of the mesh decoder: coordinates that it subdivides stand in a
# dictionary of weak references
ONE_GRAPH = [name for name in DECODERS if name != "mesh"]


def small_vae(name: str, blocks: int = 1) -> VAE:
    """The smallest VAE of a decoder, with weights that are nowhere zero.

    Of two blocks the second one has shifted windows.
    """
    recipe = DECODERS[name]
    flags = f"--device cpu --resolution {RESOLUTION} --model.latent {LATENT} --model.window 4"
    flags = [*flags.split(), *recipe.smallest.split(), "--model.blocks", str(blocks)]
    config = from_cli(name, recipe.presets, flags)
    vae = recipe.build(config, CHANNELS)
    generator = torch.Generator().manual_seed(1)
    for p in vae.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    vae.decoder.out_layer.weight.data *= 0.2
    return vae


def features(counts: list[int], seed: int = 0) -> SparseTensor:
    """`counts` voxels of each sample, near each other, with random features."""
    generator = torch.Generator().manual_seed(seed)
    coords = []
    for sample, count in enumerate(counts):
        cells = torch.randperm(6**3, generator=generator)[:count]
        columns = [torch.full_like(cells, sample), cells // 36, cells // 6 % 6, cells % 6]
        coords.append(torch.stack(columns, dim=1))
    rows = torch.cat(coords).int()
    values = torch.randn(len(rows), CHANNELS, generator=generator)
    return SparseTensor(values, rows, batch_size=len(counts))
