import pytest
import torch

from kernels import backend, reduce
from kernels.mesh import zbuffer_gpu
from kernels.mesh.antialias import opposite_vertices
from kernels.mesh.packing import make_mesh_layout, single_table
from kernels.mesh.pixels_gpu import corner_order, corner_rows
from kernels.mesh.rasterize import rasterize
from kernels.mesh.reference import rasterize_reference
from kernels.reduce import sum_rows
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.meshes import ball, batch, positions, soup


def agrees(clip, faces, H: int, W: int, device) -> None:
    clip = clip.to(device).requires_grad_()
    faces = faces.to(device)
    assert_same(
        lambda c: rasterize(c, faces, H, W),
        lambda c: rasterize_reference(c, faces.cpu(), H, W),
        clip,
    )


@pytest.mark.parametrize("width, height, F", [(1, 1, 12), (7, 5, 20), (33, 17, 30), (3, 40, 16)])
def test_matches_the_reference(device, width, height, F):
    vertices, faces, _ = soup(F)
    agrees(positions(vertices, width, height), faces, height, width, device)


@pytest.mark.parametrize("radius", [0.9, 0.5], ids=["crosses the near plane", "camera inside"])
def test_faces_that_reach_out_of_the_frustum_match_the_reference(device, radius):
    vertices, faces, _ = soup(24, 3, 0.7)
    clip = positions(vertices, 24, 24, radius)
    outside = (clip[:, :3].abs() > clip[:, 3:]).any(1)[faces.long()]
    assert (outside.any(1) & ~outside.all(1)).sum() > 4
    agrees(clip, faces, 24, 24, device)


def test_edges_through_pixel_centres_match_the_reference(device):
    """Left and top edges are inside, right and bottom edges are not."""
    x, y = torch.meshgrid(
        torch.tensor([1.5, 3.5, 5.5]), torch.tensor([0.5, 2.5, 3.5]), indexing="xy"
    )
    clip = torch.stack([x / 4 - 1, y / 2 - 1, 0 * x, 1 + 0 * x], -1).view(-1, 4)
    faces = torch.tensor([[0, 1, 4], [0, 4, 3], [4, 5, 8], [7, 4, 8]])
    agrees(clip, faces, 4, 8, device)
    seen = rasterize(clip.to(device), faces.to(device), 4, 8)[0, ..., 3] > 0
    want = torch.zeros(4, 8, dtype=torch.bool)
    want[0:2, 1:3] = want[2:3, 3:5] = True
    assert torch.equal(seen.cpu(), want)


def test_closed_surface_in_float64_matches_the_reference_to_rounding():
    vertices, faces, _ = ball(6)
    clip = positions(vertices, 30, 20).double().requires_grad_()
    assert_same(
        lambda c: rasterize(c, faces, 20, 30), lambda c: rasterize_reference(c, faces, 20, 30), clip
    )


def test_what_lies_behind_is_not_drawn(device):
    vertices, faces, _ = soup(20)
    clip = positions(vertices, 16, 16, 1e-6)
    clip = torch.stack([clip[:, 0], clip[:, 1], clip[:, 2], -clip[:, 3].abs() - 0.1], 1).to(device)
    assert not rasterize(clip, faces.to(device), 16, 16).any()


def test_the_effective_near_plane(device):
    """A quad across the view at z is seen from near far / (2 far - near) = 0.6 to far = 3."""
    seen = []
    for z in (0.59, 0.61, 2.99, 3.01):
        quad = torch.tensor([[-z, -z, z], [z, -z, z], [-z, z, z], [z, z, z]])
        clip = torch.stack([quad[:, 0], quad[:, 1], 1.5 * quad[:, 2] - 1.5, quad[:, 2]], 1)
        rast = rasterize(clip.to(device), torch.tensor([[0, 1, 2], [1, 3, 2]], device=device), 4, 4)
        seen.append(bool(rast.any()))
        assert (rast[..., 3] > 0).all() == rast.any()
    assert seen == [False, True, True, False]


