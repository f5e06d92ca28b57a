"""Files of strangers give a result or a clear error: they never hang, crash, or take all memory.

`python -m tests.attack` prints the table, and writes the files of one case to look at.
"""

import pytest

from tests.attack.child import RESULT, run, shown
from tests.attack.subjects import KINDS, cases_of


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kinds, tmp_path, kind, count):
    subject = kinds[kind]
    outcomes = run(cases_of(subject, count), subject, tmp_path)
    failed = [shown(outcome) for outcome in outcomes if outcome.failed]
    assert not failed, "\n" + "\n".join(failed)
    # the sound one among them, so that a reader which refuses everything fails
    assert outcomes[0].end == RESULT, outcomes[0]
