"""The structured-latent VAEs: sparse voxel features -> latents -> scenes that render.

vae = models.GaussianVAE(models.Encoder(...), models.GaussianDecoder(...))
posterior, scenes = vae(models.SparseTensor(feats, coords))
image = models.render(scenes, camera, view_scene, background)
"""

import re
from pathlib import Path

import torch
from torch import nn

from models.gaussian import GaussianDecoder as GaussianDecoder
from models.gaussian import GaussianScene as GaussianScene
from models.gaussian import GaussianVAE as GaussianVAE
from models.mesh import MeshDecoder as MeshDecoder
from models.mesh import MeshScene as MeshScene
from models.mesh import MeshVAE as MeshVAE
from models.radiance import RadianceDecoder as RadianceDecoder
from models.radiance import RadianceScene as RadianceScene
from models.radiance import RadianceVAE as RadianceVAE
from models.reading import first_line, shown
from models.scene import Scene as Scene
from models.scene import penalties as penalties
from models.scene import render as render
from models.sparse import SparseTensor as SparseTensor
from models.vae import VAE as VAE
from models.vae import Encoder as Encoder
from models.vae import Posterior as Posterior
from models.vae import check_weights, read_pretrained
from models.vae import load_weights as load_weights
from models.vae import read_tensors as read_tensors
from models.vae import save_pretrained as save_pretrained

LARGEST = 1 << 16  # of any size in a model's arguments
# every kind of decoder, by the name of its training script
DECODERS: dict[str, type[VAE]] = {
    "gaussian": GaussianVAE,
    "radiance": RadianceVAE,
    "mesh": MeshVAE,
}


def published_classes() -> dict[str, type[nn.Module]]:
    """Map the published class names to our models."""
    return {model.NAME: model for model in (Encoder, *(vae.DECODER for vae in DECODERS.values()))}


def load_pretrained(prefix: str | Path) -> nn.Module:
    """Build the model that PREFIX.json names and load PREFIX.safetensors into it.

    Weights become fp32. Published class names are accepted with or without their "Elastic" prefix,
    and fp16 files. Raises ValueError for a missing or truncated file, an unknown class, unknown
    arguments and tensors that do not fit, naming each.
    """
    name, args, weights = read_pretrained(prefix)
    known = published_classes()
    model_class = known.get(name.removeprefix("Elastic"))
    if model_class is None:
        raise ValueError(
            f"{prefix}.json names the class {shown(name)}; known are {', '.join(known)}"
        )
    args = model_class.PUBLISHED_ARGUMENTS | args
    _check_sizes(args, f"{prefix}.json")
    _check_blocks(args, weights, str(prefix))
    try:
        with torch.device("meta"):  # which takes no memory, whatever the sizes
            planned = model_class(**args)
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{prefix}.json: arguments do not fit {name}: {first_line(error)}"
        ) from error
    check_weights(planned, weights, f"{prefix}.safetensors")
    model = model_class(**args)
    load_weights(model, weights, f"{prefix}.safetensors")
    return model


def _check_sizes(args: dict, file: str) -> None:
    """Raise ValueError for sizes that no model has; building it would not end.

    Those in nested arguments count too.
    """
    for key, value in args.items():
        if isinstance(value, dict):
            _check_sizes(value, file)
        if isinstance(value, int) and value > LARGEST and key != "num_blocks":
            raise ValueError(f"{file}: {key} {shown(value)} is over {LARGEST}")


def _check_blocks(args: dict, weights: dict, prefix: str) -> None:
    """Raise ValueError for another number of transformer blocks than the file holds."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in weights)
    held = len({match[1] for match in found if match})
    if (said := args.get("num_blocks", held)) != held:
        raise ValueError(
            f"{prefix}.json: num_blocks is {shown(said)}, but {prefix}.safetensors holds {held} "
            "blocks"
        )
