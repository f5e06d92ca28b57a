"""Figures of benchmark results, for notebooks.

`read` takes files, `kernels.bench.command.run` gives the same dict from the device that is here; a
figure has a row of axes for every result. A result whose `cases` hold no time, such as a record of
tests alone, is described and drawn nowhere. Nothing draws by itself: figures are returned.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kernels.bench.case import OURS

KEYS = {"device", "driver", "torch", "triton", "commit", "date", "ceilings", "cases", "missing"}
LEGEND = 3  # inches beside the axes
# of files beside them: counts (kernels.bench.counts), and trainings (notebooks/6_learning.ipynb)
OTHERS = {"rows", "runs"}
Results = dict[str, dict]


def read(folder: Path | str) -> Results:
    """Read every *.json of a folder, by name.

    Raises ValueError, which names the file and its missing parts, for what is no result.
    """
    results = {}
    for file in sorted(Path(folder).glob("*.json")):
        result = json.loads(file.read_text())
        if result.keys() & OTHERS:
            continue
        if lacking := KEYS - set(result):
            raise ValueError(
                f"{file} is not a result of kernels.bench: it has no {', '.join(sorted(lacking))}"
            )
        results[file.stem] = result
    return results


def describe(results: Results) -> str:
    """Write what was measured where, and whether any of it is a GPU's."""
    named = ("device", "date", "commit", "torch", "triton", "driver")
    lines = []
    measured = {name: any(row["median_us"] for row in r["cases"]) for name, r in results.items()}
    for name, result in results.items():
        facts = ", ".join(f"{key} {result[key]}" for key in named)
        lines.append(f"{name}: {facts}" + ("" if measured[name] else " (no op was timed)"))
    if all(result["driver"] == "none" for name, result in results.items() if measured[name]):
        lines.append(
            "No figure of a GPU is among these: they are a CPU's, of the torch path, and say "
            "nothing about the kernels."
        )
    return "\n".join(lines)


def missing(results: Results) -> str:
    """List what was not measured and why, each reason once."""
    reasons = [
        f"{name}: {row['impl']}: {row['why']}"
        for name, result in results.items()
        for row in result["missing"]
    ]
    return "\n".join(dict.fromkeys(reasons))


def value(row: dict, name: str) -> int:
    """Find the number after `name = ` in a case's size; ValueError where there is none."""
    found = re.search(rf"\b{name} = (\d+)", row["size"])
    if found is None:
        raise ValueError(f"the size {row['size']!r} of {row['op']} has no '{name} = '")
    return int(found[1])


def rows(result: dict, op: str, without: str | None = None) -> list[dict]:
    """Select the rows of one op that have a time, but those whose size contains `without`."""
    wanted = lambda row: (
        row["op"] == op and row["median_us"] and (without is None or without not in row["size"])
    )
    return [row for row in result["cases"] if wanted(row)]


