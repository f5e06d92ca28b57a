"""The training objective: one forward pass from a batch to its weighted loss."""

from collections.abc import Mapping

from torch import Tensor, nn

import models
from models import VAE, SparseTensor
from train.data.batch import Batch
from train.losses.direct import WEIGHTS as DIRECT
from train.losses.direct import direct_terms
from train.losses.pictures import Loss, kl

# what each value is a mean over, by which a part of a micro-batch counts (train.parts)
MEANS = {
    "l1": "views",
    "ssim": "views",
    "lpips": "views",
    "kl": "voxels",
    "volume": "voxels",  # as many Gaussians in each
    "opacity": "voxels",
    "mask": "views",
    "depth": "views",
    "normal_l1": "views",
    "normal_ssim": "views",
    "normal_lpips": "views",
    "tsdf": "views",
    "regularization": "objects",
    "occupancy": "voxels",
    "sub_color": "voxels",
    "distance": "objects",
    "surface": "objects",
    "surface_normal": "objects",
    "psnr": "views",
}


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum the weighted terms; ValueError where a term has no weight or a weight no term."""
    if terms.keys() != weights.keys():
        raise ValueError(
            f"loss terms without a weight: {sorted(terms.keys() - weights.keys())}; "
            f"weights without a term: {sorted(weights.keys() - terms.keys())}"
        )
    return sum(weights[name] * term for name, term in terms.items())


class Objective(nn.Module):
    """The forward pass that DDP sees: a batch -> its loss, its terms and its PSNR.

    While `direct` is set nothing is rendered, and there is no PSNR: train.losses.direct.
    """

    def __init__(self, vae: VAE, loss: Loss, weights: Mapping[str, float]):
        super().__init__()
        self.vae = vae
        self.loss = loss
        self.weights = weights
        self.direct = False

    def forward(
        self,
        x: SparseTensor,
        noise: Tensor,
        batch: Batch,
        background: Tensor,
        offset: Tensor | None = None,
        share: Mapping[str, float] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms; `noise` [N, latent], `background` [V, 3] are the random draws.

        `offset` [V, H, W] is another, of radiance fields; None: drawn by their renderer. `share` is
        that of the batch in a micro-batch of which it is a part, of "views", "voxels" and
        "objects": loss, terms and PSNR of the parts then add up to those of the whole.
        """
        posterior, scenes = self.vae(x, noise)
        values = {}
        if self.direct:
            terms = direct_terms(scenes, batch, self.vae.decoder.resolution)
            terms |= models.penalties(scenes)
        else:
            terms, values["psnr"] = self.loss(scenes, batch, background, offset)
        if posterior is not None and "kl" in self.weights:  # not of a frozen encoder
            terms["kl"] = kl(posterior.mean, posterior.logvar)
        if share is not None:
            terms = {name: term * share[MEANS[name]] for name, term in terms.items()}
            values = {name: value * share[MEANS[name]] for name, value in values.items()}
        weights = self.weights
        if self.direct:
            weights = {name: (DIRECT | weights)[name] for name in terms}
        loss = weighted(terms, weights)
        return loss, {"loss": loss, **terms, **values}
