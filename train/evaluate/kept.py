"""The folder of an evaluation: each object's scores as they are made, so that it can go on.

settings.json      what the scores depend on: another evaluation is refused in its folder
objects/SHA.json   the scores of an object
evaluation.json    their means, with the protocol; objects.csv; worst.png
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from models.files import write_whole
from models.reading import entry, read_json, shown
from train.evaluate.measure import OURS, Record
from train.run.folder import LOCK

SETTINGS = "settings.json"
FIELDS = {"name": str, "title": str, "split": str, "worst": int, "scores": dict}


def check_settings(folder: Path, settings: dict) -> None:
    """Compare what the scores depend on with what is recorded.

    Raises ValueError that names the first difference where the folder holds another evaluation's
    scores, and for one that holds anything else.
    """
    file = folder / SETTINGS
    others = {one.name for one in folder.iterdir() if not one.name.startswith(".")} - {SETTINGS}
    if others and not file.is_file():
        raise ValueError(
            f"--out {folder} is not empty and no evaluation: it holds {shown(min(others))}"
        )
    if not others:  # nor any scores of another one
        return
    before = dict(_leaves(read_json(file)))
    for name, now in _leaves(json.loads(json.dumps(settings))):
        if before.get(name) != now:
            raise ValueError(
                f"{folder} holds an evaluation with {name} {shown(before.get(name))}, not "
                f"{shown(now)}: choose another --out"
            )


def write_settings(folder: Path, settings: dict) -> None:
    """Record what the scores depend on, before the first of them is written."""
    write_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def tidy(folder: Path) -> None:
    """Delete the lock of a folder that holds nothing else; this process must hold it."""
    if [one.name for one in folder.iterdir()] == [LOCK]:
        with suppress(OSError):  # some systems delete no open file
            (folder / LOCK).unlink()


def _leaves(settings: dict) -> Iterator[tuple[str, object]]:
    """Yield dotted names and values, those of groups one by one."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{leaf}", inner) for leaf, inner in _leaves(value))
        else:
            yield name, value


def read_records(folder: Path, names: Iterable[str]) -> dict[str, Record]:
    """Read the scores of objects that are there; a damaged file counts as absent."""
    found = {}
    for name in names:
        file = folder / "objects" / f"{name}.json"
        if not file.is_file():
            continue
        try:
            content = read_json(file)
            values = {key: entry(content, key, kind, str(file)) for key, kind in FIELDS.items()}
            _check_scores(values["scores"], str(file))
        except ValueError:
            continue
        found[name] = Record(**values)
    return found


def _check_scores(scores: dict, where: str) -> None:
    """Raise ValueError for scores that are no numbers by renderer and measure."""
    entry(scores, OURS, dict, where)
    for row in scores:
        values = entry(scores, row, dict, where)
        for value in values.values():
            if type(value) is not float:
                raise ValueError(f"{where}: {row} holds {shown(value)}, not a number")


def write_record(folder: Path, record: Record) -> None:
    """Write the scores of an object; numbers may be NaN or Infinity there."""
    file = folder / "objects" / f"{record.name}.json"
    file.parent.mkdir(exist_ok=True)
    write_whole(file, json.dumps(asdict(record), indent=1) + "\n", sync=False)
