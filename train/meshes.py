"""Textured meshes from files: OBJ with its MTL and images read here, GLB and glTF through trimesh (scene transforms applied).

Everything is flat after reading: F triangles over P vertices, and per corner a normal, a texture coordinate and a tint.
y is up in these files and z in the datasets: (x, y, z) becomes (x, -z, y). Nothing is repaired or thrown away silently:
what cannot be shown as its author meant it is a ValueError with the file's name, or a line in `Mesh.notes`.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image, UnidentifiedImageError

READABLE = (".obj", ".glb", ".gltf")
GREY = (0.8, 0.8, 0.8)  # a face without a material, as most viewers show it
MAP_OPTIONS = {"-blendu": 1, "-blendv": 1, "-boost": 1, "-bm": 1, "-cc": 1, "-clamp": 1, "-imfchan": 1, "-texres": 1, "-mm": 2}


@dataclass
class Material:
    """What colours a surface: `texture` (rows from the top, uint8 RGBA [H, W, 4]) times `color` and `opacity`."""

    color: tuple[float, float, float] = GREY
    opacity: float = 1.0
    texture: np.ndarray | None = None


@dataclass
class Mesh:
    """Triangles in a z-up frame; `normals` is zero at corners whose file gives none."""

    vertices: np.ndarray  # [P, 3] float64, every one used by a face
    faces: np.ndarray  # [F, 3] int32
    normals: np.ndarray  # [F, 3, 3] float32, corner normals
    uv: np.ndarray  # [F, 3, 2] float32, v upwards
    tint: np.ndarray  # [F, 3, 3] float32, vertex colours, 1 where the file has none
    material: np.ndarray  # [F] int32 into `materials`
    materials: list[Material]
    notes: list[str] = field(default_factory=list)


def read_mesh(path: Path) -> Mesh:
    """Read one file of READABLE; a ValueError names the file and what is wrong with it."""
    if path.suffix.lower() not in READABLE:
        raise ValueError(f"{path.name}: unknown extension {path.suffix or '(none)'}; known are {', '.join(READABLE)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty")
    return _read_obj(path) if path.suffix.lower() == ".obj" else _read_scene(path)


def content_hash(path: Path) -> str:
    """sha256 over the file and every file that it names (MTL, images, glTF buffers), missing ones as nothing."""
    digest, parts = hashlib.sha256(path.read_bytes()), []
    if path.suffix.lower() == ".obj":
        for value in _values(path, "mtllib"):
            for library in filter(None, _libraries(path.parent, value).values()):
                images = [_map_name(name)[0] for name in _values(library, "map_Kd") + _values(library, "map_d")]
                parts += [library, *(_find(library.parent, name) for name in images)]
    elif path.suffix.lower() == ".gltf":
        parts = [_find(path.parent, name) for name in _gltf_files(path)]
    for part in filter(None, parts):
        digest.update(part.read_bytes())
    return digest.hexdigest()


def normalize(mesh: Mesh) -> tuple[float, np.ndarray]:
    """Move the mesh into [-0.5, 0.5]^3 in place, its largest side 1 and its box centred; returns (scale, offset [3]).

    p becomes p * scale + offset, the two numbers that transforms.json records.
    """
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    if not (high - low).max() > 0:
        raise ValueError(f"all {len(mesh.vertices)} vertices are the same point")
    scale = 1 / (high - low).max()
    offset = -(low + high) / 2 * scale
    mesh.vertices = mesh.vertices * scale + offset
    return float(scale), offset


def _mesh(name: str, vertices, faces, normals, uv, tint, material, materials, notes=()) -> Mesh:
    """Checks shared by all formats, unused vertices dropped, y-up turned to z-up."""
    if len(faces) == 0:
        raise ValueError(f"{name} has no faces")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"{name}: a face uses vertex {faces.max() + 1} of {len(vertices)}")
    used, faces = np.unique(faces, return_inverse=True)
    vertices = vertices[used]
    bad = np.flatnonzero(~np.isfinite(vertices).all(1))
    if len(bad):
        raise ValueError(f"{name}: {len(bad)} of {len(vertices)} vertices are not finite, the first is vertex {used[bad[0]] + 1}")
    up = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], float)
    return Mesh(
        vertices=vertices @ up.T,
        faces=faces.reshape(-1, 3).astype(np.int32),
        normals=np.nan_to_num(normals @ up.T).astype(np.float32),
        uv=np.nan_to_num(uv, posinf=0, neginf=0).astype(np.float32),
        tint=np.asarray(tint, np.float32),
        material=np.asarray(material, np.int32),
        materials=materials,
        notes=list(notes),
    )


def _text(path: Path) -> list[str]:
    return path.read_bytes().decode("utf-8", "surrogateescape").replace("\\\r\n", " ").replace("\\\n", " ").splitlines()


def _find(folder: Path, name: str) -> Path | None:
    """A file that an OBJ or MTL names, with either slash and in any case: such files travelled through Windows."""
    path = folder / name.strip().strip('"').replace("\\", "/")
    for candidate in (path, folder / path.name):  # an absolute path of the author's machine: the file beside the mesh
        if candidate.is_file():
            return candidate
        if candidate.parent.is_dir():
            for found in sorted(candidate.parent.iterdir()):
                if found.name.lower() == candidate.name.lower() and found.is_file():
                    return found
    return None


def _values(path: Path, keyword: str) -> list[str]:
    """What follows a keyword, line by line."""
    lines = [line.split(None, 1) for line in _text(path)]
    return [words[1] for words in lines if len(words) == 2 and words[0].lower() == keyword.lower()]


def _libraries(folder: Path, value: str) -> dict[str, Path | None]:
    """The files of one mtllib statement: a single name, which may hold blanks, or several."""
    whole = _find(folder, value)
    return {value.strip(): whole} if whole else {name: _find(folder, name) for name in value.split()}


def _gltf_files(path: Path) -> list[str]:
    document = json.loads(path.read_text())
    entries = [*document.get("buffers", []), *document.get("images", [])]
    return [unquote(e["uri"]) for e in entries if not e.get("uri", "data:").startswith("data:")]


def _map_name(value: str) -> tuple[str, str | None]:
    """The file name of a map statement, and the first option in front of it that changes where the image lands."""
    words, moved = value.split(), None
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
        raise ValueError(f"{owner}: texture option {moved} of material {material!r} is not supported")
    path = _find(folder, name)
    if path is None:
        raise ValueError(f"{owner}: texture {name!r} of material {material!r} does not exist")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGBA"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{owner}: texture {name!r} of material {material!r} cannot be read: {error}") from error


def _read_mtl(path: Path) -> dict[str, dict[str, str]]:
    """Material name -> its statements (lower-case keyword -> rest of the line); the last of a repeated statement counts."""
    found, current = {}, {}
    for line in _text(path):
        keyword, _, value = line.strip().partition(" ") if "\t" not in line else line.strip().replace("\t", " ").partition(" ")
        if keyword == "newmtl":
            current = found[value.strip()] = {"": path.name}
        elif keyword and not keyword.startswith("#"):
            current[keyword.lower()] = value.strip()
    return found


def _material(folder: Path, name: str, statements: dict[str, str]) -> Material:
    """map_Kd replaces Kd; opacity is d, or 1 - Tr, times the image's alpha or map_d."""
    owner = statements[""]
    try:
        color = tuple(float(x) for x in statements.get("kd", "0.8 0.8 0.8").split()[:3])
        opacity = float(statements["d"].split()[-1]) if "d" in statements else 1 - float(statements.get("tr", "0"))
    except ValueError as error:
        raise ValueError(f"{owner}: material {name!r}: {error}") from error
    texture = None
    if "map_kd" in statements:
        color, texture = (1.0, 1.0, 1.0), _image(folder, owner, statements["map_kd"], name)
    if "map_d" in statements and statements["map_d"] != statements.get("map_kd"):
        mask = Image.fromarray(_image(folder, owner, statements["map_d"], name)).convert("L")
        if texture is None:
            texture = np.full((mask.height, mask.width, 4), 255, np.uint8)
        mask = np.asarray(mask.resize(texture.shape[1::-1]), np.float32) / 255
        texture = np.concatenate([texture[..., :3], np.rint(texture[..., 3:] * mask[..., None]).astype(np.uint8)], -1)
    return Material(color if len(color) == 3 else color[:1] * 3, min(max(opacity, 0.0), 1.0), texture)


