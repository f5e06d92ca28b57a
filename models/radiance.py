"""Latents -> a radiance field in N sparse voxels (published: SLatRadianceFieldDecoder).

Each voxel holds a small tensor of rank R in CP form ("trivec": R vectors of n numbers along each
axis), whose R products at a point weight R densities and R colours (arXiv 2412.01506; the
representation is that of Strivec, arXiv 2307.13226).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor

from kernels import Camera, Image, raymarch
from models.sparse import SparseTensor
from models.vae import VAE, Decoder


@dataclass(frozen=True)
class RadianceConfig:
    """The published `representation_config`, parsed once, and what ours adds to it."""

    rank: int = 16
    dim: int = 8  # numbers along each axis of a voxel
    # multiplies the raw densities; above 1 an untrained field turns opaque sooner
    density_scale: float = 1.0
    # spread of the untrained vectors around 1. At 0, as published, the ranks of a voxel start
    # equal, have equal gradients and, where gradients are deterministic, stay equal: a field of
    # rank 1
    trivec_std: float = 0.0

    @classmethod
    def parse(cls, published: dict) -> "RadianceConfig":
        """Check and convert the dict. Raises ValueError for a key or value that is not possible."""
        known = {f.name for f in fields_of(cls)}
        if unknown := sorted(published.keys() - known):
            raise ValueError(
                f"representation_config has unknown keys {unknown}; known are {sorted(known)}"
            )
        config = cls(**published)
        if config.rank < 1 or config.dim < 2:
            raise ValueError(f"rank {config.rank} must be at least 1, dim {config.dim} at least 2")
        if not (0 < config.density_scale < math.inf and 0 <= config.trivec_std < math.inf):
            raise ValueError(
                f"density_scale {config.density_scale} must exceed 0, trivec_std "
                f"{config.trivec_std} be at least 0, both finite"
            )
        return config

    @property
    def fields(self) -> dict[str, int]:
        """Channels of the output layer by published name, in order."""
        return {
            "trivec": self.rank * 3 * self.dim,
            "density": self.rank,
            "features_dc": self.rank * 3,
        }


@dataclass
class RadianceScene:
    """The radiance field of one object, in N voxels of a grid over the unit cube."""

    position: Tensor  # [N, 3] voxel centres in [0, 1]
    trivec: Tensor  # [N, R, 3, n]
    density: Tensor  # [N, R]
    color: Tensor  # [N, R, 1, 3] spherical-harmonic coefficients
    resolution: int  # voxels along each side of the cube

    def render(self, camera: Camera, background: Tensor) -> Image:
        """Render the scene from V views on background [V, 3]."""
        return self.render_batch([self], camera, [0] * len(camera), background)

    @classmethod
    def render_batch(
        cls,
        scenes: Sequence["RadianceScene"],
        camera: Camera,
        view_scene: Sequence[int],
        background: Tensor,
        *,
        offset: Tensor | None = None,
    ) -> Image:
        """Render V views of B scenes in one launch; models.render is the public name.

        Without an `offset` [V, H, W], every ray starts its samples at a random one where gradients
        are recorded, as published; elsewhere at half a step, so that pictures and scores repeat.
        """
        sizes = {scene.resolution for scene in scenes}
        if len(sizes) != 1:
            raise ValueError(f"the scenes of a batch have different resolutions: {sorted(sizes)}")
        # a list: torch.compile cannot trace what is read
        starts = [0, *accumulate(len(scene.position) for scene in scenes)]
        tensors = [
            torch.cat([getattr(scene, name) for scene in scenes])
            for name in ("position", "trivec", "density", "color")
        ]
        if offset is None and not torch.is_grad_enabled():
            offset = background.new_full((len(camera), camera.height, camera.width), 0.5)
        return raymarch(
            *tensors, starts, camera, view_scene, background, sizes.pop(), offset=offset
        )

    @classmethod
    def penalties(cls, scenes: Sequence["RadianceScene"]) -> dict[str, Tensor]:
        """No penalties: a radiance field trains on its pictures alone."""
        return {}


class RadianceDecoder(Decoder):
    """Latents [N, latent_channels] -> a RadianceScene per sample."""

    NAME = "SLatRadianceFieldDecoder"
    CONFIG = RadianceConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config.trivec_std:
            bias = self.out_layer.bias[: self.config.fields["trivec"]]
            torch.nn.init.normal_(bias, std=self.config.trivec_std)

    def forward(self, z: SparseTensor) -> list[RadianceScene]:
        """One scene per sample; a sample without voxels gives a field without voxels."""
        config = self.config
        trivec, density, color = self.fields(z).feats.split([*config.fields.values()], dim=1)
        position = (z.coords[:, 1:].to(trivec.dtype) + 0.5) / self.resolution
        trivec = rearrange(trivec, "n (r xyz d) -> n r xyz d", r=config.rank, xyz=3) + 1
        density = density * config.density_scale
        color = rearrange(color, "n (r rgb) -> n r 1 rgb", r=config.rank)
        parts = [part.split(z.cache.counts) for part in (position, trivec, density, color)]
        return [RadianceScene(*scene, self.resolution) for scene in zip(*parts, strict=True)]


class RadianceVAE(VAE):
    """An encoder of its own and a radiance-field decoder."""

    DECODER = RadianceDecoder