@pytest.mark.parametrize("reach", [1.0, 1.4], ids=["up to the border", "beyond the frustum"])
def test_shared_edges_cover_every_pixel_once(device, reach, monkeypatch):
    """Exactly one face of a plane covers each pixel, each face drawn as a scene of its own."""
    tiles = {"faces": 32, "few": 0, "pieces": 32, "strides": 1, "pixels": 256}
    monkeypatch.setattr(
        zbuffer_gpu, "_tiles", lambda target: tiles
    )  # all as large faces: few programs
    n = 4
    W = 15
    H = 11
    rng = torch.Generator().manual_seed(2)
    grid = torch.stack(
        torch.meshgrid(*[torch.linspace(-reach, reach, n + 1)] * 2, indexing="xy"), -1
    )
    grid[1:-1, 1:-1] += (torch.rand(n - 1, n - 1, 2, generator=rng) - 0.5) * 0.3
    grid[2, 2] = torch.tensor([1 / W, 1 / H])  # a pixel's centre
    # a vertical edge
    grid[3, 1] = grid[2, 1] * torch.tensor([1.0, 0]) + grid[3, 1] * torch.tensor([0, 1.0])
    w = 1 + torch.rand(n + 1, n + 1, 1, generator=rng)
    clip = torch.cat([grid * w, 0.5 * w, w], -1).view(-1, 4)
    i = torch.arange(n)[:, None] * (n + 1) + torch.arange(n)
    a, b, c, d = (x.flatten() for x in (i, i + 1, i + n + 1, i + n + 2))
    faces = torch.cat([torch.stack([a, b, c], 1), torch.stack([b, c, d], 1)])  # turning both ways
    F = len(faces)
    layout = make_mesh_layout(
        list(range(0, 3 * F + 1, 3)), list(range(F + 1)), list(range(F)), device
    )
    alone = clip[faces].view(-1, 4).to(device)
    corners = torch.arange(3, dtype=torch.int32, device=device).expand(F, 3)
    rast = rasterize(alone, corners, H, W, layout.clip_table)
    assert torch.equal((rast[..., 3] > 0).sum(0).cpu(), torch.ones(H, W, dtype=torch.int64))
    together = rasterize(clip.to(device), faces.to(device), H, W)
    assert torch.equal(
        together[0, ..., 3].long().cpu() - 1, (rast[..., 3] > 0).int().argmax(0).cpu()
    )


def test_equal_depths_show_the_later_face(device):
    vertices, _, _ = soup(1)
    clip = positions(
        torch.tensor([[-0.4, 0.0, -0.4], [0.5, 0.0, -0.3], [0.0, 0.1, 0.5]]), 16, 16
    ).to(device)
    rast = rasterize(clip, torch.tensor([[0, 1, 2]] * 3, device=device), 16, 16)
    assert set(rast[..., 3].unique().tolist()) == {0, 3}


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's numpy
def test_faces_without_area_and_positions_that_are_not_finite_are_not_drawn(device):
    vertices, faces, _ = soup(12, 5)
    clip = positions(vertices, 20, 20)
    want = rasterize(clip.to(device), faces.to(device), 20, 20)
    bad = torch.tensor(
        [[float("nan"), 0, 0, 1], [float("inf"), 0, 0, 1], [0, 0, 0, 0], [0, 0, 0.5, 1]]
    )
    more = torch.tensor(
        [[24, 0, 1], [25, 2, 3], [26, 26, 26], [4, 4, 5], [27, 27, 27], [6, 24, 25]]
    )
    got = rasterize(torch.cat([clip, bad]).to(device), torch.cat([faces, more]).to(device), 20, 20)
    assert torch.equal(got, want) and want.any()


@pytest.mark.parametrize("P, F", [(0, 0), (5, 0)])
def test_nothing_to_see(device, P, F):
    clip = torch.ones(P, 4, device=device, requires_grad=True)
    rast = rasterize(clip, torch.zeros(F, 3, dtype=torch.int32, device=device), 5, 6)
    assert torch.equal(rast, torch.zeros(1, 5, 6, 4, device=device))
    (g,) = torch.autograd.grad(rast.sum(), clip)
    assert torch.equal(g, torch.zeros_like(clip))


def test_batched_equals_looped(device):
    clip, faces, layout = batch(device)
    rast = rasterize(clip, faces, 12, 18, layout.clip_table)
    upstream = torch.randn(rast.shape, generator=torch.Generator().manual_seed(4)).to(device)
    (total,) = torch.autograd.grad(rast, clip, upstream)
    for v, (f, n, row, rows) in enumerate(layout.clip_table.tolist()):
        mine = clip[row : row + rows].detach().requires_grad_()
        alone = rasterize(mine, faces[f : f + n], 12, 18)
        assert torch.equal(alone[0], rast[v])
        (g,) = torch.autograd.grad(alone, mine, upstream[v : v + 1])
        assert_close(total[row : row + rows], g, 1e-6)
    assert (rast[2] == 0).all() and rast[0].any() and rast[1].any()


