"""The encoder, the base class of decoders, the VAE, and files of models. N voxels, C channels.

The models and their names follow microsoft/TRELLIS (Structured 3D Latents, arXiv 2412.01506).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels import layer_norm
from kernels.checks import check_whole
from models.checksum import read_checked, save_checked
from models.files import whole, write_whole
from models.finite import check_finite
from models.layers import Trunk
from models.reading import check_file, check_floats, entry, read_json, shown
from models.scene import Scene
from models.sparse import SparseTensor

OUTPUT_EPS = 1e-5
WHITENING = 1e-2  # of the largest variance, added to all: see Encoder.start_principal
# names of the tensors that published files hold in fp16
HALVES = re.compile(r"(blocks\..*|upsample\..*\.conv)\.(weight|bias)")


@dataclass
class Posterior:
    """A diagonal Gaussian per voxel."""

    mean: Tensor  # [N, latent]
    logvar: Tensor  # [N, latent]
    voxels: SparseTensor  # whose coordinates the latents live on

    def mode(self) -> SparseTensor:
        return self.voxels.replace(self.mean)

    def sample(
        self, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> SparseTensor:
        """Draw latents: mean + exp(logvar / 2) * noise.

        The noise is drawn from `generator` unless it is given. Raises ValueError for noise of
        another shape than the posterior's.
        """
        if noise is None:
            noise = torch.randn(
                self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device
            )
        if noise.shape != self.mean.shape:
            raise ValueError(
                f"noise must be {list(self.mean.shape)}, as the posterior, not {list(noise.shape)}"
            )
        return self.voxels.replace(self.mean + torch.exp(0.5 * self.logvar) * noise)


class Encoder(Trunk):
    """Voxel features -> Posterior (published: SLatEncoder).

    `logvar_init`: None gives the published zero output layer, whose latents start as pure noise; a
    number keeps Xavier weights there and starts the log variance at that value, which learns far
    faster in short runs. Raises ValueError for sizes below 1 and whatever the trunk does not know.
    """

    NAME = "SLatEncoder"
    PUBLISHED_ARGUMENTS: dict = {}

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        model_channels: int,
        latent_channels: int,
        num_blocks: int,
        *,
        logvar_init: float | None = None,
        **trunk,
    ):
        check_whole("resolution", resolution)
        check_whole("in_channels", in_channels)
        check_whole("latent_channels", latent_channels)
        super().__init__(in_channels, model_channels, num_blocks, **trunk)
        self.resolution = resolution
        self.latent_channels = latent_channels
        self.args = dict(
            resolution=resolution,
            in_channels=in_channels,
            model_channels=model_channels,
            latent_channels=latent_channels,
            num_blocks=num_blocks,
            logvar_init=logvar_init,
            **trunk,
        )
        self.out_layer = nn.Linear(model_channels, 2 * latent_channels)
        self.initialize()
        if logvar_init is not None:
            nn.init.xavier_uniform_(self.out_layer.weight)
            nn.init.constant_(self.out_layer.bias[latent_channels:], logvar_init)

    @torch.no_grad()
    def start_principal(self, mean: Tensor, covariance: Tensor, gain: float = 1.0) -> None:
        """Start from the principal components of the features, which learns far faster.

        `mean` [in_channels] and `covariance` [in_channels, in_channels] are those of the training
        features. The input layer whitens them (LeCun et al., Efficient BackProp, 1998): as many
        components as the model has channels, each of deviation `gain`, in random directions. The
        output layer reads those that vary most, so that untrained latents are the first principal
        components, but for the last norm and what blocks add. Raises ValueError for other shapes.
        """
        width = self.input_layer.in_features
        for name, given, shape in (
            ("mean", mean, (width,)),
            ("covariance", covariance, (width, width)),
        ):
            if given.shape != shape:
                raise ValueError(f"{name} is {list(given.shape)}, the features need {list(shape)}")
        variances, components = torch.linalg.eigh(covariance.double().cpu())  # ascending
        kept = min(width, self.model_channels)
        variances = variances.flip(0)[:kept].clamp(min=0)
        components = components.flip(1)[:, :kept]  # [in_channels, kept]
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        components = components * largest.sign()  # a library may return either sign
        # what varies hardly at all is not blown up to a whole deviation
        deviations = (variances + WHITENING * variances[0].clamp(min=1e-12)).sqrt()
        directions = torch.empty(self.model_channels, kept, dtype=torch.float64)
        nn.init.orthogonal_(directions)
        weight = gain * directions @ (components / deviations).T
        self.input_layer.weight.copy_(weight)
        self.input_layer.bias.copy_(-weight @ mean.double().cpu())
        read = min(self.latent_channels, kept)
        self.out_layer.weight.zero_()
        self.out_layer.weight[:read].copy_(directions[:, :read].T)

    def forward(self, x: SparseTensor) -> Posterior:
        """The posterior of x [N, in_channels].

        Raises ValueError where its channels or dtype are not the model's, or its grid is wider.
        """
        h = self.out_layer(layer_norm(self.trunk(x.feats, x.cache), OUTPUT_EPS))
        mean, logvar = h.chunk(2, dim=1)
        return Posterior(mean, logvar, x)


class Decoder(Trunk):
    """Latents [N, latent_channels] -> a Scene per sample; the base of every kind of decoder.

    A subclass names its published class (NAME) and how the published `representation_config`
    becomes a frozen dataclass whose `fields` are the channels of the output layer in published
    order (CONFIG); it turns them into scenes (forward). Raises ValueError for sizes below 1 and
    whatever the trunk and the configuration do not know.
    """

    NAME: str
    CONFIG: type
    PUBLISHED_ARGUMENTS: dict = {}  # ours that a published checkpoint leaves out

    def __init__(
        self,
        resolution: int,
        model_channels: int,
        latent_channels: int,
        num_blocks: int,
        *,
        representation_config: dict,
        **trunk,
    ):
        check_whole("resolution", resolution)
        check_whole("latent_channels", latent_channels)
        super().__init__(latent_channels, model_channels, num_blocks, **trunk)
        self.resolution = resolution
        self.latent_channels = latent_channels
        self.config = self.CONFIG.parse(representation_config)
        self.args = dict(
            resolution=resolution,
            model_channels=model_channels,
            latent_channels=latent_channels,
            num_blocks=num_blocks,
            representation_config=representation_config,
            **trunk,
        )
        self.out_layer = nn.Linear(model_channels, sum(self.config.fields.values()))
        self.initialize()

    def fields(self, z: SparseTensor) -> SparseTensor:
        """The raw output layer, channels in the published order."""
        return z.replace(self.out_layer(layer_norm(self.trunk(z.feats, z.cache), OUTPUT_EPS)))

    def forward(self, z: SparseTensor) -> list[Scene]:
        """One scene per sample; a sample without voxels gives an empty scene."""
        raise NotImplementedError


class VAE(nn.Module):
    """An encoder and a decoder, trained end to end.

    The encoder is None where latents come from a frozen one. Raises TypeError for other models than
    these, and for a decoder that is no DECODER; ValueError for latents that differ.
    """

    DECODER: type[Decoder] = Decoder

    def __init__(self, encoder: Encoder | None, decoder: Decoder):
        super().__init__()
        fits = encoder is None or isinstance(encoder, Encoder)
        if not fits or not isinstance(decoder, self.DECODER):
            given = " and ".join(type(part).__name__ for part in (encoder, decoder))
            raise TypeError(
                f"{type(self).__name__} takes Encoder (or None) and {self.DECODER.__name__}, "
                f"not {given}"
            )
        if encoder is not None and encoder.latent_channels != decoder.latent_channels:
            raise ValueError(
                f"the encoder makes {encoder.latent_channels} latent channels, the decoder "
                f"takes {decoder.latent_channels}"
            )
        self.encoder = encoder
        self.decoder = decoder

    def forward(
        self, x: SparseTensor, noise: Tensor | None = None
    ) -> tuple[Posterior | None, list[Scene]]:
        """Features (or, without an encoder, latents) -> the posterior and one scene per sample."""
        if self.encoder is None:
            return None, self.decoder(x)
        posterior = self.encoder(x)
        return posterior, self.decoder(posterior.sample(noise=noise))

    def set_activation_dtype(self, dtype: torch.dtype) -> None:
        for part in (self.encoder, self.decoder):
            if part is not None:
                part.set_activation_dtype(dtype)


def check_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Check that weights have a model's names and shapes; neither's values are read.

    Raises ValueError that names the first tensors missing, unexpected, of another shape, with both
    shapes, or not of floating point. Tensors that nothing reads (see `read_tensors`) may be
    missing.
    """
    own = model.state_dict()
    read = read_tensors(model)
    missing = sorted(read.keys() - weights.keys())
    extra = sorted(weights.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"{source} does not fit: missing {shown(missing[:3]) if missing else 'nothing'}, "
            f"unexpected {shown(extra[:3]) if extra else 'nothing'}"
        )
    for key, value in weights.items():
        if own[key].shape != value.shape:
            raise ValueError(
                f"{source}: {key} has shape {shown(tuple(value.shape))}, the model's is "
                f"{tuple(own[key].shape)}"
            )
    check_floats(weights, source)


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights of any float dtype into a model's fp32 parameters, strictly.

    Raises ValueError where they do not fit (see `check_weights`), and one that names the first
    tensor with values that are not finite, and how many. Those of tensors that nothing reads may
    be.
    """
    check_weights(model, weights, source)
    own = model.state_dict()
    read = read_tensors(model)
    weights = {key: value.float() for key, value in weights.items()}
    check_finite({key: weights[key] for key in read}, source)
    model.load_state_dict(own | weights, strict=True)


def read_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the tensors that nothing reads, but that published files have.

    A module names its own in `idle`.
    """
    idle = set()
    for name, part in model.named_modules():
        idle.update(f"{name}.{own}".lstrip(".") for own in getattr(part, "idle", ()))
    return {name: t for name, t in model.state_dict().items() if name not in idle}


