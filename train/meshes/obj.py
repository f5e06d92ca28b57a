"""OBJ files as triangles, with their MTL files and images."""

import re
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from train.meshes.budget import Budget
from train.meshes.colors import unit_colors
from train.meshes.files import Places, read_lines
from train.meshes.mtl import Library, TiledFinish, libraries, mtl_files, values
from train.meshes.pictures import Placement
from train.meshes.polygons import triangulate
from train.meshes.surface import GREY, Material, Mesh, assemble
from train.meshes.untrusted import reason

NUMERIC = ("v", "vt", "vn", "f")  # statements that a comment may follow; names may hold a #
# of what has no polygons: what a note calls it
NOT_SHOWN = {"l": "lines", "p": "points", "curv": "curves", "curv2": "curves", "surf": "surfaces"}
FACE = 600  # bytes that a triangle of a polygon takes at most
MATERIAL = 2000  # bytes of one without its pictures
KNOWN = 1 << 16  # corners that are remembered: those of one vertex stand near each other
TILES_ACROSS = 10  # UDIM: tile 1001 + u + 10 v


def obj_files(path: Path, root: Path) -> Iterator[Path | None]:
    """Yield the MTL files and images that an OBJ names; None for one that is absent."""
    places = Places((path.parent,), root)
    known = {}
    for value in values(path, "mtllib"):
        for library in libraries(places, value).values():
            yield library
            if library and library not in known:
                known[library] = mtl_files(library, path.parent, root)
            yield from known[library] if library else ()


