"""Latents -> 3D Gaussians (published: SLatGaussianDecoder).

N voxels give G = N * num_gaussians Gaussians, those of a voxel in consecutive rows. Each voxel
predicts, in this channel order, offsets, colours, scales, rotations and opacities of its Gaussians
(arXiv 2412.01506; the low-pass filters are those of Mip-Splatting, arXiv 2311.16493).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kernels import Camera, Image, splat
from models.sparse import SparseTensor
from models.vae import VAE, Decoder

# channels a Gaussian, in order
FIELDS = {"_xyz": 3, "_features_dc": 3, "_scaling": 3, "_rotation": 4, "_opacity": 1}


@dataclass(frozen=True)
class GaussianConfig:
    """The rules that turn raw channels into Gaussians: the published `representation_config`."""

    # multiplier of each raw field, by published name; 1 if absent
    lr: dict[str, float] = field(default_factory=dict)
    perturb_offset: bool = True
    voxel_size: float = 1.5  # reach of an offset, in voxels
    num_gaussians: int = 32
    kernel_2d: float = 0.1  # screen-space low-pass, px^2
    kernel_3d: float = 9e-4  # smallest scale, world units
    scaling_bias: float = 4e-3
    opacity_bias: float = 0.1
    scaling_activation: str = "softplus"

    @classmethod
    def parse(cls, published: dict) -> "GaussianConfig":
        """Check and convert the published dict.

        Raises ValueError for a key or value that the published configuration does not know.
        """
        names = {"2d_filter_kernel_size": "kernel_2d", "3d_filter_kernel_size": "kernel_3d"}
        known = {f.name for f in fields(cls)} - set(names.values()) | set(names)
        if unknown := sorted(published.keys() - known):
            raise ValueError(
                f"representation_config has unknown keys {unknown}; known are {sorted(known)}"
            )
        config = cls(**{names.get(key, key): value for key, value in published.items()})
        if unknown := sorted(config.lr.keys() - FIELDS.keys()):
            raise ValueError(f"representation_config lr has unknown fields {unknown}")
        # published files name every field
        given = {name: factor for name, factor in config.lr.items() if factor != 1}
        config = replace(config, lr=given)
        if config.scaling_activation not in ("softplus", "exp"):
            raise ValueError(
                f"scaling_activation {config.scaling_activation!r} is not softplus or exp"
            )
        if config.num_gaussians < 1:
            raise ValueError(f"num_gaussians {config.num_gaussians} must be at least 1")
        if config.perturb_offset and not 1 < config.voxel_size < math.inf:
            raise ValueError(
                f"voxel_size {config.voxel_size} must exceed 1 where offsets are perturbed "
                "(atanh of 1 is infinite)"
            )
        if not (0 < config.opacity_bias < 1 and 0 < config.scaling_bias < math.inf):
            raise ValueError(
                f"opacity_bias {config.opacity_bias} must lie in (0, 1), scaling_bias "
                f"{config.scaling_bias} be finite and above 0"
            )
        return config

    @property
    def fields(self) -> dict[str, int]:
        """Channels of the output layer by published name, in order."""
        return {name: self.num_gaussians * width for name, width in FIELDS.items()}

    @property
    def scaling_shift(self) -> float:
        """The activation's inverse at scaling_bias."""
        bias = self.scaling_bias
        if self.scaling_activation == "exp":
            return math.log(bias)
        return bias + math.log(-math.expm1(-bias))

    @property
    def opacity_shift(self) -> float:
        """The sigmoid's inverse at opacity_bias."""
        return math.log(self.opacity_bias / (1 - self.opacity_bias))


