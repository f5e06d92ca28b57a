"""Other attention kernels get our rows, segments and blocks, and agree with ours."""

import sys
import types

import pytest
import torch

from kernels.attention.reference import segment_attention_reference
from kernels.bench import attention as bench_attention
from kernels.bench import measure
from kernels.bench.attention import WindowLayout, attention_case
from kernels.bench.case import Case, inductor
from kernels.bench.measure import Roofline, Timer, difference
from kernels.bench.shells import batch, shell
from kernels.voxels.window import window_partition

CPU = torch.device("cpu")
FAST = Timer(CPU, seconds=0.0, least=2)
H100 = Roofline(3.0e12, {"fp16": 798e12, "fp32": 50e12})


def _segments(q, k, v, starts, _, longest):
    assert int(starts.diff().max()) == longest and int(starts.diff().min()) > 0
    return segment_attention_reference(q, k, v, starts, starts)


def varlen_stand_in(q, k, v, starts, k_starts, longest, k_longest):
    return _segments(q, k, v, starts, k_starts, longest)


def attention() -> Case:
    return attention_case(
        "window_attention",
        "sphere",
        "fp32",
        batch(shell("sphere", 16), shell("blobs", 16)),
        2,
        16,
        CPU,
    )


def test_attention_baselines_agree(monkeypatch):
    """Gathers, scatters, padding and block lists are right; kernels have stand-ins on a CPU."""
    absent = {impl: why for impl, why in attention().baselines.items() if isinstance(why, str)}
    assert (
        absent["torch varlen_attn, rows gathered before"]
        == "absent: torch's varlen_attn needs a GPU"
    )
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_stand_in)
    monkeypatch.setattr(bench_attention, "_varlen", lambda device: bench_attention.flash)
    fake = types.SimpleNamespace(flash_attn_varlen_func=varlen_stand_in)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    case = attention()
    rows, missing = measure.measure(case, FAST, H100)
    assert [row["impl"] for row in missing] == ["FlexAttention, block mask, rows gathered before"]
    assert len(rows) == 2 * 6 and all(row["agrees"] and row["median_us"] for row in rows)


@pytest.mark.parametrize(
    "compile",
    [lambda f: f, pytest.param(inductor, marks=pytest.mark.slow)],
    ids=["eager", "compiled"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_with_the_block_list_agrees(compile):
    coords = batch(shell("sphere", 16), shell("blobs", 16))
    windows = window_partition(coords, 2, 8, 0)
    layout = WindowLayout(windows.order, windows.lengths)
    case = attention()
    flex = layout.flex(compile)
    qkv = case.inputs(0)[0].detach()  # on a CPU FlexAttention has no backward pass
    assert difference([flex.restore(flex.run(*flex.prepare(qkv)))], [case.reference(qkv)]) < 1e-5


@pytest.mark.parametrize("block", [128, 16])
def test_the_block_list_holds_what_is_needed_and_no_more(block):
    """Uncompiled FlexAttention evaluates the mask alone, so the list is checked by itself."""
    coords = batch(shell("sphere", 16), shell("blobs", 16))
    windows = window_partition(coords, 2, 8, 0)
    layout = WindowLayout(windows.order, windows.lengths)
    pad = -len(coords) % block
    segment = torch.nn.functional.pad(layout.segment, (0, pad), value=-1)
    same = (segment[:, None] == segment) & (segment >= 0)
    needed = same.view(len(segment) // block, block, -1, block).any(3).any(1)
    assert torch.equal(layout.block_mask(block).to_dense()[0, 0].bool(), needed)
    assert block == 128 or 0 < needed.float().mean() < 0.5
