"""Checkpoints of a run: one safetensors file a step, complete or absent, the last few kept.

A file holds every tensor of the run's state (weights, averaged weights, optimizer moments, ...)
and, as JSON in its header, what is not a tensor (step, loss scale, ...), with checksums of all
(models.checksum). Nothing in it is executed when it is read. One that is saved while steps are
skipped is marked as doubtful: it may be why they are.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.checksum import has_checksums, read_checked, save_checked
from models.files import whole
from models.finite import NotFinite, check_finite
from models.reading import check_floats, entry, parse_json, shown
from train.config import CHANGEABLE, Config, leaves

KEEP = 3
TEXTS = {"state", "doubtful", "format"}  # of a header without checksums; some tools add the last


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping,
    keep: int = KEEP,
    doubtful: bool = False,
) -> Path:
    """Write FOLDER/step_NNNNNNNN.safetensors and delete old checkpoints; returns the file.

    The newest `keep` stay, and what a killed run left is deleted too. The newest sound one is never
    deleted, nor is one that another program has open where the system does not allow it. The data
    reach the disk under another name before the file takes its own, so a crash or a full disk
    leaves the previous checkpoints as they were. Raises OSError that names the file and the newest
    complete checkpoint, ValueError that names the first tensor which is not finite: then nothing is
    written or deleted.
    """
    file = path(folder, step)
    check(folder, step, tensors)
    metadata = {"state": json.dumps(dict(state))}
    if doubtful:
        metadata["doubtful"] = "yes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(file) as partial:
            contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
            save_checked(contiguous, partial, metadata)
    except OSError as error:
        survivor = max(files(folder), default="none")
        raise OSError(f"{error}; the newest complete checkpoint is {survivor}") from error
    spared = newest_sound(folder)
    for old in [*files(folder)[:-keep], *folder.glob("step_*.partial")]:
        if old != spared and not old.is_dir():
            with suppress(PermissionError):  # the next save tries again
                old.unlink()
    return file


def check(folder: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise NotFinite that names the first tensor which may not be saved, as `save` does."""
    check_finite(tensors, f"{path(folder, step)} is not saved")


def path(folder: Path, step: int) -> Path:
    """Name the file of a step's checkpoint."""
    return folder / f"step_{step:08d}.safetensors"


def files(folder: Path) -> list[Path]:
    """List all checkpoints, the newest last."""
    return sorted(file for file in folder.glob("step_*.safetensors") if file.is_file())


