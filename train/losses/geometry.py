"""How decoded meshes differ from the mesh and the views of an object: loss terms, pictures and
scores. V views.

The truth is the dataset's mesh.ply, drawn by the same rasterizer as the decoded mesh: coverage,
depth, and normals turned to the camera, for files disagree on which way faces turn. Terms and
weights are those of microsoft/TRELLIS (slat_vae_dec_mesh).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from kernels import Camera, Image, face_camera, render_mesh
from kernels.transfer import make_index
from models import MeshScene
from train.data.batch import Batch
from train.data.objects import Objects
from train.losses.pictures import Reconstruction, composite, psnr, smooth_l1

TRUNCATION = 3.0  # cubes on either side of the true surface in which signed distances are compared
LAMP = (0.4, 0.75, 0.55)  # of shaded pictures: the way to it in camera axes (right, up, back)


@torch.no_grad()
def truth(batch: Batch) -> Image:
    """The true meshes from the batch's views: alpha, depth (0 in the background), normal turned to
    the camera.
    """
    m = batch.meshes
    image = render_mesh(
        m.vertices, m.faces, None, m.vertex_starts, m.face_starts, batch.camera, batch.view_scene
    )
    return Image(None, image.alpha, image.depth, face_camera(image.normal, batch.camera))


def tsdf(position: Tensor, value: Tensor, depth: Tensor, camera: Camera, resolution: int) -> Tensor:
    """How far signed distances are from the truncated distance to the true surface along each
    view's rays: [V].

    position [T, 3], value [T] negative inside, depth [V, 1, H, W] true camera depth, 0 in the
    background. Corners that lie farther than the truncation behind the surface, or project outside
    it, do not count; a view where none is left gives 0.
    """
    limit = TRUNCATION / resolution
    uv, z = camera.project(position.detach())
    # published: align_corners, though uv is measured from the picture's edge and not from the
    # middle of its first pixel
    surface = F.grid_sample(
        depth, (2 * uv - 1)[:, None], padding_mode="border", align_corners=True
    )[:, 0, 0]
    ahead = surface - z
    kept = ahead > -limit
    error = (value - ahead.clamp(-limit, limit)).square() * kept
    return error.sum(1) / kept.sum(1).clamp(min=1)


class Surfaces(nn.Module):
    """The objective of meshes; what `train.losses.pictures.Pictures` is to Gaussians and radiance
    fields.
    """

    meshes = True

    def __init__(self, lpips: str | Path | None = None):
        super().__init__()
        self.reconstruction = Reconstruction(lpips)

    def forward(
        self, scenes: Sequence[MeshScene], batch: Batch, background: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Loss terms by name, unweighted, and the mean PSNR of the colours on black; `background`
        is not used.

        Views of a scene without a surface take no part in the terms of pictures; its regulariser
        and signed distances do.
        """
        black = torch.zeros_like(background)
        true = truth(batch)
        image = models.render(scenes, batch.camera, batch.view_scene, black)
        target = composite(batch.image, black)
        seen = [view for view, scene in enumerate(batch.view_scene) if len(scenes[scene].faces)]
        pick = lambda t: t
        if len(seen) < len(batch.view_scene):
            rows = make_index(seen, true.depth.device)
            pick = lambda t: t.index_select(0, rows)
        terms = self.pictures(
            *(Image(*map(pick, _fields(i))) for i in (image, true)),
            pick(target),
            scenes[0].resolution,
        )
        if not seen:
            terms = {name: torch.zeros_like(value) for name, value in terms.items()}
        terms["tsdf"] = self.distances(scenes, batch, true.depth)
        return terms | models.penalties(scenes), psnr(
            image.color.detach().clamp(0, 1), target
        ).mean()

    def pictures(
        self, image: Image, true: Image, target: Tensor, resolution: int
    ) -> dict[str, Tensor]:
        """Terms of coverage, depth, normals and colours; `target` [V, 3, H, W] the true colours on
        black.

        Depth and normals count where the true mesh is, by its coverage.
        """
        mask = true.alpha
        terms = {"mask": (image.alpha - mask).abs().mean()}
        terms["depth"] = smooth_l1(image.depth * mask, true.depth * mask, 1 / (2 * resolution))
        normal = self.reconstruction(image.normal * mask, true.normal * mask)
        return (
            terms
            | {f"normal_{name}": value for name, value in normal.items()}
            | self.reconstruction(image.color, target)
        )

    def distances(self, scenes: Sequence[MeshScene], batch: Batch, depth: Tensor) -> Tensor:
        """The mean of `tsdf` over all views; 0 without views of corners."""
        total = depth.new_zeros(())
        for i, scene in enumerate(scenes):
            views = [view for view, of in enumerate(batch.view_scene) if of == i]
            if views and len(scene.tsdf_value):
                rows = make_index(views, depth.device)
                distances = (
                    scene.tsdf_position,
                    scene.tsdf_value,
                    depth[rows],
                    batch.camera[rows],
                    scene.resolution,
                )
                total = total + tsdf(*distances).sum()
        return total / max(len(batch.view_scene), 1)

    def show(self, scenes: Sequence[MeshScene], batch: Batch) -> dict[str, Tensor]:
        """Rows of a sample picture by name, the true one above ours: grey under a lamp, normals,
        colours.
        """
        white = batch.image.new_ones(len(batch.image), 3)
        true = truth(batch)
        ours = models.render(scenes, batch.camera, batch.view_scene, white)
        return {
            "truth\nshaded": shaded(true, batch.camera),
            "ours\nshaded": shaded(ours, batch.camera),
            "truth\nnormals": true.normal,
            "ours\nnormals": ours.normal,
            "truth\ncolours": composite(batch.image, white),
            "ours\ncolours": ours.color,
        }

    def measure(self, decoders: Mapping[str, Callable], objects: Objects) -> tuple[dict, str]:
        """Scores of the surface on held-out views by decoder and group of objects; their table."""
        groups = {group: names for group, names in objects.groups.items() if names}
        scores = {
            name: {
                group: geometry(decode, [objects.views(n, "holdout") for n in names])
                for group, names in groups.items()
            }
            for name, decode in decoders.items()
        }
        head = "surface: mask IoU, normal PSNR in dB and mean depth error in voxels where both are:"
        lines = [head, " " * 12 + "".join(f"{group:>32}" for group in groups)]
        for name, row in scores.items():
            cells = (f"{s.iou:.3f}  {s.normal:.2f}  {s.depth:.3f}" for s in row.values())
            lines.append(f"{name:<12}" + "".join(f"{cell:>32}" for cell in cells))
        return {
            name: {group: asdict(s) for group, s in row.items()} for name, row in scores.items()
        }, "\n".join(lines)


