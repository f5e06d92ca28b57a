"""The measurements: their statistics, work, agreement, schema, peers, and the GPU's clock with a
stand-in.
"""

import json
import sys
import types

import pytest
import torch

from kernels.attention.reference import segment_attention_reference
from kernels.bench import attention as bench_attention
from kernels.bench import command as bench
from kernels.bench import measure
from kernels.bench.attention import Layout, _squares, attention_case, attention_work
from kernels.bench.case import INTERPRETED, NAIVE, OURS, Case, Impl, Work
from kernels.bench.gaussian import gaussians, splat_cases
from kernels.bench.measure import Ceilings, Clock, difference, spread
from kernels.bench.mesh import conv_work, parents_read
from kernels.bench.norm import eager_gelu
from kernels.bench.peers import inductor, optional
from kernels.bench.radiance import raymarch_work
from kernels.bench.shapes import batch, shell
from kernels.voxels.cache import SpatialCache
from kernels.voxels.hash import neighbours
from kernels.voxels.window import window_partition
from tests.helpers import fake_peers as stand_ins
from tests.helpers.hardware import GPU
from tests.helpers.square import square
from train.bench import block_work

CPU = torch.device("cpu")
LARGE = (
    "neighbours",
    "lookup",
    "build_table",
    "window_partition",
    "cache_hit",
    "isosurface",
    "render_mesh",
)
FAST = Clock(CPU, seconds=0.0, least=2)
H100 = Ceilings(3.0e12, {"fp16": 798e12, "fp32": 50e12})
WINDOWS = {
    "sphere": (17792, 272, 290, 138), "noisy sphere": (13362, 210, 207, 145),
    "rough sphere": (21441, 283, 267, 245),
           "blobs": (47452, 402, 440, 272), "small sphere": (6920, 128, 98, 121)}  # fmt: skip


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


@pytest.mark.parametrize("name", WINDOWS)
def test_shells_have_the_window_statistics_of_surfaces(name):
    coords = batch(shell(name))
    N, plain, shifted, most = WINDOWS[name]
    lengths = [window_partition(coords, 1, 8, shift).lengths for shift in (0, 4)]
    assert len(coords) == N
    assert [int((n > 0).sum()) for n in lengths] == [plain, shifted]
    assert max(int(n.max()) for n in lengths) == most


def test_bytes_and_flops_of_the_other_decoders_by_hand():
    # 10 voxels of 2 floats, 3 pixels of 5; again with gradients
    assert raymarch_work(10, 2, 3) == (Work(4 * (20 + 15)), Work(4 * (40 + 30)))
    # 3 rows of 4 channels to 5 rows of 2, 7 pairs; 27 taps of weights; fp16
    forward, backward = conv_work((3, 5), 7, 4, 2, 2)
    assert forward == Work(2 * (12 + 10 + 216), 2 * 7 * 4 * 2) and backward == Work(
        2 * (24 + 10 + 432), 4 * 7 * 4 * 2
    )
    # two voxels side by side: of 16 children, the 8 at the shared face read both parents, the
    # others their own
    children = SpatialCache(
        torch.tensor([[0, 4, 4, 4], [0, 5, 4, 4]], dtype=torch.int32)
    ).subdivide()
    assert parents_read(children.get(neighbours, 3)) == 8 * 2 + 8


def test_an_unknown_shell_is_refused():
    with pytest.raises(ValueError, match="'cube' is not one of sphere"):
        shell("cube")


def test_bytes_and_flops_of_attention_by_hand():
    # windows of 1 and 3 rows; 16 channels
    forward, backward = attention_work(N=4, squares=10, H=2, D=8, width=2)
    assert forward.bytes == 3 * 4 * 16 * 2 + 4 * 16 * 2 + 2 * 4 * 4  # qkv, out, fp32 log-sum-exp
    # qkv, out, dout, lse -> dqkv
    assert backward.bytes == 3 * 4 * 16 * 2 + 2 * 4 * 16 * 2 + 2 * 4 * 4 + 3 * 4 * 16 * 2
    # two products, five
    assert forward.flops == 2 * 2 * 16 * 10 and backward.flops == 5 * 2 * 16 * 10


def test_floors_of_the_published_size():
    coords = batch(shell("sphere"))
    squares = _squares(window_partition(coords, 1, 8, 0))
    forward, backward = attention_work(len(coords), squares, 12, 64, 2)
    # memory: the products would take 6.3
    assert H100.floor_us([forward], "fp16") == pytest.approx(36.7, abs=0.1)
    assert H100.floor_us([backward], "fp16") == pytest.approx(73.2, abs=0.1)
    stages, reverse = block_work(13362, 0, 12, 64, 2)
    products = 1e6 * 24 * 13362 * 768**2 / 798e12  # 237 us, and 16 N C elements of memory: 55 us
    memory = 1e6 * (16 * 13362 * 768 + 4 * 12 * 13362) / 3.0e12
    assert (
        H100.floor_us(stages, "fp16")
        == pytest.approx(products + memory, rel=1e-6)
        == pytest.approx(292, abs=1)
    )
    assert sum(w.flops for w in reverse) == pytest.approx(2 * sum(w.flops for w in stages))