def _lines(found: Iterable[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Group rows by implementation, ours first, and by type."""
    key = lambda row: (row["impl"] != OURS, row["impl"], row["dtype"])
    for (_, impl, dtype), group in groupby(sorted(found, key=key), key):
        yield f"{impl}, {dtype}", list(group)


def _grid(
    results: dict, columns: int, width: float, heights: list[float]
) -> tuple[Figure, list[list[Axes]]]:
    """Make a row of axes for each result; ValueError where there is nothing to draw."""
    if not results or not columns:
        raise ValueError("none of the results has a time to draw")
    figure = Figure(figsize=(width * columns + LEGEND, sum(heights)), layout="constrained")
    axes = figure.subplots(len(results), columns, squeeze=False, height_ratios=heights)
    return figure, axes.tolist()


def _style(impl: str) -> dict:
    if impl.startswith(f"{OURS},"):
        return dict(color="black", linewidth=2.5, zorder=3)
    return dict(linewidth=1.2)


def throughput(results: Results, op: str, along: str = "N", without: str | None = None) -> Figure:
    """Plot million rows a second of every implementation against `along`; higher is better.

    There is a column for each pass. Cases whose size contains `without` are left out. The dashed
    line is the floor, the bound by the roofline measured in the same run.
    """
    tables = {
        name: found for name, result in results.items() if (found := rows(result, op, without))
    }
    passes = list(dict.fromkeys(row["pass"] for table in tables.values() for row in table))
    figure, axes = _grid(tables, len(passes), 4.5, [3.2] * len(tables))
    for (name, table), line in zip(tables.items(), axes, strict=True):
        for which, ax in zip(passes, line, strict=True):
            found = [row for row in table if row["pass"] == which]
            for impl, group in _lines(found):
                group.sort(key=lambda row: value(row, along))
                x = [value(row, along) for row in group]
                rate = [value(row, "N") / row["median_us"] for row in group]
                ax.plot(x, rate, "o-", label=impl, **_style(impl))
                if impl.startswith(f"{OURS},"):
                    at = [
                        (v, value(row, "N") / row["floor_us"])
                        for v, row in zip(x, group, strict=True)
                        if row["floor_us"]
                    ]
                    ax.plot(
                        *zip(*at, strict=True),
                        "k--",
                        linewidth=1,
                        label=f"floor, {group[0]['dtype']}",
                    )
            ax.set(xscale="log", yscale="log", xlabel=along, title=f"{op} {which}\n{name}")
            ticks = sorted({value(row, along) for row in found})
            ax.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
            ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            ax.grid(alpha=0.3)
        line[0].set_ylabel("million rows a second")
        line[-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def fractions(results: Results, ops: Iterable[str]) -> Figure:
    """Plot the share of the floor's speed that each implementation reaches, a line for each case.

    100 % cannot be passed from memory.
    """
    ops = list(ops)
    tables = {
        name: [row for op in ops for row in rows(result, op) if row["fraction"]]
        for name, result in results.items()
    }
    tables = {name: table for name, table in tables.items() if table}
    case = lambda row: f"{row['op']} {row['pass']}, {row['size']}, {row['dtype']}"
    labels = {name: list(dict.fromkeys(map(case, table))) for name, table in tables.items()}
    figure, axes = _grid(tables, 1, 9, [1.2 + 0.22 * len(found) for found in labels.values()])
    impls = list(
        dict.fromkeys([OURS, *(row["impl"] for table in tables.values() for row in table)])
    )
    for (name, table), (ax,) in zip(tables.items(), axes, strict=True):
        for i, impl in enumerate(impls):
            at = [
                (100 * row["fraction"], labels[name].index(case(row)))
                for row in table
                if row["impl"] == impl
            ]
            color = "black" if impl == OURS else f"C{i - 1}"
            if at:
                ax.scatter(
                    *zip(*at, strict=True),
                    s=40 if impl == OURS else 18,
                    color=color,
                    label=impl,
                    zorder=3,
                )
        ax.axvline(100, color="black", linewidth=1, linestyle="--")
        ax.set_yticks(range(len(labels[name])), labels[name], fontsize="x-small")
        ax.set(xscale="log", xlabel="% of the floor's speed", title=name)
        ax.invert_yaxis()
        ax.grid(alpha=0.3)
        ax.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def hits_and_misses(results: Results, ops: Iterable[str], without: str | None = None) -> Figure:
    """Plot the time to make what the spatial cache holds, against N.

    Beside it stands the host's time to find it there.
    """
    ops = list(ops)
    results = {
        name: result
        for name, result in results.items()
        if any(rows(result, op, without) for op in ops)
    }
    figure, axes = _grid(results, 1, 5.5, [3.2] * len(results))
    for (name, result), (ax,) in zip(results.items(), axes, strict=True):
        for op in ops:
            found = [
                (value(row, "N"), row["median_us"])
                for row in rows(result, op, without)
                if row["impl"] == OURS
            ]
            if found:
                ax.plot(*zip(*sorted(found), strict=True), "o-", label=f"a miss: {op}")
        for row in rows(result, "cache_hit"):
            ax.axhline(
                row["median_us"],
                color="black",
                linestyle="--",
                label=f"a hit: {row['median_us']:.2g} us of the host",
            )
        ax.set(xscale="log", yscale="log", xlabel="N", ylabel="microseconds", title=name)
        ax.grid(alpha=0.3)
        ax.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
