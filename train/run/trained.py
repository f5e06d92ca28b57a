"""Open checkpoints for use: the folder of a finished run, or the prefix of a decoder's files.

A run says in config.json what its encoder reads and how its data looked; a prefix (PREFIX.json
beside PREFIX.safetensors, published names included) says neither, so its features follow from the
encoder's channels. Nothing is written into a run.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models import DECODERS, Encoder, Scene, SparseTensor
from models.finite import check_finite
from models.reading import KINDS, entry, read_json, shown
from models.vae import Decoder
from train.config import LIMITS, Config
from train.data.readers import CHANNELS
from train.run.shipped import named, only
from train.run.start import SUFFIXES

# the features that so many channels are, where nothing else names them
FEATURES = {channels: name for name, channels in CHANNELS.items()}
# what is wrong with a path where a checkpoint is wanted
NO_CHECKPOINT = (
    "is no checkpoint: the folder of a run, or PREFIX of a decoder's PREFIX.json and "
    "PREFIX.safetensors, comes first"
)
DIGEST = r"[0-9a-f]{64}"


@dataclass(frozen=True)
class Trained:
    """A decoder and the encoder that it was trained with, in evaluation mode on one device."""

    path: str  # as given
    label: str  # the name of the run's folder, or of the prefix
    kind: str  # of the decoder: a name in models.DECODERS
    encoder: Encoder | None  # None: nothing says which it is, so latents alone can be decoded
    digest: str | None  # sha256 of the encoder's weights: the same in checkpoints that share it
    decoder: Decoder
    features: str | None  # that the encoder reads; None without an encoder
    resolution: int  # voxels along a side
    image_size: int  # pixels a side of the views that it was trained on
    # folders that it was trained on, none for the embedded objects; None: nothing says
    data: tuple[str, ...] | None
    holdout_views: int  # the last of every object, which it was not trained on

    @property
    def has_surface(self) -> bool:
        """True where the scenes are meshes."""
        return self.kind == "mesh"

    @torch.no_grad()
    def encode(self, coords: Tensor, features: Tensor) -> Tensor:
        """Encode voxels [V, 3] with features [V, C] of one object: posterior means [V, latent].

        Raises ValueError where nothing says which encoder it is, for other channels, and for
        latents that are not finite.
        """
        self.need_encoder()
        mean = self.encoder(_one_object(coords, features)).mean.float()
        check_finite({"mean": mean}, f"the latents that {self.path} encodes")
        return mean

    def need_encoder(self) -> None:
        """Raise ValueError where nothing says which the encoder is."""
        if self.encoder is None:
            raise ValueError(f"{self.path} names no encoder: --encoder PREFIX says which it is")

    @torch.no_grad()
    def decode(self, coords: Tensor, latents: Tensor) -> Scene:
        """Decode latents [V, latent] on voxels [V, 3] of one object.

        Raises ValueError for a scene that is not finite.
        """
        scene = self.decoder(_one_object(coords, latents))[0]
        check_scene(scene, f"the scene that {self.path} decodes")
        return scene


def check_scene(scene: Scene, source: str) -> None:
    """Raise ValueError, which begins with `source`, where tensors of a scene are not finite."""
    tensors = {name: value for name, value in vars(scene).items() if isinstance(value, Tensor)}
    check_finite(tensors, source)


def _one_object(coords: Tensor, feats: Tensor) -> SparseTensor:
    """Put the batch column before coords [V, 3]."""
    return SparseTensor(feats, F.pad(coords, (1, 0)), 1)


def is_checkpoint(path: str | Path) -> bool:
    """Return whether a path is the folder of a run, or a checkpoint's prefix."""
    return all(_is_checkpoint(one) for one in named(path))


def _is_checkpoint(path: Path) -> bool:
    run = path / "config.json", path / "checkpoints"
    files = [Path(f"{_prefix(path)}{suffix}") for suffix in SUFFIXES]
    return any(file.exists() for file in run) or any(file.is_file() for file in files)