def shaded(image: Image, camera: Camera) -> Tensor:
    """Grey surfaces under a lamp beside the camera, on white: [V, 3, H, W]."""
    # the camera's y is down
    lamp = F.normalize(image.normal.new_tensor(LAMP), dim=0) * image.normal.new_tensor([1, -1, -1])
    towards = (lamp @ camera.extrinsics[:, :3, :3])[:, :, None, None]  # world axes
    lit = ((2 * image.normal - 1) * towards).sum(1, keepdim=True).clamp(min=0)
    return ((0.2 + 0.75 * lit) * image.alpha + 1 - image.alpha).expand(-1, 3, -1, -1)


def _fields(image: Image) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    color = image.alpha if image.color is None else image.color
    return color, image.alpha, image.depth, image.normal


@dataclass(frozen=True)
class Geometry:
    """A surface beside the true one, means over `pictures` views."""

    iou: float  # of the masks
    normal: float  # PSNR in dB of the normals towards the camera, where both surfaces are
    depth: float  # mean distance along the view axis there, in voxels
    pictures: int


@torch.no_grad()
def geometry(decode: Callable[[Batch], list[MeshScene]], batches: Sequence[Batch]) -> Geometry:
    """Compare what `decode` makes of the views of each batch (of one object) with the true mesh."""
    ious, normals, depths = [], [], []
    for batch in batches:
        scenes, true = decode(batch), truth(batch)
        image = models.render(
            scenes, batch.camera, batch.view_scene, batch.image.new_zeros(len(batch.image), 3)
        )
        ours, theirs = image.alpha > 0.5, true.alpha > 0.5
        both = ours & theirs
        ious.append(both.sum((1, 2, 3)) / (ours | theirs).sum((1, 2, 3)).clamp(min=1))
        normals.append(psnr(face_camera(image.normal, batch.camera), true.normal, both))
        error = ((image.depth - true.depth).abs() * both).sum((1, 2, 3)) / both.sum((1, 2, 3))
        depths.append(error * scenes[0].resolution / models.mesh.SUBDIVIDED)
    iou, normal, depth = (torch.cat(values) for values in (ious, normals, depths))
    return Geometry(iou.mean().item(), normal.nanmean().item(), depth.nanmean().item(), len(iou))