def save_pretrained(model: nn.Module, prefix: str | Path) -> None:
    """Write PREFIX.json (class name and arguments) and PREFIX.safetensors (weights).

    This is the published layout: fp32, but of a model with use_fp16, as those that were published
    have, fp16 in blocks and convolutions. The tensors have checksums in the header, which loading
    looks at. A file is complete or as it was before. Raises OSError that names the one which could
    not be written, ValueError that names the first tensor with values that are not finite, in that
    dtype: then no file is written.
    """
    prefix = Path(prefix)
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if model.args.get("use_fp16"):
        weights = {k: t.half() if HALVES.fullmatch(k) else t for k, t in weights.items()}
    read = {key: weights[key] for key in read_tensors(model)}
    check_finite(read, f"{prefix}.safetensors is not saved")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with whole(prefix.with_name(f"{prefix.name}.safetensors")) as partial:
        save_checked(weights, partial)
    content = json.dumps({"name": model.NAME, "args": model.args}, indent=2)
    write_whole(prefix.with_name(f"{prefix.name}.json"), content)


def read_pretrained(prefix: str | Path) -> tuple[str, dict, dict[str, Tensor]]:
    """Read the class name, arguments and tensors of a model's two files; errors name the file."""
    config = Path(f"{prefix}.json")
    weights = Path(f"{prefix}.safetensors")
    for file in (config, weights):
        check_file(file, "is not there: a checkpoint is PREFIX.json beside PREFIX.safetensors")
    content = read_json(config)
    name = entry(content, "name", str, str(config))
    args = entry(content, "args", dict, str(config))
    tensors, _ = read_checked(weights)
    return name, args, tensors
