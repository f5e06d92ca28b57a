"""Files that mesh files name, and the lines of text files: one way for readers and content hash."""

import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path, PurePosixPath, PureWindowsPath

LONGEST = 255  # bytes of a name: file systems have no longer ones
LONGEST_PATH = 2000
ROOT_ADVICE = "--root names the folder that files may lie in"
BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}


def below(root: Path, path: Path) -> Path:
    """Return `path` if the place that it leads to, links followed, is `root` or lies below it.

    Links on the way to `root` itself are those of its owner, and count for both. Raises ValueError
    that names the path and that place for one that leads elsewhere.
    """
    try:
        place = Path(os.path.realpath(path))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no path: {error}") from error
    if not place.is_relative_to(os.path.realpath(root)):
        raise ValueError(f"{str(path)!r} leads out of {root}, to {str(place)!r}")
    return path


def read_file(path: Path) -> bytes:
    """Read a regular file; ValueError for anything else: a pipe or a device would never end."""
    # a pipe must not wait here for its writer
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    number = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ValueError(f"{path.name} is not a file")
        with open(number, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(number)


class Places:
    """The folders where the files that a file names are looked for, and the root of them all.

    Such files travelled: either slash is taken, any case, composed and decomposed accents, and
    bytes that are not UTF-8 are tried in the encodings of `spellings`. An absolute path is of the
    author's machine: only the file of that name in one of the folders is taken for it.
    """

    def __init__(self, folders: Iterable[Path], root: Path):
        self.folders = tuple(folders)
        self.root = root
        self._found: dict[str, Path | None] = {}
        self._listed: dict[Path, dict[str, list[Path]]] = {}

    def find(self, name: str) -> Path | None:
        """Find a file in the first of the folders that has it; None where none has.

        Raises ValueError for a name that leads out of the root, by dots or by links, unless one of
        the folders holds a file of that name.
        """
        if name not in self._found:
            self._found[name] = self._look_for(name)
        return self._found[name]

    def _look_for(self, name: str) -> Path | None:
        outside = None
        for spelling in spellings(name.strip().strip('"')):
            path = PurePosixPath(spelling.replace("\\", "/"))
            if not path.name or "\0" in spelling or _too_long(path):
                continue
            absolute = path.is_absolute() or PureWindowsPath(path).drive
            candidates = [] if absolute else [folder / path for folder in self.folders]
            candidates += [folder / path.name for folder in self.folders]
            for candidate in candidates:
                try:
                    found = self._like(below(self.root, candidate))
                    if found is not None:
                        return below(self.root, found)
                except ValueError as error:
                    outside = outside or error
        if outside:
            raise ValueError(f"{outside}: {ROOT_ADVICE}") from outside
        return None

    def _like(self, candidate: Path) -> Path | None:
        """The file of that path, or else one in its folder whose name is spelled otherwise."""
        if candidate.is_file():
            return candidate
        folder = candidate.parent
        if folder not in self._listed:
            listed = self._listed[folder] = {}
            for file in sorted(folder.iterdir()) if folder.is_dir() else ():
                listed.setdefault(_plain(file.name), []).append(file)
        alike = self._listed[folder].get(_plain(candidate.name), ())
        return next((file for file in alike if file.is_file()), None)


def _too_long(path: PurePosixPath) -> bool:
    parts = [part.encode(errors="replace") for part in path.parts]
    return max(map(len, parts)) > LONGEST or sum(map(len, parts)) > LONGEST_PATH


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def spellings(name: str) -> list[str]:
    """Decode a name of a text file in every way that it may be meant; as it stands first.

    Bytes that are not UTF-8 stand in it as surrogates (PEP 383).
    """
    found = [name]
    try:
        name.encode()
    except UnicodeEncodeError:
        data = name.encode("utf-8", "surrogateescape")
        for encoding in ("gb18030", "latin-1"):
            try:
                found.append(data.decode(encoding))
            except UnicodeDecodeError:
                continue
    return found


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, each with the number of the line where it begins.

    A byte order mark decides the encoding, and without one it is UTF-8; bytes that are not become
    surrogates (PEP 383). NULs behind the text are padding. Lines that a backslash continues are
    joined. Raises ValueError where the text is not of the encoding of its mark.
    """
    data = read_file(path)
    encoding = "utf-8"
    for mark, marked in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            data = data[len(mark) :]
            encoding = marked
            break
    if encoding == "utf-8":
        data = data.rstrip(b"\0")
    errors = "surrogateescape" if encoding == "utf-8" else "strict"
    begun = []
    first = 1
    number = 0
    # one line after the other: all of them at once take a hundred times the bytes of empty ones
    text = TextIOWrapper(BytesIO(data), encoding, errors)
    try:
        for number, line in enumerate(text, 1):
            line = line.rstrip("\n\0")
            if line.endswith("\\"):
                begun.append(line[:-1])
                continue
            yield first, " ".join([*begun, line]) if begun else line
            begun.clear()
            first = number + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} begins as {encoding} and is not: {error.reason}") from error
    if begun:
        yield first, " ".join([*begun, ""])
