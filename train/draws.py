"""The random numbers of a training step: posterior noise and backgrounds.

They depend only on the seed, the step and the object's place in the batch. So neither the number of
ranks nor an interruption changes them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import to_device
from models import SparseTensor
from train.config import Config
from train.run.machine import Machine, seed_of


def draw(
    config: Config,
    here: Machine,
    step: int,
    micro: int,  # number of the micro-batch in the step
    x: SparseTensor,  # N voxels of several objects
    views: Sequence[int],  # [V]: which object a view shows
) -> tuple[Tensor, Tensor]:  # [N, latent], [V, 3]
    """Draw posterior noise, and a black or white background for each view of a micro-batch."""
    first = (here.rank * config.micro_batches(here.world) + micro) * config.micro_batch
    noise = []
    backgrounds = []
    for sample, voxels in enumerate(x.cache.counts):
        generator = torch.Generator().manual_seed(seed_of(config.seed, step, first + sample))
        noise.append(torch.randn(voxels, config.model.latent, generator=generator))
        white = torch.randint(2, (views.count(sample), 1), generator=generator)
        backgrounds.append(white.float().expand(-1, 3))
    return to_device(torch.cat(noise), here.device), to_device(torch.cat(backgrounds), here.device)
