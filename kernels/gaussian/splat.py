"""Differentiable Gaussian splatting of B scenes with V views.

G Gaussians of all scenes, P pairs of a view and a Gaussian of its scene, I instances (a pair in a
tile of 16 x 16 pixels).

Each stage is one launch for all scenes and views: project (P) -> binning (P, I) -> blend (tiles);
backward: blend (tiles) -> project (G). The result is that of the rasteriser which TRELLIS trains
with, Mip-Splatting (Yu et al. 2024, after Kerbl et al. 2023). The formulas are in
kernels.gaussian.project and kernels.gaussian.blend. One difference is deliberate: a view of a scene
without Gaussians shows the background.
"""

import math

import torch
from torch import Tensor

from kernels import backend
from kernels.camera import Camera, Image, pack_cameras
from kernels.checks import Host, check_floating, check_tensors
from kernels.gaussian.binning import bin_tiles
from kernels.gaussian.blend import blend, blend_backward
from kernels.gaussian.blend_cpu import composite_torch, composite_torch_backward
from kernels.gaussian.project import project, project_backward
from kernels.gaussian.project_cpu import project_torch, project_torch_backward
from kernels.gaussian.records import GAUSSIAN, PACKED, RECORD, TILE, Bins
from kernels.views import (
    check_colors,
    check_scenes,
    count_pairs,
    make_view_table,
    working_dtype,
)


