"""Textured meshes -> a dataset in the layout of TRELLIS.

    pip install '.[prepare]'
    # for the presets small and base (with --features rgb)
    python -m train.prepare MESHES... --out DIR
    python -m train.prepare MESHES... --out DIR --resolution 16    # for demo

MESHES are OBJ (with MTL and images), GLB, glTF or PLY files, folders that are searched for them, or
lists: text files (.txt) of lines `path`, `path<tab>split` or `path<tab>split<tab>caption`, the
paths relative to --root. What comes out:

    metadata.csv                        one row an object; columns below
    renders/SHA/000.png ...             RGBA, straight alpha, cameras at radius 2 with a field of
                                        view of 40 degrees
    renders/SHA/transforms.json         aabb, scale, offset, frames (published keys); holdout: the
                                        last that many frames
                                        are held out: features never see them; recipe: what the
                                            views were made with
    renders/SHA/mesh.ply                vertices float32 and triangles int32 in the same z-up unit
                                        cube
    voxels/SHA.ply                      vertices (index + 0.5) / 64 - 0.5 of the surface cells;
                                        voxels_R for other sizes
    features/rgb/SHA.npz                indices uint8 [V, 3], patchtokens float16 [V, 50]
                                        (train.prepare.voxelize); features/rgb_R

SHA is the sha256 of the mesh file and of the materials, textures and buffers that it names: objects
that differ in any of them are different objects, and copies are made once. (So an edited mesh is a
new object; the old one's row stays.)

Columns: sha256, file_identifier and local_path (the path below --root or the folder),
aesthetic_score (5.0: not a judgement, but it passes the published filter of 4.5), captions (JSON
list), rendered, voxelized, num_voxels, feature_rgb, and the last three again as voxelized_R,
num_voxels_R, feature_rgb_R for sizes other than 64, split (train or test: whole objects held out).
Held-out frames are spread over the quasi-random sequence and moved to its end, so that they are no
worse placed than the others; `rgb` features never see them.

A run can be interrupted: files are written under another name and renamed when complete, and the
same command goes on where it stopped. A mesh that cannot be used is reported with its reason and
skipped, even one that kills its process.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from train.data.layout import (
    PUBLISHED,
    inside,
    ply_count,
    ply_mesh,
    ply_points,
    read_metadata,
    write,
    write_metadata,
    write_npz,
)
from train.meshes.read import READABLE, Mesh, content_hash, normalize, read_mesh
from train.meshes.untrusted import MALFORMED, reason
from train.prepare.raycast import FOV, Caster, camera_to_world, direction
from train.prepare.voxelize import Features, voxelize
from train.run.progress import Progress
from train.workers import answers


@dataclass(frozen=True)
class Settings:
    """What every object of a run gets; field by field the flags of the command."""

    out: Path
    resolution: tuple[int, ...] = (64,)
    views: int = 150
    holdout_views: int = 4
    size: int = 512
    supersample: int = 2
    features: str | None = "rgb"
    seed: int = 0

    def __post_init__(self):
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

    def voxels(self, R: int, sha: str) -> Path:
        return self.out / ("voxels" if R == 64 else f"voxels_{R}") / f"{sha}.ply"

    def feature(self, R: int, sha: str) -> Path:
        return (
            self.out
            / "features"
            / (self.features if R == 64 else f"{self.features}_{R}")
            / f"{sha}.npz"
        )

    def partial(self, sha: str) -> Path:
        """Where the views of an object are until all of them are there."""
        return self.out / "renders" / f"{sha}.partial"


@dataclass(frozen=True)
class Source:
    """One mesh to prepare: where it is, what the metadata calls it, and the hash of its content
    (empty until read).
    """

    path: Path
    identifier: str
    split: str = "train"
    caption: str = ""
    sha256: str = ""


@dataclass
class Result:
    """What became of a source: a metadata row, or the reason why there is none."""

    source: Source
    row: dict | None = None
    failure: str = ""
    notes: tuple[str, ...] = ()
    made: bool = False  # False: an earlier run had finished it


def collect(inputs: list[Path], root: Path) -> list[Source]:
    """Sources of files, folders and lists in that order; ValueError where there is nothing."""
    sources = []
    for entry in inputs:
        if entry.is_dir():
            found = sorted(
                p for p in entry.rglob("*") if p.suffix.lower() in READABLE and p.is_file()
            )
            if not found:
                raise ValueError(f"{entry} holds no {', '.join(READABLE)} file")
            sources += [Source(p, p.relative_to(entry).as_posix()) for p in found]
        elif entry.suffix.lower() == ".txt":
            # as the names of files are read
            text = entry.read_text(encoding="utf-8", errors="surrogateescape")
            lines = [
                line for line in text.splitlines() if line.strip() and not line.startswith("#")
            ]
            for line in lines:
                path, split, caption = [*line.split("\t"), "", ""][:3]
                split = split or "train"
                if split not in ("train", "test"):
                    raise ValueError(
                        f"{entry.name}: split {split!r} of {path} is neither train nor test"
                    )
                try:
                    sources.append(Source(inside(root, path), path, split, caption))
                except ValueError as error:
                    raise ValueError(
                        f"{entry.name}: {error}: --root says what its lines are relative to"
                    ) from error
        else:
            sources.append(Source(entry, entry.name))
    if not sources:
        raise ValueError(f"no meshes in {', '.join(map(str, inputs))}")
    return sources


def frame_order(views: int, holdout: int) -> list[int]:
    """Which view of the sequence each frame is: the held-out ones, evenly spread over the sequence,
    come last.
    """
    last = [int((k + 0.5) * views / holdout) for k in range(holdout)]
    return [i for i in range(views) if i not in last] + last


def prepare_object(source: Source, settings: Settings) -> Result:
    """Make everything of one object that is not there yet; bad input ends in `Result.failure`,
    never in an exception.
    """
    folder = settings.out / "renders" / source.sha256
    partial = settings.partial(source.sha256)
    try:
        recipe = {
            k: v
            for k, v in asdict(settings).items()
            if k in ("views", "holdout_views", "size", "supersample", "seed")
        }
        counts = _finished(settings, source.sha256, recipe)
        if counts is not None:
            return Result(source, _row(source, settings, counts))
        mesh = read_mesh(source.path)
        scale, offset = normalize(mesh)
        # as mesh.ply stores them
        mesh.vertices = mesh.vertices.astype(np.float32).astype(np.float64)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        grids = {}
        for R in settings.resolution:
            cells = voxelize(mesh.vertices, mesh.faces, R)
            grids[R] = (
                Features(cells, voxelize(mesh.vertices, mesh.faces, 2 * R), R)
                if settings.features
                else cells
            )
            counts = {**(counts or {}), R: len(cells)}
            write(settings.voxels(R, source.sha256), ply_points((cells + 0.5) / R - 0.5))
        frames = _render(mesh, source, settings, partial, grids)
        if settings.features:
            for R, grid in grids.items():
                write_npz(
                    settings.feature(R, source.sha256),
                    indices=grid.cells.astype(np.uint8),
                    patchtokens=grid.result(),
                )
        (partial / "mesh.ply").write_bytes(ply_mesh(mesh.vertices, mesh.faces))
        box = {
            "aabb": [[-0.5] * 3, [0.5] * 3],
            "scale": scale,
            "offset": [float(x) for x in offset],
        }
        transforms = {**box, "holdout": settings.holdout_views, "recipe": recipe, "frames": frames}
        (partial / "transforms.json").write_text(json.dumps(transforms, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        notes = tuple(_located(source, note) for note in mesh.notes)
        return Result(source, _row(source, settings, counts), notes=notes, made=True)
    except (OSError, *MALFORMED) as error:
        shutil.rmtree(partial, ignore_errors=True)
        return Result(source, failure=_located(source, reason(error)))


def _located(source: Source, message: str) -> str:
    """A message about a mesh, which may begin with its file's name, with its path as the command
    was told it.
    """
    rest = message.removeprefix(source.path.name)
    return f"{source.path}: {message}" if rest == message else f"{source.path}{rest}"


def _render(
    mesh: Mesh, source: Source, settings: Settings, folder: Path, grids: dict
) -> list[dict]:
    """Write the views, let the grids see those for training, and return the frames of
    transforms.json.
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
        Image.fromarray(image).save(folder / f"{frame:03d}.png")
        frames.append(
            {
                "file_path": f"{frame:03d}.png",
                "camera_angle_x": float(FOV),
                "transform_matrix": pose.tolist(),
            }
        )
        if settings.features and frame < settings.views - settings.holdout_views:
            for grid in grids.values():
                grid.add_view(*points)
    if not shown:
        raise ValueError("every view is empty: all surfaces are transparent")
    return frames


