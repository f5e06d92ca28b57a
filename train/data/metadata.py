"""The files of a dataset: metadata.csv, and writing the others whole.

Names that come out of files (sha256, file_path, lines of a list) become paths here only, once they
are known to stay inside.
"""

import csv
import os
import re
import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from models.files import whole, write_whole
from models.reading import check_file, shown
from train.meshes.files import below

# cells of a table beyond the bytes of its file: a row has them even where its line is too short
CELLS = 1 << 20
LONGEST = 255  # bytes of a name: file systems have no longer ones
DEEPEST = 64  # parts of a path
PUBLISHED = [
    "sha256",
    "file_identifier",
    "local_path",
    "aesthetic_score",
    "captions",
    "rendered",
    "voxelized",
    "num_voxels",
]


def inside(folder: Path, name: str) -> Path:
    """Join a folder and a name that comes out of a file.

    Raises ValueError where the name is no relative path or leads out of the folder, by what it
    says: train.meshes.files.below follows links.
    """
    parts = PurePosixPath(name).parts
    leads_out = not parts or ".." in parts or name[0] == "/" or PureWindowsPath(name).drive
    # those of control write into the terminal of whoever reads a message
    if leads_out or any(one == "\\" or unicodedata.category(one) == "Cc" for one in name):
        raise ValueError(f"{shown(name)} is no path below {folder}")
    try:
        longest = max(len(os.fsencode(part)) for part in parts)
    except UnicodeEncodeError as error:  # half a surrogate pair
        raise ValueError(f"{shown(name)} is no name of a file: {error.reason}") from error
    if len(parts) > DEEPEST:
        raise ValueError(f"{shown(name)} has {len(parts)} parts, over {DEEPEST}")
    if longest > LONGEST:
        raise ValueError(
            f"{shown(name)} has a part of {longest} bytes, over the {LONGEST} of names"
        )
    return folder / name


def read_metadata(root: Path, name: str = "metadata.csv") -> list[dict[str, str]]:
    """Read the rows of ROOT/metadata.csv or another table there; an absent cell is "".

    Raises ValueError without the folder, the file or its sha256 column, and for a row whose sha256
    is not 64 digits 0-9 a-f: it is part of file names. (Capitals are refused as well: where case
    does not count, two rows would share their files.) And for a link that leads out of the folder,
    and a table with far more cells than the file has bytes.
    """
    file = root / name
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: no dataset there")
    check_file(below(root, file), f"is missing: {root} is not a dataset in the published layout")
    try:
        # spreadsheets put a byte order mark first
        with file.open(newline="", encoding="utf-8-sig") as stream:
            return _rows(csv.DictReader(stream), file)
    except (csv.Error, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _rows(reader: csv.DictReader, file: Path) -> list[dict[str, str]]:
    """The rows of a table; each has a cell in every column, however short its line is."""
    columns = reader.fieldnames or []
    if "sha256" not in columns:
        held = ", ".join(columns)[:200] or "nothing"
        raise ValueError(f"{file} has no column sha256, only: {held}")
    most = CELLS + file.stat().st_size
    rows = []
    for row in reader:
        if not re.fullmatch("[0-9a-f]{64}", row["sha256"] or ""):
            last = len(rows) + 1 + sum(1 for _ in reader)
            raise ValueError(
                f"{file}: sha256 of row {len(rows) + 1} of {last} is {shown(row['sha256'] or '')}, "
                "not 64 digits of 0-9 a-f"
            )
        rows.append({key: value or "" for key, value in row.items() if key})
        if len(rows) * len(columns) > most:
            raise ValueError(
                f"{file}: {len(rows)} rows of {len(columns)} columns are more than its bytes hold"
            )
    return rows


def write_metadata(out: Path, rows: list[dict], name: str = "metadata.csv", tag: str = "") -> None:
    """Merge rows into metadata.csv, or another table, by sha256.

    Rows and columns of earlier runs stay where `rows` say nothing of them. `tag` tells writers
    apart that may meet at one table.
    """
    path = out / name
    merged = {}
    if path.is_file():
        merged = {row["sha256"]: row for row in read_metadata(out, name)}
    for row in rows:
        was = merged.get(row["sha256"], {})
        row = {k: v for k, v in row.items() if v not in ("", "[]")}
        merged[row["sha256"]] = {"captions": "[]"} | was | row
        if was.get("aesthetic_score"):  # a user may have set it
            merged[row["sha256"]]["aesthetic_score"] = was["aesthetic_score"]
    seen = dict.fromkeys(key for row in merged.values() for key in row)
    columns = PUBLISHED + sorted(k for k in seen if k not in PUBLISHED)
    opened = whole(path, tag=tag)
    with opened as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(merged.values())


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole, and the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data, sync=False)  # many, and made again where they are damaged


def write_npz(path: Path, **arrays) -> None:
    """Write arrays whole, compressed, and the folder for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path, sync=False) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _ply_header(vertices: int, faces: int | None = None) -> bytes:
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {vertices}",
        *(f"property float {a}" for a in "xyz"),
    ]
    if faces is not None:
        lines += [f"element face {faces}", "property list uchar int vertex_indices"]
    return "\n".join([*lines, "end_header", ""]).encode()


def ply_points(points: np.ndarray) -> bytes:
    """Encode points [V, 3] as a PLY file."""
    return _ply_header(len(points)) + points.astype("<f4").tobytes()


def ply_mesh(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """Encode vertices [P, 3] and triangles [F, 3] as a PLY file."""
    table = np.empty(len(faces), np.dtype([("n", "u1"), ("v", "<i4", 3)]))
    table["n"] = 3
    table["v"] = faces
    header = _ply_header(len(vertices), len(faces))
    return header + vertices.astype("<f4").tobytes() + table.tobytes()


def ply_count(path: Path) -> int | None:
    """Read how many vertices a .ply announces; None where it is no such file."""
    check_file(path)
    with path.open("rb") as file:
        for line in file:
            if re.fullmatch(rb"element vertex \d{1,12}\s*", line):
                return int(line.split()[2])
    return None
