"""Tables and a figure of counted work, for notebooks: what binds a kernel, ours beside peers'.

A file of counts is {meta, rows}. A row is one pass of an op by one implementation: op, N or G (rows
or Gaussians), passe ("fwd", "bwd", "dx", "dw"), target, who ("trislat", "trislat COMMIT" at an
earlier one, "trislat variant" with tiles that were tried, or a peer), config (of tiles), bound_us,
copy_us (of rows gathered and scattered, which a peer needs beside its kernels), bottleneck, instr_M
(millions of warp instructions), tensor_GF, dram_MB, registers, spilled, occupancy. Every time is a
bound of counted work, not a measurement.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

OURS = "trislat"
OTHERS = "trislat "  # ours at an earlier commit, or with other tiles


def read(file: Path | str) -> dict:
    """Read a file of counts; ValueError, which names it, for another."""
    counted = json.loads(Path(file).read_text())
    if not {"meta", "rows"} <= set(counted):
        raise ValueError(f"{file} is no file of counts: it has no meta and rows")
    return counted


def case(row: dict) -> tuple:
    """Return what is computed: op, size, pass and target."""
    return row["op"], row.get("N", row.get("G", 0)), row["passe"], row["target"]


def time(row: dict) -> float:
    """Return the bound in us of all that an implementation does, its copies too."""
    return row["bound_us"] + row.get("copy_us", 0.0)


def pairs(counted: dict) -> Iterator[tuple[dict, dict]]:
    """Yield our row of every case with the best peer's, in order."""
    best: dict = {}
    for row in counted["rows"]:
        if row["who"].startswith(OTHERS):
            continue
        found = best.setdefault(case(row), {})
        side = "ours" if row["who"] == OURS else "peer"
        if side not in found or time(row) < time(found[side]):
            found[side] = row
    for _, found in sorted(best.items()):
        if len(found) == 2:
            yield found["ours"], found["peer"]


def ahead(counted: dict, target: str) -> str:
    """Write a line for every case of a target: both bounds, what binds, and how far ours is."""
    lines = []
    for ours, peer in pairs(counted):
        op, size, which, where = case(ours)
        if where != target:
            continue
        lines.append(
            f"{op:<22} {size:>7} {which:<4} {time(ours):>9.1f} us {ours['bottleneck']:<8}"
            f"{time(peer):>9.1f} us {peer['bottleneck']:<8}"
            f"{time(peer) / time(ours):>6.2f} x  {peer['who']}"
        )
    return "\n".join(lines)


def progress(counted: dict) -> str:
    """Write a line for every case that was counted before and after a change."""
    now = {case(row): row for row in counted["rows"] if row["who"] == OURS}
    lines = []
    for row in counted["rows"]:
        op, size, which, where = case(row)
        after = now.get((op, size, which, where))
        if after is None or not row["who"].startswith(OTHERS) or "variant" in row["who"]:
            continue
        lines.append(
            f"{op:<22} {size:>7} {which:<4} {where:<7}{row['bound_us']:>9.1f} -> "
            f"{after['bound_us']:>7.1f} us {100 * after['bound_us'] / row['bound_us']:>5.0f} %  "
            f"{row['instr_M']:>7.2f} -> {after['instr_M']:>6.2f} M instructions  "
            f"{row['registers']} -> {after['registers']} registers"
        )
    return "\n".join(lines)


def tiles(counted: dict, target: str, size: int, which: str) -> str:
    """Write the tiles that were counted for the convolution, best bound first."""
    found = [
        row
        for row in counted["rows"]
        if row["op"].startswith("conv") and case(row)[1:] == (size, which, target)
    ]
    lines = []
    for row in sorted(found, key=lambda row: row["bound_us"]):
        occupied = f"{100 * row['occupancy']:.0f} %" if "occupancy" in row else "?"
        lines.append(
            f"{row['bound_us']:>8.1f} us {row['bottleneck']:<7} {row['tensor_GF']:>6.1f} GFLOP "
            f"{row['instr_M']:>6.1f} M instructions {row['registers']:>4} registers "
            f"{occupied:>4} occupied  {row['who']} {row.get('config', '')}"
        )
    return "\n".join(lines)


def advantage(counted: dict, target: str) -> Figure:
    """Draw the best peer's bound over ours, a bar for every case; right of 1 ours is ahead."""
    found = [(case(ours), ours, peer) for ours, peer in pairs(counted)]
    found = [row for row in found if row[0][3] == target]
    figure = Figure(figsize=(7, 0.3 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [f"{op} {size} {which}" for (op, size, which, _), _, _ in found]
    axes.barh(names, [time(peer) / time(ours) for _, ours, peer in found])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(f"best peer's bound / ours, {target} (a bound of counted work)")
    return figure


def beside(counted: list[dict], measured: list[dict]) -> str:
    """Write measured times of kernels beside their bounds: rows of two commands' JSON.

    `counted` comes from tests.emulator, `measured` from kernels.profile; a kernel is known by its
    name and pass, and launches of one are added up.
    """
    bounds: dict = {}
    for row in counted:
        key = row["kernel"], row["pass"]
        bounds[key] = bounds.get(key, 0.0) + row["bound_us"]
    lines = []
    for row in measured:
        bound = bounds.get((row["kernel"], row["pass"]))
        told = f"{bound:>9.1f} us, {100 * bound / row['us']:.0f} %" if bound else "not counted"
        lines.append(f"{row['kernel']:<28} {row['pass']:<8} {row['us']:>9.1f} us   bound {told}")
    return "\n".join(lines)
