"""The tables of `python -m kernels.compile`: one line per kernel, specialisation and target, all
versions of Triton in it.

A cell shows one value where the versions agree and "first / second" where they do not, in the order
of the heading.
"""

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

- **regs**: 32-bit registers of a thread (vector registers on AMD); **stack**, **spills**: bytes of
  local memory of a thread, and instructions that touch it (on AMD: registers spilled)
- **shared B**: of a block, and what that is of the most a block may have: {limits}
- **blocks/unit**: how many blocks a multiprocessor (compute unit) holds at once, by registers,
  shared memory and warps
- **mma**, **async**: tensor-core instructions and asynchronous copies in the machine code
- **s**: seconds of the compilation, on a busy machine
- **hot** in the last column: a training step spends its time there, and a spill is a failure"""


def describe(row: dict) -> str:
    """The row's kernel, type and constants in short."""
    constants = ", ".join(
        f"{k}={v}"
        for k, v in row["constants"]
        if k not in ("num_warps", "num_stages", "enable_fp_fusion")
    )
    return f"{row['kernel']} {row['dtype']} ({constants})"


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


def merged(reports: list[dict]) -> str:
    """Markdown table of the reports of several versions on the same launches."""
    found = [{_key(row): row for row in report["rows"]} for report in reports]
    lines = [
        "| kernel | target | " + " | ".join(COLUMNS) + " | |",
        "|" + "---|" * (len(COLUMNS) + 3),
    ]
    for key in sorted(set().union(*found)):
        rows = [rows[key] for rows in found if key in rows]
        cells = [describe(rows[0]), rows[0]["target"]]
        for name in COLUMNS.values():
            values = [str(row.get(name, "-")) for row in rows]
            cells.append(values[0] if len(set(values)) == 1 else " / ".join(values))
        failures = [
            f"triton {r['triton']}: {rows[key]['failure']}"
            for r, rows in zip(reports, found, strict=True)
            if "failure" in rows.get(key, {})
        ]
        cells.append("; ".join(failures) or ("hot" if rows[0]["hot"] else ""))
        lines.append("| " + " | ".join(cells).replace("\n", " ") + " |")
    return "\n".join(lines)


def document(reports: list[dict], limits: dict[str, int]) -> str:
    """The whole file: what the columns mean, failures, the table of each module."""
    versions = " and ".join(report["triton"] for report in reports)
    text = [f"# Kernels built for absent GPUs, Triton {versions}", ""]
    used = sorted({row["target"] for report in reports for row in report["rows"]})
    text += [MEANING.format(limits=", ".join(f"{name} {limits[name]}" for name in used)), ""]
    for report in reports:
        failed = [row for row in report["rows"] if "failure" in row]
        kernels = len({(row["module"], row["kernel"]) for row in report["rows"]})
        seconds = sum(row.get("seconds", 0) for row in report["rows"])
        text.append(
            f"Triton {report['triton']}: {kernels} kernels, {len(report['rows'])} builds, "
            f"{len(failed)} failures, "
            f"{seconds:.0f} s of compilation."
        )
    for module in sorted({row["module"] for report in reports for row in report["rows"]}):
        part = [
            report | {"rows": [row for row in report["rows"] if row["module"] == module]}
            for report in reports
        ]
        text += ["", f"## {module}", "", merged(part)]
    return "\n".join(text) + "\n"