def _read_obj(path: Path) -> Mesh:
    positions, uvs, normals, tints, corners, face_material = [], [], [], [], [], []
    libraries, names, current = {}, {}, None
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
                for i in range(1, len(polygon) - 1):  # a fan: exact for the convex polygons that OBJ files hold
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
    notes = [f"{path.name}: material {name!r} is defined nowhere; shown grey" for name in names if name not in libraries]
    materials = [_material(path.parent, n, libraries[n]) if n in libraries else Material() for n in names] + [Material()]
    index = np.array(corners, np.int64).reshape(-1, 3, 3)  # [F, corner, (position, uv, normal)], -1 where absent
    tint = np.array(tints, np.float32).reshape(-1, 3)

    def pick(table: list, column: int, width: int) -> np.ndarray:
        rows = np.array([*table, [0.0] * width], np.float64)  # the last row answers -1
        return rows[index[..., column]]

    vertices = np.array(positions, np.float64).reshape(-1, 3)
    material = np.array([len(materials) - 1 if m is None else m for m in face_material], np.int32)
    bare = set(material[(index[..., 1] < 0).any(1)])
    textured = [name for name, m in names.items() if m in bare and materials[m].texture is not None]
    notes += [f"{path.name}: faces of textured material {name!r} have no texture coordinates" for name in textured]
    corner_tint = tint[index[..., 0]] if len(tint) else tint.reshape(0, 3, 3)
    corner = (pick(normals, 2, 3), pick(uvs, 1, 2), corner_tint)
    return _mesh(path.name, vertices, index[..., 0], *corner, material, materials, notes)


