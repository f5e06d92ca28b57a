"""PLY files as triangles: ASCII and binary, polygons, strips, vertex or face colours.

Colours are display values, and z is up. That is how the published datasets, Blender's exporter and
train.prepare's own mesh.ply write them.
"""

import re
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.meshes.budget import Budget
from train.meshes.colors import unit_colors
from train.meshes.polygons import triangulate
from train.meshes.surface import GREY, Z_UP, Material, Mesh, assemble, finite
from train.meshes.untrusted import MALFORMED, reason

TYPES = {
    "char": "i1",
    "int8": "i1",
    "uchar": "u1",
    "uint8": "u1",
    "short": "i2",
    "int16": "i2",
    "ushort": "u2",
    "uint16": "u2",
    "int": "i4",
    "int32": "i4",
    "uint": "u4",
    "uint32": "u4",
    "float": "f4",
    "float32": "f4",
    "double": "f8",
    "float64": "f8",
}
LENGTHS = {"i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I"}
FACE = 400  # bytes that a triangle takes at most
ROWS = 1 << 16  # that are gathered at once
FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
COLORS = (  # the names that writers give to red, green and blue
    ("red", "green", "blue"),
    ("diffuse_red", "diffuse_green", "diffuse_blue"),
    ("r", "g", "b"),
)
# properties that are no lists
NUMBERS = {"x", "y", "z", "nx", "ny", "nz", "alpha", *(name for rgb in COLORS for name in rgb)}
COORDINATES = (("s", "t"), ("u", "v"), ("texture_u", "texture_v"), ("texcoord",))
CORNERS = ("vertex_indices", "vertex_index")  # and that is one


@dataclass
class _Element:
    name: str
    count: int
    # property -> its type, and the type of its length if it is a list
    fields: dict[str, tuple[str, str | None]]


@dataclass
class _Lists:
    """The lists of all rows of a property, one after the other."""

    values: np.ndarray  # [N]
    sizes: np.ndarray  # [rows] int64


def read_ply(path: Path, root: Path | None = None, budget: Budget | None = None) -> Mesh:
    """Read a .ply; a ValueError names the file and what is wrong with it.

    It names no files that are read, so that `root` does not count.
    """
    name = path.name
    budget = Budget() if budget is None else budget
    try:
        elements, order, body = _header(budget.read(path).removeprefix(b"\xef\xbb\xbf"))
        tables = _text(body, elements) if order == "" else _binary(body, elements, order)
        corners, sizes = _corners(tables.get("face", {}))
        strips = _strips(tables.get("tristrips", {}))
        fans = int(np.maximum(sizes - 2, 0).sum())
        points = next((e.count for e in elements if e.name == "vertex"), 0)
        budget.take_faces(fans + len(strips), points, FACE)
    except MALFORMED as error:
        raise ValueError(f"{name} cannot be read: {reason(error)}") from error
    vertex = tables.get("vertex", {})
    face = tables.get("face", {})
    if not {"x", "y", "z"} <= vertex.keys():
        raise ValueError(f"{name} has no vertices with x, y and z")
    vertices = np.stack([vertex[axis] for axis in "xyz"], 1).astype(float)
    if not len(sizes) and not len(strips):
        raise ValueError(f"{name} has no faces: {len(vertices)} vertices alone are no surface")
    used = np.concatenate([corners, strips.ravel()])
    if used.size and (used.min() < 0 or used.max() >= len(vertices)):
        wrong = used.min() if used.min() < 0 else used.max()
        raise ValueError(f"{name}: a face uses vertex {wrong} of {len(vertices)}")
    try:
        points = vertices[corners] if (sizes > 3).any() else vertices[:0]  # not looked at
        triangles = triangulate(points, sizes)
        del points
        faces = np.concatenate([corners[triangles.corners], strips])
        tint, notes = _tint(vertex, face, faces, triangles.polygon)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    F = len(faces)
    normals = np.zeros((F, 3, 3), np.float32)
    if {"nx", "ny", "nz"} <= vertex.keys():
        given = np.stack([vertex[axis] for axis in ("nx", "ny", "nz")], 1)
        normals = finite(given.astype(float))[faces]
    color = GREY if tint is None else (1.0, 1.0, 1.0)
    tint = np.ones((F, 3, 3), np.float32) if tint is None else tint
    for names in COORDINATES:
        if set(names) <= vertex.keys() | face.keys():
            notes.append(f"it has texture coordinates ({' '.join(names)}) and no texture")
    notes = [f"{name}: {note}" for note in notes] + triangles.notes(name)
    uv = np.zeros((F, 3, 2), np.float32)
    material = np.zeros(F, np.int32)
    return assemble(
        name, vertices, faces, normals, uv, tint, material, [Material(color)], notes, up=Z_UP
    )


