"""The meshes that a command prepares: found, hashed, and what became of each."""

from dataclasses import dataclass, replace
from pathlib import Path

from train.data.metadata import inside
from train.meshes.read import CONVERTIBLE, READABLE, content_hash


@dataclass(frozen=True)
class Source:
    """A mesh to prepare."""

    path: Path
    identifier: str  # its name in the metadata
    split: str = "train"
    caption: str = ""
    sha256: str = ""  # of its content; empty until it is read
    converted: Path | None = None  # the file that is read in place of `path`

    @property
    def file(self) -> Path:
        """The file that is read."""
        return self.converted or self.path


@dataclass
class Result:
    """The outcome for a source: a metadata row, or the reason why there is none."""

    source: Source
    row: dict | None = None
    failure: str = ""
    notes: tuple[str, ...] = ()
    made: bool = False  # False: an earlier run had finished it
    seconds: float = 0.0  # that it took


def collect(inputs: list[Path], root: Path) -> list[Source]:
    """List the sources in files, folders and lists, in their order.

    The lines of lists are relative to `root`. Raises ValueError where there is nothing.
    """
    sources = []
    for entry in inputs:
        if entry.is_dir():
            sources += _in_folder(entry)
        elif entry.suffix.lower() == ".txt":
            sources += _in_list(entry, root)
        else:
            sources.append(Source(entry, entry.name))
    if not sources:
        raise ValueError(f"no meshes in {', '.join(map(str, inputs))}")
    return sources


def _in_folder(folder: Path) -> list[Source]:
    known = READABLE + CONVERTIBLE
    files = (path for path in folder.rglob("*") if path.suffix.lower() in known)
    found = sorted(path for path in files if path.is_file())
    if not found:
        raise ValueError(f"{folder} holds no {', '.join(known)} file")
    return [Source(path, path.relative_to(folder).as_posix()) for path in found]


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
            sources.append(Source(inside(root, path), path, split, caption))
        except ValueError as error:
            raise ValueError(
                f"{file.name}: {error}: --root says what its lines are relative to"
            ) from error
    return sources


def with_path(source: Source, message: str) -> str:
    """Put the path of a mesh, as the user gave it, before a message about it.

    The message may begin with the file's name.
    """
    rest = message.removeprefix(source.path.name)
    return f"{source.path}: {message}" if rest == message else f"{source.path}{rest}"


def hash_sources(sources: list[Source]) -> tuple[list[list[Source]], list[Result]]:
    """Hash the content of sources, and group those of one content.

    Also returns a Result for each source that cannot be read.
    """
    copies = {}
    refused = []
    for source in sources:
        try:
            # names of files can be any bytes
            if source.identifier.encode(errors="replace").decode() != source.identifier:
                raise ValueError("its name is not UTF-8")
            hashed = replace(source, sha256=content_hash(source.file))
        except OSError as error:
            reason = error.strerror or str(error)
            if error.filename is not None and Path(error.filename) != source.path:
                reason = f"{error.filename}: {reason}"
            refused.append(Result(source, failure=with_path(source, reason)))
        except ValueError as error:
            refused.append(Result(source, failure=with_path(source, str(error))))
        else:
            copies.setdefault(hashed.sha256, []).append(hashed)
    return list(copies.values()), refused
