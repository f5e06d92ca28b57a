"""Objects in memory: an item, and several as a batch, voxels in one list and views in another."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Camera


@dataclass(frozen=True)
class Meshes:
    """The true surfaces of several objects, one after the other."""

    vertices: Tensor  # [P, 3] float32, world units
    faces: Tensor  # [F, 3] int32, rows of the object's own vertices
    vertex_starts: list[int]  # [batch_size + 1]
    face_starts: list[int]

    def part(self, first: int, last: int) -> "Meshes":
        """The surfaces of the objects first : last."""
        vertex = self.vertex_starts[first : last + 1]
        face = self.face_starts[first : last + 1]
        return Meshes(
            vertices=self.vertices[vertex[0] : vertex[-1]],
            faces=self.faces[face[0] : face[-1]],
            vertex_starts=[start - vertex[0] for start in vertex],
            face_starts=[start - face[0] for start in face],
        )


@dataclass(frozen=True)
class Item:
    """An object with some of its views."""

    name: str  # sha256
    coords: Tensor  # [N, 3] int32, lexicographic
    features: Tensor  # [N, C] float32
    camera: Camera  # of k views
    image: Tensor  # [k, 4, H, W] float32 in [0, 1], straight alpha
    # [P, 3] float32 and [F, 3] int32, where the dataset reads meshes
    mesh: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Batch:
    """Several objects, their voxels in one list, their views in another.

    Raises ValueError for coords of another shape: the batch column comes first, and dropping it
    mixes up objects.
    """

    features: Tensor  # [N, C] float32
    coords: Tensor  # [N, 4] int32: object, x, y, z
    batch_size: int  # objects
    camera: Camera  # of V views
    view_scene: list[int]  # [V]: which object a view shows
    image: Tensor  # [V, 4, H, W] float32 RGBA in [0, 1], straight alpha
    names: list[str]  # [batch_size]: sha256
    meshes: Meshes | None = None  # where the dataset reads them

    def __post_init__(self) -> None:
        shape = list(self.coords.shape)
        if len(shape) != 2 or shape[1] != 4:
            hint = ""
            if shape[1:] == [3]:
                hint = (
                    " (the batch column is missing: torch.nn.functional.pad(coords, (1, 0), "
                    "value=b) puts object b before x, y, z)"
                )
            raise ValueError(f"coords must be [N, 4], not {shape}{hint}")
        if len(self.features) != shape[0]:
            raise ValueError(f"{len(self.features)} rows of features but {shape[0]} of coords")
        if not len(self.image) == len(self.camera) == len(self.view_scene):
            raise ValueError(
                f"{len(self.image)} images, {len(self.camera)} cameras, {len(self.view_scene)} "
                "scenes of views"
            )

    def _each(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        camera = replace(
            self.camera,
            extrinsics=move(self.camera.extrinsics),
            intrinsics=move(self.camera.intrinsics),
        )
        moved = {name: move(getattr(self, name)) for name in ("features", "coords", "image")}
        m = self.meshes
        meshes = None if m is None else replace(m, vertices=move(m.vertices), faces=move(m.faces))
        return replace(self, camera=camera, meshes=meshes, **moved)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Move the tensors to `device`; lists stay on the host."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def views_of(self, first: int, last: int) -> slice:
        """The views of the objects first : last.

        ValueError where the views do not stand in the order of their objects.
        """
        if self.view_scene != sorted(self.view_scene):
            raise ValueError(f"views of objects {self.view_scene} are not in the objects' order")
        return slice(bisect_left(self.view_scene, first), bisect_left(self.view_scene, last))

    def part(self, first: int, last: int, voxels: slice) -> "Batch":
        """The objects first : last, whose voxels are those rows: a batch of its own."""
        views = self.views_of(first, last)
        coords = self.coords[voxels].clone()
        coords[:, 0] -= first
        m = self.meshes
        return Batch(
            features=self.features[voxels],
            coords=coords,
            batch_size=last - first,
            camera=self.camera[views],
            view_scene=[scene - first for scene in self.view_scene[views]],
            image=self.image[views],
            names=self.names[first:last],
            meshes=None if m is None else m.part(first, last),
        )

    def pin_memory(self) -> "Batch":
        """Copy the tensors to pinned memory, from where a GPU reads on its own."""
        return self._each(Tensor.pin_memory)


def collate(items: Sequence[Item]) -> Batch:
    """Join items to a batch, and add the batch column.

    Raises ValueError that names both objects where their channels or views differ.
    """
    if not items:
        raise ValueError("a batch needs at least one object")
    first = items[0]
    for item in items[1:]:
        for what, a, b in (
            ("channels", first.features.shape[1], item.features.shape[1]),
            ("pixels a side", first.camera.width, item.camera.width),
        ):
            if a != b:
                raise ValueError(f"object {first.name} has {a} {what}, but {item.name} has {b}")
    coords = [F.pad(item.coords, (1, 0), value=i) for i, item in enumerate(items)]
    camera = replace(
        first.camera,
        extrinsics=torch.cat([item.camera.extrinsics for item in items]),
        intrinsics=torch.cat([item.camera.intrinsics for item in items]),
    )
    return Batch(
        features=torch.cat([item.features for item in items]),
        coords=torch.cat(coords),
        batch_size=len(items),
        camera=camera,
        view_scene=[i for i, item in enumerate(items) for _ in range(len(item.image))],
        image=torch.cat([item.image for item in items]),
        names=[item.name for item in items],
        meshes=None if first.mesh is None else _join_meshes([item.mesh for item in items]),
    )


def _join_meshes(meshes: Sequence[tuple[Tensor, Tensor]]) -> Meshes:
    vertices = [vertices for vertices, _ in meshes]
    faces = [faces for _, faces in meshes]
    return Meshes(
        vertices=torch.cat(vertices),
        faces=torch.cat(faces),
        vertex_starts=[0, *accumulate(map(len, vertices))],
        face_starts=[0, *accumulate(map(len, faces))],
    )
