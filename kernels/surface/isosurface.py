"""FlexiCubes on sparse voxels.

B scenes, N voxels of a grid of resolution^3 cubes, P vertices, F faces, T voxel corners. Stages,
each for all scenes at once:

    find_cubes     topology: T corners, C surface cubes, D dual vertices, Q quads
    average        corner values of voxels -> values of vertices
    dual vertices  one to four in a surface cube (`dual_torch`, `dual_triton`)
    split_quads    triangles: two a quad, split by gamma; for training four around a centre that
                   gamma moves

Computes what TRELLIS trains with (FlexiCubes, Shen et al. 2023), which is a dense grid whose
vertices without a voxel are outside. Memory for values grows with the voxels and the surface, not
with the grid.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import to_device
from kernels.reduce import sum_segments
from kernels.surface.corners import PENALISED, WEIGHTS, average, fields_backward
from kernels.surface.cubes import Cubes, Geometry, find_cubes, unravel
from kernels.surface.dual_cpu import dual_torch, dual_torch_backward
from kernels.surface.dual_gpu import dual_triton, dual_triton_backward
from kernels.surface.quads import centres, centres_backward, quad_duals, split_quads
from kernels.surface.tables import cube_tables
from kernels.voxels.cache import SpatialCache

CHANNELS = (53, 101)  # without and with color
REACH = 1 - 1e-8  # share of the half cube that a vertex may move by; published


class Surfaces(NamedTuple):
    """The surfaces of B scenes, one after the other."""

    vertices: Tensor  # [P, 3] world units: the grid is [-0.5, 0.5]^3
    faces: Tensor  # [F, 3] int32: rows of `vertices`, counter-clockwise seen from outside
    attributes: Tensor  # [P, 6] rgb and normal_map, in [0, 1]; [P, 0] without color
    regularizer: Tensor  # [B]
    tsdf_position: Tensor  # [T, 3] the voxels' corners, by x, y, z
    tsdf_value: Tensor  # [T] their signed distance, negative inside
    # [B + 1] int64, on the host: scene b owns the vertices vertex_starts[b] : vertex_starts[b + 1]
    vertex_starts: Tensor
    face_starts: Tensor  # [B + 1]
    tsdf_starts: Tensor  # [B + 1]


class _Saved(NamedTuple):
    """The tensors that the backward needs; those of Cubes under their names there."""

    voxel_corners: Tensor
    count: Tensor
    voxel_cube: Tensor
    cube_index: Tensor
    cube_corners: Tensor
    case: Tensor
    first_dual: Tensor
    dual_cube: Tensor
    dual_kind: Tensor
    quad_edges: Tensor
    mean: Tensor  # [T, K]
    dual: Tensor  # [D, M]
    share: Tensor  # [3, B]: a term of the regularizer is a sum times its share


def _forward(
    fields: Tensor,  # [N, 53 or 101]
    coords: Tensor,  # [N, 4] int32
    counts: list[int],  # [B] voxels of each scene
    resolution: int,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """`isosurface` without checks.

    Returns vertices, faces, attributes, the three terms of the regularizer [3, B], the voxels'
    corners, their values, starts [5, B + 1] on the host (of vertices, faces, corners, dual vertices
    and quads), and `_Saved` as a list.
    """
    R = resolution
    cubes = find_cubes(coords, fields, len(counts), R)
    mean, spread = average(fields, cubes, -1 / R)
    g = _geometry(cubes, mean, fields, R)
    dual, deviation = dual_torch(g) if backend.is_torch(fields) else dual_triton(g)
    owner, quad = quad_duals(cubes.quad_edges, g)
    gamma = g.weights[:, 20][owner]
    D = cubes.dual_starts
    Q = cubes.quad_starts
    V = cubes.tsdf_starts
    vertices = dual
    if training:
        vertices = _interleave(dual, centres(dual, quad, gamma), D, Q)
    faces = split_quads(quad, gamma, D, Q, training)
    share = _shares(cubes, counts, mean)
    penalised = fields[:, WEIGHTS.start : WEIGHTS.start + PENALISED]
    sums = [
        sum_segments(spread[:, None], V),
        sum_segments(deviation[:, None], D),
        sum_segments(penalised, [0, *accumulate(counts)], magnitudes=True),
    ]
    terms = torch.stack(sums) * share
    grid = torch.stack(unravel(cubes.vertex_index, R + 1)[1:], 1).to(fields.dtype) / R - 0.5
    position = grid + g.values[:-1, 1:4]
    vertex_starts = [d + q for d, q in zip(D, Q, strict=True)] if training else D
    triangles = 4 if training else 2  # of a quad
    starts = torch.tensor([vertex_starts, [triangles * q for q in Q], V, D, Q])
    saved = _Saved(
        voxel_corners=cubes.voxel_corners,
        count=cubes.count,
        voxel_cube=cubes.voxel_cube,
        cube_index=cubes.cube_index,
        cube_corners=cubes.cube_corners,
        case=cubes.case,
        first_dual=cubes.first_dual,
        dual_cube=cubes.dual_cube,
        dual_kind=cubes.dual_kind,
        quad_edges=cubes.quad_edges,
        mean=mean,
        dual=dual,
        share=share,
    )
    # clones: an op may not return views of one tensor
    place = vertices[:, :3].clone()
    attributes = vertices[:, 3:].clone()
    values = mean[:, 0].clone()
    return place, faces, attributes, terms, position, values, starts, list(saved)


def _interleave(dual: Tensor, centre: Tensor, D: list[int], Q: list[int]) -> Tensor:
    """The dual vertices and then the centres of each scene, scene after scene."""
    parts = [dual[:0]]
    for b in range(len(D) - 1):
        parts.append(dual[D[b] : D[b + 1]])
        parts.append(centre[Q[b] : Q[b + 1]])
    return torch.cat(parts)


def _separate(rows: Tensor, D: list[int], Q: list[int]) -> tuple[Tensor, Tensor]:
    """`_interleave` backwards: the rows of dual vertices, and those of centres."""
    sizes = []
    for b in range(len(D) - 1):
        sizes += [D[b + 1] - D[b], Q[b + 1] - Q[b]]
    parts = rows.split_with_sizes(sizes)
    return torch.cat([rows[:0], *parts[::2]]), torch.cat([rows[:0], *parts[1::2]])


def _shares(cubes: Cubes, counts: list[int], mean: Tensor) -> Tensor:
    """One over the number of summands of each of the regularizer's three means, [3, B].

    The summands are corner values, pairs of a dual vertex and an edge, and penalised weights.
    """
    K = mean.shape[1]
    fewest = [[max(8 * n * K, 1) for n in counts], [max(PENALISED * n, 1) for n in counts]]
    corners, weights = to_device(torch.tensor(fewest, dtype=mean.dtype), mean.device)
    edges = (cube_tables(mean.device).edges >= 0).sum(1)[cubes.dual_kind]
    pairs = sum_segments(edges[:, None].to(mean.dtype), cubes.dual_starts).clamp(min=1)
    return 1 / torch.stack([corners, pairs, weights])


_isosurface = torch.library.custom_op("trislat::isosurface", _forward, mutates_args=())


@_isosurface.register_fake
def _(fields, coords, counts, resolution, training):
    B = len(counts)
    A = 6 if fields.shape[1] > 53 else 0
    N = len(fields)
    dynamic = torch.library.get_ctx().new_dynamic_size
    P, F, T, C, D, Q = (dynamic() for _ in range(6))
    floats = lambda *size: fields.new_empty(size)
    ints = lambda *size: fields.new_empty(size, dtype=torch.int32)
    longs = lambda *size: fields.new_empty(size, dtype=torch.int64)
    outputs = (floats(P, 3), ints(F, 3), floats(P, A), floats(3, B), floats(T, 3), floats(T))
    saved = _Saved(
        voxel_corners=ints(N, 8),
        count=floats(T),
        voxel_cube=ints(N),
        cube_index=longs(C),
        cube_corners=ints(C, 8),
        case=longs(C),
        first_dual=longs(C),
        dual_cube=ints(D),
        dual_kind=ints(D),
        quad_edges=ints(Q, 4),
        mean=floats(T, 4 + A),
        dual=floats(D, 3 + A),
        share=floats(3, B),
    )
    return *outputs, torch.empty(5, B + 1, dtype=torch.int64), list(saved)


def _geometry(cubes: Cubes | _Saved, mean: Tensor, fields: Tensor, resolution: int) -> Geometry:
    """Activate the vertex means [T, K] and the weights of the surface cubes."""
    R = resolution
    # 0.5: the color of a vertex without a voxel
    values = mean.new_full((len(mean) + 1, mean.shape[1]), 0.5)
    # slices: a single element would be copied to the device, which waits
    values[:-1, 0] = mean[:, 0]
    values[-1:, 0] = 1
    values[:-1, 1:4] = torch.tanh(mean[:, 1:4]) * (REACH / (2 * R))
    values[-1:, 1:4] = 0
    values[:-1, 4:] = torch.sigmoid(mean[:, 4:])
    raw = _raw_weights(fields, cubes.voxel_cube, len(cubes.cube_index))
    beta_alpha = torch.tanh(raw[:, :20]) * 0.99 + 1
    gamma = torch.sigmoid(raw[:, 20:]) * 0.99 + 0.005
    return Geometry(
        values=values,
        weights=torch.cat([beta_alpha, gamma], 1),
        cube_coords=torch.stack(unravel(cubes.cube_index, R)[1:], 1).int(),
        cube_corners=cubes.cube_corners,
        case=cubes.case,
        first_dual=cubes.first_dual,
        dual_cube=cubes.dual_cube,
        dual_kind=cubes.dual_kind,
        resolution=R,
        tables=cube_tables(fields.device),
    )


def _raw_weights(fields: Tensor, voxel_cube: Tensor, C: int) -> Tensor:
    """The weights of each surface cube, [C, 21]: its voxel's, or zeros."""
    voxel = voxel_cube.new_full((C + 1,), -1)
    row = torch.arange(len(fields), dtype=torch.int32, device=fields.device)
    voxel = voxel.index_copy_(0, torch.where(voxel_cube < 0, C, voxel_cube).long(), row)[:C]
    weights = fields[:, WEIGHTS].index_select(0, voxel.clamp(min=0))
    return weights.masked_fill_((voxel < 0)[:, None], 0)


