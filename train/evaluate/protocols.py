"""The protocols: how a checkpoint is scored, with every number that a score depends on.

A number without its protocol is worth nothing: one model scores 27.6 or 32.7 dB by the cameras
alone. So a protocol is printed in full and written beside its scores, and one that a flag has
changed says so in its name.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch

from kernels import Camera
from train.prepare.raycast import direction

SEED = 18  # of the points on surfaces, beside the object's sha256
MESH = "mesh"
VIEWS = "views"
LEAST = 16  # pixels a side: LPIPS needs them
MOST = {"size": 8192, "samples": 10**8}  # that memory holds


@dataclass(frozen=True)
class Protocol:
    """A way to score; the numbers of what it does not score are empty or 0."""

    name: str
    origin: str  # where its numbers come from
    # of true pictures: "mesh", cast from the source mesh; "views", the dataset's held-out views
    truth: str
    size: int  # pixels a side; 0: what the checkpoint was trained on
    # the cameras, where the views are not the dataset's own: they look at the origin, z up, from
    # radius * (sin yaw cos pitch, cos yaw cos pitch, sin pitch); degrees
    yaw: tuple[float, ...] = ()
    pitch: tuple[float, ...] = ()
    radius: float = 0.0  # world units; the object's largest side is 1, its box centred
    fov: float = 0.0  # degrees, horizontal and vertical
    supersample: int = 0  # true pictures: this number squared of rays a pixel
    ssaa: int = 1  # pictures of meshes are drawn so many times larger, then shrunk
    # grey levels that colours are compared on; without any they are not
    backgrounds: tuple[float, ...] = ()
    inside: bool = False  # PSNR inside the object beside that of the whole picture
    similarity: bool = False  # SSIM and LPIPS of the colours
    normals: bool = False  # PSNR and LPIPS of pictures of normals
    samples: int = 0  # points on each surface
    distances: tuple[float, ...] = ()  # thresholds of F-scores, world units
    squared: tuple[float, ...] = ()  # thresholds of F1, squared world units
    notes: tuple[str, ...] = ()  # what the numbers above do not say

    @property
    def colors(self) -> bool:
        """True where colours are scored, and not the surface alone."""
        return bool(self.backgrounds)

    def camera(self, device: torch.device) -> Camera:
        """The cameras of an object, the same for all."""
        yaw = torch.tensor([math.radians(a) for a in self.yaw], dtype=torch.float64)
        pitch = torch.tensor([math.radians(a) for a in self.pitch], dtype=torch.float64)
        return Camera.orbit(
            yaw, pitch, self.radius, math.radians(self.fov), self.size, device=device
        )

    def content(self) -> dict:
        """Everything about it, for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Everything about it, for a reader."""
        lines = [f"protocol {self.name}", f"  {self.origin}"]
        if self.truth == VIEWS:
            lines.append(f"  truth: the dataset's held-out views, at {self.size} x {self.size}")
        else:
            views = ", ".join(f"({y:g}, {p:g})" for y, p in zip(self.yaw, self.pitch, strict=True))
            lines.append(
                f"  {len(self.yaw)} views (yaw, pitch) in degrees: {views}; radius "
                f"{self.radius:g}, field of view {self.fov:g} degrees, {self.size} x {self.size} "
                "pixels"
            )
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


COLORS = (
    "colours: clamped to [0, 1], laid on the background, over all pixels; PSNR = -10 log10 of a "
    "picture's mean squared error; SSIM with an 11 x 11 Gaussian window of sigma 1.5, zero-padded, "
    "mean over all pixels; LPIPS of VGG16, version 0.1, on [-1, 1]"
)
NORMALS = (
    "normals (meshes): of the faces, in camera axes (x right, y down, z ahead), turned away from "
    "the camera, (n + 1) / 2, background 0.5, drawn 2 x larger and shrunk; true ones by the same "
    "renderer of the dataset's mesh.ply; PSNR over all pixels"
)
MEANS = "means of an object are over its pictures, then of all objects; posterior means, fp32"
CAST = (
    "true pictures: the source mesh, with its materials, cast by train.prepare's renderer "
    "(mesh.ply holds no colours), 2 x 2 rays a pixel, 8 bits, its lights: a model of pictures "
    "by another renderer comes no closer than the ceiling says"
)
POINTS = (
    "drawn with equal chance by area, inner surfaces too, seeded by the object's sha256; means "
    "over both directions; lengths in the object's largest side"
)


def _hammersley(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The published quasi-random directions, offsets 0.5 and 0, as yaw and pitch of an orbit."""
    both = [direction(i, count, 0.5, 0.0) for i in range(count)]
    degrees = [(90 - math.degrees(yaw), math.degrees(pitch)) for yaw, pitch in both]
    return tuple(round(yaw, 4) for yaw, _ in degrees), tuple(round(p, 4) for _, p in degrees)


