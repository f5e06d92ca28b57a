"""Pictures on surfaces: decoded by their mode, looked up, and where on a surface they lie."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from train.meshes.budget import Budget
from train.meshes.untrusted import TEXTURES, load_picture, open_picture

SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of 16-bit grey
CHANNELS = 4
DECODER = 4  # bytes a pixel while it is decoded, at most
FLOATING = 24  # the same of floating point, with what is made of it
BAND = 256  # rows that are converted at once
THROUGH_RGB = ("CMYK", "YCbCr", "HSV")
TEXEL = 1e-3  # of a texel: a coordinate on its edge may have been rounded down


@dataclass(frozen=True)
class Sampler:
    """The filter of a picture between its texels, and what lies beyond its borders."""

    nearest: bool = False  # False: bilinear
    # beyond the left and right border, and beyond the upper and lower: repeat, clamp or mirror
    wrap: tuple[str, str] = ("repeat", "repeat")
    opaque: bool = False  # the alpha of texels does not count
    # (opacity, cutoff): a texel is opaque where its alpha times opacity reaches the cutoff, and
    # else clear. Applied where texels are looked up: the picture is shared by all materials
    mask: tuple[float, float] | None = None
    # (base, gain): a texel's colour is base + gain times it, in [0, 1] and steps of 1 / 255
    change: tuple[float, float] | None = None


@dataclass(frozen=True)
class Placement:
    """The part of a picture that a surface shows: uv' = turn(uv * scale) + offset."""

    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    rotation: float = 0.0  # radians, counter-clockwise where v points down
    coordinates: int = 0  # the number of the set of texture coordinates

    def __call__(self, uv: np.ndarray) -> np.ndarray:
        """Move texture coordinates [..., 2]."""
        if (self.scale, self.offset, self.rotation) == ((1.0, 1.0), (0.0, 0.0), 0.0):
            return uv
        moved = uv * self.scale
        if self.rotation:
            cos, sin = np.cos(self.rotation), np.sin(self.rotation)
            u, v = moved[..., 0], moved[..., 1]
            moved = np.stack([cos * u + sin * v, cos * v - sin * u], -1)
        return moved + self.offset


def decode(data: Path | bytes, owner: str, name: str, budget: Budget | None = None) -> np.ndarray:
    """Decode a picture: uint8 RGBA [H, W, 4].

    16-bit grey is scaled to 8 bits, and so are numbers of floating point in [0, 1]. Raises
    ValueError, "OWNER: texture NAME ...", where it cannot be read, has other values, or has more
    pixels than the memory of `budget` holds, which is known before they are decoded.
    """
    budget = Budget() if budget is None else budget
    try:
        if isinstance(data, Path):
            data = budget.read(data)
        with open_picture(data, TEXTURES) as image:
            W, H = image.size
            whole = image.mode == "F"  # its range is that of all its pixels
            budget.check(W * H * (FLOATING if whole else DECODER + CHANNELS), f"{W} x {H} pixels")
            load_picture(image)
            pixels = np.empty((H, W, CHANNELS), np.uint8)
            # converting all at once takes as much again, twice
            band = H if whole else BAND
            for first in range(0, H, band):
                last = min(first + band, H)
                pixels[first:last] = _rgba(image.crop((0, first, W, last)), image.info)
    except ValueError as error:
        raise ValueError(f"{owner}: texture {name} cannot be read: {error}") from error
    budget.take(pixels.nbytes, f"{owner}: texture {name}")
    return pixels


