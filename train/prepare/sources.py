"""The meshes that a command prepares: found, hashed, and what became of each."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from train.data.metadata import inside
from train.meshes.files import ROOT_ADVICE, below
from train.meshes.read import CONVERTIBLE, READABLE, content_hash

LONGEST = 500  # characters of a message


@dataclass(frozen=True)
class Source:
    """A mesh to prepare."""

    path: Path
    identifier: str  # its name in the metadata
    split: str = "train"
    caption: str = ""
    sha256: str = ""  # of its content; empty until it is read
    converted: Path | None = None  # the file that is read in place of `path`
    root: Path | None = None  # it and the files that it names lie below; None: below its folder

    @property
    def file(self) -> Path:
        """The file that is read."""
        return self.converted or self.path

    @property
    def home(self) -> Path:
        """The folder that the files which it names lie below."""
        return self.converted.parent if self.converted else self.root or self.path.parent


@dataclass
class Result:
    """The outcome for a source: a metadata row, or the reason why there is none."""

    source: Source
    row: dict | None = None
    failure: str = ""
    notes: tuple[str, ...] = ()
    made: bool = False  # False: an earlier run had finished it
    seconds: float = 0.0  # that it took


def collect(inputs: list[Path], root: Path | None) -> list[Source]:
    """List the sources in files, folders and lists, in their order.

    The lines of lists are relative to `root`, without one to the working folder. A source and what
    it names lie below its root: `root` where there is one and the input lies below it, else the
    folder that is searched, or that of the file. Raises ValueError where there is nothing.
    """
    sources = []
    for entry in inputs:
        own = root if root is not None and _is_below(root, entry) else None
        if entry.is_dir():
            sources += _in_folder(entry, own or entry)
        elif entry.suffix.lower() == ".txt":
            sources += _in_list(entry, root or Path())
        else:
            sources.append(Source(entry, entry.name, root=own))
    if not sources:
        raise ValueError(f"no meshes in {', '.join(map(str, inputs))}")
    return sources


def _is_below(root: Path, path: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


def _in_folder(folder: Path, root: Path) -> list[Source]:
    known = READABLE + CONVERTIBLE
    files = (path for path in folder.rglob("*") if path.suffix.lower() in known)
    found = sorted(path for path in files if path.is_file())
    if not found:
        raise ValueError(f"{folder} holds no {', '.join(known)} file")
    return [Source(path, path.relative_to(folder).as_posix(), root=root) for path in found]


def _in_list(file: Path, root: Path) -> list[Source]:
    # as the names of files are read
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    sources = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        path, split, caption = [*line.split("\t"), "", ""][:3]
        split = split or "train"
        if split not in ("train", "test"):
            raise ValueError(f"{file.name}: split {split!r} of {path} is neither train nor test")
        try:
            sources.append(Source(inside(root, path), path, split, caption, root=root))
        except ValueError as error:
            raise ValueError(
                f"{file.name}: {error}: --root says what its lines are relative to"
            ) from error
    return sources


def with_path(source: Source, message: str) -> str:
    """Put the path of a mesh, as the user gave it, before a message about it.

    The message may begin with the file's name. What a file says may be of any length: it is cut.
    """
    rest = message.removeprefix(source.path.name)
    between = ": " if rest == message else ""
    cut = f"{rest[:LONGEST]}..." if len(rest) > LONGEST else rest
    return f"{source.path}{between}{cut}"


def hash_source(source: Source) -> Source | Result:
    """Add the hash of its content to a source; a Result with the reason where it has none."""
    try:
        # names of files can be any bytes
        if source.identifier.encode(errors="replace").decode() != source.identifier:
            raise ValueError("its name is not UTF-8")
        if source.root is not None and source.converted is None:
            try:
                below(source.root, source.path)
            except ValueError as error:
                raise ValueError(f"{error}: {ROOT_ADVICE}") from error
        return replace(source, sha256=content_hash(source.file, source.home))
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is not None and Path(error.filename) != source.path:
            reason = f"{error.filename}: {reason}"
        return Result(source, failure=with_path(source, reason))
    except ValueError as error:
        return Result(source, failure=with_path(source, str(error)))


def grouped(hashed: list[Source | Result]) -> tuple[list[list[Source]], list[Result]]:
    """Group the sources of one content, and take out the results of those that have no hash."""
    copies = {}
    for source in hashed:
        if isinstance(source, Source):
            copies.setdefault(source.sha256, []).append(source)
    return list(copies.values()), [result for result in hashed if isinstance(result, Result)]
