"""MTL files: the materials of an OBJ, with their images."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from train.meshes.budget import Budget
from train.meshes.files import Places, below, read_lines, spellings
from train.meshes.pictures import Placement, Sampler, changed, decode
from train.meshes.surface import Finish, Material

MAPS = ("map_Kd", "map_d", "map_Ke")  # the statements that name an image which is shown
# of map statements: how many words follow each. They change no colour, or are applied below
OPTIONS = {
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
MOVES = ("-s", "-o", "-t")  # one to three numbers follow
LONG = 4096  # characters of a map statement: longer ones name no file
CHANNELS = {"r": 0, "g": 1, "b": 2, "m": 3}  # of -imfchan
UNKNOWN = 3  # so many words at most belong to an option that is not known
TILE = re.compile(r"(.*[._-])(?:1001|<UDIM>)(\.[^.]+)", re.IGNORECASE)


@dataclass
class TiledFinish(Finish):
    """A material as an OBJ uses it, with the tiles (UDIM) of its image by number, from 1001."""

    tiles: dict[int, Path] = field(default_factory=dict)
    plain: bool = False  # it has no colour of its own: those of vertices count alone


@dataclass
class _Map:
    """The value of a map statement: the names that may be meant, and the options before them."""

    names: list[str]
    options: dict[str, list[str]]
    unknown: list[str]

    def numbers(self, option: str, rest: float) -> tuple[float, float]:
        """The first two numbers of -s or -o; `rest` for those that are absent."""
        words = [*map(float, self.options.get(option, [])), rest, rest]
        return words[0], words[1]

    @property
    def placement(self) -> Placement:
        return Placement(self.numbers("-s", 1.0), self.numbers("-o", 0.0))

    @property
    def change(self) -> tuple[float, float] | None:
        """The numbers of -mm, base and gain; None where they change nothing."""
        base, gain = _numbers("-mm", self.options.get("-mm") or ["0", "1"], 2)
        return None if (base, gain) == (0, 1) else (base, gain)

    @property
    def sampler(self) -> Sampler:
        clamped = self.options.get("-clamp", ["off"])[0].lower() == "on"
        return Sampler(wrap=("clamp", "clamp") if clamped else ("repeat", "repeat"))


def _parse_map(value: str) -> _Map:
    """Tell the options of a map statement from its file name, which may hold blanks."""
    rest = value.strip()
    if len(rest) > LONG:
        raise ValueError(f"a statement of {len(rest)} characters, over the limit of {LONG}")
    names = [rest]
    options = {}
    unknown = []
    while found := re.match(r"(-[A-Za-z]+)\s+(?=\S)", rest):
        option = found[1].lower()
        rest = rest[found.end() :]
        pattern = r"([-+.\deE]+)\s+(?=\S)" if option in MOVES else r"(\S+)\s+(?=\S)"
        count = 3 if option in MOVES else OPTIONS.get(option, 0)
        options[option] = []
        while len(options[option]) < count and (word := re.match(pattern, rest)):
            if option in MOVES and not _is_number(word[1]):
                break
            options[option].append(word[1])
            rest = rest[word.end() :]
        if option not in OPTIONS and option not in MOVES:
            unknown.append(option)
            # its words end before the next option, if there is one
            if words := re.match(r"(?:[^-\s]\S*\s+){0,3}(?=-[A-Za-z]+\s)", rest):
                rest = rest[words.end() :]
    names.append(rest)
    for _ in range(UNKNOWN if unknown else 0):
        rest = rest.partition(" ")[2].strip()
        names.append(rest)
    names += [name.partition(" #")[0] for name in names if " #" in name]
    return _Map([name for name in dict.fromkeys(names) if name], options, unknown)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _locate(value: str, places: Places) -> Path | None:
    """Find the image of a map statement; ValueError where a name of it leads out of the root."""
    found = (places.find(name) for name in _parse_map(value).names)
    return next((path for path in found if path), None)


def libraries(places: Places, value: str) -> dict[str, Path | None]:
    """Find the files of one mtllib statement: a single name, which may hold blanks, or several.

    Raises ValueError for a name that leads out of the root.
    """
    whole = places.find(value)
    if whole:
        return {value.strip(): whole}
    return {name: places.find(name) for name in value.partition(" #")[0].split()}


def values(path: Path, keyword: str) -> list[str]:
    """List the rest of every line that begins with a keyword, in any case."""
    lines = [line.split(None, 1) for _, line in read_lines(path)]
    return [words[1] for words in lines if len(words) == 2 and words[0].lower() == keyword.lower()]


def mtl_files(path: Path, folder: Path, root: Path) -> list[Path | None]:
    """List the images, and tiles of them, that an MTL of an OBJ in `folder` names; None: absent."""
    places = Places((path.parent, folder), root)
    statements = [value for keyword in MAPS for value in values(path, keyword)]
    found = [_locate(value, places) for value in statements]
    for value in statements:
        found += [tile for number, tile in _tiles(value, places).items() if number != 1001]
    return found


def _tiles(value: str, places: Places) -> dict[int, Path]:
    """The tiles (UDIM) beside an image whose name holds 1001 or <UDIM>, by their numbers."""
    for name in _parse_map(value).names:
        parts = TILE.fullmatch(name)
        first = parts and places.find(f"{parts[1]}1001{parts[2]}")
        if first:
            own = TILE.fullmatch(first.name)
            tile = re.compile(f"{re.escape(own[1])}(1\\d\\d\\d){re.escape(own[2])}", re.IGNORECASE)
            beside = ((tile.fullmatch(file.name), file) for file in sorted(first.parent.iterdir()))
            return {int(found[1]): below(places.root, file) for found, file in beside if found}
    return {}


class Library:
    """The materials of the MTL files of one OBJ."""

    def __init__(self, owner: Path, root: Path, budget: Budget):
        self.folder = owner.parent
        self.name = owner.name
        self.root = root
        self.budget = budget
        self.notes: dict[str, None] = {}  # an ordered set
        self._statements: dict[str, dict[str, str]] = {}
        self._places: dict[str, Places] = {}  # where each MTL's images are looked for
        self._last: Path | None = None
        self._pictures: dict[str, np.ndarray] = {}
        self._masked: dict[tuple, np.ndarray] = {}  # by picture, mask, and what is made of it

    def read(self, path: Path) -> None:
        """Add the materials of an MTL; of a repeated name or statement the last counts."""
        if path == self._last:  # some writers name it before every group
            return
        self._last = path
        self.budget.count(path)
        self._places[path.name] = Places((path.parent, self.folder), self.root)
        current = {}
        for _, line in read_lines(path):
            keyword, _, value = line.strip().replace("\t", " ").partition(" ")
            if keyword == "newmtl":
                current = {"": path.name}
                for spelling in spellings(value.strip()):
                    self._statements[spelling] = current
                self._statements.setdefault(value.partition(" #")[0].strip(), current)
            elif keyword and not keyword.startswith("#"):
                current[keyword.lower()] = value.strip()

    def finish(self, name: str) -> TiledFinish | None:
        """Make a material; None where no MTL defines it. Raises ValueError that names it."""
        names = [*spellings(name), name.partition(" #")[0].strip()]
        known = [spelling for spelling in names if spelling in self._statements]
        if not known:
            return None
        statements = self._statements[known[0]]
        owner = statements[""]
        try:
            color = _numbers("Kd", statements.get("kd", "0.8 0.8 0.8"))
            emission = _numbers("Ke", statements.get("ke", "0 0 0"))
            opacity = self._opacity(name, statements)
        except ValueError as error:
            raise ValueError(f"{owner}: material {name!r}: {error}") from error
        material = Material(color, min(max(opacity, 0.0), 1.0), emission=emission)
        shown = dict(self._maps(owner, name, statements))
        made = TiledFinish(material, plain="kd" not in statements and "map_kd" not in shown)
        if "map_kd" in shown:
            own, path = shown["map_kd"]
            material.color = (1.0, 1.0, 1.0)
            material.texture = self._picture(owner, name, own, path)
            material.sampler = replace(own.sampler, change=own.change)
            made.placement = own.placement
            made.tiles = _tiles(statements["map_kd"], self._places[owner])
        if "map_d" in shown and shown["map_d"][1] != shown.get("map_kd", (None, None))[1]:
            own, path = shown["map_d"]
            if material.texture is None:
                made.placement = own.placement
                material.sampler = own.sampler
            elif own.placement != made.placement:
                self._note(f"map_d of material {name!r} is placed as its map_Kd")
            mask = self._picture(owner, name, own, path)
            material.texture = self._with_mask(material.texture, mask, own)
        if "map_ke" in shown:
            own, path = shown["map_ke"]
            material.emission = (1.0, 1.0, 1.0)
            material.emission_texture = self._picture(owner, name, own, path)
            material.emission_sampler = replace(own.sampler, opaque=True, change=own.change)
            made.emission_placement = own.placement
        if material.opacity == 0 or (
            material.texture is not None and not material.texture[..., 3].any()
        ):
            self._note(f"material {name!r} is wholly transparent: its faces are not seen")
        return made

    def _note(self, text: str) -> None:
        self.notes[f"{self.name}: {text}"] = None

    def _opacity(self, name: str, statements: dict[str, str]) -> float:
        """Opacity is d, or 1 - Tr: but many writers say `Tr 1` of what is opaque."""
        if "d" in statements:
            return _numbers("d", statements["d"].split()[-1:], 1)[0]
        transparency = _numbers("Tr", statements.get("tr", "0"), 1)[0]
        if transparency < 1:
            return 1 - transparency
        if "map_kd" in statements or self._nothing_left:
            self._note(f"material {name!r} says Tr 1 and no d: it is shown opaque")
            return 1.0
        return 0.0

    @cached_property
    def _nothing_left(self) -> bool:
        """True where no material without d would be seen if each Tr were believed."""
        others = [s.get("tr", "0") for s in self._statements.values() if "d" not in s]
        return all(_is_number(tr) and float(tr) >= 1 for tr in others)

    def _maps(
        self, owner: str, name: str, statements: dict[str, str]
    ) -> Iterator[tuple[str, tuple[_Map, Path]]]:
        """The map statements of a material that name an image, with what they say and its file."""
        for keyword in map(str.lower, MAPS):
            if keyword not in statements:
                continue
            value = statements[keyword]
            if not value:
                self._note(f"{keyword} of material {name!r} names no image")
                continue
            parsed = _parse_map(value)
            try:
                path = _locate(value, self._places[owner])
                if path is None and TILE.fullmatch(parsed.names[-1]):
                    path = _tiles(value, self._places[owner]).get(1001)
            except ValueError as error:
                raise ValueError(f"{owner}: texture of material {name!r}: {error}") from error
            if path is None:
                wanted = parsed.names[1 if len(parsed.names) > 1 else 0]
                raise ValueError(f"{owner}: texture {wanted!r} of material {name!r} does not exist")
            lost = parsed.unknown + ["-t"] * any(map(float, parsed.options.get("-t", [])))
            for option in lost:
                self._note(f"texture option {option} of material {name!r} is not applied")
            yield keyword, (parsed, path)

    def _picture(self, owner: str, name: str, own: _Map, path: Path) -> np.ndarray:
        """An image, decoded once for all materials that show it."""
        place = os.path.realpath(path)
        label = f"{own.names[1 if len(own.names) > 1 else 0]!r} of material {name!r}"
        if place not in self._pictures:
            self._pictures[place] = decode(path, owner, label, self.budget)
        return self._pictures[place]

    def _with_mask(self, texture: np.ndarray | None, mask: np.ndarray, own: _Map) -> np.ndarray:
        """A texture whose alpha is multiplied with a mask; each of a picture and a mask once."""
        key = (id(texture), id(mask), own.change, tuple(own.options.get("-imfchan", ())))
        if key not in self._masked:
            size = mask.nbytes if texture is None else texture.nbytes
            # the mask as large as the texture, its share and the products of both, for a while
            self.budget.check(5 * size, f"{self.name}: a texture with its map_d")
            values = changed(mask, *own.change) if own.change else mask
            self._masked[key] = _masked(texture, _mask(values, own))
            self.budget.take(size, f"{self.name}: a texture with its map_d")
        return self._masked[key]

    def tile(self, name: str, path: Path) -> np.ndarray:
        """Read a tile of a material's image."""
        place = os.path.realpath(path)
        if place not in self._pictures:
            label = f"{path.name!r} of material {name!r}"
            self._pictures[place] = decode(path, self.name, label, self.budget)
        return self._pictures[place]


