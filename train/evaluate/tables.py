"""The tables of an evaluation: means by split and renderer, a line an object, the worst objects."""

import csv
import math
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.files import write_whole
from train.evaluate.measure import OURS, Record, Values
from train.run import report

WORST = 10  # objects that are drawn
SHOWN = 256  # pixels of a picture there, at most
NAMES = {  # of measures in the table, where their own names say too little
    "psnr": "PSNR dB",
    "psnr_inside": "inside",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "normal_psnr": "PSNR-N dB",
    "normal_lpips": "LPIPS-N",
    "empty": "no surface",
}

Summary = dict[str, dict[str, Values]]  # by split, then by renderer


def summary(records: Sequence[Record]) -> Summary:
    """Average each measure over the objects of a split that have it.

    "objects" counts the objects of a row. Values that are nan count in no mean.
    """
    found: Summary = {}
    for split in sorted({record.split for record in records}):
        own = [record for record in records if record.split == split]
        found[split] = {}
        for row in dict.fromkeys(row for record in own for row in record.scores):
            values = [record.scores[row] for record in own if row in record.scores]
            names = dict.fromkeys(name for one in values for name in one)
            means = {name: _mean([one.get(name) for one in values]) for name in names}
            found[split][row] = {"objects": len(values)} | means
    return found


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def table(found: Summary) -> str:
    """Format the means, a block a split and a line a renderer."""
    lines = []
    for split, rows in found.items():
        measures = list(dict.fromkeys(name for row in rows.values() for name in row))
        measures.remove("objects")
        if not any(row.get("empty") for row in rows.values()):
            measures = [name for name in measures if name != "empty"]
        width = max(map(len, rows)) + 1
        head = "".join(f"{NAMES.get(name, name):>13}" for name in measures)
        objects = rows[OURS]["objects"]
        lines += [f"{split} objects: {objects}", " " * width + head]
        for name, row in rows.items():
            cells = "".join(f"{_cell(measure, row.get(measure)):>13}" for measure in measures)
            count = "" if row["objects"] == objects else f"  ({row['objects']} objects)"
            lines.append(f"{name:<{width}}{cells}{count}")
    return "\n".join(lines)


def _cell(measure: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    if "psnr" in measure:
        return f"{value:.2f}"
    return f"{value:.3e}" if measure in ("cd", "cd2", "md") else f"{value:.4f}"


def write_objects(records: Sequence[Record], file: Path) -> None:
    """Write a CSV with a line an object and renderer."""
    measures = dict.fromkeys(n for record in records for v in record.scores.values() for n in v)
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sha256", "object", "split", "renderer", *measures])
    for record in records:
        for row, values in record.scores.items():
            cells = [values.get(name, "") for name in measures]
            writer.writerow([record.name, record.title, record.split, row, *cells])
    write_whole(file, text.getvalue())


def worst(records: Sequence[Record]) -> list[Record]:
    """The objects with the checkpoint's lowest first measure, the worst first."""
    return sorted(records, key=_first)[:WORST]


def _first(record: Record) -> tuple[float, str]:
    value = next(iter(record.scores[OURS].values()))
    return (-math.inf if math.isnan(value) else value), record.name


def draw_worst(
    records: Sequence[Record],
    shown: Callable[[str, int], tuple[Tensor, Tensor]],
    title: str,
    file: Path,
) -> None:
    """Draw the worst view of the worst objects, the truth above ours; `shown` draws both."""
    chosen = worst(records)
    pairs = [shown(record.name, record.worst) for record in chosen]
    true, ours = (torch.stack(pictures) for pictures in zip(*pairs, strict=True))
    size = min(SHOWN, true.shape[-1])
    shrink = lambda pictures: F.interpolate(
        pictures.clamp(0, 1), (size, size), mode="bilinear", antialias=True
    )
    name = next(iter(chosen[0].scores[OURS]))
    captions = [f"{record.title}\n{_cell(name, record.scores[OURS][name])} dB" for record in chosen]
    report.picture({"truth": shrink(true), "ours": shrink(ours)}, captions, title, file)