def _corner(word: str, tables) -> tuple[int, int, int]:
    """`position/uv/normal` of a face, each from 1, negative ones from the end; -1 where absent."""
    found = [-1, -1, -1]
    for column, digits in enumerate(word.split("/")[:3]):
        if digits:
            i, size = int(digits), len(tables[column])
            found[column] = i - 1 if i > 0 else size + i
            if not 0 <= found[column] < size:
                raise ValueError(f"{word!r} points at row {i} of {size}")
    if found[0] < 0:
        raise ValueError(f"{word!r} names no vertex")
    return tuple(found)


def _read_scene(path: Path) -> Mesh:
    """GLB and glTF: metallic-roughness base colour (texture times factor times vertex colour), alpha mode respected."""
    import trimesh

    try:
        missing = [name for name in (_gltf_files(path) if path.suffix.lower() == ".gltf" else []) if not _find(path.parent, name)]
        if missing:
            raise ValueError(f"{missing[0]!r} does not exist")
        scene = trimesh.load_scene(path)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read: {type(error).__name__}: {error}") from error
    parts, materials = [], []
    start = 0
    for node in scene.graph.nodes_geometry:
        transform, geometry = scene.graph[node]
        part = scene.geometry[geometry]
        if not isinstance(part, trimesh.Trimesh) or len(part.faces) == 0:
            continue
        faces, shape = np.asarray(part.faces), (len(part.faces), 3, 3)
        vertices = trimesh.transform_points(part.vertices, transform)
        normals = np.zeros(shape)
        if "vertex_normals" in part._cache:  # given by the file: trimesh would otherwise average across hard edges
            normals = (np.asarray(part.vertex_normals) @ np.linalg.inv(transform[:3, :3]))[faces]
        visual, uv, tint = part.visual, np.zeros((len(faces), 3, 2)), np.ones(shape)
        if visual.kind == "texture":
            if visual.uv is not None:
                uv = np.asarray(visual.uv)[faces]
            colors = visual.vertex_attributes.get("color")
            if colors is not None:
                tint = np.asarray(colors)[faces][..., :3] / (255 if np.asarray(colors).dtype == np.uint8 else 1)
            materials.append(_pbr(visual.material))
        else:
            if visual.kind == "vertex":
                tint = np.asarray(visual.vertex_colors)[faces][..., :3] / 255
            elif visual.kind == "face":
                tint = np.asarray(visual.face_colors)[:, None, :3].repeat(3, 1) / 255
            materials.append(Material(GREY if visual.kind is None else (1.0, 1.0, 1.0)))
        parts.append((vertices, faces + start, normals, uv, tint, np.full(len(faces), len(materials) - 1)))
        start += len(vertices)
    if not parts:
        raise ValueError(f"{path.name} has no faces")
    return _mesh(path.name, *(np.concatenate(column) for column in zip(*parts, strict=True)), materials)


def _pbr(material) -> Material:
    factor, image = getattr(material, "baseColorFactor", None), getattr(material, "baseColorTexture", None)
    factor = np.ones(4) if factor is None else np.asarray(factor, float) / (255 if np.asarray(factor).dtype == np.uint8 else 1)
    texture = None if image is None else np.array(image.convert("RGBA"))
    mode = (getattr(material, "alphaMode", None) or "OPAQUE").upper()
    if texture is not None and mode != "BLEND":
        cutoff = getattr(material, "alphaCutoff", None)
        kept = texture[..., 3] >= 255 * (0.5 if cutoff is None else cutoff)
        texture[..., 3] = np.where(kept | (mode == "OPAQUE"), 255, 0)
    return Material(tuple(float(x) for x in factor[:3]), float(factor[3]) if mode == "BLEND" else 1.0, texture)
