"""Turntables: cameras around an object, and the pictures of several rows as a strip and a film."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib import font_manager
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from torch import Tensor

import models
from kernels import Camera, Image, face_camera, render_mesh
from models import MeshScene, Scene
from train.data.readers import read_triangles
from train.losses.geometry import shaded
from train.meshes.read import normalize, read_mesh
from train.prepare.raycast import FOV, Caster, camera_to_world
from train.run import report

PITCH = 15.0  # degrees above the horizon
# times the distance of training views, at which the corners of the unit cube would leave the frame
FARTHER = 1.2
TOGETHER = 4  # views that are drawn at once: pictures take memory
SUPERSAMPLE = 2  # rays a pixel of the truth, squared
STRIP = 6  # frames of a strip
SECONDS = 4.0  # of a turn
CAPTION = 20  # pixels of a film for the names of its columns

Rows = Mapping[str, Tensor]  # pictures [V, 3, H, W] in [0, 1] by name


def poses(frames: int) -> np.ndarray:
    """Make the cameras of a turn that begins at +x: Blender poses [frames, 4, 4]."""
    turn = [camera_to_world(2 * np.pi * i / frames, np.radians(PITCH)) for i in range(frames)]
    matrices = np.stack(turn)
    matrices[:, :3, 3] *= FARTHER
    return matrices


def cameras(matrices: np.ndarray, size: int, device: torch.device) -> Camera:
    """Turn Blender poses [V, 4, 4] into cameras of the field of view of training views."""
    return Camera.from_blender(torch.from_numpy(matrices), float(FOV), size, size).to(device)


@torch.no_grad()
def look(name: str, scene: Scene, camera: Camera, grey: bool = False) -> dict[str, Tensor]:
    """Draw a scene from V views on white, by row; with `grey` also the shape of a mesh.

    A mesh without colours is drawn grey alone.
    """
    parts = []
    shapes = []
    for first in range(0, len(camera), TOGETHER):
        views = camera[first : first + TOGETHER]
        white = views.extrinsics.new_ones(len(views), 3)
        image = models.render([scene], views, [0] * len(views), white)
        parts.append(image.color)
        if image.color is None or (grey and isinstance(scene, MeshScene)):
            shapes.append(shaded(image, views))
    rows = {}
    if parts[0] is not None:
        rows[name] = torch.cat(parts).clamp(0, 1)
    if shapes:
        rows[f"{name}\nshape"] = torch.cat(shapes)
    return rows


def draw_file(file: Path, home: Path | None, matrices: np.ndarray, size: int) -> Tensor:
    """Draw a mesh file, lit as in training views, on white: [V, 3, size, size].

    The files that it names lie below `home`. Raises ValueError where it cannot be read.
    """
    mesh = read_mesh(file, home)
    normalize(mesh)
    caster = Caster(mesh)
    pictures = [caster.render(pose, size, SUPERSAMPLE)[0] for pose in matrices]
    rgba = torch.from_numpy(np.stack(pictures)).float() / 255
    color, alpha = rearrange(rgba, "v h w c -> v c h w").split([3, 1], dim=1)
    return color * alpha + 1 - alpha


@torch.no_grad()
def draw_shape(file: Path, camera: Camera) -> Tensor:
    """Draw a mesh.ply of a dataset grey, both sides of its faces, on white: [V, 3, H, W]."""
    vertices, faces = (part.to(camera.device) for part in read_triangles(file))
    starts = [0, len(vertices)], [0, len(faces)]
    parts = []
    for first in range(0, len(camera), TOGETHER):
        views = camera[first : first + TOGETHER]
        image = render_mesh(vertices, faces, None, *starts, views, [0] * len(views))
        normal = face_camera(image.normal, views)
        parts.append(shaded(Image(None, image.alpha, image.depth, normal), views))
    return torch.cat(parts)


def strip(rows: Rows, title: str, file: Path) -> None:
    """Write some frames of a turn as one PNG, a row of pictures for each of `rows`."""
    frames = len(next(iter(rows.values())))
    chosen = [i * frames // STRIP for i in range(min(STRIP, frames))]
    columns = [f"{360 * i / frames:.0f} degrees" for i in chosen]
    report.picture({name: row[chosen] for name, row in rows.items()}, columns, title, file)


def film(rows: Rows, file: Path) -> None:
    """Write a turn as an animated WebP: the rows side by side, their names above."""
    count, _, height, width = next(iter(rows.values())).shape
    images = torch.stack([row.detach().float().cpu().clamp(0, 1) for row in rows.values()])
    pixels = (images * 255).round().byte()
    pixels = rearrange(pixels, "rows v c h w -> v h (rows w) c").numpy()
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), report.TEXT)
    names = [" ".join(name.replace("-\n", "").split()) for name in rows]
    frames = []
    for i in range(count):
        sheet = Picture.new("RGB", (width * len(rows), CAPTION + height), "white")
        sheet.paste(Picture.fromarray(pixels[i]), (0, CAPTION))
        _caption(sheet, names, width, font)
        frames.append(sheet)
    _save(frames, file)


def _caption(sheet: Picture.Image, names: Sequence[str], width: int, font) -> None:
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        draw.text(((i + 0.5) * width, CAPTION / 2), name, "black", font, "mm")


def _save(frames: list[Picture.Image], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    milliseconds = round(1000 * SECONDS / len(frames))
    first, *rest = frames
    with file.open("wb") as stream:
        first.save(
            stream,
            format="WEBP",
            save_all=True,
            append_images=rest,
            duration=milliseconds,
            loop=0,
            quality=90,
        )
