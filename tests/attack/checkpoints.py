"""Damage of safetensors files that carry a state: of bits, of tensors, of what belongs together."""

import json
import struct

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from tests.attack import damage

TYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32)
TEXTS = ("tensors", "checksums")  # of a header: what earlier versions did not write


def length(data: bytes) -> int:
    """The bytes of the header, the eight of its length among them."""
    return 8 + struct.unpack_from("<Q", data)[0]


def texts(data: bytes) -> dict[str, str]:
    """The texts in the header of a sound file."""
    return json.loads(data[8 : length(data)]).get("__metadata__", {})


def flip_bit(data: bytes, first: int, last: int, rng: np.random.Generator) -> bytes:
    """Flip one bit between two places."""
    changed = bytearray(data)
    changed[int(rng.integers(first, last))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def header_bit(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip a bit of the header."""
    return flip_bit(data, 0, length(data), rng)


def data_bit(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip a bit of a tensor."""
    return flip_bit(data, length(data), len(data), rng)


def state_bit(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip a bit of the state, which is JSON inside of JSON."""
    state = json.dumps(texts(data)["state"]).encode()
    first = data.index(state)
    return flip_bit(data, first, first + len(state), rng)


def state_number(data: bytes, rng: np.random.Generator) -> bytes:
    """Count one up or down in the state."""

    def change(text: bytes, rng: np.random.Generator) -> bytes:
        document = json.loads(text)
        numbers = [p for p in damage.places(document) if type(p[0][p[1]]) in (int, float)]
        container, key = numbers[rng.integers(len(numbers))]
        container[key] += int(rng.choice([-1, 1]))
        return json.dumps(document).encode()

    return damage.in_state(change, data, rng)


def _pick(tensors: dict[str, Tensor], rng: np.random.Generator) -> str:
    """A tensor, as often of the model, the averages and the optimiser each."""
    groups = sorted({name.split(".")[0] for name in tensors})
    group = groups[rng.integers(len(groups))]
    own = sorted(name for name in tensors if name.split(".")[0] == group)
    return own[rng.integers(len(own))]


def _saved(tensors: dict[str, Tensor], header: dict[str, str]) -> bytes:
    return save({name: t.contiguous() for name, t in tensors.items()}, header or None)


def removed(data: bytes, rng: np.random.Generator) -> bytes:
    """Lose a tensor, or all of a group."""
    tensors = load(data)
    name = _pick(tensors, rng)
    whole = name.split(".")[0] if rng.random() < 0.3 else name
    left = {key: t for key, t in tensors.items() if key != whole and key.split(".")[0] != whole}
    return _saved(left, texts(data))


def renamed(data: bytes, rng: np.random.Generator) -> bytes:
    """Swap the names of two tensors of one shape, or give one a new name."""
    tensors = load(data)
    name = _pick(tensors, rng)
    alike = sorted(key for key, t in tensors.items() if t.shape == tensors[name].shape)
    other = alike[rng.integers(len(alike))]
    if other == name or torch.equal(tensors[name], tensors[other]) or rng.random() < 0.3:
        tensors[name + "x"] = tensors.pop(name)
    else:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return _saved(tensors, texts(data))


def retyped(data: bytes, rng: np.random.Generator) -> bytes:
    """Store a tensor, or all of them, in another type."""
    tensors = load(data)
    other = TYPES[rng.integers(len(TYPES))]
    names = list(tensors) if rng.random() < 0.3 else [_pick(tensors, rng)]
    changed = {name: tensors[name].to(other) for name in names}
    return _saved(tensors | changed, texts(data))


def reshaped(data: bytes, rng: np.random.Generator) -> bytes:
    """Store a tensor in another shape."""
    tensors = load(data)
    name = _pick(tensors, rng)
    t = tensors[name]
    ways = [t[None], torch.cat([t.reshape(-1), t.reshape(-1)]), t.reshape(-1)[:-1]]
    ways += [t.reshape(-1)] if t.ndim > 1 else []
    tensors[name] = ways[rng.integers(len(ways))]
    return _saved(tensors, texts(data))


def values(data: bytes, rng: np.random.Generator) -> bytes:
    """Put what is not finite, zeros or one other number into a tensor."""
    tensors = load(data)
    name = _pick(tensors, rng)
    flat = tensors[name].reshape(-1).clone()
    way = rng.integers(4)
    if way == 3:
        flat[int(rng.integers(len(flat)))] += 1
    else:
        flat[:] = (float("nan"), float("-inf"), -2.0)[way] if flat.is_floating_point() else 77
    tensors[name] = flat.view(tensors[name].shape)
    return _saved(tensors, texts(data))


def earlier(data: bytes) -> bytes:
    """The same checkpoint as earlier versions wrote it."""
    state = json.loads(texts(data)["state"])
    state.pop("run", None)
    return _saved(load(data), {"state": json.dumps(state)})


def earlier_damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A checkpoint without checksums, with damage that shows without them."""
    data = earlier(data)
    way = rng.integers(5)
    if way == 4:
        state = json.loads(texts(data)["state"])
        places = [(state, "step"), (state["sampler"], "step"), (state["optimizer"], "steps")]
        container, key = places[rng.integers(len(places))]
        container[key] += int(rng.choice([-1, 1]))
        return _saved(load(data), {"state": json.dumps(state)})
    if way == 3:
        tensors = load(data)
        name = _pick(tensors, rng)
        tensors[name] = tensors[name] * float("nan")
        return _saved(tensors, texts(data))
    return (removed, retyped, reshaped)[way](data, rng)
