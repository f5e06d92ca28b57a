"""Where the tests run: a GPU, compiled kernels on a CPU, or Triton's interpreter."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

# the GPU that `--emulate` names: conftest.py puts it here before anything is imported
EMULATED = os.environ.get("TRISLAT_EMULATE")
GPU = torch.cuda.is_available() and not EMULATED
COMPILED = GPU or bool(EMULATED)
# for tests of whole models, which the interpreter takes minutes for, and the emulator too
SLOW = [pytest.param("triton" if EMULATED else "interpreter", marks=pytest.mark.slow)]
SLOW_IF_INTERPRETED = ["triton"] if GPU else SLOW if EMULATED else ["torch", *SLOW]


@contextmanager
def implementation(name: str) -> Iterator[torch.device]:
    """Yield the device of a test's tensors, whose ops take the implementation `name` on a CPU.

    Where kernels run compiled they are the one implementation that is tested.
    """
    # this module is imported before Triton may be
    from kernels import backend

    if EMULATED:
        from tests import emulator

        with emulator.emulated(EMULATED):
            yield torch.device("cpu")
    else:
        with nullcontext() if GPU else backend.use(name):
            yield torch.device("cuda" if GPU else "cpu")
