"""The training objective: one forward pass from a batch to its weighted loss."""

from collections.abc import Mapping

from torch import Tensor, nn

from models import VAE, SparseTensor
from train.data.batch import Batch
from train.losses.pictures import Pictures, kl

# what compares scenes with a batch: Pictures, or a class with the same methods
Compare = type[Pictures]


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum(weight * term); ValueError where a term has no weight or a weight no term."""
    if terms.keys() != weights.keys():
        raise ValueError(
            f"loss terms without a weight: {sorted(terms.keys() - weights.keys())}; "
            f"weights without a term: {sorted(weights.keys() - terms.keys())}"
        )
    return sum(weights[name] * term for name, term in terms.items())


class Objective(nn.Module):
    """A batch -> its loss, its terms and its PSNR: the one forward pass that DDP sees."""

    def __init__(self, vae: VAE, compare: nn.Module, weights: Mapping[str, float]):
        super().__init__()
        self.vae = vae
        self.compare = compare
        self.weights = weights

    def forward(
        self, x: SparseTensor, noise: Tensor, batch: Batch, background: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`noise` [N, latent] and `background` [V, 3] are the step's random draws."""
        posterior, scenes = self.vae(x, noise)
        terms, psnr = self.compare(scenes, batch, background)
        if posterior is not None:
            terms["kl"] = kl(posterior.mean, posterior.logvar)
        loss = weighted(terms, self.weights)
        return loss, {"loss": loss, **terms, "psnr": psnr}
