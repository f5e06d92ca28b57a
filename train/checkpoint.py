"""Checkpoints of a run: one safetensors file a step, complete or absent, the last few kept.

A file holds every tensor of the run's state (weights, averaged weights, optimizer moments, ...) and, as JSON in its
header, what is not a tensor (step, loss scale, ...). Nothing in it is executed when it is read.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEEP = 3


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping, keep: int = KEEP) -> Path:
    """Write FOLDER/step_NNNNNNNN.safetensors; delete all but the newest `keep` and what a killed run left; returns the file.

    The data reach the disk under another name before the file takes its own, so a crash or a full disk leaves the
    previous checkpoints as they were. Raises OSError that names the file and the newest complete checkpoint.
    """
    file = folder / f"step_{step:08d}.safetensors"
    partial = file.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, {"state": json.dumps(dict(state))})
        _to_disk(partial)
        partial.replace(file)
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        survivor = max(folder.glob("step_*.safetensors"), default="none")
        raise OSError(f"could not save {file}: {error}; the newest complete checkpoint is {survivor}") from error
    for old in [*sorted(folder.glob("step_*.safetensors"))[:-keep], *folder.glob("step_*.partial")]:
        old.unlink()
    return file


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest(folder: Path) -> Path:
    """The checkpoint with the most steps; ValueError where there is none."""
    files = sorted(folder.glob("step_*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no checkpoint")
    return files[-1]


def load(file: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors (on the CPU) and the state that `save` was given; ValueError that names a file it cannot read.

    It names the newest older checkpoint that can be read too, and how to go on from there.
    """
    try:
        with safe_open(file, framework="pt") as content:
            state = json.loads((content.metadata() or {})["state"])
            return {name: content.get_tensor(name) for name in content.keys()}, state
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}{_older(file)}") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a checkpoint of a run: its header has no state{_older(file)}") from error


def _older(file: Path) -> str:
    for other in sorted(file.parent.glob("step_*.safetensors"), reverse=True):
        try:
            with safe_open(other, framework="pt") as content:
                whole = "state" in (content.metadata() or {})
        except SafetensorError:
            continue
        if whole and other < file:
            return f"; {other.name} beside it is whole: delete the damaged file to go on from there"
    return ""


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix.`, without it."""
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}
