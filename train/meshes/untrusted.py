"""Read untrusted files: errors of malformed ones, checks of their parts, formats of pictures."""

import reprlib
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

# What code raises on input that is not what it takes it for: another structure, too deep a one,
# numbers out of range, damaged archives. An OSError is none of them: it names its file itself.
# Readers check what they can with `expect` and say it well; this is for the rest, and the one list
# of it.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
VIEWS = ("PNG", "WEBP", "JPEG")  # what pictures of a dataset come in
TEXTURES = (*VIEWS, "TGA", "BMP", "TIFF", "GIF", "DDS")
HUGE = 1e100
SHOWN = 60
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = SHOWN
NAMES = {int: "a whole number from 0 up", str: "text", list: "a list", dict: "an object"}


def reason(error: BaseException) -> str:
    """Word an error, with its kind where the text alone would say little."""
    text = str(error)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return f"it needs more memory than a file of its size may take: {text}".removesuffix(": ")
    if "integer string conversion" in text:
        return "a number in it has too many digits"
    if isinstance(error, KeyError):
        return f"it has no {text}"
    if text and isinstance(error, ValueError | OSError):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Any of MALFORMED that is no ValueError yet becomes one: "NAME cannot be read: ..."."""
    try:
        yield
    except ValueError:
        raise
    except MALFORMED as error:
        raise ValueError(f"{name} cannot be read: {reason(error)}") from error


def expect(value, kind: type, where: str):
    """Return `value` if it is of that kind, one of NAMES; numbers are not negative.

    Raises ValueError that says where it stands.
    """
    if type(value) is not kind or (kind is int and value < 0):
        raise ValueError(f"{where} is {shown(value)}, not {NAMES[kind]}")
    return value


def expect_numbers(value, counts: Sequence[int], where: str) -> list[float]:
    """Return `value` if it is a list of so many finite numbers; no counts: of any number of them.

    Raises ValueError that says where it stands.
    """
    expect(value, list, where)
    if counts and len(value) not in counts:
        wanted = " or ".join(map(str, counts))
        raise ValueError(f"{where} has {len(value)} entries, not {wanted}")
    for i, number in enumerate(value):
        expect_number(number, f"{where}[{i}]")
    return value


def expect_number(value, where: str) -> float:
    """Return `value` if it is a finite number; ValueError that says where it stands."""
    if type(value) not in (int, float) or not abs(value) < HUGE:
        raise ValueError(f"{where} is {shown(value)}, not a finite number")
    return value


def shown(value) -> str:
    """Write a value of any kind and size in at most SHOWN characters."""
    text = SHORT.repr(value)
    return text if len(text) < SHOWN else f"{text[:SHOWN]}..."


def open_picture(data: Path | bytes, formats: Sequence[str]) -> Image.Image:
    """Open a picture of one of these formats, its pixels not yet decoded.

    Other formats run programs (EPS) or are rarely tested. What counts is the content, not the name.
    ValueError for another format, for over 179 million pixels (Pillow's limit) and for what is
    damaged.
    """
    try:
        with warnings.catch_warnings():
            # from half of that limit on
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            source = BytesIO(data) if isinstance(data, bytes) else data
            return Image.open(source, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no picture ({', '.join(formats)})") from error
    except (Image.DecompressionBombError, OSError, *MALFORMED) as error:
        raise ValueError(str(error) or reason(error)) from error


def load_picture(image: Image.Image) -> Image.Image:
    """Decode the pixels of an open picture; ValueError where they are truncated or damaged."""
    try:
        image.load()
    except (Image.DecompressionBombError, OSError, *MALFORMED) as error:
        raise ValueError(str(error) or reason(error)) from error
    return image
