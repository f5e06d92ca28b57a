"""Textured meshes from files: OBJ with its MTL and images read here, GLB and glTF in
train.meshes.gltf, PLY in train.meshes.ply.

Everything is flat after reading: F triangles over P vertices, and per corner a normal, a texture
coordinate and a tint. z is up in the datasets and in PLY, y in OBJ and glTF: their (x, y, z)
becomes (x, -z, y). Nothing is repaired or thrown away silently: what cannot be shown as its author
meant it is a ValueError with the file's name, or a line in `Mesh.notes`.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from train.meshes.gltf import gltf_files, read_gltf
from train.meshes.ply import read_ply
from train.meshes.surface import Material, Mesh, assemble, decode, find
from train.meshes.untrusted import reading

READABLE = (".obj", ".glb", ".gltf", ".ply")
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


def read_mesh(path: Path) -> Mesh:
    """Read one file of READABLE; a ValueError names the file and what is wrong with it."""
    if path.suffix.lower() not in READABLE:
        raise ValueError(
            f"{path.name}: unknown extension {path.suffix or '(none)'}; known are "
            f"{', '.join(READABLE)}"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty")
    reader = {".obj": _read_obj, ".ply": read_ply}.get(path.suffix.lower(), read_gltf)
    # what is not finite is refused
    with reading(path.name), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return reader(path)


def content_hash(path: Path) -> str:
    """sha256 over the file and every file that it names (MTL, images, glTF buffers); of a file that
    names none, its own.

    Raises OSError for what is no file, ValueError, with its name, for a file whose names cannot be
    read.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is not a file")  # a pipe or a device would never end
    with reading(path.name):
        return _digest(path)


def _digest(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes())
    parts = []
    if path.suffix.lower() == ".obj":
        for value in _values(path, "mtllib"):
            for library in _libraries(path.parent, value).values():
                maps = _values(library, "map_Kd") + _values(library, "map_d") if library else []
                parts += [library, *(find(library.parent, _map_name(value)[0]) for value in maps)]
    elif path.suffix.lower() in (".glb", ".gltf"):
        parts = [find(path.parent, name) for name in gltf_files(path)]
    for part in parts:  # each by its own digest: where one ends counts, and whether it is there
        digest.update(hashlib.sha256(part.read_bytes()).digest() if part else b"absent")
    return digest.hexdigest()


def normalize(mesh: Mesh) -> tuple[float, np.ndarray]:
    """Move the mesh into [-0.5, 0.5]^3 in place, its largest side 1 and its box centred; returns
    (scale, offset [3]).

    p becomes p * scale + offset, the two numbers that transforms.json records.
    """
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    with np.errstate(over="ignore"):
        side = (high - low).max()
    if not side > 0:
        raise ValueError(f"all {len(mesh.vertices)} vertices are the same point")
    if not 1e-150 < side < 1e150:
        raise ValueError(
            f"its largest side is {side:.3g}, too small or too large for double precision"
        )
    scale = 1 / side
    offset = -(low + high) / 2 * scale
    mesh.vertices = mesh.vertices * scale + offset
    return float(scale), offset


def _text(path: Path) -> list[str]:
    return (
        path.read_bytes()
        .decode("utf-8", "surrogateescape")
        .replace("\\\r\n", " ")
        .replace("\\\n", " ")
        .splitlines()
    )


def _values(path: Path, keyword: str) -> list[str]:
    """What follows a keyword, line by line."""
    lines = [line.split(None, 1) for line in _text(path)]
    return [words[1] for words in lines if len(words) == 2 and words[0].lower() == keyword.lower()]


def _libraries(folder: Path, value: str) -> dict[str, Path | None]:
    """The files of one mtllib statement: a single name, which may hold blanks, or several."""
    whole = find(folder, value)
    return {value.strip(): whole} if whole else {name: find(folder, name) for name in value.split()}


def _map_name(value: str) -> tuple[str, str | None]:
    """The file name of a map statement, and the first option in front of it that changes where the
    image lands.
    """
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
    """Material name -> its statements (lower-case keyword -> rest of the line); the last of a
    repeated statement counts.
    """
    found, current = {}, {}
    for line in _text(path):
        keyword, _, value = (
            line.strip().partition(" ")
            if "\t" not in line
            else line.strip().replace("\t", " ").partition(" ")
        )
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
    """map_Kd replaces Kd; opacity is d, or 1 - Tr, times the image's alpha or map_d."""
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
    return Material(
        color if len(color) == 3 else color[:1] * 3, min(max(opacity, 0.0), 1.0), texture
    )


def _read_obj(path: Path) -> Mesh:
    positions = []
    uvs = []
    normals = []
    tints = []
    corners = []
    face_material = []
    libraries = {}
    names = {}
    current = None
    tables = (positions, uvs, normals)
    for number, line in enumerate(_text(path), 1):
        words = line.split()
        if not words:
            continue
        keyword = words[0]
        try:
            if keyword == "v":
                positions.append([float(x) for x in words[1:4]])
                tints.append([float(x) for x in words[4:7]] if len(words) >= 7 else (1.0, 1.0, 1.0))
                if len(words) < 4:
                    raise ValueError(f"a vertex of {len(words) - 1} numbers")
            elif keyword == "vt":
                uvs.append([float(words[1]), float(words[2]) if len(words) > 2 else 0.0])
            elif keyword == "vn":
                normals.append([float(words[1]), float(words[2]), float(words[3])])
            elif keyword == "f":
                polygon = [_corner(word, tables) for word in words[1:]]
                # a fan: exact for the convex polygons that OBJ files hold
                for i in range(1, len(polygon) - 1):
                    corners.append((polygon[0], polygon[i], polygon[i + 1]))
                    face_material.append(current)
            elif keyword == "usemtl":
                name = line.split(None, 1)[1].strip() if len(words) > 1 else ""
                current = names.setdefault(name, len(names))
            elif keyword == "mtllib":
                for entry, library in _libraries(path.parent, line.split(None, 1)[1]).items():
                    if library is None:
                        raise ValueError(f"material file {entry!r} does not exist")
                    libraries |= _read_mtl(library)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error
    notes = [
        f"{path.name}: material {name!r} is defined nowhere; shown grey"
        for name in names
        if name not in libraries
    ]
    materials = [
        _material(path.parent, n, libraries[n]) if n in libraries else Material() for n in names
    ] + [Material()]
    # [F, corner, (position, uv, normal)], -1 where absent
    index = np.array(corners, np.int64).reshape(-1, 3, 3)
    tint = np.array(tints, np.float32).reshape(-1, 3)

    def pick(table: list, column: int, width: int) -> np.ndarray:
        rows = np.array([*table, [0.0] * width], np.float64)  # the last row answers -1
        return rows[index[..., column]]

    vertices = np.array(positions, np.float64).reshape(-1, 3)
    material = np.array([len(materials) - 1 if m is None else m for m in face_material], np.int32)
    bare = set(material[(index[..., 1] < 0).any(1)])
    textured = [name for name, m in names.items() if m in bare and materials[m].texture is not None]
    notes += [
        f"{path.name}: faces of textured material {name!r} have no texture coordinates"
        for name in textured
    ]
    corner_tint = tint[index[..., 0]] if len(tint) else tint.reshape(0, 3, 3)
    corner = (pick(normals, 2, 3), pick(uvs, 1, 2), corner_tint)
    return assemble(path.name, vertices, index[..., 0], *corner, material, materials, notes)


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
