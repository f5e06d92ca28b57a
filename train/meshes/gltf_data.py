"""The data of a glTF file: its JSON, checked, and its buffers and accessors as arrays.

Nothing in the file is trusted: what is read is checked for kind, range and length.
"""

import base64
import binascii
import json
import struct
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from train.meshes.budget import Budget
from train.meshes.files import Places
from train.meshes.gltf_check import check_document
from train.meshes.gltf_extensions import MESHOPT
from train.meshes.untrusted import MALFORMED, reason, shown

TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
VALUE = 24  # bytes that a value without data of its own takes, with what is made of it


class GltfData:
    """A .glb or .gltf file. ValueError, naming the file, where its JSON cannot be used.

    The files that it names lie below `root`, as a rule its own folder.
    """

    def __init__(self, path: Path, root: Path, budget: Budget):
        self.path = path
        self.budget = budget
        self._places = Places((path.parent,), root)
        self.document, self.binary = _document(path, self.budget.read(path))
        self._buffers: dict[int, memoryview] = {}

    def entry(self, table: str, number: int) -> dict:
        """Look up an entry of a table; ValueError where it does not exist."""
        entries = self.document.get(table) or []
        if type(number) is not int or not 0 <= number < len(entries):
            raise ValueError(f"it uses number {shown(number)} of its {len(entries)} {table}")
        return entries[number]

    def file(self, uri: str) -> bytes:
        """Read a file that the document names, or the data that stands in its name."""
        if uri.startswith("data:"):
            head, _, body = uri.partition(",")
            if not head.endswith(";base64"):
                return unquote(body).encode("latin-1")
            try:
                return base64.b64decode(body, validate=True)
            except binascii.Error as error:
                raise ValueError(f"data of {shown(head)} is not base64: {error}") from error
        found = self.find(uri)
        if found is None:
            raise ValueError(f"{unquote(uri)!r} does not exist")
        return self.budget.read(found)

    def find(self, uri: str) -> Path | None:
        """Find a file that the document names; None for one that is absent."""
        return self._places.find(unquote(uri))

    def files(self) -> list[Path | None]:
        """List the buffers and images that the document names; None for one that is absent."""
        entries = [
            entry for table in ("buffers", "images") for entry in self.document.get(table) or []
        ]
        uris = [entry["uri"] for entry in entries if "uri" in entry]
        return [self.find(uri) for uri in uris if not uri.startswith("data:")]

    def buffer(self, number: int) -> memoryview:
        """Read a buffer."""
        if number not in self._buffers:
            buffer = self.entry("buffers", number)
            data = None
            if "uri" in buffer:
                data = self.file(buffer["uri"])
            elif number == 0:
                data = self.binary
            if data is None:
                raise ValueError(f"buffer {number} has no data")
            if len(data) < buffer["byteLength"]:
                raise ValueError(
                    f"buffer {number} has {len(data)} of its {buffer['byteLength']} bytes"
                )
            self._buffers[number] = memoryview(data)
        return self._buffers[number]

    def view(self, number: int) -> memoryview:
        """Read a buffer view."""
        view = self.entry("bufferViews", number)
        for extension in MESHOPT:
            buffer = self.entry("buffers", view["buffer"])
            given = "uri" in buffer or (view["buffer"] == 0 and self.binary is not None)
            if extension in view.get("extensions", {}) and not given:
                raise ValueError(f"its data are compressed ({extension}), which is not supported")
        begin = view.get("byteOffset", 0)
        length = view["byteLength"]
        data = self.buffer(view["buffer"])[begin : begin + length]
        if len(data) < length:
            raise ValueError(f"buffer view {number} has {len(data)} of its {length} bytes")
        return data

    def accessor(self, number: int) -> np.ndarray:
        """Read an accessor: [count, width] of integers or, normalised ones included, floats."""
        entry = self.entry("accessors", number)
        if entry["componentType"] not in TYPES or entry["type"] not in WIDTHS:
            raise ValueError(
                f"accessor {number} is of {entry['componentType']} {entry['type']}, which glTF "
                "2.0 does not know"
            )
        dtype = np.dtype(TYPES[entry["componentType"]])
        width = WIDTHS[entry["type"]]
        count = entry["count"]
        if "bufferView" in entry:
            view = self.entry("bufferViews", entry["bufferView"])
            stride = view.get("byteStride") or dtype.itemsize * width
            data = self.view(entry["bufferView"])
            begin = entry.get("byteOffset", 0)
            values = _strided(data, begin, count, width, stride, dtype, number)
        else:
            what = f"accessor {number}, of {count} rows but no data,"
            self.budget.check(count * width * VALUE, what)
            values = np.zeros((count, width), dtype)
        if sparse := entry.get("sparse"):
            self._replace(values, sparse, number)
        if entry.get("normalized") and dtype.kind in "iu":
            values = np.maximum(values / np.iinfo(dtype).max, -1.0)
        return values

    def _replace(self, values: np.ndarray, sparse: dict, number: int) -> None:
        """Write the rows that a sparse accessor replaces."""
        rows = sparse["indices"]
        new = sparse["values"]
        count = sparse["count"]
        width = values.shape[1]
        kind = np.dtype(TYPES[rows["componentType"]])
        data = self.view(rows["bufferView"])
        begin = rows.get("byteOffset", 0)
        at = _strided(data, begin, count, 1, kind.itemsize, kind, number)[:, 0]
        data = self.view(new["bufferView"])
        begin = new.get("byteOffset", 0)
        stride = values.itemsize * width
        if count and at.max() >= len(values):
            raise ValueError(f"accessor {number} replaces row {at.max()} of {len(values)}")
        values[at] = _strided(data, begin, count, width, stride, values.dtype, number)


