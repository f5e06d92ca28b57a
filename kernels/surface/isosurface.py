"""FlexiCubes on sparse voxels: B scenes, N voxels of a grid of resolution^3 cubes, P vertices, F
faces, T voxel corners.

Stages, each for all scenes at once: `find_cubes` (topology: T corners, C surface cubes, Q quads),
`average` (corner values -> vertex values), `dual_vertices` (one to four vertices in a surface
cube), and here the quads: split in two by gamma, or, for training, in four around a centre that
gamma moves. What is computed is what TRELLIS trains with (FlexiCubes, Shen et al. 2023, as a dense
grid whose vertices without a voxel are outside); what is held is of the size of the voxels and of
the surface.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import to_device
from kernels.reduce import sum_segments
from kernels.surface.corners import PENALISED, WEIGHTS, average, fields_backward
from kernels.surface.cubes import Geometry, find_cubes, unravel
from kernels.surface.dual import dual_vertices, dual_vertices_backward
from kernels.surface.quads import centres, centres_backward, quad_duals, split_quads
from kernels.surface.tables import cube_tables
from kernels.voxels.cache import SpatialCache

CHANNELS = (53, 101)  # without and with color
SPREAD = 1 - 1e-8  # of the half cube that a vertex may move by; published


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


def _forward(
    fields: Tensor,  # [N, 53 or 101]
    coords: Tensor,  # [N, 4] int32
    counts: list[int],  # [B] voxels of each scene
    resolution: int,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Vertices, faces, attributes, the three terms of the regularizer [3, B], corners, their
    values, starts (of vertices, faces, corners, dual vertices and quads, [5, B + 1] on the host),
    and what the backward needs.
    """
    B = len(counts)
    R = resolution
    cubes = find_cubes(coords, fields, B, R)
    mean, spread = average(fields, cubes, -1 / R)
    g = _geometry(
        mean,
        fields,
        cubes.surface,
        cubes.cube,
        cubes.corner,
        cubes.case,
        cubes.first,
        cubes.dual,
        cubes.kind,
        R,
    )
    dual, deviation = dual_vertices(g)
    row, quad = quad_duals(cubes.around, g)
    gamma = g.weights[:, 20][row]
    D = cubes.dual_starts
    Q = cubes.quad_starts
    V = cubes.tsdf_starts
    N = [0, *accumulate(counts)]
    if training:
        centre = centres(dual, quad, gamma)
        vertices = torch.cat(
            [dual[:0]]
            + [part for b in range(B) for part in (dual[D[b] : D[b + 1]], centre[Q[b] : Q[b + 1]])]
        )
    else:
        vertices = dual
    faces = split_quads(quad, gamma, D, Q, training)
    edges = (cube_tables(fields.device).edges >= 0).sum(1)[cubes.kind]  # of each dual vertex
    fewest = [
        [max(8 * n * mean.shape[1], 1) for n in counts],
        [max(PENALISED * n, 1) for n in counts],
    ]
    corners, weights = to_device(torch.tensor(fewest, dtype=fields.dtype), fields.device)
    pairs = sum_segments(edges[:, None].to(fields.dtype), D).clamp(min=1)
    share = 1 / torch.stack([corners, pairs, weights])  # a term is a sum times its share
    penalised = fields[:, WEIGHTS.start : WEIGHTS.start + PENALISED]
    sums = [sum_segments(spread[:, None], V), sum_segments(deviation[:, None], D)]
    terms = torch.stack([*sums, sum_segments(penalised, N, magnitudes=True)])
    position = (
        torch.stack(unravel(cubes.vertex, R + 1)[1:], 1).to(fields.dtype) / R
        - 0.5
        + g.values[:-1, 1:4]
    )
    shift = Q if training else [0] * len(Q)
    starts = torch.tensor(
        [
            [d + s for d, s in zip(D, shift, strict=True)],
            [(4 if training else 2) * q for q in Q],
            V,
            D,
            Q,
        ]
    )
    saved = [
        cubes.rows,
        cubes.count,
        cubes.surface,
        cubes.cube,
        cubes.corner,
        cubes.case,
        cubes.first,
        cubes.dual,
        cubes.kind,
    ]
    saved += [cubes.around, mean, dual, share]
    outputs = (
        vertices[:, :3].clone(),
        faces,
        vertices[:, 3:].clone(),
        terms * share,
        position,
        mean[:, 0].clone(),
    )
    return *outputs, starts, saved


