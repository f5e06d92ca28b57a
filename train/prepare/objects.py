"""Prepare one object: the views, voxels and features of a mesh, in the files of a dataset."""

import hashlib
import importlib.util
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from train.data.metadata import (
    PUBLISHED,
    inside,
    ply_count,
    ply_mesh,
    ply_points,
    write_file,
    write_npz,
)
from train.meshes.read import normalize, read_mesh
from train.meshes.surface import Mesh
from train.meshes.untrusted import MALFORMED, reason
from train.prepare.raycast import FOV, Caster, camera_to_world, direction
from train.prepare.sources import Result, Source, hash_source, with_path
from train.prepare.voxelize import Features, voxelize

HASH = "hash"
PREPARE = "prepare"
NEEDED = {"embreex": "embreex", "mapbox_earcut": "mapbox-earcut"}  # modules, and their packages
NOTES = 50  # that are shown of one object
# how views are written, all without loss
PICTURES = {"png": {}, "webp": {"lossless": True, "exact": True, "method": 6}}


def need_packages() -> None:
    """Raise ValueError that says how to install the packages which are not there."""
    missing = [NEEDED[name] for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"drawing meshes needs {' and '.join(missing)}: pip install '.[prepare]'")


@dataclass(frozen=True)
class Settings:
    """The settings of all objects: the flags of the command, field by field."""

    out: Path
    resolution: tuple[int, ...] = (64,)
    views: int = 150
    holdout_views: int = 4
    size: int = 512
    supersample: int = 2
    features: str | None = "rgb"
    seed: int = 0
    pictures: str = "png"  # of PICTURES

    def __post_init__(self):
        if self.pictures not in PICTURES:
            raise ValueError(f"pictures {self.pictures!r} are none of {', '.join(PICTURES)}")
        for name, low, high in (("views", 1, 1000), ("size", 8, 4096), ("supersample", 1, 16)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} {getattr(self, name)} is not in {low} to {high}")
        if self.holdout_views < 0:
            raise ValueError(f"{self.holdout_views} held-out views: must not be negative")
        if self.holdout_views >= self.views:
            raise ValueError(
                f"{self.holdout_views} held-out views of {self.views} leave none to train on"
            )
        if not self.resolution or not all(2 <= R <= 256 for R in self.resolution):
            raise ValueError(
                f"resolution {self.resolution} is not in 2 to 256, what uint8 indices hold"
            )

    def recipe(self) -> dict[str, int | str]:
        """The settings that views are made with, as transforms.json records them."""
        names = ("views", "holdout_views", "size", "supersample", "seed", "pictures")
        return {name: getattr(self, name) for name in names}

    def voxels(self, R: int, sha: str) -> Path:
        """The file of an object's voxels at R^3."""
        return self.out / ("voxels" if R == 64 else f"voxels_{R}") / f"{sha}.ply"

    def feature(self, R: int, sha: str) -> Path:
        """The file of an object's features at R^3."""
        folder = self.features if R == 64 else f"{self.features}_{R}"
        return self.out / "features" / folder / f"{sha}.npz"

    def views_folder(self, sha: str) -> Path:
        """The folder of an object's views."""
        return self.out / "renders" / sha

    def partial(self, sha: str) -> Path:
        """The folder of an object's views until all of them are there."""
        return self.out / "renders" / f"{sha}.partial"


def work(task: tuple[str, Source], settings: Settings) -> Source | Result:
    """Do what a worker is asked for: to HASH a source, or to PREPARE an object."""
    what, source = task
    return hash_source(source) if what == HASH else prepare_object(source, settings)


def frame_order(views: int, holdout: int) -> list[int]:
    """Order the views of the sequence as frames: held-out ones last.

    The held-out views are evenly spread over the sequence.
    """
    last = [int((k + 0.5) * views / holdout) for k in range(holdout)]
    return [i for i in range(views) if i not in last] + last