def _tint(
    vertex: dict, face: dict, faces: np.ndarray, polygon: np.ndarray
) -> tuple[np.ndarray | None, list[str]]:
    """Colours [F, 3, 3] of corners, None without any, and what of the file's is not shown.

    The first faces are of the polygons `polygon`, the others of strips. ValueError for a colour
    out of range.
    """
    notes = []
    for table in (vertex, face):
        if "alpha" in table:
            alpha, _ = unit_colors(table["alpha"][:, None], "alpha of row")
            if (alpha < 1).any() and not notes:
                notes.append("the alpha of its colours is not shown")
    for table, what in ((vertex, "vertex"), (face, "face")):
        names = next((rgb for rgb in COLORS if set(rgb) <= table.keys()), None)
        if names is None:
            continue
        colors, note = unit_colors(np.stack([table[channel] for channel in names], 1), what)
        if note:
            notes.append(note)
        if what == "vertex":
            return colors.astype(np.float32)[faces], notes
        tint = np.full((len(faces), 3, 3), GREY, np.float32)
        tint[: len(polygon)] = colors.astype(np.float32)[polygon][:, None]
        return tint, notes
    return None, notes


def _corners(face: dict) -> tuple[np.ndarray, np.ndarray]:
    """The vertices [N] of all polygons, one after the other, and how many each has [M]."""
    lists = next((face[field] for field in CORNERS if field in face), None)
    if lists is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return lists.values.astype(np.int64), lists.sizes


def _strips(element: dict) -> np.ndarray:
    """Triangles [F, 3] of strips: every other one is turned, and -1 begins another strip."""
    row, sizes = _corners(element)
    # each list ends as if -1 stood behind it
    ends = np.cumsum(sizes)
    row = np.insert(row, ends, -1)
    if len(row) < 3:
        return np.zeros((0, 3), np.int64)
    place = np.arange(len(row))
    begin = np.maximum.accumulate(np.where(row == -1, place + 1, 0))
    k = np.arange(len(row) - 2)
    odd = (k - begin[:-2]) % 2
    triangles = np.stack([row[k], row[k + 1 + odd], row[k + 2 - odd]], 1)
    a, b, c = triangles.T
    whole = (a != -1) & (b != -1) & (c != -1)
    # a corner twice: writers join strips so
    return triangles[whole & (a != b) & (b != c) & (c != a)]


def _header(data: bytes) -> tuple[list[_Element], str, memoryview]:
    """Elements, byte order ("" for text) and what follows the header."""
    end = re.search(rb"^end_header[ \t]*(\r\n|\n|\r)", data, re.MULTILINE)
    if not re.match(rb"ply\s", data) or end is None:
        raise ValueError(f"no PLY header in its {len(data)} bytes")
    elements = []
    order = None
    for line in data[: end.start()].decode("latin-1").splitlines()[1:]:
        words = line.split()
        if words[:1] == ["format"] and words[1] in FORMATS:
            order = FORMATS[words[1]]
        elif words[:1] == ["element"]:
            if len(words) != 3:
                raise ValueError(f"header line {line!r} is not understood")
            elements.append(_Element(words[1], int(words[2]), {}))
            if elements[-1].count < 0:
                raise ValueError(f"header line {line!r}: a negative number of rows")
        elif words[:1] == ["property"] and elements:
            _property(elements[-1], words[1:], line)
        elif words[:2] == ["comment", "TextureFile"]:
            raise ValueError(
                f"its texture {' '.join(words[2:])!r} is not supported: convert it to GLB"
            )
        elif words and words[0] not in ("comment", "obj_info"):
            raise ValueError(f"header line {line!r} is not understood")
    if order is None:
        raise ValueError("its header names no known format")
    return elements, order, memoryview(data)[end.end() :]


def _property(element: _Element, words: list[str], line: str) -> None:
    """Add the property that a header line names.

    Raises ValueError where it is not of the kind that its name asks for.
    """
    is_list = words[0] == "list"
    if len(words) != (4 if is_list else 2) or not set(words[:-1]) - {"list"} <= TYPES.keys():
        raise ValueError(f"header line {line!r} is not understood")
    name = words[-1]
    kind = TYPES[words[-2]]
    length = TYPES[words[1]] if is_list else None
    if name in element.fields:
        raise ValueError(f"header line {line!r}: there is a property of that name already")
    if is_list and length[0] == "f":
        raise ValueError(f"header line {line!r}: the length of a list is a whole number")
    if is_list and name in NUMBERS:
        raise ValueError(f"header line {line!r}: {name} is a number, not a list")
    if name in CORNERS and (not is_list or kind[0] == "f"):
        raise ValueError(f"header line {line!r}: the corners of a face are a list of whole numbers")
    element.fields[name] = kind, length


def _typed(values: np.ndarray, kind: str) -> np.ndarray:
    """The numbers in a type of TYPES; ValueError where it cannot hold one."""
    if kind[0] != "f":
        wrong = (
            (values != np.rint(values))
            | (values < np.iinfo(kind).min)
            | (values > np.iinfo(kind).max)
        )
        if wrong.any():
            raise ValueError(f"{values[wrong][0]} is no number of type {np.dtype(kind)}")
    with np.errstate(over="ignore"):  # infinite is what follows, and is refused where it matters
        return values.astype(kind)


