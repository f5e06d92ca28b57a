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

import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from models.reading import check_file, entry, read_json, shown
from train.data.archive import Archive
from train.data.metadata import inside
from train.meshes.budget import Budget
from train.meshes.files import below
from train.meshes.ply import read_ply
from train.meshes.untrusted import VIEWS, load_picture, open_picture

# channels of the features that are known by name; those of `rgb` are in train.prepare.voxelize
CHANNELS = {"rgb": 50, "dinov2_vitl14_reg": 1024}
HUGE = 1e15  # of a number in a camera's matrix: beyond, single precision has no inverse
VOXEL = 100  # bytes that a voxel takes while it is put in order
COPIES = 3  # of features that there are at once, here and where a batch is made of them
PIXEL = 16  # bytes that a pixel of a view takes while it is decoded and resampled
NARROW = 1e-6  # radians of a view: below, single precision has no picture
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
    cell = row.get(column, "")
    try:
        value = float(cell or "nan")
    except ValueError as error:
        raise ValueError(
            f"{file}: {column} of {row['sha256']} is {shown(cell)}, not a number"
        ) from error
    if math.isinf(value):
        raise ValueError(
            f"{file}: {column} of {row['sha256']} is {shown(cell)}, not a finite number"
        )
    return None if math.isnan(value) else value


def read_frames(file: Path, root: Path | None = None) -> Frames:
    """Read a transforms.json; what it names lies below `root`, by default its own folder.

    A matrix that scales all axes alike is normalised: its camera sees the same. Raises ValueError
    where the file is missing, truncated or without frames, where a frame has no usable camera or
    one that is mirrored, stretched or skewed, where its `holdout` is not a number of its frames,
    and where it or a file_path leads out of the root, or a file_path out of its folder.
    """
    root = file.parent if root is None else root
    for path in (file.parent, file):
        below(root, path)
    content = read_json(file)
    frames = entry(content, "frames", list, str(file))
    holdout = content.get("holdout")
    names = []
    for i, frame in enumerate(frames):
        if type(frame) is not dict:
            raise ValueError(f"{file} is not a list of frames: frame {i} is {shown(frame)}")
        names.append(entry(frame, "file_path", str, f"{file}: frame {i}"))
    if not names:
        raise ValueError(f"{file} lists no frames")
    matrix = np.array([_matrix(frame, f"{file}: frame {i}") for i, frame in enumerate(frames)])
    fov = np.array([_angle(frame, f"{file}: frame {i}") for i, frame in enumerate(frames)])
    with np.errstate(all="ignore"):  # what is too large is refused
        usable = (
            (np.abs(matrix) < HUGE).all((1, 2))
            & (np.abs(np.linalg.det(matrix)) > 1e-12)
            & (fov > NARROW)
            & (fov < np.pi)
        )
    if not usable.all():
        frame = int(np.argmin(usable))
        raise ValueError(
            f"{file}: frame {frame} has no usable camera (angle {fov[frame]}, matrix "
            f"{matrix[frame].tolist()})"
        )
    with np.errstate(all="ignore"):
        matrix = _rigid(matrix, file)
    if holdout is not None and not (type(holdout) is int and 0 <= holdout <= len(names)):
        raise ValueError(
            f"{file}: holdout {shown(holdout)} is not a number of its {len(names)} frames"
        )
    try:
        return Frames(_views(file.parent, names, root), matrix, fov, holdout)
    except ValueError as error:
        raise ValueError(f"{file}: file_path {error}") from error


def _matrix(frame: dict, where: str) -> list[list[float]]:
    """The transform_matrix of a frame; ValueError for another shape, or what is no number."""
    rows = entry(frame, "transform_matrix", list, where)
    widths = sorted({len(row) if type(row) is list else 0 for row in rows})
    if (len(rows), widths) != (4, [4]):
        shape = f"[{len(rows)}, {' or '.join(map(str, widths[:3]))}]"
        raise ValueError(f"{where}: transform_matrix has shape {shape}, not [4, 4]")
    return [[_number(value, "transform_matrix holds", where) for value in row] for row in rows]


def _angle(frame: dict, where: str) -> float:
    if "camera_angle_x" not in frame:
        raise ValueError(f"{where} lacks 'camera_angle_x'")
    return _number(frame["camera_angle_x"], "camera_angle_x is", where)


def _number(value: object, what: str, where: str) -> float:
    """A number of JSON, which may be NaN or infinite; ValueError for anything else."""
    if type(value) is float or (type(value) is int and abs(value) < HUGE):
        return float(value)
    raise ValueError(f"{where}: {what} {shown(value)}, not a number")


