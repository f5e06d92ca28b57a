"""Checks of what a caller hands to the public ops on meshes.

Each public op calls them once; the functions behind it take tensors as they leave these checks.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.checks import check_devices, check_whole
from kernels.mesh.packing import TABLE, single_table

PIXELS_MAX = 1 << 23  # edge functions stay below 2^31
FACES_MAX = 1 << 24  # a face's number is stored in fp32


def check_faces(faces: Tensor) -> Tensor:
    """Faces as the kernels take them: int32, contiguous.

    Raises ValueError for another shape or dtype.
    """
    if faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(f"faces must be [F, 3], not {list(faces.shape)}")
    if faces.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"faces must be int32 or int64, not {faces.dtype}")
    return faces.int().contiguous()


def check_face_count(count: int, where: str = "") -> None:
    """Raises ValueError for more faces than fp32 can number."""
    if count >= FACES_MAX:
        raise ValueError(f"{count} faces{where} are more than {FACES_MAX - 1}")


def check_floats(name: str, value: Tensor) -> Tensor:
    """A tensor as the kernels take it: contiguous fp32, or float64 on the torch path.

    Raises ValueError for integers.
    """
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, not {value.dtype}")
    if value.dtype == torch.float64:
        if not backend.is_torch(value):
            raise ValueError("the kernels compute in fp32: float64 is for the torch path only")
        return value.contiguous()
    return value.float().contiguous()


def check_clip(clip: Tensor) -> None:
    """Raises ValueError for clip positions that are not [P, 4]."""
    if clip.ndim != 2 or clip.shape[1] != 4:
        raise ValueError(f"clip must be [P, 4], not {list(clip.shape)}")


def check_table(table: Tensor | None, faces: Tensor, rows: int) -> Tensor:
    """The table given, or that of one view of one mesh.

    Raises ValueError for another shape or dtype.
    """
    if table is None:
        return single_table(len(faces), rows, faces.device)
    if table.ndim != 2 or table.shape[1] != TABLE or table.dtype != torch.int64:
        raise ValueError(f"table must be [V, {TABLE}] int64, not {list(table.shape)} {table.dtype}")
    return table


def check_rast(rast: Tensor, beside: Tensor, faces: Tensor, table: Tensor) -> Tensor:
    """The picture of `rasterize` as the kernels take it, in the dtype of `beside`.

    Raises ValueError for another shape or device.
    """
    if rast.ndim != 4 or rast.shape[3] != 4:
        raise ValueError(f"rast must be [V, H, W, 4], not {list(rast.shape)}")
    if len(rast) != len(table):
        raise ValueError(f"rast has {len(rast)} views, the table {len(table)}")
    check_devices(beside, rast, faces)
    return rast.to(beside.dtype).contiguous()


def check_order(order: Tensor | None, faces: Tensor) -> Tensor:
    """The order given, or an empty one: the backward passes then sort."""
    return faces.new_empty(0, dtype=torch.int64) if order is None else order


def check_picture(height: int, width: int, views: int) -> None:
    """Raises ValueError for a size beyond the limits of the kernels."""
    check_whole("height", height)
    check_whole("width", width)
    if height * width > PIXELS_MAX:
        raise ValueError(
            f"a picture of {height} x {width} has {height * width} pixels, more than {PIXELS_MAX}"
        )
    if 3 * views * height * width >= 2**31:
        raise ValueError(
            f"{views} views of {height} x {width} are more than 2^31 corners of pixels: render "
            "fewer at once"
        )
