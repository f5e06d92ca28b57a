"""Tables of the build report: one line a launch and target, or one line a kernel.

A cell shows one value where the versions of Triton agree and "first / second" where they do not, in
the order of the heading.
"""

import textwrap

COLUMNS = {
    "regs": "registers",
    "stack B": "stack",
    "spills": "spills",
    "shared B": "shared",
    "of limit": "shared_limit",
    "warps": "warps",
    "blocks/unit": "blocks_per_unit",
    "mma": "tensor_core",
    "async": "async_copies",
    "s": "seconds",
}
MEANING = """\
Built on a machine without a GPU: these are facts about machine code, not measurements of speed.

- regs: 32-bit registers of a thread (vector registers on AMD); stack, spills: bytes of local memory
  of a thread, and instructions that touch it (on AMD: registers spilled)
- shared B: of a block, and what that is of the most a block may have: {limits}
- blocks/unit: how many blocks a multiprocessor (compute unit) holds at once, by registers, shared
  memory and warps
- mma, async: tensor-core instructions and asynchronous copies in the machine code
- s: seconds of the compilation, on a busy machine
- hot in the last column: a training step spends its time there, and a spill is a failure"""


def describe(row: dict) -> str:
    """Write a row's kernel, type and constants in short."""
    options = ("num_warps", "num_stages", "enable_fp_fusion")
    constants = [f"{name}={value}" for name, value in row["constants"] if name not in options]
    return f"{row['kernel']} {row['dtype']} ({', '.join(constants)})"


def _key(row: dict) -> tuple:
    return (
        row["module"],
        row["kernel"],
        row["dtype"],
        str(row["constants"]),
        str(row["types"]),
        str(row["ones"]),
        row["target"],
    )


def _cell(values: list) -> str:
    """One value of each version, once where all agree."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells).replace("\n", " ") + " |"


def _counts(report: dict) -> str:
    failed = [row for row in report["rows"] if "failure" in row]
    kernels = len({(row["module"], row["kernel"]) for row in report["rows"]})
    return f"{kernels} kernels, {len(report['rows'])} builds, {len(failed)} failures"


def meaning(limits: dict[str, int]) -> str:
    """Explain the columns of `full_table`; limits: bytes of shared memory a block may have."""
    return MEANING.format(limits=", ".join(f"{name} {limits[name]}" for name in sorted(limits)))


def full_table(reports: list[dict]) -> str:
    """Make a Markdown table with a line for every launch and target, all versions in it."""
    found = [{_key(row): row for row in report["rows"]} for report in reports]
    lines = [_line(["kernel", "target", *COLUMNS, ""]), "|" + "---|" * (len(COLUMNS) + 3)]
    for key in sorted(set().union(*found)):
        rows = [rows[key] for rows in found if key in rows]
        cells = [describe(rows[0]), rows[0]["target"]]
        cells += [_cell([row.get(name, "-") for row in rows]) for name in COLUMNS.values()]
        failures = [
            f"triton {report['triton']}: {rows[key]['failure']}"
            for report, rows in zip(reports, found, strict=True)
            if "failure" in rows.get(key, {})
        ]
        cells.append("; ".join(failures) or ("hot" if rows[0]["hot"] else ""))
        lines.append(_line(cells))
    return "\n".join(lines)


def _worst(parts: list[list[dict]], column: str) -> str:
    """The largest value of a column and the target where it is, in each report that has one."""
    values = []
    targets = []
    for rows in parts:
        built = [row for row in rows if column in row]
        if built:
            row = max(built, key=lambda row: row[column])
            values.append(row[column])
            targets.append(row["target"])
    if not values:
        return "-"
    if not any(values):
        return "0"
    if len(set(targets)) == 1:
        return f"{_cell(values)} {targets[0]}"
    pairs = zip(values, targets, strict=True)
    return " / ".join(f"{value} {target}" if value else "0" for value, target in pairs)


def _failures(rows: list[dict]) -> str:
    failed = [row["target"] for row in rows if "failure" in row]
    return f"{len(failed)}: {', '.join(sorted(set(failed)))}" if failed else "0"


def _kernel_line(parts: list[list[dict]]) -> list[str]:
    """Cells of one kernel, from its rows in each report."""
    nvidia = [[row for row in rows if row["target"].startswith("sm_")] for rows in parts]
    amd = [[row for row in rows if row["target"].startswith("gfx")] for rows in parts]
    return [
        _cell([len(rows) for rows in parts]),
        _worst(nvidia, "registers"),
        _worst(amd, "registers"),
        _worst(parts, "spills"),
        _worst(nvidia, "shared"),
        _worst(amd, "shared"),
        _cell([_failures(rows) for rows in parts]),
    ]


def summary(reports: list[dict], limits: dict[str, int]) -> str:
    """Make a Markdown file with one line a kernel: the worst over targets, types and constants.

    reports: {triton, commit, date, rows} of each version; limits: bytes of shared memory that a
    block may have, by target.
    """
    used = sorted({row["target"] for report in reports for row in report["rows"]})
    types = sorted({row["dtype"] for report in reports for row in report["rows"]} - {"int"})
    most = ", ".join(f"{name} {limits[name]}" for name in used)
    built = [
        f"Triton {report['triton']}, commit {report['commit']}, {report['date']}: {_counts(report)}"
        for report in reports
    ]
    head = ["kernel", "builds", "registers, NVIDIA", "registers, AMD", "spills"]
    head += ["shared B, NVIDIA", "shared B, AMD", "failures"]
    about = (
        "Facts about machine code, no measurements of speed: the worst of each kernel over "
        f"{', '.join(used)} and {', '.join(types)}, and the target where it is. Bytes of shared "
        f"memory that a block may have: {most}. A failure is more than that, or in a hot kernel "
        f"a spill or 16-bit products without tensor cores. {'. '.join(built)}."
    )
    lines = [
        f"# Kernels built for absent GPUs, Triton {' and '.join(r['triton'] for r in reports)}",
        "",
        *textwrap.wrap(about, 110, break_on_hyphens=False),
        "",
        _line(head),
        "|" + "---|" * len(head),
    ]
    kernels = {(row["module"], row["kernel"]) for report in reports for row in report["rows"]}
    for module, kernel in sorted(kernels):
        parts = [
            [row for row in report["rows"] if (row["module"], row["kernel"]) == (module, kernel)]
            for report in reports
        ]
        name = f"{module.removeprefix('kernels.')} `{kernel}`"
        lines.append(_line([name, *_kernel_line(parts)]))
    return "\n".join(lines) + "\n"