def open_trained(
    path: str | Path, device: torch.device, encoder: str | Path | None = None
) -> Trained:
    """Open a checkpoint: a run's folder, or a decoder's prefix (also with .json or .safetensors).

    `encoder`, a prefix or a run's folder, is the one of a decoder's prefix; for a run it says where
    its frozen encoder is now. A run that has trained its own keeps it. Raises ValueError that names
    the file which is missing, truncated or of another kind, and for an encoder that is not the
    decoder's.
    """
    path = Path(path)
    if path.is_dir():
        return _open_run(path, device, encoder)
    prefix = _prefix(path)
    decoder = _decoder(prefix)
    digest = own = features = None
    if encoder is not None:
        own, digest = _encoder(_encoder_prefix(only(encoder)))
        features = _features(own, encoder)
    data = Config()  # as published
    return Trained(
        path=str(path),
        label=prefix.name,
        kind=_fitting(decoder, own, str(path)),
        encoder=_ready(own, device),
        digest=digest,
        decoder=_ready(decoder, device),
        features=features,
        resolution=decoder.resolution,
        image_size=data.image_size,
        data=None,
        holdout_views=data.holdout_views,
    )


def open_all(
    paths: Sequence[str], device: torch.device, encoder: str | Path | None = None
) -> list[Trained]:
    """Open several checkpoints, with labels that differ; encoders that they share are one.

    Raises ValueError as `open_trained` does, for a checkpoint that is given twice, and for an
    `encoder` that none of them needs.
    """
    opened = []
    shared = {}
    for path in (one for given in paths for one in named(given)):
        one = open_trained(path, device, encoder)
        if any(Path(path).resolve() == Path(other.path).resolve() for other in opened):
            raise ValueError(f"{path} is given twice")
        if one.encoder is not None:
            one = replace(one, encoder=shared.setdefault(one.digest, one.encoder))
        opened.append(one)
    labels = Counter(one.label for one in opened)
    opened = [one if labels[one.label] == 1 else replace(one, label=one.path) for one in opened]
    if encoder is not None and all(_has_own(one) for one in opened):
        raise ValueError(
            f"--encoder {encoder} is for a decoder's prefix: these runs have their own"
        )
    return opened


def _has_own(trained: Trained) -> bool:
    return (Path(trained.path) / "checkpoints" / "encoder.json").is_file()


def _open_run(run: Path, device: torch.device, given: str | Path | None) -> Trained:
    file = run / "config.json"
    config = read_json(file, f"is not there: {run} is not the folder of a run")
    script = entry(config, "script", str, str(file))
    if script not in DECODERS:
        raise ValueError(f"{file}: script {shown(script)} is none of {', '.join(DECODERS)}")
    folder = run / "checkpoints"
    if not (folder / "decoder.json").is_file():
        again = f"python -m train.{script} --resume {run}"
        raise ValueError(f"{run} is not finished, it has no {folder / 'decoder.json'}: {again}")
    decoder = _decoder(folder / "decoder")
    prefix = folder / "encoder"
    if config.get("encoder") is not None:
        recorded = entry(config, "encoder", str, str(file))
        prefix = _frozen(run, recorded) if given is None else _encoder_prefix(only(given))
    encoder, digest = _encoder(prefix)
    _check_digest(run, prefix, digest)
    if (kind := _fitting(decoder, encoder, str(run))) != script:
        raise ValueError(f"{folder / 'decoder'}.json is a decoder of train.{kind}, not {script}")
    folders = entry(config, "data", list, str(file))
    if not all(isinstance(one, str) for one in folders):
        raise ValueError(f"{file}: data is {shown(folders)}, not {KINDS[list]} of {KINDS[str]}")
    return Trained(
        path=str(run),
        label=run.resolve().name,
        kind=kind,
        encoder=_ready(encoder, device),
        digest=digest,
        decoder=_ready(decoder, device),
        features=entry(config, "features", str, str(file)),
        resolution=decoder.resolution,
        image_size=_count(config, "image_size", LIMITS["image_size"], file),
        data=tuple(folders),
        holdout_views=_count(config, "holdout_views", LIMITS["views"], file),
    )


