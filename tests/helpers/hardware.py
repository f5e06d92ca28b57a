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
DEVICES = ["triton"] if COMPILED else ["torch", "interpreter"]


def with_long_cases(short: list[str], long: list[str]) -> list:
    """Pair devices and cases for `parametrize`; the long ones are slow where interpreted."""
    pairs = [pytest.param(device, case) for case in short for device in DEVICES]
    for case in long:
        for device in DEVICES:
            marks = [pytest.mark.slow] if device == "interpreter" else []
            pairs.append(pytest.param(device, case, marks=marks))
    return pairs


@contextmanager
def implementation(name: str) -> Iterator[torch.device]:
    """Yield the device of a test's tensors, whose ops take the implementation `name` on a CPU.

    Where kernels run compiled they are the one implementation that is tested.
    """
    # this module is imported before Triton may be
    from kernels import backend

    if EMULATED:
        from tests import emulator

        with emulator.emulated(EMULATED, seen=_copies_agree):
            yield torch.device("cpu")
    else:
        with nullcontext() if GPU else backend.use(name):
            yield torch.device("cuda" if GPU else "cpu")


def _copies_agree(report) -> None:
    """Fail where lanes hold copies of one number that differ, and store them to one place.

    A product that is fused into a sum across lanes rounds in one lane alone; which copy stays is
    the hardware's choice, so results would not repeat to the bit.
    """
    differing = [str(p) for p in report.problems if p.kind.startswith("copies of one element")]
    assert not differing, "\n".join(differing)
