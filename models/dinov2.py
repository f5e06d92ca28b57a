"""DINOv2, the vision transformer whose patch tokens are the published image features.

Oquab et al. 2023, and with registers Darcet et al. 2023. ViT-S, B and L with patches of 14 pixels;
parameter names are those of the official checkpoints, which load unchanged:

    model = dinov2.load("dinov2_vitl14_reg", "dinov2_vitl14_reg4_pretrain.pth")
    # [V, 3, H, W] in [0, 1] -> [V, H / 14, W / 14, 1024]
    tokens = model(dinov2.normalized(pictures))

V pictures, T tokens, C channels, H heads. Inference in plain torch: attention is torch's own.
"""

import pickle
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.reading import check_file, first_line, read_safetensors, shown
from models.vae import load_weights

PATCH = 14  # pixels a side
GRID = 37  # patches a side that the position embedding is stored for: 518 pixels
MLP_RATIO = 4
EPS = 1e-6  # of every layer norm
# of ImageNet's colours in [0, 1]
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
URL = "https://dl.fbaipublicfiles.com/dinov2"


@dataclass(frozen=True)
class Size:
    """The size of a model, and how it resamples its position embedding."""

    channels: int
    blocks: int
    heads: int
    registers: int = 0  # tokens that belong to no patch
    antialias: bool = False  # filter the embedding where the grid is smaller
    # Added to the grid's size, once against rounding: the embedding is sampled at a scale that is a
    # little too large. The models without registers were published with it.
    offset: float = 0.1


PLAIN = {
    "dinov2_vits14": Size(384, 12, 6),
    "dinov2_vitb14": Size(768, 12, 12),
    "dinov2_vitl14": Size(1024, 24, 16),
}
MODELS = PLAIN | {
    f"{name}_reg": replace(size, registers=4, antialias=True, offset=0.0)
    for name, size in PLAIN.items()
}


class Attention(nn.Module):
    """Multi-head self-attention among all tokens of a picture."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # [V, T, C] -> [V, T, C]
        qkv = rearrange(self.qkv(x), "v t (three h d) -> three v h t d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(*qkv)
        return self.proj(rearrange(out, "v h t d -> v t (h d)"))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, MLP_RATIO * channels)
        self.fc2 = nn.Linear(MLP_RATIO * channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # [V, T, C] -> [V, T, C]
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:  # [V, T, C] -> [V, T, C]
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm block with scaled branches.

    x = x + scale(attention(norm(x))); x = x + scale(mlp(norm(x))).
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, EPS)
        self.attn = Attention(channels, heads)
        self.ls1 = LayerScale(channels)
        self.norm2 = nn.LayerNorm(channels, EPS)
        self.mlp = MLP(channels)
        self.ls2 = LayerScale(channels)

    def forward(self, x: Tensor) -> Tensor:  # [V, T, C] -> [V, T, C]
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A linear map of every patch of 14 x 14 pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Conv2d(3, channels, PATCH, PATCH)

    def forward(self, picture: Tensor) -> Tensor:  # [V, 3, H, W] -> [V, C, H / 14, W / 14]
        return self.proj(picture)


class DINOv2(nn.Module):
    """The vision transformer of a Size: normalised pictures to the tokens of their patches.

    The tokens are those of the last block before the final norm, as the published features are.
    """

    # what only the official training and its heads use
    idle = ("mask_token", "norm.weight", "norm.bias")

    def __init__(self, size: Size):
        super().__init__()
        C = size.channels
        self.size = size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + GRID**2, C))
        if size.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, size.registers, C))
        self.mask_token = nn.Parameter(torch.zeros(1, C))
        self.patch_embed = PatchEmbed(C)
        self.blocks = nn.ModuleList(Block(C, size.heads) for _ in range(size.blocks))
        self.norm = nn.LayerNorm(C, EPS)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position embedding of a grid of patches: [1, C, rows, columns].

        A grid other than the stored one is resampled, bicubic.
        """
        stored = rearrange(self.pos_embed[:, 1:], "v (y x) c -> v c y x", y=GRID)
        if (rows, columns) == (GRID, GRID):
            return stored
        if not self.size.offset:
            target = {"size": (rows, columns)}
        else:
            scale = [(side + self.size.offset) / GRID for side in (rows, columns)]
            target = {"scale_factor": scale}
        return F.interpolate(stored, mode="bicubic", antialias=self.size.antialias, **target)

    def embed(self, picture: Tensor) -> Tensor:  # [V, 3, H, W] -> [V, 1 + registers + patches, C]
        """The tokens before the first block: class, registers, then patches row by row.

        Raises ValueError for a picture that patches do not fill.
        """
        if picture.ndim != 4 or picture.shape[1] != 3 or not picture.numel():
            raise ValueError(f"pictures must be [V, 3, H, W], not {list(picture.shape)}")
        if picture.shape[2] % PATCH or picture.shape[3] % PATCH:
            height, width = picture.shape[2:]
            raise ValueError(f"a picture of {width} x {height} pixels has no whole {PATCH}s")
        patches = self.patch_embed(picture)
        patches = patches + self.positions(*patches.shape[2:])
        begin = [self.cls_token + self.pos_embed[:, :1]]
        if self.size.registers:
            begin.append(self.register_tokens)
        begin = torch.cat(begin, 1).expand(len(picture), -1, -1)
        return torch.cat([begin, rearrange(patches, "v c y x -> v (y x) c")], 1)

    def forward(self, picture: Tensor) -> Tensor:  # [V, 3, H, W] -> [V, H / 14, W / 14, C]
        x = self.embed(picture)
        for block in self.blocks:
            x = block(x)
        return rearrange(
            x[:, 1 + self.size.registers :], "v (y x) c -> v y x c", y=picture.shape[2] // PATCH
        )


