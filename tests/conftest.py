"""Fixtures and hooks of all tests: where kernels run, poisoned memory, seeds.

On a machine without a GPU every kernel test runs twice, on the vectorised torch path and through
Triton's interpreter; with a GPU it runs there, compiled; with `--emulate sm_90` it runs as compiled
for that GPU, executed on the CPU by tests.emulator, and other tests are left out. Kernels are
compiled or interpreted, never both in one process.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

# they share the cores, and so do the processes that tests start
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = (
        len(os.sched_getaffinity(0)) // int(workers) if hasattr(os, "sched_getaffinity") else 1
    )
    # before the first import of torch
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

# a shell's background jobs ignore Ctrl-C, and so would every process that a test starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "--emulate" in sys.argv[:-1]:
    # known before Triton is imported, here and in the workers of pytest-xdist
    os.environ["TRISLAT_EMULATE"] = sys.argv[sys.argv.index("--emulate") + 1]

import torch  # noqa: E402

from tests.helpers.hardware import (  # noqa: E402
    COMPILED,
    DEVICES,
    EMULATED,
    GPU,
    implementation,
)

if EMULATED:
    os.environ.pop("TRITON_INTERPRET", None)
elif not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import numpy  # noqa: E402
import pytest  # noqa: E402
import triton  # noqa: E402

from kernels import backend, reduce  # noqa: E402


def _version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split("+")[0].split(".")[:2])


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        type=int,
        help="random cases of each op (default: 10 of the kernels, 200 of the torch path)",
    )
    parser.addoption(
        "--emulate",
        metavar="TARGET",
        help="run kernel tests alone, compiled for this GPU and executed on the CPU: "
        "sm_80, sm_86, sm_89 or sm_90",
    )


def _start_emulator(asked: str | None) -> None:
    """Say now, and once, why kernels cannot be emulated."""
    from tests import emulator

    if asked != EMULATED:
        raise pytest.UsageError(
            "--emulate TARGET stands on pytest's own command line, as two words"
        )
    if EMULATED not in emulator.TARGETS:
        known = ", ".join(emulator.TARGETS)
        raise pytest.UsageError(f"--emulate {EMULATED} is not one of {known}")
    try:
        emulator.library()
    except RuntimeError as error:
        raise pytest.UsageError(f"--emulate: {error}") from error


def pytest_configure(config):
    asked = config.getoption("--emulate")
    if asked or EMULATED:
        _start_emulator(asked)
    elif not GPU and _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        pytest.exit(
            f"triton {triton.__version__} cannot interpret loops with numpy {numpy.__version__}: "
            "install triton >= 3.7 or numpy < 2.4",
            returncode=2,
        )
    # torch.empty returns NaN (integers: the largest value), so a kernel that leaves part of its
    # output unwritten fails
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # a failed assert in a helper shows its values, as one in a test does
    for file in (Path(__file__).parent / "helpers").rglob("[!_]*.py"):
        name = ".".join(file.relative_to(Path(__file__).parents[1]).with_suffix("").parts)
        if name not in sys.modules:
            pytest.register_assert_rewrite(name)


def pytest_collection_modifyitems(config, items):
    """With `--emulate`, leave out what runs no kernel."""
    if not EMULATED:
        return
    kernels = {"device", "kernel_device", "here", "emulated"}
    left = [item for item in items if not kernels & set(getattr(item, "fixturenames", ()))]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws does not depend on the tests before it: one that passes passes again."""
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request):
    """The device of a kernel test's tensors, with the implementation under test chosen."""
    with implementation(request.param) as found:
        yield found


@pytest.fixture
def kernel_device():
    """As `device`, kernels only: for tests of properties that the torch path does not have."""
    with implementation("interpreter") as found:
        yield found


@pytest.fixture
def watched_device():
    """The GPU, or a fake device where there is none: for tests of what the host waits for. Kernels
    only.
    """
    if GPU:
        yield torch.device("cuda")
        return
    from tests.helpers.fake_device import fake_device

    with fake_device() as device:
        yield device


@pytest.fixture
def few_programs(monkeypatch):
    """In the interpreter an image of `ssim` is one program: each costs half a second, its lanes
    nothing. A GPU has the tiles in use: these it would compile for half a minute.
    """
    if not COMPILED and backend.target(torch.empty(0)) == "interpreter":
        tiles = {"LANES": 2048, "ROWS": 8, "num_warps": 4}
        monkeypatch.setattr(importlib.import_module("kernels.similarity"), "_tiles", lambda: tiles)


@pytest.fixture
def few_sums(monkeypatch):
    """The interpreter's tiles for sums by key whatever GPU is assumed: theirs take it a minute."""
    if not COMPILED:
        monkeypatch.setattr(
            reduce, "_tiles", lambda target, tiles=reduce._tiles: tiles("interpreter")
        )
