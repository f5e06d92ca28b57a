"""Notebooks are committed without outputs and run from top to bottom; figures are right."""

import json
import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from kernels.bench import counts, plots
from kernels.bench.case import OURS
from kernels.bench.ops import OPS
from kernels.bench.shells import occupied
from tests.helpers.hardware import GPU

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEASURING = NOTEBOOKS[:3]
LEARNING = NOTEBOOKS[5:]
# the last line of a cell that shows a picture
DRAWS = re.compile(r"(\w+\.)?(throughput|fractions|hits_and_misses|advantage|show|Image)\(")
CPU = torch.device("cpu")


def cells(file: Path) -> list[dict]:
    return [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert [file.name for file in NOTEBOOKS] == [
        "1_attention.ipynb",
        "2_spatial_cache.ipynb",
        "3_profile.ipynb",
        "4_renderers.ipynb",
        "5_vaes.ipynb",
        "6_learning.ipynb",
    ]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_committed_without_outputs(file):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(file))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
# those of Jupyter's own packages
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_runs_from_top_to_bottom(file):
    """An error in a cell raises. Every figure that is promised is there as a picture."""
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    seconds = 1800 if GPU else 120  # a cell; a GPU measures larger sizes and compiles baselines
    client = NotebookClient(
        notebook, timeout=seconds, resources={"metadata": {"path": str(file.parent)}}
    )
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        drawn = any("image/png" in output.get("data", {}) for output in cell.outputs)
        assert drawn == bool(DRAWS.match(cell.source.splitlines()[-1])), cell.source
    text = "".join(
        output.text for cell in code for output in cell.outputs if output.output_type == "stream"
    )
    if file in LEARNING:
        kept = json.loads((ROOT / "notebooks" / "results" / "learning.json").read_text())["runs"]
        assert all(f"\n{name} " in text for name in kept) and len(kept) >= 8
        return
    if file not in MEASURING:
        gained = re.findall(r"PSNR (\S+) -> (\S+) dB", text)
        assert all(float(after) > float(before) + 5 for before, after in gained)
        reached = [float(own) for own in re.findall(r"PSNR (\S+) dB \(", text)]
        assert len(gained) == 3 or len(reached) == 9 and min(reached) > 10
        return
    assert "as committed: " in text and "disagrees" not in text
    assert GPU or "failed" not in text  # what needs a GPU is absent, which is no failure
    committed = plots.read(ROOT / "notebooks" / "results").values()
    timed = any(row["median_us"] for found in committed for row in found["cases"])
    assert ("No figure of a GPU" in text) == (not GPU and not timed)


def result(**changes) -> dict:
    row = dict(
        op="sort",
        size="",
        dtype="fp32",
        bytes=0,
        flops=0,
        agrees=True,
        spread_us=1.0,
        floor_us=5.0,
        fraction=0.5,
    )
    times = [(OURS, 10.0), ("other", 20.0)]
    cases = [
        row
        | {
            "pass": "forward",
            "size": f"a set, N = {n}",
            "impl": impl,
            "median_us": us * n / 100,
            "floor_us": n / 20,
        }
        for impl, us in times
        for n in (400, 100)
    ]
    cases.append(cases[0] | {"impl": "wrong", "median_us": None, "fraction": None, "agrees": False})
    facts = dict(
        device="a card", driver="1", torch="2", triton="3", commit="4", date="5", ceilings={}
    )
    missing = [dict(op="sort", size="", dtype="fp32", impl="wrong", why="disagrees")] * 2
    return facts | {"cases": cases, "missing": missing} | changes


def test_results_are_read_and_described(tmp_path):
    assert plots.read(tmp_path) == {} and "No figure of a GPU" in plots.describe(
        {"now": result(driver="none")}
    )
    (tmp_path / "a-card.json").write_text(json.dumps(result()))
    results = plots.read(tmp_path)
    assert (
        plots.describe(results)
        == "a-card: device a card, date 5, commit 4, torch 2, triton 3, driver 1"
    )
    assert plots.missing(results) == "a-card: wrong: disagrees"
    (tmp_path / "other.json").write_text('{"device": "x", "cases": []}')
    with pytest.raises(
        ValueError,
        match="other.json is not a result of kernels.bench: it has no ceilings, commit, date, "
        "driver",
    ):
        plots.read(tmp_path)


def test_a_record_of_tests_alone_is_described_and_drawn_nowhere():
    record = plots.read(ROOT / "notebooks" / "results")["nvidia-h200_2026-11-29"]
    assert record["cases"] == record["missing"] == [] and record["ceilings"] == {}
    results = {"now": result(driver="none"), "record": record}
    lines = plots.describe(results).splitlines()
    assert lines[1].startswith("record: device NVIDIA H200") and lines[1].endswith(
        "(no op was timed)"
    )
    assert lines[2].startswith("No figure of a GPU") and not lines[0].endswith(")")
    assert (
        len(plots.throughput(results, "sort").axes)
        == len(plots.fractions(results, ["sort"]).axes)
        == 1
    )
    assert len(plots.hits_and_misses(results, ["sort"]).axes) == 1


