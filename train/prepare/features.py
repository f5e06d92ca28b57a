"""Image features of voxels: the patch tokens of DINOv2 that views show at each, averaged.

As published (extract_feature.py of microsoft/TRELLIS). A view is resampled to 518 x 518 pixels and
put on black; the tokens of its 37 x 37 patches, before the last norm, are sampled where the centre
of a voxel is seen (bilinear; zero outside the picture), whatever stands in front of it. The mean
over the views is stored. Held-out views take no part: the last `holdout` frames of transforms.json.

    features/NAME/SHA.npz    indices uint8 [V, 3], patchtokens float16 [V, C]; NAME_R where the grid
                             is not 64^3
    features/NAME.json       the sha256 of the file of weights that they were made with

NAME is a model of models.dinov2, or MODEL-PIXELS for views of another size than 518, a multiple of
14: dinov2_vits14_reg-224 takes a sixth of the time.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from kernels import Camera
from models import dinov2
from models.files import write_whole
from models.reading import entry, read_bytes, read_json, shown
from train.data.metadata import write_metadata, write_npz
from train.data.readers import Frames, picture_size, read_frames, read_picture
from train.meshes.files import below
from train.run.progress import Progress

PIXELS = 518  # a side of a view, as published
BATCH = 16  # views at once, as published
READERS = 8  # threads that read views
AHEAD = 2  # batches of views that are read before they are needed
HEADER = 1 << 12  # bytes that a header of voxels has at most
REALS = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8"}


def parse_name(name: str) -> tuple[str, int]:
    """Split the name of features into model and pixels; ValueError where there are no such."""
    model, _, pixels = name.partition("-")
    side = int(pixels) if re.fullmatch(r"[1-9]\d{0,3}", pixels) else PIXELS
    if model not in dinov2.MODELS or name not in (model, f"{model}-{side}"):
        known = ", ".join(dinov2.MODELS)
        raise ValueError(f"features {name!r} are none of rgb, none, {known}, or MODEL-PIXELS")
    if side % dinov2.PATCH:
        raise ValueError(f"features {name!r}: {side} pixels are not a multiple of {dinov2.PATCH}")
    return model, side


def how_to_get(name: str) -> str:
    """Write the shell command that gets the weights of the network of features."""
    model, _ = parse_name(name)
    return dinov2.command(model)


@dataclass(frozen=True)
class ImageFeatures:
    """The features of a dataset by one model: where they are and what makes them."""

    out: Path  # the dataset's folder
    name: str
    weights: Path
    device: torch.device
    batch: int = BATCH

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"a batch of {self.batch} views must be at least 1")
        parse_name(self.name)

    def file(self, resolution: int, sha: str) -> Path:
        """The file of an object's features."""
        folder = self.name if resolution == 64 else f"{self.name}_{resolution}"
        return self.out / "features" / folder / f"{sha}.npz"

    def voxels(self, resolution: int, sha: str) -> Path:
        """The file of an object's voxels."""
        return self.out / ("voxels" if resolution == 64 else f"voxels_{resolution}") / f"{sha}.ply"

    def there(self, sha: str, resolution: Sequence[int]) -> bool:
        """True where an object has all features."""
        files = [self.file(R, sha) for R in resolution]
        return all(file.is_file() and file.stat().st_size for file in files)

    def load(self) -> dinov2.DINOv2:
        """Load the model, and record its weights beside the features.

        Raises ValueError for weights other than those that the dataset's features were made with.
        """
        model, _ = parse_name(self.name)
        network = dinov2.load(model, self.weights).to(self.device)
        with self.weights.open("rb") as stream:
            sha = hashlib.file_digest(stream, "sha256").hexdigest()
        record = below(self.out, self.out / "features" / f"{self.name}.json")
        if record.exists():
            was = entry(read_json(record), "weights", str, str(record))
            if was != sha:
                raise ValueError(
                    f"{record}: these features were made with weights of sha256 {shown(was)}, but "
                    f"{self.weights} has {sha}: choose another --out"
                )
        else:
            record.parent.mkdir(parents=True, exist_ok=True)
            write_whole(record, json.dumps({"weights": sha}) + "\n")
        return network

    def frames(self, sha: str) -> tuple[Frames, int]:
        """Read the frames of an object, and how many of the first ones its features see.

        Raises ValueError where there are none.
        """
        file = self.out / "renders" / sha / "transforms.json"
        frames = read_frames(file, self.out)
        views = len(frames.files) - (frames.holdout or 0)
        if views < 1:
            raise ValueError(f"{file}: all {len(frames.files)} frames are held out")
        return frames, views

    def make(
        self,
        network: dinov2.DINOv2,
        sha: str,
        resolution: Sequence[int],
        seen: Callable[[int], None],
    ) -> None:
        """Make the features of an object for every resolution.

        `seen` is told of views that were looked at. Raises ValueError that names the file where
        views, cameras or voxels cannot be used, and for links that lead out of the dataset.
        """
        cells = {}
        for R in resolution:
            below(self.out, self.file(R, sha).parent)
            file = below(self.out, self.voxels(R, sha))
            points = read_points(file)
            cells[R] = points, cells_of(points, R, file)
        frames, views = self.frames(sha)
        every = np.concatenate([points for points, _ in cells.values()])
        _, pixels = parse_name(self.name)
        mean = average(network, frames, views, pixels, self.batch, every, seen)
        if not np.isfinite(mean).all():
            row = int((~np.isfinite(mean)).any(1).argmax())
            raise ValueError(f"{sha}: features of voxel {row} are not finite in half precision")
        starts = np.cumsum([0, *(len(points) for points, _ in cells.values())])
        for (R, (_, indices)), start in zip(cells.items(), starts[:-1], strict=True):
            tokens = mean[start : start + len(indices)]
            write_npz(self.file(R, sha), indices=indices, patchtokens=tokens)


