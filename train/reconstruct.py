"""Encode meshes and items of datasets to latents, decode those, and show both beside the truth.

    python -m train.reconstruct CHECKPOINT... OBJECT... --out DIR
    python -m train.reconstruct demo chair.obj --out DIR       # what comes with the package
    python -m train.reconstruct runs/gaussian-001 chair2 --out DIR           # an embedded object
    python -m train.reconstruct runs/gaussian-001 chair.obj DATA/lamp --out DIR
    python -m train.reconstruct runs/gaussian-001 runs/mesh-001 chair.glb --out DIR
    python -m train.reconstruct RUN RUN RUN chair2 lamp.obj --view 3 --out DIR   # side by side
    python -m train.reconstruct PREFIX --encoder PREFIX chair.obj --weights FILE --out DIR
    python -m train.reconstruct CHECKPOINT... --latent FILE --out DIR        # decode alone

CHECKPOINT is the folder of a finished run, PREFIX of a decoder's PREFIX.json and PREFIX.safetensors
(published names too), whose encoder --encoder names, or demo: small models that come with the
package, demo/gaussian to demo/mesh (train/assets/checkpoints/README.md). OBJECT is a mesh file,
prepared here as the checkpoint's data were, DATASET/NAME, or NAME of --data, else of the first
checkpoint's data. Several checkpoints are shown side by side. Those that share an encoder decode
the same latents; others encode for themselves. What is there already is not overwritten.

    OUT/objects.png               of several objects: a held-out view of each (--view), the truth
                                  above what every checkpoint makes of it; objects that none of
                                  them has trained on are marked as unseen
    OUT/NAME/latent.npz           coords uint8 [V, 3], feats float32 [V, 8]: posterior means, as
                                  published; latent_LABEL.npz of each encoder where there are more
    OUT/NAME/views.png            held-out views: the truth above ours
    OUT/NAME/turntable.png        some frames of a turn, and all of them as turntable.webp; the
                                  truth is a mesh file as training draws it, an item's shape in grey
    OUT/NAME/reconstruction.json  PSNR of each checkpoint, with how it was measured
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap

import torch
from torch import Tensor

from models import GaussianScene, MeshScene, RadianceScene, Scene
from train.data.batch import Batch, collate
from train.data.latent_file import LARGEST, read_latent, write_latent
from train.flags import OneLineParser, complain, exit_status
from train.losses.pictures import composite
from train.run import report, turntable
from train.run.folder import free_folders, made, staged
from train.run.given import Given, Workshop, add_flags, check_flags, find, roots_of, seen_by
from train.run.machine import named_device
from train.run.trained import NO_CHECKPOINT, Trained, is_checkpoint, open_all
from train.scores import PROTOCOL, Score, scenes_renderer, score

COMMAND = "python -m train.reconstruct"
# names of rows where a kind of decoder has a longer one
ROWS = {"gaussian": "Gaus-\nsians", "radiance": "radiance\nfield"}
CHARACTERS = 9  # of a line beside a row of pictures
SIZES = {"size": (16, 4096), "frames": (1, 360), "view": (1, 1000)}


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    as_written = argparse.RawDescriptionHelpFormatter
    p = OneLineParser(COMMAND, description=__doc__, formatter_class=as_written)
    p.add_argument(
        "paths", nargs="+", metavar="CHECKPOINT... OBJECT...", help="see above; in any order"
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the results, one an object")
    add_flags(p)
    p.add_argument("--size", type=int, help="pixels a side of pictures (default: as in training)")
    p.add_argument("--frames", type=int, default=24, help="of a turn (default: 24)")
    p.add_argument(
        "--view", type=int, default=1, help="which held-out view objects.png shows (default: 1)"
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 2 where anything given cannot be used."""
    args = parser().parse_intermixed_args(arguments)
    return exit_status(COMMAND, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit status. Raises ValueError for what cannot be."""
    for name, (low, high) in SIZES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} {value} is not in {low} to {high}")
    device = named_device(args.device)
    paths = [path for path in args.paths if is_checkpoint(path)]
    names = [path for path in args.paths if path not in paths]
    if not paths:
        raise ValueError(f"{names[0]} {NO_CHECKPOINT}")
    check_flags(args, names, "reconstruct")
    trained = open_all(paths, device, args.encoder)
    args.size = args.size or max(one.image_size for one in trained)
    if args.latent is not None:
        return _decode_file(args, trained, device)
    return _reconstruct_all(args, names, trained, device)


def _decode_file(args: argparse.Namespace, trained: Sequence[Trained], device: torch.device) -> int:
    """Decode --latent with every checkpoint."""
    scenes = {}
    for one in trained:
        channels = one.decoder.latent_channels
        try:
            coords, latents = read_latent(args.latent, one.resolution, channels, one.digest)
        except ValueError as error:
            raise ValueError(f"{one.path}: {error}") from error
        scenes[one.label] = one.decode(coords.to(device), latents.to(device))
    (folder,) = free_folders(args.out, [args.latent.stem])
    with staged(folder) as stage:
        matrices = turntable.poses(args.frames)
        camera = turntable.cameras(matrices, args.size, device)
        _turn(stage, args.latent.stem, {}, _rows(trained, scenes, camera, True))
        _describe(stage, {"latent": str(args.latent)}, trained, scenes, {}, {})
    for one in trained:
        print(f"{one.label}: {count_of(scenes[one.label])}")
    print(f"{args.latent.stem} -> {folder}")
    return 0


def _reconstruct_all(
    args: argparse.Namespace,
    names: Sequence[str],
    trained: Sequence[Trained],
    device: torch.device,
) -> int:
    """Reconstruct every object; one that cannot be is reported, and the others are done."""
    for one in trained:
        one.need_encoder()
        if one.resolution > LARGEST:
            raise ValueError(
                f"{one.path} has {one.resolution} voxels a side; latent.npz holds {LARGEST}"
            )
    roots = [args.data] if args.data else roots_of(trained[0])
    objects = [find(name, roots, args.root) for name in names]
    folders = free_folders(args.out, [one.title for one in objects])
    picture = args.out / "objects.png"
    if len(objects) > 1 and picture.exists():
        raise ValueError(f"{picture} is there already: choose another --out")
    columns = {}
    status = 0
    with made(args.out), TemporaryDirectory(prefix="trislat-") as scratch:
        workshop = Workshop(trained, Path(scratch), device, args.weights, args.views)
        workshop.check(objects)
        seen = seen_by(trained)
        print(_shared(trained))
        for given, folder in zip(objects, folders, strict=True):
            if given.root is None:
                print(f"{given.path}: {workshop.settings.views} views are drawn", flush=True)
            try:
                with staged(folder) as stage:
                    item = workshop.item(given)
                    lines, rows = _reconstruct(given, item, workshop, trained, stage, args)
            except (ValueError, OSError) as error:
                complain(COMMAND, error)
                status = 2
                continue
            print("\n".join([f"{given.path} -> {folder}", *lines]), flush=True)
            unseen = seen is not None and item.sha256 not in seen
            columns[folder.name + ("\n(unseen)" if unseen else "")] = rows
        if len(objects) > 1 and columns:
            _side_by_side(columns, picture)
    return status


def _side_by_side(columns: Mapping[str, Mapping[str, Tensor]], file: Path) -> None:
    """Draw a view of every object, the truth above what is made of it; `columns` by caption."""
    first = next(iter(columns.values()))
    rows = {name: torch.cat([column[name] for column in columns.values()]) for name in first}
    report.picture(rows, list(columns), "views that no run has trained on", file)
    print(f"{len(columns)} objects -> {file}")


def _shared(trained: Sequence[Trained]) -> str:
    """Say which checkpoints decode the same latents."""
    encoders = Counter(one.digest for one in trained)
    if len(trained) == 1:
        return f"{trained[0].label}: {trained[0].kind}, {_reads(trained[0])}"
    if len(encoders) == 1:
        return f"{len(trained)} checkpoints share an encoder: {_reads(trained[0])}"
    each = "; ".join(f"{one.label}: {_reads(one)}" for one in trained)
    return f"{len(encoders)} encoders, each checkpoint decodes latents of its own: {each}"


def _reads(trained: Trained) -> str:
    return f"{trained.features} features at {trained.resolution}^3"


def _reconstruct(
    given: Given,
    item: Given,  # what was named, as an item of a dataset
    workshop: Workshop,
    trained: Sequence[Trained],
    stage: Path,
    args: argparse.Namespace,
) -> tuple[list[str], dict[str, Tensor]]:
    """Write the results of one object to `stage`.

    Returns lines that say how good they are, and rows of one picture [1, 3, H, W] for objects.png.
    """
    batches = {one.label: _batch(one, item, workshop, args.size) for one in trained}
    latents = _encode(trained, batches, stage)
    scenes = {}
    scores = {}
    for one in trained:
        batch = batches[one.label]
        scene = one.decode(batch.coords[:, 1:], latents[one.digest])
        scenes[one.label] = scene
        if not isinstance(scene, MeshScene) or scene.color is not None:
            scores[one.label] = score(scenes_renderer(lambda _, scene=scene: [scene]), [batch])
    first = batches[trained[0].label]
    white = first.image.new_ones(len(first.image), 3)
    rows = {"truth": composite(first.image, white)} | _rows(trained, scenes, first.camera, False)
    columns = [f"view {i + 1}" for i in range(len(white))]
    title = f"{given.title}: held-out views"
    report.picture(rows, columns, title, stage / "views.png")
    matrices = turntable.poses(args.frames)
    camera = turntable.cameras(matrices, args.size, white.device)
    truth = _truth(given, item, matrices, camera, args.size)
    _turn(stage, given.title, truth, _rows(trained, scenes, camera, True))
    about = {"object": str(given.path), "sha256": item.sha256, "voxels": len(first.coords)}
    _describe(stage, about | {"size": args.size}, trained, scenes, scores, latents)
    lines = [_line(one, scenes[one.label], scores.get(one.label)) for one in trained]
    last = min(args.view, len(white))
    return lines, {name: pictures[last - 1 : last] for name, pictures in rows.items()}


def _batch(trained: Trained, item: Given, workshop: Workshop, size: int) -> Batch:
    """Read an item as a checkpoint does: voxels, features and held-out views."""
    dataset = workshop.dataset(trained, item, size)
    return collate([dataset.item(item.sha256)]).to(workshop.device)


def _encode(
    trained: Sequence[Trained], batches: Mapping[str, Batch], stage: Path
) -> dict[str, Tensor]:
    """Encode an object with each encoder, and write the latents; by the encoder's sha256."""
    latents = {}
    several = len({one.digest for one in trained}) > 1
    for one in trained:
        if one.digest in latents:
            continue
        batch = batches[one.label]
        coords = batch.coords[:, 1:]
        latents[one.digest] = mean = one.encode(coords, batch.features)
        write_latent(stage / _latent_file(one, several), coords, mean, one.digest)
    return latents


def _latent_file(trained: Trained, several: bool) -> str:
    return f"latent_{trained.label.replace('/', '_')}.npz" if several else "latent.npz"


def _rows(
    trained: Sequence[Trained], scenes: Mapping[str, Scene], camera, grey: bool
) -> dict[str, Tensor]:
    """Draw the scenes of all checkpoints, in rows that are called by their kind where it tells."""
    kinds = Counter(one.kind for one in trained)
    rows = {}
    for one in trained:
        name = ROWS.get(one.kind, one.kind)
        if kinds[one.kind] > 1:
            name = "\n".join(wrap(one.label, CHARACTERS))
        rows |= turntable.look(name, scenes[one.label], camera, grey)
    return rows


def _truth(given: Given, item: Given, matrices, camera, size: int) -> dict[str, Tensor]:
    """Draw the true object on a turn: a mesh file as training draws it, an item's mesh in grey."""
    if given.root is None:
        return {"truth": turntable.draw_file(given.path, given.home, matrices, size)}
    file = item.root / "renders" / item.sha256 / "mesh.ply"
    return {"truth\nshape": turntable.draw_shape(file, camera)} if file.is_file() else {}


def _turn(stage: Path, title: str, truth: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
    together = {**truth, **rows}
    turntable.strip(together, title, stage / "turntable.png")
    turntable.film(together, stage / "turntable.webp")


def count_of(scene: Scene) -> str:
    """Say what a scene consists of."""
    if isinstance(scene, GaussianScene):
        return f"{len(scene.center):,} Gaussians"
    if isinstance(scene, MeshScene):
        return f"{len(scene.vertices):,} vertices, {len(scene.faces):,} faces"
    if isinstance(scene, RadianceScene):
        return f"{len(scene.position):,} voxels of a radiance field"
    return type(scene).__name__


def _line(trained: Trained, scene: Scene, own: Score | None) -> str:
    quality = "no colours, no PSNR"
    if own is not None:
        quality = f"PSNR {own.full:.2f} dB ({own.inside:.2f} inside the object)"
    return f"  {trained.label}: {quality}, {count_of(scene)}"


def _describe(
    stage: Path,
    about: Mapping,
    trained: Sequence[Trained],
    scenes: Mapping[str, Scene],
    scores: Mapping[str, Score],
    latents: Mapping[str, Tensor],
) -> None:
    """Write reconstruction.json."""
    several = len(latents) > 1
    rows = {}
    for one in trained:
        own = scores.get(one.label)
        rows[one.label] = {
            "checkpoint": one.path,
            "kind": one.kind,
            "encoder": one.digest,
            "features": one.features,
            "resolution": one.resolution,
            "scene": count_of(scenes[one.label]),
            "psnr": None if own is None else report.jsonable(asdict(own)),
        }
        if latents:
            rows[one.label]["latent"] = _latent_file(one, several)
    content = {**about, "protocol": PROTOCOL if scores else None, "checkpoints": rows}
    text = json.dumps(content, indent=2) + "\n"
    (stage / "reconstruction.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
