"""Draw the ground truth and the reconstructions of several finished runs, one row a run.

    python -m train.gaussian && python -m train.radiance && python -m train.mesh
    python notebooks/decoders.py runs/gaussian-001 runs/radiance-001 runs/mesh-001

The runs share their features and resolution. Columns are objects, each seen from one held-out
view, on white; the last ones are of the other split: no run has seen them.
"""

import argparse
import json
from pathlib import Path

import torch

import models
from train.data import EMBEDDED, Dataset, collate
from train.losses.pictures import composite
from train.run.report import picture

ROWS = {"gaussian": "Gaus-\nsians", "radiance": "radiance\nfield", "mesh": "mesh"}


def reconstruct(run: Path, batch) -> torch.Tensor:
    """Encode and decode the objects of a batch with a run's averaged weights: [V, 3, H, W]."""
    encoder, decoder = (
        models.load_pretrained(run / "checkpoints" / part) for part in ("encoder", "decoder")
    )
    voxels = models.SparseTensor(batch.features, batch.coords, batch.batch_size)
    white = torch.ones(len(batch.image), 3)
    with torch.no_grad():
        scenes = decoder(encoder(voxels).mode())
        return models.render(scenes, batch.camera, batch.view_scene, white).color


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=Path("decoders.png"))
    parser.add_argument("--objects", type=int, default=5, help="of the training split")
    parser.add_argument("--view", type=int, default=2, help="which held-out view, from 0")
    parser.add_argument("--unseen", type=int, default=3, help="of the other split")
    args = parser.parse_args()
    configs = [json.loads((run / "config.json").read_text()) for run in args.runs]
    first = configs[0]
    for run, config in zip(args.runs, configs, strict=True):
        for key in ("data", "features", "resolution", "image_size", "holdout_views"):
            if config[key] != first[key]:
                parser.error(f"{run}: {key} is {config[key]}, in {args.runs[0]} {first[key]}")
    common = {key: first[key] for key in ("resolution", "features", "image_size", "holdout_views")}
    roots = first["data"] or [EMBEDDED]
    everything = Dataset(roots, split=None, views="holdout", **common)
    seen = set(Dataset(roots, **common).names)
    names = [name for name in everything.names if name in seen][: args.objects]
    unseen = [name for name in everything.names if name not in seen][: args.unseen]
    batch = collate([everything.item(name, [args.view]) for name in names + unseen])
    rows = {"truth": composite(batch.image, torch.ones(len(batch.image), 3))}
    for run, config in zip(args.runs, configs, strict=True):
        rows[ROWS[config["script"]]] = reconstruct(run, batch)
    captions = [everything.title(name) for name in names]
    captions += [everything.title(name) + "\n(unseen)" for name in unseen]
    picture(rows, captions, "views that no run has trained on", args.out)


if __name__ == "__main__":
    main()