def _rgba(image: Image.Image, info: dict) -> np.ndarray:
    """The pixels of a picture of any mode, uint8 [H, W, 4]; ValueError for one without a rule."""
    if image.mode in SIXTEEN:
        values = np.asarray(image).astype(np.uint16)
        grey = np.rint(values / 257.0).astype(np.uint8)
        alpha = np.full_like(grey, 255)
        clear = info.get("transparency")
        if isinstance(clear, int):
            alpha[values == clear] = 0
        return np.stack([grey, grey, grey, alpha], -1)
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"mode F, numbers from {values.min():.4g} to {values.max():.4g}: floating point is "
                "read from 0 to 1"
            )
        grey = np.rint(values * 255).astype(np.uint8)
        return np.stack([grey, grey, grey, np.full_like(grey, 255)], -1)
    if image.mode == "I":
        raise ValueError("mode I, 32-bit integers, which has no range")
    if image.mode in THROUGH_RGB:
        image = image.convert("RGB")
    return np.asarray(image.convert("RGBA"))


def sample(texture: np.ndarray, uv: np.ndarray, sampler: Sampler = Sampler()) -> np.ndarray:
    """Look up uv [M, 2] in an RGBA uint8 texture [H, W, 4]: straight RGBA [M, 4] in [0, 1].

    v points upwards. Bilinear, unless the sampler says nearest: texels are then weighted by their
    alpha, so that the colour hidden in transparent ones does not bleed out.
    """
    H, W = texture.shape[:2]
    across, down = sampler.wrap
    x = _unwrapped(uv[:, 0], across) * W
    y = (1 - _unwrapped(uv[:, 1], down)) * H
    if sampler.nearest:
        column = _wrapped(np.floor(x + TEXEL).astype(np.int64), W, across)
        row = _wrapped(np.floor(y + TEXEL).astype(np.int64), H, down)
        texel = _texels(texture, row, column, sampler)
        texel[:, 3] = _alpha(texel[:, 3], sampler)
        return texel
    x = x - 0.5
    y = y - 0.5
    x0 = np.floor(x).astype(np.int64)
    y0 = np.floor(y).astype(np.int64)
    fx = x - x0
    fy = y - y0
    total = np.zeros((len(uv), 4))
    for dy, wy in ((0, 1 - fy), (1, fy)):
        row = _wrapped(y0 + dy, H, down)
        for dx, wx in ((0, 1 - fx), (1, fx)):
            texel = _texels(texture, row, _wrapped(x0 + dx, W, across), sampler)
            weight = wx * wy
            alpha = _alpha(texel[:, 3], sampler) * weight
            total[:, :3] += texel[:, :3] * alpha[:, None]
            total[:, 3] += alpha
    total[:, :3] /= np.maximum(total[:, 3:], 1e-12)
    return total


def _texels(
    texture: np.ndarray, row: np.ndarray, column: np.ndarray, sampler: Sampler
) -> np.ndarray:
    """Texels [M, 4] in [0, 1]."""
    if sampler.change is None:
        return texture[row, column] / 255.0
    return changed(texture[row, column], *sampler.change) / 255.0


def changed(pixels: np.ndarray, base: float, gain: float) -> np.ndarray:
    """Pixels [..., 4] of uint8 whose colours are base + gain times theirs, 255 being 1."""
    made = pixels.copy()
    made[..., :3] = np.rint((base * 255 + gain * pixels[..., :3]).clip(0, 255))
    return made


def _alpha(alpha: np.ndarray, sampler: Sampler) -> np.ndarray:
    """The alpha [M] of texels as a material means it."""
    if sampler.opaque:
        return np.ones_like(alpha)
    if sampler.mask is not None:
        opacity, cutoff = sampler.mask
        return (alpha * opacity >= cutoff).astype(float)
    return alpha


def _unwrapped(u: np.ndarray, wrap: str) -> np.ndarray:
    """Coordinates brought near [0, 1], however large: into the period, or to the border."""
    if wrap == "clamp":
        return u.clip(0, 1)
    return u % (2 if wrap == "mirror" else 1)


def _wrapped(index: np.ndarray, size: int, wrap: str) -> np.ndarray:
    """Numbers of texels beyond the border as numbers of those that are seen there."""
    if wrap == "clamp":
        return index.clip(0, size - 1)
    if wrap == "mirror":
        index = index % (2 * size)
        return np.minimum(index, 2 * size - 1 - index)
    return index % size