_isosurface = torch.library.custom_op("trislat::isosurface", _forward, mutates_args=())


@_isosurface.register_fake
def _(fields, coords, counts, resolution, training):
    B = len(counts)
    A = 6 if fields.shape[1] > 53 else 0
    N = len(fields)
    dynamic = torch.library.get_ctx().new_dynamic_size
    P, F, T, C, D, Q = (dynamic() for _ in range(6))
    empty = lambda *size, dtype=fields.dtype: fields.new_empty(size, dtype=dtype)
    i32, i64 = torch.int32, torch.int64
    outputs = empty(P, 3), empty(F, 3, dtype=i32), empty(P, A), empty(3, B), empty(T, 3), empty(T)
    saved = [
        empty(N, 8, dtype=i32),
        empty(T),
        empty(N, dtype=i32),
        empty(C, dtype=i64),
        empty(C, 8, dtype=i32),
    ]
    saved += [
        empty(C, dtype=i64),
        empty(C, dtype=i64),
        empty(D, dtype=i32),
        empty(D, dtype=i32),
        empty(Q, 4, dtype=i32),
    ]
    saved += [empty(T, 4 + A), empty(D, 3 + A), empty(3, B)]
    return *outputs, torch.empty(5, B + 1, dtype=i64), saved


def _geometry(mean: Tensor, fields: Tensor, surface: Tensor, cube: Tensor, *rest) -> Geometry:
    """From vertex means [T, K] and surface cubes to what dual vertices are made from; rest: as in
    Geometry.
    """
    R = rest[-1]
    # the color of a vertex without a voxel
    values = mean.new_full((len(mean) + 1, mean.shape[1]), 0.5)
    # one element alone would be copied to the device, which waits
    values[:-1, 0] = mean[:, 0]
    values[-1:, 0] = 1
    values[:-1, 1:4] = torch.tanh(mean[:, 1:4]) * (SPREAD / (2 * R))
    values[-1:, 1:4] = 0
    values[:-1, 4:] = torch.sigmoid(mean[:, 4:])
    raw = _raw_weights(fields, surface, len(cube))
    weights = torch.cat(
        [torch.tanh(raw[:, :20]) * 0.99 + 1, torch.sigmoid(raw[:, 20:]) * 0.99 + 0.005], 1
    )
    return Geometry(values, weights, torch.stack(unravel(cube, R)[1:], 1).int(), *rest)