def _trellis() -> Protocol:
    yaw, pitch = _hammersley(8)
    return Protocol(
        name="trellis-r2-fov40",
        origin="cameras and measures of TRELLIS (arXiv 2412.01506); ours: which 8 views (its own "
        "quasi-random sequence), 100,000 points, and F-scores beside the one at 0.05, which "
        "saturates",
        truth=MESH,
        size=512,
        yaw=yaw,
        pitch=pitch,
        radius=2.0,
        fov=40.0,
        supersample=2,
        ssaa=2,
        backgrounds=(0.0,),
        similarity=True,
        normals=True,
        samples=100_000,
        distances=(0.05, 0.01, 0.005),
        notes=(
            "background black (0); " + COLORS,
            CAST,
            NORMALS,
            "surfaces (meshes): cd is the mean distance of points from the nearest point of the "
            "other surface, f_T the harmonic mean of the shares nearer than T; 100,000 points a "
            "surface, " + POINTS,
            MEANS,
        ),
    )


PROTOCOLS = {
    one.name: one
    for one in (
        _trellis(),
        Protocol(
            name="trellis2-normal4",
            origin="cameras and measures of TRELLIS.2 (arXiv 2512.14692); ours: radius 10, that of "
            "its code's snapshots",
            truth=MESH,
            size=512,
            yaw=(30.0, 120.0, 210.0, 300.0),
            pitch=(30.0,) * 4,
            radius=10.0,
            fov=6.0,
            ssaa=2,
            normals=True,
            samples=1_000_000,
            squared=(1e-6, 1e-8),
            notes=(
                NORMALS,
                "surfaces (meshes): md is the mean squared distance of points from the other "
                "surface (exact, point to triangle), cd2 from its nearest point, NAME_f1_T the "
                "harmonic mean of the shares whose squared distance is below T; 1,000,000 points a "
                "surface, " + POINTS,
                MEANS,
            ),
        ),
        Protocol(
            name="held-out",
            origin="ours: what a training run scores at its end",
            truth=VIEWS,
            size=0,
            backgrounds=(0.0, 1.0),
            inside=True,
            notes=(
                "every held-out view on black and on white, clamped to [0, 1]; PSNR = -10 log10 of "
                "a picture's mean squared error; inside: over pixels of true alpha above 0.5",
                MEANS,
            ),
        ),
    )
}


def chosen(
    name: str, size: int | None, samples: int | None, truth: str | None, default_size: int
) -> Protocol:
    """The protocol of a name, changed by flags, and then with another name.

    Raises ValueError for a name that is none, and for flags that it has no use for.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"--protocol {name!r} is none of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if not protocol.size:
        protocol = replace(protocol, size=default_size)
    if truth is not None and not protocol.colors:
        raise ValueError(f"--truth {truth}: {name} compares no colours")
    if truth == MESH and not protocol.yaw:
        raise ValueError(f"--truth {truth}: the views of {name} are the dataset's")
    if samples is not None and not protocol.samples:
        raise ValueError(f"--samples {samples}: {name} has no points on surfaces")
    if size is not None and size < LEAST:
        raise ValueError(f"--size {size} is below the {LEAST} pixels that LPIPS needs")
    if samples is not None and samples < 1:
        raise ValueError(f"--samples {samples} must be at least 1")
    for field, value in (("size", size), ("samples", samples)):
        if value is not None and value > MOST[field]:
            raise ValueError(f"--{field} {value} is over {MOST[field]}")
    changes = []
    notes = (protocol.origin, *protocol.notes)
    for field, value in (("size", size), ("samples", samples), ("truth", truth)):
        was = getattr(protocol, field)
        if value is None or value == was:
            continue
        protocol = replace(protocol, **{field: value})
        changes.append(f"{field} {value}, not {was}")
        if field == "truth":
            notes = tuple(note for note in notes if note != CAST)
        if field == "samples":
            notes = tuple(note.replace(f"{was:,} points", f"{value:,} points") for note in notes)
    if changes:
        name = f"{name} (changed: {'; '.join(changes)})"
    return replace(protocol, name=name, origin=notes[0], notes=notes[1:])
