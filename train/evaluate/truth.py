"""True pictures of a dataset's objects, from the cameras of a protocol.

A dataset's mesh.ply holds positions and triangles alone, so colours come from the mesh that it was
prepared from, which is known by its content hash; or the held-out views are the truth themselves.
"""

import importlib.util
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels import Camera
from models.reading import check_file
from train.data.batch import Item
from train.data.dataset import Dataset
from train.data.metadata import inside
from train.data.readers import picture_size, read_frames
from train.evaluate.protocols import MESH, Protocol
from train.meshes.files import below
from train.meshes.read import content_hash, normalize, read_mesh
from train.meshes.surface import Mesh
from train.prepare.raycast import FOV, Caster

CLOSE = 1e-3  # world units, or relative: what files with six digits leave


def poses(camera: Camera) -> np.ndarray:
    """Blender poses [V, 4, 4] of cameras: camera to world, looking along -z, y up."""
    inverse = torch.linalg.inv(camera.extrinsics.double().cpu()).numpy()
    return inverse * [1.0, -1.0, -1.0, 1.0]


class Truth:
    """The true pictures and meshes of the objects of `dataset`, which reads held-out views.

    `meshes` is the folder that local_path is relative to; without it that of the dataset.
    """

    def __init__(self, protocol: Protocol, dataset: Dataset, meshes: Path | None):
        self.protocol = protocol
        self.dataset = dataset
        self.meshes = meshes
        self.cast = protocol.colors and protocol.truth == MESH

    def check(self, names: list[str], surfaces: bool) -> None:
        """Raise ValueError where objects lack what they are scored by, naming the first.

        `surfaces` says whether the true surface is wanted. Meshes are not read here.
        """
        if self.cast and importlib.util.find_spec("embreex") is None:
            raise ValueError("casting true pictures needs embreex: pip install '.[prepare]'")
        if self.protocol.yaw and self.protocol.colors and not self.cast:
            for name in names:
                self._check_views(name)
        wanted = [("mesh.ply", self.surface_file)] if surfaces else []
        if self.cast:
            wanted.append(("source mesh", self.source_file))
        for what, file_of in wanted:
            absent = [name for name in names if not file_of(name).is_file()]
            if not absent:
                continue
            first = absent[0]
            advice = ""
            if what == "source mesh":
                advice = (
                    ", and mesh.ply holds no colours: --meshes FOLDER is where train.prepare read "
                    "them; or --truth views, the dataset's held-out views"
                )
            raise ValueError(
                f"{len(absent)} of {len(names)} objects have no {what}, the first is "
                f"{self.dataset.title(first)} ({first[:12]}...): {file_of(first)} is not "
                f"there{advice}"
            )

    def surface_file(self, name: str) -> Path:
        """The file of an object's prepared mesh."""
        return self.dataset.place(name)[0] / "renders" / name / "mesh.ply"

    def source_file(self, name: str) -> Path:
        """The file that an object was prepared from."""
        root, local = self.dataset.place(name)
        if not local:
            raise ValueError(f"{root / 'metadata.csv'}: {name} has no local_path of its mesh")
        home = self.meshes or root
        return below(home, inside(home, local))

    def pictures(self, item: Item) -> Tensor:
        """The true pictures [V, 4, size, size] of an object, straight alpha.

        They are cast from its source mesh. Raises ValueError that names the file where it is not
        the mesh of this object.
        """
        return self._cast(self._source(item), self.protocol.camera(torch.device("cpu")))

    def views_again(self, item: Item) -> Tensor | None:
        """Cast the held-out views of an object again: [V, 4, size, size].

        None where they are of another angle than the renderer's.
        """
        focal = 0.5 / math.tan(FOV / 2)
        if (item.camera.intrinsics[:, 0, 0] / focal - 1).abs().max() > CLOSE:
            return None
        return self._cast(self._source(item), item.camera)

    def _cast(self, mesh: Mesh, camera: Camera) -> Tensor:
        caster = Caster(mesh)
        size = self.protocol.size
        images = [caster.render(p, size, self.protocol.supersample)[0] for p in poses(camera)]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255

    def _source(self, item: Item) -> Mesh:
        file = self.source_file(item.name)
        check_file(file)
        home = self.meshes or self.dataset.place(item.name)[0]
        own = content_hash(file, home)
        if own != item.name:
            raise ValueError(
                f"{file} is not the mesh of object {item.name[:12]}...: its content has the hash "
                f"{own[:12]}..."
            )
        mesh = read_mesh(file, home)
        normalize(mesh)
        mesh.vertices = mesh.vertices.astype(np.float32).astype(np.float64)  # as it was prepared
        if item.mesh is not None:
            for what, own, prepared in (
                ("least", mesh.vertices.min(0), item.mesh[0].numpy().min(0)),
                ("largest", mesh.vertices.max(0), item.mesh[0].numpy().max(0)),
            ):
                if np.abs(own - prepared).max() > CLOSE:
                    raise ValueError(
                        f"{file} has the {what} coordinates {own.round(4).tolist()} in the unit "
                        f"cube, but {self.surface_file(item.name)} {prepared.round(4).tolist()}"
                    )
        return mesh

    def _check_views(self, name: str) -> None:
        """Raise ValueError for held-out views that are not the protocol's cameras and size."""
        protocol = self.protocol
        root = self.dataset.place(name)[0]
        place = root / "renders" / name
        frames = read_frames(place / "transforms.json", root)
        width, _ = picture_size(frames.files[-1])
        if width < protocol.size:
            raise ValueError(
                f"{place}: views are {width} pixels wide, {protocol.name} compares "
                f"{protocol.size}: --size {width} says so in its name"
            )
        held_out = range(len(frames.files) - self.dataset.holdout_views, len(frames.files))
        for what, values, wanted in (
            ("radius", np.linalg.norm(frames.matrix[:, :3, 3], axis=1), protocol.radius),
            ("field of view", np.rad2deg(frames.fov), protocol.fov),
        ):
            for frame in held_out:
                if abs(values[frame] / wanted - 1) > CLOSE:
                    raise ValueError(
                        f"{place}: held-out view {frame} has the {what} {values[frame]:.4g}, but "
                        f"{protocol.name} {wanted:g}"
                    )