@dataclass
class GaussianScene:
    """The Gaussians of one object."""

    center: Tensor  # [G, 3] world units, the object inside [-0.5, 0.5]^3
    scale: Tensor  # [G, 3] standard deviations, world units
    rotation: Tensor  # [G, 4] unit quaternions (w, x, y, z)
    opacity: Tensor  # [G, 1]
    color: Tensor  # [G, S, 3] spherical-harmonic coefficients
    kernel_size: float = 0.1  # screen-space low-pass, px^2

    def render(self, camera: Camera, background: Tensor) -> Image:
        """Render the scene from V views on background [V, 3]."""
        return self.render_batch([self], camera, [0] * len(camera), background)

    @classmethod
    def render_batch(
        cls,
        scenes: Sequence["GaussianScene"],
        camera: Camera,
        view_scene: Sequence[int],
        background: Tensor,
        *,
        offset: Tensor | None = None,  # of radiance fields alone
    ) -> Image:
        """Render V views of B scenes in one launch; models.render is the public name."""
        sizes = {scene.kernel_size for scene in scenes}
        if len(sizes) != 1:
            raise ValueError(f"the scenes of a batch have different kernel sizes: {sorted(sizes)}")
        names = ("center", "scale", "rotation", "opacity", "color")
        # a list: torch.compile cannot trace what is read
        starts = [0, *accumulate(len(scene.center) for scene in scenes)]
        tensors = [torch.cat([getattr(scene, name) for scene in scenes]) for name in names]
        return splat(*tensors, starts, camera, view_scene, background, kernel_size=sizes.pop())

    @classmethod
    def penalties(cls, scenes: Sequence["GaussianScene"]) -> dict[str, Tensor]:
        """Mean volume of scales and mean squared transparency, over all Gaussians of the batch."""
        volume = torch.cat([scene.scale for scene in scenes]).prod(dim=1)
        transparency = torch.cat([scene.opacity for scene in scenes]) - 1
        count = max(len(volume), 1)  # no Gaussians at all: no penalty, not 0 / 0
        return {"volume": volume.sum() / count, "opacity": transparency.square().sum() / count}


def _radical_inverse(base: int, n: int) -> float:
    """n's digits in that base, mirrored at the point: a number in [0, 1)."""
    value = 0.0
    digit = 1.0
    while n:
        digit /= base
        n, remainder = divmod(n, base)
        value += remainder * digit
    return value


def _offset_perturbation(config: GaussianConfig) -> Tensor:  # [per_voxel, 3]
    """A Hammersley set, before tanh, that spreads the untrained Gaussians of a voxel over it."""
    count = config.num_gaussians
    points = [[k / count, _radical_inverse(2, k), _radical_inverse(3, k)] for k in range(count)]
    return torch.atanh((2 * torch.tensor(points) - 1) / config.voxel_size)


class GaussianDecoder(Decoder):
    """Latents [N, latent_channels] -> a GaussianScene a sample (published: SLatGaussianDecoder)."""

    NAME = "SLatGaussianDecoder"
    CONFIG = GaussianConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # the published state dict has it even where offsets are not perturbed, where it may be
        # infinite
        self.register_buffer("offset_perturbation", _offset_perturbation(self.config))
        self.idle = () if self.config.perturb_offset else ("offset_perturbation",)

    def forward(self, z: SparseTensor) -> list[GaussianScene]:
        """One scene per sample; a sample without voxels gives a scene without Gaussians."""
        return self.scenes(self.fields(z))

    def scenes(self, z: SparseTensor) -> list[GaussianScene]:
        """Turn the raw output layer [N, channels] into one scene per sample."""
        config = self.config
        K = config.num_gaussians
        raw = z.feats.split([*config.fields.values()], dim=1)
        xyz, color, scaling, rotation, opacity = (
            rearrange(part, "n (k c) -> n k c", k=K) * config.lr.get(name, 1.0)
            for part, name in zip(raw, config.fields, strict=True)
        )
        if config.perturb_offset:
            xyz = xyz + self.offset_perturbation
        voxel = (z.coords[:, None, 1:].to(xyz.dtype) + 0.5) / self.resolution
        center = voxel + torch.tanh(xyz) * (0.5 * config.voxel_size / self.resolution) - 0.5
        activation = F.softplus if config.scaling_activation == "softplus" else torch.exp
        scale = torch.sqrt(
            activation(scaling + config.scaling_shift).square() + config.kernel_3d**2
        )
        # made on the device: from the host's numbers a copy would wait
        identity = F.pad(rotation.new_ones(1), (0, 3))
        rotation = F.normalize(rotation + identity, dim=-1)
        opacity = torch.sigmoid(opacity + config.opacity_shift)
        color = rearrange(color, "n k c -> n k 1 c")  # one spherical-harmonic coefficient
        counts = [n * K for n in z.cache.counts]
        parts = [
            rearrange(part, "n k ... -> (n k) ...").split(counts)
            for part in (center, scale, rotation, opacity, color)
        ]
        return [GaussianScene(*tensors, config.kernel_2d) for tensors in zip(*parts, strict=True)]


class GaussianVAE(VAE):
    """An encoder of its own and a Gaussian decoder."""

    DECODER = GaussianDecoder