def _text(body: memoryview, elements: list[_Element]) -> dict[str, dict]:
    words = bytes(body).split()
    at = 0
    tables = {}
    for element in elements:
        numbers = {name: array("d") for name in element.fields}
        sizes = {name: array("q") for name in element.fields}
        left = len(words) - at
        if element.count * len(numbers) > left:
            raise ValueError(
                f"truncated: element {element.name} has {element.count} rows of at least "
                f"{len(numbers)} numbers, {left} are left"
            )
        for row in range(element.count if numbers else 0):
            for name, (_, length) in element.fields.items():
                size = 1
                if length and at < len(words):
                    size = int(words[at])
                    at += 1
                if not 0 <= size <= len(words) - at:
                    raise ValueError(
                        f"truncated: it has {row} of {element.count} rows of element {element.name}"
                    )
                numbers[name].extend(map(float, words[at : at + size]))
                sizes[name].append(size)
                at += size
        columns = tables[element.name] = {}
        for name, (kind, length) in element.fields.items():
            values = _typed(np.array(numbers[name]), kind)
            columns[name] = _Lists(values, np.array(sizes[name])) if length else values
    return tables


def _binary(body: memoryview, elements: list[_Element], order: str) -> dict[str, dict]:
    at = 0
    tables = {}
    for element in elements:
        tables[element.name], at = _rows(body, at, element, order)
    return tables


def _rows(body: memoryview, at: int, element: _Element, order: str) -> tuple[dict, int]:
    """Read the columns of an element that begins at byte `at`, and where it ends.

    Rows of one length are read in one go.
    """
    least = sum(np.dtype(length or kind).itemsize for kind, length in element.fields.values())
    if element.count * least > len(body) - at:
        raise ValueError(
            f"truncated: element {element.name} needs {element.count * least} bytes, "
            f"{len(body) - at} are left"
        )
    sizes = {}
    here = at
    for name, (kind, length) in element.fields.items():  # list lengths of the first row
        if length and element.count:
            first = np.frombuffer(body[here : here + np.dtype(length).itemsize], order + length)
            sizes[name] = int(first[0]) if len(first) else 0
            here += np.dtype(length).itemsize
        here += np.dtype(kind).itemsize * sizes.get(name, 1)
    row = []
    for name, (kind, length) in element.fields.items():
        if length:
            row.append((f"#{name}", order + length))
        row.append((name, order + kind, (sizes.get(name, 0),)) if length else (name, order + kind))
    needed = here - at if element.count else 0
    needed *= element.count
    if min(sizes.values(), default=0) >= 0 and at + needed <= len(body):
        table = np.frombuffer(body[at : at + needed], np.uint8)
        table = table.view(row) if needed else np.zeros(0, row)
        if all((table[f"#{name}"] == size).all() for name, size in sizes.items()):
            columns = {
                name: _Lists(table[name].ravel(), np.full(len(table), sizes.get(name, 0)))
                if length
                else table[name]
                for name, (_, length) in element.fields.items()
            }
            return columns, at + needed
    return _uneven(body, at, element, order)


def _uneven(body: memoryview, at: int, element: _Element, order: str) -> tuple[dict, int]:
    """The same of rows of several lengths."""
    begins = {name: array("q") for name in element.fields}
    sizes = {name: array("q") for name, (_, length) in element.fields.items() if length}
    steps = [
        (name, np.dtype(kind).itemsize, struct.Struct(order + LENGTHS[length]) if length else None)
        for name, (kind, length) in element.fields.items()
    ]
    for number in range(element.count):
        for name, width, length in steps:
            size = 1
            if length:
                size = length.unpack_from(body, at)[0] if at + length.size <= len(body) else -1
                at += length.size
                sizes[name].append(size)
            begins[name].append(at)
            at += width * size
            if size < 0 or at > len(body):
                raise ValueError(
                    f"truncated: it has {number} of {element.count} rows of element {element.name}"
                )
    columns = {}
    for name, (kind, length) in element.fields.items():
        counts = np.array(sizes[name]) if length else np.ones(element.count, np.int64)
        values = _gathered(body, np.array(begins[name]), counts, np.dtype(order + kind))
        columns[name] = _Lists(values, counts) if length else values
    return columns, at


def _gathered(
    body: memoryview, begins: np.ndarray, counts: np.ndarray, kind: np.dtype
) -> np.ndarray:
    """The numbers of rows that begin at bytes `begins` [M], `counts` [M] of each: [sum]."""
    data = np.frombuffer(body, np.uint8)
    made = np.empty(int(counts.sum()), kind)
    filled = 0
    for first in range(0, len(begins), ROWS):
        rows = slice(first, first + ROWS)
        count = counts[rows]
        inner = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        place = np.repeat(begins[rows], count) + inner * kind.itemsize
        parts = data[place[:, None] + np.arange(kind.itemsize)]
        made[filled : filled + len(place)] = parts.view(kind)[:, 0]
        filled += len(place)
    return made
