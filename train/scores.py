"""Scores of reconstructions, beside baselines that learn nothing; sample pictures.

PSNR of views that training never sees, of decoders and of baselines. `conclude` ends a run with
them, `save_samples` draws pictures while it runs.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from einops import rearrange, reduce

import models
from kernels import SH0, Image
from models import GaussianScene, Scene
from models.files import write_whole
from train.data.batch import Batch
from train.data.objects import Objects
from train.losses.pictures import composite, psnr
from train.run import report
from train.trainer import Run

PROTOCOL = (
    "posterior means; every held-out view on black and on white, clamped to [0, 1], against the "
    "ground truth on the same background; PSNR = -10 log10(mean squared error) of each picture, "
    "averaged over pictures; inside: the error over pixels whose true alpha exceeds 0.5"
)
# standard deviations in voxels that the baseline of one Gaussian a voxel chooses from
SIZES = (0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.1)

# the views of one object on black, row for row with batch.image
Renderer = Callable[[Batch], Image]
Decoder = Callable[[Batch], list[Scene]]


@dataclass(frozen=True)
class Score:
    """Mean PSNR in dB over `pictures` (views x 2 backgrounds), full frame and inside the object."""

    full: float
    inside: float
    pictures: int


Scores = Mapping[str, Mapping[str, Score]]  # by renderer, then by group of objects


@torch.no_grad()
def score(render: Renderer, batches: Iterable[Batch]) -> Score:
    """Score the pictures that `render` makes of the views of each batch."""
    full = []
    inside = []
    for batch in batches:
        image = render(batch)
        alpha = batch.image[:, 3:]
        for background in (0.0, 1.0):
            target = composite(batch.image, batch.image.new_full((len(alpha), 3), background))
            got = (image.color + background * (1 - image.alpha)).clamp(0, 1)
            full.append(psnr(got, target))
            inside.append(psnr(got, target, alpha > 0.5))
    psnr_inside = torch.cat(inside)
    psnr_full = torch.cat(full)
    return Score(psnr_full.mean().item(), psnr_inside.nanmean().item(), len(psnr_full))


def scenes_renderer(decode: Decoder) -> Renderer:
    """Make a renderer of the scenes that `decode` gives for a batch."""

    def render(batch: Batch) -> Image:
        black = batch.image.new_zeros(len(batch.image), 3)
        return models.render(decode(batch), batch.camera, batch.view_scene, black)

    return render


def silhouette(objects: Objects) -> Renderer:
    """Make the baseline that fills the true alpha with the object's mean colour.

    The mean is over the object's training views, each pixel weighted by its alpha.
    """
    return lambda batch: fill(batch, objects.views(batch.names[0], "train"))


def fill(batch: Batch, colored: Batch) -> Image:
    """Fill the true alpha of one object's views with its mean colour in other views of it.

    Each pixel of these is weighted by its alpha.
    """
    color, alpha = colored.image.split([3, 1], dim=1)
    total = reduce(color * alpha, "v c h w -> c", "sum")
    mean = total / alpha.sum().clamp(min=1e-6)
    alpha = batch.image[:, 3:]
    return Image(rearrange(mean, "c -> c 1 1") * alpha, alpha)


def voxel_gaussians(resolution: int, size: float) -> Renderer:
    """Make the baseline of one round Gaussian in each voxel, `size` voxels wide and 0.99 opaque.

    Its colour is the mean colour that `rgb` features begin with.
    """

    def decode(batch: Batch) -> list[GaussianScene]:  # of one object
        center = (batch.coords[:, 1:].float() + 0.5) / resolution - 0.5
        one = torch.ones_like(center[:, :1])
        color = (batch.features[:, None, :3] - 0.5) / SH0
        scale = one.expand(-1, 3) * (size / resolution)
        rotation = one * one.new_tensor([1, 0, 0, 0])
        return [GaussianScene(center, scale, rotation, 0.99 * one, color)]

    return scenes_renderer(decode)


def best_size(resolution: int, batches: list[Batch]) -> float:
    """Choose the size of one Gaussian a voxel that shows these views best, in voxels."""
    return max(SIZES, key=lambda size: score(voxel_gaussians(resolution, size), batches).full)


def compare(
    decoders: Mapping[str, Decoder], objects: Objects, resolution: int, rgb: bool
) -> Scores:
    """Score decoders and baselines on the held-out views of both groups of objects.

    The baseline of one Gaussian a voxel needs `rgb` features; its size is the best on the training
    views of a few objects.
    """
    renderers = {name: scenes_renderer(decode) for name, decode in decoders.items()}
    renderers["silhouette"] = silhouette(objects)
    if rgb:
        few = [objects.views(name, "train") for name in objects.groups["held-out views"][:4]]
        size = best_size(resolution, few)
        renderers[f"one Gaussian a voxel ({size} wide)"] = voxel_gaussians(resolution, size)
    groups = {group: names for group, names in objects.groups.items() if names}
    batches = lambda names: (objects.views(name, "holdout") for name in names)
    return {
        row: {group: score(render, batches(names)) for group, names in groups.items()}
        for row, render in renderers.items()
    }


def table(scores: Scores) -> str:
    """Format scores, a line a renderer: PSNR of the full frame, in brackets inside the object."""
    groups = next(iter(scores.values()))
    rows = {"": [f"{group}, {s.pictures} pictures" for group, s in groups.items()]}
    rows |= {
        name: [f"{s.full:.2f} ({s.inside:.2f})" for s in row.values()]
        for name, row in scores.items()
    }
    width = max(map(len, rows))
    lines = [
        name.ljust(width) + "".join(f"{cell:>32}" for cell in cells) for name, cells in rows.items()
    ]
    return "\n".join(["mean PSNR in dB, full frame (inside the object):", *lines])


@torch.no_grad()
def save_samples(run: Run) -> Path:
    """Draw held-out views of a few objects, the true ones above the model's.

    Returns the picture, samples/step_NNNNNNNN.png in the run's folder.
    """
    run.vae.eval()
    batch = run.objects.gallery()
    title = (
        f"train.{run.script}, step {run.done}: views never trained on (unseen: no "
        "view of that object was)"
    )
    file = run.folder / "samples" / f"step_{run.done:08d}.png"
    rows = run.loss.show(run.decode(batch), batch)
    report.picture(rows, run.objects.captions(batch), title, file)
    return file


def conclude(run: Run) -> Scores:
    """Save the trained models, score them beside the baselines, print and write the scores.

    The models go to checkpoints/encoder and checkpoints/decoder as pretrained files, the scores to
    evaluation.json. What is saved and scored are the averaged weights, unless the untrained ones
    still weigh over 5 % in the average.
    """
    run.vae.eval()
    averaged = run.optimizer.initial_weight < 0.05
    with run.optimizer.averaged() if averaged else nullcontext():
        for part, model in run.vae.named_children():
            models.save_pretrained(model, run.folder / "checkpoints" / part)
        untrained = run.untrained().eval()
        first = "before" if run.config.init else "untrained"
        decoders = {"trained": run.decode, first: partial(run.decode, vae=untrained)}
        rgb = run.config.features == "rgb"
        scores = compare(decoders, run.objects, run.config.resolution, rgb)
        surface_scores, surface_table = run.loss.measure(decoders, run.objects)
    weights = "averaged" if averaged else "last"
    content = {
        "step": run.done,
        "weights": weights,
        "protocol": PROTOCOL,
        "psnr": {
            name: {group: report.jsonable(asdict(s)) for group, s in row.items()}
            for name, row in scores.items()
        },
    }
    if surface_scores:
        content["surface"] = {
            name: {group: report.jsonable(s) for group, s in row.items()}
            for name, row in surface_scores.items()
        }
    write_whole(run.folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
    print(table(scores))
    if surface_table:
        print(surface_table)
    print(f"({weights} weights of step {run.done}; pictures and curves in {run.folder})")
    return scores
