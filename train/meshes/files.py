"""Files that mesh files name, and the lines of text files: one way for readers and content hash."""

import os
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

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


def find(folders: Path | Iterable[Path], name: str) -> Path | None:
    """Find a file that another one names: in the first of the folders that has it, else None.

    Such files travelled: either slash is taken, any case, composed and decomposed accents, and
    bytes that are not UTF-8 are tried in the encodings of `spellings`. An absolute path is of the
    author's machine: only the file of that name in one of the folders is taken for it.
    """
    folders = [folders] if isinstance(folders, Path) else list(folders)
    for spelling in spellings(name.strip().strip('"')):
        path = PurePosixPath(spelling.replace("\\", "/"))
        if not path.name or "\0" in spelling:
            continue
        absolute = path.is_absolute() or PureWindowsPath(path).drive
        candidates = [] if absolute else [folder / path for folder in folders]
        candidates += [folder / path.name for folder in folders]
        for candidate in candidates:
            found = _like(candidate)
            if found is not None:
                return found
    return None


def _like(candidate: Path) -> Path | None:
    """The file of that path, or else one in its folder whose name is spelled otherwise."""
    if candidate.is_file():
        return candidate
    if candidate.parent.is_dir():
        for found in sorted(candidate.parent.iterdir()):
            if _plain(found.name) == _plain(candidate.name) and found.is_file():
                return found
    return None


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


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Read the lines of a text file, each with the number of the line where it begins.

    A byte order mark decides the encoding, and without one it is UTF-8; bytes that are not become
    surrogates (PEP 383). NULs behind the text are padding. Lines that a backslash continues are
    joined. Raises ValueError where the text is not of the encoding of its mark.
    """
    data = path.read_bytes()
    encoding = "utf-8"
    for mark, marked in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            data = data[len(mark) :]
            encoding = marked
            break
    if encoding == "utf-8":
        text = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    else:
        try:
            text = data.decode(encoding).rstrip("\0")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name} begins as {encoding} and is not: {error}") from error
    if "\\" not in text:
        return list(enumerate(text.splitlines(), 1))
    lines = []
    begun = ""
    first = 1
    for number, line in enumerate(text.splitlines(), 1):
        if line.endswith("\\"):
            begun += line[:-1] + " "
            continue
        lines.append((first, begun + line))
        begun = ""
        first = number + 1
    if begun:
        lines.append((first, begun))
    return lines
