"""The training objective: one forward pass from a batch to its weighted loss."""

from collections.abc import Mapping

from torch import Tensor, nn

from models import VAE, SparseTensor
from train.data.batch import Batch
from train.losses.pictures import Loss, kl


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
        self, x: SparseTensor, noise: Tensor, batch: Batch, background: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`noise` [N, latent] and `background` [V, 3] are the step's random draws."""
        posterior, scenes = self.vae(x, noise)
        terms, psnr = self.loss(scenes, batch, background)
        if posterior is not None and "kl" in self.weights:  # not of a frozen encoder
            terms["kl"] = kl(posterior.mean, posterior.logvar)
        loss = weighted(terms, self.weights)
        return loss, {"loss": loss, **terms, "psnr": psnr}
