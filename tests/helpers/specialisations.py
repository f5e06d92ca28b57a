"""python -m pytest -p tests.helpers.specialisations --specialisations FILE: what the suite compiles
on a GPU, counted on a CPU.

Every launch is noted as Triton would specialise it, with the tile sizes of one GPU; the torch
path's tests are left out. Kernels whose numbers decide nothing else are not run, since the
interpreter takes minutes for a GPU's tiles, so values are not compared and tests may fail. FILE:
one line of JSON a test, its name and the specialisations it asks for. What only a GPU draws or runs
(bf16, training scripts on their default device) is not seen.
"""

import json
import re
import sys
from contextlib import nullcontext

import pytest

SKIPPED = re.compile(
    r"_attention|_sum_uses|_norm_|_gelu|_ssim|_conv_|_statistics|_gradients|_pool|_blend|_march|"
    r"_project_backward"
)


def pytest_addoption(parser):
    parser.addoption("--specialisations", help="a file of what each test would compile on a GPU")
    parser.addoption(
        "--assume", default="sm_90", help="the GPU whose tile sizes are taken (default: sm_90)"
    )


def pytest_collection_modifyitems(items):
    items[:] = [
        item
        for item in items
        if "torch" not in getattr(getattr(item, "callspec", None), "_idlist", ())
        and not any("GPU" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif"))
    ]


@pytest.fixture(autouse=True)
def _noted(request, monkeypatch):
    """Note what the test launches, whoever else observes."""
    from kernels import backend
    from kernels.compile.build import launched

    found = {}
    launch = backend.launch
    path = request.config.getoption("specialisations")

    def note(kernel, grid, *args, **constants):
        if 0 not in grid:
            found[repr(launched(kernel, args, constants))] = None
        if not (path and SKIPPED.search(kernel.fn.__name__)):
            launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(backend, "launch", note)
    if path:
        helpers = [sys.modules[name] for name in sys.modules if name.startswith("tests.helpers.")]
        for module in (request.module, *helpers):
            monkeypatch.setattr(module, "assert_close", lambda *_, **__: None, raising=False)
    # a module that takes a GPU without asking the fixture
    always = hasattr(request.module, "DEVICE")
    with (
        backend.assume(request.config.getoption("assume")),
        backend.use("interpreter") if always else nullcontext(),
    ):
        yield
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"test": request.node.nodeid, "builds": list(found)}) + "\n")
