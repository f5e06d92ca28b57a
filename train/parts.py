"""A micro-batch as arguments of the objective: whole, or in parts with the same gradients.

Everything random is drawn for the whole micro-batch and then cut, so parts have the same draws, and
their gradients add up to those of the whole but for rounding. Each term of the loss is a mean over
views, voxels or objects (train.losses.objective.MEANS); a part's counts by its share of them.
"""

from collections.abc import Iterator
from itertools import accumulate

import torch

from models import SparseTensor
from models.reading import first_line
from train.config import Config
from train.data.batch import Batch
from train.draws import draw
from train.run.machine import Machine


def sizes(objects: int, parts: int) -> list[int]:
    """Split a number of objects into parts that differ by one at most, the larger ones first.

    There are no more parts than objects.
    """
    parts = min(parts, objects)
    least, larger = divmod(objects, parts)
    return [least + (part < larger) for part in range(parts)]


def arguments(
    config: Config,
    here: Machine,
    step: int,
    micro: int,  # number of the micro-batch in the step
    x: SparseTensor,  # N voxels of the micro-batch
    batch: Batch,
    parts: int,
) -> Iterator[tuple]:
    """Yield the objective's arguments for each part of a micro-batch, on x's device."""
    noise, background = draw(config, here, step, micro, x, batch.view_scene)
    if min(parts, batch.batch_size) == 1:
        yield x, noise, batch, background
        return
    # as the renderer of radiance fields would draw them for all views at once
    offset = torch.rand(
        len(batch.camera), batch.camera.height, batch.camera.width, device=background.device
    )
    starts = [0, *accumulate(x.cache.counts)]
    first = 0
    for size in sizes(batch.batch_size, parts):
        last = first + size
        views = batch.views_of(first, last)
        voxels = slice(starts[first], starts[last])
        part = batch.part(first, last, voxels)
        share = {
            "views": len(part.view_scene) / len(batch.view_scene),
            "voxels": len(part.coords) / max(len(batch.coords), 1),
            "objects": size / batch.batch_size,
        }
        own = SparseTensor(x.feats[voxels], part.coords, size)
        yield own, noise[voxels], part, background[views], offset[views], share
        first = last


def out_of_memory(step: int, parts: int, most: int, error: torch.OutOfMemoryError) -> str:
    """Say where memory ran out: in which step, and in how many parts micro-batches went through."""
    how = (
        f"whole micro-batches of {most} objects"
        if parts == 1
        else f"{parts} parts of {most} objects"
    )
    return f"out of memory in step {step}, of {how}: {first_line(error)}"
