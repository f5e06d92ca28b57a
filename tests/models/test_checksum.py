"""Checksums of tensors and texts: what was saved is read again, and anything else is named."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checksum import CHECKSUMS, LIST, read_checked, save_checked, with_checksums

TENSORS = {
    "weight": torch.arange(6.0).view(2, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "step": torch.tensor(4.0),
    "none": torch.zeros(0, 3),
}
TEXTS = {"state": "{}", "note": "é"}


def refusal(file, tensors: dict, header: dict) -> str:
    """The message on a file with these tensors and texts."""
    save_file(tensors, file, header)
    with pytest.raises(ValueError) as refused:
        read_checked(file)
    assert str(refused.value).startswith(f"{file} is damaged: ")
    return str(refused.value)


def test_what_was_saved_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    save_checked(TENSORS, file, TEXTS)
    tensors, header = read_checked(file)
    assert all(torch.equal(tensors[name], t) for name, t in TENSORS.items())
    assert header.keys() == {"state", "note", LIST, CHECKSUMS} and header["note"] == "é"
    transposed = {"weight": torch.arange(6.0).view(2, 3).T}  # not contiguous
    assert with_checksums(transposed) == with_checksums({"weight": transposed["weight"].clone()})
    save_file(TENSORS, file, {"format": "pt"})  # of others, who write none
    assert read_checked(file)[1] == {"format": "pt"} and load_file(file).keys() == TENSORS.keys()


def test_equal_content_gives_equal_bytes(tmp_path):
    """Of eight writers, each with its own random order of texts."""
    texts = {f"text {i}": "é" * i for i in range(6)}
    files = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for file in files:
        save_checked(TENSORS, file, texts)
    assert len({file.read_bytes() for file in files}) == 1
    assert read_checked(files[0])[1].keys() == {*texts, LIST, CHECKSUMS}


def test_what_is_not_as_it_was_saved_is_named(tmp_path):
    file = tmp_path / "a.safetensors"
    header = with_checksums(TENSORS, TEXTS)
    flipped = TENSORS["weight"].clone().view(torch.int32)
    flipped[1, 2] ^= 1
    for change, message in (
        (
            {"weight": flipped.view(torch.float32)},
            "weight has the checksum [0-9a-f]{8}, not [0-9a-f]{8} as it was",
        ),
        ({"mask": torch.tensor([True, True])}, "mask has the checksum"),
        ({"step": torch.tensor(4.0).double()}, r"step is float64 \[\], it was saved as float32"),
        ({"weight": TENSORS["weight"].view(3, 2)}, r"weight is float32 \[3, 2\], it .* \[2, 3\]"),
        ({"none": torch.zeros(0, 4)}, r"none is float32 \[0, 4\], it was saved as"),
        ({"more": torch.zeros(1)}, "it holds 'more', which was not saved in it"),
    ):
        assert re.search(message, refusal(file, TENSORS | change, header))
    left = {name: t for name, t in TENSORS.items() if name != "half"}
    assert "it lacks 'half', one of 5 tensors" in refusal(file, left, header)
    for change, message in (
        ({"state": "{ }"}, "'state' in its header has the checksum"),
        ({"added": "x"}, "'added' in its header has the checksum"),
        ({LIST: header[LIST].replace("2, 3", "3, 2")}, f"'{LIST}' in its header"),
        ({CHECKSUMS: "{"}, f"its list of {CHECKSUMS} is truncated or not JSON"),
    ):
        assert message in refusal(file, TENSORS, header | change)
    unlisted = with_checksums({}, TEXTS)
    del unlisted[LIST]
    unlisted[CHECKSUMS] = json.dumps({"state": json.loads(header[CHECKSUMS])["state"]})
    del unlisted["note"]
    assert f"its header lacks '{LIST}'" in refusal(file, TENSORS, unlisted)
    for name in ("state", "note", LIST, CHECKSUMS):
        left = {key: text for key, text in header.items() if key != name}
        assert f"its header lacks '{name}'" in refusal(file, TENSORS, left)
