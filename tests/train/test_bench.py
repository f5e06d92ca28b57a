"""`python -m train.bench`: a block, a transformer and a training step are timed."""

import pytest
import torch

from kernels.bench import measure
from kernels.bench.case import OURS
from kernels.bench.command import main
from kernels.bench.measure import Roofline, Timer
from tests.helpers import fake_peers
from train.bench import OPS, block_work

CPU = torch.device("cpu")
FAST = Timer(CPU, seconds=0.0, least=2)
H100 = Roofline(3.0e12, {"fp16": 798e12, "fp32": 50e12})


def test_work_of_a_block_by_hand():
    # 100 rows of 2 heads of 8 channels in fp16; no window has a second row
    forward, backward = block_work(100, 0, 2, 8, 2)
    # two norms and attention move 8 N C numbers, and N H log-sum-exps
    assert sum(work.bytes for work in forward) == 8 * 100 * 16 * 2 + 4 * 100 * 2
    assert sum(work.flops for work in forward) == 24 * 100 * 16**2
    assert sum(work.flops for work in backward) == 2 * 24 * 100 * 16**2


@pytest.mark.parametrize("op", ["block", "trunk"])
def test_both_sizes_have_cases(op):
    for size in ("small", "base"):
        case = next(iter(OPS[op](size, ["fp32"], CPU)))
        assert case.op == op and case.forward and case.size


def test_the_command_is_that_of_the_kernels_with_ops_of_its_own(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(OPS, "python -m train.bench", ["gelu"])
    printed = capsys.readouterr().err
    assert "usage: python -m train.bench" in printed
    assert "unknown gelu; known are block, trunk, train_step" in printed


def test_a_training_step_is_timed(monkeypatch):
    fake_peers.install(monkeypatch, gsplat=fake_peers.GSPLAT)
    (case,) = OPS["train_step"]("small", ["fp32"], CPU)
    rows, missing = measure.measure(case, FAST, H100)
    composed = "published composition, padded attention, {} a view at a time"
    others = [composed.format(rasterizer) for rasterizer in ("our splat", "gsplat")]
    assert [row["impl"] for row in rows] == [OURS, *others]
    for row in rows:
        assert row["pass"] == "step" and row["agrees"] is True
        assert row["median_us"] > row["floor_us"] > 0
    assert not missing


def test_a_transformer_is_timed_on_the_device_and_on_its_host():
    found = [measure.measure(case, FAST, H100) for case in OPS["trunk"]("small", ["fp32"], CPU)]
    (device,), (host,) = (rows for rows, _ in found)
    assert device["pass"] == host["pass"] == "both passes"
    assert device["median_us"] > device["floor_us"] > 0
    assert host["median_us"] > 0 and host["floor_us"] == 0
    assert host["size"] == device["size"] + ", host"
    assert not any(missing for _, missing in found)
