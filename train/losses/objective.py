"""The training objective: one forward pass from a batch to its weighted loss."""

from collections.abc import Mapping

from torch import Tensor, nn

from models import VAE, SparseTensor
from train.data.batch import Batch
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
    """The forward pass that DDP sees: a batch -> its loss, its terms and its PSNR."""

    def __init__(self, vae: VAE, loss: Loss, weights: Mapping[str, float]):
        super().__init__()
        self.vae = vae
        self.loss = loss
        self.weights = weights

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
        terms, psnr = self.loss(scenes, batch, background, offset)
        if posterior is not None and "kl" in self.weights:  # not of a frozen encoder
            terms["kl"] = kl(posterior.mean, posterior.logvar)
        if share is not None:
            terms = {name: term * share[MEANS[name]] for name, term in terms.items()}
            psnr = psnr * share[MEANS["psnr"]]
        loss = weighted(terms, self.weights)
        return loss, {"loss": loss, **terms, "psnr": psnr}
