"""An evaluation as its flags ask for it: checked, opened, and ready to score objects."""

import argparse
from hashlib import file_digest, sha256
from pathlib import Path

import torch
from torch import nn

from train.data.dataset import Dataset, embedded
from train.evaluate.measure import Evaluator
from train.evaluate.protocols import VIEWS, Protocol, chosen
from train.evaluate.surfaces import need_scipy
from train.evaluate.truth import Truth
from train.lpips import LPIPS
from train.run.shipped import only
from train.run.trained import Trained, open_all

FEW = 16  # objects that the size of one Gaussian a voxel is chosen by
SPLITS = {"train": "train", "test": "test", "all": None}


class Job:
    """A checkpoint, a protocol, and the objects to score.

    `names` are the objects, `settings` everything that their scores depend on. Raises ValueError or
    OSError for what cannot be, before anything is written.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        for name in ("batch", "objects", "holdout_views"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
        # before a checkpoint is read: without a size of its own a protocol takes the checkpoint's
        chosen(args.protocol, args.size, args.samples, args.truth, 0)
        (self.trained,) = open_all([only(args.checkpoint)], device, args.encoder)
        self.protocol = chosen(
            args.protocol, args.size, args.samples, args.truth, self.trained.image_size
        )
        _check_kind(self.trained, self.protocol)
        if args.meshes is not None and not args.meshes.is_dir():
            raise ValueError(f"--meshes {args.meshes} is not a folder")
        if args.meshes is not None and not (self.protocol.colors and self.protocol.yaw):
            raise ValueError(f"--meshes {args.meshes}: {self.protocol.name} casts no colours")
        has_surface = self.trained.has_surface
        measured = has_surface and self.protocol.samples > 0
        if measured:
            need_scipy()
        lpips = LPIPS(args.lpips).to(device) if args.lpips else None
        own = self.trained.data or [embedded(self.trained.resolution)]
        self.data = [Path(one) for one in args.data or own]
        self.truth = Truth(self.protocol, self._dataset("holdout", args), args.meshes)
        self.names = self.truth.dataset.names[: args.objects]
        self.truth.check(self.names, measured or (has_surface and self.protocol.normals))
        self._check_channels()
        training = []
        if not args.no_floors and self.protocol.colors and self.trained.features == "rgb":
            seen = self._dataset("train", args)
            training = [seen.item(name, [0]) for name in seen.names[:FEW]]
        self.evaluator = Evaluator(
            self.trained, self.protocol, self.truth, training, lpips, device, not args.no_floors
        )
        self.settings = {
            "checkpoint": {
                "kind": self.trained.kind,
                "encoder": _digest(self.trained.encoder),
                "decoder": _digest(self.trained.decoder),
                "features": self.trained.features,
                "resolution": self.trained.resolution,
            },
            "protocol": self.protocol.content(),
            "data": [str(root.resolve()) for root in self.data],
            "meshes": str(args.meshes.resolve()) if args.meshes else None,
            "lpips": _file_digest(args.lpips) if args.lpips else None,
            "holdout_views": args.holdout_views or self.trained.holdout_views,
            "floors": not args.no_floors,
            "batch": args.batch,
        }

    def _dataset(self, views: str, args: argparse.Namespace) -> Dataset:
        """The objects with their held-out views, or with the views for training."""
        surfaces = self.trained.has_surface and bool(self.protocol.normals or self.protocol.samples)
        return Dataset(
            self.data,
            resolution=self.trained.resolution,
            features=self.trained.features,
            image_size=self.protocol.size,
            split=SPLITS[args.split],
            views=views,
            holdout_views=args.holdout_views or self.trained.holdout_views,
            meshes=surfaces and views == "holdout",
        )

    def _check_channels(self) -> None:
        """Raise ValueError for features of another width than the encoder's."""
        own = self.trained.encoder.args["in_channels"]
        if self.truth.dataset.channels != own:
            raise ValueError(
                f"{self.data[0]} has {self.truth.dataset.channels} channels of "
                f"{self.trained.features} features, but the encoder of {self.trained.path} takes "
                f"{own}"
            )

    def not_computed(self) -> list[str]:
        """Say which measures of the protocol have no numbers here, and why."""
        missing = []
        protocol = self.protocol
        if not self.trained.has_surface and (protocol.normals or protocol.samples):
            missing.append(
                f"normals and surface distances: not computed, a {self.trained.kind} decoder has "
                "no surface"
            )
        if self.evaluator.lpips is None and (protocol.similarity or protocol.normals):
            missing.append("LPIPS: not computed, no weights given (--lpips FILE)")
        if protocol.truth == VIEWS and self.evaluator.floors:
            missing.append("ceiling: none, the truth is the dataset's own views")
        return missing


def _check_kind(trained: Trained, protocol: Protocol) -> None:
    """Raise ValueError for a checkpoint that a protocol has nothing to score of."""
    if trained.encoder is None:
        raise ValueError(
            f"{trained.path} is a decoder alone: --encoder says which encoder makes its latents"
        )
    plain = trained.has_surface and not trained.decoder.config.use_color
    if plain and not protocol.normals:
        raise ValueError(f"{protocol.name} scores colours, and {trained.path} decodes none")
    if not trained.has_surface and not protocol.colors:
        raise ValueError(
            f"{protocol.name} scores surfaces, and {trained.path} is a {trained.kind} decoder, "
            "which has none"
        )


def _digest(model: nn.Module) -> str:
    """Hash the names and values of a model's tensors: sha256."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    with Path(file).open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
