"""OBJ files as triangles, with their MTL files and images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from train.meshes.surface import Material, Mesh, assemble, decode, find

MAP_OPTIONS = {
    "-blendu": 1,
    "-blendv": 1,
    "-boost": 1,
    "-bm": 1,
    "-cc": 1,
    "-clamp": 1,
    "-imfchan": 1,
    "-texres": 1,
    "-mm": 2,
}


def _text(path: Path) -> list[str]:
    """The lines of a file, those that a backslash continues joined."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    return text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines()


def obj_files(path: Path) -> list[Path | None]:
    """List the MTL files and images that an OBJ names; None for one that is absent."""
    found = []
    for value in _values(path, "mtllib"):
        for library in _libraries(path.parent, value).values():
            found.append(library)
            if library:
                maps = _values(library, "map_Kd") + _values(library, "map_d")
                found += [find(library.parent, _map_name(value)[0]) for value in maps]
    return found


def _values(path: Path, keyword: str) -> list[str]:
    """The rest of every line that begins with a keyword."""
    lines = [line.split(None, 1) for line in _text(path)]
    return [words[1] for words in lines if len(words) == 2 and words[0].lower() == keyword.lower()]


def _libraries(folder: Path, value: str) -> dict[str, Path | None]:
    """The files of one mtllib statement: a single name, which may hold blanks, or several."""
    whole = find(folder, value)
    return {value.strip(): whole} if whole else {name: find(folder, name) for name in value.split()}


def _map_name(value: str) -> tuple[str, str | None]:
    """The file name of a map statement, and the first option that moves the image."""
    words = value.split()
    moved = None
    while words and words[0].startswith("-") and len(words) > 1:
        option = words.pop(0)
        if option in ("-s", "-o", "-t"):
            moved = moved or option
            while len(words) > 1 and words[0].lstrip("-").replace(".", "", 1).isdigit():
                words.pop(0)
        else:
            del words[: MAP_OPTIONS.get(option, 0)]
    return (" ".join(words) if len(words) != len(value.split()) else value.strip()), moved


def _image(folder: Path, owner: str, value: str, material: str) -> np.ndarray:
    name, moved = _map_name(value)
    if moved:
        raise ValueError(
            f"{owner}: texture option {moved} of material {material!r} is not supported"
        )
    path = find(folder, name)
    if path is None:
        raise ValueError(f"{owner}: texture {name!r} of material {material!r} does not exist")
    return decode(path, owner, f"{name!r} of material {material!r}")


def _read_mtl(path: Path) -> dict[str, dict[str, str]]:
    """The statements of every material: name -> lower-case keyword -> rest of the line.

    The last of a repeated statement counts.
    """
    found = {}
    current = {}
    for line in _text(path):
        keyword, _, value = line.strip().replace("\t", " ").partition(" ")
        if keyword == "newmtl":
            current = found[value.strip()] = {"": path.name}
        elif keyword and not keyword.startswith("#"):
            current[keyword.lower()] = value.strip()
    return found


def _numbers(keyword: str, words: list[str]) -> tuple[float, ...]:
    """The numbers of a statement; ValueError where there is none or one is not finite."""
    numbers = tuple(map(float, words))
    if not numbers or not np.isfinite(numbers).all():
        raise ValueError(f"{keyword} {' '.join(words)!r} is no number")
    return numbers


def _material(folder: Path, name: str, statements: dict[str, str]) -> Material:
    """Make a material: map_Kd replaces Kd; opacity is d, or 1 - Tr, times image alpha or map_d."""
    owner = statements[""]
    try:
        color = _numbers("Kd", statements.get("kd", "0.8 0.8 0.8").split()[:3])
        if "d" in statements:
            opacity = _numbers("d", statements["d"].split()[-1:])[0]
        else:
            opacity = 1 - _numbers("Tr", [statements.get("tr", "0")])[0]
    except ValueError as error:
        raise ValueError(f"{owner}: material {name!r}: {error}") from error
    texture = None
    if "map_kd" in statements:
        color = (1.0, 1.0, 1.0)
        texture = _image(folder, owner, statements["map_kd"], name)
    if "map_d" in statements and statements["map_d"] != statements.get("map_kd"):
        mask = Image.fromarray(_image(folder, owner, statements["map_d"], name)).convert("L")
        if texture is None:
            texture = np.full((mask.height, mask.width, 4), 255, np.uint8)
        mask = np.asarray(mask.resize(texture.shape[1::-1]), np.float32) / 255
        texture = np.concatenate(
            [texture[..., :3], np.rint(texture[..., 3:] * mask[..., None]).astype(np.uint8)], -1
        )
    if len(color) != 3:  # one number is a grey
        color = color[:1] * 3
    return Material(color, min(max(opacity, 0.0), 1.0), texture)


