"""Cameras and pictures: V views that share one size, world -> camera in OpenCV axes (x right, y
down, z forward).

Pixel (i, j) samples the continuous point (i + 0.5, j + 0.5); row 0 is the top. Intrinsics are
divided by the image size: uv = (K p)_xy / p_z lies in [0, 1]^2 inside the picture. The conventions
are those of TRELLIS (Xiang et al., 2024).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.checks import check_tensors, check_whole
from kernels.transfer import make_index

FOV = math.radians(40)  # of the published training views
POLE = math.pi / 2 + 1e-6  # pi / 2 in fp32 is a little more than pi / 2


@dataclass(frozen=True, eq=False)
class Image:
    """What a renderer returns: V pictures, fp32, row 0 at the top; None where the renderer does not
    define a field.
    """

    color: Tensor  # [V, 3, H, W], composited on the background, not clamped
    alpha: Tensor  # [V, 1, H, W], 1 - transmittance
    depth: Tensor | None = None  # [V, 1, H, W], world units
    normal: Tensor | None = None  # [V, 3, H, W]
    # [V, 3, H, W], what a mesh's vertices carry beyond their colour
    normal_map: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Camera:
    """V pinhole cameras of one picture size. No renderer differentiates a camera: its tensors get
    no gradient.

    The upper left 3 x 3 of an extrinsic matrix is a rotation (no scale). Values are not read, so
    nothing waits for a GPU. Raises ValueError for a wrong shape, a dtype that is not floating
    point, or a size below 1; TypeError for what is no tensor.
    """

    extrinsics: Tensor  # [V, 4, 4] world to camera
    intrinsics: Tensor  # [V, 3, 3] divided by (width, height)
    width: int
    height: int

    def __post_init__(self) -> None:
        check_tensors(extrinsics=self.extrinsics, intrinsics=self.intrinsics)
        for name, size in (("extrinsics", 4), ("intrinsics", 3)):
            value = getattr(self, name)
            if value.ndim != 3 or tuple(value.shape[1:]) != (size, size):
                raise ValueError(f"{name} must be [V, {size}, {size}], not {list(value.shape)}")
            if not value.is_floating_point():
                raise ValueError(f"{name} must be floating point, not {value.dtype}")
        if len(self.extrinsics) != len(self.intrinsics):
            raise ValueError(
                f"{len(self.extrinsics)} extrinsics but {len(self.intrinsics)} intrinsics"
            )
        check_whole("width", self.width), check_whole("height", self.height)

    def __len__(self) -> int:
        return len(self.extrinsics)

    def __getitem__(self, views) -> "Camera":
        """The views chosen by an int (kept as one view), a slice, a list or a tensor of indices.
        Nothing waits for a GPU.
        """
        if isinstance(views, int):
            if not -len(self) <= views < len(self):
                raise IndexError(f"view {views} of {len(self)}")
            views = slice(views, views + 1 or None)
        elif isinstance(views, list):
            views = make_index(views, self.device)
        return replace(self, extrinsics=self.extrinsics[views], intrinsics=self.intrinsics[views])

    @property
    def device(self) -> torch.device:
        return self.extrinsics.device

    def to(self, *args, **kwargs) -> "Camera":
        """A copy whose tensors went through `Tensor.to` (device, dtype, non_blocking=True ...)."""
        return replace(
            self,
            extrinsics=self.extrinsics.to(*args, **kwargs),
            intrinsics=self.intrinsics.to(*args, **kwargs),
        )

    @property
    def center(self) -> Tensor:
        """Where the cameras stand, in world units: [V, 3]."""
        rotation = self.extrinsics[:, :3, :3]
        translation = self.extrinsics[:, :3, 3]
        return -(rotation.mT @ translation[..., None])[..., 0]

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """World points [N, 3] or [V, N, 3] -> uv [V, N, 2], in [0, 1]^2 inside the picture, and
        camera depth [V, N].

        Differentiable in the points. A depth <= 0 is behind the camera; its uv mean nothing.
        """
        local = points @ self.extrinsics[:, :3, :3].mT + self.extrinsics[:, None, :3, 3]
        image = local @ self.intrinsics.mT
        return image[..., :2] / image[..., 2:], local[..., 2]

    def rays(self) -> tuple[Tensor, Tensor]:
        """Origins [V, 3] and directions [V, H, W, 3] through the pixel centres, in world axes.

        A direction advances one unit of camera depth, so origin + depth * direction is the point at
        that depth.
        """
        like = {"dtype": self.extrinsics.dtype, "device": self.device}
        u = (torch.arange(self.width, **like) + 0.5) / self.width
        v = (torch.arange(self.height, **like) + 0.5) / self.height
        x = (u - self.intrinsics[:, 0, 2, None]) / self.intrinsics[:, 0, 0, None]  # [V, W]
        y = (v - self.intrinsics[:, 1, 2, None]) / self.intrinsics[:, 1, 1, None]  # [V, H]
        local = torch.stack(
            torch.broadcast_tensors(x[:, None, :], y[:, :, None], x.new_ones(())), -1
        )
        return self.center, local @ self.extrinsics[:, None, :3, :3]

    @classmethod
    def cat(cls, cameras: list["Camera"]) -> "Camera":
        """The views of several cameras of the same size, one after another."""
        sizes = {(c.width, c.height) for c in cameras}
        if len(sizes) != 1:
            raise ValueError(f"cameras of one size can be joined, not of sizes {sorted(sizes)}")
        width, height = sizes.pop()
        return cls(
            torch.cat([c.extrinsics for c in cameras]),
            torch.cat([c.intrinsics for c in cameras]),
            width,
            height,
        )

    @classmethod
    def from_blender(
        cls, transform_matrix: Tensor, fov_x: Tensor | float, width: int, height: int
    ) -> "Camera":
        """Cameras of a transforms.json: `transform_matrix` [V, 4, 4] camera to world in OpenGL axes
        (looking along -z, y up), `fov_x` the horizontal angle in radians (one number or [V]).
        Pixels are square.

        Reads the matrices (on a GPU this waits). Raises ValueError where one cannot be inverted and
        for an angle that is not between 0 and pi (unread on a GPU).
        """
        matrix = torch.as_tensor(transform_matrix)
        if matrix.ndim != 3 or tuple(matrix.shape[1:]) != (4, 4):
            raise ValueError(f"transform_matrix must be [V, 4, 4], not {list(matrix.shape)}")
        flip = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64, device=matrix.device)
        inverse, failed = torch.linalg.inv_ex(matrix.double() * flip)
        bad = failed.bool() | ~inverse.isfinite().all((1, 2))
        if bad.any():
            raise ValueError(
                f"transform_matrix {int(bad.int().argmax())} of {len(matrix)} cannot be inverted"
            )
        fov = _numbers("fov_x", fov_x, 0, math.pi, "radians", matrix.device)
        return cls(inverse.float(), _intrinsics(fov, len(matrix), width, height), width, height)

    @classmethod
    def orbit(
        cls,
        yaw: Tensor | float,  # radians, one number or [V]
        pitch: Tensor | float,  # radians above the horizon, in [-pi/2, pi/2]
        radius: Tensor | float = 2.0,  # world units
        fov: Tensor | float = FOV,  # horizontal, radians
        width: int = 512,
        height: int | None = None,  # None: as the width
        device: torch.device | str | None = None,
    ) -> "Camera":
        """Cameras around the origin, z up, at radius * (sin yaw cos pitch, cos yaw cos pitch, sin
        pitch), looking at it.

        Valid at the poles too. Pixels are square. Raises ValueError for arguments of unequal
        lengths, and for numbers that are not finite, a pitch beyond the poles, a radius that is not
        above 0 or a fov not between 0 and pi (unread on a GPU). Numbers of the host are copied to a
        GPU one argument after the other, and each copy waits.
        """
        values = [
            _numbers("yaw", yaw, -math.inf, math.inf, "radians", device),
            _numbers("pitch", pitch, -POLE, POLE, "radians", device),
            _numbers("radius", radius, 0, math.inf, "world units", device),
            _numbers("fov", fov, 0, math.pi, "radians", device),
        ]
        lengths = {v.numel() for v in values if v.ndim}
        if len(lengths - {1}) > 1 or any(v.ndim > 1 for v in values):
            raise ValueError(
                "yaw, pitch, radius and fov must be numbers or [V], not "
                f"{[list(v.shape) for v in values]}"
            )
        yaw, pitch, radius, fov = torch.broadcast_tensors(*[v.reshape(-1) for v in values])
        zero = torch.zeros_like(yaw)
        forward = -torch.stack([yaw.sin() * pitch.cos(), yaw.cos() * pitch.cos(), pitch.sin()], -1)
        # (-up) x forward, normalised: has a limit at the poles
        right = torch.stack([-yaw.cos(), yaw.sin(), zero], -1)
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], 1)
        extrinsics = torch.eye(4, dtype=torch.float64, device=yaw.device).repeat(len(yaw), 1, 1)
        extrinsics[:, :3, :3] = rotation
        extrinsics[:, 2, 3] = radius  # -R eye
        height = width if height is None else height
        return cls(extrinsics.float(), _intrinsics(fov, len(yaw), width, height), width, height)


def _numbers(
    name: str, values: Tensor | float, low: float, high: float, unit: str, device
) -> Tensor:
    """The numbers in float64 on the device. ValueError for one that is not between low and high; on
    a GPU they are not read.
    """
    numbers = torch.as_tensor(values, dtype=torch.float64)
    # a graph does not branch on values
    if numbers.device.type == "cpu" and not torch.compiler.is_compiling():
        good = (numbers > low) & (numbers < high)
        if not good.all():
            wrong = numbers[~good][0].item()
            raise ValueError(
                f"{name} must be above {low:.7g} and below {high:.7g} {unit}, not {wrong:.7g}"
            )
    return numbers.to(device)


def _intrinsics(fov: Tensor, views: int, width: int, height: int) -> Tensor:
    """[V, 3, 3] of a horizontal field of view (radians), square pixels, the principal point in the
    middle.
    """
    check_whole("width", width), check_whole("height", height)
    if fov.ndim > 1 or (fov.ndim == 1 and len(fov) not in (1, views)):
        raise ValueError(f"fov_x must be one number or [{views}], not {list(fov.shape)}")
    focal = (0.5 / torch.tan(fov / 2)).expand(views)
    matrix = torch.zeros(views, 3, 3, dtype=torch.float64, device=fov.device)
    matrix[:, 0, 0] = focal
    matrix[:, 1, 1] = focal * (width / height)
    matrix[:, :2, 2] = 0.5
    matrix[:, 2, 2] = 1
    return matrix.float()
