"""Names that lead elsewhere, and things that are no files in the place of files."""

import json
import os
import shutil
from pathlib import Path

LONG = "n" * 300
# %: the name of the file that is meant, of which OUTSIDE has a copy
NAMES = (
    "../outside/%",
    "linked-%",
    "pipe",
    "link/%",
    "a/" * 3000 + "%",
    "{outside}/%",
    "\ud800",
    "%\n",
    "folder",
    "circle",
    LONG,
    "../in/../outside/%",
    "file://{outside}/%",
    "%2e%2e/outside/%",
    "..%2foutside%2f%",
    "..\\outside\\%",
    "./link/%",
    "/dev/zero",
    ".",
    "..",
    "",
    "\0%",
    "~/%",
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


def in_text(folder: Path, victim: Path, original: str, seed: int) -> None:
    """Write another name for the file `original` into a text."""
    name = NAMES[seed % len(NAMES)]
    name = name.replace("{outside}", str(folder.parent / "outside")).replace("%", original)
    data = victim.read_bytes()
    if victim.suffix in (".json", ".gltf"):
        text = json.dumps(name)[1:-1].encode()
    else:
        text = name.encode("utf-8", "surrogatepass")
    victim.write_bytes(data.replace(original.encode(), text))


def instead(folder: Path, victim: Path, seed: int) -> None:
    """Put a pipe, a device, a folder or a link in the place of a file, or of its folder."""
    outside = folder.parent / "outside" / victim.name
    way = seed % 8
    if way == 3 and victim.parent != folder:
        shutil.rmtree(victim.parent)
        victim.parent.symlink_to(outside.parent)
        return
    victim.unlink()
    if way == 0:
        os.mkfifo(victim)
    elif way in (1, 3):
        victim.symlink_to(outside)
    elif way == 2:
        victim.mkdir()
    elif way == 4:
        victim.symlink_to("/dev/zero")
    elif way == 5:
        victim.symlink_to(victim.name)
    elif way == 6:
        victim.symlink_to("absent")
    else:
        victim.touch()