def _finished(settings: Settings, sha: str, recipe: dict) -> dict[int, int] | None:
    """Voxel counts of an object whose files are all there and whole, else None: it is made anew."""
    folder = settings.out / "renders" / sha
    if not (folder / "transforms.json").is_file():
        return None
    try:
        transforms = json.loads((folder / "transforms.json").read_text())
        was = transforms.get("recipe", {})
        frames = [inside(folder, frame["file_path"]) for frame in transforms["frames"]]
    except MALFORMED:  # cut short or not what was written
        return None
    for name in recipe:
        if was.get(name) != recipe[name]:
            raise ValueError(
                f"{folder} was made with {name} {was.get(name)}, not {recipe[name]}: choose "
                "another --out"
            )
    files = [folder / "mesh.ply", *frames]
    for R in settings.resolution:
        files += [settings.voxels(R, sha)] + (
            [settings.feature(R, sha)] if settings.features else []
        )
    if not all(f.is_file() and f.stat().st_size for f in files):
        return None
    counts = {R: ply_count(settings.voxels(R, sha)) for R in settings.resolution}
    return None if None in counts.values() else counts


def _row(source: Source, settings: Settings, counts: dict[int, int]) -> dict:
    row = dict.fromkeys(PUBLISHED, "") | {
        "sha256": source.sha256,
        "file_identifier": source.identifier,
    }
    row |= {
        "local_path": source.identifier,
        "aesthetic_score": "5.0",
        "rendered": True,
        "split": source.split,
    }
    row["captions"] = json.dumps([source.caption] if source.caption else [])
    for R, count in counts.items():
        suffix = "" if R == 64 else f"_{R}"
        row |= {f"voxelized{suffix}": True, f"num_voxels{suffix}": count}
        if settings.features:
            row[f"feature_{settings.features}{suffix}"] = True
    return row


