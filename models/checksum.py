"""Checksums of the tensors of a safetensors file and of the texts in its header, kept there.

The header's entry "tensors" lists every tensor: its type, its shape and the CRC-32 of its bytes;
the entry "checksums" holds the CRC-32 of every other text, the list's among them. Other readers
take no notice. They find, and name, what disks, memory and transfers do to a file; they are no
protection from somebody who means to deceive. Of what Python brings, zlib's CRC-32 is the fastest:
2.4 GB a second on one CPU core, where hashlib's blake2b reads 0.6.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.reading import parse_json, read_safetensors, shown

LIST = "tensors"
CHECKSUMS = "checksums"


def with_checksums(
    tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Make the header of a safetensors file from its texts: add the list and the checksums."""
    listed = {name: [*_kind(t), _checksum(t)] for name, t in tensors.items()}
    header = dict(texts or {}) | {LIST: json.dumps(listed)}
    sums = {name: _checksum_of_text(text) for name, text in header.items()}
    return header | {CHECKSUMS: json.dumps(sums)}


def save_checked(
    tensors: Mapping[str, Tensor], file: Path, texts: Mapping[str, str] | None = None
) -> None:
    """Write tensors and texts with their checksums; equal content gives equal bytes.

    Tensors must be contiguous. Raises OSError or safetensors' own error where it cannot be written.
    """
    save_file(dict(tensors), file, with_checksums(tensors, texts))
    _sort_header(file)


def _sort_header(file: Path) -> None:
    """Put the texts of a safetensors file in the order of their names, in place.

    The library writes them in an order that is another each time: equal content would differ in
    its bytes.
    """
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{file}: its header takes {len(text)} bytes, not {size}")
        stream.seek(8)
        stream.write(text.ljust(size))


def read_checked(
    file: Path, absent: str = "is missing"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and texts as `read_safetensors` does, and compare both with their checksums.

    The texts are those that `with_checksums` was given; a file without checksums is taken as it is
    (`has_checksums` tells). Raises ValueError that names the file, and the first text or tensor
    that is absent, new, of another type or shape, or not what was saved.
    """
    tensors, header = read_safetensors(file, absent)
    if has_checksums(header):
        try:
            _check_texts(header)
            _check_tensors(tensors, parse_json(header[LIST], f"its list of {LIST}"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    return tensors, header


def has_checksums(header: Mapping[str, str]) -> bool:
    """Tell whether a header has checksums, or what is left of them."""
    return LIST in header or CHECKSUMS in header


def _check_texts(header: Mapping[str, str]) -> None:
    if CHECKSUMS not in header:
        raise ValueError(f"its header lacks {CHECKSUMS!r}")
    saved = parse_json(header[CHECKSUMS], f"its list of {CHECKSUMS}")
    for name in sorted((saved.keys() | header.keys() | {LIST}) - {CHECKSUMS}):
        if name not in header:
            raise ValueError(f"its header lacks {name!r}")
        if (own := _checksum_of_text(header[name])) != saved.get(name):
            raise ValueError(
                f"{shown(name)} in its header has the checksum {own}, not "
                f"{shown(saved.get(name))} as it was saved"
            )


def _check_tensors(tensors: Mapping[str, Tensor], listed: dict) -> None:
    if missing := sorted(listed.keys() - tensors.keys()):
        raise ValueError(f"it lacks {shown(missing[0])}, one of {len(listed)} tensors")
    if extra := sorted(tensors.keys() - listed.keys()):
        raise ValueError(f"it holds {shown(extra[0])}, which was not saved in it")
    for name, tensor in tensors.items():
        if not isinstance(listed[name], list) or len(listed[name]) != 3:
            raise ValueError(f"its list of {LIST} says {shown(listed[name])} of {name}")
        kind = _kind(tensor)
        if listed[name][:2] != kind:
            own, saved = (" ".join(map(str, one)) for one in (kind, listed[name][:2]))
            raise ValueError(f"{name} is {own}, it was saved as {saved}")
    for name, tensor in tensors.items():
        if (own := _checksum(tensor)) != (saved := listed[name][2]):
            raise ValueError(f"{name} has the checksum {own}, not {saved} as it was saved")


def _kind(tensor: Tensor) -> list:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _checksum(tensor: Tensor) -> str:
    """The checksum of a tensor's bytes, which are copied only where they are on another device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{zlib.crc32(flat.view(torch.uint8).numpy()):08x}"


def _checksum_of_text(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