@torch.library.custom_op("trislat::splat", mutates_args=())
def _splat(
    gaussians: Tensor,  # [G, 14]: center 3, scale 3, rotation 4, opacity 1, colour coefficients 3
    # [V, 16]: rotation 9, translation 3, focal lengths 2 (px), principal point 2 (px)
    cameras: Tensor,
    background: Tensor,  # [V, 3]
    starts: list[int],
    view_scene: list[int],
    width: int,
    height: int,
    kernel_size: float,
    keep: bool,  # whether a backward pass follows: the torch path keeps more for it
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the image [V, 3, H, W], final transmittance [V, H, W], and what backward needs."""
    table = make_view_table(starts, view_scene, gaussians.device)
    if backend.is_torch(gaussians):
        with torch.autocast(gaussians.device.type, enabled=False):
            p = project_torch(gaussians, cameras, table, width, height, kernel_size)
            image, final, saved = composite_torch(
                *_fields(p.record),
                p.depth,
                p.rect,
                p.view,
                len(cameras),
                height,
                width,
                background,
                keep,
            )
        return image, final, [p.record, p.depth.clone(), p.rect, *saved]
    p = project(gaussians, cameras, table, width, height, kernel_size)
    bins = bin_tiles(p, len(cameras), width, height)
    image, final, seen = blend(p.record, bins, background, width, height)
    lists = [bins.pair, bins.slot, bins.bounds, bins.size, bins.first, bins.start]
    # the number of slots is kept on the host: asking the device again would wait for it
    return image, final, [p.record, p.tiles, *lists, seen, torch.tensor(bins.slots)]


def _fields(record: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split records into mean [P, 2], conic [P, 3], blended opacity [P], colour [P, 3]."""
    mean, conic, opacity, color = record.split_with_sizes([2, 3, 1, 3], 1)
    return mean, conic, opacity[:, 0], color


@_splat.register_fake
def _(gaussians, cameras, background, starts, view_scene, width, height, kernel_size, keep):
    V = len(view_scene)
    P = count_pairs(starts, view_scene)
    dynamic = torch.library.get_ctx().new_dynamic_size
    empty = lambda *size, dtype=gaussians.dtype: gaussians.new_empty(size, dtype=dtype)
    i32 = torch.int32
    i64 = torch.int64
    if backend.is_torch(gaussians):
        S = dynamic()
        lists = [
            empty(dynamic(), dtype=i32),
            empty(S, dtype=i64),
            empty(S, dtype=i32),
        ]
        saved = [
            empty(RECORD, P).t(),
            empty(P),
            empty(P, 4, dtype=i32),
            *lists,
            empty(dynamic(), 16),
            empty(S, 16),
            empty(dynamic()),
        ]
    else:
        entries = dynamic()
        T = V * -(-width // TILE) * -(-height // TILE)
        Q = dynamic()  # the device, which decides it, is not asked while tracing
        lists = [
            empty(entries, dtype=i32),
            empty(entries, dtype=i32),
            empty(T + 1, dtype=i32),
            empty(T, Q, dtype=i32),
            empty(P, dtype=i64),
            empty(dynamic(), dtype=i32),
        ]
        tiles = empty(P, dtype=i32)
        slots = torch.empty((), dtype=i64)
        saved = [empty(P, PACKED), tiles, *lists, empty(T, Q, dtype=i32), slots]
    return empty(V, 3, height, width), empty(V, height, width), saved


@torch.library.custom_op("trislat::splat_backward", mutates_args=())
def _splat_backward(
    grad_image: Tensor,
    grad_final: Tensor,
    gaussians: Tensor,
    cameras: Tensor,
    background: Tensor,
    image: Tensor,
    final: Tensor,
    saved: list[Tensor],
    starts: list[int],
    view_scene: list[int],
    kernel_size: float,
) -> Tensor:
    """Return the gradient of the Gaussians [G, 14]."""
    table = make_view_table(starts, view_scene, gaussians.device)
    V, _, height, width = image.shape
    scene = (gaussians, cameras, table, width, height, kernel_size)
    grad_image = grad_image.contiguous()
    grad_final = grad_final.contiguous()
    if backend.is_torch(gaussians):
        record, depth, rect, *lists = saved
        view = torch.arange(V, device=rect.device).repeat_interleave(
            table.views[:, 1], output_size=len(depth)
        )
        with torch.autocast(gaussians.device.type, enabled=False):
            grads = composite_torch_backward(
                tuple(lists),
                *_fields(record),
                depth,
                rect,
                view,
                V,
                height,
                width,
                background,
                image,
                final,
                grad_image,
                grad_final,
            )
            return project_torch_backward(*scene, rect, *grads)
    record, tiles, *lists, seen, slots = saved
    bins = Bins(*lists, slots.item())
    sums = blend_backward(record, bins, image, final, seen, grad_image, grad_final)
    return project_backward(*scene, tiles, bins, *sums)


@_splat_backward.register_fake
def _(grad_image, grad_final, gaussians, *rest):
    return torch.empty_like(gaussians)


def _setup_context(ctx, inputs, output) -> None:
    gaussians, cameras, background, *ctx.rest = inputs
    image, final, saved = output
    ctx.save_for_backward(gaussians, cameras, background, image, final, *saved)
    ctx.set_materialize_grads(False)  # zeros as large as `saved` would be made, for nothing


def _backward(ctx, grad_image, grad_final, grad_saved):
    gaussians, cameras, background, image, final, *saved = ctx.saved_tensors
    starts, view_scene, _, _, kernel_size, _ = ctx.rest
    grad = torch.ops.trislat.splat_backward(
        torch.zeros_like(image) if grad_image is None else grad_image,
        torch.zeros_like(final) if grad_final is None else grad_final,
        gaussians,
        cameras,
        background,
        image,
        final,
        saved,
        starts,
        view_scene,
        kernel_size,
    )
    # torch expects an empty list as the gradient of an empty list
    return grad, None, None, None, None if view_scene else [], None, None, None, None


_splat.register_autograd(_backward, setup_context=_setup_context)


def splat(
    center: Tensor,  # [G, 3] world units
    scale: Tensor,  # [G, 3] standard deviations, world units
    rotation: Tensor,  # [G, 4] quaternion (w, x, y, z), used as it is: not normalised
    opacity: Tensor,  # [G, 1] in [0, 1]
    sh: Tensor,  # [G, 1, 3] colour coefficients of degree 0: colour = max(0, 0.2821 sh + 0.5)
    starts: Host,  # [B + 1]: scene b owns the Gaussians starts[b] : starts[b + 1]
    camera: Camera,  # V views
    view_scene: Host,  # [V]: the scene that each view shows
    background: Tensor,  # [V, 3]
    kernel_size: float = 0.1,  # variance of the screen-space low-pass filter, px^2
) -> Image:
    """Render the Gaussians of each view's scene: colour and alpha (1 - final transmittance).

    Differentiable, to first order, in the five tensors of the Gaussians; the camera and the
    background get no gradient. Computes in fp32 (16-bit inputs are converted; float64 only on the
    torch path). Same inputs, same bits. A Gaussian whose geometry or colour is not finite, or whose
    centre is nearer than 0.2, is not drawn. On a GPU the host waits once, for the number of (tile,
    Gaussian) instances.

    Raises ValueError: wrong shapes, dtypes or devices; starts that do not run from 0 to G; a
    view_scene of another length than the camera or naming no scene; colour coefficients above
    degree 0; a kernel_size that is negative or not finite; 2^31 instances or more. TypeError: no
    tensor where one belongs.
    """
    parts = {"center": center, "scale": scale, "rotation": rotation, "opacity": opacity}
    check_tensors(**parts, sh=sh, background=background)
    G = len(center)
    V = len(camera)
    for (name, value), size in zip(parts.items(), (3, 3, 4, 1), strict=True):
        if tuple(value.shape) != (G, size):
            raise ValueError(f"{name} must be [{G}, {size}], not {list(value.shape)}")
    if sh.ndim != 3 or len(sh) != G or sh.shape[2] != 3:
        raise ValueError(f"sh must be [{G}, 1, 3], not {list(sh.shape)}")
    check_colors(sh, background, V)
    starts, view_scene = check_scenes(starts, G, "Gaussians", view_scene, V)
    if not (math.isfinite(kernel_size) and kernel_size >= 0):
        raise ValueError(f"kernel_size must be finite and at least 0, not {kernel_size}")
    tensors = (center, scale, rotation, opacity, sh)
    check_floating(*tensors, background, camera.extrinsics, camera.intrinsics)
    dtype = working_dtype(center)
    gaussians = torch.cat([t.to(dtype).flatten(1) for t in tensors], 1)
    assert gaussians.shape == (G, GAUSSIAN)
    keep = torch.is_grad_enabled() and gaussians.requires_grad
    image, final, _ = torch.ops.trislat.splat(
        gaussians,
        _pack(camera, dtype),
        background.detach().to(dtype).contiguous(),
        starts,
        view_scene,
        camera.width,
        camera.height,
        float(kernel_size),
        keep,
    )
    return Image(color=image, alpha=1 - final[:, None])


def _pack(camera: Camera, dtype: torch.dtype) -> Tensor:
    camera = camera.to(dtype)
    return pack_cameras(camera, camera.extrinsics[:, :3, 3])
