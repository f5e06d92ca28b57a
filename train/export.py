"""Export the scene of a mesh, an item of a dataset or latents to a file of another program.

    python -m train.export CHECKPOINT OBJECT --out chair.ply            # Gaussians
    python -m train.export runs/mesh-001 chair.obj --out chair.glb      # a mesh; also .obj
    python -m train.export CHECKPOINT --latent FILE --out scene.npz     # the tensors of any scene

CHECKPOINT and OBJECT are those of train.reconstruct. The format is what --out ends in, or --format.
Axes and colours of the formats: train.meshes.write. The file is replaced if it is there.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from models import MeshScene
from models.files import write_whole
from train.data.latent_file import read_latent
from train.flags import OneLineParser, exit_status
from train.meshes.write import AXES, gaussian_ply, mesh_glb, mesh_obj, scene_npz
from train.run.given import Workshop, add_flags, check_flags, find, roots_of
from train.run.machine import named_device
from train.run.shipped import only
from train.run.trained import NO_CHECKPOINT, Trained, is_checkpoint, open_all

COMMAND = "python -m train.export"
# what can be written of the scenes of each kind of decoder; of any other npz alone
FORMATS: dict[str, dict[str, Callable[..., bytes]]] = {
    "gaussian": {"ply": gaussian_ply, "npz": scene_npz},
    "mesh": {"glb": mesh_glb, "obj": mesh_obj, "npz": scene_npz},
}
ANY = {"npz": scene_npz}


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    as_written = argparse.RawDescriptionHelpFormatter
    p = OneLineParser(COMMAND, description=__doc__, formatter_class=as_written)
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or a decoder's prefix")
    p.add_argument("object", metavar="OBJECT", nargs="?", help="a mesh file, or an item")
    p.add_argument("--out", type=Path, required=True, help="the file to write")
    formats = dict.fromkeys(name for own in FORMATS.values() for name in own)
    p.add_argument("--format", choices=list(formats), help="default: what --out ends in")
    p.add_argument(
        "--axes", choices=list(AXES), help="of a ply (default: y-down, for viewers of splats)"
    )
    add_flags(p)
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 2 where anything given cannot be used."""
    args = parser().parse_intermixed_args(arguments)
    return exit_status(COMMAND, lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Do what the flags say. Raises ValueError for what cannot be."""
    if not is_checkpoint(args.checkpoint):
        raise ValueError(f"{args.checkpoint} {NO_CHECKPOINT}")
    check_flags(args, [args.object] if args.object else [], "export")
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder, not a file to write")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: {args.out.parent} is no folder")
    device = named_device(args.device)
    (trained,) = open_all([only(args.checkpoint)], device, args.encoder)
    write = _writer(args, trained)
    coords, latents = _latents(args, trained, device)
    scene = trained.decode(coords.to(device), latents.to(device))
    if isinstance(scene, MeshScene) and not len(scene.faces) and write is not scene_npz:
        raise ValueError(f"{args.out} is not written: the decoded surface has no faces")
    content = write(scene, args.axes or "y-down") if write is gaussian_ply else write(scene)
    write_whole(args.out, content)
    print(f"{trained.kind} -> {args.out} ({len(content):,} bytes)")


def _writer(args: argparse.Namespace, trained: Trained) -> Callable[..., bytes]:
    """Choose what writes the format; ValueError for one that such a scene does not have."""
    suffix = args.out.suffix.lower().removeprefix(".")
    known = FORMATS.get(trained.kind, ANY)
    name = args.format or suffix
    if args.format and suffix in {key for own in FORMATS.values() for key in own} - {name}:
        raise ValueError(f"--out {args.out} ends in .{suffix}, but --format is {args.format}")
    if name not in known:
        raise ValueError(
            f"a decoder of kind {trained.kind} is not exported as {name or 'a file without ending'}"
            f", but as {', '.join(known)}"
        )
    if args.axes and name != "ply":
        raise ValueError(f"--axes {args.axes} is for ply: axes of {name} are fixed")
    return known[name]


def _latents(
    args: argparse.Namespace, trained: Trained, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Read --latent, or encode the object: voxels [V, 3] and latents [V, latent]."""
    if args.latent is not None:
        channels = trained.decoder.latent_channels
        return read_latent(args.latent, trained.resolution, channels, trained.digest)
    trained.need_encoder()
    given = find(args.object, [args.data] if args.data else roots_of(trained), args.root)
    with TemporaryDirectory(prefix="trislat-") as scratch:
        workshop = Workshop([trained], Path(scratch), device, args.weights, args.views)
        workshop.check([given])
        item = workshop.item(given)
        voxels = workshop.dataset(trained, item, trained.image_size).item(item.sha256, [0])
        coords = voxels.coords.to(device)
        return coords, trained.encode(coords, voxels.features.to(device))


if __name__ == "__main__":
    sys.exit(main())