def _raw_weights(fields: Tensor, surface: Tensor, C: int) -> Tensor:
    """The weights of each surface cube, [C, 21]: its voxel's, or zeros."""
    voxel = surface.new_full((C + 1,), -1)
    row = torch.arange(len(fields), dtype=torch.int32, device=fields.device)
    voxel = voxel.index_copy_(0, torch.where(surface < 0, C, surface).long(), row)[:C]
    return (
        fields[:, WEIGHTS].index_select(0, voxel.clamp(min=0)).masked_fill_((voxel < 0)[:, None], 0)
    )


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
    rows, count, surface, cube, *cubes, around, mean, dual, share = saved
    g = _geometry(mean, fields, surface, cube, *cubes, resolution)
    *_, D, Q = starts.tolist()
    B = len(D) - 1
    R = resolution
    up = torch.cat([grad_vertices, grad_attributes], 1)
    grad_gamma = None
    if training:
        sizes = [
            end - begin for b in range(B) for begin, end in ((D[b], D[b + 1]), (Q[b], Q[b + 1]))
        ]
        parts = up.split_with_sizes(sizes)
        up, grad_centre = torch.cat([up[:0], *parts[::2]]), torch.cat([up[:0], *parts[1::2]])
        row, quad = quad_duals(around, g)
        up, grad_gamma = centres_backward(g, dual, quad, row, around, up, grad_centre)
    scale = grad_terms * share
    grad_deviation = torch.cat(
        [up[:0, 0], *(scale[1, b].expand(D[b + 1] - D[b]) for b in range(B))]
    )
    grad_values, grad_beta, grad_alpha = dual_vertices_backward(
        g, dual, up.contiguous(), grad_deviation
    )
    del up, grad_deviation
    grad_values = grad_values[:-1]
    grad_values[:, 0] += grad_value
    grad_values[:, 1:4] += grad_position
    slope = 1 - torch.tanh(mean[:, 1:4]).square_()
    grad_values[:, 1:4] *= slope.mul_(SPREAD / (2 * R))
    color = g.values[:-1, 4:]
    grad_values[:, 4:] *= color * (1 - color)
    grad_values /= count[:, None]
    raw = _raw_weights(fields, surface, len(cube))
    if grad_gamma is None:
        grad_gamma = torch.zeros_like(raw[:, 20])
    grad_weights = torch.cat([grad_beta, grad_alpha, grad_gamma[:, None]], 1)
    grad_weights[:, :20] *= 0.99 * (1 - torch.tanh(raw[:, :20]).square_())
    gate = torch.sigmoid(raw[:, 20])
    grad_weights[:, 20] *= 0.99 * gate * (1 - gate)
    # else its alignment, and so the compiled kernel, would depend on B
    pull = 2 * scale[0]
    shrink = scale[2].clone()
    return fields_backward(
        fields, coords, rows, surface, mean, grad_values, grad_weights, pull, shrink, -1 / R
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
    ctx.empty = [] if not counts else None  # torch wants an empty list's structure
    ctx.save_for_backward(fields, coords, starts, *saved)
    ctx.mark_non_differentiable(output[1], starts)


def _backward(ctx, vertices, faces, attributes, terms, position, value, starts, saved):
    fields, coords, starts, *saved = ctx.saved_tensors
    grads = (t.contiguous() for t in (vertices, attributes, terms, position, value))
    grad = torch.ops.trislat.isosurface_backward(
        *grads, fields, coords, starts, saved, ctx.resolution, ctx.training
    )
    return grad, None, ctx.empty, None, None


_isosurface.register_autograd(_backward, setup_context=_setup_context)


def isosurface(
    # coords [N, 4] int32 (batch, x, y, z), each below `resolution`, or a cache over them
    voxels: Tensor | SpatialCache,
    # [N, 53 or 101]: sdf 8 | deform 8 x 3 | weights 21 | color 8 x 6, corners with x fastest
    fields: Tensor,
    resolution: int,  # cubes along a side of the grid
    # quads get a centre and four triangles, which is how gamma learns; else they are split in two
    training: bool,
) -> Surfaces:
    """Extract the surface where the signed distance, 1 / resolution less than `sdf` says, changes
    its sign.

    Vertices, faces and their order are those of the dense grid in which vertices without a voxel
    are outside (signed distance 1, no displacement, color 0.5) and cubes without a voxel have
    neutral weights. Faces exist around grid edges that four cubes share, so a surface is open where
    it leaves the grid. The regularizer is, per scene, the mean squared distance of corner values to
    their mean, half the mean deviation (kernels.surface.dual) and 0.2 times the mean size of the
    first 20 weights.

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
    *outputs, terms, position, value, starts, _ = torch.ops.trislat.isosurface(
        fields, cache.coords, cache.counts, resolution, training
    )
    regularizer = terms[0] + 0.5 * terms[1] + 0.2 * terms[2]
    return Surfaces(*outputs, regularizer, position, value, *starts[:3].unbind(0))