def read_points(file: Path) -> np.ndarray:
    """Read the points [V, 3] float32 of a .ply of voxels: little-endian x, y, z and nothing else.

    Raises ValueError that names the file.
    """
    content = read_bytes(file)
    head, end, _ = content[:HEADER].partition(b"end_header\n")
    lines = head.decode("latin1").split("\n")
    lines = [line.strip() for line in lines if not line.startswith(("comment", "obj_info"))]
    wanted = r"ply;format binary_little_endian 1\.0;element vertex (\d{1,9});"
    wanted += r"property (\w+) x;property \2 y;property \2 z;(element face 0;(property list .*;)?)?"
    match = re.fullmatch(wanted, ";".join(lines))
    if not end or not match or match[2] not in REALS:
        raise ValueError(f"{file} is not a binary PLY of points x, y, z")
    count, kind = int(match[1]), np.dtype(REALS[match[2]])
    first = len(head) + len(end)
    size = 3 * count * kind.itemsize
    if len(content) < first + size:
        raise ValueError(f"{file} has {len(content) - first} bytes of points, not {size}")
    if not count:
        raise ValueError(f"{file}: the object has no voxels")
    with np.errstate(over="ignore"):  # what is infinite is outside every grid
        return np.frombuffer(content, kind, 3 * count, first).reshape(-1, 3).astype(np.float32)


def cells_of(points: np.ndarray, resolution: int, file: Path) -> np.ndarray:
    """The cells [V, 3] uint8 of voxel centres in [-0.5, 0.5]^3.

    Raises ValueError that names the first point outside the grid, or in a cell that is taken.
    """
    with np.errstate(invalid="ignore"):
        cells = np.floor((points.astype(np.float64) + 0.5) * resolution)
        inside = ((cells >= 0) & (cells < min(resolution, 256))).all(1)
    if not inside.all():
        row = int(inside.argmin())
        raise ValueError(
            f"{file}: point {row} at {points[row].tolist()} is outside the {resolution}^3 grid"
        )
    cells = cells.astype(np.uint8)
    if len(np.unique(cells, axis=0)) < len(cells):
        raise ValueError(f"{file}: two points are in one cell of the {resolution}^3 grid")
    return cells


def read_view(file: Path, pixels: int, like: tuple[int, int]) -> np.ndarray:
    """Read a view as [pixels, pixels, 4] uint8, resampled by Lanczos.

    Colours are weighted by alpha, so that what is hidden does not bleed out.
    """
    own = rearrange(read_picture(file, like[0], like).numpy(), "c h w -> h w c")
    picture = Image.fromarray(np.ascontiguousarray(own))
    return np.asarray(picture.resize((pixels, pixels), Image.Resampling.LANCZOS))


def batches(files: Sequence[Path], pixels: int, size: int) -> Iterator[Tensor]:
    """Yield views [v, 3, pixels, pixels] float32 in [0, 1] on black, `size` at once.

    Threads read ahead of what is needed.
    """
    like = picture_size(files[0])
    groups = [files[i : i + size] for i in range(0, len(files), size)]
    with ThreadPoolExecutor(READERS, "view") as pool:
        coming: list[list[Future]] = []
        for i in range(len(groups)):
            while len(coming) <= AHEAD and i + len(coming) < len(groups):
                group = groups[i + len(coming)]
                coming.append([pool.submit(read_view, file, pixels, like) for file in group])
            pictures = np.stack([future.result() for future in coming.pop(0)])
            rgba = torch.from_numpy(pictures).float() / 255
            yield rearrange(rgba[..., :3] * rgba[..., 3:], "v h w c -> v c h w")


