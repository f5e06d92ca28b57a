"""Scores of objects by a protocol: the checkpoint's, and those of floors and a ceiling."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import models
from kernels import Camera, Image, face_camera, render_mesh, ssim
from models import MeshScene, Scene, SparseTensor
from models.mesh import FAR, NEAR
from train import scores
from train.data.batch import Batch, Item, collate
from train.evaluate.protocols import SEED, Protocol
from train.evaluate.surfaces import surface_scores
from train.evaluate.truth import Truth
from train.losses.pictures import composite, psnr
from train.lpips import LPIPS
from train.run.machine import seed_all
from train.run.trained import Trained, check_scene

OURS = "trained"
UNTRAINED = "untrained"
SILHOUETTE = "silhouette in the mean colour"
AGAIN = "ceiling: the dataset's own views, cast again"
RESAMPLED = "ceiling: the true surface, drawn again"

Values = dict[str, float]


@dataclass(frozen=True)
class Record:
    """The scores of one object, by renderer and measure."""

    name: str  # sha256
    title: str
    split: str
    worst: int  # the view of the checkpoint's lowest PSNR
    scores: dict[str, Values]


def camera_normals(normal: Tensor, camera: Camera) -> Tensor:
    """Turn pictures of normals [V, 3, H, W], (n + 1) / 2 in world axes, to camera axes.

    All point away from the camera, as published; the background, 0.5, stays.
    """
    away = 1 - 2 * face_camera(normal, camera)
    return (torch.einsum("vij,vjhw->vihw", camera.extrinsics[:, :3, :3], away) + 1) / 2


class Evaluator:
    """Scores batches of objects by a protocol.

    `truth.dataset` reads them; `training` are some objects with a training view each, and `floors`
    says whether there are rows beside the checkpoint's. The same objects in a batch give the same
    bits.
    """

    def __init__(
        self,
        trained: Trained,
        protocol: Protocol,
        truth: Truth,
        training: Sequence[Item],
        lpips: LPIPS | None,
        device: torch.device,
        floors: bool = True,
    ):
        self.protocol = protocol
        self.truth = truth
        self.dataset = truth.dataset
        self.lpips = lpips
        self.device = device
        self.surface = trained.has_surface
        self.floors = floors
        self.decoders = {OURS: (trained.encoder, trained.decoder)}
        self.baselines: dict[str, scores.Renderer] = {}
        if floors:
            self.decoders[UNTRAINED] = _untrained(trained.encoder), _untrained(trained.decoder)
        if floors and protocol.colors:
            self.baselines[SILHOUETTE] = lambda batch: scores.fill(batch, batch)
            if trained.features == "rgb":
                few = [self._batch([item]) for item in training]
                size = scores.best_size(trained.resolution, few)
                row = f"one Gaussian a voxel, {size} wide"
                self.baselines[row] = scores.voxel_gaussians(trained.resolution, size)

    def _batch(self, items: Sequence[Item]) -> Batch:
        return collate(items).to(self.device)

    def _true(self, name: str) -> Item:
        """An object with the protocol's cameras and true pictures, black where there are none."""
        item = self.dataset.item(name)
        if not self.protocol.yaw or (self.protocol.colors and not self.truth.cast):
            return item  # with the dataset's held-out views
        camera = self.protocol.camera(torch.device("cpu"))
        if self.truth.cast:
            return replace(item, camera=camera, image=self.truth.pictures(item))
        size = self.protocol.size
        return replace(item, camera=camera, image=torch.zeros(len(camera), 4, size, size))

    def _decode(self, row: str, batch: Batch) -> list[Scene]:
        encoder, decoder = self.decoders[row]
        x = SparseTensor(batch.features, batch.coords, batch.batch_size)
        scenes = decoder(encoder(x).mode())
        for name, scene in zip(batch.names, scenes, strict=True):
            # the mean over pictures would pass over one that is not finite
            check_scene(scene, f"the {row} scene of object {name[:12]}...")
        return scenes

    def _draw(self, scenes: list[Scene], batch: Batch) -> Image:
        """Pictures on black, row for row with batch.image."""
        black = batch.image.new_zeros(len(batch.image), 3)
        if self.surface:
            ssaa = self.protocol.ssaa
            return MeshScene.render_batch(scenes, batch.camera, batch.view_scene, black, ssaa)
        return models.render(scenes, batch.camera, batch.view_scene, black)

    def _true_normals(self, batch: Batch) -> Tensor | None:
        """Pictures of the true normals, None where they are not compared."""
        if not (self.surface and self.protocol.normals):
            return None
        m = batch.meshes
        starts = m.vertex_starts, m.face_starts
        views = batch.camera, batch.view_scene, NEAR, FAR, self.protocol.ssaa
        drawn = render_mesh(m.vertices, m.faces, None, *starts, *views)
        return camera_normals(drawn.normal, batch.camera)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS of pictures [V, 3, H, W]: [V]; one by one, for one takes most of the memory."""
        each = zip(a.split(1), b.split(1), strict=True)
        return torch.cat([self.lpips(one, other) for one, other in each])

    def _pictures(
        self, image: Image, batch: Batch, true_normal: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Measures of each view by name, those of several backgrounds side by side: [V, n]."""
        found: dict[str, list[Tensor]] = {}
        add = lambda name, values: found.setdefault(name, []).append(values)
        alpha = batch.image[:, 3:]
        for grey in self.protocol.backgrounds if image.color is not None else ():
            plain = batch.image.new_full((len(alpha), 3), grey)
            target = composite(batch.image, plain)
            got = _on(image, grey)
            add("psnr", psnr(got, target))
            if self.protocol.inside:
                add("psnr_inside", psnr(got, target, alpha > 0.5))
            if self.protocol.similarity:
                add("ssim", ssim(got, target))
                if self.lpips is not None:
                    add("lpips", self._distance(got, target))
        if true_normal is not None and image.normal is not None:
            got = camera_normals(image.normal, batch.camera)
            add("normal_psnr", psnr(got, true_normal))
            if self.lpips is not None:
                add("normal_lpips", self._distance(got, true_normal))
        return {name: torch.stack(values, 1) for name, values in found.items()}

    def _surface(self, ours: tuple, item: Item, stream: int) -> Values:
        """Distances of a surface, vertices and faces, from the true one; points of a stream."""
        protocol = self.protocol
        own = int(item.name[:15], 16)
        try:
            return surface_scores(
                tuple(t.cpu().numpy() for t in ours),
                tuple(t.numpy() for t in item.mesh),
                protocol.samples,
                protocol.distances,
                protocol.squared,
                ([SEED, own, stream], [SEED, own, 0]),
                self.device,
                torch.get_num_threads(),
            )
        except ValueError as error:
            raise ValueError(f"{self.truth.surface_file(item.name)}: {error}") from error

    @torch.no_grad()
    def records(self, names: Sequence[str]) -> list[Record]:
        """Score objects, which are decoded and drawn together."""
        items = [self._true(name) for name in names]
        batch = self._batch(items)
        true_normal = self._true_normals(batch)
        measured = self.surface and self.protocol.samples
        rows: list[dict[str, Values]] = [{} for _ in names]
        worst = []
        for row in self.decoders:
            scenes = self._decode(row, batch)
            values = self._pictures(self._draw(scenes, batch), batch, true_normal)
            for i, item in enumerate(items):
                views = [v for v, scene in enumerate(batch.view_scene) if scene == i]
                own = {name: value[views] for name, value in values.items()}
                rows[i][row] = _means(own)
                if measured:
                    surface = scenes[i].vertices, scenes[i].faces
                    rows[i][row] |= self._surface(surface, item, 1)
                if row == OURS:
                    worst.append(int(next(iter(own.values())).mean(1).argmin()))
        for i, item in enumerate(items):
            rows[i] |= self._beside(item, measured)
        every = zip(names, worst, rows, strict=True)
        return [
            Record(name, self.dataset.title(name), self.dataset.split_of(name), view, own)
            for name, view, own in every
        ]

    def _beside(self, item: Item, measured: bool) -> dict[str, Values]:
        """The rows of an object that no decoder makes."""
        batch = self._batch([item])
        rows = {
            row: _means(self._pictures(render(batch), batch))
            for row, render in self.baselines.items()
        }
        if self.floors and self.truth.cast:
            held_out = self.dataset.item(item.name)
            again = self.truth.views_again(held_out)
            if again is not None:
                color, alpha = again.to(self.device).split([3, 1], dim=1)
                views = self._batch([held_out])
                rows[AGAIN] = _means(self._pictures(Image(color * alpha, alpha), views))
        if self.floors and measured:
            rows[RESAMPLED] = self._surface(item.mesh, item, 2)
        return rows

    @torch.no_grad()
    def shown(self, name: str, view: int) -> tuple[Tensor, Tensor]:
        """The true picture and the checkpoint's of a view [3, H, W]: colours, else normals."""
        batch = self._batch([self._true(name)])
        image = self._draw(self._decode(OURS, batch), batch)
        if self.protocol.colors and image.color is not None:
            grey = self.protocol.backgrounds[0]
            plain = batch.image.new_full((len(batch.image), 3), grey)
            both = composite(batch.image, plain), _on(image, grey)
        else:
            both = self._true_normals(batch), camera_normals(image.normal, batch.camera)
        return tuple(pictures[view].cpu() for pictures in both)


def _on(image: Image, grey: float) -> Tensor:
    """Lay pictures that were drawn on black on a grey background: [V, 3, H, W] in [0, 1]."""
    return (image.color + grey * (1 - image.alpha)).clamp(0, 1)


def _untrained(part: nn.Module) -> nn.Module:
    """A model of the same sizes before training, on the same device."""
    device = next(part.parameters()).device
    seed_all(0)
    return type(part)(**part.args).to(device).eval().requires_grad_(False)


def _means(values: dict[str, Tensor]) -> Values:
    """Means over views and backgrounds; views without a value do not count."""
    return {name: value.nanmean().item() for name, value in values.items()}
