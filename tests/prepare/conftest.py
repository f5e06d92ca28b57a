"""Meshes that tests of train.prepare start from."""

from pathlib import Path

import pytest

from tests.helpers.mesh_files import box, write_obj


@pytest.fixture
def pair(tmp_path) -> Path:
    """A folder with two meshes."""
    for name, size in (("a", (1, 1, 0.5)), ("b", (1, 0.3, 0.5))):
        write_obj(tmp_path / "in", name, *box(size))
    return tmp_path / "in"
