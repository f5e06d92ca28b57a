"""Losses of pictures: reconstruction terms, KL and PSNR, as in microsoft/TRELLIS. V views.

    loss = l1 + 0.2 ssim + 0.2 lpips + 1e-6 kl + the penalties of the decoder's scenes

is that of Gaussians and radiance fields; meshes have more terms (train.losses.geometry). The
weights are the run's (train.config); a term here is unweighted, and 0 is its best value.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

import models
from kernels import ssim
from models import Scene
from train.data.batch import Batch
from train.lpips import LPIPS


class Loss(Protocol):
    """A module that compares decoded scenes with a batch.

    It is made of a file of LPIPS weights, or none. `meshes` says whether a batch must bring the
    true meshes.
    """

    meshes: bool

    def __init__(self, lpips: str | Path | None = None): ...

    def __call__(
        self,
        scenes: Sequence[Scene],
        batch: Batch,
        background: Tensor,
        offset: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Loss terms by name, unweighted, and the mean PSNR; `background` [V, 3].

        What each is a mean over stands in train.losses.objective.MEANS. `offset` is that of
        models.render.
        """

    def show(self, scenes: Sequence[Scene], batch: Batch) -> dict[str, Tensor]:
        """Rows of a sample picture by name, [V, 3, H, W], the true ones above ours."""

    def measure(self, decoders: Mapping[str, Callable], objects: object) -> tuple[dict, str]:
        """Scores beyond the PSNR of pictures, for evaluation.json, and their table."""


def composite(
    image: Tensor,  # [V, 4, H, W] RGBA in [0, 1], straight alpha
    background: Tensor,  # [V, 3]
) -> Tensor:  # [V, 3, H, W]
    """Lay a picture on a plain background: colour * alpha + (1 - alpha) * background."""
    if image.shape[1] != 4 or background.shape != (len(image), 3):
        raise ValueError(
            f"composite needs [V, 4, H, W] on [V, 3], not {tuple(image.shape)} on "
            f"{tuple(background.shape)}"
        )
    color, alpha = image.split([3, 1], dim=1)
    return color * alpha + (1 - alpha) * rearrange(background, "v c -> v c 1 1")


class Reconstruction(nn.Module):
    """Terms that compare rendered pictures with the true ones: "l1", "ssim" and "lpips".

    They are means over all pictures. "ssim" is 1 - SSIM. "lpips" exists only where a file with its
    weights is given. The gradient goes to `rendered` alone.
    """

    def __init__(self, lpips: str | Path | None = None):
        super().__init__()
        self.lpips = LPIPS(lpips) if lpips else None

    def forward(self, rendered: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`rendered` and `target` [V, 3, H, W], not clamped. ValueError for shapes that differ."""
        if rendered.shape != target.shape:
            raise ValueError(
                f"rendered {tuple(rendered.shape)} and target {tuple(target.shape)} differ in shape"
            )
        target = target.detach()
        terms = {"l1": (rendered - target).abs().mean(), "ssim": 1 - ssim(rendered, target).mean()}
        if self.lpips is not None:
            terms["lpips"] = self.lpips(rendered, target).mean()
        return terms


class PictureLoss(nn.Module):
    """The loss of Gaussians and radiance fields: pictures, and the scenes' own penalties.

    Scenes are rendered on plain backgrounds from the views of the batch.
    """

    meshes = False

    def __init__(self, lpips: str | Path | None = None):
        super().__init__()
        self.reconstruction = Reconstruction(lpips)

    def forward(
        self,
        scenes: Sequence[Scene],
        batch: Batch,
        background: Tensor,
        offset: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Loss terms by name, unweighted, and the mean PSNR; `background` [V, 3]."""
        image = models.render(scenes, batch.camera, batch.view_scene, background, offset)
        target = composite(batch.image, background)
        terms = self.reconstruction(image.color, target) | models.penalties(scenes)
        return terms, psnr(image.color, target).mean()

    def show(self, scenes: Sequence[Scene], batch: Batch) -> dict[str, Tensor]:
        """Rows of a sample picture by name, [V, 3, H, W] on white: the true views above ours."""
        white = batch.image.new_ones(len(batch.image), 3)
        ours = models.render(scenes, batch.camera, batch.view_scene, white).color
        return {"truth": composite(batch.image, white), "ours": ours}

    def measure(self, decoders: Mapping[str, Callable], objects: object) -> tuple[dict, str]:
        """Scores beyond the PSNR of pictures, and their table: none."""
        return {}, ""


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Divergence of N(mean, exp(logvar)) from N(0, 1), both [N, latent]; 0 without voxels.

    A mean over voxels and channels. ValueError for shapes that differ.
    """
    if mean.shape != logvar.shape:
        raise ValueError(
            f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)} differ in shape"
        )
    return 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum() / max(mean.numel(), 1)


def smooth_l1(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """Mean of d^2 / (2 beta) below d = |a - b| = beta and of d - beta / 2 above it."""
    return F.smooth_l1_loss(a, b, beta=beta)


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """PSNR in dB of each picture [V, C, H, W] in [0, 1]: [V]. Equal pictures give inf.

    `mask` [V, 1, H, W] (bool, or weights) restricts it to pixels; a picture with none of them gives
    nan.
    """
    error = reduce((a - b).square(), "v c h w -> v 1 h w", "mean")
    mask = torch.ones_like(error) if mask is None else mask.to(error.dtype)
    total = reduce(error * mask, "v 1 h w -> v", "sum")
    return -10 * torch.log10(total / reduce(mask, "v 1 h w -> v", "sum"))
