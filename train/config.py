"""The config of a training run: frozen dataclasses, presets, and config.json.

The defaults below are the published recipe (microsoft/TRELLIS). train.flags makes the command line
of them.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import NamedTuple, get_args, get_origin, get_type_hints

import torch

from models.files import write_whole
from models.reading import entry, parse_json, read_bytes, shown

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon inside blocks, AdamW outside"}
STARTS = ("published", "principal")
MOST = 1 << 53  # of whole numbers: those that a float holds
# of numbers that make a process, a tensor or a list as long; a file of a run may say anything
LIMITS = {
    "batch_size": 1 << 20,
    "image_size": 8192,
    "resolution": 1024,
    "threads": 4096,
    "views": 1 << 16,
    "workers": 1024,
}
LARGEST = 1 << 16  # of any size of a model, its blocks apart:
BLOCKS = 1000
# of a run that is resumed
_EVERY = ("sample_every", "save_every")
_PLACE = ("device", "data", "workers", "memory_gb")
CHANGEABLE = ("steps", *_PLACE, *_EVERY, "eval_objects", "tensorboard")


def flag(default, help: str):
    """Declare a field of a config, with the text that --help shows for it."""
    return field(default=default, metadata={"help": help})


def _check_most(config, limits: Mapping[str, int], prefix: str = "") -> None:
    """Raise ValueError that names a field whose value is over its limit."""
    for name, limit in limits.items():
        if (value := getattr(config, name)) > limit:
            raise ValueError(f"{prefix}{name} {shown(value)} must be at most {limit}")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the encoder and of the decoder, which mirror each other."""

    channels: int = flag(768, "width of the transformer")
    blocks: int = flag(12, "transformer blocks, in the encoder and in the decoder")
    heads: int = flag(12, "attention heads; channels / heads is a multiple of 8 up to 128")
    mlp_ratio: float = flag(4.0, "width of the MLP inside a block, in channels")
    window: int = flag(
        8, "edge of an attention window in voxels; odd blocks are shifted by half of it"
    )
    latent: int = flag(8, "latent channels per voxel")
    logvar_init: float | None = flag(
        None, "log variance to start from (none: zero output layer, as published)"
    )
    start: str = flag(
        "published",
        "untrained encoder: published, or principal: latents are the features' principal "
        "components, which learns far faster",
    )
    input_gain: float = flag(
        1.0, "scale of the input layers' untrained weights; 1 as published, 3 learns faster"
    )
    branch_gain: float = flag(
        1.0, "scale of what an untrained block adds; 1 as published, 0 learns faster"
    )
    recompute: bool = flag(
        False, "keep no activations inside blocks: less memory, a third more time"
    )

    def __post_init__(self):
        for name in ("channels", "blocks", "heads", "window", "latent"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} {getattr(self, name)} must be at least 1")
        sizes = [f.name for f in fields(self) if isinstance(getattr(self, f.name), int)]
        _check_most(self, dict.fromkeys(sizes, LARGEST) | {"blocks": BLOCKS}, "model.")
        if not 1 <= self.channels * self.mlp_ratio < math.inf:
            raise ValueError(
                f"model.mlp_ratio {self.mlp_ratio} gives {self.channels} channels no finite "
                "width of at least 1"
            )
        _check_most(self, {"mlp_ratio": LARGEST}, "model.")
        if self.start not in STARTS:
            raise ValueError(f"model.start {shown(self.start)} is not one of {', '.join(STARTS)}")
        for name in ("input_gain", "branch_gain"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"model.{name} {getattr(self, name)} must be a number from 0 up")
        if self.logvar_init is not None and not math.isfinite(self.logvar_init):
            raise ValueError(f"model.logvar_init {self.logvar_init} must be finite")
        if self.channels % (8 * self.heads) or self.channels > 128 * self.heads:
            raise ValueError(
                f"model.channels {self.channels} must be model.heads {self.heads} times a "
                "multiple of 8 that is at most 128"
            )


@dataclass(frozen=True)
class Weights:
    """The weights of the loss terms; a decoder's own terms are fields of a subclass."""

    l1: float = flag(1.0, "weight of the mean absolute difference of the pictures")
    ssim: float = flag(0.2, "weight of 1 - SSIM")
    lpips: float = flag(0.2, "weight of LPIPS; needs --lpips")
    kl: float = flag(
        1e-6, "weight of the posterior's divergence from a unit Gaussian; off with --encoder"
    )

    def __post_init__(self):
        for name, weight in asdict(self).items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights.{name} {weight} must be a number from 0 up")