@torch.inference_mode()
def average(
    network: dinov2.DINOv2,
    frames: Frames,
    views: int,
    pixels: int,
    batch: int,
    points: np.ndarray,  # [N, 3]
    seen: Callable[[int], None],
) -> np.ndarray:  # [N, C] float16
    """Average the tokens that the first views of an object show at each point.

    Sums are fp32, one view after the other. `seen` is told of views that were looked at.
    """
    device = network.cls_token.device
    camera = Camera.from_blender(
        torch.from_numpy(frames.matrix[:views]),
        torch.from_numpy(frames.fov[:views]),
        pixels,
        pixels,
    ).to(device)
    where = torch.from_numpy(points).to(device)
    total = torch.zeros(len(points), network.size.channels, device=device)
    done = 0
    for pictures in batches(frames.files[:views], pixels, batch):
        tokens = network(dinov2.normalized(pictures.to(device)))
        uv, depth = camera[done : done + len(pictures)].project(where)
        # a point behind the camera is not seen
        uv = torch.where(depth[..., None] > 0, uv, -1)
        for own, place in zip(tokens, uv, strict=True):
            total += sample(own, place)
        done += len(pictures)
        seen(len(pictures))
    return (total / views).half().cpu().numpy()


def sample(tokens: Tensor, uv: Tensor) -> Tensor:  # [y, x, C], [N, 2] -> [N, C]
    """Sample a grid of tokens at places in [0, 1]^2: bilinear, zero outside.

    A token stands at the middle of its patch.
    """
    grid = rearrange(tokens, "y x c -> 1 c y x")
    places = rearrange(2 * uv - 1, "n two -> 1 1 n two")
    seen = F.grid_sample(grid, places, mode="bilinear", padding_mode="zeros", align_corners=False)
    return rearrange(seen, "1 c 1 n -> n c")


def add_features(
    features: ImageFeatures, rows: list[dict], resolution: Sequence[int], table: str
) -> int:
    """Make the features of objects that lack them, and say so in a table of the dataset.

    `rows` are of the dataset's metadata. Returns the exit code: 0, 1 if no object has features, 130
    if interrupted. What cannot be used is reported with its reason and skipped.
    """
    rendered = features.out / "renders"
    names = {
        row["sha256"]: Path(row.get("local_path", "")).stem or row["sha256"][:8]
        for row in rows
        if (rendered / row["sha256"] / "transforms.json").is_file()
    }
    if len(names) < len(rows):
        print(f"{len(rows) - len(names)} of {len(rows)} objects have no views")
    finished, code = _make_all(features, names, resolution)
    suffixes = ["" if R == 64 else f"_{R}" for R in resolution]
    flags = {f"feature_{features.name}{suffix}": True for suffix in suffixes}
    write_metadata(features.out, [{"sha256": sha} | flags for sha in finished], table)
    return code


def _make_all(
    features: ImageFeatures, names: dict[str, str], resolution: Sequence[int]
) -> tuple[list[str], int]:
    """Make the features of objects (sha256 -> a name to show).

    Returns those that have them then, and the exit code.
    """
    start = time.perf_counter()
    network = features.load()
    finished = [sha for sha in names if features.there(sha, resolution)]
    todo = [sha for sha in names if sha not in set(finished)]
    there = len(finished)
    failed = code = 0
    bar = Progress(0, unit="view")
    try:
        # as many as the first has, until the others are read
        each = next(_counts(features, todo), 0)
        bar.expect(each * len(todo))
        for sha in todo:
            before = bar.done
            try:
                features.make(network, sha, resolution, partial(_count, bar, names[sha]))
                finished.append(sha)
            except (ValueError, OSError) as error:
                line = f"skipped {names[sha]}: {error}"
                bar.write(line.encode(errors="backslashreplace").decode())
                failed += 1
            bar.expect(bar.done - before - each)
    except KeyboardInterrupt:
        code = 130
    finally:
        views = bar.done
        bar.close()
    seconds = time.perf_counter() - start
    speed = f" ({seconds / views:.3f} s a view)" if views else ""
    print(
        f"{features.name} on {features.device}: {len(finished)} objects ({len(finished) - there} "
        f"made, {there} there already), {views} views, {failed} skipped, "
        f"{seconds:.1f} s{speed} -> {features.out / 'features'}"
    )
    if code == 130:
        left = len(names) - len(finished) - failed
        print(f"interrupted with {left} objects to do: the same command goes on")
    return finished, code or int(not finished)


def _counts(features: ImageFeatures, names: Sequence[str]) -> Iterator[int]:
    """Yield how many views each object that can be read has."""
    for sha in names:
        with suppress(ValueError):
            yield features.frames(sha)[1]


def _count(bar: Progress, name: str, views: int) -> None:
    bar.update(name, count=views)