def _views(folder: Path, names: list[str], root: Path) -> list[Path]:
    """The files of views; ValueError for the first that leads out of its folder or the root."""
    files = [inside(folder, name) for name in names]
    with os.scandir(folder) as found:
        links = {one.name for one in found if one.is_symlink()}
    for name, view in zip(names, files, strict=True):
        first, *more = PurePosixPath(name).parts
        if more or first in links:  # the others lie in the folder itself
            below(root, view)
    return files


def _rigid(matrix: np.ndarray, file: Path) -> np.ndarray:
    """Matrices [n, 4, 4] without their scale; ValueError that names a frame whose axes are none."""
    axes = matrix[:, :3, :3]
    lengths = np.linalg.norm(axes, axis=1)
    scale = np.cbrt(np.linalg.det(axes))
    products = axes.transpose(0, 2, 1) @ axes / scale[:, None, None] ** 2
    skewed = ~(np.abs(products - np.eye(3)).max((1, 2)) <= ROUNDED)  # NaN as well
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
    ValueError where it is missing, truncated, not RGBA, not square, not of the size `like`, that of
    its object's first, or of more pixels than a file of its size may take memory for.
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
            budget = Budget()
            budget.count(file)
            budget.check(picture.width**2 * PIXEL, f"{_by(picture.size)} pixels")
            load_picture(picture)
        except ValueError as error:
            raise ValueError(f"{file} is truncated or damaged: {error}") from error
        if picture.mode != "RGBA":
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
    check_file(file, "is missing, though transforms.json lists it")
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
    with Archive(file) as archive:
        archive.expect({"indices", "patchtokens"})
        voxels, features_of = archive.header("indices"), archive.header("patchtokens")
        if len(voxels.shape) != 2 or voxels.shape[1] != 3 or voxels.dtype.kind not in "ui":
            raise ValueError(f"{file}: indices are {voxels}, not integers [V, 3]")
        V = voxels.shape[0]
        fits = len(features_of.shape) == 2 and features_of.shape[0] == V
        if not fits or features_of.dtype.kind != "f":
            raise ValueError(f"{file}: patchtokens are {features_of}, not floats [{V}, C]")
        if not V:
            raise ValueError(f"{file}: the object has no voxels")
        if V > resolution**3:
            raise ValueError(f"{file}: {V} voxels, but the {resolution}^3 grid has {resolution**3}")
        archive.check(V * VOXEL + COPIES * features_of.size)
        coords, order = ordered(archive.read("indices"), resolution, file)
        features = archive.read("patchtokens")
    features = finite(features, np.float16, f"{file}: patchtokens")
    return torch.from_numpy(coords), torch.from_numpy(features[order])


def finite(rows: np.ndarray, dtype: type, what: str) -> np.ndarray:
    """Convert floats [V, C]; ValueError that names the first row which is not finite then."""
    with np.errstate(over="ignore"):  # what is not finite is refused
        rows = rows.astype(dtype, copy=False)
    if not np.isfinite(rows).all():
        row = int((~np.isfinite(rows)).any(1).argmax())
        half = " in half precision" if dtype == np.float16 else ""
        raise ValueError(f"{what} of row {row} are not finite{half}")
    return rows


def ordered(indices: np.ndarray, resolution: int, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [V, 3] int32 in lexicographic order, and the row that each stands in.

    Raises ValueError that names the first voxel outside the grid, or listed twice.
    """
    if indices.min() < 0 or indices.max() >= resolution:
        row = int(((indices < 0) | (indices >= resolution)).any(1).argmax())
        raise ValueError(
            f"{file}: voxel {row} at {indices[row].tolist()} is outside the {resolution}^3 grid"
        )
    coords = indices.astype(np.int32)
    order = np.lexsort(coords.T[::-1])
    coords = coords[order]
    if (twice := (coords[1:] == coords[:-1]).all(1)).any():
        row = int(twice.argmax())
        raise ValueError(
            f"{file}: rows {order[row]} and {order[row + 1]} are the same voxel "
            f"{coords[row].tolist()}"
        )
    return coords, order


def read_triangles(file: Path) -> tuple[Tensor, Tensor]:
    """Read the triangles of a mesh.ply: vertices [P, 3] float32 and faces [F, 3] int32.

    Raises ValueError that names the file.
    """
    check_file(file)
    try:
        mesh = read_ply(file)
    except ValueError as error:
        raise ValueError(f"{file.parent}{os.sep}{error}") from error
    if np.abs(mesh.vertices).max(initial=0) > HUGE:
        row = int((np.abs(mesh.vertices) > HUGE).any(1).argmax())
        raise ValueError(
            f"{file}: vertex {row} at {mesh.vertices[row].tolist()} is far outside the unit cube"
        )
    return torch.from_numpy(mesh.vertices).float(), torch.from_numpy(mesh.faces)