@dataclass(frozen=True)
class Config:
    """A training run. Raises ValueError that names a value which cannot be."""

    preset: str = "base"
    # data
    data: tuple[str, ...] = flag(
        (), "dataset folder; may be repeated (default: the embedded objects)"
    )
    features: str = flag("dinov2_vitl14_reg", "which features of the dataset the encoder reads")
    resolution: int = flag(64, "voxels along each side of the unit cube")
    image_size: int = flag(512, "edge of the views in pixels")
    views: int = flag(1, "views of each object in a step")
    holdout_views: int = flag(4, "the last views of every object, kept for evaluation")
    augment: str = flag(
        "none", "none; or change objects at random: colour, rotate or both (rgb features alone)"
    )
    # the run
    out: str | None = flag(None, "run folder (default: a new runs/NAME-001, -002, ...)")
    resume: str | None = flag(None, "run folder to continue, exactly where it stopped")
    seed: int = flag(
        0, "of the untrained weights, the order of objects, views, noise and backgrounds"
    )
    device: str | None = flag(None, "cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    memory_gb: float | None = flag(None, "GB that a step must fit (default: what a GPU has free)")
    deterministic: bool = flag(False, "only algorithms that give the same bits every time")
    workers: int = flag(4, "processes that load data; 0 loads in the training process")
    threads: int = flag(
        0,
        "threads that torch computes with on a CPU; 0: what OMP_NUM_THREADS says, else one, or "
        "one a CPU for a large model; "
        "recorded, because it changes how sums are rounded",
    )
    sample_every: int = flag(1000, "steps between sample pictures and curves")
    save_every: int = flag(1000, "steps between checkpoints")
    eval_objects: int = flag(64, "most objects of each kind in the evaluation at the end")
    tensorboard: bool = flag(
        False, "also write the log and the sample pictures to OUT/tensorboard, for TensorBoard"
    )
    # the optimiser
    steps: int = flag(
        750_000,
        "optimiser steps of the whole run; changed with --resume, a learning rate that decays "
        "jumps to the new cosine",
    )
    batch_size: int = flag(256, "objects in an optimiser step, over all ranks")
    micro_batch: int = flag(2, "objects in one forward pass on one rank")
    optimizer: str = flag(
        "adamw",
        "adamw; or muon, orthogonal steps for the matrices inside blocks and adamw for the rest",
    )
    precision: str = flag(
        "fp16", "of activations: fp32, bf16 or fp16; weights and optimiser are fp32"
    )
    lr: float = flag(1e-4, "learning rate")
    warmup: int = flag(0, "steps until the full learning rate")
    final_lr: float = flag(
        1.0, "fraction of lr that a cosine reaches at the last step; 1 is a constant lr"
    )
    weight_decay: float = flag(0.0, "decoupled weight decay")
    max_norm: float = flag(
        1.0,
        "clip gradients to this norm or the 95th percentile of the last 1000, whichever is less",
    )
    ema: float = flag(0.9999, "decay of the averaged weights")
    # what is trained
    encoder: str | None = flag(
        None,
        "trained encoder to freeze: prefix of NAME.json + NAME.safetensors, or a finished run; "
        "demo/gaussian ships",
    )
    init: tuple[str, ...] = flag(
        (),
        "weights to start from: prefix of NAME.json + NAME.safetensors, encoder or decoder, or a "
        "finished run; may be repeated",
    )
    freeze: str | None = flag(None, "part of --init that is not trained: encoder or decoder")
    lpips: str | None = flag(None, "file with the LPIPS (VGG16) weights")
    direct: int = flag(
        0,
        "first steps that render nothing, and learn from the features' sub-cells or the true mesh "
        "(rgb features alone)",
    )
    model: Sizes = Sizes()
    weights: Weights = Weights()

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "micro_batch",
            "resolution",
            "views",
            "holdout_views",
            "sample_every",
            "save_every",
            "eval_objects",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("seed", "workers", "threads", "warmup", "direct"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if self.image_size < 16:
            raise ValueError(f"image_size {self.image_size} must be at least 16 pixels")
        _check_most(self, LIMITS)
        whole = [name for name, value in vars(self).items() if isinstance(value, int)]
        _check_most(self, dict.fromkeys(whole, MOST))
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision {shown(self.precision)} is not one of {', '.join(PRECISIONS)}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer {shown(self.optimizer)} is not one of {', '.join(OPTIMIZERS)}"
            )
        limit = math.inf if self.memory_gb is None else self.memory_gb
        for name, fits, rule in (
            ("memory_gb", limit > 0, "exceed 0"),
            ("lr", 0 < self.lr < math.inf, "exceed 0 and be finite"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "be at least 0 and finite"),
            ("max_norm", self.max_norm > 0, "exceed 0"),
            ("final_lr", 0 <= self.final_lr <= 1, "lie in [0, 1]"),
            ("ema", 0 <= self.ema < 1, "lie in [0, 1)"),
        ):
            if not fits:
                raise ValueError(f"{name} {getattr(self, name)} must {rule}")
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}"
            )
        self._check_start()
        if self.direct and self.features != "rgb":
            raise ValueError(
                f"direct {self.direct} needs rgb features, which hold the colours of half voxels, "
                f"not {self.features}"
            )
        if self.resume and self.out:
            raise ValueError(
                f"resume {self.resume} continues in its own folder, not in {self.out!r}"
            )

    def _check_start(self) -> None:
        """Raise ValueError where a part is frozen that no trained weights are given for."""
        if self.freeze is None:
            return
        if self.freeze not in ("encoder", "decoder"):
            raise ValueError(f"freeze {shown(self.freeze)} is not encoder or decoder")
        if not self.init:
            raise ValueError(f"freeze {self.freeze} needs trained weights: give --init")
        if self.encoder:
            raise ValueError(f"encoder {self.encoder} is frozen already; leave --freeze out")

    def micro_batches(self, world: int) -> int:
        """Count the forward passes of each of `world` ranks in a step.

        ValueError where the batch does not divide.
        """
        if self.batch_size % (world * self.micro_batch):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of {world} ranks x micro_batch "
                f"{self.micro_batch}"
            )
        return self.batch_size // (world * self.micro_batch)

    def trunk(self) -> dict:
        """The constructor arguments that the encoder and the decoder share, as published."""
        size = self.model
        return dict(
            resolution=self.resolution,
            model_channels=size.channels,
            latent_channels=size.latent,
            num_blocks=size.blocks,
            num_heads=size.heads,
            mlp_ratio=size.mlp_ratio,
            attn_mode="swin",
            window_size=size.window,
            use_checkpoint=size.recompute,
        )

    def lr_at(self, step: int) -> float:
        """The learning rate of optimiser step `step`, counted from 0.

        Linear warm-up, times a cosine to final_lr.
        """
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(step / self.steps, 1.0))
        ramp = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * ramp * (self.final_lr + (1 - self.final_lr) * cosine)


