"""Damage that needs no knowledge of a format beyond text and JSON: flips, cuts, numbers, types."""

import json
import re
import struct

import numpy as np

NUMBER = re.compile(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?")
NUMBERS = (b"-1", b"0", b"65536", b"2147483648", b"99999999999", b"1e12", b"1e308", b"9" * 400)
WORDS = ("", "-1", "nan", "inf", "1e999", "x", "\u0663", "a/b/c", "1//", "[", "\0", "9" * 400, "é")
DEEP = 20_000  # brackets: deeper than any parser goes
VALUES = (
    None,
    True,
    -1,
    0,
    0.5,
    1 << 40,
    1e308,
    float("nan"),
    float("-inf"),
    10**399,
    "",
    "x",
    "1.0",
    "\ud800",
    "x" * 5000,
    [],
    [[]],
    [1],
    [1, "x"],
    {},
    {"a": 1},
)


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a few bits or bytes, most of them near the start."""
    changed = bytearray(data)
    reach = len(data) if rng.random() < 0.5 else min(len(data), 400)
    for at in rng.integers(reach, size=rng.integers(1, 4)):
        changed[at] = (
            changed[at] ^ (1 << rng.integers(8)) if rng.random() < 0.5 else rng.integers(256)
        )
    return bytes(changed)


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    """Lose the end or the middle, or get zeros, rubbish or the same again behind it."""
    at = int(rng.integers(len(data)))
    way = rng.integers(7)
    if way < 3:
        return data[:at]
    if way == 3:
        return b""
    if way == 4:
        return data[:at] + data[at + int(rng.integers(1, 64)) :]
    if way == 5:
        return data[:at] + bytes(len(data) - at)
    return data + (data if rng.random() < 0.5 else rng.bytes(99))


def number(data: bytes, rng: np.random.Generator) -> bytes:
    """Put another number in the place of one in a text."""
    found = list(NUMBER.finditer(data))
    if not found:
        return data + NUMBERS[rng.integers(len(NUMBERS))]
    match = found[rng.integers(len(found))]
    return data[: match.start()] + NUMBERS[rng.integers(len(NUMBERS))] + data[match.end() :]


def word(data: bytes, rng: np.random.Generator, separator: bytes = b" ") -> bytes:
    """Put another word in the place of one in a text, or write it all in UTF-16."""
    if rng.random() < 0.15:
        return data.decode(errors="replace").encode("utf-16")
    lines = data.split(b"\n")
    at = int(rng.integers(len(lines)))
    words = lines[at].split(separator)
    words[rng.integers(len(words))] = WORDS[rng.integers(len(WORDS))].encode()
    lines[at] = separator.join(words)
    return b"\n".join(lines)


def places(value, found: list | None = None) -> list:
    """(container, key) of everything in a document."""
    found = [] if found is None else found
    keys = (
        value.keys()
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else ()
    )
    for key in keys:
        found.append((value, key))
        places(value[key], found)
    return found


def swap(data: bytes, rng: np.random.Generator) -> bytes:
    """Put something of another type in the place of a value of JSON, or take it away."""
    way = rng.random()
    if way < 0.08:
        return b"[" * DEEP + b"]" * DEEP
    if way < 0.16:
        return data.decode().encode("utf-16")
    document = json.loads(data)
    if way < 0.2:
        return json.dumps([document]).encode()
    container, key = _weighed(document, rng)
    if way < 0.35:
        del container[key]
    elif way < 0.42:
        container[key] = "@DEEP@"
    else:
        container[key] = VALUES[rng.integers(len(VALUES))]
    deep = b"[" * DEEP + b"]" * DEEP
    return json.dumps(document).encode().replace(b'"@DEEP@"', deep)


def inflate(data: bytes, rng: np.random.Generator) -> bytes:
    """Put another number in the place of one in JSON."""
    document = json.loads(data)
    whole = [
        (container, key)
        for container, key in places(document)
        if isinstance(container[key], int | float)
    ]
    container, key = whole[rng.integers(len(whole))]
    container[key] = "@NUMBER@"
    text = NUMBERS[rng.integers(len(NUMBERS))]
    return json.dumps(document).encode().replace(b'"@NUMBER@"', text)


def _weighed(document, rng: np.random.Generator) -> tuple:
    """A place in a document, as often near its root as deep in its lists of numbers."""
    found = places(document)
    if rng.random() < 0.5:
        found = [(container, key) for container, key in found if isinstance(container, dict)]
    return found[rng.integers(len(found))]


def in_glb(change, data: bytes, rng: np.random.Generator) -> bytes:
    """Change the JSON of a GLB, whose lengths stay true."""
    length = struct.unpack_from("<I", data, 12)[0]
    head = change(data[20 : 20 + length], rng)
    rest = data[20 + length :]
    size = 20 + len(head) + len(rest)
    return struct.pack("<4sIIII", b"glTF", 2, size, len(head), 0x4E4F534A) + head + rest


def in_safetensors(change, data: bytes, rng: np.random.Generator) -> bytes:
    """Change the JSON at the start of a safetensors file, whose length stays true."""
    length = struct.unpack_from("<Q", data)[0]
    head = change(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def in_state(change, data: bytes, rng: np.random.Generator) -> bytes:
    """Change the JSON that a run's checkpoint keeps as a text in its header."""

    def inner(head: bytes, rng: np.random.Generator) -> bytes:
        document = json.loads(head)
        state = document["__metadata__"]["state"].encode()
        document["__metadata__"]["state"] = change(state, rng).decode(errors="replace")
        return json.dumps(document).encode()

    return in_safetensors(inner, data, rng)