def _numbers(keyword: str, value: str | list[str], count: int = 3) -> tuple[float, ...]:
    """The numbers of a statement, one of them for all; ValueError where one is none or not finite.

    Words behind them, such as comments, do not count.
    """
    words = value.split()[:count] if isinstance(value, str) else value
    words = words[: next((i for i, word in enumerate(words) if word.startswith("#")), count)]
    numbers = tuple(map(float, words))
    if not numbers or not np.isfinite(numbers).all():
        raise ValueError(f"{keyword} {' '.join(words)!r} is no number")
    return numbers if len(numbers) == count else numbers[:1] * count


def _mask(pixels: np.ndarray, own: _Map) -> Image.Image:
    """The opacity in an image of map_d: its luminance, or the channel that -imfchan names."""
    channel = CHANNELS.get(own.options.get("-imfchan", ["l"])[0].lower())
    if channel is None:
        return Image.fromarray(pixels).convert("L")
    return Image.fromarray(np.ascontiguousarray(pixels[..., channel]))


def _masked(texture: np.ndarray | None, mask: Image.Image) -> np.ndarray:
    """A texture whose alpha is multiplied with a mask of any size; None: a white one."""
    if texture is None:
        texture = np.full((mask.height, mask.width, 4), 255, np.uint8)
    share = np.asarray(mask.resize(texture.shape[1::-1]), np.float32) / 255
    alpha = np.rint(texture[..., 3:] * share[..., None]).astype(np.uint8)
    return np.concatenate([texture[..., :3], alpha], -1)