def _count(config: dict, name: str, most: int, file: Path) -> int:
    value = entry(config, name, int, str(file))
    if not 1 <= value <= most:
        raise ValueError(f"{file}: {name} {shown(value)} is not in 1 to {most}")
    return value


def _prefix(path: Path) -> Path:
    """The prefix of a checkpoint that is named by it, or by one of its two files."""
    return path.with_suffix("") if path.suffix in SUFFIXES else path


def _encoder_prefix(path: Path) -> Path:
    """The prefix of the encoder that a run has trained, or that a prefix names."""
    if not path.is_dir():
        return _prefix(path)
    prefix = path / "checkpoints" / "encoder"
    if not prefix.with_suffix(".json").is_file():
        raise ValueError(f"{path} holds no trained encoder: {prefix}.json is not there")
    return prefix


def _frozen(run: Path, recorded: str) -> Path:
    """Find the encoder that a run was trained on, also where runs were moved together.

    A path that leads nowhere from here is looked for beside the run: all of it, then without its
    first folder, and so on.
    """
    parts = Path(recorded).parts
    beside = (run.resolve().parent.joinpath(*parts[first:]) for first in range(len(parts)))
    for place in (only(recorded), *beside):
        if (place / "checkpoints" / "encoder.json").is_file() or _files_there(place):
            return _encoder_prefix(place)
    raise ValueError(
        f"{run} was trained on the encoder {recorded}, which is neither there nor beside the run: "
        "--encoder says where it is"
    )


def _files_there(path: Path) -> bool:
    return Path(f"{_prefix(path)}.json").is_file() and not path.is_dir()


def _check_digest(run: Path, prefix: Path, digest: str) -> None:
    """Raise ValueError for an encoder other than the one whose latents a run has trained on."""
    folder = run / "latents"
    names = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    trained_on = [name for name in names if re.fullmatch(DIGEST, name)]
    if trained_on and digest not in trained_on:
        raise ValueError(
            f"{prefix}.safetensors has the sha256 {digest[:12]}..., but {run} was trained on the "
            f"latents of an encoder of sha256 {trained_on[0][:12]}..."
        )


def _decoder(prefix: Path) -> Decoder:
    decoder = models.load_pretrained(prefix)
    if not isinstance(decoder, Decoder):
        raise ValueError(f"{prefix}.json is an encoder, not a decoder: it is for --encoder")
    return decoder


def _encoder(prefix: Path) -> tuple[Encoder, str]:
    """Load an encoder; returns it with the sha256 of its weights' file."""
    encoder = models.load_pretrained(prefix)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"{prefix}.json is a {type(encoder).__name__}, not an encoder")
    with Path(f"{prefix}.safetensors").open("rb") as stream:
        return encoder, hashlib.file_digest(stream, "sha256").hexdigest()


def _features(encoder: Encoder, path: str | Path) -> str:
    channels = encoder.args["in_channels"]
    if channels not in FEATURES:
        known = ", ".join(f"{count} {name}" for count, name in FEATURES.items())
        raise ValueError(
            f"{path} reads {channels} channels, and nothing says of which features (known without "
            f"a run: {known}): give the folder of the run instead of a decoder's prefix"
        )
    return FEATURES[channels]


def _fitting(decoder: Decoder, encoder: Encoder | None, path: str) -> str:
    """The kind of a decoder; ValueError for an encoder of other latents or another resolution."""
    kind = next(kind for kind, vae in DECODERS.items() if isinstance(decoder, vae.DECODER))
    if encoder is not None:
        for what, made, taken in (
            ("latent channels", encoder.latent_channels, decoder.latent_channels),
            ("voxels a side", encoder.resolution, decoder.resolution),
        ):
            if made != taken:
                raise ValueError(f"{path}: the encoder has {made} {what}, the decoder {taken}")
    return kind


def _ready(model, device: torch.device):
    return None if model is None else model.to(device).eval().requires_grad_(False)
