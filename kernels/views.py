"""Which view sees which Gaussians. V views, B scenes, G Gaussians, P pairs of a view and a Gaussian
of its scene.

A pair's index is pair_start[view] + (Gaussian - first Gaussian of the scene), so a view never sees
another scene, P is known on the host, and no [V, G] array exists.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# floats of a packed Gaussian: center 3, scale 3, rotation wxyz 4, opacity 1, colour coefficients 3
GAUSSIAN = 14
# floats of a projected one: mean 2 (px), conic 3 (11, 12, 22), blended opacity 1, colour 3
RECORD = 9
TILE = 16  # pixels along a side of a tile


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


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on a device, which is not waited for."""
    if device.type != "cpu":
        table = table.pin_memory()  # from pageable memory the copy would wait
    return table.to(device, non_blocking=True)


@torch.library.custom_op("trislat::table", mutates_args=())
def _table(numbers: list[int], columns: int, device: torch.device) -> Tensor:
    table = torch.tensor(numbers, dtype=torch.int64)
    return to_device(table.view(-1, columns), device)


@_table.register_fake
def _(numbers, columns, device):
    return torch.empty(len(numbers) // columns, columns, dtype=torch.int64, device=device)


def make_table(numbers: list[int], columns: int, device: torch.device) -> Tensor:
    """The host's numbers, `columns` to a row, as int64 on a device, which is not waited for.
    torch.compile keeps it whole: pinned memory cannot be traced.
    """
    return torch.ops.trislat.table(numbers, columns, device)


def make_index(rows: list[int], device: torch.device) -> Tensor:
    """The host's numbers [n] int64 on a device, which is not waited for; a list as an index would
    be copied, which waits.
    """
    return make_table(rows, 1, device).view(-1)


def make_layout(starts: list[int], view_scene: list[int], device: torch.device) -> Layout:
    """The Layout of B scenes and V views. Does not wait for the device."""
    count = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    pair_start, views, scenes, by_scene = [0], [], [], []
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


@dataclass(frozen=True, eq=False)
class Projected:
    """P pairs on their screens."""

    record: Tensor  # [P, 9]: mean (px), conic, blended opacity, colour
    depth: Tensor  # [P] camera z
    rect: Tensor  # [P, 4] int32: tiles x0, y0, x1, y1; x1 <= x0 or y1 <= y0: not drawn
    view: Tensor  # [P] int32
