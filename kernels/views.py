"""Views of scenes: tables and checks that the ops on V views of B scenes share.

G rows (Gaussians, voxels or vertices) belong to the scenes, P pairs are a view and a row of its
scene. The index of a pair is pair_start[view] + (row - first row of the scene). So a view never
sees another scene, P is known on the host, and there is no array [V, G].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import make_index
from kernels.checks import Host, host_list, wide_dtype

# the constant spherical harmonic: colour = SH0 * coefficient + 0.5
SH0 = 0.28209479177387814


@dataclass(frozen=True, eq=False)
class ViewTable:
    """The rows that each view sees: lists on the host, and the same as tables on the device."""

    starts: list[int]  # [B + 1]
    view_scene: list[int]  # [V]
    pair_start: list[int]  # [V + 1]
    views: Tensor  # [V, 3] int64: first row, number of rows, first pair
    # [B, 4] int64: first row, number of rows, first entry of `by_scene`, number of views
    scenes: Tensor
    by_scene: Tensor  # [V] int64: views, grouped by scene

    @property
    def most(self) -> int:
        """Number of rows of the largest scene."""
        return max([0, *_lengths(self.starts)])


def make_view_table(starts: list[int], view_scene: list[int], device: torch.device) -> ViewTable:
    """Return the ViewTable of B scenes and V views. Does not wait for the device."""
    count = _lengths(starts)
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
    return ViewTable(
        starts, view_scene, pair_start, views.view(-1, 3), scenes.view(-1, 4), by_scene
    )


def count_pairs(starts: list[int], view_scene: list[int]) -> int:
    """Return P, the number of pairs of a view and a row of its scene."""
    first = [*starts, 0]
    return sum(first[s + 1] - first[s] for s in view_scene)


def _lengths(starts: list[int]) -> list[int]:
    return [b - a for a, b in zip(starts, starts[1:], strict=False)]


def check_scenes(
    starts: Host, rows: int, what: str, view_scene: Host, views: int
) -> tuple[list[int], list[int]]:
    """Return `starts` and `view_scene` as lists; `what` is the name of the rows in messages.

    Raises ValueError: starts that do not rise from 0 to `rows`; a view_scene of another length than
    `views`, or with a scene that is not there. TypeError: no list of numbers.
    """
    starts = host_list("starts", starts)
    view_scene = host_list("view_scene", view_scene)
    falls = any(n < 0 for n in _lengths(starts))
    if not starts or starts[0] != 0 or starts[-1] != rows or falls:
        raise ValueError(f"starts must rise from 0 to the {rows} {what}, not be {starts}")
    if len(view_scene) != views:
        raise ValueError(f"view_scene names {len(view_scene)} scenes for {views} views")
    for s in view_scene:
        if not 0 <= s < len(starts) - 1:
            raise ValueError(f"view_scene names scene {s} of {len(starts) - 1}")
    return starts, view_scene


def check_colors(sh: Tensor, background: Tensor, views: int) -> None:
    """Check the coefficients [..., 1, 3] and the background [V, 3].

    Raises ValueError for coefficients above degree 0 and a background of another shape.
    """
    if sh.shape[-2] != 1:
        raise ValueError(
            f"sh has {sh.shape[-2]} coefficients per channel: only degree 0, 1 coefficient, is "
            "implemented"
        )
    if tuple(background.shape) != (views, 3):
        raise ValueError(f"background must be [{views}, 3], not {list(background.shape)}")


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that a renderer computes in: float32, or float64 for a float64 tensor.

    Raises ValueError for float64 where the op takes a kernel.
    """
    dtype = wide_dtype(tensor)
    if dtype == torch.float64 and not backend.is_torch(tensor):
        raise ValueError("the kernels compute in fp32: float64 is for the torch path only")
    return dtype
