"""Shared by all tests: where kernels run, poisoned memory, comparison with a reference, golden
numbers.

On a machine without a GPU every kernel test runs twice, on the vectorised torch path and through
Triton's interpreter; with a GPU it runs there, compiled. Kernels are compiled or interpreted, never
both in one process.
"""

import importlib
import json
import os
from contextlib import nullcontext
from pathlib import Path

# they share the cores, and so do the processes that tests start
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = (
        len(os.sched_getaffinity(0)) // int(workers) if hasattr(os, "sched_getaffinity") else 1
    )
    # before the first import of torch
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import torch  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import numpy  # noqa: E402
import pytest  # noqa: E402
import triton  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from kernels import backend, reduce  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"


def _version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split("+")[0].split(".")[:2])


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        type=int,
        help="random cases of each op (default: 10 of the kernels, 200 of the torch path)",
    )


def pytest_configure(config):
    if not GPU and _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        pytest.exit(
            f"triton {triton.__version__} cannot interpret loops with numpy {numpy.__version__}: "
            "install triton >= 3.7 or numpy < 2.4",
            returncode=2,
        )
    # torch.empty returns NaN (integers: the largest value), so a kernel that leaves part of its
    # output unwritten fails
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws does not depend on the tests before it: one that passes passes again."""
    torch.manual_seed(0)


# for tests of whole models, which the interpreter takes minutes for
SLOW_IF_INTERPRETED = (
    ["triton"] if GPU else ["torch", pytest.param("interpreter", marks=pytest.mark.slow)]
)


@pytest.fixture(params=["triton"] if GPU else ["torch", "interpreter"])
def device(request):
    """The device of a kernel test's tensors, with the implementation under test chosen."""
    with nullcontext() if GPU else backend.use(request.param):
        yield torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def kernel_device():
    """As `device`, kernels only: for tests of properties that the torch path does not have."""
    with nullcontext() if GPU else backend.use("interpreter"):
        yield torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def watched_device():
    """The GPU, or its stand-in where there is none: for tests of what the host waits for. Kernels
    only.
    """
    if GPU:
        yield torch.device("cuda")
        return
    from tests.helpers.standin import standin

    with standin() as device:
        yield device


@pytest.fixture
def few_programs(monkeypatch):
    """In the interpreter an image of `ssim` is one program: each costs half a second, its lanes
    nothing. A GPU has the tiles in use: these it would compile for half a minute.
    """
    if not GPU and backend.target(torch.empty(0)) == "interpreter":
        tiles = {"LANES": 2048, "ROWS": 8, "num_warps": 4}
        monkeypatch.setattr(importlib.import_module("kernels.similarity"), "_tiles", lambda: tiles)


@pytest.fixture
def few_sums(monkeypatch):
    """The interpreter's tiles for sums by key whatever GPU is assumed: theirs take it a minute."""
    if not GPU:
        monkeypatch.setattr(
            reduce, "_tiles", lambda target, tiles=reduce._tiles: tiles("interpreter")
        )


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    tolerance: float,
    what: str = "tensor",
    least: float = 1e-3,
) -> None:
    """max |difference| <= tolerance * max |expected| (at least `least` of it), NaN never equal."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    )
    if expected.numel() == 0:
        return
    difference = (
        (actual.detach().double().cpu() - expected.detach().double().cpu()).abs().max().item()
    )
    limit = tolerance * max(expected.detach().double().abs().max().item(), least)
    assert difference <= limit, f"{what}: differs by {difference:.3e}, allowed {limit:.3e}"


def _tensors(result) -> list[torch.Tensor]:
    return (
        [result]
        if isinstance(result, torch.Tensor)
        else [t for t in result if isinstance(t, torch.Tensor)]
    )


def assert_same(
    op, reference, *args, tolerance: float | None = None, least: float = 1e-3, **kwargs
) -> None:
    """`op` and `reference` agree in every output and in the gradient of every floating-point
    argument that requires one.

    The reference runs in float64 on the CPU. The upstream gradient is random, so no term can
    cancel.
    """

    def prepare(value, exact: bool):
        if not isinstance(value, torch.Tensor):
            return value
        copy = value.detach().clone()
        if exact:
            copy = copy.cpu().double() if copy.is_floating_point() else copy.cpu()
        return copy.requires_grad_(value.requires_grad)

    ours, exact = [prepare(a, False) for a in args], [prepare(a, True) for a in args]
    got = _tensors(op(*ours, **kwargs))
    want = _tensors(reference(*exact, **{k: prepare(v, True) for k, v in kwargs.items()}))
    assert len(got) == len(want), f"{len(got)} outputs instead of {len(want)}"
    dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, limit, f"output {i}", least)
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if b.requires_grad]
    if not pairs:
        return
    upstream = [torch.randn(b.shape, dtype=torch.float64) for _, b in pairs]
    wrt = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]
    grads = torch.autograd.grad(
        [a for a, _ in pairs],
        [ours[i] for i in wrt],
        [g.to(a) for g, (a, _) in zip(upstream, pairs, strict=True)],
    )
    exact_grads = torch.autograd.grad([b for _, b in pairs], [exact[i] for i in wrt], upstream)
    for i, a, b in zip(wrt, grads, exact_grads, strict=True):
        assert_close(a, b, limit, f"gradient of argument {i}", least)


def golden(case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """One case of tests/golden: its description and its tensors, numbers of the published
    implementation.
    """
    return json.loads((GOLDEN / f"{case}.json").read_text()), load_file(
        GOLDEN / f"{case}.safetensors"
    )


def load_weights(tensors: dict[str, torch.Tensor], prefix: str = "sd/") -> dict[str, torch.Tensor]:
    """The state dict of a golden case, in fp32: stored as fp16, whose values fp32 holds exactly."""
    return {
        key.removeprefix(prefix): value.float()
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
