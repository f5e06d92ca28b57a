"""Every field of JSON, absent and of every other type: a result or a clear error."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

from tests.attack import damage
from tests.attack.child import RESULT, Case, run, shown

ABSENT = "absent"
VALUES = (ABSENT, None, True, -1, 10**399, float("inf"), "x", [], {"a": [1]})
SLOW = ("transforms.json", "config.json", "model.json")
KINDS = (
    "log.jsonl",
    "checkpoint's state",
    *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW),
)


def fields(value, path: tuple = ()) -> Iterator[tuple]:
    """The paths of everything in a document; of a list, of its first entry."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from fields(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from fields(value[0], (*path, 0))


def changed(path: tuple, value, data: bytes, *_) -> bytes:
    """A document with another value in a place, or none."""
    document, rest = json.JSONDecoder().raw_decode(data.decode())
    container = document
    for key in path[:-1]:
        container = container[key]
    if value == ABSENT:
        del container[path[-1]]
    else:
        container[path[-1]] = value
    return json.dumps(document).encode() + data[rest:]


def document(data: bytes, kind: str) -> dict:
    """What a sound file holds."""
    found = []
    if kind == "checkpoint's state":
        damage.in_state(lambda state, _: found.append(json.loads(state)) or state, data, None)
        return found[0]
    return json.JSONDecoder().raw_decode(data.decode())[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_every_other_type(kinds, tmp_path, kind):
    sound = kinds[kind].files[kinds[kind].victim]
    families = {}
    for path in fields(document(sound, kind)):
        for value in VALUES:
            change = partial(changed, path, value)
            if kind == "checkpoint's state":
                change = partial(damage.in_state, change)
            families[f"{'.'.join(map(str, path))} {str(value)[:9]}"] = change
    cases = [Case("sound", 0), *(Case(name, 0) for name in families)]
    outcomes = run(cases, replace(kinds[kind], families=families), tmp_path)
    failed = [shown(outcome) for outcome in outcomes if outcome.failed]
    assert not failed, "\n" + "\n".join(failed)
    assert outcomes[0].end == RESULT and len(outcomes) > 30