def prepare_object(source: Source, settings: Settings) -> Result:
    """Make all files of an object that are not there yet.

    Bad input ends in `Result.failure`, never in an exception.
    """
    partial = settings.partial(source.sha256)
    start = time.perf_counter()
    try:
        counts = _finished(settings, source.sha256)
        if counts is not None:
            return Result(source, _row(source, settings, counts))
        mesh = read_mesh(source.file, source.home)
        scale, offset = normalize(mesh)
        # as mesh.ply stores them
        mesh.vertices = mesh.vertices.astype(np.float32).astype(np.float64)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        cells = {R: voxelize(mesh.vertices, mesh.faces, R) for R in settings.resolution}
        features = {}
        for R, own in cells.items():
            write_file(settings.voxels(R, source.sha256), ply_points((own + 0.5) / R - 0.5))
            if settings.features:
                sub_cells = voxelize(mesh.vertices, mesh.faces, 2 * R)
                features[R] = Features(own, sub_cells, R)
        frames = _render(mesh, source, settings, partial, list(features.values()))
        for R, grid in features.items():
            write_npz(
                settings.feature(R, source.sha256),
                indices=grid.cells.astype(np.uint8),
                patchtokens=grid.result(),
            )
        (partial / "mesh.ply").write_bytes(ply_mesh(mesh.vertices, mesh.faces))
        transforms = {
            "aabb": [[-0.5] * 3, [0.5] * 3],
            "scale": scale,
            "offset": [float(x) for x in offset],
            "holdout": settings.holdout_views,
            "recipe": settings.recipe(),
            "frames": frames,
        }
        text = json.dumps(transforms, indent=1)
        (partial / "transforms.json").write_text(text, encoding="utf-8")
        folder = settings.views_folder(source.sha256)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        counts = {R: len(own) for R, own in cells.items()}
        notes = tuple(with_path(source, note) for note in mesh.notes[:NOTES])
        if len(mesh.notes) > NOTES:
            notes += (f"{source.path}: {len(mesh.notes) - NOTES} more notes",)
        row = _row(source, settings, counts)
        return Result(source, row, "", notes, made=True, seconds=time.perf_counter() - start)
    except (OSError, *MALFORMED) as error:
        shutil.rmtree(partial, ignore_errors=True)
        return Result(source, failure=with_path(source, reason(error)))


def _render(
    mesh: Mesh, source: Source, settings: Settings, folder: Path, features: list[Features]
) -> list[dict]:
    """Write the views, add those for training to the features, and return the frames.

    The frames are those of transforms.json.
    """
    # not SHA: repainted copies are seen from the same sides
    mesh_file = hashlib.sha256(source.path.read_bytes()).hexdigest()
    r0, r1 = np.random.default_rng([settings.seed, int(mesh_file[:15], 16)]).random(2)
    caster = Caster(mesh)
    frames = []
    shown = False
    for frame, i in enumerate(frame_order(settings.views, settings.holdout_views)):
        pose = camera_to_world(*direction(i, settings.views, r0, r1))
        image, points = caster.render(pose, settings.size, settings.supersample)
        shown |= bool(image.any())
        file = f"{frame:03d}.{settings.pictures}"
        Image.fromarray(image).save(folder / file, **PICTURES[settings.pictures])
        frames.append(
            {
                "file_path": file,
                "camera_angle_x": float(FOV),
                "transform_matrix": pose.tolist(),
            }
        )
        if frame < settings.views - settings.holdout_views:
            for grid in features:
                grid.add_view(*points)
    if not shown:
        raise ValueError("every view is empty: all surfaces are transparent")
    return frames


def _finished(settings: Settings, sha: str) -> dict[int, int] | None:
    """Count the voxels of an object whose files are all there and whole.

    Returns the number for each resolution, or None: the object is then made anew. Raises ValueError
    for files that other settings made.
    """
    folder = settings.views_folder(sha)
    if not (folder / "transforms.json").is_file():
        return None
    try:
        transforms = json.loads((folder / "transforms.json").read_bytes())
        was = {"pictures": "png"} | transforms.get("recipe", {})  # the only kind there was
        frames = [inside(folder, frame["file_path"]) for frame in transforms["frames"]]
    except MALFORMED:  # cut short or not what was written
        return None
    for name, value in settings.recipe().items():
        if was.get(name) != value:
            raise ValueError(
                f"{folder} was made with {name} {was.get(name)}, not {value}: choose another --out"
            )
    files = [folder / "mesh.ply", *frames]
    for R in settings.resolution:
        files.append(settings.voxels(R, sha))
        if settings.features:
            files.append(settings.feature(R, sha))
    if not all(f.is_file() and f.stat().st_size for f in files):
        return None
    counts = {R: ply_count(settings.voxels(R, sha)) for R in settings.resolution}
    return None if None in counts.values() else counts


def _row(source: Source, settings: Settings, counts: dict[int, int]) -> dict:
    """The object's row of metadata.csv."""
    row = dict.fromkeys(PUBLISHED, "")
    row |= {
        "sha256": source.sha256,
        "file_identifier": source.identifier,
        "local_path": source.identifier,
        "aesthetic_score": "5.0",
        "rendered": True,
        "split": source.split,
        "captions": json.dumps([source.caption] if source.caption else []),
    }
    for R, count in counts.items():
        suffix = "" if R == 64 else f"_{R}"
        row |= {f"voxelized{suffix}": True, f"num_voxels{suffix}": count}
        if settings.features:
            row[f"feature_{settings.features}{suffix}"] = True
    return row
