"""Losses and scores of surfaces: a decoded mesh against V views of the true mesh.

The truth is the dataset's mesh.ply, drawn by the same rasterizer as the decoded mesh: coverage,
depth, and normals turned to the camera, for files disagree on which way faces turn. Terms are
those of microsoft/TRELLIS (slat_vae_dec_mesh); their weights are in train.mesh.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

import models
from kernels import Camera, Image, face_camera, make_index, render_mesh
from models import MeshScene
from train.data.batch import Batch
from train.data.objects import Objects
from train.losses.pictures import Reconstruction, composite, psnr, smooth_l1

TRUNCATION = 3.0  # cubes on either side of the true surface in which signed distances are compared
LAMP = (0.4, 0.75, 0.55)  # of shaded pictures: the way to it in camera axes (right, up, back)


@torch.no_grad()
def truth(batch: Batch) -> Image:
    """Render the true meshes from the batch's views.

    The picture has alpha, depth (0 in the background) and normals turned to the camera.
    """
    m = batch.meshes
    image = render_mesh(
        m.vertices, m.faces, None, m.vertex_starts, m.face_starts, batch.camera, batch.view_scene
    )
    return Image(None, image.alpha, image.depth, face_camera(image.normal, batch.camera))


def tsdf(position: Tensor, value: Tensor, depth: Tensor, camera: Camera, resolution: int) -> Tensor:
    """Squared error of signed distances along each view's rays: [V].

    They are compared with the truncated distance to the true surface. position [T, 3], value [T]
    negative inside, depth [V, 1, H, W] true camera depth, 0 in the background. Corners that lie
    farther than the truncation behind the surface, or project onto the background, do not count; a
    view where none is left gives 0.
    """
    limit = TRUNCATION / resolution
    uv, z = camera.project(position.detach())
    # published: align_corners, though uv is measured from the picture's edge and not from the
    # middle of its first pixel
    grid = rearrange(2 * uv - 1, "v t xy -> v 1 t xy")
    surface = F.grid_sample(depth, grid, padding_mode="border", align_corners=True)
    surface = rearrange(surface, "v 1 1 t -> v t")
    ahead = surface - z
    kept = ahead > -limit
    error = (value - ahead.clamp(-limit, limit)).square() * kept
    return error.sum(1) / kept.sum(1).clamp(min=1)


class SurfaceLoss(nn.Module):
    """The loss of meshes: coverage, depth, normals, colours and signed distances."""

    meshes = True

    def __init__(self, lpips: str | Path | None = None):
        super().__init__()
        self.reconstruction = Reconstruction(lpips)

    def forward(
        self,
        scenes: Sequence[MeshScene],
        batch: Batch,
        background: Tensor,
        offset: Tensor | None = None,  # of radiance fields alone
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Loss terms by name, unweighted, and the mean PSNR of the colours.

        All is compared on black; `background` [V, 3] only gives type and device. Views of a scene
        without a surface add 0 to the terms of pictures, which stay means over all views, so that
        no object's gradient depends on another's surface; its regularizer and signed distances
        count.
        """
        black = torch.zeros_like(background)
        true = truth(batch)
        image = models.render(scenes, batch.camera, batch.view_scene, black)
        target = composite(batch.image, black)
        seen = [view for view, scene in enumerate(batch.view_scene) if len(scenes[scene].faces)]
        resolution = scenes[0].resolution
        if len(seen) == len(batch.view_scene):
            terms = self.pictures(image, true, target, resolution)
        else:
            rows = make_index(seen, true.depth.device)
            target_seen = target.index_select(0, rows)
            terms = self.pictures(_views(image, rows), _views(true, rows), target_seen, resolution)
            share = len(seen) / len(batch.view_scene)
            terms = {name: value * share for name, value in terms.items()}
        if not seen:
            terms = {name: torch.zeros_like(value) for name, value in terms.items()}
        terms["tsdf"] = self.distances(scenes, batch, true.depth)
        shown = image.color.detach().clamp(0, 1)
        return terms | models.penalties(scenes), psnr(shown, target).mean()

    def pictures(
        self, image: Image, true: Image, target: Tensor, resolution: int
    ) -> dict[str, Tensor]:
        """Terms of coverage, depth, normals and colours.

        `target` [V, 3, H, W] are the true colours on black. Depth and normals count where the true
        mesh is, by its coverage.
        """
        mask = true.alpha
        terms = {"mask": (image.alpha - mask).abs().mean()}
        terms["depth"] = smooth_l1(image.depth * mask, true.depth * mask, 1 / (2 * resolution))
        normal = self.reconstruction(image.normal * mask, true.normal * mask)
        terms |= {f"normal_{name}": value for name, value in normal.items()}
        return terms | self.reconstruction(image.color, target)

    def distances(self, scenes: Sequence[MeshScene], batch: Batch, depth: Tensor) -> Tensor:
        """Average `tsdf` over all views; 0 without views of corners."""
        total = depth.new_zeros(())
        for i, scene in enumerate(scenes):
            views = [view for view, of in enumerate(batch.view_scene) if of == i]
            if views and len(scene.tsdf_value):
                rows = make_index(views, depth.device)
                error = tsdf(
                    scene.tsdf_position,
                    scene.tsdf_value,
                    depth[rows],
                    batch.camera[rows],
                    scene.resolution,
                )
                total = total + error.sum()
        return total / max(len(batch.view_scene), 1)

    def show(self, scenes: Sequence[MeshScene], batch: Batch) -> dict[str, Tensor]:
        """Rows of a sample picture by name: grey under a lamp, normals, colours."""
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
        """Score surfaces on held-out views, by decoder and group of objects; with their table."""
        groups = {group: names for group, names in objects.groups.items() if names}
        scores = {
            name: {
                group: score_surfaces(decode, [objects.views(n, "holdout") for n in names])
                for group, names in groups.items()
            }
            for name, decode in decoders.items()
        }
        head = "surface: mask IoU, normal PSNR in dB and mean depth error in voxels where both are:"
        lines = [head, " " * 12 + "".join(f"{group:>32}" for group in groups)]
        for name, row in scores.items():
            cells = (f"{s.iou:.3f}  {s.normal:.2f}  {s.depth:.3f}" for s in row.values())
            lines.append(f"{name:<12}" + "".join(f"{cell:>32}" for cell in cells))
        values = {
            name: {group: asdict(s) for group, s in row.items()} for name, row in scores.items()
        }
        return values, "\n".join(lines)


