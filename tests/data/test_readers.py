"""Pictures, cameras and voxels read from files, good and damaged."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.datasets import AA, BB, CC, JSON, PNG, RES, SIZE, VIEWS, enormous, make, opened
from train.data.readers import read_frames, read_picture


def test_an_item_is_what_the_files_say(tmp_path):
    root = make(tmp_path)
    item = opened(root).item(BB)
    stored = np.load(root / "features" / f"rgb_{RES}" / f"{BB}.npz")
    wanted = {
        tuple(c): f for c, f in zip(stored["indices"].tolist(), stored["patchtokens"], strict=True)
    }
    rows = [tuple(c) for c in item.coords.tolist()]
    assert rows == sorted(wanted) and rows != [tuple(c) for c in stored["indices"].tolist()]
    assert item.coords.dtype == torch.int32 and item.features.dtype == torch.float32
    assert np.array_equal(
        item.features.numpy(), np.stack([wanted[c] for c in rows]).astype(np.float32)
    )
    frames = json.loads((root / "renders" / BB / "transforms.json").read_text())["frames"]
    assert item.image.shape == (VIEWS, 4, SIZE, SIZE) and len(item.camera) == VIEWS
    for v, frame in enumerate(frames):
        pixels = np.asarray(Image.open(root / "renders" / BB / frame["file_path"]))
        assert np.array_equal((item.image[v] * 255).round().byte().permute(1, 2, 0).numpy(), pixels)
        matrix = np.array(frame["transform_matrix"])
        matrix[:3, 1:3] *= -1  # y up, z backwards -> y down, z forwards
        np.testing.assert_allclose(item.camera.extrinsics[v], np.linalg.inv(matrix), atol=1e-6)
        assert item.camera.intrinsics[v, 0, 0].item() == pytest.approx(
            0.5 / math.tan(frame["camera_angle_x"] / 2)
        )


def test_pictures_of_another_size_are_resampled_colour_and_alpha_apart(tmp_path):
    root = make(tmp_path, [AA])
    file = root / "renders" / AA / "000.png"
    hidden = np.zeros((SIZE, SIZE, 4), np.uint8)
    # red everywhere, half of it transparent
    hidden[..., 0] = 200
    hidden[: SIZE // 2, :, 3] = 255
    Image.fromarray(hidden).save(file)
    image = opened(root, image_size=12).item(AA, [0]).image[0]
    assert image.shape == (4, 12, 12)
    assert (image[0] * 255).round().eq(200).all(), (
        "a premultiplied resampling darkens or drops colour under zero alpha"
    )
    expected = Image.open(file).getchannel("A").resize((12, 12), Image.Resampling.LANCZOS)
    assert np.array_equal((image[3] * 255).round().byte().numpy(), np.asarray(expected))


NPZ = f"features/rgb_{RES}/{AA}.npz"
CSV = "metadata.csv"


def arrays(**change):
    def breaker(root):
        with np.load(root / NPZ) as content:
            changed = dict(content) | change
        np.savez(root / NPZ, **{key: value for key, value in changed.items() if value is not None})

    return breaker


def cell(key, index, value):
    def breaker(root):
        with np.load(root / NPZ) as content:
            array = content[key]
        array[index] = value
        arrays(**{key: array})(root)

    return breaker


def text(name, old, new):
    return lambda root: (root / name).write_text((root / name).read_text().replace(old, new))


def delete(name):
    return lambda root: (root / name).unlink()


def cut(name, keep=0.6):
    return lambda root: (root / name).write_bytes(
        (root / name).read_bytes()[: int(keep * (root / name).stat().st_size)]
    )


def pictures(mode="RGBA", size=(SIZE, SIZE), views=range(VIEWS)):
    return lambda root: [
        Image.new(mode, size).save(root / f"renders/{AA}/{v:03d}.png") for v in views
    ]


def one_array(root):
    np.save(root / "one.npy", np.zeros(3))
    (root / "one.npy").replace(root / NPZ)


def frame(key, value):
    def breaker(root):
        content = json.loads((root / JSON).read_text())
        content["frames"][1][key] = value
        (root / JSON).write_text(json.dumps(content))

    return breaker


def turned(change, last=(0, 0, 0, 1)):
    """Multiply the camera of frame 1 by a matrix in its own axes."""

    def breaker(root):
        pose = read_frames(root / JSON).matrix[1] @ change
        pose[3] = last
        frame("transform_matrix", pose.tolist())(root)

    return breaker


def test_a_camera_that_is_scaled_is_the_camera(tmp_path):
    root = make(tmp_path, [AA])
    before = opened(root).item(AA).camera
    turned(np.diag([2, 2, 2, 1]))(root)
    after = opened(root).item(AA).camera
    assert torch.allclose(after.extrinsics, before.extrinsics, atol=1e-6)


def test_views_that_an_optimiser_has_rewritten(tmp_path):
    root = make(tmp_path, [AA])
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[:9] = (70, 70, 70, 255)
    pixels[9:12] = (70, 70, 70, 128)
    grey = np.stack([pixels[..., 0], pixels[..., 3]], -1)
    palette = Image.fromarray(pixels[..., 3]).convert("P")  # as many colours as alphas
    palette.putpalette([0, 0, 0] * 128 + [70, 70, 70] * 128)
    for image, options in (
        (Image.fromarray(pixels), {}),
        (Image.fromarray(grey), {}),
        (palette, {"transparency": bytes(range(256))}),
    ):
        image.save(root / PNG, **options)
        with Image.open(root / PNG) as stored:
            assert stored.mode == image.mode
        read = read_picture(root / PNG, SIZE, (SIZE, SIZE))
        assert np.array_equal(read.permute(1, 2, 0).numpy(), pixels)


def test_a_table_that_a_spreadsheet_wrote(tmp_path):
    root = make(tmp_path)
    for file in (CSV, JSON):
        (root / file).write_bytes(b"\xef\xbb\xbf" + (root / file).read_bytes())
    assert opened(root).names == [AA, BB, CC] and len(opened(root).item(AA).camera) == VIEWS


NONE = dict(indices=np.zeros((0, 3), np.uint8), patchtokens=np.zeros((0, 6), np.float16))
BROKEN = {  # what is broken: (how, in which file, what the message says after its name)
    "no metadata": (delete(CSV), CSV, " is missing"),
    "metadata empty": (cut(CSV, 0), CSV, " has no column sha256, only: nothing"),
    "count infinite": (
        text(CSV, ",9", ",-inf"),
        CSV,
        ": num_voxels_8 of a{64} is '-inf', not a finite number",
    ),
    "no sha256 column": (text(CSV, "sha256", "hash"), CSV, " has no column sha256, only: hash, "),
    "sha256 absolute": (
        text(CSV, AA, "/tmp/x"),
        CSV,
        ": sha256 of row 1 of 3 is '/tmp/x', not 64 digits of 0-9 a-f",
    ),
    "sha256 upwards": (
        text(CSV, BB, "../" + BB[3:]),
        CSV,
        r": sha256 of row 2 of 3 is '\.\./b+', not 64 digits",
    ),
    "sha256 in capitals": (
        text(CSV, CC, CC.upper()),
        CSV,
        ": sha256 of row 3 of 3 is 'C+', not 64 digits",
    ),
    "sha256 too long": (
        text(CSV, AA, AA + "\\n"),
        CSV,
        ": sha256 of row 1 of 3 is 'a+.+n', not 64 digits",
    ),
    "sha256 empty": (text(CSV, BB, ""), CSV, ": sha256 of row 2 of 3 is '', not 64 digits"),
    "no such features": (
        text(CSV, "feature_rgb_8", "feature_dino"),
        CSV,
        ".*_rgb_8: it fits --features dino --resolution 64; ",
    ),
    "count not a number": (
        text(CSV, ",9", ",many"),
        CSV,
        ": num_voxels_8 of a{64} is 'many', not a number",
    ),
    "count contradicts": (
        text(CSV, ",9", ",12"),
        NPZ,
        " has 9 voxels, but num_voxels_8 in .*metadata.csv says 12",
    ),
    "npz missing": (delete(NPZ), NPZ, " is missing"),
    "npz truncated": (cut(NPZ), NPZ, " cannot be read"),
    "npz is one array": (one_array, NPZ, " cannot be read: .*not an npz"),
    "npz is text": (
        lambda root: (root / NPZ).write_text("no arrays" * 9),
        NPZ,
        " cannot be read: .*not an npz archive",
    ),
    "npz without keys": (
        arrays(patchtokens=None, x=np.zeros(3)),
        NPZ,
        ".* no array patchtokens, only indices, x",
    ),
    "indices flat": (
        arrays(indices=np.zeros(27, np.uint8)),
        NPZ,
        r": indices are uint8 \[27\], not integers \[V, 3\]",
    ),
    "indices float": (
        arrays(indices=np.zeros((9, 3))),
        NPZ,
        r": indices are float64 \[9, 3\], not integers",
    ),
    "rows differ": (
        arrays(patchtokens=np.zeros((8, 6))),
        NPZ,
        r": patchtokens are float64 \[8, 6\], not floats \[9, C\]",
    ),
    "no voxels": (arrays(**NONE), NPZ, ": the object has no voxels"),
    "outside the grid": (
        cell("indices", 4, (0, RES, 0)),
        NPZ,
        r": voxel 4 at \[0, 8, 0\] is outside the 8\^3 grid",
    ),
    "voxel twice": (
        arrays(indices=np.full((9, 3), 5)),
        NPZ,
        r": rows \d and \d are the same voxel \[5, 5, 5\]",
    ),
    "nan": (cell("patchtokens", (3, 2), np.nan), NPZ, ": patchtokens of row 3 are not finite"),
    "inf": (cell("patchtokens", (5, 0), np.inf), NPZ, ": patchtokens of row 5 are not finite"),
    "no transforms": (delete(JSON), JSON, " is missing"),
    "transforms truncated": (cut(JSON), JSON, " is truncated or not JSON"),
    "no frames key": (text(JSON, "frames", "views"), JSON, " lacks 'frames'"),
    "no frames": (
        lambda root: (root / JSON).write_text('{"frames": []}'),
        JSON,
        " lists no frames",
    ),
    "frames are numbers": (
        lambda root: (root / JSON).write_text('{"frames": [3]}'),
        JSON,
        " is not a list of frames",
    ),
    "no angle": (text(JSON, "camera_angle_x", "angle"), JSON, ": frame 0 lacks 'camera_angle_x'"),
    "matrix 3 x 4": (
        text(JSON, ", [0.0, 0.0, 0.0, 1.0]]", "]"),
        JSON,
        r": frame 0: transform_matrix has shape \[3, 4\], not \[4, 4\]",
    ),
    "matrix singular": (
        frame("transform_matrix", [[0.0] * 4] * 4),
        JSON,
        ": frame 1 has no usable camera",
    ),
    "matrix mirrored": (
        turned(np.diag([-1, 1, 1, 1])),
        JSON,
        ": frame 1: its transform_matrix is mirrored",
    ),
    "matrix stretched": (
        turned(np.diag([1, 2, 1, 1])),
        JSON,
        r": frame 1: its transform_matrix is stretched or skewed \(axes of length 1 2 1\)",
    ),
    "matrix skewed": (
        turned(np.eye(4) + np.eye(4, k=1) * [0, 0.1, 0, 0]),
        JSON,
        ": frame 1: its transform_matrix is stretched or skewed",
    ),
    "matrix projective": (
        turned(np.eye(4), [0, 0, 0.1, 1]),
        JSON,
        ": frame 1: its transform_matrix has another last row than 0 0 0 1",
    ),
    "angle too wide": (
        frame("camera_angle_x", math.pi),
        JSON,
        r": frame 1 has no usable camera \(angle 3.14",
    ),
    "angle nan": (
        frame("camera_angle_x", math.nan),
        JSON,
        r": frame 1 has no usable camera \(angle nan",
    ),
    "view elsewhere": (
        frame("file_path", "../000.png"),
        JSON,
        ": file_path '../000.png' is no path below .*a{64}",
    ),
    "view absolute": (
        frame("file_path", "/000.png"),
        JSON,
        ": file_path '/000.png' is no path below .*a{64}",
    ),
    "view nowhere": (frame("file_path", ""), JSON, ": file_path '' is no path below"),
    "view missing": (delete(PNG), PNG, " is missing, though transforms.json lists it"),
    "view truncated": (cut(PNG), PNG, " is truncated or damaged"),
    "view enormous": (enormous, PNG, " is truncated or not a picture: Image size .* exceeds limit"),
    "view empty": (cut(PNG, 0), PNG, " is truncated or not a picture"),
    "no alpha": (pictures("RGB"), PNG, " has mode RGB: views need colour and alpha"),
    "not square": (pictures(size=(SIZE, 20)), PNG, " is 24 x 20 pixels, not square"),
    "size differs": (
        pictures(size=(16, 16), views=[2]),
        "002.png",
        " is 16 x 16 pixels, but the .* first view is 24 x 24",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_object_names_its_file_and_never_yields_another(tmp_path, case):
    breaker, file, message = BROKEN[case]
    root = make(tmp_path)
    opened(root).item(AA)
    breaker(root)
    with pytest.raises(ValueError, match=re.escape(file) + message):
        opened(root).item(0)
