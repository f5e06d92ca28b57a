"""Pictures of textures by their mode: 16-bit, grey, palette, floating point."""

import io

import numpy as np
import pytest
from PIL import Image

from train.meshes.pictures import decode


def stored(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def grey(value, dtype) -> Image.Image:
    return Image.fromarray(np.full((3, 2), value, dtype))


def with_mode(mode: str, color) -> Image.Image:
    return Image.new(mode, (2, 3), color)


PALETTE = with_mode("RGB", (200, 100, 50)).quantize(4)
MODES = {  # the file: the colour that every pixel has
    "16-bit grey": (stored(grey(20000, np.uint16), "PNG"), (78, 78, 78, 255)),
    "16-bit grey, one transparent": (
        stored(grey(20000, np.uint16), "PNG", transparency=20000),
        (78, 78, 78, 0),
    ),
    "16-bit TIFF": (stored(grey(65535, np.uint16), "TIFF"), (255, 255, 255, 255)),
    "float TIFF": (stored(grey(0.5, np.float32), "TIFF"), (128, 128, 128, 255)),
    "one bit": (stored(with_mode("1", 1), "PNG"), (255, 255, 255, 255)),
    "grey": (stored(with_mode("L", 70), "PNG"), (70, 70, 70, 255)),
    "grey and alpha": (stored(with_mode("LA", (70, 9)), "PNG"), (70, 70, 70, 9)),
    "palette": (stored(PALETTE, "PNG"), (200, 100, 50, 255)),
    "palette, one transparent": (stored(PALETTE, "PNG", transparency=0), (200, 100, 50, 0)),
    "RGB, one transparent": (
        stored(with_mode("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        (1, 2, 3, 0),
    ),
    "CMYK": (stored(with_mode("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    data, color = MODES[mode]
    pixels = decode(data, "a", "t")
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 2, 4)
    assert (pixels == color).all(), pixels[0, 0]


@pytest.mark.parametrize(
    "image, message",
    [
        (grey(2.5, np.float32), "mode F, numbers from 2.5 to 2.5: floating point is read from 0"),
        (grey(np.nan, np.float32), "mode F, numbers from nan to nan"),
        (grey(70000, np.int32), "mode I, 32-bit integers, which has no range"),
    ],
)
def test_modes_without_a_range_are_refused(image, message):
    with pytest.raises(ValueError, match=f"^a: texture t cannot be read: {message}"):
        decode(stored(image, "TIFF"), "a", "t")
