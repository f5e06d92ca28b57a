"""The structured-latent VAEs: sparse voxel features -> latents -> scenes that render.

vae = models.GaussianVAE(models.Encoder(...), models.GaussianDecoder(...))
posterior, scenes = vae(models.SparseTensor(feats, coords))
image = models.render(scenes, camera, view_scene, background)
"""

from pathlib import Path

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
from models.scene import Scene as Scene
from models.scene import penalties as penalties
from models.scene import render as render
from models.sparse import SparseTensor as SparseTensor
from models.vae import VAE as VAE
from models.vae import Encoder as Encoder
from models.vae import Posterior as Posterior
from models.vae import load_weights as load_weights
from models.vae import read_pretrained
from models.vae import read_tensors as read_tensors
from models.vae import save_pretrained as save_pretrained

MODELS = {model.NAME: model for model in (Encoder, GaussianDecoder, RadianceDecoder, MeshDecoder)}


def load_pretrained(prefix: str | Path) -> nn.Module:
    """Build the model that PREFIX.json names and load PREFIX.safetensors into it, weights kept in
    fp32.

    Published class names are accepted with or without their "Elastic" prefix, and fp16 files.
    Raises ValueError for a missing or truncated file, an unknown class, unknown arguments and
    tensors that do not fit, naming each.
    """
    name, args, weights = read_pretrained(prefix)
    model_class = MODELS.get(name.removeprefix("Elastic"))
    if model_class is None:
        raise ValueError(f"{prefix}.json names the class {name!r}; known are {', '.join(MODELS)}")
    if model_class is MeshDecoder:
        args = {"skip_weight": "spconv"} | args  # ours say which they are
    try:
        model = model_class(**args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{prefix}.json: arguments do not fit {name}: {error}") from error
    load_weights(model, weights, f"{prefix}.safetensors")
    return model
