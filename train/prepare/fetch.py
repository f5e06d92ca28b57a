"""Get a file of the network whole, and unpack Debian packages, without tools of the system."""

import hashlib
import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from models.files import PARTIAL
from train.data.metadata import inside
from train.run.progress import Progress

CHUNK = 1 << 20  # bytes read at once
TIMEOUT = 60.0  # seconds without an answer
MAGIC = b"!<arch>\n"
ENTRY = 60  # bytes of the header of a file in an ar archive


def checked(file: Path, sha256: str) -> Path:
    """Return the file if it has this sha256; ValueError that names both where it has not."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{file} has sha256 {found}, not {sha256}: another version, or damaged")
    return file


def download(url: str, file: Path, sha256: str, tag: str = "") -> Path:
    """Get a file, or the rest of it where an earlier run was interrupted.

    `tag` tells processes apart that may want it at once. Raises ValueError that names the address
    where it cannot be had, ends early or is not what its sha256 says (then nothing is kept).
    """
    if file.is_file():
        return checked(file, sha256)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + tag + PARTIAL)
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0  # this server sends whole files only
            size = have + int(answer.headers.get("Content-Length", 0))
            _store(answer, partial, have, size)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise ValueError(f"{url}: {reason}") from error
    if partial.stat().st_size < size:
        raise ValueError(
            f"{url} ended after {partial.stat().st_size:,} of {size:,} bytes: the same command "
            "goes on"
        )
    try:
        checked(partial, sha256)
    except ValueError:
        partial.unlink()
        raise
    partial.replace(file)
    return file


def _store(answer: BinaryIO, partial: Path, have: int, size: int) -> None:
    megabytes = lambda count: count // 1_000_000
    with (
        partial.open("r+b" if have else "wb") as stream,
        Progress(megabytes(size), megabytes(have), unit="MB") as bar,
    ):
        stream.seek(have)
        while chunk := answer.read(CHUNK):
            stream.write(chunk)
            have += len(chunk)
            if megabytes(have) > bar.done:
                bar.update(count=megabytes(have) - bar.done)


class _Window:
    """The next bytes of a stream, and then its end."""

    def __init__(self, stream: BinaryIO, size: int):
        self.stream = stream
        self.left = size

    def read(self, size: int) -> bytes:
        content = self.stream.read(min(size, self.left))
        self.left -= len(content)
        return content


@contextmanager
def debian_files(package: Path) -> Iterator[tarfile.TarFile]:
    """Open the files of a Debian package, to be read in their order.

    A package is an ar archive with a member data.tar.xz (or .gz, .bz2; .zst from Python 3.14 on).
    Raises ValueError that names the package where it is no such archive, or damaged.
    """
    try:
        with package.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise ValueError("it is no Debian package")
            while len(header := stream.read(ENTRY)) == ENTRY:
                name = header[:16].decode("latin1").strip().rstrip("/")
                size = int(header[48:58])
                if name.startswith("data.tar"):
                    kind = name.removeprefix("data.tar").lstrip(".")
                    with tarfile.open(fileobj=_Window(stream, size), mode=f"r|{kind}") as archive:
                        yield archive
                    return
                stream.seek(size + size % 2, 1)
            raise ValueError("it has no member data.tar")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ValueError(f"{package} cannot be unpacked: {error}") from error


def unzip(archive: Path, folder: Path, tag: str = "") -> None:
    """Unpack a zip archive to a folder, which appears once it is complete.

    `tag` tells processes apart that may do so at once. Raises ValueError for an archive that is
    damaged or whose names lead out of the folder.
    """
    partial = folder.with_name(folder.name + tag + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            for entry in content.infolist():
                if entry.is_dir():
                    continue
                target = inside(partial, entry.filename)
                target.parent.mkdir(parents=True, exist_ok=True)
                with content.open(entry) as source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream)
    except (zipfile.BadZipFile, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"{archive} cannot be unpacked: {error}") from error
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.is_dir():  # another process was faster
            raise
