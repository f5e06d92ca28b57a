"""Row numbers are widened before they are multiplied: no offset of a kernel overflows 32 bits, by
Triton's IR of its launches.
"""

import json
import os
import subprocess
import sys

import pytest

from kernels.compile.command import OPS

# Products of 32 bits that are bounded, by file: part of the line, and what bounds it
BOUNDED = {
    "attention_tiles": {
        "slot": "tiles of segments are fewer than rows",
        "work_ptr": "as above",
        "h * N": "2^31 pairs of a row and a head: 179 million rows of 12 heads, whose qkv are "
        "0.8 TB in 16 bits",
        "dgamma_ptr": "two rows of channels a tile of at least 16 rows: 22 million rows of 768 "
        "channels",
    },
    "norm": {
        "n.to(tl.int64)": "a tile's number times its rows is a row",
        "partial_ptr": "PARTIALS programs",
    },
    "gelu": {"m.to(tl.int64)": "a tile's number times its rows is a row"},
    "window": {"cell": "DENSE_CELLS"},
    "binning": dict.fromkeys(("end_ptr", "+ at + k"), "fewer than 2^31 instances, or ValueError"),
    "project": {"moments_ptr": "offsets inside a program's instances"},
    "group_norm": {"part_ptr": "P programs a sample", "along_ptr": "groups of samples"},
    "conv_tiles": {
        "weight_ptr": "a weight's own numbers",
        "entries": "a tile's list of taps",
        "at": "a tile's number times its rows is a row",
    },
    "children": {"at =": "taps of a kernel"},
    "dual": {"edges_ptr": "a table of 1024 rows"},
    "raster": {
        "keys_ptr": "pixels of a picture: the view's are 64 bits",
        "face.to": "not an offset",
    },
    "march_segments": {"ray": "fewer than 2^31 pixels, or ValueError"},
    "march": {"axis_ptr": "one voxel's own numbers"},
}


def suspicious(ops: str, folder) -> dict[str, list[str]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = lambda *command, **more: subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        check=True,
        env=environment | more,
    ).stdout.splitlines()[-1]
    launches = run(
        "kernels.compile",
        "--record",
        "--op",
        ops,
        "--dtype",
        "fp32",
        "--target",
        "sm_90",
        TRITON_INTERPRET="1",
    )
    (folder / "launches.json").write_text(launches)
    return json.loads(run("tests.helpers.offsets", str(folder / "launches.json")))


@pytest.mark.parametrize(
    "ops",
    ["norms,scales,coordinates", pytest.param(OPS, marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def test_offsets_have_64_bits(tmp_path, ops):
    found = suspicious(ops, tmp_path)
    assert [line.split("#")[-1].strip() for line in found.pop("tests.helpers.offsets.example")] == [
        "too narrow"
    ] * 2
    assert len(found) >= 13
    for kernel, lines in found.items():
        known = BOUNDED.get(kernel.split(".")[1], {})
        assert not [line for line in lines if not any(part in line for part in known)], kernel
