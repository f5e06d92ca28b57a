"""Files are whole or as they were, readable as the umask says; what a killed run left is swept."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from models.files import whole, write_whole
from tests.helpers.runs import fresh
from train.run.folder import sweep


@pytest.fixture
def group_reads():
    """A umask of 027: files are for the owner to write and for the group to read."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(file) -> int:
    return stat.S_IMODE(file.stat().st_mode)


@pytest.mark.parametrize("content", ["text", b"bytes"])
def test_a_file_is_whole_or_as_it_was(tmp_path, content):
    file = tmp_path / "a.json"
    write_whole(file, "before")
    for error in (OSError(28, "No space left"), KeyboardInterrupt(), ValueError("no")):
        with pytest.raises(type(error)), whole(file) as partial:
            partial.write_text("half")
            raise error
        assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError, match="could not write .*a.json: .*No space left"), whole(file):
        raise OSError(28, "No space left")
    write_whole(file, content)
    assert file.read_bytes() in (b"text", b"bytes") and list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError, match="could not write .*absent.*a.json"):
        write_whole(tmp_path / "absent" / "a.json", content)


def test_two_writers_with_tags_do_not_meet(tmp_path):
    file = tmp_path / "a"
    with whole(file, tag="1") as one, whole(file, tag="2") as two:
        one.write_text("one"), two.write_text("two")
        assert one != two and one.read_text() == "one"
    assert file.read_text() == "one"


def test_the_umask_decides_who_reads_a_file(tmp_path, group_reads):
    (tmp_path / "b.partial").touch(0o600)  # a killed writer's
    with whole(tmp_path / "b") as partial:
        save_file({"a": torch.zeros(1)}, partial)  # which makes a file for its owner alone
    write_whole(tmp_path / "c", "text")
    assert mode(tmp_path / "b") == mode(tmp_path / "c") == 0o640


def test_every_file_of_a_run_is_readable_as_the_umask_says(tmp_path, group_reads):
    common = ["--steps", "1", "--eval-objects", "1"]
    fresh(tmp_path / "a", *common)
    fresh(tmp_path / "b", *common, "--encoder", str(tmp_path / "a"))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} >= {".safetensors", ".json", ".jsonl", ".png"}
    assert any("latents" in file.parts for file in files)
    assert {
        file.relative_to(tmp_path).as_posix(): mode(file) for file in files if mode(file) != 0o640
    } == {}


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    ours = [
        "config.json.partial",
        "log.jsonl.partial",
        "curves.png.partial",
        "evaluation.json.partial",
        "config.partial",
        ".launch.partial",
        "samples/step_00000009.png.partial",
        "checkpoints/step_00000009.safetensors.partial",
        "checkpoints/step_00000009.partial",
        "checkpoints/encoder.safetensors.partial",
        "checkpoints/decoder.json.partial",
        "latents/0a1b/some-object.safetensors.4711.partial",
        "latents/0a1b/some-object.4711.partial",
    ]
    others = [
        "notes.partial",
        "checkpoints/mine.partial",
        "checkpoints/step_00000009.safetensors",
        "data/config.json.partial",
        "config.json.partial.txt",
        "samples/step_9.jpg.partial",
    ]
    for name in [*ours, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(
        f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*") if f.is_file()
    ) == sorted(others)
