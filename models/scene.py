"""Scenes, which every decoder returns and which render to an Image: B scenes, V views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kernels import Camera, Image


class Scene(Protocol):
    """One decoded object: named tensors, a renderer for a batch of its kind, and its penalties."""

    def render(self, camera: Camera, background: Tensor) -> Image: ...

    @classmethod
    def render_batch(
        cls,
        scenes: Sequence[Scene],
        camera: Camera,
        view_scene: Sequence[int],
        background: Tensor,
        *,
        offset: Tensor | None = None,
    ) -> Image: ...

    @classmethod
    def penalties(cls, scenes: Sequence[Scene]) -> dict[str, Tensor]: ...


def _kind(scenes: Sequence[Scene]) -> type[Scene]:
    if not isinstance(scenes, Sequence):
        raise TypeError(f"scenes must be a list of scenes, not {type(scenes).__name__}")
    kinds = {type(scene) for scene in scenes}
    if len(kinds) != 1:
        raise ValueError(
            "a batch needs scenes of one kind, not "
            f"{sorted(k.__name__ for k in kinds) or 'none at all'}"
        )
    return kinds.pop()


def render(
    scenes: Sequence[Scene],  # B of one kind
    camera: Camera,  # V views
    view_scene: Sequence[int],  # [V] the scene that each view looks at; host data
    background: Tensor,  # [V, 3]
    offset: Tensor | None = None,  # [V, H, W]
) -> Image:
    """Render a batch of scenes and views in one launch of each kernel.

    `offset` is where the samples of a radiance field's rays start, as in kernels.raymarch; None
    leaves it to the field. Others have no such samples.
    Raises ValueError for scenes of several kinds, a view of a scene that is not there, or counts
    that differ.
    """
    return _kind(scenes).render_batch(scenes, camera, view_scene, background, offset=offset)


def penalties(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The regularizers of a batch of scenes by name, unweighted."""
    return _kind(scenes).penalties(scenes)
