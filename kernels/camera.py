"""Cameras and pictures of V views that share one size.

Extrinsics map the world to camera axes of OpenCV (x right, y down, z forward). Pixel (i, j)
samples the continuous point (i + 0.5, j + 0.5); row 0 is the top. Intrinsics are divided by the
image size: uv = (K p)_xy / p_z lies in [0, 1]^2 inside the picture. TRELLIS (Xiang et al., 2024)
has the same conventions.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.backend import make_index
from kernels.checks import check_tensors, check_whole

FOV = math.radians(40)  # of the published training views
POLE = math.pi / 2 + 1e-6  # pi / 2 in fp32 is a little more than pi / 2
# how far a camera's matrix may be from a rotation times a scale: what six digits leave
ROUNDED = 1e-3


@dataclass(frozen=True, eq=False)
class Image:
    """V pictures from a renderer: fp32, row 0 at the top, None for what it does not draw."""

    color: Tensor  # [V, 3, H, W], composited on the background, not clamped
    alpha: Tensor  # [V, 1, H, W], 1 - transmittance
    depth: Tensor | None = None  # [V, 1, H, W], world units
    normal: Tensor | None = None  # [V, 3, H, W]
    normal_map: Tensor | None = None  # [V, 3, H, W], attributes of vertices beside their colour


@dataclass(frozen=True, eq=False)
class Camera:
    """V pinhole cameras of one picture size.

    No renderer differentiates a camera: its tensors get no gradient. The upper left 3 x 3 of an
    extrinsic matrix is a rotation (no scale). Values are not read, so nothing waits for a GPU.
    Raises ValueError for a wrong shape, a dtype that is not floating point, or a size below 1;
    TypeError for what is no tensor.
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
        check_whole("width", self.width)
        check_whole("height", self.height)

    def __len__(self) -> int:
        return len(self.extrinsics)

    def __getitem__(self, views) -> "Camera":
        """Return some of the views: by an int (one view), a slice, a list or a tensor of indices.

        Does not wait for a GPU.
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
        """Return a copy with `Tensor.to` applied (device, dtype, non_blocking=True ...)."""
        return replace(
            self,
            extrinsics=self.extrinsics.to(*args, **kwargs),
            intrinsics=self.intrinsics.to(*args, **kwargs),
        )

    @property
    def center(self) -> Tensor:
        """Positions of the cameras in world units: [V, 3]."""
        rotation = self.extrinsics[:, :3, :3]
        translation = self.extrinsics[:, :3, 3]
        return -(rotation.mT @ translation[..., None])[..., 0]

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Project points [N, 3] or [V, N, 3]: return uv [V, N, 2] and camera depth [V, N].

        uv lies in [0, 1]^2 inside the picture. Differentiable in the points. A point of depth <= 0
        is behind the camera; its uv mean nothing.
        """
        local = points @ self.extrinsics[:, :3, :3].mT + self.extrinsics[:, None, :3, 3]
        image = local @ self.intrinsics.mT
        return image[..., :2] / image[..., 2:], local[..., 2]

    def rays(self) -> tuple[Tensor, Tensor]:
        """Return origins [V, 3] and directions [V, H, W, 3] through the pixel centres.

        Both are in world axes.
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
        """Join the views of several cameras of one size."""
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
        """Return the cameras of a transforms.json.

        `transform_matrix` [V, 4, 4] maps the camera to the world, in OpenGL axes (looking
        along -z, y up). `fov_x` is the horizontal angle in radians (one number or [V]). Pixels are
        square.

        A matrix that scales all axes alike is normalised: its camera sees the same. Reads the
        matrices (on a GPU this waits). Raises ValueError where one cannot be inverted, is mirrored,
        stretched or skewed, and for an angle that is not between 0 and pi (unread on a GPU).
        """
        matrix = torch.as_tensor(transform_matrix)
        if matrix.ndim != 3 or tuple(matrix.shape[1:]) != (4, 4):
            raise ValueError(f"transform_matrix must be [V, 4, 4], not {list(matrix.shape)}")
        flip = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64, device=matrix.device)
        matrix, warped = _without_scale(matrix.double())
        inverse, failed = torch.linalg.inv_ex(matrix * flip)
        failed = failed.bool() | ~inverse.isfinite().all((1, 2))
        bad = failed | warped
        if bad.any():
            view = int(bad.int().argmax())
            fault = "cannot be inverted" if failed[view] else "is mirrored, stretched or skewed"
            raise ValueError(f"transform_matrix {view} of {len(matrix)} {fault}")
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
        """Return cameras that look at the origin, z up.

        They stand at radius * (sin yaw cos pitch, cos yaw cos pitch, sin pitch), the poles
        included. Pixels are square. Raises ValueError for arguments of unequal
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