def test_a_floor_is_the_larger_of_memory_and_products_stage_by_stage():
    ceilings = Ceilings(1e6, {"fp32": 2e6})
    assert ceilings.floor_us([Work(10, 2)], "fp32") == pytest.approx(10)
    assert ceilings.floor_us([Work(10, 2), Work(0, 40)], "fp32") == pytest.approx(30)


def test_a_wrong_implementation_is_caught_and_not_timed():
    late = torch.tensor([1.0, 1.0, 1.001])
    peers = {
        "right": Impl(lambda x: x.pow(2)),
        "wrong": Impl(lambda x: x * x * late),
        "wrong gradient": Impl(lambda x: x.detach() * x),
    }
    rows, missing = measure.measure(square(peers=peers), FAST, H100)
    verdicts = {(row["impl"], row["pass"]): row["agrees"] for row in rows}
    assert verdicts == {
        (name, which): name[:5] != "wrong"
        for name in (OURS, NAIVE, *peers)
        for which in ("forward", "backward")
    }
    assert all((row["median_us"] is None) == (row["impl"][:5] == "wrong") for row in rows)
    assert [row["impl"] for row in missing] == ["wrong", "wrong gradient"]
    assert (
        missing[0]["why"]
        == "disagrees with trislat by 1.00e-03 of the largest value, allowed 1.00e-04"
    )


def test_when_ours_is_wrong_nothing_is_timed():
    rows, _ = measure.measure(
        square(ours=lambda x: x * x + 1, peers={"other": Impl(lambda x: x * x)}), FAST, H100
    )
    assert {row["agrees"] for row in rows} == {False} and {row["median_us"] for row in rows} == {
        None
    }