class Leaf(NamedTuple):
    """One field of a config, nested groups flattened."""

    name: str  # dotted
    kind: type
    value: object
    help: str


def leaves(config, prefix: str = "") -> Iterator[Leaf]:
    """List every field of a config or of a nested group, names after `prefix`."""
    kinds = get_type_hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield Leaf(prefix + f.name, kinds[f.name], value, f.metadata.get("help", ""))


def replaced(config, values: Mapping[str, object]):
    """Copy a config with dotted names replaced.

    Each group is rebuilt once, so that its fields are checked together.
    """
    own = {name: value for name, value in values.items() if "." not in name}
    groups: dict[str, dict] = {}
    for name, value in values.items():
        if "." in name:
            group, leaf = name.split(".", 1)
            groups.setdefault(group, {})[leaf] = value
    for group, nested in groups.items():
        own[group] = replaced(getattr(config, group), nested)
    return replace(config, **own)


def write_config(config: Config, script: str, file: Path) -> None:
    """Record the config in its own run folder, whose path is not part of it."""
    values = {
        name: value for name, value in asdict(config).items() if name not in ("out", "resume")
    }
    write_whole(file, json.dumps({"script": script} | values, indent=2) + "\n")


def _check_kind(name: str, kind, recorded: dict) -> None:
    """Raise ValueError that names a field whose recorded value is not of its kind.

    An absent field has the preset's value.
    """
    group, _, leaf = name.rpartition(".")
    values = entry(recorded, group, dict, "it") if group else recorded
    if leaf not in values:
        return
    value = values[leaf]
    kinds = (list,) if get_origin(kind) is tuple else get_args(kind) or (kind,)
    fits = type(value) in kinds
    if float in kinds and type(value) is int:
        fits = abs(value) <= MOST
    if not fits or (kinds == (list,) and not all(isinstance(v, str) for v in value)):
        raise ValueError(f"{name} is {shown(value)}, not {' or '.join(k.__name__ for k in kinds)}")


def read_config(file: Path, script: str, presets: Mapping[str, Config]) -> Config:
    """Read the Config that `write_config` recorded.

    Raises ValueError that names the file where it is missing or does not fit.
    """
    data = read_bytes(file, f"is not there: {file.parent} is not a run folder")
    try:
        recorded = parse_json(data, "it")
        if recorded.pop("script") != script:
            raise ValueError("it is of another script")
        recorded.pop("cuda_graphs", None)  # of runs that were made when there was such a setting
        template = presets[recorded["preset"]]
        for leaf in leaves(template):
            _check_kind(leaf.name, leaf.kind, recorded)
        for name in ("data", "init"):
            recorded[name] = tuple(recorded.get(name, ()))
        nested = {
            name: type(getattr(template, name))(**recorded[name]) for name in ("model", "weights")
        }
        return replace(template, **recorded | nested)
    except (KeyError, TypeError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else shown(error)
        raise ValueError(f"{file} does not describe a run of train.{script}: {reason}") from error
