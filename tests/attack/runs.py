"""Print what becomes of runs whose files are damaged: they go on as they were, or say why not.

python -m tests.attack.runs [--cases N] [KIND ...]

A run that goes on with other numbers than those that were saved has failed, whatever it says. Of
log.jsonl that is not asked: nothing is computed from it.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from models import Encoder, read_tensors
from tests.attack import checkpoints, damage, lies
from tests.attack.child import REFUSAL, RESULT, Case, Outcome, run, shown
from tests.helpers.datasets import AA, BB, CC, DD, RES, make
from tests.helpers.runs import TINY, train
from train import trainer
from train.config import CHANGEABLE, leaves, read_config
from train.data.latent_file import read_latent, write_latent
from train.data.objects import Objects
from train.gaussian import PRESETS, build
from train.run.latents import Latents
from train.run.machine import Machine
from train.run.report import Log

SILENT = "goes on with other numbers"
NEWEST = "checkpoints/step_00000003.safetensors"
PATHS = ("out", "resume", "data", "init")
HERE = Machine(torch.device("cpu"), 0, 1)
Change = Callable[[bytes, np.random.Generator], bytes]


@dataclass(frozen=True)
class Damaged:
    """A folder of sound files, the one that is damaged, and what must come of reading them."""

    files: Mapping[str, bytes]  # by path
    victim: str
    families: Mapping[str, Change]
    read: Callable[[Path], str]  # of the folder
    expected: str
    contained: bool = False
    limited: bool = False

    def prepare(self, case: Case, folder: Path) -> None:
        """Write the files of a case."""
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        if case.family != "sound":
            rng = np.random.default_rng([case.seed, *case.family.encode()])
            victim = folder / self.victim
            victim.write_bytes(self.families[case.family](victim.read_bytes(), rng))

    def judge(self, folder: Path) -> None:
        """Read the files; AssertionError where what was read is not what had been saved."""
        if self.read(folder) != self.expected:
            raise AssertionError(SILENT)


class Judged:
    """A Damaged whose `read` is its `judge`, as tests.attack.child wants it."""

    def __init__(self, kind: Damaged):
        self.contained, self.limited = kind.contained, kind.limited
        self.prepare, self.read = kind.prepare, kind.judge


def outcomes_of(kind: Damaged, count: int, folder: Path) -> list[Outcome]:
    """Run the sound files, then so many cases of every family."""
    families = [name for name in kind.families for _ in range(count)]
    cases = [Case(name, seed % count) for seed, name in enumerate(families)]
    return run([Case("sound", 0), *cases], Judged(kind), folder)


# readers: each gives a digest of all that it read


def _digest(tensors: Mapping[str, torch.Tensor], *values) -> str:
    found = hashlib.sha256(json.dumps(values).encode())
    for name, t in sorted(tensors.items()):
        kind = f"{name} {t.dtype} {list(t.shape)}"
        found.update(kind.encode() + t.detach().contiguous().reshape(-1).numpy().tobytes())
    return found.hexdigest()


@cache
def _objects(config, here, meshes) -> Objects:
    return Objects(config, here, meshes)


def _opened(config, here, meshes) -> Objects:
    """The objects of a run, which no case damages: read once for every config."""
    found = _objects(replace(config, resume=None, steps=1), here, meshes)
    found.sampler.step = 0
    return found


def _resume(folder: Path) -> trainer.Run:
    config = read_config(folder / "config.json", "gaussian", PRESETS)
    with mock.patch.object(trainer, "Objects", _opened):
        return trainer.Run("gaussian", replace(config, resume=str(folder)), build, HERE)


def _state(folder: Path) -> str:
    """All that a resumed run goes on from."""
    made = _resume(folder)
    optimizer = made.optimizer
    keep = (*CHANGEABLE, *PATHS)
    fixed = [(leaf.name, _plain(leaf.value)) for leaf in leaves(made.config)]
    fixed = [(name, value) for name, value in fixed if name not in keep]
    state = optimizer.state(), made.clipper.state_dict(), made.objects.sampler.state_dict()
    return _digest(read_tensors(made.vae) | optimizer.tensors(), fixed, state)


def _plain(value: object) -> object:
    """A value of a config, numbers as floats: 0 and 0.0 are the same."""
    return float(value) if type(value) is int else value


def _logged(folder: Path) -> str:
    """The state of a run, once its log is read and goes on too."""
    with Log(folder / "log.jsonl", 3) as log:
        steps = [row["step"] for row in log.rows]
    assert steps == sorted(set(steps)) and max(steps, default=0) <= 3
    return _state(folder)


def _latents(encoder: Encoder, batch: SimpleNamespace, folder: Path) -> str:
    return _digest({"feats": Latents(encoder, folder / "latents" / "0a1b")(batch).feats})


def _latent_file(folder: Path) -> str:
    coords, feats = read_latent(folder / "latent.npz", RES, 4, "ab" * 32)
    return _digest({"coords": coords, "feats": feats})


# sound files


def _contents(folder: Path) -> dict[str, bytes]:
    found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def _trained(out: Path, data: Path, *flags: str) -> dict[str, bytes]:
    """The files of a run of three steps, a checkpoint of each."""
    own = f"--resolution {RES} --features rgb --model.window 4 --steps 3 --save-every 1".split()
    with ExitStack() as stack:
        for name in ("conclude", "save_samples", "report.curves"):
            stack.enter_context(mock.patch(f"train.loop.{name}"))
        train(*TINY, *own, "--data", data, "--out", out, *flags)
    return _contents(out)


def _swapped(others: list[bytes], data: bytes, rng: np.random.Generator) -> bytes:
    return others[rng.integers(len(others))]


def _other_value(data: bytes, rng: np.random.Generator) -> bytes:
    """Put another valid value in the place of one of config.json that no flag may change."""
    document = json.loads(data)
    others = {"seed": 3, "lr": 0.004, "ema": 0.9, "max_norm": 2.0, "warmup": 9, "final_lr": 0.5}
    others |= {"optimizer": "adamw", "weight_decay": 0.1, "batch_size": 4, "precision": "bf16"}
    others |= {"views": 2, "holdout_views": 1, "micro_batch": 1, "image_size": 16}
    name = sorted(others)[rng.integers(len(others))]
    return json.dumps(document | {name: others[name]}).encode()


CHECKPOINT = {
    "header bit": checkpoints.header_bit,
    "data bit": checkpoints.data_bit,
    "state bit": checkpoints.state_bit,
    "state number": checkpoints.state_number,
    "cut": damage.cut,
    "removed": checkpoints.removed,
    "renamed": checkpoints.renamed,
    "retyped": checkpoints.retyped,
    "reshaped": checkpoints.reshaped,
    "values": checkpoints.values,
    "no checksums": checkpoints.earlier_damaged,
}
TENSORS = {name: CHECKPOINT[name] for name in ("header bit", "data bit", "cut")}
TENSORS |= {"counts": lies.tensor_counts, "types": lies.tensor_types}
TENSORS |= {name: CHECKPOINT[name] for name in ("removed", "renamed", "retyped", "reshaped")}
TENSORS |= {"values": checkpoints.values}
NPZ = {"flips": damage.flip, "cuts": damage.cut}
NPZ |= {"counts": lies.npz_counts, "types": lies.npz_types}
TEXT = {"flips": damage.flip, "cuts": damage.cut, "numbers": damage.number, "words": damage.word}
JSON = TEXT | {"numbers": damage.inflate, "types": damage.swap, "other value": _other_value}


def kinds_of_runs(folder: Path) -> dict[str, Damaged]:
    """Make every kind, by name; `folder` is for the files that they are made of."""
    data = make(folder / "data")
    sound = _trained(folder / "run", data)
    others = [_trained(folder / "lr", data, "--lr", "1e-3")]
    others += [_trained(folder / "others", make(folder / "data2", [AA, BB, DD]))]
    swaps = [files[NEWEST] for files in others] + [sound[NEWEST.replace("3", "2")]]
    families = CHECKPOINT | {"swapped": partial(_swapped, swaps)}
    expected = _state(folder / "run")
    made = {
        "checkpoint": Damaged(sound, NEWEST, families, _state, expected),
        "config.json": Damaged(sound, "config.json", JSON, _state, expected),
        "log.jsonl": Damaged(sound, "log.jsonl", TEXT, _logged, expected),
    }
    config = replace(_resume(folder / "run").config, resume=None)
    (batch,) = next(Objects(replace(config, batch_size=3, micro_batch=3), HERE).steps())
    torch.manual_seed(0)
    encoders = [Encoder(RES, batch.features.shape[1], 16, 4, 1, num_heads=1) for _ in range(2)]
    for encoder in encoders:
        torch.nn.init.normal_(encoder.out_layer.weight)
    _latents(encoders[0], batch, folder / "kept")
    Latents(encoders[1], folder / "kept2" / "latents" / "2c3d")(batch)
    kept = _contents(folder / "kept")
    victim = f"latents/0a1b/{AA}.safetensors"
    swaps = [kept[victim.replace(AA, CC)]]
    swaps += [(folder / "kept2" / victim.replace("0a1b", "2c3d")).read_bytes()]
    families = TENSORS | {"swapped": partial(_swapped, swaps)}
    read = partial(_latents, encoders[0], batch)
    made["latents"] = Damaged(kept, victim, families, read, read(folder / "kept"))
    generator = torch.Generator().manual_seed(0)
    coords = torch.cartesian_prod(*[torch.arange(3)] * 3).int()
    file = folder / "file" / "latent.npz"
    write_latent(file, coords, torch.randn(27, 4, generator=generator), "ab" * 32)
    files = _contents(file.parent)
    made["latent.npz"] = Damaged(files, file.name, NPZ, _latent_file, _latent_file(file.parent))
    return made


def main() -> int:
    """The command; returns its exit code, 1 where a case failed."""
    parser = argparse.ArgumentParser("python -m tests.attack.runs", description=__doc__)
    parser.add_argument("--cases", type=int, default=5, metavar="N", help="of each family")
    parser.add_argument("kinds", nargs="*", help="of files (default: all)")
    args = parser.parse_args()
    count = args.cases
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        made = kinds_of_runs(Path(folder) / "sound")
        print(f"{'file':12}{'family':14}{'tried':>6}{'as saved':>10}{'clear error':>13}", end="")
        print(f"{'silent':>8}{'unclear':>9}{'hang':>6}")
        for name in args.kinds or made:
            kind = made[name]
            found = outcomes_of(kind, count, Path(folder))
            for family in ("sound", *kind.families):
                own = [one for one in found if one.case.family == family]
                ends = Counter(_end(one) for one in own)
                cells = (len(own), *(ends[end] for end in (RESULT, REFUSAL, SILENT)))
                line = "".join(f"{n:>{w}}" for n, w in zip(cells, (6, 10, 13, 8), strict=True))
                print(
                    f"{name:12}{family:14}{line}{ends['unclear']:>9}{ends['hang']:>6}", flush=True
                )
            failed += [f"{name}: {shown(outcome)}" for outcome in found if outcome.failed]
    print("\n".join(["", *failed]))
    return int(bool(failed))


def _end(outcome: Outcome) -> str:
    if not outcome.failed:
        return outcome.end
    if outcome.text == SILENT:
        return SILENT
    return "hang" if outcome.end.startswith("over ") else "unclear"


if __name__ == "__main__":
    sys.exit(main())
