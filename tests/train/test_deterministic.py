"""Two runs with --deterministic leave the same bits, whichever the decoder; on a GPU where there is
one.
"""

from importlib import import_module

import pytest
import torch

from train import loop
from train.losses.geometry import SurfaceLoss
from train.losses.pictures import PictureLoss
from train.run import checkpoint

TINY = (  # 16 bit, as on a GPU
    "--deterministic --precision bf16 --image-size 24 --batch-size 2 --micro-batch 1 --views 1 "
    "--holdout-views 2 "
    "--eval-objects 1 --warmup 0 --steps 3 --sample-every 100 --model.blocks 1"
).split()
SCRIPTS = {
    "gaussian": (PictureLoss, "--model.channels 16 --model.heads 1 --model.per-voxel 2"),
    "radiance": (PictureLoss, "--model.channels 16 --model.heads 1 --model.rank 2"),
    "mesh": (SurfaceLoss, "--model.heads 2 --model.mlp-ratio 0.25"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_runs_leave_the_same_bits(script, data, tmp_path):
    module = import_module(f"train.{script}")
    compare, sizes = SCRIPTS[script]
    states = []
    for run in "ab":
        flags = [
            *TINY,
            *sizes.split(),
            "--data",
            str(data),
            "--features",
            "rgb",
            "--out",
            str(tmp_path / run),
        ]
        loop.main(script, module.PRESETS, module.build, flags, loss=compare)
        states.append(checkpoint.load(checkpoint.newest(tmp_path / run / "checkpoints")))
    (first, one), (second, two) = states
    assert one == two and one["step"] == 3 and one["optimizer"]["skipped"] == 0
    assert first.keys() == second.keys() and all(
        torch.equal(t, second[name]) for name, t in first.items()
    )
