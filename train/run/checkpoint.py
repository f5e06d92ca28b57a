"""Checkpoints of a run: one safetensors file a step, complete or absent, the last few kept.

A file holds every tensor of the run's state (weights, averaged weights, optimizer moments, ...)
and, as JSON in its header, what is not a tensor (step, loss scale, ...). Nothing in it is executed
when it is read. One that is saved while steps are skipped is marked as doubtful: it may be why they
are.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.files import whole
from models.finite import NotFinite, check_finite, finite
from models.reading import check_floats, entry, parse_json, read_safetensors

KEEP = 3


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
    deleted. The data reach the disk under another name before the file takes its own, so a crash or
    a full disk leaves the previous checkpoints as they were. Raises OSError that names the file and
    the newest complete checkpoint, ValueError that names the first tensor which is not finite: then
    nothing is written or deleted.
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
            save_file(contiguous, partial, metadata)
    except OSError as error:
        survivor = max(files(folder), default="none")
        raise OSError(f"{error}; the newest complete checkpoint is {survivor}") from error
    spared = newest_sound(folder)
    for old in [*files(folder)[:-keep], *folder.glob("step_*.partial")]:
        if old != spared and not old.is_dir():
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

    Raises ValueError that names a file which cannot be read, or its first tensor that is not
    finite, the newest older checkpoint that is whole, and how to go on from there.
    """
    try:
        tensors, header = read_safetensors(file)
        if "state" not in header:
            raise ValueError(f"{file} is not a checkpoint of a run: its header has no state")
        state = parse_json(header["state"], f"{file} is not a checkpoint of a run: its state")
        numbers = {n: t for n, t in tensors.items() if t.is_floating_point() or t.is_complex()}
        check_floats(numbers, str(file))
        check_finite(numbers, str(file))
        return tensors, state
    except NotFinite as error:
        raise NotFinite(f"{error}{_older(file)}") from error
    except ValueError as error:
        raise ValueError(f"{error}{_older(file)}") from error


def part(state: Mapping, name: str) -> dict:
    """Look up what a part of the run said of itself in the state; ValueError where it is absent."""
    return entry(dict(state), name, dict, "its state")


def _older(file: Path) -> str:
    for other in reversed(files(file.parent)):
        try:
            with safe_open(other, framework="pt") as content:
                sound = other < file and "state" in (content.metadata() or {})
                sound = sound and all(finite(content.get_tensor(name)) for name in content.keys())
        # the last: of a kind of number that has no minimum
        except (SafetensorError, OSError, RuntimeError):
            continue
        if sound:
            return f"; {other.name} beside it is whole: delete the damaged file to go on from there"
    return ""


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the tensors under `prefix.`, without it in their names."""
    return {
        name.removeprefix(prefix + "."): t
        for name, t in tensors.items()
        if name.startswith(prefix + ".")
    }
