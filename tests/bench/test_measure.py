"""Measuring a case: statistics, the roofline, agreement, and the GPU's timer with a stand-in."""

import types

import pytest
import torch

from kernels.bench import measure
from kernels.bench.case import NAIVE, OURS, Impl, Work, inductor, optional
from kernels.bench.measure import Roofline, Timer, difference, spread
from kernels.bench.norm import eager_gelu
from tests.helpers.square import square

FAST = Timer(torch.device("cpu"), seconds=0.0, least=2)
H100 = Roofline(3.0e12, {"fp16": 798e12, "fp32": 50e12})


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([7.0], (7, 0)),
        ([4.0, 1.0, 3.0, 2.0, 5.0], (3, 2)),
        ([1.0, 1.0, 1.0, 1000.0], (1, 249.75)),
        ([1.0, 2.0], (1.5, 0.5)),
    ],
    ids=str,
)
def test_median_and_interquartile_range(samples, expected):
    assert spread(samples) == pytest.approx(expected)


def test_a_floor_is_the_larger_of_memory_and_products_stage_by_stage():
    roofline = Roofline(1e6, {"fp32": 2e6})
    assert roofline.floor_us([Work(10, 2)], "fp32") == pytest.approx(10)
    assert roofline.floor_us([Work(10, 2), Work(0, 40)], "fp32") == pytest.approx(30)


def test_a_wrong_implementation_is_caught_and_not_timed():
    late = torch.tensor([1.0, 1.0, 1.001])
    baselines = {
        "right": Impl(lambda x: x.pow(2)),
        "wrong": Impl(lambda x: x * x * late),
        "wrong gradient": Impl(lambda x: x.detach() * x),
    }
    rows, missing = measure.measure(square(baselines=baselines), FAST, H100)
    verdicts = {(row["impl"], row["pass"]): row["agrees"] for row in rows}
    assert verdicts == {
        (name, which): name[:5] != "wrong"
        for name in (OURS, NAIVE, *baselines)
        for which in ("forward", "backward")
    }
    assert all((row["median_us"] is None) == (row["impl"][:5] == "wrong") for row in rows)
    assert [row["impl"] for row in missing] == ["wrong", "wrong gradient"]
    why = "disagrees with trislat by 1.00e-03 of the largest value, allowed 1.00e-04"
    assert missing[0]["why"] == why


def test_when_ours_is_wrong_nothing_is_timed():
    case = square(ours=lambda x: x * x + 1, baselines={"other": Impl(lambda x: x * x)})
    rows, _ = measure.measure(case, FAST, H100)
    assert {row["agrees"] for row in rows} == {False}
    assert {row["median_us"] for row in rows} == {None}


def test_absent_and_failing_baselines_are_named():
    def broken(x):
        raise NotImplementedError("no such kernel")

    rows, missing = measure.measure(
        square(baselines={"gone": "absent: x", "broken": Impl(broken)}), FAST, H100
    )
    assert {row["impl"]: row["why"] for row in missing} == {
        "gone": "absent: x",
        "broken": "failed: NotImplementedError: no such kernel",
    }
    assert {row["impl"] for row in rows} == {OURS, NAIVE}
    assert optional("a_package_that_is_not_there").startswith(
        "absent: a_package_that_is_not_there cannot be imported (Module"
    )


def test_an_error_that_nobody_expects_is_not_swallowed():
    def stop(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure.measure(square(baselines={"stop": Impl(stop)}), FAST, H100)


@pytest.mark.parametrize(
    ("actual", "expected", "off"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1], [1], 0),
        ([1], [2], float("inf")),
        ([1.0], [1.0, 2.0], float("inf")),
    ],
    ids=str,
)
def test_difference(actual, expected, off):
    assert difference([torch.tensor(actual)], [torch.tensor(expected)]) == pytest.approx(off)


def test_backward_is_timed_over_rotated_inputs_that_ours_differentiates():
    seen = []
    case = square(
        inputs=lambda seed: (torch.full((3,), float(seed), requires_grad=True),),
        ours=lambda x: x * x,
    )
    call = measure.backward_call(case, Impl(case.ours), [case.inputs(0), case.inputs(1)])
    for i in range(3):
        seen.append(float(call(i)[0].abs().max()))
    assert seen[0] == seen[2] == 0 and seen[1] > 0


class Device:
    """Stands in for torch.cuda, with a clock that advances by what is launched."""

    def __init__(self):
        self.now = 0.0
        self.slept = 0
        self.waits = 0

    def Event(self, enable_timing):
        device = self

        class Event:
            def record(self):
                self.at = device.now

            def elapsed_time(self, other):
                return other.at - self.at

        return Event()

    def synchronize(self, device):
        self.waits += 1

    def _sleep(self, cycles):
        self.slept += 1
        self.now += 1000


def test_the_gpu_clock_counts_calls_and_not_the_wait_before_them():
    device = Device()
    timer = Timer(types.SimpleNamespace(type="cuda"), seconds=0.1, cuda=device)

    def call(i):
        device.now += 1 + i % 2  # milliseconds

    samples = timer.time(call)
    assert set(samples) == {1000.0, 2000.0} and len(samples) % 20 == 0
    assert sum(samples) >= 1e5
    assert device.slept == len(samples) // 20
    assert device.waits == 1 + 2 * device.slept


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_baseline_is_differentiated_again_and_again():
    x = torch.randn(64, 32, requires_grad=True)
    call = measure.backward_call(square(), Impl(inductor(eager_gelu)), [(x,)])
    assert torch.equal(call(0)[0], call(1)[0])
