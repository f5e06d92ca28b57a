"""The emulator: instructions against torch, whole kernels, and checks that must fail where a kernel
is wrong. Hand-written PTX runs everywhere that has g++, Triton's kernels with `--emulate`.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from tests import emulator
from tests.emulator import Options, PtxError
from tests.emulator import __main__ as command
from tests.emulator.model import bound
from tests.helpers import tutorial_kernels as kernels
from tests.helpers.hardware import EMULATED

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ compiles the emulator")
WIDTH = {2: ("b16", "%h"), 4: ("b32", "%r"), 8: ("b64", "%d")}
ODD = torch.tensor(
    [0.0, -0.0, 1, -1, 0.5, 1.5, 2.5, -2.5, 65504, 65519.99, 65520, 1e-8, 6e-8, 3e-8, 5.9e-5, 1e30]
    + [-1e30, torch.inf, -torch.inf, torch.nan, 2049, 2051, 1 + 2**-11, 1 + 3 * 2**-11, 3e9, -3e9]
    + [2147483647, 0.49999997, 448, 500, 0.001, 240.0]
)


def module(body: str, params: int = 1, threads: int = 32) -> emulator.Program:
    names = ", ".join(f".param .u64 k_param_{i}" for i in range(params))
    return emulator.decode(f""".version 8.8
        .extern .shared .align 16 .b8 global_smem[];
        .visible .entry k({names})
        .reqntid {threads}
        {{ .reg .pred %p<20>; .reg .b16 %h<40>; .reg .b32 %r<200>; .reg .b64 %d<60>;
        mov.u32 %r0, %tid.x; {body} ret; }}""")


def execute(body: str, *tensors: torch.Tensor, threads: int = 32, shared: int = 0):
    values = {str(i): t for i, t in enumerate(tensors)}
    program = module(body, len(tensors), threads)
    return emulator.run(program, (1,), values, shared=shared)


def lanes(code: str, *inputs: torch.Tensor, out: torch.dtype) -> torch.Tensor:
    """`code` works on $1, $2, ... (registers of the inputs, one element a lane), and leaves $0."""
    text, result = "", torch.empty(32, dtype=out)
    for i, tensor in enumerate((result, *inputs)):
        kind, letter = WIDTH[tensor.element_size()]
        code = code.replace(f"${i}", f"{letter}{30 + i}")
        text += f"ld.param.b64 %d{i}, [k_param_{i}];"
        text += f"mad.wide.u32 %d{i}, %r0, {tensor.element_size()}, %d{i};"
        if i:
            text += f"ld.global.{kind} {letter}{30 + i}, [%d{i}];"
    kind, letter = WIDTH[result.element_size()]
    execute(f"{text}\n{code}\nst.global.{kind} [%d0], {letter}30;", result, *inputs)
    return result


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(torch.nan_to_num(a.double(), 123.0), torch.nan_to_num(b.double(), 123.0))


def broken(match: str):
    return pytest.raises(PtxError, match=match)


def integers() -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (32,), dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrowing_rounds_to_nearest_even(dtype):
    kind = "f16" if dtype == torch.float16 else "bf16"
    same(lanes(f"cvt.rn.{kind}.f32 $0, $1;", ODD, out=dtype), ODD.to(dtype))
    packed = lanes(f"cvt.rn.{kind}x2.f32 $0, $1, $2;", ODD, -ODD, out=torch.int32)
    same(packed.view(dtype).view(32, 2), torch.stack([-ODD, ODD], 1).to(dtype))
    same(lanes(f"cvt.f32.{kind} $0, $1;", ODD.to(dtype), out=torch.float32), ODD.to(dtype).float())


def test_narrowing_rounds_as_it_is_told():
    half = ODD.half().float()
    near = [torch.nextafter(ODD.half(), torch.tensor(x).half()).float() for x in (0.0, -1e9, 1e9)]
    low = torch.where(half > ODD, near[1], half)
    high = torch.where(half < ODD, near[2], half)
    zero = torch.where(ODD > 0, low, torch.where(ODD < 0, high, half))
    for mode, want in (("rz", zero), ("rm", low), ("rp", high)):
        same(lanes(f"cvt.{mode}.f16.f32 $0, $1;", ODD, out=torch.float16), want)


@pytest.mark.parametrize(
    ("mode", "f"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_float_to_integer_rounds_and_saturates(mode, f):
    rounded = f(ODD.double().numpy())
    want = np.clip(np.nan_to_num(rounded, nan=0, posinf=1e99, neginf=-1e99), -(2**31), 2**31 - 1)
    same(lanes(f"cvt.{mode}.s32.f32 $0, $1;", ODD, out=torch.int32), torch.tensor(want))


def test_bits():
    a, b, c = integers(), integers(), integers()
    u = [x.numpy().view(np.uint32).astype(np.uint64) for x in (a, b, c)]
    for code, want in {
        "lop3.b32 $0, $1, $2, $3, 0xCA;": (u[0] & u[1]) | (~u[0] & u[2]),
        "shf.l.wrap.b32 $0, $1, $2, 7;": u[1] << np.uint64(7) | u[0] >> np.uint64(25),
        "bfe.u32 $0, $1, 5, 11;": u[0] >> np.uint64(5) & np.uint64(0x7FF),
        "mul.hi.u32 $0, $1, $2;": u[0] * u[1] >> np.uint64(32),
        "mad.lo.s32 $0, $1, $2, $3;": u[0] * u[1] + u[2],
        "shr.u32 $0, $1, 40;": u[0] * np.uint64(0),
    }.items():
        wrapped = (want & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
        same(lanes(code, a, b, c, out=torch.int32), torch.tensor(wrapped))
    same(lanes("prmt.b32 $0, $1, $2, 0xBBBB;", a, b, out=torch.int32), a >> 31)


def test_shuffles():
    x, i = integers(), torch.arange(32)
    same(lanes("shfl.sync.bfly.b32 $0, $1, 5, 31, -1;", x, out=torch.int32), x[i ^ 5])
    up = x[torch.where(i < 3, i, i - 3)]
    same(lanes("shfl.sync.up.b32 $0, $1, 3, 0, -1;", x, out=torch.int32), up)
    same(lanes("shfl.sync.idx.b32 $0, $1, 1, 0x181f, -1;", x, out=torch.int32), x[i // 8 * 8 + 1])
    same(lanes("redux.sync.max.s32 $0, $1, -1;", x, out=torch.int32), x.max().expand(32))


def test_divergence():
    """Lanes of a loop leave it at different times, and meet again."""
    x = torch.randint(0, 40, (32,), dtype=torch.int32)
    loop = """mov.b32 $0, 0; mov.b32 %r50, 0;
    $L1: setp.ge.s32 %p1, %r50, $1; @%p1 bra $L2; add.s32 %r50, %r50, 1; and.b32 %r51, %r50, 1;
    setp.eq.b32 %p2, %r51, 0; @%p2 bra $L3; add.s32 $0, $0, %r50; bra.uni $L1;
    $L3: sub.s32 $0, $0, 1; bra.uni $L1;
    $L2: shfl.sync.bfly.b32 $0, $0, 1, 31, -1;"""
    alone = [sum(k if k % 2 else -1 for k in range(1, n + 1)) for n in x.tolist()]
    same(lanes(loop, x, out=torch.int32), torch.tensor(alone)[torch.arange(32) ^ 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_fragments(dtype):
    """The layouts of the PTX manual, element by element."""
    A, B, C = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    group, t = torch.arange(32) // 4, torch.arange(32) % 4
    row = lambda i: group + 8 * (i // 2 % 2)
    column = lambda i: t * 2 + i % 2 + 8 * (i // 4)
    a = torch.stack([A[row(i), column(i)] for i in range(8)], 1).contiguous()
    b = torch.stack([B[t * 2 + i % 2 + 8 * (i // 2), group] for i in range(4)], 1).contiguous()
    place = lambda i: (group + 8 * (i // 2), t * 2 + i % 2)
    c = torch.stack([C[place(i)] for i in range(4)], 1).contiguous()
    kind = "f16" if dtype == torch.float16 else "bf16"
    text = "".join(f"ld.param.b64 %d{i}, [k_param_{i}];" for i in range(3))
    execute(
        text
        + f"""mad.wide.u32 %d0, %r0, 16, %d0; mad.wide.u32 %d1, %r0, 8, %d1;
        mad.wide.u32 %d2, %r0, 16, %d2; ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d0];
        ld.global.v2.b32 {{%r5, %r6}}, [%d1]; ld.global.v4.b32 {{%r7, %r8, %r9, %r10}}, [%d2];
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
            {{%r7,%r8,%r9,%r10}}, {{%r1,%r2,%r3,%r4}}, {{%r5,%r6}}, {{%r7,%r8,%r9,%r10}};
        st.global.v4.b32 [%d2], {{%r7, %r8, %r9, %r10}};""",
        a,
        b,
        c,
    )
    D = torch.zeros(16, 8)
    for i in range(4):
        D[place(i)] = c[:, i]
    torch.testing.assert_close(D, A.float() @ B.float() + C, rtol=1e-5, atol=1e-5)


COPIES = """ld.param.b64 %d0, [k_param_0]; ld.param.b64 %d1, [k_param_1];
    mad.wide.u32 %d2, %r0, 4, %d0; mad.wide.u32 %d1, %r0, 4, %d1; mov.b32 %r1, global_smem;
    mad.lo.s32 %r1, %r0, 4, %r1;
    cp.async.ca.shared.global [%r1+0], [%d2+0], 0x4; cp.async.commit_group;
    cp.async.ca.shared.global [%r1+128], [%d2+128], 0x4; cp.async.commit_group;
    cp.async.wait_group {n}; bar.sync 0; ld.shared.b32 %r3, [%r1+128];
    cp.async.wait_group 0; st.global.b32 [%d1], %r3;"""


def test_a_copy_lands_when_it_is_waited_for():
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    execute(COPIES.format(n=0), x, out, shared=256)
    assert torch.equal(out, x[32:])
    with broken("not waited for"):
        execute(COPIES.format(n=1), x, out, shared=256)


def test_an_unknown_instruction_is_named():
    with pytest.raises(emulator.PtxUnsupported, match="line 6: .*frobnicate"):
        module("frobnicate.b32 %r1, %r0;")


def test_a_deadlock_ends():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra $L; bar.sync 1, 64; ret; $L: bar.sync 2, 64;"
    with broken("deadlock"):
        execute(body, torch.zeros(1), threads=64)


@pytest.mark.parametrize(("stride", "units"), [(4, 4), (8, 8), (32, 32), (128, 32), (0, 1)])
def test_sectors(stride, units):
    text = f"ld.param.b64 %d1, [k_param_0]; mad.wide.u32 %d2, %r0, {stride}, %d1;"
    report = execute(text + "ld.global.b32 %r2, [%d2];", torch.zeros(1024))
    assert report.units.sum() == units and report.ideal.sum() == (4 if stride else 1)


@pytest.mark.parametrize(
    ("stride", "width", "waves"),
    [(4, 1, 1), (8, 1, 2), (128, 1, 32), (132, 1, 1), (0, 1, 1), (16, 4, 4), (32, 4, 8), (8, 2, 2)],
)
def test_bank_conflicts(stride, width, waves):
    registers = f"{{{', '.join('%r0' for _ in range(width))}}}"
    vector = f".v{width}" if width > 1 else ""
    body = f"mov.b32 %r2, global_smem; mad.lo.s32 %r3, %r0, {stride}, %r2;"
    report = execute(f"{body} st.shared{vector}.b32 [%r3], {registers};", shared=8192)
    assert report.units.sum() == waves


# ---- Triton's kernels


@pytest.fixture
def emulated():
    if not EMULATED:
        pytest.skip("Triton interprets in this process: run with --emulate sm_90")


def launch(kernel, grid, *args, edit=None, options=None, **constants):
    """`edit` changes the PTX of the kernel."""
    program = None
    if edit:
        _, compiled, _ = emulator.prepare(kernel, args, EMULATED, constants)
        program = emulator.decode(edit(compiled.asm["ptx"]))
    chosen = dict(target=EMULATED, program=program, options=options)
    return emulator.launch(kernel, grid, *args, **chosen, **constants)


def without(pattern: str, which: int):
    def edit(text: str) -> str:
        found = list(re.finditer(pattern, text))[which]
        return text[: found.start()] + text[found.end() :]

    return edit


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.float16, "tf32", 2e-3),
        (torch.bfloat16, "tf32", 1.6e-2),
        (torch.float32, "tf32", 3e-3),
        (torch.float32, "ieee", 1e-5),
    ],
)
def test_matmul(emulated, dtype, precision, tolerance):
    M, N, K = 130, 80, 144
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    c = torch.empty(M, N, dtype=dtype)
    tiles = dict(PRECISION=precision, ROWS=64, COLUMNS=64, STEP=32)
    report = launch(kernels.matmul, (3, 2), a, b, c, M, N, K, **tiles)
    want = a.double() @ b.double()
    assert (c - want).abs().max() < tolerance * want.abs().max()
    wide = any(ins.name.startswith("wgmma") for ins in report.program.code)
    assert wide == (EMULATED == "sm_90" and precision != "ieee"), "which tensor cores"


def test_counts_and_bound(emulated):
    a, b, c = (
        torch.randn(128, 128).half(),
        torch.randn(128, 128).half(),
        torch.empty(128, 128).half(),
    )
    tiles = dict(PRECISION="tf32", ROWS=64, COLUMNS=64, STEP=32)
    row = bound(launch(kernels.matmul, (2, 2), a, b, c, 128, 128, 128, **tiles), "h100")
    assert row["tensor_flops"] == 2 * 128**3 and row["bytes"] == 3 * 128 * 128 * 2
    assert row["sectors"] == row["sectors_ideal"] and row["spilled"] == 0
    assert 0 < row["bound_us"] < 10 and row["bottleneck"] in row["times_us"]
    assert row["blocks"] >= 1 and 0 < row["full"] <= 1 and row["registers"] >= 32


def test_the_command_counts_both_passes(emulated, tmp_path, capsys):
    command.main(["layer_norm", "--gpu", "rtx4090", "--json", str(tmp_path / "counts.json")])
    found = json.loads((tmp_path / "counts.json").read_text())
    assert {row["pass"] for row in found["rows"]} == {"forward", "backward"}
    assert found["what"] == "a bound of counted work, not a measurement"
    assert found["what"] in capsys.readouterr().out


@pytest.mark.parametrize("seed", [None, 1])
def test_sums_scans_sorts_and_atomics(emulated, seed):
    options = Options(seed=seed)
    x = torch.randn(16, 64)
    outs = [torch.empty(16, 64) for _ in range(3)]
    launch(kernels.orders, (1,), x, *outs, R=16, C=64, options=options)
    assert torch.equal(outs[0], x.sort(1).values) and torch.equal(outs[2], x.T.reshape(16, 64))
    torch.testing.assert_close(outs[1], x.cumsum(1), rtol=1e-5, atol=1e-5)
    y, out = torch.randn(5, 781), torch.empty(5, 781)
    launch(kernels.softmax, (5,), y, out, 781, BLOCK=1024, options=options)
    torch.testing.assert_close(out, y.softmax(1), rtol=1e-5, atol=1e-7)
    n = torch.randint(0, 64, (3000,), dtype=torch.int32)
    bins = torch.zeros(64, dtype=torch.int32)
    launch(kernels.histogram, (12,), n, bins, 3000, BLOCK=256, options=options)
    assert torch.equal(bins, torch.bincount(n, minlength=64).int())


def test_out_of_bounds_misaligned_uninitialised(emulated):
    x, y, out = torch.randn(1001), torch.randn(1000), torch.empty(1000)
    with broken(r"out of bounds at `@%p\d+ ld.global.*byte 4000 of 4000 bytes of y \[1000\]"):
        launch(kernels.add, (1,), x, y, out, 1001, BLOCK=1024)
    report = launch(kernels.add, (1,), x, y, out, 1000, BLOCK=1024)
    assert torch.equal(out, x[:1000] + y) and (report.read_bytes, report.written_bytes) == (
        8000,
        4000,
    )
    with broken("uninitialised read at `@%p1 ld.global"):
        poisoned = Options(uninitialised=[y])
        launch(kernels.add, (1,), x, y, out, 1000, BLOCK=1024, options=poisoned)
    # built for 16-byte loads, given another place
    wide, _, _ = emulator.prepare(kernels.add, (x, y, out, 1024), EMULATED, {"BLOCK": 1024})
    with broken("misaligned"):
        emulator.run(wide, (1,), {"x": x[1:], "y": y, "out": out, "n": 1000}, 4)


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_barrier(emulated, which):
    x, out = torch.randn(5, 781), torch.empty(5, 781)
    with broken("race: (read after write|write after read|write after write)"):
        edit = without(r"bar\.sync\s+0;", which)
        launch(kernels.softmax, (5,), x, out, 781, BLOCK=1024, edit=edit)


def test_a_missing_wait(emulated):
    a, b, c = torch.randn(64, 128).half(), torch.randn(128, 64).half(), torch.empty(64, 64).half()
    tiles = dict(PRECISION="tf32", ROWS=64, COLUMNS=64, STEP=32)
    edit = lambda text: re.sub(r"cp\.async\.wait_group\s+\d;", "", text)
    with broken("not waited for"):
        launch(kernels.matmul, (1, 1), a, b, c, 64, 64, 128, edit=edit, **tiles)


def test_programs_that_share_an_address(emulated):
    number = lambda n=1: torch.zeros(n, dtype=torch.int32)
    with broken("write after write"):
        launch(kernels.everyone_writes, (4,), number(), DIFFERENT=True)
    report = launch(kernels.everyone_writes, (4,), number(), DIFFERENT=False)
    assert [p.kind for p in report.problems] == ["race: the same value written twice"]
    for seed in (None, 0, 1):
        with broken("race: (read after write|write after read)"):
            launch(kernels.read_neighbour, (4,), number(4), number(4), options=Options(seed=seed))


def test_warps_and_lanes_that_share_an_address(emulated):
    with broken("race: read after write"):
        launch(kernels.read_other_warps, (1,), torch.zeros(256), torch.empty(256), BLOCK=256)
    out, twice = torch.zeros(32, dtype=torch.int32), torch.arange(32, dtype=torch.int32) // 2
    with broken("two lanes"):
        launch(kernels.scatter, (1,), out, twice, BLOCK=32, num_warps=1)
    launch(kernels.scatter, (1,), out, torch.randperm(32).int(), BLOCK=32, num_warps=1)


def test_a_wait_for_nobody_ends(emulated):
    with broken("budget"):
        options = Options(budget=100_000)
        launch(kernels.spin, (1,), torch.zeros(1, dtype=torch.int32), options=options)
