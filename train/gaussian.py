"""Train the Gaussian VAE.

python -m train.gaussian                              # embedded objects, minutes on a CPU
python -m train.gaussian --preset small --data DIR    # one GPU with 24 GB
torchrun --nproc-per-node 8 -m train.gaussian --preset base --data DIR
python -m train.gaussian --help                       # every flag; --resume RUN continues
"""

from dataclasses import dataclass

from models import Encoder, GaussianDecoder, GaussianVAE
from train import loop
from train.config import Config, Sizes, Weights, flag
from train.presets import FAST, demo, small


@dataclass(frozen=True)
class GaussianSizes(Sizes):
    """The decoder's head; the fixed rest of the published representation is in `build`."""

    per_voxel: int = flag(32, "Gaussians in a voxel")
    opacity_bias: float = flag(0.1, "opacity of an untrained Gaussian")
    scaling_bias: float = flag(
        4e-3, "size of an untrained Gaussian, world units; 0.004 is 0.256 voxels at 64^3"
    )
    scaling_activation: str = flag("softplus", "what makes sizes positive: softplus or exp")


@dataclass(frozen=True)
class GaussianWeights(Weights):
    """Penalties of the Gaussians."""

    volume: float = flag(1e4, "weight of the Gaussians' mean volume in world units")
    opacity: float = flag(1e-3, "weight of their mean squared transparency")


BASE = Config(model=GaussianSizes(), weights=GaussianWeights())
SMALL = small(
    BASE,
    model=GaussianSizes(channels=384, blocks=6, heads=6, **FAST),
)
DEMO = demo(
    BASE,
    resolution=32,
    views=2,
    steps=400,
    batch_size=4,
    micro_batch=4,
    sample_every=100,
    save_every=200,
    # a quarter of a voxel, as published at 64^3, and relative steps in size: 1.3 dB after 400 steps
    model=GaussianSizes(
        channels=64,
        blocks=2,
        heads=2,
        per_voxel=8,
        **FAST,
        scaling_bias=8e-3,
        scaling_activation="exp",
    ),
    # a voxel's volume in units of the published one
    weights=GaussianWeights(volume=1e4 * (32 / 64) ** 3),
)
PRESETS = {config.preset: config for config in (DEMO, SMALL, BASE)}


def build(config: Config, in_channels: int) -> GaussianVAE:
    """The VAE for features of `in_channels`, with the published construction."""
    size = config.model
    trunk = config.trunk()
    representation = {
        "lr": {"_rotation": 0.1},
        "perturb_offset": True,
        "voxel_size": 1.5,
        "num_gaussians": size.per_voxel,
        "2d_filter_kernel_size": 0.1,
        "3d_filter_kernel_size": 9e-4,
        "scaling_bias": size.scaling_bias,
        "opacity_bias": size.opacity_bias,
        "scaling_activation": size.scaling_activation,
    }
    encoder = Encoder(in_channels=in_channels, logvar_init=size.logvar_init, **trunk)
    return GaussianVAE(encoder, GaussianDecoder(representation_config=representation, **trunk))


if __name__ == "__main__":
    loop.main("gaussian", PRESETS, build)
