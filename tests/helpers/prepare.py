"""The command train.prepare, and the table that it writes."""

import csv
from pathlib import Path

from train.prepare import command as prepare

# flags for small pictures of few views
SMALL = "--size 16 --views 4 --holdout-views 1 --resolution 4 --workers 0 --supersample 1".split()


def metadata(folder: Path) -> list[dict]:
    """The rows of a dataset's table."""
    with (folder / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def command(*arguments) -> int:
    """Run the command; returns its exit status."""
    return prepare.main([str(a) for a in arguments])
