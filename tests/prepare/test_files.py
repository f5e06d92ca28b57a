"""Names in files of strangers: what they may reach."""

import os

import pytest

from train.meshes.files import below, read_file


def test_below_follows_links_and_dots(tmp_path):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for folder in (root / "in", tmp_path / "out"):
        (folder / "a.png").write_bytes(b"a")
    (root / "within").symlink_to("in")
    (root / "away").symlink_to("../out")
    (root / "circle").symlink_to("circle")
    (tmp_path / "alias").symlink_to(root)
    for name in ("in/a.png", "in/../in/a.png", "within/a.png", "absent", "."):
        assert below(root, root / name) == root / name
        below(tmp_path / "alias", root / name)
        below(root, tmp_path / "alias" / name)
    for name in ("../out/a.png", "away/a.png", "in/../../out", "..", "../root2"):
        with pytest.raises(ValueError, match=f"^'.*{name}' leads out of {root}, to '"):
            below(root, root / name)
    with pytest.raises(ValueError, match="leads out of .*, to '/etc'"):
        below(root, root / "/etc")
    with pytest.raises(ValueError, match=r"a\\x00b' is no path: "):
        below(root, root / "a\0b")
    with pytest.raises(OSError):  # a circle of links
        read_file(below(root, root / "circle"))


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "file") == read_file(tmp_path / "link") == b"abc"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(ValueError, match=f"^{name} is not a file$"):
            read_file(tmp_path / name)
