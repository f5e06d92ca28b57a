"""The presets of every decoder, but for the published one, which is train.config's defaults."""

from dataclasses import replace

from train.config import Config

# what learns fastest in the first minutes: notebooks/results/README.md has the comparison
FAST = {"start": "principal", "logvar_init": -4.0, "input_gain": 3.0, "branch_gain": 0.0}


def demo(base: Config, **own) -> Config:
    """Make the preset for the embedded objects: a small model, minutes on a CPU.

    `own` are the decoder's values: the resolution, steps, batch sizes, the model and its weights.
    """
    common = dict(
        preset="demo",
        features="rgb",
        image_size=128,
        precision="fp32",
        optimizer="muon",
        lr=6e-3,
        warmup=20,
        final_lr=0.03,
        ema=0.98,
        workers=0,
        eval_objects=24,
    )
    return replace(base, **common | own)


def small(base: Config, **own) -> Config:
    """Make the preset for one GPU with 24 GB; `own` are the decoder's values."""
    common = dict(
        preset="small",
        features="rgb",
        image_size=256,
        batch_size=16,
        precision="bf16",
        ema=0.999,
        steps=100_000,
    )
    return replace(base, **common | own)
