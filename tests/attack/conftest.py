"""The sound files that attack tests start from."""

import pytest

from tests.attack.subjects import KINDS, subjects


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """Every kind of file, by name."""
    made = subjects(tmp_path_factory.mktemp("sound"))
    assert made.keys() == set(KINDS)
    return made