def _reverse(
    grad_vertices: Tensor,
    grad_attributes: Tensor,
    grad_terms: Tensor,
    grad_position: Tensor,
    grad_value: Tensor,
    fields: Tensor,
    coords: Tensor,
    starts: Tensor,
    saved: list[Tensor],
    resolution: int,
    training: bool,
) -> Tensor:
    """The gradient of the fields."""
    s = _Saved(*saved)
    R = resolution
    g = _geometry(s, s.mean, fields, R)
    *_, D, Q = starts.tolist()
    raw = _raw_weights(fields, s.voxel_cube, len(s.cube_index))
    grad_dual = torch.cat([grad_vertices, grad_attributes], 1)
    if training:
        grad_dual, grad_centre = _separate(grad_dual, D, Q)
        grad_dual, grad_gamma = centres_backward(g, s.dual, s.quad_edges, grad_dual, grad_centre)
    else:
        grad_gamma = torch.zeros_like(raw[:, 20])
    slopes = grad_terms * s.share
    parts = [slopes[1, b].expand(D[b + 1] - D[b]) for b in range(len(D) - 1)]
    grad_deviation = torch.cat([grad_dual[:0, 0], *parts])
    grad_dual = grad_dual.contiguous()
    if backend.is_torch(fields):
        grads = dual_torch_backward(g, grad_dual, grad_deviation)
    else:
        grads = dual_triton_backward(g, s.dual, grad_dual, grad_deviation)
    grad_values, grad_beta, grad_alpha = grads
    del grad_dual, grad_deviation

    grad_values = grad_values[:-1]
    grad_values[:, 0] += grad_value
    grad_values[:, 1:4] += grad_position
    slope = 1 - torch.tanh(s.mean[:, 1:4]).square_()
    grad_values[:, 1:4] *= slope.mul_(REACH / (2 * R))
    color = g.values[:-1, 4:]
    grad_values[:, 4:] *= color * (1 - color)
    grad_values /= s.count[:, None]

    grad_weights = torch.cat([grad_beta, grad_alpha, grad_gamma[:, None]], 1)
    grad_weights[:, :20] *= 0.99 * (1 - torch.tanh(raw[:, :20]).square_())
    gate = torch.sigmoid(raw[:, 20])
    grad_weights[:, 20] *= 0.99 * gate * (1 - gate)
    spread_slope = 2 * slopes[0]
    # a clone: else its alignment, and so the compiled kernel, would depend on B
    size_slope = slopes[2].clone()
    return fields_backward(
        fields,
        coords,
        s.voxel_corners,
        s.voxel_cube,
        s.mean,
        grad_values,
        grad_weights,
        spread_slope,
        size_slope,
        -1 / R,
    )


