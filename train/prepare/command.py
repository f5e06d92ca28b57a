"""Textured meshes -> a dataset in the layout of TRELLIS.

    pip install '.[prepare]'
    # for the presets small and base (with --features rgb)
    python -m train.prepare MESHES... --out DIR
    python -m train.prepare MESHES... --out DIR --resolution 16    # for demo
    # 820 models with their split and credits
    python -m train.prepare --fetch sweethome --out DIR
    # the published features, of these objects or (without MESHES) of those that DIR has already
    python -m train.prepare MESHES... --out DIR --features dinov2_vitl14_reg --weights FILE

MESHES are OBJ (with MTL and images), GLB, glTF or PLY files, with --blender also FBX, USD, BLEND,
DAE and 3DS files (kept as OUT/converted/*/NAME.glb), folders that are searched for them, or lists:
text files (.txt) of lines `path`, `path<tab>split` or `path<tab>split<tab>caption`, the
paths relative to --root. What comes out:

    metadata.csv                        one row an object; columns below
    renders/SHA/000.png ...             RGBA, straight alpha, cameras at radius 2 with a field of
                                        view of 40 degrees; 000.webp ... with --pictures webp
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
    features/NAME/SHA.npz               the same of a network (train.prepare.features)

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
skipped, even one that kills its process or takes longer than --seconds-per-object (with --workers 0
there is no process to stop, and no such limit). Reading a mesh takes at most 500 MB and 50 bytes
for each byte of its files. A mesh, its materials, textures and buffers are read below --root alone,
links followed: by default below the folder that was given, or the folder of the mesh. Where a model
names ../textures/wood.png, or where files are links to others elsewhere, give --root a folder that
holds both.
"""

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from train.data.metadata import (
    read_metadata,
    write_metadata,
)
from train.flags import OneLineParser, exit_status
from train.prepare import sweethome
from train.prepare.blender import convert_all
from train.prepare.features import ImageFeatures, add_features, how_to_get
from train.prepare.objects import HASH, PICTURES, PREPARE, Settings, need_packages, work
from train.prepare.parts import WHOLE, Part
from train.prepare.sources import Result, Source, collect, grouped, with_path
from train.prepare.summary import summary
from train.run.machine import named_device
from train.run.progress import Progress
from train.workers import Team

COMMAND = "python -m train.prepare"
SECONDS = 3600  # for one object, unless the flags say otherwise


def prepare_all(
    sources: list[Source],
    settings: Settings,
    workers: int,
    part: Part = WHOLE,
    blender: str | None = None,
    seconds: float | None = None,
) -> tuple[int, list[dict]]:
    """Prepare the sources of a part and print what happened.

    `blender` converts those that need it. A worker has `seconds` for an object.

    Returns the exit code (0, 1 if nothing could be used, 130 if interrupted) and the rows of what
    is there then.
    """
    start = time.perf_counter()
    usable, refused = sources, []
    if blender is not None:
        usable, refused = convert_all(sources, blender, settings.out, workers)
    workers = min(workers, len(usable))
    with Team("worker", partial(work, settings=settings), workers, seconds) as team:
        return _prepare(usable, refused, settings, team, part, start)


def _prepare(
    sources: list[Source],
    refused: list[Result],
    settings: Settings,
    team: Team,
    part: Part,
    start: float,
) -> tuple[int, list[dict]]:
    """Do the rest of prepare_all, which began at `start`, with `team`."""
    code = 0
    objects, unread = grouped(_hashed(sources, team))
    own = part.of(copies[0].sha256 for copies in objects)
    objects = [copies for copies in objects if copies[0].sha256 in own]
    refused = (refused + unread)[part.number - 1 :: part.count]
    results = []
    if objects:
        try:
            settings.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--out {settings.out} cannot be a folder: {error.strerror}"
            ) from error
        if (settings.out / part.table).is_file():
            # what stands in the way of another row shows before the work
            read_metadata(settings.out, part.table)
    total = len(refused) + sum(map(len, objects))
    bar = Progress(total, unit="object")
    try:
        for result in chain(refused, _results(objects, settings, team)):
            results.append(result)
            bar.update(result.source.path.stem)
            for line in (*result.notes, *([f"skipped {result.failure}"] if result.failure else [])):
                bar.write(line.encode(errors="backslashreplace").decode())  # such names as well
    except KeyboardInterrupt:
        code = 130
    finally:
        bar.close()
        rows = sorted((r.row for r in results if r.row), key=lambda row: row["file_identifier"])
        if rows:
            write_metadata(settings.out, rows, part.table)
    print("\n".join(summary(results, settings, time.perf_counter() - start)))
    # the presets of the training hold out as many
    held = settings.holdout_views
    usual = Settings.holdout_views
    if rows and 0 < held < usual:
        print(f"the training must be told: --holdout-views {held} (its default is {usual})")
    if code == 130:
        print(f"interrupted with {total - len(results)} meshes to do: the same command goes on")
    return code or int(not rows), rows


def _results(objects: list[list[Source]], settings: Settings, team: Team) -> Iterator[Result]:
    """Yield the results of all objects.

    Of several meshes of the same content, the first that can be used is prepared.
    """
    # of each mesh whose turn it is, those that stand in for it
    left = {copies[0]: copies[1:] for copies in objects}
    while left:
        turn = left
        retry = {}
        for source, result in _prepared(list(turn), settings, team):
            yield result
            if result.row:
                same = f"the same mesh, materials and textures as {source.path}"
                yield from (Result(copy, failure=f"{copy.path}: {same}") for copy in turn[source])
            elif turn[source]:
                retry[turn[source][0]] = turn[source][1:]
        left = retry


