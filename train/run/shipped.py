"""The small trained models that come with the package, by name."""

from pathlib import Path

from models import DECODERS

# runs that come with the package, a folder for each kind of decoder on one encoder; its README says
# how they were made
SHIPPED = "demo"
ASSETS = Path(__file__).parents[1] / "assets" / "checkpoints"


def named(path: str | Path) -> list[Path]:
    """List the checkpoints that a path stands for: itself, or what comes with the package.

    `demo` stands for all of these, `demo/gaussian` for one; a file of the user's comes first.
    """
    path = Path(path)
    own = path.exists() or Path(f"{path}.json").exists()
    if own or path.parts[:1] != (SHIPPED,):
        return [path]
    if len(path.parts) > 1:
        return [ASSETS.joinpath(*path.parts[1:])]
    return [ASSETS / kind for kind in DECODERS if (ASSETS / kind).is_dir()] or [path]


def only(path: str | Path) -> Path:
    """Return the one checkpoint that a path stands for; ValueError where there are several."""
    found = named(path)
    if len(found) != 1:
        names = ", ".join(f"{SHIPPED}/{one.name}" for one in found)
        raise ValueError(f"{path} stands for {len(found)} checkpoints, give one: {names}")
    return found[0]