_isosurface_backward = torch.library.custom_op(
    "trislat::isosurface_backward", _reverse, mutates_args=()
)


@_isosurface_backward.register_fake
def _(grad_vertices, grad_attributes, grad_terms, grad_position, grad_value, fields, *rest):
    return torch.empty_like(fields)


def _setup_context(ctx, inputs, output) -> None:
    fields, coords, counts, ctx.resolution, ctx.training = inputs
    *_, starts, saved = output
    ctx.empty = [] if not counts else None  # torch wants the structure of an empty list
    ctx.save_for_backward(fields, coords, starts, *saved)
    ctx.mark_non_differentiable(output[1], starts)


def _backward(ctx, vertices, faces, attributes, terms, position, value, starts, saved):
    fields, coords, starts, *saved = ctx.saved_tensors
    grads = (t.contiguous() for t in (vertices, attributes, terms, position, value))
    grad = _isosurface_backward(*grads, fields, coords, starts, saved, ctx.resolution, ctx.training)
    return grad, None, ctx.empty, None, None


_isosurface.register_autograd(_backward, setup_context=_setup_context)


def isosurface(
    # coords [N, 4] int32 (batch, x, y, z), each below `resolution`, or a cache over them
    voxels: Tensor | SpatialCache,
    # [N, 53 or 101]: sdf 8 | deform 8 x 3 | weights 21 | color 8 x 6, corners with x fastest
    fields: Tensor,
    resolution: int,  # cubes along a side of the grid
    # quads get a centre and four triangles, which gives gamma a gradient; else two triangles
    training: bool,
) -> Surfaces:
    """Extract the surface where the signed distance changes its sign.

    The signed distance is 1 / resolution less than `sdf` says. Vertices, faces and their order are
    those of the dense grid in which vertices without a voxel are outside (signed distance 1, no
    displacement, color 0.5) and cubes without a voxel have neutral weights. Faces exist around grid
    edges that four cubes share, so a surface is open where it leaves the grid. The regularizer is,
    per scene, the mean squared distance of corner values to their mean, half the mean deviation
    (kernels.surface.dual_gpu) and 0.2 times the mean size of the first 20 weights.

    Differentiable, to first order, in the fields. Computes in fp32 (16-bit fields are converted;
    float64 only on the torch path). Same inputs, same bits. No surface: no vertices, no faces, and
    a regularizer without a deviation. NaN: a vertex whose distance is not a number is outside; what
    is computed from it is NaN. Unlike the published code, an edge that begins at a distance of
    exactly 0 counts as beginning outside when its quad is wound. On a GPU the host waits twice: for
    the numbers of corners and surface cubes, and of dual vertices and quads (and once before, given
    coords, to check them).

    Raises ValueError: coords that `SpatialCache` refuses, or beyond the resolution, naming the row;
    other channels than 53 or 101; a number of rows that differs; a resolution below 1; another
    dtype or device.
    """
    cache = SpatialCache(voxels) if isinstance(voxels, Tensor) else voxels
    if resolution < 1:
        raise ValueError(f"resolution {resolution} must be at least 1")
    if fields.ndim != 2 or fields.shape[1] not in CHANNELS:
        raise ValueError(
            f"fields must be [N, {CHANNELS[0]}] (no color) or [N, {CHANNELS[1]}], not "
            f"{list(fields.shape)}"
        )
    if len(fields) != len(cache):
        raise ValueError(f"fields have {len(fields)} rows for {len(cache)} coords")
    if not fields.is_floating_point():
        raise ValueError(f"fields must be floating point, not {fields.dtype}")
    if fields.device != cache.coords.device:
        raise ValueError(f"fields are on {fields.device}, coords on {cache.coords.device}")
    exact = fields.dtype == torch.float64
    if exact and not backend.is_torch(fields):
        raise ValueError("the kernels compute in fp32: float64 is for the torch path only")
    if len(cache) and max(cache.extent) > resolution:
        row = int((cache.coords[:, 1:] >= resolution).any(1).byte().argmax())
        raise ValueError(
            f"row {row} of coords is {cache.coords[row].tolist()}: beyond the resolution "
            f"{resolution}"
        )
    fields = fields.to(torch.float64 if exact else torch.float32).contiguous()
    *outputs, terms, position, value, starts, _ = _isosurface(
        fields, cache.coords, cache.counts, resolution, training
    )
    regularizer = terms[0] + 0.5 * terms[1] + 0.2 * terms[2]
    return Surfaces(*outputs, regularizer, position, value, *starts[:3].unbind(0))