def _hashed(sources: list[Source], team: Team) -> list[Source | Result]:
    """The sources with their hashes, or what is wrong with them, in their order."""
    found = {}
    tasks = [(HASH, source) for source in dict.fromkeys(sources)]
    for (_, source), hashed in team.answers(tasks):
        found[source] = _failed(source, hashed) if isinstance(hashed, Exception) else hashed
    return [found[source] for source in sources]


def _prepared(
    sources: list[Source], settings: Settings, team: Team
) -> Iterator[tuple[Source, Result]]:
    """Yield each source with its result, as they come. A dead process costs its object alone."""
    for (_, source), result in team.answers([(PREPARE, source) for source in sources]):
        if isinstance(result, Exception):
            shutil.rmtree(settings.partial(source.sha256), ignore_errors=True)
            result = _failed(source, result)
        yield source, result


def _failed(source: Source, error: Exception) -> Result:
    """The result of an object whose process died or was stopped."""
    advice = ": --seconds-per-object says how long" if isinstance(error, TimeoutError) else ""
    return Result(source, failure=with_path(source, f"{error}{advice}"))


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    as_written = argparse.RawDescriptionHelpFormatter
    p = OneLineParser(COMMAND, description=__doc__, formatter_class=as_written)
    p.add_argument(
        "meshes",
        nargs="*",
        type=Path,
        metavar="MESHES",
        help="files, folders, or .txt lists of files",
    )
    p.add_argument(
        "--fetch",
        choices=["sweethome"],
        help="get 820 textured models first (120 MB, CC0 and CC BY; train.prepare.sweethome)",
    )
    p.add_argument("--archive", type=Path, help="their package on disk, instead of the network")
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the dataset's folder; an unfinished one is continued",
    )
    p.add_argument(
        "--root",
        type=Path,
        help="what paths in lists are relative to (default: here), and the folder that meshes, "
        "their materials and their textures may lie in (default: the folder of MESHES)",
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
        "--pictures",
        choices=list(PICTURES),
        default="png",
        help="files of the views; webp, lossless too, takes 40 %% less room (default: png)",
    )
    networks = "a network of dinov2_vit{s,b,l}14[_reg], with --weights"
    p.add_argument(
        "--features",
        default="rgb",
        metavar="NAME",
        help=f"per-voxel features: rgb, none, or {networks} (default: rgb)",
    )
    p.add_argument("--weights", type=Path, help="file with the official weights of the network")
    p.add_argument("--device", help="of the network: cpu, cuda, cuda:1 ... (default: a GPU)")
    p.add_argument(
        "--part",
        default="1/1",
        metavar="K/N",
        help="the K-th of N parts of the objects, for N machines (default: all)",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = (
        f"processes, each with an object (default: {cores}, the cores; 0: none, all in this one)"
    )
    p.add_argument(
        "--blender",
        metavar="PROGRAM",
        help="your Blender, which converts FBX, USD, BLEND, DAE and 3DS files (default: refused)",
    )
    p.add_argument("--workers", type=int, default=cores, help=workers)
    p.add_argument(
        "--seconds-per-object",
        type=float,
        default=SECONDS,
        metavar="SECONDS",
        help=f"an object whose process takes longer is skipped (default: {SECONDS}; 0: never)",
    )
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
    return exit_status(COMMAND, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit code. Raises ValueError for what cannot be."""
    part = Part.parse(args.part)
    network = _network(args)
    if args.archive and not args.fetch:
        raise ValueError(f"--archive {args.archive} is for --fetch")
    frames = (args.views, args.holdout_views, args.size, args.supersample)
    rgb = "rgb" if args.features == "rgb" else None
    resolution = tuple(dict.fromkeys(args.resolution))
    settings = Settings(args.out, resolution, *frames, rgb, args.seed, args.pictures)
    code = 0
    if args.meshes or args.fetch:
        need_packages()
        tag = f".{part.number}" if part.count > 1 else ""
        fetched = sweethome.sources(args.out, args.archive, tag) if args.fetch else []
        given = collect(args.meshes, args.root) if args.meshes else []
        workers = max(args.workers, 0)
        seconds = _seconds(args.seconds_per_object)
        sources = fetched + given
        code, rows = prepare_all(sources, settings, workers, part, args.blender, seconds)
    elif network:
        rows = read_metadata(args.out)
        own = part.of(row["sha256"] for row in rows)
        rows = [row for row in rows if row["sha256"] in own]
    else:
        raise ValueError("no MESHES, no --fetch, no --features of a network with --weights")
    if network and code == 0:
        code = add_features(network, rows, resolution, part.table)
    if absent := part.join(args.out):
        done = part.count - len(absent)
        print(f"{part.table}; metadata.csv when all parts are there ({done} of {part.count} are)")
    return code


def _seconds(given: float) -> float | None:
    """The time limit of an object, None for 0; ValueError for what is no time."""
    if not 0 <= given < float("inf"):
        raise ValueError(f"--seconds-per-object {given:g} is not a number of seconds from 0 up")
    return given or None


def _network(args: argparse.Namespace) -> ImageFeatures | None:
    """The features of a network that the flags ask for, None where they are others."""
    if args.features in ("rgb", "none"):
        if args.weights:
            raise ValueError(f"--weights are for a network, not for --features {args.features}")
        return None
    needed = how_to_get(args.features)
    if args.weights is None:
        raise ValueError(f"--features {args.features} need --weights FILE: {needed}")
    return ImageFeatures(args.out, args.features, args.weights, named_device(args.device))