def _hashed(sources: list[Source]) -> tuple[list[list[Source]], list[Result]]:
    """Sources with the hash of their content, those of one content together, and a Result for every
    one that cannot be read.
    """
    copies = {}
    refused = []
    for source in sources:
        try:
            # names of files can be any bytes
            if source.identifier.encode(errors="replace").decode() != source.identifier:
                raise ValueError("its name is not UTF-8")
            hashed = replace(source, sha256=content_hash(source.path))
        except OSError as error:
            own = error.filename is None or Path(error.filename) == source.path
            what = error.strerror or str(error)
            refused.append(
                Result(
                    source, failure=_located(source, what if own else f"{error.filename}: {what}")
                )
            )
        except ValueError as error:
            refused.append(Result(source, failure=_located(source, str(error))))
        else:
            copies.setdefault(hashed.sha256, []).append(hashed)
    return list(copies.values()), refused


def run(sources: list[Source], settings: Settings, workers: int) -> int:
    """Prepare all sources, print what happened and return the exit code: 0, 1 if nothing could be
    used, 130 if interrupted.
    """
    start = time.perf_counter()
    code = 0
    objects, refused = _hashed(sources)
    results = []
    if objects:
        try:
            settings.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--out {settings.out} cannot be a folder: {error.strerror}"
            ) from error
        if (settings.out / "metadata.csv").is_file():
            # what stands in the way of another row shows before the work
            read_metadata(settings.out)
    bar = Progress(len(sources), unit="object")
    try:
        for result in chain(refused, _results(objects, settings, workers)):
            results.append(result)
            bar.update(result.source.path.stem)
            for line in (*result.notes, *([f"skipped {result.failure}"] if result.failure else [])):
                bar.write(line.encode(errors="backslashreplace").decode())  # such names as well
    except KeyboardInterrupt:
        code = 130
    finally:
        bar.close()
        rows = [r.row for r in results if r.row]
        if rows:
            write_metadata(settings.out, sorted(rows, key=lambda row: row["file_identifier"]))
    made = sum(r.made for r in results)
    failed = sum(bool(r.failure) for r in results)
    print(
        f"{len(rows)} objects ({made} made, {len(rows) - made} there already), "
        f"{made * settings.views} views, "
        f"{failed} skipped, {time.perf_counter() - start:.1f} s -> {settings.out}"
    )
    # the presets of the training hold out as many
    held, usual = settings.holdout_views, Settings.holdout_views
    if rows and settings.features and 0 < held < usual:
        print(f"the training must be told: --holdout-views {held} (its default is {usual})")
    if code == 130:
        print(
            f"interrupted with {len(sources) - len(results)} meshes to do: the same command goes on"
        )
    return code or int(not rows)