def normalized(picture: Tensor) -> Tensor:  # [V, 3, H, W] -> [V, 3, H, W]
    """Shift and scale colours in [0, 1] to the mean 0 and deviation 1 of ImageNet's."""
    mean = torch.tensor(MEAN, dtype=picture.dtype, device=picture.device)
    std = torch.tensor(STD, dtype=picture.dtype, device=picture.device)
    return (picture - mean[:, None, None]) / std[:, None, None]


def command(name: str) -> str:
    """The shell command that gets the official weights of a model."""
    registers = MODELS[name].registers
    base = name.removesuffix("_reg")
    file = f"{name}{registers or ''}_pretrain.pth"
    return f"curl -LO {URL}/{base}/{file}"


def load(name: str, file: str | Path) -> DINOv2:
    """Build a model of MODELS with weights of a file in the official names, .pth or .safetensors.

    Weights become fp32. A .pth is read without running any code of it. Raises ValueError that
    names the file where it is missing, damaged, or of another model, and the tensor that does not
    fit.
    """
    weights = _read(Path(file), name)
    model = DINOv2(MODELS[name])
    try:
        load_weights(model, weights, str(file))
    except ValueError as error:
        raise ValueError(f"{error}{_hint(name, weights)}") from error
    return model.eval().requires_grad_(False)


def _read(file: Path, name: str) -> dict[str, Tensor]:
    check_file(file, f"is not a file; weights of {name}: {command(name)}")
    if file.suffix == ".safetensors":
        return read_safetensors(file)[0]
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type]
        if packed:
            raise ValueError(f"{shown(packed[0])} in it is compressed, which torch.save never does")
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        OSError,
        EOFError,
        MemoryError,
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        ArithmeticError,
    ) as error:
        raise ValueError(f"{file} is truncated or holds no weights: {first_line(error)}") from error
    tensors = isinstance(content, dict) and content
    if not tensors or not all(
        type(name) is str and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{file} is not a dictionary of tensors")
    return content


def _hint(name: str, weights: dict[str, Tensor]) -> str:
    """Say which other model the weights are of, where their names and shapes tell."""
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    for other, size in MODELS.items():
        with torch.device("meta"):
            wanted = {key: tuple(t.shape) for key, t in DINOv2(size).state_dict().items()}
        if shapes == wanted:
            return f" (these are weights of {other}, not of {name})"
    return ""
