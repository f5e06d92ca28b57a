"""Read the files of a dataset in the published layout (microsoft/TRELLIS, dataset_toolkits).

Every error names its file.

    ROOT/metadata.csv                    an object a row: sha256, and the columns that the filters
                                         of train.data.dataset use
    ROOT/renders/SHA/transforms.json     frames: file_path, camera_angle_x (radians),
                                         transform_matrix (4 x 4, camera to world, OpenGL axes);
                                         holdout, where train.prepare made it: how many of the last
                                             frames no feature of ours saw
    ROOT/renders/SHA/000.png ...         square RGBA pictures, straight alpha
    ROOT/renders/SHA/mesh.ply            the object as triangles, in the same z-up unit cube
    ROOT/features/NAME/SHA.npz           indices [V, 3] integers, patchtokens [V, C]; NAME_R where
                                         the grid is not 64^3
"""

import json
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from train.data.metadata import inside
from train.meshes.ply import read_ply
from train.meshes.untrusted import MALFORMED, VIEWS, load_picture, open_picture, reason

LARGEST = 1 << 31  # bytes of an object's features: a small archive can announce any number
# how far a camera's matrix may be from a rotation times a scale: what six digits leave
ROUNDED = 1e-3


@dataclass(frozen=True)
class Frames:
    """The views of one object, in the order of its transforms.json."""

    files: list[Path]
    matrix: np.ndarray  # [n, 4, 4] float64, camera to world, OpenGL axes
    fov: np.ndarray  # [n] float64, radians
    # the last frames that features were made without; None where the file does not say
    holdout: int | None = None


def number(row: dict[str, str], column: str, file: Path) -> float | None:
    """Read a cell as a number; None where it is empty or nan.

    Raises ValueError that names file, object and cell where it is anything else.
    """
    try:
        value = float(row.get(column) or "nan")
    except ValueError as error:
        raise ValueError(
            f"{file}: {column} of {row['sha256']} is {row[column]!r}, not a number"
        ) from error
    if math.isinf(value):
        raise ValueError(
            f"{file}: {column} of {row['sha256']} is {row[column]!r}, not a finite number"
        )
    return None if math.isnan(value) else value


