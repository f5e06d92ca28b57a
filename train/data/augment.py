"""Random changes of an object that its data describe exactly: other colours, other axes.

A training object is shown as if another had been prepared: its voxels, their `rgb` features
(train.prepare.voxelize has their table), its views, cameras and mesh change together. Rotations are
the 24 that map the grid onto itself; a camera turns with the object, so its pictures stay what they
are. Colours go through one affine map for features and pictures, which commutes with averaging,
with rendering and with compositing on any background: neither is ever clipped.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kernels import Camera
from train.data.batch import Item
from train.data.readers import CHANNELS
from train.data.rgb import HALVES, split_rgb

KINDS = {
    "none": "objects as they are",
    "colour": "other colours, of every second object",
    "rotate": "one of 24 rotations",
    "both": "a rotation, and other colours of every second object",
}
LEAST_RANGE = 0.4  # between what black and what white become, in each channel


@cache
def rotations() -> Tensor:
    """List the rotations of the cube, the identity first: [24, 3, 3] int64."""
    found = []
    for axes in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            matrix = torch.zeros(3, 3, dtype=torch.int64)
            matrix[range(3), axes] = torch.tensor(signs)
            if torch.linalg.det(matrix.double()) > 0:
                found.append(matrix)
    return torch.stack(found)


@dataclass(frozen=True, eq=False)
class Augmentation:
    """A change of one object.

    A colour c becomes `gain` c[`channels`] + `offset`, which stays in [0, 1]; a point p becomes
    `rotation` p.
    """

    channels: Tensor  # [3] int64, a permutation
    gain: Tensor  # [3] float32
    offset: Tensor  # [3] float32
    rotation: Tensor  # [3, 3] int64, of `rotations`

    @classmethod
    def draw(cls, kind: str, seed: int, draw: int, index: int) -> "Augmentation":
        """Draw the change of object `index` in epoch `draw`; `kind` is one of KINDS.

        It depends on nothing else: neither on the order of objects nor on the number of ranks.
        """
        rng = np.random.default_rng([seed, draw, index, 1])  # 1: not the stream of the views
        channels = rng.permutation(3)
        ends = rng.uniform(0, 1, (3, 2))  # what black and white become
        near = np.abs(ends[:, 1] - ends[:, 0]) < LEAST_RANGE
        ends[near] = rng.permuted(np.tile([0.0, 1.0], (int(near.sum()), 1)), axis=1)
        turn = int(rng.integers(len(rotations())))
        # colours as they are stay in: they are what the model will meet
        if rng.random() < 0.5 or kind not in ("colour", "both"):
            channels = np.arange(3)
            ends = np.array([[0.0, 1.0]] * 3)
        if kind not in ("rotate", "both"):
            turn = 0
        return cls(
            torch.from_numpy(channels),
            torch.from_numpy(ends[:, 1] - ends[:, 0]).float(),
            torch.from_numpy(ends[:, 0]).float(),
            rotations()[turn],
        )

    def item(self, item: Item, resolution: int) -> Item:
        """Change an object of a `resolution`^3 grid; its voxels stay in lexicographic order.

        Raises ValueError for features that are not those of train.prepare.voxelize.
        """
        if (found := item.features.shape[1]) != CHANNELS["rgb"]:
            raise ValueError(
                f"object {item.name} has {found} channels of features; --augment changes rgb "
                f"features, which have {CHANNELS['rgb']}"
            )
        corner = resolution - 1
        coords = ((2 * item.coords - corner) @ self.rotation.int().T + corner) // 2
        order = torch.from_numpy(np.lexsort(coords.T.flip(0).numpy()))
        mesh = item.mesh
        if mesh is not None:
            mesh = mesh[0] @ self.rotation.to(mesh[0]).T, mesh[1]
        return replace(
            item,
            coords=coords[order].contiguous(),
            features=self.features(item.features)[order],
            camera=self.camera(item.camera),
            image=self.image(item.image),
            mesh=mesh,
        )

    def color(self, color: Tensor) -> Tensor:  # [..., 3] -> [..., 3]
        """Map colours."""
        return color[..., self.channels] * self.gain + self.offset

    def image(self, image: Tensor) -> Tensor:  # [V, 4, H, W] -> [V, 4, H, W]
        """Map the colours of pictures of straight alpha."""
        color = self.color(rearrange(image[:, :3], "v c h w -> v h w c"))
        return torch.cat([rearrange(color, "v h w c -> v c h w"), image[:, 3:]], 1)

    def camera(self, camera: Camera) -> Camera:
        """Turn cameras with the object."""
        turned = camera.extrinsics.clone()
        turned[:, :3, :3] = camera.extrinsics[:, :3, :3] @ self.rotation.to(turned).T
        return replace(camera, extrinsics=turned)

    def features(self, features: Tensor) -> Tensor:  # [N, 50] -> [N, 50]
        """Change the `rgb` features of voxels; what no view saw keeps its zeros."""
        color, normal, offset, seen, sub_color, sub_seen, occupied = split_rgb(features)
        matrix = self.rotation.to(features).T
        # where the half that turns into half s was
        source = (HALVES @ self.rotation + 1) // 2 @ torch.tensor([4, 2, 1])
        sub_color = rearrange(sub_color, "n (s c) -> n s c", c=3)[:, source]
        sub_seen = sub_seen[:, source]
        parts = [
            self._seen(color, seen),
            normal @ matrix,
            offset @ matrix,
            seen,
            rearrange(self._seen(sub_color, sub_seen[..., None]), "n s c -> n (s c)"),
            sub_seen,
            occupied[:, source],
        ]
        return torch.cat(parts, 1)

    def _seen(self, color: Tensor, seen: Tensor) -> Tensor:  # [..., 3], [..., 1] -> [..., 3]
        """Map mean colours, but for those of nothing: zeros that no view saw."""
        nothing = (seen == 0) & (color == 0).all(-1, keepdim=True)
        return torch.where(nothing, 0, self.color(color))


def check_augment(kind: str, features: str) -> None:
    """Raise ValueError for an unknown kind, and for features that it cannot change exactly."""
    if kind not in KINDS:
        raise ValueError(f"augment {kind!r} is not one of {', '.join(KINDS)}")
    if kind != "none" and features != "rgb":
        raise ValueError(
            f"augment {kind} is exact for rgb features alone: those of {features!r} would have "
            "to be made again from changed views"
        )