@pytest.mark.parametrize("target", ["interpreter", "sm_90"])
def test_views_share_their_launches(kernel_device, few_sums, target):
    """Large faces have a launch of their own, but not where one thread can fill the picture."""
    triangle = torch.tensor(
        [[-0.9, -0.9, 0, 1], [0.9, -0.9, 0, 1], [0, 0.9, 0, 1]], device=kernel_device
    )
    clip = triangle.repeat(2, 1).requires_grad_()
    faces = torch.tensor([[0, 1, 2]], device=kernel_device)
    table = torch.tensor([[0, 1, 0, 3], [0, 1, 3, 3]], device=kernel_device)
    stages = (
        "_raster_snap",
        "_raster_small",
        "_raster_resolve",
        "_raster_backward",
    )
    with backend.assume(target):
        few = zbuffer_gpu._tiles(backend.target(clip))["few"]
        for size in (8, int(few**0.5)):
            counts = []
            for views in (1, 2):
                with backend.count_launches() as count:
                    rasterize(clip, faces, size, size, table[:views]).sum().backward()
                counts.append({k: n for k, n in count.items() if k != "_sum_runs"})
            large = {"_raster_large": 1} if size == 8 else {}
            assert counts == [dict.fromkeys(stages, 1) | large] * 2


def test_twice_the_same_bits_and_linear_in_the_upstream_gradient(device):
    clip, faces, layout = batch(device)
    runs = [rasterize(clip, faces, 12, 18, layout.clip_table[:2]) for _ in range(2)]
    assert torch.equal(*runs)
    upstream = torch.randn(runs[0].shape, generator=torch.Generator().manual_seed(4)).to(device)
    once, again, scaled = (
        torch.autograd.grad(run, clip, upstream * scale, retain_graph=True)[0]
        for run, scale in ((runs[0], 1), (runs[1], 1), (runs[0], 2.0**20))
    )
    assert torch.equal(once, again) and torch.equal(once * 2**20, scaled) and once.abs().max() > 0
    assert not once[:, 2].any()


def test_small_and_large_faces_are_drawn_alike(kernel_device, monkeypatch):
    """The two paths, tiles of several sizes, and shared tiles: the same bits."""
    clip, faces, layout = batch(kernel_device)
    shapes = [(0, 32, 1, 256), (10**6, 32, 1, 256), (0, 4, 2, 64), (5, 1, 1, 32)]
    pictures = []
    for few, pieces, strides, pixels in shapes:
        tiles = {"faces": 64, "few": few, "pieces": pieces, "strides": strides, "pixels": pixels}
        monkeypatch.setattr(zbuffer_gpu, "_tiles", lambda target, tiles=tiles: tiles)
        pictures.append(rasterize(clip, faces, 12, 18, layout.clip_table[:1]))
    assert all(torch.equal(p, pictures[0]) for p in pictures) and pictures[0].any()


@pytest.mark.parametrize("B", [16, 64])
def test_sums_by_key(kernel_device, monkeypatch, B):
    """Runs inside a program, across two, across many; keys without rows; rows without keys."""
    monkeypatch.setattr(reduce, "_tiles", lambda target: {"B": B, "num_warps": 2})
    rng = torch.Generator().manual_seed(0)
    counts = torch.tensor([0, 3, B - 3, 1, 5 * B + 2, 0, B, 2, 9 * B, 1])
    key = torch.repeat_interleave(torch.arange(-1, 9), counts).int()
    key = key[torch.randperm(len(key), generator=rng)].to(kernel_device)
    rows = torch.randn(len(key), 3, generator=rng)
    weight = torch.rand(3 * len(key), generator=rng)
    order = key.sort(stable=True).indices
    want = torch.zeros(10, 3, dtype=torch.float64).index_add_(
        0, key.cpu().clamp(min=0), rows.double() * (key.cpu() >= 0)[:, None]
    )
    assert_close(sum_rows(rows.to(kernel_device), key, order, 10), want, 1e-6)
    shared = key.repeat_interleave(3)
    order = shared.sort(stable=True).indices
    value = (
        rows.double().repeat_interleave(3, 0)
        * weight.double()[:, None]
        * (shared.cpu() >= 0)[:, None]
    )
    want = torch.zeros(10, 3, dtype=torch.float64).index_add_(0, shared.cpu().clamp(min=0), value)
    got = sum_rows(rows.to(kernel_device), shared, order, 10, weight.to(kernel_device), 3)
    assert_close(got, want, 1e-6)


