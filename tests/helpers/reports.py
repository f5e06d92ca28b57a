"""pytest -p tests.helpers.reports --reports FILE [--passed FILE]: every test at once as a line of
JSON.

So a run that is stopped keeps what it had. A line is {id, when, outcome, s, why}. `--passed` names
such a file of an earlier run: tests that passed there are left out, those that failed come first.
"""

import json
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--reports", type=Path, help="append a line of JSON for every test here")
    parser.addoption("--passed", type=Path, help="leave out tests that passed in such a file")


def outcomes(file: Path) -> dict[str, str]:
    """The last outcome of every test in a file of --reports; none where there is no file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {row["id"]: row["outcome"] for row in rows}


class Reports:
    """Writes the lines."""

    def __init__(self, file: Path):
        self.file = file

    def pytest_runtest_logreport(self, report):
        """A call, or what ended a test before or after it."""
        if report.when != "call" and report.passed or report.when == "teardown" and report.skipped:
            return
        why = "" if report.passed else str(report.longrepr)[-2500:]
        row = {"id": report.nodeid, "when": report.when, "outcome": report.outcome}
        with self.file.open("a") as file:
            file.write(json.dumps(row | {"s": round(report.duration, 2), "why": why}) + "\n")


def pytest_configure(config):
    file = config.getoption("reports")
    if file and not hasattr(config, "workerinput"):  # the first process hears of every test
        config.pluginmanager.register(Reports(file))


def pytest_collection_modifyitems(config, items):
    if file := config.getoption("passed"):
        before = outcomes(file)
        passed = lambda item: before.get(item.nodeid) in ("passed", "skipped")
        done = [item for item in items if passed(item)]
        items[:] = [item for item in items if not passed(item)]
        items.sort(key=lambda item: before.get(item.nodeid) != "failed")
        config.hook.pytest_deselected(items=done)
