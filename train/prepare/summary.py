"""The lines that a run of train.prepare ends with."""

import re
from collections import Counter
from statistics import mean, median

from train.prepare.objects import Settings
from train.prepare.sources import Result


def summary(results: list[Result], settings: Settings, seconds: float) -> list[str]:
    """Say in lines what became of the objects, what they cost, and why some are absent."""
    rows = [r.row for r in results if r.row]
    made = [r for r in results if r.made]
    failed = Counter(kind(r) for r in results if r.failure)
    lines = [
        f"{len(rows)} objects ({len(made)} made, {len(rows) - len(made)} there already), "
        f"{len(made) * settings.views} views, {failed.total()} skipped, {seconds:.1f} s -> "
        f"{settings.out}"
    ]
    for R in settings.resolution if rows else ():
        counts = [int(row[f"num_voxels{'' if R == 64 else f'_{R}'}"]) for row in rows]
        lines.append(
            f"voxels at {R}^3: {sum(counts):,}; an object {min(counts):,} to {max(counts):,}, "
            f"median {median(counts):,.0f}"
        )
    if made:
        each = [r.seconds for r in made]
        lines.append(
            f"seconds an object in its process: mean {mean(each):.2f}, median {median(each):.2f}, "
            f"most {max(each):.2f}"
        )
    lines += [f"skipped {count}: {reason}" for reason, count in failed.most_common()]
    return lines


def kind(result: Result) -> str:
    """The reason of a refusal without what differs from file to file: paths, names, numbers."""
    text = result.failure.removeprefix(str(result.source.path)).lstrip(": ")
    text = re.sub(r"'[^']*'", "'...'", text)
    if " as " in text and text.startswith("the same mesh"):
        text = text.split(" as ")[0] + " as another"
    return re.sub(r"\d+(?:[,.]\d+)*", "N", text)