def _document(path: Path, data: bytes) -> tuple[dict, memoryview | None]:
    """The JSON of a file and, of a GLB, its binary chunk."""
    binary = None
    if not data:
        raise ValueError(f"{path.name} is empty")
    try:
        if path.suffix.lower() == ".glb":
            data, binary = _chunks(data)
        try:
            document = json.loads(data.rstrip(b"\0"))
        except UnicodeDecodeError as error:
            raise ValueError(f"its JSON is no text in UTF-8: {error.reason}") from error
        check_document(document)
    except MALFORMED as error:
        raise ValueError(f"{path.name} cannot be read: {reason(error)}") from error
    return document, binary


def _chunks(data: bytes) -> tuple[bytes, memoryview | None]:
    """The JSON and the binary chunk of a GLB."""
    if len(data) < 12 or data[:4] != b"glTF":
        raise ValueError(f"no GLB header in its {len(data)} bytes")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise ValueError(f"glTF version {version}, not 2")
    if len(data) < length:
        raise ValueError(f"truncated: its header says {length} bytes, the file has {len(data)}")
    chunks = {}
    at = 12
    while at + 8 <= length:
        size, kind = struct.unpack_from("<I4s", data, at)
        chunks.setdefault(kind, memoryview(data)[at + 8 : at + 8 + size])
        at += 8 + size
    if b"JSON" not in chunks:
        raise ValueError(f"no JSON chunk in its {length} bytes")
    return bytes(chunks[b"JSON"]), chunks.get(b"BIN\0")


def _strided(
    data: memoryview, begin: int, count: int, width: int, stride: int, dtype: np.dtype, number: int
) -> np.ndarray:
    if stride < dtype.itemsize * width:
        raise ValueError(
            f"accessor {number} has rows of {dtype.itemsize * width} bytes every {stride} bytes"
        )
    needed = begin + (stride * (count - 1) + dtype.itemsize * width if count else 0)
    if needed > len(data) or min(begin, count) < 0:
        raise ValueError(f"accessor {number} needs {needed} bytes of a buffer view of {len(data)}")
    if not count:
        return np.zeros((0, width), dtype)
    return np.ndarray((count, width), dtype, data, begin, (stride, dtype.itemsize)).copy()