@dataclass
class _Statements:
    """The statements of an OBJ file, as they stand."""

    positions: list[list[float]] = field(default_factory=list)
    tints: list[Sequence[float]] = field(default_factory=list)  # a colour for each position
    uvs: list[list[float]] = field(default_factory=list)
    normals: list[list[float]] = field(default_factory=list)
    # of triangles: three corners (position, uv, normal), and the number of the material
    corners: list[tuple] = field(default_factory=list)
    materials: list[int | None] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)  # of materials, numbered
    libraries: dict[str, dict[str, str]] = field(default_factory=dict)
    current: int | None = None  # the material in use

    def add(self, words: list[str], line: str, folder: Path) -> None:
        """Take in a line, split into words; ValueError or IndexError where it is malformed."""
        keyword = words[0]
        if keyword == "v":
            self.positions.append([float(x) for x in words[1:4]])
            tint = [float(x) for x in words[4:7]] if len(words) >= 7 else (1.0, 1.0, 1.0)
            self.tints.append(tint)
            if len(words) < 4:
                raise ValueError(f"a vertex of {len(words) - 1} numbers")
        elif keyword == "vt":
            self.uvs.append([float(words[1]), float(words[2]) if len(words) > 2 else 0.0])
        elif keyword == "vn":
            self.normals.append([float(words[1]), float(words[2]), float(words[3])])
        elif keyword == "f":
            tables = (self.positions, self.uvs, self.normals)
            polygon = [_corner(word, tables) for word in words[1:]]
            # a fan: exact for the convex polygons that OBJ files hold
            for i in range(1, len(polygon) - 1):
                self.corners.append((polygon[0], polygon[i], polygon[i + 1]))
                self.materials.append(self.current)
        elif keyword == "usemtl":
            name = line.split(None, 1)[1].strip() if len(words) > 1 else ""
            self.current = self.names.setdefault(name, len(self.names))
        elif keyword == "mtllib":
            for entry, library in _libraries(folder, line.split(None, 1)[1]).items():
                if library is None:
                    raise ValueError(f"material file {entry!r} does not exist")
                self.libraries |= _read_mtl(library)


def read_obj(path: Path) -> Mesh:
    """Read a .obj with its MTL files and images; a ValueError names the file and the line."""
    found = _Statements()
    for number, line in enumerate(_text(path), 1):
        words = line.split()
        if not words:
            continue
        try:
            found.add(words, line, path.parent)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error
    notes = [
        f"{path.name}: material {name!r} is defined nowhere; shown grey"
        for name in found.names
        if name not in found.libraries
    ]
    materials = [
        _material(path.parent, name, found.libraries[name])
        if name in found.libraries
        else Material()
        for name in found.names
    ]
    materials.append(Material())  # of faces before the first usemtl
    # [F, corner, (position, uv, normal)], -1 where absent
    index = np.array(found.corners, np.int64).reshape(-1, 3, 3)
    used = [len(materials) - 1 if m is None else m for m in found.materials]
    material = np.array(used, np.int32)
    bare = set(material[(index[..., 1] < 0).any(1)])
    notes += [
        f"{path.name}: faces of textured material {name!r} have no texture coordinates"
        for name, m in found.names.items()
        if m in bare and materials[m].texture is not None
    ]
    tint = np.array(found.tints, np.float32).reshape(-1, 3)
    return assemble(
        path.name,
        np.array(found.positions, np.float64).reshape(-1, 3),
        index[..., 0],
        _pick(found.normals, index[..., 2], 3),
        _pick(found.uvs, index[..., 1], 2),
        tint[index[..., 0]] if len(tint) else tint.reshape(0, 3, 3),
        material,
        materials,
        notes,
    )


def _pick(table: list, rows: np.ndarray, width: int) -> np.ndarray:
    """Rows of a table of `width` numbers; zeros for row -1."""
    values = np.array([*table, [0.0] * width], np.float64)  # the last row answers -1
    return values[rows]


def _corner(word: str, tables) -> tuple[int, int, int]:
    """`position/uv/normal` of a face, each from 1, negative ones from the end; -1 where absent."""
    found = [-1, -1, -1]
    for column, digits in enumerate(word.split("/")[:3]):
        if digits:
            i = int(digits)
            size = len(tables[column])
            found[column] = i - 1 if i > 0 else size + i
            if not 0 <= found[column] < size:
                raise ValueError(f"{word!r} points at row {i} of {size}")
    if found[0] < 0:
        raise ValueError(f"{word!r} names no vertex")
    return tuple(found)
