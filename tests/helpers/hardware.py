"""Where the tests run: a GPU, compiled kernels on a CPU, or Triton's interpreter."""

import os

import pytest
import torch

# the GPU that `--emulate` names: conftest.py puts it here before anything is imported
EMULATED = os.environ.get("TRISLAT_EMULATE")
GPU = torch.cuda.is_available() and not EMULATED
COMPILED = GPU or bool(EMULATED)
# for tests of whole models, which the interpreter takes minutes for, and the emulator too
SLOW = [pytest.param("triton" if EMULATED else "interpreter", marks=pytest.mark.slow)]
SLOW_IF_INTERPRETED = ["triton"] if GPU else SLOW if EMULATED else ["torch", *SLOW]