COUNTED = dict(op="sort", N=8, passe="fwd", target="sm_90", bottleneck="int", tensor_GF=0.0)
COUNTED |= dict(instr_M=1.0, registers=32, occupancy=0.5, bound_us=4.0, who="trislat")


def test_counts_are_read_and_compared(tmp_path):
    """Of every case the best peer is shown, its copies included; ours at other times is none."""
    others = [("slow", 9.0), ("fast", 6.0), ("trislat variant", 1.0), ("trislat 1234567", 8.0)]
    rows = [COUNTED, *(COUNTED | {"who": who, "bound_us": us} for who, us in others)]
    rows.append(COUNTED | {"who": "copies", "bound_us": 3.0, "copy_us": 5.0})
    (tmp_path / "counted.json").write_text(json.dumps({"meta": {}, "rows": rows}))
    assert plots.read(tmp_path) == {}
    found = counts.read(tmp_path / "counted.json")
    (line,) = counts.ahead(found, "sm_90").splitlines()
    assert "4.0 us" in line and "6.0 us" in line and line.endswith("1.50 x  fast")
    assert counts.ahead(found, "sm_80") == ""
    (line,) = counts.progress(found).splitlines()
    assert "8.0 ->     4.0 us    50 %" in line
    (bar,) = counts.advantage(found, "sm_90").axes[0].patches
    assert bar.get_width() == 1.5
    kernel = dict(kernel="_sort", bound_us=2.0) | {"pass": "forward"}
    text = counts.beside([kernel, kernel], [kernel | {"us": 8.0}, kernel | {"us": 1, "pass": "x"}])
    assert "4.0 us, 50 %" in text and "not counted" in text
    (tmp_path / "counted.json").write_text("{}")
    with pytest.raises(ValueError, match="counted.json is no file of counts"):
        counts.read(tmp_path / "counted.json")


def test_throughput_is_rows_over_time_in_order_of_rows():
    figure = plots.throughput({"one": result(), "two": result(driver="none")}, "sort")
    assert len(figure.axes) == 2
    ours, floor, other = figure.axes[0].lines
    # 100 rows in 10 us
    assert list(ours.get_xdata()) == [100, 400] and list(ours.get_ydata()) == [10, 10]
    assert list(floor.get_ydata()) == [20, 20] and list(other.get_ydata()) == [5, 5]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["100", "400"]
    assert plots.value({"op": "a", "size": "rows = 8, N = 64"}, "N") == 64
    with pytest.raises(ValueError, match="the size 'N = 8' of a has no 'window = '"):
        plots.value({"op": "a", "size": "N = 8"}, "window")
    with pytest.raises(ValueError, match="none of the results has a time to draw"):
        plots.throughput({"one": result()}, "splat")


def test_fractions_and_hits():
    (axes,) = plots.fractions({"one": result()}, ["sort"]).axes
    ours, other = axes.collections
    assert ours.get_offsets().tolist() == [[50, 0], [50, 1]] and other.get_label() == "other"
    hit = result()["cases"][0] | {"op": "cache_hit", "size": "windows", "median_us": 0.25}
    (axes,) = plots.hits_and_misses({"one": result(cases=[*result()["cases"], hit])}, ["sort"]).axes
    misses, line = axes.lines
    assert list(misses.get_ydata()) == [10, 40] and list(line.get_ydata()) == [0.25, 0.25]
    assert plt.get_fignums() == []  # figures belong to whoever asked for them


def test_windows_of_a_given_occupancy():
    xyz = occupied(5, 7, 4)
    assert len(set(map(tuple, xyz.tolist()))) == 35 and xyz.tolist() == sorted(xyz.tolist())
    windows, counts = (xyz // 4).unique(dim=0, return_counts=True)
    assert len(windows) == 5 and counts.tolist() == [7] * 5
    with pytest.raises(ValueError, match=r"9 rows do not fit a window of 2\^3 = 8 voxels"):
        occupied(1, 9, 2)


def test_a_sweep_holds_all_else_equal():
    """Rows decide the bytes; flops are 4 channels x rows of a window, for each row."""
    found = OPS["attention_occupancy"]("small", ["fp32"], CPU)
    for n, case in zip((8, 32, 128, 512), found, strict=True):
        assert case.size == f"rows = {n}, N = 2048"
        assert (
            case.forward[0].bytes == 2048 * (4 * 64 * 4 + 2 * 4)
            and case.forward[0].flops == 4 * 64 * 2048 * n
        )
