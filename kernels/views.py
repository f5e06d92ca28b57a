"""Which view sees which Gaussians. V views, B scenes, G Gaussians, P pairs of a view and a Gaussian
of its scene.

A pair's index is pair_start[view] + (Gaussian - first Gaussian of the scene), so a view never sees
another scene, P is known on the host, and no [V, G] array exists.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.transfer import make_index


@dataclass(frozen=True, eq=False)
class Layout:
    """Which view sees which Gaussians: the host's lists, and the same as tables beside the
    Gaussians (one copy).
    """

    starts: list[int]  # [B + 1]
    view_scene: list[int]  # [V]
    pair_start: list[int]  # [V + 1]
    views: Tensor  # [V, 3] int64: first Gaussian, number of Gaussians, first pair
    # [B, 4] int64: first Gaussian, number of Gaussians, first entry of `by_scene`, number of views
    scenes: Tensor
    by_scene: Tensor  # [V] int64: views, grouped by scene

    @property
    def most(self) -> int:
        """Gaussians of the largest scene."""
        return max([0, *[b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]])


def make_layout(starts: list[int], view_scene: list[int], device: torch.device) -> Layout:
    """The Layout of B scenes and V views. Does not wait for the device."""
    count = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    pair_start = [0]
    views = []
    scenes = []
    by_scene = []
    for s in view_scene:
        views += [starts[s], count[s], pair_start[-1]]
        pair_start.append(pair_start[-1] + count[s])
    for s, n in enumerate(count):
        mine = [v for v, scene in enumerate(view_scene) if scene == s]
        scenes += [starts[s], n, len(by_scene), len(mine)]
        by_scene += mine
    table = make_index(views + scenes + by_scene, device)
    views, scenes, by_scene = table.split([len(views), len(scenes), len(by_scene)])
    return Layout(starts, view_scene, pair_start, views.view(-1, 3), scenes.view(-1, 4), by_scene)
