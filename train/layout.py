"""Files of a prepared dataset, written so that a partial one never looks finished: under another name, then renamed."""

import csv
import re
from pathlib import Path

import numpy as np

from train.files import whole, write_whole

PUBLISHED = ["sha256", "file_identifier", "local_path", "aesthetic_score", "captions", "rendered", "voxelized", "num_voxels"]


def write_metadata(out: Path, rows: list[dict]) -> None:
    """Merge rows into metadata.csv by sha256: rows and columns of earlier runs stay where this one says nothing of them."""
    path, merged = out / "metadata.csv", {}
    if path.is_file():
        with path.open(newline="") as file:
            merged = {row["sha256"]: row for row in csv.DictReader(file)}
    for row in rows:
        was = merged.get(row["sha256"], {})
        row = {k: v for k, v in row.items() if v not in ("", "[]")}
        merged[row["sha256"]] = {"captions": "[]"} | was | row | {k: was[k] for k in ("aesthetic_score",) if was.get(k)}
    seen = dict.fromkeys(key for row in merged.values() for key in row)
    columns = PUBLISHED + sorted(k for k in seen if k not in PUBLISHED)
    with whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(merged.values())


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data, sync=False)  # many, and made again where they are damaged


def write_npz(path: Path, **arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path, sync=False) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _ply_header(vertices: int, faces: int | None = None) -> bytes:
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {vertices}", *(f"property float {a}" for a in "xyz")]
    lines += [] if faces is None else [f"element face {faces}", "property list uchar int vertex_indices"]
    return "\n".join([*lines, "end_header", ""]).encode()


def ply_points(points: np.ndarray) -> bytes:
    return _ply_header(len(points)) + points.astype("<f4").tobytes()


def ply_mesh(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    table = np.empty(len(faces), np.dtype([("n", "u1"), ("v", "<i4", 3)]))
    table["n"], table["v"] = 3, faces
    return _ply_header(len(vertices), len(faces)) + vertices.astype("<f4").tobytes() + table.tobytes()


def ply_count(path: Path) -> int | None:
    """The vertices that a .ply announces; None where it is no such file."""
    with path.open("rb") as file:
        announced = next((line.split()[2] for line in file if re.fullmatch(rb"element vertex \d+\s*", line)), None)
    return None if announced is None else int(announced)
