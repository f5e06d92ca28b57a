"""The models of Sweet Home 3D as sources: 820 textured OBJ files in a Debian package (120 MB).

    python -m train.prepare --fetch sweethome --out DIR
    python -m train.prepare --fetch sweethome --archive FILE.deb --out DIR

The package is kept in DIR/raw, unpacked beside, and known by its sha256. Its catalogues say what a
model is called, its category and who made it. The 40 models of train/assets/eval_ids.txt are the
test split of every dataset made of it; what is nearly the same as one of them (same creator and
category, same name but for a number at its end) is left out, so that no test object is trained on.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from models.files import whole
from train.prepare.fetch import checked, debian_files, download, unzip
from train.prepare.sources import Source

NAME = "sweethome3d-furniture"
VERSION = "1.8-1"
FILE = f"{NAME}_{VERSION}_all.deb"
URL = f"https://deb.debian.org/debian/pool/main/s/{NAME}/{FILE}"
OLDER = f"https://snapshot.debian.org/package/{NAME}/{VERSION}"  # where Debian keeps what it had
SHA256 = "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668"
CC0 = "CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/"
BY = "CC BY 3.0", "https://creativecommons.org/licenses/by/3.0/"
BY_US = "CC BY 3.0 US", "https://creativecommons.org/licenses/by/3.0/us/"
# licence, and whom to name beside the creator, of every library, as the package's file `copyright`
# and the libraries' LICENSE.TXT state them
LIBRARIES = {
    "BlendSwap-CC-0": (CC0, "https://www.blendswap.com"),
    "BlendSwap-CC-BY": (BY, "https://www.blendswap.com"),
    "KatorLegaz": (BY_US, "Andrew Kator & Jennifer Legaz"),
    "Reallusion": (BY_US, "https://www.reallusion.com"),
    "Scopia": (BY, "Scopia Visual Interfaces Systems, s.l., http://www.scopia.es"),
}
CATALOGUE = "PluginFurnitureCatalog.properties"
EVALUATION = Path(__file__).parents[1] / "assets" / "eval_ids.txt"
LEFT_OUT = "left out"


@dataclass(frozen=True)
class Model:
    """A model of the package."""

    identifier: str  # its path below DIR/raw
    library: str
    name: str
    category: str
    creator: str
    licence: tuple[str, str]  # name and address
    page: str  # where it was published, or nothing

    @property
    def group(self) -> tuple[str, str, str]:
        """Creator, category and name, which nearly equal models share."""
        stem = re.sub(r"[\d_-]+$", "", PurePosixPath(self.identifier).stem)
        return self.creator, self.category, stem.lower()


def sources(out: Path, archive: Path | None, tag: str = "") -> list[Source]:
    """Get and unpack the package, print its licences, and list its models with their split.

    Writes ATTRIBUTION.md. `archive` is the package on disk; without it, it is downloaded. Raises
    ValueError where it cannot be had, or is another.
    """
    raw = out / "raw"
    unpack(archive, raw, tag)
    models = [model for library in LIBRARIES for model in catalogue(raw, library)]
    split = splits(models)
    print("\n".join(licences(models, split)))
    with whole(out / "ATTRIBUTION.md", tag=tag) as partial:
        partial.write_text(attribution(models, split), encoding="utf-8")
    kept = [model for model in models if split[model] != LEFT_OUT]
    # of models with one content, the first is prepared
    kept.sort(key=lambda model: split[model] != "test")
    return [Source(raw / m.identifier, m.identifier, split[m], m.name) for m in kept]


def unpack(archive: Path | None, raw: Path, tag: str = "") -> None:
    """Put the libraries of the package into their folders below `raw`."""
    if all((raw / library).is_dir() for library in LIBRARIES):
        return
    try:
        package = checked(archive, SHA256) if archive else download(URL, raw / FILE, SHA256, tag)
    except ValueError as error:
        raise ValueError(f"{error}; --archive takes {FILE} from disk ({URL}, {OLDER})") from error
    raw.mkdir(parents=True, exist_ok=True)
    print(f"unpacking {package} to {raw}")
    with debian_files(package) as files:
        for entry in files:
            library = PurePosixPath(entry.name)
            if library.suffix != ".sh3f" or library.stem not in LIBRARIES or not entry.isfile():
                continue
            if (raw / library.stem).is_dir():
                continue
            packed = raw / f"{library.name}{tag}"
            packed.write_bytes(files.extractfile(entry).read())
            unzip(packed, raw / library.stem, tag)
            packed.unlink()
    if absent := [library for library in LIBRARIES if not (raw / library).is_dir()]:
        raise ValueError(f"{package} has no {', '.join(absent)}")


def catalogue(raw: Path, library: str) -> list[Model]:
    """List the models of a library, in the order of its catalogue.

    Raises ValueError that names the file where an entry lacks something or its model is absent.
    """
    file = raw / library / CATALOGUE
    entries: dict[int, dict[str, str]] = {}
    for key, value in properties(file).items():
        if match := re.fullmatch(r"(\w+)#(\d+)", key):
            entries.setdefault(int(match[2]), {})[match[1]] = value
    models = []
    for number, entry in sorted(entries.items()):
        if lacking := {"model", "name", "category", "creator"} - entry.keys():
            raise ValueError(f"{file}: model {number} has no {', '.join(sorted(lacking))}")
        identifier = f"{library}/{entry['model'].lstrip('/')}"
        if not (raw / identifier).is_file():
            raise ValueError(f"{file}: {identifier} is missing")
        words = (entry["name"], entry["category"], entry["creator"])
        own = licence((raw / identifier).parent, LIBRARIES[library][0])
        models.append(Model(identifier, library, *words, *own))
    return models


def licence(folder: Path, library: tuple[str, str]) -> tuple[tuple[str, str], str]:
    """Read a model's licence and the page where it was published.

    The licence is its library's, unless its own file asks for credit where the library does not:
    two models of BlendSwap-CC-0 do.
    """
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in (".txt", ".html"))
    text = "".join(file.read_text(encoding="latin1") for file in files)
    page = re.search(r"https?://(www\.)?blendswap\.com/blends?/view/\d+", text)
    credit = "Creative Commons Attribution" in text or "creativecommons.org/licenses/by/" in text
    return BY if credit and library == CC0 else library, page[0] if page else ""


def properties(file: Path) -> dict[str, str]:
    r"""Read a Java properties file: latin-1, key=value, \uXXXX, comments, lines that go on."""
    text = file.read_text(encoding="latin1")
    text = re.sub(r"\\\r?\n[ \t]*", "", text)
    found = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.lstrip().startswith(("#", "!")):
            found[_unescaped(key)] = _unescaped(value)
    return found


def _unescaped(text: str) -> str:
    code = lambda match: chr(int(match[1][1:], 16)) if len(match[1]) == 5 else match[1]
    return re.sub(r"\\(u[0-9a-fA-F]{4}|.)", code, text.strip())


def splits(models: list[Model]) -> dict[Model, str]:
    """Give every model its split: test, train, or left out where it is nearly a test model."""
    lines = EVALUATION.read_text(encoding="utf-8").splitlines()
    held_out = {line for line in lines if line and not line.startswith("#")}
    test = {model for model in models if model.identifier in held_out}
    groups = {model.group for model in test}
    near = {model for model in models if model.group in groups} - test
    return {m: "test" if m in test else LEFT_OUT if m in near else "train" for m in models}


def licences(models: list[Model], split: dict[Model, str]) -> list[str]:
    """Say in lines how many models of which licence there are."""
    lines = [f"{'library':16} {'licence':13} models  train  test  left out (nearly a test model)"]
    counts = Counter((m.library, m.licence[0], split[m]) for m in models)
    for library, name in dict.fromkeys((m.library, m.licence[0]) for m in models):
        train, test, left = (counts[library, name, s] for s in ("train", "test", LEFT_OUT))
        total = train + test + left
        lines.append(f"{library:16} {name:13} {total:6} {train:6} {test:5} {left:9}")
    return lines


def attribution(models: list[Model], split: dict[Model, str]) -> str:
    """Write the credits that the licences ask for, as Markdown."""
    lines = [
        "# Models of this dataset",
        "",
        f"Views, voxels, features and meshes here were made of the models of Sweet Home 3D in "
        f"Debian's package `{NAME}` {VERSION} (`{FILE}`, sha256 `{SHA256}`, {URL}), converted to "
        "OBJ by Emmanuel Puybaret / eTeks (https://www.sweethome3d.com). Changes: each is scaled "
        "and moved into the unit cube, turned to z upwards, lit, drawn from many sides and cut "
        "into voxels.",
        "",
        "| library | licence | credit beside the creator | models |",
        "|---|---|---|---|",
    ]
    counts = Counter((m.library, m.licence) for m in models)
    for (library, (name, link)), count in counts.items():
        lines.append(f"| {library} | [{name}]({link}) | {LIBRARIES[library][1]} | {count} |")
    columns = ("model", "creator", "library", "licence", "category", "split", "file", "page")
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for m in models:
        words = (m.name, m.creator, m.library, m.licence[0], m.category, split[m])
        cells = (*words, f"`{m.identifier}`", m.page)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join([*lines, ""])
