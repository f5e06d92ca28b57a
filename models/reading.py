"""Read files that come from elsewhere: what is no file, JSON, tensors, and errors that name them.

`models` and `train` read such files, and `models` may not import `train`. train.meshes.untrusted
has the same for meshes and pictures.
"""

import json
import reprlib
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LINE = 300  # characters of an error's words in a message
VALUE = 100  # of a value
KINDS = {
    bool: "true or false",
    dict: "an object",
    float: "a finite number",
    int: "a whole number",
    list: "a list",
    str: "text",
}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """Show a value in a message: short however long it is, however deep its lists."""
    text = _short.repr(value)
    return text if len(text) <= VALUE else f"{text[:VALUE]}..."


def first_line(error: BaseException) -> str:
    """Word an error in a line; torch and safetensors write several, or long ones."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= LINE else f"{line[:LINE]}..."


def check_file(file: Path, absent: str = "is missing") -> None:
    """Raise ValueError where a file is absent, or no file: a pipe would never end."""
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{file} {absent}") from error
    # the second: a name with a NUL, or with half a surrogate pair
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{str(file)!r} cannot be read: {reason}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{file} {absent}: what stands there is no file")


def read_bytes(file: Path, absent: str = "is missing") -> bytes:
    """Read a whole file; ValueError where it is absent, no file, or cannot be read."""
    check_file(file, absent)
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def read_json(file: Path, absent: str = "is missing") -> dict:
    """Read a JSON file that holds an object, as UTF-8, or UTF-16 or 32 where it is that.

    Raises ValueError that names the file where it is absent, no JSON or nested too deeply, and
    where it holds anything but an object.
    """
    return parse_json(read_bytes(file, absent), str(file))


def parse_json(data: bytes | str, name: str) -> dict:
    """Parse JSON that holds an object; ValueError that begins with `name`."""
    try:
        content = json.loads(data)
    except RecursionError as error:
        raise ValueError(f"{name} is not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{name} is truncated or not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds {shown(content)}, not {KINDS[dict]}")
    return content


def entry(content: dict, key: str, kind: type, where: str):
    """Look up a value of a kind, one of KINDS, in what JSON holds; whole numbers are numbers.

    Raises ValueError that begins with `where`, and says what the value is.
    """
    if key not in content:
        raise ValueError(f"{where} lacks {key!r}")
    value = content[key]
    if kind is float and type(value) in (int, float):
        # infinity for what is too large for a float: comparisons of int and float are exact
        if abs(value) <= torch.finfo(torch.float64).max:
            return float(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{where}: {key} is {shown(value)}, not {KINDS[kind]}")


def read_safetensors(
    file: Path, absent: str = "is missing"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file, to the CPU, and the texts of its header.

    A header that announces more than the file holds is refused before anything is allocated.
    Raises ValueError that names the file where it is absent, truncated or of another format.
    """
    check_file(file, absent)
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}
            return tensors, content.metadata() or {}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file: {first_line(error)}"
        ) from error


def check_floats(tensors: dict[str, Tensor], source: str) -> None:
    """Raise ValueError that names the first tensor which holds no floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            held = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{source}: {name} holds {held}, not one of {kinds}")
