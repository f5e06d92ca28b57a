"""Train the radiance-field VAE.

python -m train.radiance                              # embedded objects, minutes on a CPU
python -m train.radiance --preset small --data DIR    # one GPU with 24 GB
# on a trained, frozen encoder
torchrun --nproc-per-node 8 -m train.radiance --preset base --data DIR --encoder RUN
python -m train.radiance --help                       # every flag; --resume RUN continues
"""

from dataclasses import dataclass

from models import Encoder, RadianceDecoder, RadianceVAE
from train import loop
from train.config import Config, Sizes, flag
from train.presets import FAST, demo, small


@dataclass(frozen=True)
class RadianceSizes(Sizes):
    """The field inside a voxel."""

    rank: int = flag(16, "products of three vectors that a voxel's field is the sum of")
    dim: int = flag(8, "samples along each of those vectors")
    density_scale: float = flag(1.0, "multiplies the raw densities; 1 as published")
    trivec_std: float = flag(
        0.0,
        "spread of the untrained vectors around 1; at 0, as published, a voxel's ranks start equal",
    )


BASE = Config(model=RadianceSizes(), steps=500_000)
SMALL = small(
    BASE,
    model=RadianceSizes(
        channels=384, blocks=6, heads=6, density_scale=30.0, trivec_std=0.5, **FAST
    ),
)
DEMO = demo(
    BASE,
    resolution=32,
    views=1,
    steps=450,
    batch_size=4,
    micro_batch=4,
    sample_every=150,
    save_every=225,
    model=RadianceSizes(
        channels=64,
        blocks=2,
        heads=2,
        rank=4,
        dim=4,
        **FAST,
        density_scale=30.0,
        trivec_std=0.5,
    ),
)
PRESETS = {config.preset: config for config in (DEMO, SMALL, BASE)}


def build(config: Config, in_channels: int) -> RadianceVAE:
    """The VAE for features of `in_channels`, with the published construction."""
    size = config.model
    trunk = config.trunk()
    representation = {
        "rank": size.rank,
        "dim": size.dim,
        "density_scale": size.density_scale,
        "trivec_std": size.trivec_std,
    }
    encoder = Encoder(in_channels=in_channels, logvar_init=size.logvar_init, **trunk)
    return RadianceVAE(encoder, RadianceDecoder(representation_config=representation, **trunk))


if __name__ == "__main__":
    loop.main("radiance", PRESETS, build)
