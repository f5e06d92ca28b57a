"""The folder of an evaluation: each object's scores as they are made, so that it can go on.

settings.json      what the scores depend on: another evaluation is refused in its folder
objects/SHA.json   the scores of an object
evaluation.json    their means, with the protocol; objects.csv; worst.png
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from models.files import write_whole
from models.reading import entry, read_json, shown
from train.evaluate.measure import Record

SETTINGS = "settings.json"
FIELDS = {"name": str, "title": str, "split": str, "worst": int, "scores": dict}


def check_settings(folder: Path, settings: dict) -> None:
    """Record what the scores depend on.

    Raises ValueError that names the first difference where the folder holds another evaluation's,
    and for one that holds anything else.
    """
    file = folder / SETTINGS
    if not file.is_file():
        others = [one.name for one in folder.iterdir() if not one.name.startswith(".")]
        if others:
            raise ValueError(
                f"--out {folder} is not empty and no evaluation: it holds {shown(others[0])}"
            )
        write_whole(file, json.dumps(settings, indent=2) + "\n")
        return
    before = read_json(file)
    now = json.loads(json.dumps(settings))
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(
                f"{folder} holds an evaluation of {name} {shown(before.get(name))}, not "
                f"{shown(now[name])}: choose another --out"
            )


def read_records(folder: Path, names: Iterable[str]) -> dict[str, Record]:
    """Read the scores of objects that are there; a file cut short counts as absent."""
    found = {}
    for name in names:
        file = folder / "objects" / f"{name}.json"
        if not file.is_file():
            continue
        try:
            content = read_json(file)
            values = {key: entry(content, key, kind, str(file)) for key, kind in FIELDS.items()}
        except ValueError:
            continue
        found[name] = Record(**values)
    return found


def write_record(folder: Path, record: Record) -> None:
    """Write the scores of an object; numbers may be NaN or Infinity there."""
    file = folder / "objects" / f"{record.name}.json"
    file.parent.mkdir(exist_ok=True)
    write_whole(file, json.dumps(asdict(record), indent=1) + "\n", sync=False)
