"""Runs that are killed again and again, at seeded random moments, end as one that nothing stopped.

SIGKILL comes to a run alone, as from the kernel, SIGTERM to its data workers too, as from a
scheduler. What is killed goes on by its own hint, or begins again where it had no folder yet.
"""

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.forks import Fork, torchrun
from tests.helpers.runs import TINY, own_data, same_run
from train.data.metadata import ply_mesh
from train.decoders import DECODERS

SECONDS = 240.0  # that a run may take, on a machine that has much else to do
LATEST = 0.15  # seconds from a row of the log, or from the start, to the signal
COMMON = TINY[: TINY.index("--model.channels")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags for a small dataset."""
    folder = tmp_path_factory.mktemp("data")
    flags = [*own_data(folder), "--image-size", 24]
    corners = np.array([[0, 0, 0.4], [0.4, 0, -0.3], [-0.3, 0.3, -0.3], [-0.3, -0.3, -0.3]])
    faces = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]], np.int32)
    for views in folder.rglob("transforms.json"):  # of meshes the decoder needs the true ones
        (views.parent / "mesh.ply").write_bytes(ply_mesh(corners.astype(np.float32), faces))
    return flags


def flags_of(decoder: str, data: list, steps: int, workers: int) -> list:
    """Flags of a run that saves every three steps."""
    run = ["--steps", steps, "--save-every", 3, "--micro-batch", 1, "--workers", workers]
    return [*COMMON, *DECODERS[decoder].smallest.split(), *data, *run]


def count(log: Path) -> int:
    """The rows of a log that is being written."""
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def shot(
    decoder: str, flags: list, out: Path, steps: int, shots: list[signal.Signals], seed: int
) -> int:
    """Run to the end through these signals; returns how many ended a run."""
    rng = random.Random(seed)
    hits = 0
    for number in [*shots, None]:
        begun = (out / "config.json").is_file()
        args = ["--resume", out] if begun else [*flags, "--out", out]
        run = Fork(decoder, args, out.with_suffix(".said"))
        try:
            if number is None:
                break
            due = rng.randrange(steps)  # rows of the log, of which there may be as many already
            end = time.monotonic() + SECONDS
            while count(out / "log.jsonl") < due and run.status is None:
                assert time.monotonic() < end
                time.sleep(0.01)
            time.sleep(rng.uniform(0, LATEST))
            run.send(number, group=number == signal.SIGTERM)
            status = run.wait(SECONDS)
            hits += status in (-number, 128 + number)
            assert status in (0, -number, 128 + number), out.with_suffix(".said").read_text()
        finally:
            if number is not None:
                run.end()
    try:
        assert run.wait(SECONDS) == 0, out.with_suffix(".said").read_text()
    finally:
        run.end()
    return hits


def test_a_run_that_is_killed_ends_with_the_same_bits(data, tmp_path):
    steps = 6
    flags = flags_of("gaussian", data, steps, 1)
    shots = [signal.SIGKILL, signal.SIGTERM]
    assert shot("gaussian", flags, tmp_path / "straight", steps, [], 0) == 0
    hits = shot("gaussian", flags, tmp_path / "killed", steps, shots, 2)
    assert hits
    same_run(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_survives(data, tmp_path, decoder, workers):
    steps = 30
    flags = flags_of(decoder, data, steps, workers)
    shots = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    shot(decoder, flags, tmp_path / "straight", steps, [], 0)
    hits = shot(decoder, flags, tmp_path / "killed", steps, shots, workers)
    assert hits > 1
    same_run(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_ranks_survive_the_death_of_one_after_the_other(data, tmp_path, decoder):
    """Rank 0, which saves, and rank 1, at any step; the second death is that of a later start."""
    flags = [*flags_of(decoder, data, 12, 1), "--out", "run"]
    rng = random.Random(decoder)
    for name, victim in (("straight", None), ("first", 0), ("second", 1)):
        (tmp_path / name).mkdir()
        fault = f"SIGKILL:{rng.randrange(1, 12)}" if name != "straight" else ""
        with torchrun(
            decoder, flags, tmp_path / name, restarts=1, fault=fault, victim=victim or 0
        ) as wait:
            statuses = wait(SECONDS)
        said = (tmp_path / name / "said").read_text()
        assert statuses[-1] == [0, 0] and len(statuses) == 1 + bool(fault), said
    for name in ("first", "second"):
        same_run(tmp_path / name / "run", tmp_path / "straight" / "run")