def newest_sound(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole and not doubtful; None where there is none."""
    for file in reversed(files(folder)):
        try:
            with safe_open(file, framework="pt") as content:
                header = content.metadata() or {}
        except (SafetensorError, OSError):
            continue
        if "state" in header and "doubtful" not in header:
            return file
    return None


def newest(folder: Path) -> Path:
    """Find the checkpoint with the most steps; ValueError where there is none."""
    if not (found := files(folder)):
        raise ValueError(f"{folder} holds no checkpoint")
    return found[-1]


def load(file: Path) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors (to the CPU) and the state that `save` was given.

    Raises ValueError that names a file which cannot be read, its first tensor or text that is not
    what was saved (of a file without checksums: that is not finite), the newest older checkpoint
    that is whole, and how to go on from there.
    """
    try:
        return _read(file)
    except NotFinite as error:
        raise NotFinite(f"{error}{advice(file)}") from error
    except ValueError as error:
        raise ValueError(f"{error}{advice(file)}") from error


def _read(file: Path) -> tuple[dict[str, Tensor], dict]:
    tensors, header = read_checked(file)
    if not has_checksums(header) and (unknown := sorted(header.keys() - TEXTS)):
        raise ValueError(f"{file} is damaged: its header holds {shown(unknown)}, and no checksums")
    if "state" not in header:
        raise ValueError(f"{file} is not a checkpoint of a run: its header has no state")
    state = parse_json(header["state"], f"{file} is not a checkpoint of a run: its state")
    numbers = {n: t for n, t in tensors.items() if t.is_floating_point() or t.is_complex()}
    check_floats(numbers, str(file))
    check_finite(numbers, str(file))
    if file.name != path(file.parent, step := entry(state, "step", int, f"{file}: its state")).name:
        raise ValueError(f"{file} is the checkpoint of step {shown(step)}, by what is in it")
    return tensors, state


def advice(file: Path, own: Mapping | None = None) -> str:
    """Say how to go on where a checkpoint cannot be used; "" where no older one is whole.

    One counts only where it is of the run whose `identity` is `own`, if that is given.
    """
    newer = []
    for other in reversed(files(file.parent)):
        if other.name < file.name:
            try:
                _, state = _read(other)
                check_run(state, own or {})
                names = " and ".join(reversed(newer))
                return (
                    f"; {other.name} before it is whole: move {names} to another folder, and the "
                    "same command goes on from there"
                )
            except ValueError:
                pass
        newer.append(other.name)
    return ""


def notice(file: Path) -> str:
    """Say that a checkpoint was not checked, as it has no checksums; "" where it has."""
    with safe_open(file, framework="pt") as content:
        if has_checksums(content.metadata() or {}):
            return ""
    return f"{file} is of an earlier version, without checksums: its numbers were not checked"


def part(state: Mapping, name: str) -> dict:
    """Look up what a part of the run said of itself in the state; ValueError where it is absent."""
    return entry(dict(state), name, dict, "its state")


def identity(config: Config, encoder: str | None, objects: str) -> dict:
    """List the things that a checkpoint knows its run by: what --resume cannot change, and data.

    `encoder` and `objects` are the digests of the frozen encoder and of the objects' names: paths
    may change.
    """
    paths = {"out", "resume", "data", "init"}
    own = {leaf.name: leaf.value for leaf in leaves(config) if leaf.name not in paths}
    own |= {"encoder": encoder, "objects": objects, "lpips": bool(config.lpips)}
    own["embedded"] = not config.data
    return {name: value for name, value in own.items() if name == "steps" or name not in CHANGEABLE}


def check_run(state: Mapping, own: Mapping) -> None:
    """Raise ValueError that names the first thing in which a run is not the one that saved a state.

    `own` is its `identity`; the number of steps may be another, and the objects elsewhere. What an
    earlier version did not record is not compared.
    """
    saved = part(state, "run") if "run" in state else {}
    if saved:
        entry(saved, "steps", int, "its run")
    for name, value in own.items():
        if name in ("steps", "embedded") or saved.get(name, value) == value:
            continue
        if name == "objects":
            raise ValueError("it was saved with other objects, as many as this run's data hold")
        raise ValueError(
            f"it was saved with {name} {shown(saved[name])}, and this run has {shown(value)}"
        )


def check_config(folder: Path, config: Config) -> None:
    """Raise ValueError where a run's config is not that of its newest checkpoint, or data are gone.

    Of a checkpoint that cannot be read, nothing is said: `load` says it. `folder` is the run's.
    """
    for root in config.data:
        if not Path(root).is_dir():
            raise ValueError(
                f"{folder} was trained on {shown(root)}, which is no folder: --data says where the "
                "data are now"
            )
    if not (found := files(folder / "checkpoints")):
        return
    try:
        with safe_open(found[-1], framework="pt") as content:
            state = parse_json((content.metadata() or {}).get("state", ""), "its state")
        saved = part(state, "run")
    except (SafetensorError, OSError, ValueError):
        return
    if not config.data and saved.get("embedded") is False:
        raise ValueError(
            f"{folder / 'config.json'} names no data, and the run was not trained on the embedded "
            "objects: --data says where the data are now"
        )
    own = identity(config, saved.get("encoder"), saved.get("objects", ""))
    try:
        check_run(state, own)
    except ValueError as error:
        reason = f"{folder / 'config.json'} is not that of {found[-1]}: {error}"
        raise ValueError(f"{reason}{advice(found[-1], own)}") from error


def check_fp32(weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError that names the first tensor of another type than master weights have."""
    for name, t in weights.items():
        if t.dtype != torch.float32:
            held = str(t.dtype).removeprefix("torch.")
            raise ValueError(f"{name} holds {held}, and master weights are float32")


def check_steps(steps: Mapping[str, int]) -> None:
    """Raise ValueError where the parts of a state, by name, are of different steps."""
    if len(set(steps.values())) > 1:
        told = ", ".join(f"the {name} {shown(step)}" for name, step in steps.items())
        raise ValueError(f"its parts are of different steps: {told}")


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the tensors under `prefix.`, without it in their names."""
    return {
        name.removeprefix(prefix + "."): t
        for name, t in tensors.items()
        if name.startswith(prefix + ".")
    }
