"""Random inputs of every op, drawn from one seed: sizes with 0 and 1 among them, dtypes, strides,
and the op's reference.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.attention.op import segment_attention, window_attention
from kernels.attention.reference import segment_attention_reference, window_attention_reference
from kernels.conv.op import sparse_conv, subdivide_conv
from kernels.conv.order import octant_order, tap_order
from kernels.conv.reference import sparse_conv_reference, subdivide_conv_reference
from kernels.gaussian.reference import splat_reference
from kernels.gaussian.splat import splat
from kernels.mesh.antialias import antialias, antialias_reference
from kernels.mesh.clip import projection, to_clip, to_clip_reference
from kernels.mesh.interpolate import interpolate, interpolate_reference
from kernels.mesh.normals import flat_normals, flat_normals_reference
from kernels.mesh.packing import make_mesh_layout
from kernels.mesh.rasterize import rasterize
from kernels.mesh.rasterize_reference import rasterize_reference
from kernels.mesh.render import render_mesh, render_mesh_reference
from kernels.norm.gelu import gelu, gelu_reference
from kernels.norm.group import group_norm, group_norm_reference
from kernels.norm.layer import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)
from kernels.radiance.raymarch import raymarch
from kernels.radiance.reference import raymarch_reference
from kernels.similarity import ssim, ssim_reference
from kernels.surface.isosurface import isosurface
from kernels.surface.reference import isosurface_reference
from kernels.voxels.cache import SpatialCache
from kernels.voxels.children import child_neighbours, parent_size
from kernels.voxels.curves import MODES, serialized_windows, serialized_windows_reference
from kernels.voxels.hash import (
    build_table,
    lookup,
    lookup_reference,
    neighbours,
    neighbours_reference,
)
from kernels.voxels.pool import pool, pool_reference, pooling, unpool, unpool_reference
from kernels.voxels.window import Windows, window_partition, window_partition_reference
from tests.conftest import TOLERANCE
from tests.gaussian import test_splat
from tests.helpers import triangles as meshes
from tests.mesh.test_rasterize import positions
from tests.radiance import test_raymarch
from tests.voxels.test_curves import lists
from tests.voxels.test_window import groups, voxels

# of fp32: where upstream gradients nearly cancel the torch path too is off by up to 2.4e-5
RENDERED = 5e-5
# the size of terms that cancel to nothing, such as in the gradient of the score of an only key
CANCELLED = 0.25


class Case(NamedTuple):
    """`op` and `reference` of the same tensors, which require gradients; without tensors both
    return what must be equal.
    """

    op: Callable
    reference: Callable
    tensors: list[Tensor]
    tolerance: float | None = None
    least: float = 1e-3  # as in `assert_close`


class Draw:
    """Random choices from one seed. A case is small where Triton's interpreter computes it."""

    def __init__(self, seed: int, device: torch.device):
        self.rng = torch.Generator().manual_seed(seed)
        self.device = device
        self.seed = seed
        self.fast = backend.name(torch.empty(0, device=device)) != "interpreter"
        self.compiled = not backend.is_torch(torch.empty(0, device=device))

    def number(self, low: int, high: int) -> int:
        """low and low + 1 come often."""
        top = min(high, low + 1) if self.pick(0, 0, 0, 1) else high
        return int(torch.randint(low, top + 1, (), generator=self.rng))

    def pick(self, *choices):
        return choices[int(torch.randint(len(choices), (), generator=self.rng))]

    def width(self, drawn, *few):
        """What kernels are compiled for, such as channels: one of a few, as other tests; on the
        torch path `drawn`.
        """
        return self.pick(*few) if self.compiled else drawn

    def lengths(self, most: int, pieces: int = 5) -> list[int]:
        """Of up to `pieces` samples or segments, in all up to about `most`; none at all and empty
        ones among them.
        """
        return [self.number(0, most // pieces) for _ in range(self.number(0, pieces))]

    def starts(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0
    ) -> Tensor:
        x = torch.randn(shape, generator=self.rng, dtype=torch.float64) * spread
        return x.to(self.device, dtype).requires_grad_()

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (
            torch.rand(shape, generator=self.rng, dtype=torch.float64)
            .to(self.device, dtype)
            .requires_grad_()
        )

    def dtype(self) -> torch.dtype:
        """bf16 is wrong in the interpreter, whatever the kernel."""
        return self.pick(torch.float32, torch.float16, *[torch.bfloat16] * self.fast)

    def exact(self) -> torch.dtype:
        """Of ops that decide by comparing numbers: where they can, in float64, in which reference
        and op decide alike.
        """
        return (
            torch.float64 if backend.is_torch(torch.empty(0, device=self.device)) else torch.float32
        )

    def cache(self, most: int, extent: int = 6) -> SpatialCache:
        counts = [min(n, extent**3) for n in self.lengths(most)] or [0]
        return SpatialCache(voxels(counts, (extent,) * 3, self.seed).to(self.device), len(counts))

    def strided(self, op: Callable) -> Callable:
        """`op` of copies that lie in memory otherwise (strides, offset, NaN between rows), its
        first output transposed: the gradient that comes back to it is strided too.
        """
        ways = [self.pick(0, 1, 2, 3) for _ in range(4)]

        def lay(t: Tensor, way: int) -> Tensor:
            if way == 1 and t.ndim:
                return torch.nn.functional.pad(t, (1, 2), value=float("nan"))[..., 1:-2]
            if way == 2:
                return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
            if way == 3 and t.ndim > 1:
                return t.transpose(0, -1).contiguous().transpose(0, -1)
            return t

        def run(*tensors: Tensor):
            out = op(*(lay(t, ways[i % 3]) for i, t in enumerate(tensors)))
            outputs = (
                [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)]
            )
            if ways[3] % 2 and outputs[0].ndim > 1:
                outputs[0] = outputs[0].mT.clone(memory_format=torch.contiguous_format).mT
            return outputs

        return run


def norms(d: Draw) -> Case:
    """Layer norm with and without a bias, of a residual sum, and GELU."""
    dtype = d.dtype()
    N = d.number(0, 200)
    if d.pick(0, 1):
        C = d.width(d.pick(1, d.number(3, 300)), 1, 33, 48)
        eps = d.pick(1e-6, 1e-5)
        x = d.normal(N, C, dtype=dtype)
        if d.pick(0, 1):
            return Case(
                lambda x, *bias: layer_norm(x, eps, *bias),
                lambda x, *bias: layer_norm_reference(x, eps, *bias),
                [x, *[d.normal(C)] * d.pick(0, 1)],
                None,
                CANCELLED,
            )
        return Case(
            lambda x, h: add_layer_norm(x, h, eps),
            lambda x, h: add_layer_norm_reference(x, h, eps),
            [x, d.normal(N, C, dtype=dtype)],
            None,
            CANCELLED,
        )
    shape = [N, *[d.width(d.number(1, 7), 1, 5)] * d.number(0, 2)]
    biases = [d.normal(shape[-1])] * d.pick(0, 1) if shape[-1] else []
    # torch's 1 + tanh cancels where x is far below 0
    x = d.normal(*shape, dtype=dtype, spread=3.0)
    return Case(gelu, gelu_reference, [x, *biases], None, CANCELLED)


def attention(d: Draw) -> Case:
    """In windows, with and without the norm and the rotation, and among the lists of keys along a
    curve.
    """
    dtype = d.dtype()
    H, D = d.width((d.number(1, 2), 8 * d.number(1, 8)), (1, 16), (2, 24))
    if d.pick(0, 0, 1):
        cache = d.cache(150 if d.fast else 60)
        arguments = d.number(1, 40), d.pick(*MODES), d.number(0, 5), d.number(0, 3)
        windows = serialized_windows(cache, cache.batch_size, *arguments)
        N = len(cache)
    else:
        lengths = d.lengths(400 if d.fast else 80)
        N = sum(lengths)
        most = max(lengths, default=0)
        order = torch.randperm(N, generator=d.rng).int().to(d.device)
        windows = Windows(order, d.starts(lengths), d.pick(most, N, most + 300))
    tensors = [d.normal(N, 3, H, D, dtype=dtype)]
    keys = ("q_gamma", "k_gamma")
    if d.pick(0, 0, 1):
        tensors += [d.normal(H, D) for _ in keys]
    phases = None
    scale = d.pick(None, 0.4)
    if d.pick(0, 0, 1):
        angles = d.normal(N, D // 2).detach()
        phases = torch.polar(torch.ones_like(angles), angles)

    def op(qkv, *gamma):
        return window_attention(
            qkv, windows, scale=scale, phases=phases, **dict(zip(keys, gamma, strict=False))
        )

    def reference(qkv, *gamma):
        exact = None if phases is None else phases.cpu().to(torch.complex128)
        return window_attention_reference(qkv, windows, scale, *(gamma or (None, None)), exact)

    # rows that are normed and scaled by gamma have scores D ** 0.5 times as large, and their
    # rounding too
    return Case(
        op, reference, tensors, 2 * TOLERANCE[dtype] if len(tensors) > 1 else None, CANCELLED
    )


def segments(d: Draw) -> Case:
    dtype = d.dtype()
    H, D = d.width((d.number(1, 2), 8 * d.number(1, 8)), (2, 24))
    queries = d.lengths(300 if d.fast else 60)
    keys = [d.number(0, 60) for _ in queries]
    q_starts, k_starts = d.starts(queries), d.starts(keys)
    tensors = [d.normal(sum(n), H, D, dtype=dtype) for n in (queries, keys, keys)]
    op, slow = segment_attention, segment_attention_reference
    return Case(
        lambda *x: op(*x, q_starts, k_starts),
        lambda *x: slow(*x, q_starts, k_starts),
        tensors,
        None,
        CANCELLED,
    )


def convolution(d: Draw) -> Case:
    cache = d.cache(60 if d.fast else 30)
    dtype = d.dtype()
    k = d.pick(1, 3, 3)
    CI, CO = d.width((d.number(1, 40), d.number(1, 40)), (6, 4))
    subdivided = k == 3 and d.pick(False, True)
    tensors = [
        d.normal(len(cache), CI, dtype=dtype),
        d.normal(CO, k, k, k, CI, spread=(k**3 * CI) ** -0.5),
    ]
    tensors += [d.normal(CO)] * d.pick(0, 1)
    near = cache.get(neighbours, k)
    ordered = d.pick(False, True)
    order = (
        None if not ordered else cache.get(octant_order) if subdivided else cache.get(tap_order, k)
    )
    op, fine = (subdivide_conv, child_neighbours(near)) if subdivided else (sparse_conv, near)
    slow = subdivide_conv_reference if subdivided else sparse_conv_reference
    return Case(
        lambda x, w, b=None: op(x, w, b, near, order=order),
        lambda x, w, b=None: slow(x, w, b, fine.cpu()),
        tensors,
        # the weight, and for children sums of its taps, are rounded to the features' type, which
        # the reference does not do
        {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype],
        CANCELLED,
    )


def group_norms(d: Draw) -> Case:
    lengths = d.lengths(120)
    dtype = d.dtype()
    silu = d.pick(False, True)
    groups_, size = d.width((d.number(1, 4), d.number(2, 20)), (3, 2), (4, 4))
    C = groups_ * size
    tensors = [d.normal(sum(lengths), C, dtype=dtype), d.normal(C), d.normal(C)]
    starts = d.starts(lengths)
    op, slow = group_norm, group_norm_reference
    arguments = starts, groups_
    return Case(
        lambda *x: op(*x, *arguments, silu=silu),
        lambda *x: slow(*x, *arguments, silu=silu),
        tensors,
        None,
        CANCELLED,
    )


def scales(d: Draw) -> Case:
    cache = d.cache(100, 9)
    table = cache.get(pooling, d.number(1, 4))
    dtype = d.dtype()
    C = d.width(d.number(1, 50), 5, 33)
    index = table.index.cpu()
    S = len(table)
    op, slow, rows = d.pick((pool, pool_reference, len(cache)), (unpool, unpool_reference, S))
    return Case(
        lambda x: op(x, table), lambda x: slow(x, index, S), [d.normal(rows, C, dtype=dtype)]
    )


def similarity(d: Draw) -> Case:
    side = 24 if d.fast else 9
    shape = d.number(0, 2), d.number(1, 3), d.number(1, side), d.number(1, side)
    # a variance of 16-bit numbers is not one of their roundings: 8 bits are too few
    dtype = d.pick(torch.float32, torch.float16)
    a = d.uniform(*shape, dtype=dtype)
    b = (a.detach() + 0.2 * d.normal(*shape, dtype=dtype).detach()).clamp(0, 1).requires_grad_()
    # sums instead of means, so that the tolerance sees the gradients
    pixels = a[0].numel() if len(a) else 1
    return Case(
        lambda a, b: ssim(a, b) * pixels, lambda a, b: ssim_reference(a, b) * pixels, [a, b]
    )


def surfaces(d: Draw) -> Case:
    R, channels, training = d.number(1, 6), d.pick(53, 101), d.pick(False, True)
    cache = d.cache(40, R)
    coords = cache.coords.cpu()
    B = cache.batch_size
    tensors = [d.normal(len(cache), channels, dtype=d.exact())]
    return Case(
        lambda f: isosurface(cache, f, R, training),
        lambda f: isosurface_reference(coords, f, R, training, B),
        tensors,
    )


def _mesh(d: Draw) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Vertices, faces, clip positions, height, width of one view of one mesh."""
    F = d.number(0, 16)
    height, width = (d.number(1, 14), d.number(1, 14))
    vertices, faces, _ = meshes.soup(F, d.seed)
    return vertices, faces, positions(vertices, width, height, d.pick(2.0, 1.2, 0.5)), height, width


def _picture(clip: Tensor, faces: Tensor, height: int, width: int, d: Draw) -> Tensor:
    dtype = d.exact()
    with backend.use("torch"):
        return rasterize(clip, faces, height, width).to(d.device, dtype)


def rasters(d: Draw) -> Case:
    _, faces, clip, height, width = _mesh(d)
    tensor = clip.to(d.device, d.exact()).requires_grad_()
    there = faces.to(d.device)
    return Case(
        lambda c: rasterize(c, there, height, width),
        lambda c: rasterize_reference(c, faces, height, width),
        [tensor],
        1e-4,
    )


def attributes(d: Draw) -> Case:
    """Interpolated values, and normals of faces."""
    vertices, faces, *rest = _mesh(d)
    rast = _picture(rest[0], faces, *rest[1:], d)
    there = faces.to(d.device)
    exact = rast.cpu().double()
    if d.pick(0, 1):
        tensor = vertices.to(rast).requires_grad_()
        return Case(
            lambda v: flat_normals(v, rast, there),
            lambda v: flat_normals_reference(v, exact, faces),
            [tensor],
            1e-4,
        )
    tensor = d.normal(len(vertices), d.number(1, 7), dtype=rast.dtype)
    return Case(
        lambda a: interpolate(a, rast, there),
        lambda a: interpolate_reference(a, exact, faces),
        [tensor],
    )


def silhouettes(d: Draw) -> Case:
    _, faces, clip, height, width = _mesh(d)
    rast = _picture(clip, faces, height, width, d)
    there = faces.to(d.device)
    exact = rast.cpu().double()
    tensors = [
        d.normal(1, height, width, d.number(1, 4), dtype=rast.dtype),
        clip.to(rast).requires_grad_(),
    ]
    return Case(
        lambda i, c: antialias(i, rast, c, there),
        lambda i, c: antialias_reference(i, exact, c, faces),
        tensors,
        1e-4,
    )


def _scenes(
    d: Draw, most: int, views: int
) -> tuple[list[int], list[int], Tensor, Tensor, list[int]]:
    """Starts of vertices and of faces of 1 to 3 scenes of up to `most` faces, vertices, faces, the
    scene of each view.
    """
    soups = [meshes.soup(d.number(0, most), d.seed + i) for i in range(d.number(1, 3))]
    starts = [d.starts([len(part[i]) for part in soups]).tolist() for i in (0, 1)]
    vertices, faces = (torch.cat([part[i] for part in soups]) for i in (0, 1))
    return (
        *starts,
        vertices,
        faces,
        [d.number(0, len(soups) - 1) for _ in range(d.number(0, views))],
    )


def projections(d: Draw) -> Case:
    starts, face_starts, vertices, _, view_scene = _scenes(d, 60, 4)
    view = meshes.cameras(len(view_scene), 1, 1, d.pick(2.0, 0.5))
    layout = make_mesh_layout(starts, face_starts, view_scene, d.device)
    matrix = projection(view, 1.0, d.pick(3.0, 100.0), torch.float64)
    tensor = vertices.to(d.device, d.exact()).requires_grad_()
    there = matrix.to(d.device, d.exact())

    def reference(v: Tensor) -> Tensor:
        rows = [
            to_clip_reference(v[starts[s] : starts[s + 1]], m)
            for m, s in zip(matrix, view_scene, strict=True)
        ]
        return torch.cat([v.new_zeros(0, 4) + 0 * v.sum(), *rows])

    return Case(lambda v: to_clip(v, there, layout.vertices), reference, [tensor])


def mesh_pictures(d: Draw) -> Case:
    """All pictures of several scenes and views at once."""
    starts, face_starts, vertices, faces, view_scene = _scenes(d, 10, 2)
    view = meshes.cameras(len(view_scene), d.number(1, 11), d.number(1, 11), d.pick(2.0, 1.2, 0.5))
    tensors = [vertices.to(d.device, d.exact()).requires_grad_()]
    if channels := d.pick(0, 3, 6):
        tensors.append(d.normal(len(vertices), channels, dtype=d.exact()))
    there = (view.to(d.device), view_scene)
    index = faces.to(d.device, d.pick(torch.int32, torch.int64))

    def outputs(render: Callable, triangles: Tensor, *rest) -> Callable:
        def run(v: Tensor, a: Tensor | None = None) -> list[Tensor]:
            image = render(v, triangles, a, starts, face_starts, *rest)
            known = (image.alpha, image.depth, image.normal, image.color, image.normal_map)
            return [t for t in known if t is not None]

        return run

    return Case(
        outputs(render_mesh, index, *there),
        outputs(render_mesh_reference, faces, view, view_scene),
        tensors,
        1e-4,
    )


def gaussians(d: Draw) -> Case:
    sizes = [d.number(0, 12) for _ in range(d.number(1, 3))]
    V = d.number(1, 3)
    size = d.number(1, 33), d.number(1, 33)
    view_scene = [d.number(0, len(sizes) - 1) for _ in range(V)]
    starts = d.starts(sizes).tolist()
    tensors = test_splat.scene(sum(sizes), d.device, d.seed, d.exact())
    view = test_splat.camera(V, *size)
    light = test_splat.colors(V)
    there = view.to(d.device), view_scene, light.to(d.device)
    return Case(
        lambda *x: test_splat.both(splat(*x, starts, *there, 0.3)),
        lambda *x: test_splat.both(splat_reference(*x, starts, view, view_scene, light, 0.3)),
        tensors,
        RENDERED,
    )


def radiance(d: Draw) -> Case:
    sizes = [d.number(0, 6) for _ in range(d.number(1, 3))]
    V = d.number(1, 2)
    resolution = d.pick(8, 16, 20, 32)
    rank, dim = d.width((d.number(1, 4), d.number(2, 5)), (1, 4), (2, 4), (3, 5))
    density = d.pick(0.0, 60.0)
    view_scene = [d.number(0, len(sizes) - 1) for _ in range(V)]
    position, tensors, starts = test_raymarch.voxels(
        sizes, resolution, rank, dim, d.device, d.seed, density, d.exact()
    )
    view = test_raymarch.camera(V, d.number(1, 17), d.number(1, 17), resolution)
    light = test_raymarch.colors(V)
    offset = test_raymarch.safe_offset(position, starts, view, view_scene, resolution, dim)
    there = [t.to(d.device) for t in (view, light, offset)]
    at = position.cpu().double()
    return Case(
        lambda *x: test_raymarch.outputs(
            raymarch(position, *x, starts, there[0], view_scene, there[1], resolution, there[2])
        ),
        lambda *x: test_raymarch.outputs(
            raymarch_reference(at, *x, starts, view, view_scene, light, resolution, offset)
        ),
        tensors,
        max(RENDERED, 5e-7 * resolution * dim),
    )


def coordinates(d: Draw) -> Case:
    """Tables, neighbours, their children's, cubes and curves: equal, not close."""
    cache = d.cache(60, d.pick(5, 6, 11))
    B = 0
    B = cache.batch_size
    coords = cache.coords.cpu()
    k = d.pick(1, 3, 5)
    window = d.number(1, 7)
    shift = d.number(-4, 4)
    curve = d.number(1, 40), d.pick(*MODES), d.number(-9, 9), d.number(0, 4)
    asked = (torch.randint(-2, 12, (d.number(0, 40), 4), generator=d.rng)).int()

    def ours():
        fine = child_neighbours(neighbours(cache, parent_size(k)), k) if len(cache) < 30 else None
        found = lookup(build_table(cache), asked.to(d.device))
        cubes = window_partition(cache, B, window, shift)
        line = serialized_windows(cache, B, *curve)
        return (
            found.tolist(),
            neighbours(cache, k).tolist(),
            None if fine is None else fine.tolist(),
            groups(cubes),
            lists(line),
        )

    def expected():
        fine = (
            neighbours_reference(cache.subdivide().coords.cpu(), k).tolist()
            if len(cache) < 30
            else None
        )
        cubes = window_partition_reference(coords, B, window, shift)
        line = serialized_windows_reference(coords, B, *curve)
        near = neighbours_reference(coords, k).tolist()
        return (
            lookup_reference(coords, asked).tolist(),
            near,
            fine,
            [rows for _, rows in cubes],
            line,
        )

    return Case(ours, expected, [])


DRAWS = {
    draw.__name__: draw
    for draw in (
        norms,
        attention,
        segments,
        convolution,
        group_norms,
        scales,
        similarity,
        surfaces,
        projections,
        rasters,
        attributes,
        silhouettes,
        mesh_pictures,
        gaussians,
        radiance,
        coordinates,
    )
}
