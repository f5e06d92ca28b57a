"""Latents of a frozen encoder, made once for each object and kept on disk.

They are its posterior means in fp32.
"""

import hashlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import models
from kernels import to_device
from models import Encoder, SparseTensor
from models.checksum import read_checked, save_checked
from models.files import whole
from models.finite import check_finite
from models.reading import check_floats, entry, read_json, shown
from train.data.batch import Batch
from train.run.shipped import only


def load_encoder(path: str | Path, channels: int, resolution: int) -> tuple[Encoder, str]:
    """Load the frozen encoder, with the sha256 of its weights' file.

    `path` is a checkpoint prefix, the folder of a finished run, or `demo/gaussian`. Raises
    ValueError for another kind of model, for one of other feature channels or another resolution,
    and for a run without an encoder of its own.
    """
    path = only(path)
    prefix = path / "checkpoints" / "encoder" if path.is_dir() else path
    if path.is_dir() and not prefix.with_suffix(".json").is_file():
        raise ValueError(f"{path} holds no trained encoder: {_why_not(path / 'config.json')}")
    encoder = models.load_pretrained(prefix)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"{prefix}.json is a {type(encoder).__name__}, not an encoder")
    for what, own, given in (
        ("channels", encoder.args["in_channels"], channels),
        ("resolution", encoder.resolution, resolution),
    ):
        if own != given:
            raise ValueError(f"{prefix}.json takes features of {what} {own}, the data has {given}")
    digest = hashlib.sha256(Path(f"{prefix}.safetensors").read_bytes()).hexdigest()
    return encoder.eval().requires_grad_(False), digest


def _why_not(config: Path) -> str:
    if not config.is_file():
        return "it is not a run folder"
    content = read_json(config)
    if content.get("encoder") is not None:
        encoder = entry(content, "encoder", str, str(config))
        return f"it was trained on that of --encoder {encoder}"
    return "the run is not finished, --resume it"


class Latents:
    """A map from batches to latents [N, latent] on their voxels, kept as FOLDER/OBJECT.safetensors.

    An object that is not there yet is encoded alone, so its latents do not depend on the batch it
    first appears in. Raises ValueError that names a cached file which is damaged or belongs to
    other voxels, another object or another encoder, OSError that names one which cannot be written.
    """

    def __init__(self, encoder: Encoder, folder: Path):
        self.encoder = encoder
        self.folder = folder
        self._known = set()
        folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def __call__(self, batch: Batch, changed: bool = False) -> SparseTensor:
        """Return a batch's latents; of objects that augmentation `changed`, none is kept."""
        x = SparseTensor(batch.features, batch.coords, batch.batch_size)
        if changed:
            return x.replace(self.encoder(x).mean.float())
        parts = zip(batch.names, x.split(), x.coords.split(x.cache.counts), strict=True)
        return x.replace(torch.cat([self._latents(*part) for part in parts]))

    def _made(self, file: Path, features: Tensor, coords: Tensor) -> Tensor:
        """Encode an object, and keep its latents."""
        alone = F.pad(coords[:, 1:], (1, 0))
        mean = self.encoder(SparseTensor(features, alone, 1)).mean.float()
        kept = {"mean": mean.cpu().contiguous(), "coords": coords[:, 1:].cpu().contiguous()}
        own = str(os.getpid())  # ranks may meet the same object at once
        with whole(file, sync=False, tag=own) as partial:
            save_checked(kept, partial, self._texts(file.stem))
        return mean

    def _texts(self, name: str) -> dict[str, str]:
        """Name what latents belong to: an object, and the folder of their encoder."""
        return {"object": name, "encoder": self.folder.name}

    def _latents(self, name: str, features: Tensor, coords: Tensor) -> Tensor:
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            return self._made(file, features, coords)
        try:
            mean = self._kept(file, name, coords)
        except ValueError as error:
            raise ValueError(f"{error}: delete it and it will be made again") from error
        self._known.add(name)  # reading the object's voxels waits for the device: once
        return to_device(mean.to(features.dtype), features.device)

    def _kept(self, file: Path, name: str, coords: Tensor) -> Tensor:
        """Read the latents of an object that are on the disk; ValueError where they do not fit."""
        saved, header = read_checked(file)
        for what, own in self._texts(name).items():
            # files of earlier versions say nothing of it
            if header.get(what, own) != own:
                raise ValueError(f"{file} is of the {what} {shown(header[what])}, not {own}")
        if saved.keys() != {"mean", "coords"}:
            raise ValueError(f"{file} holds {shown(sorted(saved))}, not mean and coords")
        mean, stored = saved["mean"], saved["coords"]
        if stored.dtype != torch.int32 or stored.shape[1:] != (3,):
            raise ValueError(
                f"{file}: coords are {stored.dtype} {shown(list(stored.shape))}, not int32 [N, 3]"
            )
        fits = len(stored) == len(coords)
        if fits and name not in self._known:
            fits = torch.equal(stored, coords[:, 1:].cpu())
        if not fits:
            raise ValueError(
                f"{file} holds {len(stored)} voxels that are not the object's {len(coords)}"
            )
        check_floats({"mean": mean}, str(file))
        wanted = (len(coords), self.encoder.latent_channels)
        if mean.shape != wanted:
            raise ValueError(
                f"{file}: mean has shape {shown(list(mean.shape))}, not {list(wanted)}"
            )
        if name not in self._known:
            check_finite({"mean": mean}, str(file))
        return mean
