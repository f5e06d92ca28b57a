"""Objects that a command line names: mesh files, which are prepared here, and items of datasets.

    chair.obj          a mesh file: OBJ, glTF, PLY
    DATASET/NAME       an item of the dataset in that folder
    NAME               an item of --data, else of what the (first) checkpoint was trained on

NAME is what pictures show: the stem of the item's file, or its sha256 (8 digits are enough). A mesh
is prepared as the checkpoint's data were (the recipe that their transforms.json record), else with
the defaults of train.prepare.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.dinov2 import DINOv2
from models.reading import entry, read_json, shown
from train.data.dataset import Dataset, embedded
from train.data.metadata import read_metadata, write_metadata
from train.meshes.read import CONVERTIBLE, READABLE
from train.prepare.features import ImageFeatures, how_to_get
from train.prepare.objects import Settings, need_packages, prepare_object
from train.prepare.sources import Source, hash_source
from train.run.progress import Progress
from train.run.trained import Trained

LISTED = 9  # names in a message
DIGITS = 8  # of a sha256 that name an object
RECIPE = ("views", "holdout_views", "size", "supersample", "seed")  # fields of Settings
OF_OBJECTS = ("data", "root", "weights", "views")  # flags that latents have no use for
VIEWS = (2, 1000)  # of a mesh: one at least is held out, and one is not


@dataclass(frozen=True)
class Given:
    """An object in a dataset, or a mesh file that is still to be prepared."""

    title: str  # what a reader calls it, and a folder or a file of it can be called
    path: Path  # the mesh file; of an item, its dataset and its title
    root: Path | None = None  # of an item: the folder of its dataset
    sha256: str = ""  # of an item
    home: Path | None = None  # the files that a mesh names lie below; None: its own folder


def add_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of commands that decode objects or latents."""
    p.add_argument("--data", type=Path, help="dataset that NAMEs are looked up in")
    p.add_argument("--root", type=Path, help="folder that a mesh and its textures lie in")
    p.add_argument("--latent", type=Path, help="latents to decode, in place of objects")
    p.add_argument("--encoder", help="of a decoder's prefix; of a run, where its frozen one is now")
    p.add_argument("--weights", type=Path, help="of the network of image features, for meshes")
    p.add_argument(
        "--views", type=int, help="of a mesh that is prepared (default: as the data of the run)"
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")


def check_flags(args: argparse.Namespace, objects: Sequence[str], purpose: str) -> None:
    """Raise ValueError for flags that do not fit together: objects, or --latent alone."""
    if not objects and args.latent is None:
        raise ValueError(f"nothing to {purpose}: name a mesh or an item, or give --latent FILE")
    if args.latent is not None:
        beside = [*objects, *(f"--{name}" for name in OF_OBJECTS if getattr(args, name))]
        if beside:
            raise ValueError(f"--latent {args.latent} is decoded alone, without {beside[0]}")
    low, high = VIEWS
    if args.views is not None and not low <= args.views <= high:
        raise ValueError(f"--views {args.views} is not in {low} to {high}")


def roots_of(trained: Trained) -> list[Path]:
    """List the folders of the data that a checkpoint was trained on; none where nothing says."""
    if trained.data is None:
        return []
    return [Path(root) for root in trained.data] or [embedded(trained.resolution)]


def seen_by(trained: Sequence[Trained]) -> set[str] | None:
    """Collect the objects, by sha256, that checkpoints were trained on; None where nothing says."""
    seen = set()
    for one in trained:
        roots = roots_of(one)
        if not roots or not all((root / "metadata.csv").is_file() for root in roots):
            return None
        rows = (row for root in roots for row in read_metadata(root))
        seen |= {row["sha256"] for row in rows if (row.get("split") or "train") == "train"}
    return seen


def find(name: str, roots: Sequence[Path], home: Path | None = None) -> Given:
    """Find an object by its name on the command line; `roots` are where bare names are looked up.

    `home` is the folder that what a mesh names lies below, by default its own. Raises ValueError
    where there is none, or several have the name.
    """
    path = Path(name)
    if path.is_file() or path.suffix.lower() in READABLE + CONVERTIBLE:
        return _mesh(path, home)
    if (path.parent / "metadata.csv").is_file():
        return _item(path.name, [path.parent])
    if len(path.parts) == 1 and roots:
        return _item(name, roots)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but no run (it has no config.json) and no object")
    if len(path.parts) > 1:
        raise ValueError(f"{path} is no checkpoint, no mesh file, and {path.parent} no dataset")
    raise ValueError(f"{name} is no checkpoint and no mesh file; --data DIR for an item of DIR")


def _mesh(path: Path, home: Path | None) -> Given:
    if not path.is_file():
        raise ValueError(f"{path} is not there, or no file")
    if path.suffix.lower() in CONVERTIBLE:
        raise ValueError(
            f"{path}: {path.suffix} needs Blender: python -m train.prepare --blender PROGRAM "
            "makes a dataset of it"
        )
    if path.suffix.lower() not in READABLE:
        raise ValueError(f"{path} is no mesh file; those end in {', '.join(READABLE)}")
    return Given(path.stem, path, home=home)


def _item(name: str, roots: Sequence[Path]) -> Given:
    found = {}
    there = []
    for root in roots:
        for row in read_metadata(root):
            sha = row["sha256"]
            title = Path(row.get("local_path", "")).stem or sha[:DIGITS]
            there.append(title)
            if title == name or (len(name) >= DIGITS and sha.startswith(name)):
                found.setdefault(sha, Given(title, root / title, root, sha))
    where = ", ".join(map(str, roots))
    if not found:
        listed = ", ".join(shown(title)[1:-1] for title in there[:LISTED])
        more = f" and {len(there) - LISTED} more" if len(there) > LISTED else ""
        raise ValueError(
            f"{name} is no checkpoint, no mesh file and no object of {where}, which has: "
            f"{listed or 'none'}{more}"
        )
    if len(found) > 1:
        digits = ", ".join(sha[:DIGITS] for sha in list(found)[:LISTED])
        raise ValueError(
            f"{name} are {len(found)} objects of {where}: say which by sha256, {digits}"
        )
    return next(iter(found.values()))


class Workshop:
    """Makes items of objects that were named, with all that some checkpoints read.

    `folder` is where meshes are prepared, with `views` views or as many as the first checkpoint's
    data have. `weights` is the file of the network whose features the encoders read.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        folder: Path,
        device: torch.device,
        weights: Path | None = None,
        views: int | None = None,
    ):
        self.folder = folder
        self.device = device
        self.weights = weights
        features = dict.fromkeys(one.features for one in trained)
        self.networks = [name for name in features if name != "rgb"]
        resolution = tuple(dict.fromkeys(one.resolution for one in trained))
        recipe = _recipe(roots_of(trained[0]))
        if views is not None:
            held = min(recipe.get("holdout_views", Settings.holdout_views), views - 1)
            recipe |= {"views": views, "holdout_views": held}
        rgb = "rgb" if "rgb" in features else None
        self.settings = Settings(folder, resolution, features=rgb, **recipe)
        self._loaded = {}

    def check(self, objects: Sequence[Given]) -> None:
        """Load what preparing meshes needs, where one is among the objects.

        Raises ValueError for what is missing, before any view is drawn.
        """
        if self.weights is not None and not self.networks:
            raise ValueError(f"--weights {self.weights} are for image features, but rgb is read")
        if all(one.root for one in objects):
            return
        need_packages()
        if self.networks and self.weights is None:
            name = self.networks[0]
            raise ValueError(
                f"the encoder reads {name} features of a mesh's views, which need --weights FILE: "
                f"{how_to_get(name)}"
            )
        self._loaded = {name: self._features(name).load() for name in self.networks}

    def item(self, given: Given) -> Given:
        """Return an object as an item; a mesh is prepared. ValueError where it cannot be used."""
        if given.root:
            return given
        source = hash_source(Source(given.path, given.path.name, root=given.home))
        result = source if not isinstance(source, Source) else prepare_object(source, self.settings)
        if result.row is None:
            raise ValueError(result.failure)
        sha = result.row["sha256"]
        row = dict(result.row)
        for name, network in self._loaded.items():
            self._make_features(name, network, sha)
            for R in self.settings.resolution:
                row[f"feature_{name}" + ("" if R == 64 else f"_{R}")] = True
        write_metadata(self.folder, [row])
        return Given(given.title, given.path, self.folder, sha)

    def _make_features(self, name: str, network: DINOv2, sha: str) -> None:
        """Make the image features of a mesh, with a bar of its views."""
        seen = self.settings.views - self.settings.holdout_views
        with Progress(seen, unit="view") as bar:
            count = lambda views: bar.update(name, count=views)
            self._features(name).make(network, sha, self.settings.resolution, count)

    def _features(self, name: str) -> ImageFeatures:
        return ImageFeatures(self.folder, name, self.weights, self.device)

    def dataset(self, trained: Trained, item: Given, size: int) -> Dataset:
        """Open the dataset of an item as a checkpoint reads it.

        Its views are the held-out ones, in `size` pixels. No filter applies. Raises ValueError
        where it lacks what the checkpoint reads.
        """
        own = item.root == self.folder
        held = self.settings.holdout_views if own else trained.holdout_views
        try:
            return Dataset(
                [item.root],
                resolution=trained.resolution,
                features=trained.features,
                image_size=size,
                max_voxels=trained.resolution**3,
                min_aesthetic=float("-inf"),
                split=None,
                views="holdout",
                holdout_views=held,
                required=False,
            )
        except ValueError as error:
            reads = f"{trained.features} features at {trained.resolution}^3"
            raise ValueError(f"{trained.label} reads {reads}: {error}") from error


def _recipe(roots: Sequence[Path]) -> dict[str, int]:
    """Read what the views of a dataset were made with; empty where nothing says."""
    for root in roots:
        if not (root / "metadata.csv").is_file():
            continue
        for row in read_metadata(root):
            file = root / "renders" / row["sha256"] / "transforms.json"
            if file.is_file():
                recipe = read_json(file).get("recipe")
                if recipe is None:
                    return {}
                return {name: entry(recipe, name, int, f"{file}: recipe") for name in RECIPE}
    return {}
