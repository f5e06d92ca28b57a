"""Checkpoints survive crashes and full disks, and say what is wrong with a bad one."""

import json
import resource
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from models import files
from train.gaussian import PRESETS
from train.run import checkpoint


def tensors(scale: float = 1.0):
    kept = {"optimizer.a.step": torch.tensor(3.0), "rng": torch.arange(9, dtype=torch.uint8)}
    return {"model.a": torch.randn(30, 7) * scale} | kept


def test_round_trip_is_exact(tmp_path):
    written = tensors() | {"slice": torch.randn(8, 8)[:, ::2]}
    file = checkpoint.save(
        tmp_path / "checkpoints", 12, written, {"step": 12, "log2": 20.001, "names": ["a"]}
    )
    read, state = checkpoint.load(file)
    assert file.name == "step_00000012.safetensors" and state == {
        "step": 12,
        "log2": 20.001,
        "names": ["a"],
    }
    assert read.keys() == written.keys()
    assert all(
        torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in written.items()
    )
    assert checkpoint.group(read, "model").keys() == {"a"} and checkpoint.group(
        read, "optimizer"
    ).keys() == {"a.step"}


def test_only_the_last_few_are_kept_and_the_newest_is_found(tmp_path):
    (tmp_path / "step_00000007.partial").touch()  # of a run that was killed while it saved
    for step in (5, 20, 100, 9):
        checkpoint.save(tmp_path, step, tensors(), {"step": step}, keep=2)
    assert [f.name for f in sorted(tmp_path.iterdir())] == [
        "step_00000020.safetensors",
        "step_00000100.safetensors",
    ]
    assert checkpoint.newest(tmp_path).name == "step_00000100.safetensors"


@pytest.fixture
def full_disk():
    """Limit files to 64 kB, which a writer sees as a full disk: a failed write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, full_disk):
    first = checkpoint.save(tmp_path, 1, tensors(), {"step": 1})
    with pytest.raises(
        OSError,
        match=r"could not write .*step_00000002.*newest complete checkpoint is .*step_00000001",
    ):
        checkpoint.save(tmp_path, 2, {"model.a": torch.zeros(2**15)}, {"step": 2})
    assert list(tmp_path.iterdir()) == [first]
    assert checkpoint.load(checkpoint.newest(tmp_path))[1] == {"step": 1}


def test_failure_before_the_rename_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    first = checkpoint.save(tmp_path, 1, tensors(), {"step": 1})
    monkeypatch.setattr(
        files.os,
        "fsync",
        lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(tmp_path, 1, tensors(9.0), {"step": 1, "again": True})
    assert list(tmp_path.iterdir()) == [first] and checkpoint.load(first)[1] == {"step": 1}


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.newest(tmp_path)
    file = checkpoint.save(tmp_path, 3, tensors(), {"step": 3})
    whole = file.read_bytes()
    for size in (len(whole) - 1, 40, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"step_00000003.safetensors is truncated"):
            checkpoint.load(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="no state$"):
        checkpoint.load(file)


def test_a_checkpoint_of_an_earlier_version_is_read_and_it_is_said(tmp_path):
    file = checkpoint.save(tmp_path, 3, tensors(), {"step": 3})
    assert checkpoint.notice(file) == ""
    read, state = checkpoint.load(file)
    save_file({name: t.clone() for name, t in read.items()}, file, {"state": json.dumps(state)})
    again, _ = checkpoint.load(file)
    assert all(torch.equal(again[name], t) for name, t in tensors().items() if name != "model.a")
    assert "of an earlier version, without checksums: its numbers were" in checkpoint.notice(file)
    save_file(tensors(), file, {"state": json.dumps(state), "checksumr": "{}"})
    with pytest.raises(ValueError, match=r"its header holds \['checksumr'\], and no checksums$"):
        checkpoint.load(file)


def test_a_checkpoint_under_another_name_is_refused(tmp_path):
    first, second = (checkpoint.save(tmp_path, step, tensors(), {"step": step}) for step in (1, 2))
    first.rename(second)
    with pytest.raises(ValueError, match="step_00000002.* is the checkpoint of step 1, by what is"):
        checkpoint.load(second)


def test_a_run_knows_its_checkpoints():
    config = PRESETS["demo"]
    own = checkpoint.identity(config, None, "aa")
    state = json.loads(json.dumps({"run": own}))
    checkpoint.check_run(state, own)
    checkpoint.check_run({}, own)  # of an earlier version
    others = replace(config, steps=9, data=("moved",), workers=3, out="there")
    checkpoint.check_run(state, checkpoint.identity(others, None, "aa"))
    for changed, encoder, objects, message in (
        ({"lr": 1.0}, None, "aa", "saved with lr 0.006, and this run has 1.0"),
        (
            {"model": replace(config.model, heads=1)},
            None,
            "aa",
            "model.heads 2, and this run has 1",
        ),
        ({"lpips": "file"}, None, "aa", "with lpips False, and this run has True"),
        ({}, "cc", "aa", "with encoder None, and this run has 'cc'"),
        ({}, None, "bb", "with other objects, as many as"),
    ):
        with pytest.raises(ValueError, match=message):
            other = checkpoint.identity(replace(config, **changed), encoder, objects)
            checkpoint.check_run(state, other)


def test_a_run_is_not_continued_on_the_embedded_objects_for_want_of_others(tmp_path):
    config = replace(PRESETS["demo"], data=(str(tmp_path),))
    run = checkpoint.identity(config, None, "aa")
    checkpoint.save(tmp_path / "checkpoints", 3, tensors(), {"step": 3, "run": run})
    checkpoint.check_config(tmp_path, config)
    with pytest.raises(ValueError, match="config.json names no data, and the run was not"):
        checkpoint.check_config(tmp_path, replace(config, data=()))


def test_a_damaged_checkpoint_names_the_newest_older_one_that_is_whole(tmp_path):
    files = [checkpoint.save(tmp_path, step, tensors(), {"step": step}) for step in (1, 2, 3)]
    files[2].write_bytes(b"short")
    with pytest.raises(
        ValueError,
        match="step_00000003.* is truncated.*; step_00000002.safetensors before it is whole: "
        "move step_00000003.safetensors to another folder, and the same command goes on",
    ):
        checkpoint.load(files[2])
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(
        ValueError,
        match="step_00000001.safetensors before it is whole: move step_00000002.safetensors and "
        "step_00000003.safetensors to",
    ):
        checkpoint.load(files[2])
    files[2].unlink()
    files[0].unlink()
    with pytest.raises(ValueError, match="step_00000002.*[^:]$") as refused:
        checkpoint.load(files[1])
    assert "before" not in str(refused.value)
