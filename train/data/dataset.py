"""The dataset: objects in folders of the published layout, filtered, each with some of its views.

dataset = Dataset([folder], resolution=64, features="rgb", image_size=256)
# train.data.loader; never ends
for batch in loader(dataset, Sampler(len(dataset), batch_size=16, micro_batch=2), workers=4):
"""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels import Camera
from train.data.augment import Augmentation, check_augment
from train.data.batch import Item
from train.data.metadata import read_metadata
from train.data.readers import (
    Frames,
    number,
    picture_size,
    read_features,
    read_frames,
    read_picture,
    read_triangles,
)
from train.meshes.files import below

ASSETS = Path(__file__).parents[1] / "assets"
# 24 objects at 16^3, some at 64^3, with `rgb` features, 20 views of 128 pixels and meshes
EMBEDDED = ASSETS / "demo"
# 85 objects at 32^3 with `rgb` features and 16 views of 128 pixels, without meshes
EMBEDDED_32 = ASSETS / "demo_32"


def embedded(resolution: int) -> Path:
    """The folder of the embedded objects that a run without --data trains on."""
    return EMBEDDED_32 if resolution == 32 else EMBEDDED


class Dataset(torch.utils.data.Dataset):
    """The objects of several folders that pass the published filters.

    Each fetch gives an object with `num_views` random views. An object takes part if its feature
    flag (column feature_NAME, feature_NAME_R for R != 64) is true, it has at most `max_voxels`
    (num_voxels, num_voxels_R) and an aesthetic_score of at least `min_aesthetic`, and belongs to
    `split` (column split; None takes all). An empty cell or absent column never excludes, except
    the feature flag's; without a split an object is a training object. `skipped` counts the others
    by reason, `summary()` says it in a line.

    The last `holdout_views` frames of every object are kept apart: views="holdout" sees only them,
    "train" only the rest. `holdout` in transforms.json is the number of last frames that
    train.prepare makes features without; holdout_views may not exceed it, or the features would
    show the model what it is scored on. `dataset[index, draw]` picks its views by (seed, draw,
    index) alone; `dataset[index]` is draw 0. A broken object raises ValueError that names its file;
    no other object ever takes its place. `cache=True` keeps what was decoded in memory.
    `meshes=True` reads every object's mesh.ply too. `augment` (train.data.augment.KINDS) changes
    what is fetched at random, by (seed, draw, index) as well; `item` never does.

    Raises ValueError for a folder that is no dataset, one without these features, where no object
    is left (unless `required` is False), and for a first object of a folder whose transforms.json
    cannot be used.
    """

    def __init__(
        self,
        roots: Sequence[str | Path],
        *,
        resolution: int = 64,
        features: str = "dinov2_vitl14_reg",
        image_size: int = 512,
        num_views: int = 1,
        max_voxels: int = 32768,
        min_aesthetic: float = 4.5,
        split: str | None = "train",
        views: str = "train",
        holdout_views: int = 0,
        seed: int = 0,
        cache: bool = False,
        required: bool = True,
        meshes: bool = False,
        augment: str = "none",
    ):
        check_augment(augment, features)
        if split not in ("train", "test", None) or views not in ("train", "holdout"):
            raise ValueError(
                f"split {split!r} is not train, test or None, or views {views!r} is not train "
                "or holdout"
            )
        least = int(views == "holdout")
        if num_views < 1 or image_size < 1 or resolution < 1 or holdout_views < least:
            raise ValueError(
                f"num_views {num_views}, image_size {image_size} and resolution {resolution} "
                f"must be at least 1, holdout_views {holdout_views} at least {least} for "
                f"views={views!r}"
            )
        if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", features):
            raise ValueError(f"features {features!r} is no name of a folder of features")
        self.resolution = resolution
        self.image_size = image_size
        self.num_views = num_views
        self.max_voxels = max_voxels
        self.views = views
        self.holdout_views = holdout_views
        self.seed = seed
        self.min_aesthetic = min_aesthetic
        self.split = split
        self.features = features
        suffix = "" if resolution == 64 else f"_{resolution}"
        self._flag = f"feature_{features}{suffix}"
        self._count = f"num_voxels{suffix}"
        self._folder = f"{features}{suffix}"
        self._memory: dict | None = {} if cache else None
        self._meshes = meshes
        self._augment = augment
        self.skipped: Counter[str] = Counter()
        # sha256 -> root, voxels that metadata.csv promises
        self._objects: dict[str, tuple[Path, int | None]] = {}
        self._files: dict[str, str] = {}  # sha256 -> local_path
        self._splits: dict[str, str] = {}
        self.roots = [Path(root) for root in ([roots] if isinstance(roots, str | Path) else roots)]
        for root in self.roots:
            self._list(root)
            own = (name for name, (its, _) in self._objects.items() if its == root)
            if first := next(own, None):  # before anything is loaded; the others when they are read
                self._frames(first)
        self.names = list(self._objects)
        if required and not self.names:
            raise ValueError(f"no object is left: {self.summary()}")
        self._channels = None

    def _list(self, root: Path) -> None:
        """Add the objects of a folder that pass the filters."""
        file = root / "metadata.csv"
        rows = read_metadata(root)
        if rows and self._flag not in rows[0]:
            raise ValueError(f"{file} has no column {self._flag}: {self._alternatives(rows)}")
        for row in rows:
            voxels = number(row, self._count, file)
            if reason := self._excluded(row, voxels, number(row, "aesthetic_score", file)):
                self.skipped[reason] += 1
            else:
                self._objects[row["sha256"]] = root, None if voxels is None else int(voxels)
                self._files[row["sha256"]] = row.get("local_path", "")
                self._splits[row["sha256"]] = row.get("split") or "train"

    def _excluded(
        self, row: dict[str, str], voxels: float | None, score: float | None
    ) -> str | None:
        """The reason why an object takes no part; None where it does."""
        if not _true(row[self._flag]):
            return "without features"
        if row.get("rendered") and not _true(row["rendered"]):
            return "without views"
        if voxels is not None and voxels > self.max_voxels:
            return f"over {self.max_voxels} voxels"
        if score is not None and score < self.min_aesthetic:
            return f"of aesthetic score below {self.min_aesthetic}"
        if self.split and (row.get("split") or "train") != self.split:
            return "of another split"
        if row["sha256"] in self._objects:
            return "listed twice"
        return None

    def _alternatives(self, rows: list[dict[str, str]]) -> str:
        """Say which flags fit the features that a metadata.csv has."""
        filled = (column for column in sorted(rows[0]) if any(_true(row[column]) for row in rows))
        found = (re.fullmatch(r"feature_(.+?)(?:_(\d+))?", column) for column in filled)
        features = [(match[1], int(match[2] or 64)) for match in found if match]
        fits = [f"--features {name} --resolution {R}" for name, R in features]
        text = f"it fits {' or '.join(fits) or 'no --features'}"
        if not any(R == self.resolution for _, R in features):
            text += (
                f"; train.prepare --resolution {self.resolution} makes rgb features of "
                "that resolution"
            )
        return text

    def summary(self) -> str:
        """Say in a line how many objects take part and how many do not."""
        left_out = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        listed = len(self._objects) + self.skipped.total()
        text = f"{len(self._objects)} of {listed} objects"
        if left_out:
            text += f" ({left_out})"
        return f"{text} in {', '.join(map(str, self.roots)) or 'no folder'}"

    def title(self, name: str) -> str:
        """Name an object for a reader: the stem of its local_path, or the start of its sha256."""
        return Path(self._files[name]).stem or name[:8]

    def place(self, name: str) -> tuple[Path, str]:
        """Return the folder of an object's dataset, and the local_path of its source mesh."""
        return self._objects[name][0], self._files[name]

    def largest(self, count: int) -> tuple[int, list[int]]:
        """The index of the object with the most voxels, and the voxels of the `count` largest.

        By the tables; where they do not say, the first object stands for all. Where there are
        fewer, the largest is taken again, as a batch may.
        """
        table = [(own or 0, -i) for i, (_, own) in enumerate(self._objects.values())]
        first, *rest = heapq.nlargest(count, table)
        index = -first[1]
        most = first[0] or len(self._features(self.names[index])[0])
        voxels = [most, *(own for own, _ in rest if own)]
        return index, [most] * (count - len(voxels)) + voxels

    def split_of(self, name: str) -> str:
        """Return the split of an object, "train" where its table does not say."""
        return self._splits[name]

    @property
    def channels(self) -> int:
        """The number of feature channels, of the first object's file."""
        if self._channels is None:
            self._channels = self._features(self.names[0])[1].shape[1]
        return self._channels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        if not 0 <= index < len(self):
            raise IndexError(f"object {index} of {len(self)}")
        frames, views = self._frames(self.names[index])
        if len(views) < self.num_views:
            file = frames.files[0].parent / "transforms.json"
            raise ValueError(f"{file}: {len(views)} {self.views} views, {self.num_views} wanted")
        rng = np.random.default_rng([self.seed, draw, index])
        item = self.item(index, rng.choice(len(views), self.num_views, replace=False).tolist())
        if self._augment == "none":
            return item
        change = Augmentation.draw(self._augment, self.seed, draw, index)
        return change.item(item, self.resolution)

    def item(self, which: int | str, views: Sequence[int] | None = None) -> Item:
        """Read an object by index or sha256, with these of its views or all of them.

        Views are numbered within the `views` of this dataset.
        """
        name = self.names[which] if isinstance(which, int) else which
        coords, features = self.voxels(name)
        frames, own = self._frames(name)
        chosen = [own[v] for v in (range(len(own)) if views is None else views)]
        like = self._cached(picture_size, frames.files[0])
        images = [
            self._cached(read_picture, frames.files[v], self.image_size, like) for v in chosen
        ]
        matrix = torch.from_numpy(frames.matrix[chosen])
        fov = torch.from_numpy(frames.fov[chosen]).float()
        camera = Camera.from_blender(matrix, fov, self.image_size, self.image_size)
        mesh = None
        if self._meshes:
            root = self._objects[name][0]
            file = below(root, self._views_folder(name) / "mesh.ply")
            mesh = self._cached(read_triangles, file)
        return Item(name, coords, features, camera, torch.stack(images).float() / 255, mesh)

    def voxels(self, which: int | str) -> tuple[Tensor, Tensor]:
        """Read coordinates [V, 3] and features [V, C] of an object, without its views."""
        name = self.names[which] if isinstance(which, int) else which
        if name not in self._objects:
            raise ValueError(f"{name} is not an object of {self.summary()}")
        coords, features = self._features(name)
        if features.shape[1] != self.channels:
            first = self._feature_file(self.names[0])
            raise ValueError(
                f"{self._feature_file(name)} has {features.shape[1]} feature channels, "
                f"but {first} has {self.channels}"
            )
        return coords, features.float()

    def _cached(self, read: Callable, *args):
        if self._memory is None:
            return read(*args)
        if (read, args) not in self._memory:
            self._memory[read, args] = read(*args)
        return self._memory[read, args]

    def _views_folder(self, name: str) -> Path:
        return self._objects[name][0] / "renders" / name

    def _feature_file(self, name: str) -> Path:
        return self._objects[name][0] / "features" / self._folder / f"{name}.npz"

    def _features(self, name: str) -> tuple[Tensor, Tensor]:
        root, promised = self._objects[name]
        file = below(root, self._feature_file(name))
        coords, features = self._cached(read_features, file, self.resolution)
        if promised is not None and promised != len(coords):
            raise ValueError(
                f"{file} has {len(coords)} voxels, but {self._count} in {root / 'metadata.csv'} "
                f"says {promised}"
            )
        if len(coords) > self.max_voxels:
            raise ValueError(
                f"{file} has {len(coords)} voxels, over the limit of {self.max_voxels}"
            )
        return coords, features

    def _frames(self, name: str) -> tuple[Frames, range]:
        """The frames of an object, and those that belong to the `views` of this dataset."""
        file = self._views_folder(name) / "transforms.json"
        frames = self._cached(read_frames, file, self._objects[name][0])
        count = len(frames.files)
        held = self.holdout_views
        if count <= held:
            raise ValueError(
                f"{file} lists {count} frames: {held} held-out views leave none to train on: "
                "use fewer --holdout-views"
            )
        if frames.holdout is not None and held > frames.holdout:
            again = "; prepare it again with train.prepare --holdout-views"
            raise ValueError(
                f"{file}: {held} held-out views, but its {self.features} features were made "
                f"without only {frames.holdout} of {count} frames: "
                f"use --holdout-views {frames.holdout} or fewer{'' if frames.holdout else again}"
            )
        first_held = count - held
        return frames, range(first_held) if self.views == "train" else range(first_held, count)


def _true(cell: str) -> bool:
    return cell.strip().lower() in ("true", "1", "1.0", "yes")
