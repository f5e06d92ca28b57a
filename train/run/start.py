"""Start a run from trained weights: of the encoder, of the decoder or of both (--init)."""

from dataclasses import fields
from pathlib import Path

import models
from models import VAE, Encoder
from train.run.shipped import only

PARTS = ("encoder", "decoder")
SUFFIXES = (".json", ".safetensors")  # of the two files that a prefix stands for
# of a file's sizes, the flag that a run sets them with, and what a file leaves out
FLAGS = {
    "resolution": ("resolution", None),
    "model_channels": ("model.channels", None),
    "latent_channels": ("model.latent", None),
    "num_blocks": ("model.blocks", None),
    "num_heads": ("model.heads", None),
    "mlp_ratio": ("model.mlp-ratio", 4.0),
    "window_size": ("model.window", 8),
}


def started(vae: VAE, paths: tuple[str, ...]) -> VAE:
    """Replace parts of an untrained VAE by trained ones, of the same sizes.

    `paths` are checkpoint prefixes (PREFIX.json beside PREFIX.safetensors, published ones too), or
    folders of finished runs (demo/gaussian ships), of which every part is taken that the VAE has. A
    part keeps what its file says of its construction; only whether activations are recomputed is
    the run's own. Raises ValueError for another kind of model or other sizes, naming the flag that
    sets them, and for a part that is given twice.
    """
    parts = {name: part for name, part in vae.named_children() if name in PARTS}
    source: dict[str, str] = {}
    for prefix in [prefix for path in paths for prefix in _prefixes(only(path))]:
        loaded = models.load_pretrained(prefix)
        name = "encoder" if isinstance(loaded, Encoder) else "decoder"
        if name not in parts:
            continue  # of a run's folder, where the encoder is a frozen one (--encoder)
        if name in source:
            raise ValueError(f"--init gives the {name} twice: {source[name]} and {prefix}")
        _check(loaded, parts[name], f"{prefix}.json")
        loaded.use_checkpoint = parts[name].use_checkpoint
        loaded.args["use_checkpoint"] = loaded.use_checkpoint
        parts[name] = loaded
        source[name] = str(prefix)
    return type(vae)(parts.get("encoder"), parts["decoder"])


def _prefixes(path: Path) -> list[Path]:
    """List the checkpoint prefixes that a path of --init names; ValueError where there is none."""
    if not path.is_dir():
        return [path.with_suffix("") if path.suffix in SUFFIXES else path]
    found = [path / "checkpoints" / part for part in PARTS]
    found = [prefix for prefix in found if prefix.with_suffix(".json").is_file()]
    if not found:
        raise ValueError(f"--init {path} is a folder without checkpoints/encoder and decoder")
    return found


def _check(loaded, built, file: str) -> None:
    """Raise ValueError that names the first thing in which a loaded part differs from the run's."""
    if loaded.NAME != built.NAME:
        raise ValueError(f"--init: {file} is a {loaded.NAME}, where this run has a {built.NAME}")
    for name, (flag, default) in FLAGS.items():
        ours = built.args[name]
        theirs = loaded.args.get(name, default)
        if name == "num_heads" and theirs is None:
            theirs = loaded.args["model_channels"] // loaded.args.get("num_head_channels", 64)
        if theirs != ours:
            raise ValueError(
                f"--init: {file} has {name} {theirs}: give --{flag} {theirs}, not {ours}"
            )
    if isinstance(loaded, Encoder):
        theirs, ours = loaded.args["in_channels"], built.args["in_channels"]
        if theirs != ours:
            raise ValueError(
                f"--init: {file} takes features of {theirs} channels, the data's have {ours}"
            )
        return
    for field in fields(loaded.config):
        theirs, ours = getattr(loaded.config, field.name), getattr(built.config, field.name)
        if theirs != ours:
            raise ValueError(f"--init: {file} has {field.name} {theirs}, this run {ours}")
