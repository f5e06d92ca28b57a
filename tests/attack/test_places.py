"""Links, pipes and names in datasets and runs: what lies outside is neither read nor written."""

import os
import shutil
import signal

import pytest
import torch

from tests.attack.child import REFUSAL, RESULT, Case, run
from tests.helpers.datasets import AA, BB, RES, make, opened
from train.data.readers import read_frames
from train.prepare.features import ImageFeatures
from train.run.folder import locked

PLACES = {
    "its views": f"renders/{AA}",
    "all views": "renders",
    "a view": f"renders/{AA}/000.png",
    "its cameras": f"renders/{AA}/transforms.json",
    "its features": f"features/rgb_{RES}/{AA}.npz",
    "all features": "features",
    "the table": "metadata.csv",
}


@pytest.fixture
def data(tmp_path):
    """A dataset of two objects."""
    return make(tmp_path / "data", [AA, BB])


@pytest.mark.parametrize("place", PLACES)
def test_a_link_out_of_a_dataset_is_refused(data, tmp_path, place):
    opened(data).item(AA)
    inner = data / PLACES[place]
    inner.rename(tmp_path / "elsewhere")
    inner.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"leads out of {data}, to '{tmp_path}/elsewhere"):
        opened(data).item(AA)


def test_an_object_beside_it_is_still_read(data, tmp_path):
    (data / "renders" / BB / "000.png").rename(tmp_path / "000.png")
    (data / "renders" / BB / "000.png").symlink_to(tmp_path / "000.png")
    assert opened(data).item(AA).name == AA
    with pytest.raises(ValueError, match=f"{BB}/transforms.json: file_path '.*000.png' leads out"):
        opened(data).item(BB)


def test_links_inside_a_dataset_and_to_it_are_its_owners(data, tmp_path):
    before = opened(data).item(AA)
    shared = data / "shared"
    (data / "renders" / AA).rename(shared)
    (data / "renders" / AA).symlink_to(shared)
    (shared / "000.png").rename(data / "first.png")
    (shared / "000.png").symlink_to("../first.png")
    (tmp_path / "link").symlink_to(data)
    for root in (data, tmp_path / "link"):
        assert torch.equal(opened(root).item(AA).image, before.image)
    with pytest.raises(ValueError, match=f"file_path '.*000.png' leads out of {shared}, to "):
        read_frames(shared / "transforms.json")  # alone, its folder is its root


def test_features_are_not_written_through_a_link(data, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (data / "features" / f"dinov2_vits14_reg_{RES}").symlink_to(tmp_path / "elsewhere")
    features = ImageFeatures(data, "dinov2_vits14_reg", data / "w", torch.device("cpu"))
    with pytest.raises(ValueError, match=f"leads out of {data}, to '{tmp_path}/elsewhere'"):
        features.make(None, AA, [RES], lambda views: None)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_lock_of_a_run_empties_no_file_and_waits_for_no_pipe(tmp_path):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (tmp_path / "precious").write_text("kept")
    lock = run_folder / ".lock"
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=".lock is no file: delete it"), locked(run_folder):
        pass
    assert (tmp_path / "precious").read_text() == "kept"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(ValueError, match=".lock is no file: delete it"), locked(run_folder):
        pass
    lock.unlink()
    lock.mkdir()
    with pytest.raises(ValueError, match=".lock is no file: delete it"), locked(run_folder):
        pass
    shutil.rmtree(lock)
    with locked(run_folder):
        assert lock.is_file()


def test_what_the_children_are_judged_by(tmp_path):
    """The harness itself: every way in which a reader can fail is seen, and its case is named."""
    kept = []

    def read(folder):
        way = (folder / "way").read_text()
        if way == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        elif way == "memory":
            kept.append(b"1" * 600_000_000)
            kept.clear()
        elif way == "addresses":
            try:
                bytearray(1 << 40)
            except MemoryError as error:
                raise ValueError("way cannot be read") from error
        elif way == "outside":
            (folder.parent / "outside" / "000.png").read_bytes()
        elif way != "result":
            raise {"nameless": ValueError, "other": KeyError, "clear": ValueError}[way](
                "way is wrong" if way == "clear" else "wrong"
            )

    def prepare(case, folder):
        (folder.parent / "outside" / "000.png").touch()
        (folder / "way").write_text(case.family)

    class Kind:
        contained = True
        limited = False

    Kind.read = staticmethod(read)
    Kind.prepare = staticmethod(prepare)
    ways = "result clear crash memory addresses outside nameless other result".split()
    outcomes = run([Case(way, 0) for way in ways], Kind(), tmp_path)
    assert [outcome.case.family for outcome in outcomes] == ways
    ends = dict(zip(ways, (outcome.end for outcome in outcomes), strict=True))
    assert ends["result"] == RESULT and ends["clear"] == REFUSAL
    assert ends["crash"] == "killed by status 9"
    assert " MiB, over 476" in ends["memory"]
    assert ends["addresses"] == "tried to take all memory"
    assert ends["outside"] == "opened a file outside"
    assert ends["nameless"] == "names no file"
    assert ends["other"] == "KeyError, no ValueError"