def _results(objects: list[list[Source]], settings: Settings, workers: int) -> Iterator[Result]:
    """The results of all objects: of several meshes of the same content, the first that can be used
    is prepared.
    """
    # of each mesh whose turn it is, those that stand in for it
    left = {copies[0]: copies[1:] for copies in objects}
    while left:
        turn = left
        retry = {}
        for source, result in _prepared(list(turn), settings, workers):
            yield result
            if result.row:
                same = f"the same mesh, materials and textures as {source.path}"
                yield from (Result(copy, failure=f"{copy.path}: {same}") for copy in turn[source])
            elif turn[source]:
                retry[turn[source][0]] = turn[source][1:]
        left = retry


def _prepared(
    sources: list[Source], settings: Settings, workers: int
) -> Iterator[tuple[Source, Result]]:
    """Yield each source with its result, as they come. A dead process costs its object alone."""
    prepare = partial(prepare_object, settings=settings)
    if workers < 1:
        yield from ((source, prepare(source)) for source in sources)
        return
    for source, result in answers("worker", prepare, sources, min(workers, len(sources))):
        if not isinstance(result, Result):  # an error
            shutil.rmtree(settings.partial(source.sha256), ignore_errors=True)
            result = Result(source, failure=_located(source, str(result)))
        yield source, result


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    as_written = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(
        "python -m train.prepare", description=__doc__, formatter_class=as_written
    )
    p.add_argument(
        "meshes",
        nargs="+",
        type=Path,
        metavar="MESHES",
        help="files, folders, or .txt lists of files",
    )
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the dataset's folder; an unfinished one is continued",
    )
    p.add_argument(
        "--root",
        type=Path,
        default=Path(),
        help="what paths in lists are relative to (default: here)",
    )
    p.add_argument(
        "--resolution",
        type=int,
        nargs="+",
        default=[64],
        help="voxels a side (default: 64; preset demo needs 16)",
    )
    p.add_argument(
        "--views",
        type=int,
        default=150,
        help="views of each object, held-out ones included (default: 150)",
    )
    p.add_argument(
        "--holdout-views", type=int, default=4, help="how many of them are held out (default: 4)"
    )
    p.add_argument(
        "--size", type=int, default=512, help="pixels a side; presets shrink them (default: 512)"
    )
    p.add_argument(
        "--supersample", type=int, default=2, help="rays a pixel: this number squared (default: 2)"
    )
    p.add_argument(
        "--features",
        choices=["rgb", "none"],
        default="rgb",
        help="per-voxel features (default: rgb)",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = (
        f"processes, each with an object (default: {cores}, the cores; 0: none, all in this one)"
    )
    p.add_argument("--workers", type=int, default=cores, help=workers)
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the camera offsets, which also depend on the object (default: 0)",
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code (2 for settings that cannot be)."""
    args = parser().parse_args(arguments)
    if importlib.util.find_spec("embreex") is None:
        print("python -m train.prepare needs embreex: pip install '.[prepare]'", file=sys.stderr)
        return 2
    try:
        features = None if args.features == "none" else args.features
        frames = (args.views, args.holdout_views, args.size, args.supersample)
        settings = Settings(
            args.out, tuple(dict.fromkeys(args.resolution)), *frames, features, args.seed
        )
        return run(collect(args.meshes, args.root), settings, args.workers)
    except (ValueError, OSError) as error:
        print(f"python -m train.prepare: {error}", file=sys.stderr)
        return 2
