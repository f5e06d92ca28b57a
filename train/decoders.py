"""The decoders that can be trained, by name: the one table of their presets, losses and sizes.

`models.DECODERS` has the same names and what they build. A new decoder is a line in each.
"""

from dataclasses import dataclass

from train import gaussian, mesh, radiance
from train.losses.geometry import SurfaceLoss
from train.losses.pictures import Loss, PictureLoss
from train.trainer import Build, Presets


@dataclass(frozen=True)
class Recipe:
    """The parts of a run of one decoder; its script is `python -m train.NAME`."""

    presets: Presets
    build: Build
    loss: type[Loss]
    smallest: str  # flags of the smallest model of its kind, for tests and rehearsals


_NARROW = "--model.blocks 1 --model.channels 16 --model.heads 1"
DECODERS = {
    "gaussian": Recipe(
        gaussian.PRESETS, gaussian.build, PictureLoss, f"{_NARROW} --model.per-voxel 2"
    ),
    "radiance": Recipe(radiance.PRESETS, radiance.build, PictureLoss, f"{_NARROW} --model.rank 2"),
    # its convolutions split channels into 32 groups after two divisions: 256 is the least
    "mesh": Recipe(
        mesh.PRESETS,
        mesh.build,
        SurfaceLoss,
        "--model.blocks 1 --model.channels 256 --model.heads 2 --model.mlp-ratio 0.25",
    ),
}
