"""LPIPS, the learned perceptual distance (Zhang et al. 2018, version 0.1, network "vgg"), in plain torch.

Weights come from one safetensors file, 31 tensors under the names that torchvision and the `lpips` package use:

    features.{0,2,5,7,10,12,14,17,19,21,24,26,28}.{weight,bias}   VGG16 convolutions [out, in, 3, 3] and [out], ImageNet
    lin{0..4}.model.1.weight                                      heads [1, channels, 1, 1], non-negative

To make it where both packages are installed (torchvision's classifier is not needed):

    vgg, heads = torchvision.models.vgg16(weights="IMAGENET1K_V1").features, lpips.LPIPS(net="vgg").state_dict()
    save_file({f"features.{k}": v for k, v in vgg.state_dict().items()}
              | {k: v for k, v in heads.items() if re.fullmatch(r"lin\\d[.]model[.]1[.]weight", k)}, "lpips_vgg.safetensors")
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # convolutions between poolings, in torchvision's numbering
CHANNELS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
SMALLEST = 16  # pixels: four poolings


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Every key of a weights file with the shape of its tensor."""
    shapes, before = {}, 3
    for stage, (layers, channels) in enumerate(zip(STAGES, CHANNELS, strict=True)):
        for layer in layers:
            shapes[f"features.{layer}.weight"], shapes[f"features.{layer}.bias"] = (channels, before, 3, 3), (channels,)
            before = channels
        shapes[f"lin{stage}.model.1.weight"] = (1, channels, 1, 1)
    return shapes


def _read(path: str | Path) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise ValueError(f"LPIPS weights: {path} is not a file")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"LPIPS weights: {path} is truncated or not a safetensors file: {error}") from error
    wanted = weight_shapes()
    if missing := [key for key in wanted if key not in weights]:
        raise ValueError(f"LPIPS weights: {path} lacks {len(missing)} of {len(wanted)} tensors, first {missing[0]}")
    for key, shape in wanted.items():
        if tuple(weights[key].shape) != shape:
            raise ValueError(f"LPIPS weights: {key} in {path} has shape {tuple(weights[key].shape)}, not {shape}")
    return {key: weights[key] for key in wanted}


def _unit(x: Tensor) -> Tensor:
    """x / (|x| + 1e-10) over channels; zero vectors stay zero, with a finite gradient where sqrt alone has none."""
    square = x.square().sum(1, keepdim=True)
    some = square > 0
    return x / (torch.where(some, square, 1.0).sqrt() * some + 1e-10)


class LPIPS(nn.Module):
    """Perceptual distance of pictures [V, 3, H, W] in [0, 1] (not clamped) from a target: [V], 0 for equal ones.

    Frozen, in `dtype`; its gradient goes to the first picture only. Raises ValueError for a file that is absent, unreadable,
    without a tensor or with one of another shape, and for pictures below 16 pixels.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32):
        super().__init__()
        weights = {k: nn.Parameter(v.to(dtype), requires_grad=False) for k, v in _read(path).items()}
        # parameters, not buffers: DDP would send buffers around before every forward pass
        self.weights = nn.ParameterList([weights[f"features.{i}.weight"] for stage in STAGES for i in stage])
        self.biases = nn.ParameterList([weights[f"features.{i}.bias"] for stage in STAGES for i in stage])
        self.heads = nn.ParameterList([weights[f"lin{i}.model.1.weight"] for i in range(len(STAGES))])

    def _features(self, picture: Tensor) -> list[Tensor]:
        shift, scale = (picture.new_tensor(c).view(1, 3, 1, 1) for c in (SHIFT, SCALE))
        x, layers, found = (2 * picture - 1 - shift) / scale, zip(self.weights, self.biases, strict=True), []
        for stage, convolutions in enumerate(STAGES):
            x = F.max_pool2d(x, 2) if stage else x
            for weight, bias in (next(layers) for _ in convolutions):
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            found.append(_unit(x))
        return found

    def forward(self, picture: Tensor, target: Tensor) -> Tensor:
        if picture.shape != target.shape or picture.ndim != 4 or picture.shape[1] != 3:
            raise ValueError(f"LPIPS compares [V, 3, H, W] pictures, not {tuple(picture.shape)} with {tuple(target.shape)}")
        if min(picture.shape[2:]) < SMALLEST:
            raise ValueError(f"LPIPS needs pictures of {SMALLEST} pixels or more, not {tuple(picture.shape[2:])}")
        with torch.no_grad():
            wanted = self._features(target)
        stages = zip(self._features(picture), wanted, self.heads, strict=True)
        return sum(((a - b).square() * head).sum(1).mean((1, 2)) for a, b, head in stages)