def read_frames(file: Path) -> Frames:
    """Read a transforms.json.

    A matrix that scales all axes alike is normalised: its camera sees the same. Raises ValueError
    where the file is missing, truncated or without frames, where a frame has no usable camera or
    one that is mirrored, stretched or skewed, where its `holdout` is not a number of its frames,
    and where a file_path leads out of the folder.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        frames = content["frames"]
        holdout = content.get("holdout")
        names = [str(frame["file_path"]) for frame in frames]
        matrix = np.array([frame["transform_matrix"] for frame in frames], np.float64)
        fov = np.array([frame["camera_angle_x"] for frame in frames], np.float64)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is truncated or not JSON: {error}") from error
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from error
    except MALFORMED as error:
        raise ValueError(f"{file} is not a list of frames with numbers: {error}") from error
    if not names:
        raise ValueError(f"{file} lists no frames")
    if matrix.shape[1:] != (4, 4):
        raise ValueError(f"{file}: transform_matrix has shape {list(matrix.shape[1:])}, not [4, 4]")
    if fov.ndim != 1:
        raise ValueError(
            f"{file}: camera_angle_x has shape {list(fov.shape[1:])}, not one number a frame"
        )
    usable = (
        np.isfinite(matrix).all((1, 2))
        & (np.abs(np.linalg.det(matrix)) > 1e-12)
        & (fov > 0)
        & (fov < np.pi)
    )
    if not usable.all():
        frame = int(np.argmin(usable))
        raise ValueError(
            f"{file}: frame {frame} has no usable camera (angle {fov[frame]}, matrix "
            f"{matrix[frame].tolist()})"
        )
    matrix = _rigid(matrix, file)
    if holdout is not None and not (type(holdout) is int and 0 <= holdout <= len(names)):
        raise ValueError(f"{file}: holdout {holdout!r} is not a number of its {len(names)} frames")
    try:
        files = [inside(file.parent, name) for name in names]
    except ValueError as error:
        raise ValueError(f"{file}: file_path {error}") from error
    return Frames(files, matrix, fov, holdout)


def _rigid(matrix: np.ndarray, file: Path) -> np.ndarray:
    """Matrices [n, 4, 4] without their scale; ValueError that names a frame whose axes are none."""
    axes = matrix[:, :3, :3]
    lengths = np.linalg.norm(axes, axis=1)
    scale = np.cbrt(np.linalg.det(axes))
    products = axes.transpose(0, 2, 1) @ axes / scale[:, None, None] ** 2
    skewed = np.abs(products - np.eye(3)).max((1, 2)) > ROUNDED
    projective = np.abs(matrix[:, 3] - [0, 0, 0, 1]).max(1) > ROUNDED
    for wrong, what in (
        (scale < 0, "is mirrored"),
        (skewed, "is stretched or skewed"),
        (projective, "has another last row than 0 0 0 1"),
    ):
        if wrong.any():
            frame = int(wrong.argmax())
            shown = " ".join(f"{length:.4g}" for length in lengths[frame])
            raise ValueError(
                f"{file}: frame {frame}: its transform_matrix {what} (axes of length {shown}), so "
                "it is no camera's"
            )
    scaled = np.abs(scale - 1) > ROUNDED
    rigid = matrix.copy()
    rigid[scaled, :3, :3] /= scale[scaled, None, None]
    return rigid


def picture_size(file: Path) -> tuple[int, int]:
    """Read the width and height of a picture from its header."""
    with _opened(file) as picture:
        return picture.size


def read_picture(file: Path, size: int, like: tuple[int, int]) -> Tensor:
    """Read an RGBA picture [4, size, size] uint8.

    A picture of another size is resampled (Lanczos; colour and alpha each for itself). Raises
    ValueError where it is missing, truncated, not RGBA, not square, or not of the size `like`, that
    of its object's first.
    """
    with _opened(file) as picture:
        # optimisers write the same pixels as a palette, as grey, or with one transparent colour
        if not picture.has_transparency_data:
            raise ValueError(f"{file} has mode {picture.mode}: views need colour and alpha (RGBA)")
        if picture.size != like:
            raise ValueError(
                f"{file} is {_by(picture.size)} pixels, but the object's first view is {_by(like)}"
            )
        if picture.width != picture.height:
            raise ValueError(f"{file} is {_by(picture.size)} pixels, not square")
        try:
            load_picture(picture)
        except ValueError as error:
            raise ValueError(f"{file} is truncated or damaged: {error}") from error
        picture = picture.convert("RGBA")
        color = picture.convert("RGB")
        alpha = picture.getchannel("A")
        if picture.size != (size, size):
            color = color.resize((size, size), Image.Resampling.LANCZOS)
            alpha = alpha.resize((size, size), Image.Resampling.LANCZOS)
        pixels = np.dstack([np.asarray(color), np.asarray(alpha)])
        return rearrange(torch.from_numpy(pixels), "h w c -> c h w").contiguous()


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _opened(file: Path) -> Image.Image:
    if not file.is_file():
        raise ValueError(f"{file} is missing, though transforms.json lists it")
    try:
        return open_picture(file, VIEWS)
    except ValueError as error:
        raise ValueError(f"{file} is truncated or not a picture: {error}") from error


def read_features(file: Path, resolution: int) -> tuple[Tensor, Tensor]:
    """Read voxel coordinates [V, 3] int32 and their features [V, C] float16.

    The voxels are in lexicographic order, whatever the file's. Raises ValueError for a missing or
    damaged file, absent keys, shapes or types that do not fit, no voxels, a voxel outside the grid
    or listed twice, and features that are not finite.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("truncated, or not an npz archive")
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            if missing := {"indices", "patchtokens"} - set(content.files):
                raise ValueError(
                    f"no array {' and '.join(sorted(missing))}, only "
                    f"{', '.join(content.files) or 'nothing'}"
                )
            if (large := sum(entry.file_size for entry in content.zip.infolist())) > LARGEST:
                raise ValueError(f"its arrays take {large} bytes, over the limit of {LARGEST}")
            indices = content["indices"]
            features = content["patchtokens"]
    except (zipfile.BadZipFile, OSError, *MALFORMED) as error:
        raise ValueError(f"{file} cannot be read: {reason(error)}") from error
    if indices.ndim != 2 or indices.shape[1] != 3 or indices.dtype.kind not in "ui":
        raise ValueError(
            f"{file}: indices are {indices.dtype} {list(indices.shape)}, not integers [V, 3]"
        )
    if features.ndim != 2 or features.dtype.kind != "f" or len(features) != len(indices):
        raise ValueError(
            f"{file}: patchtokens are {features.dtype} {list(features.shape)}, not floats "
            f"[{len(indices)}, C]"
        )
    if not len(indices):
        raise ValueError(f"{file}: the object has no voxels")
    coords = indices.astype(np.int64)
    if coords.min() < 0 or coords.max() >= resolution:
        row = int(((coords < 0) | (coords >= resolution)).any(1).argmax())
        raise ValueError(
            f"{file}: voxel {row} at {coords[row].tolist()} is outside the {resolution}^3 grid"
        )
    order = np.lexsort(coords.T[::-1])
    coords = coords[order]
    if (twice := (coords[1:] == coords[:-1]).all(1)).any():
        row = int(twice.argmax())
        raise ValueError(
            f"{file}: rows {order[row]} and {order[row + 1]} are the same voxel "
            f"{coords[row].tolist()}"
        )
    stored = features[order].astype(np.float16)
    if not np.isfinite(stored).all():
        row = int(order[(~np.isfinite(stored)).any(1).argmax()])
        raise ValueError(f"{file}: patchtokens of row {row} are not finite in half precision")
    return torch.from_numpy(coords.astype(np.int32)), torch.from_numpy(stored)


def read_triangles(file: Path) -> tuple[Tensor, Tensor]:
    """Read the triangles of a mesh.ply: vertices [P, 3] float32 and faces [F, 3] int32.

    Raises ValueError that names the file.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        mesh = read_ply(file)
    except ValueError as error:
        raise ValueError(f"{file.parent}{os.sep}{error}") from error
    return torch.from_numpy(mesh.vertices).float(), torch.from_numpy(mesh.faces)
