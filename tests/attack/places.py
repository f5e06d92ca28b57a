"""Names that lead elsewhere, and things that are no files in the place of files."""

import json
import os
import shutil
from pathlib import Path

import numpy as np

LONG = "n" * 300
# %: the name of the file that is meant, of which OUTSIDE has a copy
NAMES = (
    "../outside/%",
    "../in/../outside/%",
    "{outside}/%",
    "file://{outside}/%",
    "%2e%2e/outside/%",
    "..%2foutside%2f%",
    "..\\outside\\%",
    "link/%",
    "./link/%",
    "linked-%",
    "/dev/zero",
    "pipe",
    "folder",
    "circle",
    ".",
    "..",
    "",
    LONG,
    "a/" * 3000 + "%",
    "\0%",
    "\ud800",
    "~/%",
    "%\n",
    "con.png",
    "\x1b[31m%",
)


def lay(folder: Path, beside: Path) -> None:
    """Put what such names lead to into a folder: links out of it, a pipe, a circle of links."""
    outside = folder.parent / "outside"
    for file in beside.iterdir():
        if file.is_file():
            (beside / f"linked-{file.name}").symlink_to(outside / file.name)
    (beside / "link").symlink_to(outside)
    (beside / "circle").symlink_to("circle")
    (beside / "folder").mkdir()
    os.mkfifo(beside / "pipe")


def named(original: str, folder: Path, rng: np.random.Generator) -> str:
    """Another name for a file that is called `original`."""
    name = NAMES[rng.integers(len(NAMES))]
    return name.replace("{outside}", str(folder.parent / "outside")).replace("%", original)


def in_text(folder: Path, victim: Path, original: str, rng: np.random.Generator) -> None:
    """Write another name for `original` into a text."""
    name = named(original, folder, rng)
    data = victim.read_bytes()
    if victim.suffix in (".json", ".gltf"):
        text = json.dumps(name)[1:-1].encode()
    else:
        text = name.encode("utf-8", "surrogatepass")
    victim.write_bytes(data.replace(original.encode(), text))


def instead(folder: Path, victim: Path, rng: np.random.Generator) -> None:
    """Put a folder, a pipe, a device or a link in the place of a file, or of its folder."""
    outside = folder.parent / "outside" / victim.name
    way = rng.integers(8)
    if way == 7 and victim.parent != folder:
        shutil.rmtree(victim.parent)
        victim.parent.symlink_to(outside.parent)
        return
    victim.unlink()
    if way == 0:
        victim.mkdir()
    elif way == 1:
        os.mkfifo(victim)
    elif way == 2:
        victim.symlink_to("/dev/zero")
    elif way == 3:
        victim.symlink_to(victim.name)
    elif way == 4:
        victim.symlink_to("absent")
    elif way == 5:
        victim.touch()
    else:
        victim.symlink_to(outside)