class _Statements:
    """The statements of an OBJ file, as they stand."""

    def __init__(self, path: Path, root: Path, budget: Budget):
        self.path = path
        self.places = Places((path.parent,), root)
        self.budget = budget
        self.budget.count(path)
        self.positions = array("d")
        self.uvs = array("d")
        self.normals = array("d")
        self.colors = array("d")
        self.colored = array("q")  # the vertices that have them
        self.painted = array("d")  # colours of #MRGB lines, of the vertices in their order
        self.corners = array("q")  # (position, uv, normal) of each, -1 where absent
        self.known: dict[str, tuple] = {}  # of late corners, what their words mean
        self.sizes = array("q")  # of polygons
        self.materials = array("q")  # of each, its number
        self.names: dict[str, int] = {}  # of materials
        self.current = -1  # the material in use
        self.library = Library(path, root, self.budget)
        self.notes: dict[str, None] = {}  # an ordered set

    def note(self, text: str) -> None:
        self.notes[f"{self.path.name}{text}"] = None

    def add(self, number: int, line: str) -> None:
        """Take in a line; ValueError or IndexError where it is malformed."""
        words = line.split()
        keyword = words[0]
        if "#" in line and keyword in NUMERIC:
            words = line.partition("#")[0].split()
        if keyword == "v":
            self._vertex(words)
        elif keyword == "vt":
            self.uvs.append(float(words[1]))
            self.uvs.append(float(words[2]) if len(words) > 2 else 0.0)
        elif keyword == "vn":
            self.normals.extend((float(words[1]), float(words[2]), float(words[3])))
        elif keyword == "f":
            known = self.known
            for word in words[1:]:
                corner = known.get(word)
                self.corners.extend(self._corner(word) if corner is None else corner)
            self.sizes.append(len(words) - 1)
            self.materials.append(self.current)
        elif keyword == "usemtl":
            name = line.split(None, 1)[1].strip() if len(words) > 1 else ""
            self.current = self.names.setdefault(name, len(self.names))
        elif keyword == "mtllib":
            if len(words) < 2:
                self.note(f", line {number}: mtllib names no file")
                return
            for entry, library in libraries(self.places, line.split(None, 1)[1]).items():
                if library is None:
                    self.note(f", line {number}: material file {entry!r} does not exist")
                else:
                    self.library.read(library)
        elif keyword == "#MRGB":
            self._paint(number, words[1:])
        elif keyword in NOT_SHOWN:
            self.note(f": its {NOT_SHOWN[keyword]} are not shown")

    def _corner(self, word: str) -> tuple[int, int, int]:
        """`position/uv/normal`, each from 1, negative ones from the end; -1 where absent."""
        counts = (len(self.positions) // 3, len(self.uvs) // 2, len(self.normals) // 3)
        found = [-1, -1, -1]
        for column, digits in enumerate(word.split("/")[:3]):
            if digits:
                i = int(digits)
                size = counts[column]
                found[column] = i - 1 if i > 0 else size + i
                if not 0 <= found[column] < size:
                    raise ValueError(f"{word!r} points at row {i} of {size}")
        if found[0] < 0:
            raise ValueError(f"{word!r} names no vertex")
        if "-" not in word:  # the others depend on where they stand
            if len(self.known) > KNOWN:
                self.known.clear()
            self.known[word] = tuple(found)
        return tuple(found)

    def _vertex(self, words: list[str]) -> None:
        if len(words) < 4:
            raise ValueError(f"a vertex of {len(words) - 1} numbers")
        self.positions.extend((float(words[1]), float(words[2]), float(words[3])))
        if len(words) >= 7:
            color = [float(word) for word in words[4:7]]
            if not np.isfinite(color).all():
                raise ValueError(f"the vertex colour {' '.join(words[4:7])!r} is no number")
            self.colors.extend(color)
            self.colored.append(len(self.positions) // 3 - 1)

    def _paint(self, number: int, words: list[str]) -> None:
        """Take in the colours that ZBrush writes: MMRRGGBB of vertex after vertex."""
        digits = "".join(words)
        if len(digits) % 8 or not re.fullmatch("[0-9a-fA-F]*", digits):
            self.note(f", line {number}: #MRGB is not understood")
            return
        data = bytes.fromhex(digits)
        self.painted.extend(value / 255 for i, value in enumerate(data) if i % 4)

    def tints(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Colours [P, 3] of all vertices, and which have one [P]; None where no vertex has."""
        P = len(self.positions) // 3
        colors = np.ones((P, 3))
        known = np.zeros(P, bool)
        if self.colored:
            rows = np.array(self.colored)
            given, note = unit_colors(np.array(self.colors).reshape(-1, 3), "vertex")
            colors[rows] = given
            known[rows] = True
            if note:
                self.note(f": {note}")
        elif self.painted:
            given = np.array(self.painted).reshape(-1, 3)
            if len(given) != P:
                self.note(f": #MRGB lines have {len(given)} colours for {P} vertices")
            colors[: len(given)] = given[:P]
            known[: len(given)] = True
        return (colors, known) if known.any() else None


def read_obj(path: Path, root: Path, budget: Budget) -> Mesh:
    """Read a .obj with its MTL files and images; a ValueError names the file and the line.

    The files that it names lie below `root`.
    """
    found = _Statements(path, root, budget)
    for number, line in read_lines(path):
        if not line or line.isspace():
            continue
        try:
            found.add(number, line)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path.name}, line {number}: {reason(error)}") from error
    fans = len(found.corners) // 3 - 2 * len(found.sizes)
    try:
        found.budget.take(len(found.names) * MATERIAL, f"{len(found.names)} materials")
        found.budget.take_faces(max(fans, 0), len(found.positions) // 3, FACE)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    positions = np.array(found.positions).reshape(-1, 3)
    # [N, (position, uv, normal)], -1 where absent
    corners = np.array(found.corners, np.int64).reshape(-1, 3)
    triangles = triangulate(positions[corners[:, 0]], np.array(found.sizes, np.int64))
    index = corners[triangles.corners]
    material = np.array(found.materials, np.int64)[triangles.polygon]
    material[material < 0] = len(found.names)  # faces before the first usemtl
    finishes = []
    for name in found.names:
        finish = found.library.finish(name)
        if finish is None:
            found.note(f": material {name!r} is defined nowhere; shown grey")
        finishes.append(finish or TiledFinish(Material(), plain=True))
    finishes.append(TiledFinish(Material(), plain=True))
    tint = _tint(found, np.array([finish.plain for finish in finishes])[material], index)
    for finish in finishes:
        if finish.plain and tint is not None:
            finish.material.color = (1.0, 1.0, 1.0)
    _note_bare(found, finishes, material[(index[..., 1] < 0).any(1)])
    uv = _pick(found.uvs, index[..., 1], 2)
    emission_uv = _placed(uv, material, [finish.emission_placement for finish in finishes])
    uv = _placed(uv, material, [finish.placement for finish in finishes])
    for number, name in enumerate(found.names):
        _use_tiles(found, finishes, name, material, uv, np.flatnonzero(material == number))
    return assemble(
        path.name,
        positions,
        index[..., 0],
        _pick(found.normals, index[..., 2], 3),
        uv,
        np.ones(index.shape) if tint is None else tint,
        material,
        [finish.material for finish in finishes],
        [*found.notes, *found.library.notes, *triangles.notes(path.name)],
        emission_uv=None if np.array_equal(emission_uv, uv) else emission_uv,
    )


def _tint(found: _Statements, plain: np.ndarray, index: np.ndarray) -> np.ndarray | None:
    """Colours [F, 3, 3] of the corners of faces; None where no vertex has one.

    On faces whose material has no colour (`plain` [F]) a vertex without one is grey.
    """
    try:
        tints = found.tints()
    except ValueError as error:
        raise ValueError(f"{found.path.name}: {error}") from error
    if tints is None:
        return None
    colors, known = tints
    grey = plain[:, None] & ~known[index[..., 0]]
    return np.where(grey[..., None], GREY, colors[index[..., 0]])


def _note_bare(found: _Statements, finishes: list[TiledFinish], bare: np.ndarray) -> None:
    """Note the textured materials of faces without texture coordinates: `bare`, their numbers."""
    bare = set(bare.tolist())
    for number, name in enumerate(found.names):
        material = finishes[number].material
        textured = material.texture is not None or material.emission_texture is not None
        if number in bare and textured:
            found.note(f": faces of textured material {name!r} have no texture coordinates")


def _placed(uv: np.ndarray, material: np.ndarray, placements: list[Placement]) -> np.ndarray:
    """Move texture coordinates [F, 3, 2] to where each face's material places its image."""
    moved = uv
    for number, placement in enumerate(placements):
        if placement != Placement():
            if moved is uv:
                moved = uv.copy()
            here = material == number
            moved[here] = placement(uv[here])
    return moved


def _use_tiles(
    found: _Statements,
    finishes: list[TiledFinish],
    name: str,
    material: np.ndarray,
    uv: np.ndarray,
    faces: np.ndarray,
) -> None:
    """Give the faces of a material that lie in other tiles of its image materials with those.

    Changes `material` [F] and `uv` [F, 3, 2] in place, and appends to `finishes`. A tile is left
    out where its image is absent: a single image is repeated, as everywhere.
    """
    own = finishes[found.names[name]]
    if len(own.tiles) < 2 or not len(faces):
        return
    square = np.floor(uv[faces].mean(1)).astype(np.int64)
    number = 1001 + square[:, 0] + TILES_ACROSS * square[:, 1]
    number[(square < 0).any(1) | (square[:, 0] >= TILES_ACROSS)] = 0  # in no tile
    for tile in np.unique(number).tolist():
        if tile not in own.tiles:
            where = f"tile {tile}" if tile else "tiles that cannot be"
            found.note(f": {where} of material {name!r} does not exist; tile 1001 is shown")
            continue
        here = faces[number == tile]
        uv[here] -= square[number == tile][:, None]
        if tile != 1001:
            texture = found.library.tile(name, own.tiles[tile])
            finishes.append(replace(own, material=replace(own.material, texture=texture)))
            material[here] = len(finishes) - 1
        shown = finishes[material[here[0]]].material
        shown.sampler = replace(shown.sampler, wrap=("clamp", "clamp"))


def _pick(table: array, rows: np.ndarray, width: int) -> np.ndarray:
    """Rows of a table of `width` numbers; zeros for row -1."""
    values = np.zeros((len(table) // width + 1, width))  # the last row answers -1
    values[:-1] = np.array(table).reshape(-1, width)
    return values[rows]