def test_absent_and_failing_peers_are_named():
    def broken(x):
        raise NotImplementedError("no such kernel")

    rows, missing = measure.measure(
        square(peers={"gone": "absent: x", "broken": Impl(broken)}), FAST, H100
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
        measure.measure(square(peers={"stop": Impl(stop)}), FAST, H100)


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
    call = measure._backward_call(case, Impl(case.ours), [case.inputs(0), case.inputs(1)])
    for i in range(3):
        seen.append(float(call(i)[0].abs().max()))
    assert seen[0] == seen[2] == 0 and seen[1] > 0


class Device:
    """What Clock uses of torch.cuda, with a clock that advances by what is launched."""

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
    clock = Clock(types.SimpleNamespace(type="cuda"), seconds=0.1, cuda=device)

    def call(i):
        device.now += 1 + i % 2  # milliseconds

    samples = clock.time(call)
    assert set(samples) == {1000.0, 2000.0} and len(samples) % 20 == 0
    assert (
        sum(samples) >= 1e5
        and device.slept == len(samples) // 20
        and device.waits == 1 + 2 * device.slept
    )


def test_the_command_writes_the_schema(tmp_path, capsys):
    assert (
        bench.main(
            [
                "layer_norm",
                "cache_hit",
                "--device",
                "cpu",
                "--seconds",
                "0",
                "--json",
                str(tmp_path),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "the torch path is measured against the naive reference" in out and "gsplat absent" in out
    )
    (file,) = tmp_path.iterdir()
    assert file.name == file.name.lower() == bench.file_name(bench.device_name(CPU))
    result = json.loads(file.read_text())
    keys = "device driver torch triton python commit date ceilings cases missing"
    assert list(result) == keys.split()
    assert result["torch"] == torch.__version__ and result["ceilings"]["copy_bytes_per_s"] > 1e6
    assert all(list(row) == bench.COLUMNS for row in result["cases"])
    assert {(r["op"], r["pass"]) for r in result["cases"]} == {
        ("layer_norm", "forward"),
        ("layer_norm", "backward"),
        ("cache_hit", "forward"),
    }
    ours = result["cases"][0]
    assert (
        ours["impl"] == OURS and ours["agrees"] is True and ours["bytes"] == 4496 * (2 * 64 + 0) * 4
    )
    assert ours["fraction"] == pytest.approx(ours["floor_us"] / ours["median_us"])


def test_an_unknown_op_is_an_error_that_lists_the_known(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["sort"])
    assert "unknown sort; known are window_attention, segment_attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "/no/such/x.json"], "argument --json: there is no folder /no/such for x.json"),
        (["--seconds", "-1"], "--seconds -1.0 must be finite and at least 0"),
        (["--seconds", "nan"], "--seconds nan must be"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_before_anything_is_measured(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="2"):
        bench.main(["gelu", *arguments])
    assert message in capsys.readouterr().err


def test_a_disagreement_is_the_exit_status(monkeypatch):
    monkeypatch.setattr(bench, "cases", lambda *_: [square(peers={"wrong": Impl(lambda x: x)})])
    assert bench.main(["gelu", "--device", "cpu", "--seconds", "0"]) == 1


@pytest.mark.parametrize("op", [op for op in bench.OPS if op not in ("splat", "train_step")])
def test_every_op_has_cases_of_both_sizes(op):
    for size in ("small", "base"):
        if op in LARGE and size == "base":
            continue  # seconds of voxelising or extracting at 256^3
        case = next(iter(bench.cases(op, size, ["fp32"], CPU)))
        assert case.op == op and case.forward and case.size


def test_a_training_step_is_timed(monkeypatch):
    stand_ins.install(monkeypatch, gsplat=stand_ins.GSPLAT)
    (case,) = bench.cases("train_step", "small", ["fp32"], CPU)
    rows, missing = measure.measure(case, FAST, H100)
    composed = "published composition, padded attention, {} a view at a time"
    others = [composed.format(rasterizer) for rasterizer in ("our splat", "gsplat")]
    assert [row["impl"] for row in rows] == [OURS, *others]
    for row in rows:
        assert (
            row["pass"] == "step"
            and row["median_us"] > row["floor_us"] > 0
            and row["agrees"] is True
        )
    assert not missing


def test_a_transformer_is_timed_on_the_device_and_on_its_host():
    found = [
        measure.measure(case, FAST, H100) for case in bench.cases("trunk", "small", ["fp32"], CPU)
    ]
    (device,), (host,) = (rows for rows, _ in found)
    assert (
        device["median_us"] > device["floor_us"] > 0
        and device["pass"] == host["pass"] == "both passes"
    )
    assert (
        host["size"] == device["size"] + ", host"
        and host["median_us"] > 0
        and host["floor_us"] == 0
    )


def test_errors_against_float64(capsys):
    assert bench.main(["add_layer_norm", "--errors", "--device", "cpu", "--dtype", "fp32"]) == 0
    rows = [
        line.split(" | ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| add_layer_norm")
    ]
    assert [row[3] for row in rows] == [OURS, *[INTERPRETED] * (not GPU), NAIVE, "torch, eager"]
    assert all(1e-9 < float(value.strip(" |")) < 1e-6 for row in rows for value in row[4:6])


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


def test_attention_peers_agree(monkeypatch):
    """Every path around a peer's kernel: gathers, scatters, padding, block lists; the kernels stood
    in for on a CPU.
    """
    told = {impl: why for impl, why in attention().peers.items() if isinstance(why, str)}
    assert (
        told["torch varlen_attn, rows gathered before"] == "absent: torch's varlen_attn needs a GPU"
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
    layout = Layout(windows.order, windows.lengths)
    case = attention()
    flex = layout.flex(compile)
    qkv = case.inputs(0)[0].detach()  # on a CPU FlexAttention has no backward pass
    assert difference([flex.restore(flex.run(*flex.prepare(qkv)))], [case.reference(qkv)]) < 1e-5


@pytest.mark.parametrize("block", [128, 16])
def test_the_block_list_holds_what_is_needed_and_no_more(block):
    """Uncompiled FlexAttention evaluates the mask alone, so the list is checked by itself."""
    coords = batch(shell("sphere", 16), shell("blobs", 16))
    windows = window_partition(coords, 2, 8, 0)
    layout = Layout(windows.order, windows.lengths)
    pad = -len(coords) % block
    segment = torch.nn.functional.pad(layout.segment, (0, pad), value=-1)
    same = (segment[:, None] == segment) & (segment >= 0)
    needed = same.view(len(segment) // block, block, -1, block).any(3).any(1)
    assert torch.equal(layout.block_mask(block).to_dense()[0, 0].bool(), needed)
    assert block == 128 or 0 < needed.float().mean() < 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_peer_is_differentiated_again_and_again():
    x = torch.randn(64, 32, requires_grad=True)
    call = measure._backward_call(square(), Impl(inductor(eager_gelu)), [(x,)])
    assert torch.equal(call(0)[0], call(1)[0])


def test_the_published_number_of_gaussians():
    G = len(gaussians("base", 0)[0])
    assert G == 32 * 13362 == 427584
    (case,) = splat_cases("small", ["fp32"], CPU)
    assert case.forward[0].bytes == 14 * 4 * 1216 + 4 * 4 * 64 * 64


def test_results_of_other_ops_stay_in_the_file(tmp_path):
    """Several commands make one file, unless something that numbers depend on has changed."""
    path = tmp_path / "cpu.json"
    same = {"device": "cpu", "driver": "none", "torch": "2", "triton": "3", "commit": "abc"}
    result = lambda op, **more: (
        same | more | {"cases": [{"op": op, "n": more.get("n")}], "missing": [{"op": op}]}
    )
    assert bench.kept(result("gelu"), path, ["gelu"]) == result("gelu")
    path.write_text(json.dumps(result("gelu") | {"cases": [{"op": "gelu"}, {"op": "ssim"}]}))
    assert [row["op"] for row in bench.kept(result("gelu", n=2), path, ["gelu"])["cases"]] == [
        "ssim",
        "gelu",
    ]
    assert bench.kept(result("gelu", commit="abd"), path, ["gelu"]) == result("gelu", commit="abd")
