"""Where the tests run: a GPU, or Triton's interpreter on a CPU."""

import pytest
import torch

GPU = torch.cuda.is_available()
# for tests of whole models, which the interpreter takes minutes for
SLOW_IF_INTERPRETED = (
    ["triton"] if GPU else ["torch", pytest.param("interpreter", marks=pytest.mark.slow)]
)