def _without_scale(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices [V, 4, 4] whose axes have length 1, and where they are no rotation [V].

    A scale is divided out only where it is more than rounding: others stay as they are.
    """
    axes = matrix[:, :3, :3]
    volume = torch.linalg.det(axes)
    scale = volume.abs() ** (1 / 3)
    products = axes.mT @ axes / scale[:, None, None] ** 2
    one = torch.eye(3, dtype=axes.dtype, device=axes.device)
    # what is not finite compares as false
    warped = (volume < 0) | ((products - one).abs() > ROUNDED).any((1, 2))
    divisor = torch.where((scale - 1).abs() > ROUNDED, scale, torch.ones_like(scale))
    rigid = torch.cat([axes / divisor[:, None, None], matrix[:, :3, 3:]], 2)
    return torch.cat([rigid, matrix[:, 3:]], 1), warped


def _numbers(
    name: str, values: Tensor | float, low: float, high: float, unit: str, device
) -> Tensor:
    """Return the numbers in float64 on the device.

    Raises ValueError for one that is not between low and high; numbers on a GPU are not read.
    """
    numbers = torch.as_tensor(values, dtype=torch.float64)
    # torch.compile cannot branch on values
    if numbers.device.type == "cpu" and not torch.compiler.is_compiling():
        good = (numbers > low) & (numbers < high)
        if not good.all():
            wrong = numbers[~good][0].item()
            raise ValueError(
                f"{name} must be above {low:.7g} and below {high:.7g} {unit}, not {wrong:.7g}"
            )
    return numbers.to(device)


def _intrinsics(fov: Tensor, views: int, width: int, height: int) -> Tensor:
    """Return intrinsics [V, 3, 3] of a horizontal field of view in radians.

    Pixels are square and the principal point is in the middle.
    """
    check_whole("width", width)
    check_whole("height", height)
    if fov.ndim > 1 or (fov.ndim == 1 and len(fov) not in (1, views)):
        raise ValueError(f"fov_x must be one number or [{views}], not {list(fov.shape)}")
    focal = (0.5 / torch.tan(fov / 2)).expand(views)
    matrix = torch.zeros(views, 3, 3, dtype=torch.float64, device=fov.device)
    matrix[:, 0, 0] = focal
    matrix[:, 1, 1] = focal * (width / height)
    matrix[:, :2, 2] = 0.5
    matrix[:, 2, 2] = 1
    return matrix.float()


def pack_cameras(camera: Camera, origin: Tensor) -> Tensor:
    """Return what the kernels read of a camera [V, 16], without gradient.

    Rotation 9, `origin` [V, 3] (the translation or the centre), focal lengths 2 and principal point
    2 in pixels.
    """
    across = camera.intrinsics[:, 0] * camera.width
    down = camera.intrinsics[:, 1] * camera.height
    pixels = torch.stack([across[:, 0], down[:, 1], across[:, 2], down[:, 2]], 1)
    rotation = camera.extrinsics[:, :3, :3].flatten(1)
    return torch.cat([rotation, origin, pixels], 1).detach()
