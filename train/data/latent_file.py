"""Latents of one object as a file: the published npz of coords and feats, checked when it is read.

    coords    uint8 [V, 3] (any integers are read), no batch column
    feats     float32 [V, C] (any floats are read): posterior means

The archive's comment, which other readers ignore, names the encoder that made them, so that latents
are not given to the decoder of another encoder.
"""

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.files import whole
from train.data.archive import Archive
from train.data.readers import COPIES, VOXEL, finite, ordered

LARGEST = 256  # voxels a side that uint8 coordinates hold
COMMENT = rb"encoder sha256 ([0-9a-f]{64})"


def write_latent(file: Path, coords: Tensor, feats: Tensor, encoder: str) -> None:
    """Write latents [V, C] on voxels [V, 3] whole; `encoder` is the sha256 of its weights.

    Raises ValueError for a voxel that uint8 does not hold.
    """
    if (largest := int(coords.max())) >= LARGEST:
        raise ValueError(
            f"{file} is not written: voxel {largest} is over the {LARGEST - 1} of uint8"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file, sync=False) as partial:
        with partial.open("wb") as stream:
            np.savez_compressed(
                stream, coords=coords.byte().cpu().numpy(), feats=feats.float().cpu().numpy()
            )
        with zipfile.ZipFile(partial, "a") as archive:
            archive.comment = f"encoder sha256 {encoder}".encode()


def read_latent(
    file: Path, resolution: int, channels: int, encoder: str | None = None
) -> tuple[Tensor, Tensor]:
    """Read the latents of one object: coords [V, 3] int32 and feats [V, channels] float32.

    The voxels are in lexicographic order, whatever the file's. Raises ValueError that names the
    file where it is missing or damaged, for absent arrays, shapes or types that do not fit, another
    number of channels, no voxels, a voxel outside the grid or listed twice, feats that are not
    finite, and for one that says it was made by another encoder than that of sha256 `encoder`.
    """
    with Archive(file) as archive:
        archive.expect({"coords", "feats"})
        voxels, latents = archive.header("coords"), archive.header("feats")
        if len(voxels.shape) != 2 or voxels.shape[1] != 3 or voxels.dtype.kind not in "ui":
            hint = " (a batch column comes first: drop it)" if voxels.shape[1:] == (4,) else ""
            raise ValueError(f"{file}: coords are {voxels}, not integers [V, 3]{hint}")
        V = voxels.shape[0]
        if len(latents.shape) != 2 or latents.shape[0] != V or latents.dtype.kind != "f":
            raise ValueError(f"{file}: feats are {latents}, not floats [{V}, {channels}]")
        if latents.shape[1] != channels:
            raise ValueError(
                f"{file}: feats have {latents.shape[1]} channels, but the decoder takes {channels}"
            )
        if not V:
            raise ValueError(f"{file}: the object has no voxels")
        if V > resolution**3:
            raise ValueError(f"{file}: {V} voxels, but the {resolution}^3 grid has {resolution**3}")
        made_by = re.fullmatch(COMMENT, archive.comment)
        if made_by and encoder is not None and made_by[1].decode() != encoder:
            raise ValueError(
                f"{file} was made by an encoder of sha256 {made_by[1][:12].decode()}..., but the "
                f"decoder was trained on that of sha256 {encoder[:12]}..."
            )
        archive.check(V * VOXEL + COPIES * latents.size)
        coords, order = ordered(archive.read("coords"), resolution, file)
        feats = archive.read("feats")
    feats = finite(feats, np.float32, f"{file}: feats")
    return torch.from_numpy(coords), torch.from_numpy(feats[order])
