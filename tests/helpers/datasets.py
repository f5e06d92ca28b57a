"""Small datasets, written as the files that a dataset consists of."""

import csv
import json
import struct
import zlib

import numpy as np
from PIL import Image

from train.data.dataset import Dataset

RES = 8
SIZE = 24
VIEWS = 5
CHANNELS = 6
AA, BB, CC, DD, EE = (2 * digit * 32 for digit in "abcde")  # as long as a sha256
# files of the first object
PNG = f"renders/{AA}/000.png"
JSON = f"renders/{AA}/transforms.json"


def pose(rng) -> np.ndarray:
    """A Blender camera at radius 2 in a random direction, its up axis towards z."""
    back = rng.normal(size=3)
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3] = np.stack([right, np.cross(back, right), back, 2 * back], axis=1)
    return matrix


def write_metadata(root, rows):
    """Write the table of a dataset."""
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make(root, names=(AA, BB, CC), resolution=RES, size=SIZE, **columns):
    """A dataset whose pictures are smooth, whose voxels are shuffled, with one voxel more for each
    object.
    """
    folder = root / "features" / f"rgb_{resolution}"
    rows = []
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        rng = np.random.default_rng([i, resolution])
        cells = rng.choice(resolution**3, 9 + i, replace=False)
        indices = np.stack(np.unravel_index(cells, [resolution] * 3), axis=1).astype(np.uint8)
        features = rng.normal(size=(9 + i, CHANNELS)).astype(np.float16)
        np.savez_compressed(folder / f"{name}.npz", indices=indices, patchtokens=features)
        views = root / "renders" / name
        views.mkdir(parents=True)
        frames = []
        for v in range(VIEWS):
            ramp = np.linspace(0, 200, size)[:, None] + np.linspace(0, 50, size)[None, :]
            pixels = np.stack([ramp, 255 - ramp, np.full_like(ramp, 40 * v), ramp[::-1]], axis=2)
            Image.fromarray(pixels.astype(np.uint8)).save(views / f"{v:03d}.png")
            frames.append(
                {
                    "file_path": f"{v:03d}.png",
                    "camera_angle_x": 0.6 + 0.05 * v,
                    "transform_matrix": pose(rng).tolist(),
                }
            )
        (views / "transforms.json").write_text(
            json.dumps({"aabb": [[-0.5] * 3, [0.5] * 3], "frames": frames})
        )
        extra = {key: value[i] for key, value in columns.items()}
        rows.append(
            {"sha256": name, f"feature_rgb_{resolution}": "True", f"num_voxels_{resolution}": 9 + i}
            | extra
        )
    write_metadata(root, rows)
    return root


def opened(*roots, **options) -> Dataset:
    """The dataset of the folders, with the settings of `make` where none are given."""
    return Dataset(roots, **{"resolution": RES, "features": "rgb", "image_size": SIZE} | options)


def view_number(image) -> int:
    """The number of a view, which `make` paints into the blue channel."""
    return round(image[2, 0, 0].item() * 255) // 40


def enormous(root):
    """Replace PNG by one whose header says 30,000 x 30,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 6, 0, 0, 0)
    whole = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
    )
    (root / PNG).write_bytes(whole + struct.pack(">I", 1 << 20) + b"IDAT")
