"""Train the mesh VAE.

python -m train.mesh                              # embedded objects, minutes on a CPU
python -m train.mesh --preset small --data DIR    # one GPU with 24 GB
# on a trained, frozen encoder
torchrun --nproc-per-node 8 -m train.mesh --preset base --data DIR --encoder RUN
python -m train.mesh --help                       # every flag; --resume RUN continues
"""

from dataclasses import dataclass

from models import Encoder, MeshDecoder, MeshVAE
from train import loop
from train.config import Config, Sizes, Weights, flag
from train.losses.geometry import SurfaceLoss
from train.presets import FAST, demo, small


@dataclass(frozen=True)
class MeshWeights(Weights):
    """The weights of the published terms.

    l1, ssim and lpips are of the colours. The published code adds 0.1 (l1 + 0.2 ssim + 0.2 lpips)
    to l1, so their weights are 1.1, 0.02 and 0.02. The terms are computed in train.losses.geometry;
    a new one needs a field here and its value there.
    """

    l1: float = flag(
        1.1, "weight of the mean absolute difference of the colours on black; 1 + 0.1 as published"
    )
    ssim: float = flag(0.02, "weight of 1 - SSIM of the colours")
    lpips: float = flag(0.02, "weight of LPIPS of the colours; needs --lpips")
    mask: float = flag(1.0, "weight of the coverage's difference")
    depth: float = flag(10.0, "weight of the depth's difference")
    normal_l1: float = flag(1.0, "weight of the mean absolute difference of the normals")
    normal_ssim: float = flag(0.2, "weight of 1 - SSIM of the normals")
    normal_lpips: float = flag(0.2, "weight of LPIPS of the normals; needs --lpips")
    tsdf: float = flag(0.01, "weight of the error of signed distances along the views' rays")
    regularization: float = flag(1.0, "weight of the surface's own regularizers")


@dataclass(frozen=True)
class MeshSizes(Sizes):
    """The sizes of the networks, and what gives silhouettes their gradient."""

    silhouettes: str = flag(
        "edges",
        "what gives silhouettes their gradient: edges of triangles, as published, or pixels "
        "beside the background",
    )


BASE = Config(model=MeshSizes(), weights=MeshWeights(), steps=290_000, micro_batch=1)
SMALL = small(
    BASE,
    # an untrained surface rests on distances of 1 / 256; without a warm-up two or three steps of
    # AdamW move all of them beyond 0 and it is gone for a while. base is as published: --warmup
    # 1000 is worth giving it too
    warmup=1000,
    model=MeshSizes(channels=512, blocks=6, heads=8, **FAST),
)
DEMO = demo(
    BASE,
    resolution=16,
    views=4,
    steps=240,
    batch_size=2,
    micro_batch=2,
    sample_every=80,
    save_every=120,
    model=MeshSizes(channels=256, blocks=2, heads=4, mlp_ratio=2.0, **FAST),
)
PRESETS = {config.preset: config for config in (DEMO, SMALL, BASE)}


def build(config: Config, in_channels: int) -> MeshVAE:
    """The VAE for features of `in_channels`, with the published construction."""
    trunk = config.trunk()
    encoder = Encoder(in_channels=in_channels, logvar_init=config.model.logvar_init, **trunk)
    representation = {"use_color": True, "silhouettes": config.model.silhouettes}
    return MeshVAE(encoder, MeshDecoder(representation_config=representation, **trunk))


if __name__ == "__main__":
    loop.main("mesh", PRESETS, build, loss=SurfaceLoss)