def shaded(image: Image, camera: Camera) -> Tensor:
    """Shade surfaces grey under a lamp beside the camera, on white: [V, 3, H, W]."""
    # the camera's y is down
    lamp = F.normalize(image.normal.new_tensor(LAMP), dim=0) * image.normal.new_tensor([1, -1, -1])
    towards = lamp @ camera.extrinsics[:, :3, :3]  # [V, 3], world axes
    cosine = (2 * image.normal - 1) * rearrange(towards, "v xyz -> v xyz 1 1")
    lit = reduce(cosine, "v xyz h w -> v 1 h w", "sum").clamp(min=0)
    return ((0.2 + 0.75 * lit) * image.alpha + 1 - image.alpha).expand(-1, 3, -1, -1)


def _views(image: Image, rows: Tensor) -> Image:
    """Some views of a picture; the true one has no colours."""
    pick = lambda t: None if t is None else t.index_select(0, rows)
    return Image(pick(image.color), pick(image.alpha), pick(image.depth), pick(image.normal))


@dataclass(frozen=True)
class SurfaceScore:
    """Scores of a surface beside the true one, means over `pictures` views."""

    iou: float  # of the masks
    normal: float  # PSNR in dB of the normals towards the camera, where both surfaces are
    depth: float  # mean distance along the view axis there, in voxels
    pictures: int


@torch.no_grad()
def score_surfaces(
    decode: Callable[[Batch], list[MeshScene]], batches: Sequence[Batch]
) -> SurfaceScore:
    """Score the surfaces that `decode` makes of each batch, of one object, by its true mesh."""
    ious = []
    normals = []
    depths = []
    for batch in batches:
        scenes = decode(batch)
        true = truth(batch)
        black = batch.image.new_zeros(len(batch.image), 3)
        image = models.render(scenes, batch.camera, batch.view_scene, black)
        ours = image.alpha > 0.5
        theirs = true.alpha > 0.5
        both = ours & theirs
        ious.append(_total(both) / _total(ours | theirs).clamp(min=1))
        normals.append(psnr(face_camera(image.normal, batch.camera), true.normal, both))
        error = _total((image.depth - true.depth).abs() * both) / _total(both)
        depths.append(error * scenes[0].resolution / models.mesh.SUBDIVIDED)
    iou = torch.cat(ious)
    normal = torch.cat(normals)
    depth = torch.cat(depths)
    return SurfaceScore(
        iou.mean().item(), normal.nanmean().item(), depth.nanmean().item(), len(iou)
    )


def _total(pixels: Tensor) -> Tensor:
    """Sum over the pixels of each view: [V]."""
    return reduce(pixels, "v 1 h w -> v", "sum")
