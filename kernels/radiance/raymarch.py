"""Differentiable ray marching of radiance fields in sparse voxels.

B scenes of N voxels in all, V views, S segments (a ray in a voxel).

Each voxel holds R products of three vectors of n taps (a trivec), which weight R densities and R
colours. A ray samples it at fixed steps of half a tap, counted from the camera and shifted by an
offset per pixel. Each stage is one launch for all scenes and views: segments (which rays cross
which voxels), march (tiles of pixels); backward: march (voxels).

The result is that of the renderer which TRELLIS (Xiang et al. 2024) trains its radiance field with.
The formulas are in kernels.radiance.march; kernels.radiance.segments says which samples belong to
which voxel. Two differences are deliberate: a view without voxels shows the background, and depth
has its true gradient.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.camera import Camera, Image, pack_cameras
from kernels.checks import Host, check_floating, check_tensors, check_whole
from kernels.radiance.march import march, march_backward
from kernels.radiance.march_cpu import march_torch, march_torch_backward
from kernels.radiance.segments import find_segments
from kernels.radiance.segments_cpu import find_segments_torch
from kernels.views import (
    SH0,
    check_colors,
    check_scenes,
    count_pairs,
    make_view_table,
    working_dtype,
)


@torch.library.custom_op("trislat::raymarch", mutates_args=())
def _raymarch(
    voxels: Tensor,  # [N, (3 n + 4) R]: taps [3, n, R], density [R], colour [3, R]
    position: Tensor,  # [N, 3]
    cameras: Tensor,  # [V, 16]: rotation 9, centre 3, focal lengths 2 (px), principal point 2 (px)
    offset: Tensor,  # [V, H, W]
    background: Tensor,  # [V, 3]
    starts: list[int],
    view_scene: list[int],
    resolution: int,
    rank: int,
    dim: int,
) -> tuple[Tensor, list[Tensor]]:
    """Return the picture [V, 5, H, W]: colour, final transmittance and depth.

    The list holds what the backward needs of every segment.
    """
    table = make_view_table(starts, view_scene, voxels.device)
    _, height, width = offset.shape
    scene = position, cameras, offset, table, resolution, dim
    mistakes = _mistakes(position, offset, resolution)
    rest = background, height, width, 0.5 / (dim * resolution), rank, dim
    if backend.is_torch(voxels):
        _refuse(mistakes.tolist(), position, offset, resolution)
        with torch.autocast(voxels.device.type, enabled=False):
            s = find_segments_torch(*scene)
            picture, used, state = march_torch(voxels, s, *rest)
    else:
        s, wrong = find_segments(*scene, mistakes)
        _refuse(wrong, position, offset, resolution)
        picture, used, state = march(voxels, s, *rest)
    return picture, [s.ray, s.facts, s.path, s.start, used, state]


def _mistakes(position: Tensor, offset: Tensor, resolution: int) -> Tensor:
    """Count the wrong positions and the wrong offsets: [2] int64, on the device."""
    return torch.stack([_misplaced(position, resolution).sum(), _outside(offset).sum()])


def _misplaced(position: Tensor, resolution: int) -> Tensor:
    """Mark the positions that are not the centre of a voxel: [N]."""
    at = position * resolution
    right = ((at - at.floor() - 0.5).abs() <= 0.01) & (at >= 0) & (at <= resolution)
    return ~right.all(1)


def _outside(offset: Tensor) -> Tensor:
    """Mark the offsets that are not in [0, 1), NaN included."""
    return ~((offset >= 0) & (offset < 1))


def _refuse(mistakes: list[int], position: Tensor, offset: Tensor, resolution: int) -> None:
    if mistakes[0]:
        row = int(_misplaced(position, resolution).nonzero()[0])
        where = [round(p, 6) for p in position[row].tolist()]
        if not all(0 <= p <= 1 for p in where):
            raise ValueError(f"position {row} of {len(position)} is {where}, outside [0, 1]")
        raise ValueError(
            f"position {row} of {len(position)} is {where}, not (whole number + 0.5) / "
            f"resolution {resolution}"
        )
    if mistakes[1]:
        view, y, x = _outside(offset).nonzero()[0].tolist()
        raise ValueError(
            f"offset must lie in [0, 1), not be {offset[view, y, x].item()} at view {view}, row "
            f"{y}, column {x}"
        )


@_raymarch.register_fake
def _(voxels, position, cameras, offset, background, starts, view_scene, resolution, rank, dim):
    V, H, W = offset.shape
    S = torch.library.get_ctx().new_dynamic_size()
    P = count_pairs(starts, view_scene)
    ray, used = (voxels.new_empty(S, dtype=torch.int32) for _ in range(2))
    facts = voxels.new_empty(S, 2, dtype=torch.int32)
    start = voxels.new_empty(P + 1, dtype=torch.int64)
    saved = [ray, facts, voxels.new_empty(S, 8), start, used, voxels.new_empty(S, 5)]
    return voxels.new_empty(V, 5, H, W), saved


@torch.library.custom_op("trislat::raymarch_backward", mutates_args=())
def _raymarch_backward(
    grad: Tensor,
    picture: Tensor,
    voxels: Tensor,
    saved: list[Tensor],
    starts: list[int],
    view_scene: list[int],
    resolution: int,
    rank: int,
    dim: int,
) -> Tensor:
    """Return the gradient of the voxels [N, (3 n + 4) R]."""
    ray, facts, path, start, used, state = saved
    # the gradient of the final transmittance is needed only in what the whole ray contributes
    pixels = grad.clone(memory_format=torch.contiguous_format)
    pixels[:, 3] = (picture * grad).sum(1)
    rest = used, state, pixels, 0.5 / (dim * resolution), rank, dim
    if backend.is_torch(voxels):
        with torch.autocast(voxels.device.type, enabled=False):
            return march_torch_backward(voxels, ray, facts[:, 0], path, *rest)
    table = make_view_table(starts, view_scene, voxels.device)
    return march_backward(voxels, table, ray, path, start, *rest)


@_raymarch_backward.register_fake
def _(grad, picture, voxels, *rest):
    return torch.empty_like(voxels)


def _setup_context(ctx, inputs, output) -> None:
    voxels, _, _, _, _, *ctx.rest = inputs
    picture, saved = output
    ctx.save_for_backward(picture, voxels, *saved)


def _backward(ctx, grad, grad_saved):
    picture, voxels, *saved = ctx.saved_tensors
    grad = torch.ops.trislat.raymarch_backward(grad, picture, voxels, saved, *ctx.rest)
    # torch expects an empty list as the gradient of an empty list
    views = None if ctx.rest[1] else []
    return grad, None, None, None, None, None, views, None, None, None


_raymarch.register_autograd(_backward, setup_context=_setup_context)


def raymarch(
    position: Tensor,  # [N, 3] centres of the voxels in [0, 1]: (coordinate + 0.5) / resolution
    trivec: Tensor,  # [N, R, 3, n]: R products of vectors of n taps
    density: Tensor,  # [N, R]
    sh: Tensor,  # [N, R, 1, 3] colour coefficients of degree 0
    starts: Host,  # [B + 1]: scene b owns the voxels starts[b] : starts[b + 1]
    camera: Camera,  # V views
    view_scene: Host,  # [V]: the scene that each view shows
    background: Tensor,  # [V, 3]
    resolution: int,  # voxels along an edge of the world cube [-0.5, 0.5]^3
    # [V, H, W] in [0, 1), of the first sample in steps; None: drawn anew
    offset: Tensor | None = None,
) -> Image:
    """Render the voxels of each view's scene: colour, alpha (1 - final transmittance), depth.

    The step is 0.5 / (n resolution) world units along the ray; the march ends behind the sample at
    which the transmittance falls below 1e-3. Depth is the sum of the samples' camera depths with
    the weights of the colour, not divided by alpha. An offset that is drawn comes from torch's
    generator of the device and is saved for the backward. Differentiable, to first order, in
    trivec, density and sh; positions, camera and background get no gradient. Computes in fp32
    (16-bit inputs are converted; float64 only on the torch path). Same inputs and offset, same
    bits. On a GPU the host waits once, for the number of segments. Voxels are not searched for NaN:
    one that is not finite makes pixels NaN, on the torch path others than its own too.

    Raises ValueError: wrong shapes, dtypes or devices; starts that do not run from 0 to N; a
    view_scene of another length than the camera or naming no scene; colour coefficients above
    degree 0; fewer than 2 taps; a position outside [0, 1] or not at the centre of a voxel; an
    offset outside [0, 1); 2^31 pixels or segments or more. TypeError: no tensor where one belongs.
    """
    check_tensors(position=position, trivec=trivec, density=density, sh=sh, background=background)
    N = len(position)
    V = len(camera)
    if tuple(position.shape) != (N, 3):
        raise ValueError(f"position must be [N, 3], not {list(position.shape)}")
    if trivec.ndim != 4 or len(trivec) != N or trivec.shape[2] != 3:
        raise ValueError(f"trivec must be [{N}, R, 3, n], not {list(trivec.shape)}")
    _, rank, _, dim = trivec.shape
    if rank < 1 or dim < 2:
        raise ValueError(
            f"trivec needs a rank of at least 1 and at least 2 taps, not {rank} and {dim}"
        )
    if tuple(density.shape) != (N, rank):
        raise ValueError(f"density must be [{N}, {rank}], not {list(density.shape)}")
    if sh.ndim != 4 or tuple(sh.shape[:2]) != (N, rank) or sh.shape[3] != 3:
        raise ValueError(f"sh must be [{N}, {rank}, 1, 3], not {list(sh.shape)}")
    check_colors(sh, background, V)
    starts, view_scene = check_scenes(starts, N, "voxels", view_scene, V)
    check_whole("resolution", resolution)
    size = (V, camera.height, camera.width)
    if V * camera.height * camera.width >= 2**31:
        raise ValueError(
            f"{V * camera.height * camera.width} pixels are more than {2**31 - 1}: render fewer "
            "views at once"
        )
    if offset is None:
        offset = torch.rand(size, device=position.device)
    check_tensors(offset=offset)
    if tuple(offset.shape) != size:
        raise ValueError(f"offset must be {list(size)}, not {list(offset.shape)}")
    tensors = (trivec, density, sh)
    rest = (background, offset, camera.extrinsics, camera.intrinsics)
    check_floating(position, *tensors, *rest)
    dtype = working_dtype(trivec)
    trivec, density, sh = (t.to(dtype) for t in tensors)
    colour = SH0 * sh[:, :, 0].transpose(1, 2)
    voxels = torch.cat([trivec.permute(0, 2, 3, 1).flatten(1), density, colour.flatten(1)], 1)
    fixed = (
        t.detach().to(dtype).contiguous() for t in (position, _pack(camera), offset, background)
    )
    picture, _ = torch.ops.trislat.raymarch(
        voxels, *fixed, starts, view_scene, resolution, rank, dim
    )
    color, final, depth = picture.split([3, 1, 1], 1)
    return Image(color=color.contiguous(), alpha=1 - final, depth=depth.contiguous())


def _pack(camera: Camera) -> Tensor:
    """Pack the cameras in float64: the places of all samples start from them."""
    camera = camera.to(torch.float64)
    return pack_cameras(camera, camera.center)
