"""A run whose files are damaged goes on as it was or says what is wrong, never with other numbers.

`python -m tests.attack.runs` prints the table.
"""

import pytest

from tests.attack.child import RESULT, shown
from tests.attack.runs import kinds_of_runs, outcomes_of

KINDS = ("checkpoint", "config.json", "log.jsonl", "latents", "latent.npz")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every kind of file, by name."""
    made = kinds_of_runs(tmp_path_factory.mktemp("sound"))
    assert made.keys() == set(KINDS)
    return made


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_changes_nothing(runs, tmp_path, kind, count):
    outcomes = outcomes_of(runs[kind], count, tmp_path)
    failed = [shown(outcome) for outcome in outcomes if outcome.failed]
    assert not failed, "\n" + "\n".join(failed)
    # the sound one among them, so that a reader which refuses everything fails
    assert outcomes[0].end == RESULT, outcomes[0]
    assert len(outcomes) == 1 + count * len(runs[kind].families)
