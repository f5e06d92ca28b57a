"""Numbers of the published implementation, stored in tests/golden."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden"


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