def test_corners_are_ordered_by_vertex_and_by_clip_row_at_once(kernel_device):
    clip, faces, layout = batch(kernel_device)
    rast = rasterize(clip, faces, 12, 18, layout.clip_table)
    order = corner_order(rast.detach(), faces, layout.vertex_table)
    rows = corner_rows(rast.detach(), faces, layout.clip_table)[order]
    runs = 1 + int((rows[1:] != rows[:-1]).sum())
    assert runs == len(rows.unique())  # equal rows are neighbours


@pytest.mark.parametrize("seed", range(3))
def test_opposite_vertices_match_a_dictionary(device, seed):
    """Two scenes of few vertices and many faces: some repeated, some naming a vertex twice."""
    rng = torch.Generator().manual_seed(seed)
    faces = torch.randint(0, 6, (40, 3), generator=rng, dtype=torch.int32)
    faces[10] = faces[9].roll(1)
    starts = [0, 25, 40]
    table = torch.tensor([[0, 25, 0, 6], [25, 15, 6, 6]], device=device)
    got = opposite_vertices(faces.to(device), table, 12).cpu()
    for a, b in zip(starts, starts[1:], strict=False):
        thirds: dict[tuple, list[int]] = {}
        for face in faces[a:b].tolist():
            for k in range(3) if len(set(face)) == 3 else ():
                known = thirds.setdefault(tuple(sorted((face[k - 2], face[k - 1]))), [])
                if face[k] not in known and len(known) < 2:
                    known.append(face[k])
        for face, across in zip(faces[a:b].tolist(), got[a:b].tolist(), strict=True):
            for k in range(3):
                known = (
                    thirds.get(tuple(sorted((face[k - 2], face[k - 1]))), [])
                    if len(set(face)) == 3
                    else []
                )
                others = [n for n in known if n != face[k]] if face[k] in known else []
                assert across[k] == (others[0] if others else -1)


def test_registered_with_torch(device):
    clip, faces, layout = batch(device)
    args = (clip, faces, layout.clip_table, layout.most, 60, 12, 18, layout.vertex_table)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.trislat.rasterize.default, args, test_utils=checks)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clip": torch.zeros(5, 3)}, r"clip must be \[P, 4\], not \[5, 3\]"),
        (
            {"clip": torch.zeros(5, 4, dtype=torch.int32)},
            "clip must be floating point, not torch.int32",
        ),
        ({"faces": torch.zeros(2, 4, dtype=torch.int32)}, r"faces must be \[F, 3\], not \[2, 4\]"),
        ({"faces": torch.zeros(2, 3)}, "faces must be int32 or int64, not torch.float32"),
        (
            {"faces": torch.tensor([[0, 1, 2], [0, 1, 5]])},
            "1 of 2 faces .* name a vertex .*: 5 of 5 vertices, counted from 0",
        ),
        (
            {"faces": torch.tensor([[0, -1, 2], [0, 1, 7]])},
            "2 of 2 faces .* name a vertex .*: 7 of 5 vertices",
        ),
        ({"height": 0}, "height must be a whole number, at least 1, not 0"),
        ({"width": 2.0}, "width must be a whole number, at least 1, not 2.0"),
        ({"height": 4096, "width": 4096}, "4096 x 4096 has 16777216 pixels, more than 8388608"),
        (
            {"table": torch.zeros(1, 3, dtype=torch.int64)},
            r"table must be \[V, 4\] int64, not \[1, 3\]",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_says_what_is_wrong(device, change, message):
    args = {
        "clip": torch.ones(5, 4),
        "faces": torch.zeros(2, 3, dtype=torch.int32),
        "height": 4,
        "width": 4,
    } | change
    args = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    with pytest.raises(ValueError, match=message):
        rasterize(**args)


def test_kernels_take_no_float64(kernel_device):
    with pytest.raises(ValueError, match="fp32: float64 is for the torch path only"):
        rasterize(
            torch.ones(3, 4, dtype=torch.float64, device=kernel_device),
            torch.zeros(1, 3, dtype=torch.int32, device=kernel_device),
            4,
            4,
        )


def test_a_table_names_one_view_of_one_mesh():
    assert single_table(7, 5, torch.device("cpu")).tolist() == [[0, 7, 0, 5]]
