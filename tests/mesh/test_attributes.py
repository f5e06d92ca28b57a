import pytest
import torch

from kernels import backend
from kernels.mesh.attributes import flat_normals, interpolate
from kernels.mesh.rasterize import rasterize
from kernels.mesh.reference import flat_normals_reference, interpolate_reference
from tests.helpers.compare import assert_same
from tests.helpers.meshes import batch, positions, soup


def picture(device, width: int = 21, height: int = 14, F: int = 25, dtype=torch.float32):
    """A mesh's vertices, faces, attributes and its rasterised picture."""
    vertices, faces, attributes = soup(F)
    rast = rasterize(positions(vertices, width, height).to(device), faces.to(device), height, width)
    return (
        vertices.to(device, dtype),
        faces.to(device),
        attributes.to(device, dtype),
        rast.to(dtype),
    )


@pytest.mark.parametrize("C", [1, 6])
def test_interpolation_matches_the_reference(device, C):
    _, faces, attributes, rast = picture(device)
    attributes = attributes[:, :C].clone().requires_grad_()
    rast = rast.requires_grad_()
    run = lambda a, r: interpolate(
        a, torch.cat([r[..., :2], rast[..., 2:].detach().to(r)], -1), faces.to(r.device)
    )
    slow = lambda a, r: interpolate_reference(
        a, torch.cat([r[..., :2], rast[..., 2:].detach().to(r)], -1), faces.to(r.device)
    )
    assert_same(run, slow, attributes, rast)


def test_normals_match_the_reference(device):
    vertices, faces, _, rast = picture(device)
    run = lambda v: flat_normals(v, rast.to(v), faces.to(v.device))
    assert_same(
        run,
        lambda v: flat_normals_reference(v, rast.to(v), faces.to(v.device)),
        vertices.requires_grad_(),
    )


def test_float64_matches_the_references_to_rounding():
    vertices, faces, attributes, rast = picture("cpu", dtype=torch.float64)
    with backend.use("torch"):
        assert_same(
            lambda a: interpolate(a, rast, faces),
            lambda a: interpolate_reference(a, rast, faces),
            attributes.requires_grad_(),
        )
        assert_same(
            lambda v: flat_normals(v, rast, faces),
            lambda v: flat_normals_reference(v, rast, faces),
            vertices.requires_grad_(),
        )


def test_the_normal_follows_the_right_hand_rule(device):
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], device=device)
    rast = torch.zeros(1, 1, 2, 4, device=device)
    rast[0, 0, 1] = torch.tensor([0.3, 0.3, 0, 1])
    got = flat_normals(vertices, rast, torch.tensor([[0, 1, 2]], device=device))
    assert got.tolist() == [[[[0, 0, 0], [0, 0, 1]]]]


def test_batched_equals_looped(device):
    """Colours of vertices, shared by the views of a scene, and depths of clip rows; normals."""
    clip, faces, layout = batch(device)
    rast = rasterize(clip, faces, 12, 18, layout.clip_table).detach()
    N = layout.vertices.starts[-1]
    rng = torch.Generator().manual_seed(7)
    colors, vertices = (
        torch.rand(N, 3, generator=rng).to(device).requires_grad_() for _ in range(2)
    )
    depth = clip[:, 3:].detach().requires_grad_()
    runs = [
        (interpolate, colors, layout.vertex_table),
        (interpolate, depth, layout.clip_table),
        (flat_normals, vertices, layout.vertex_table),
    ]
    for op, values, table in runs:
        out = op(values, rast, faces, table)
        upstream = torch.randn(out.shape, generator=rng).to(device)
        (total,) = torch.autograd.grad(out, values, upstream)
        (again,) = torch.autograd.grad(op(values, rast, faces, table), values, upstream)
        assert torch.equal(total, again) and total.abs().max() > 0
        looped = torch.zeros_like(total)
        for v, (f, n, row, rows) in enumerate(table.tolist()):
            mine = values[row : row + rows].detach().requires_grad_()
            alone = op(mine, rast[v : v + 1], faces[f : f + n])
            assert torch.equal(alone[0], out[v])
            looped[row : row + rows] += torch.autograd.grad(alone, mine, upstream[v : v + 1])[0]
        assert (total - looped).abs().max() <= 2e-6 * total.abs().max()


@pytest.mark.parametrize("op", [interpolate, flat_normals], ids=["interpolate", "flat_normals"])
def test_registered_with_torch(device, op):
    clip, faces, layout = batch(device)
    rast = (
        rasterize(clip, faces, 12, 18, layout.clip_table).detach().requires_grad_(op is interpolate)
    )
    values = torch.rand(layout.vertices.starts[-1], 3, device=device, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64, device=device)
    registered = getattr(torch.ops.trislat, op.__name__).default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        registered, (values, rast, faces, layout.vertex_table, none), test_utils=checks
    )


def test_a_row_that_is_not_there(device):
    _, faces, attributes, rast = picture(device)
    if backend.is_torch(rast):
        with pytest.raises(ValueError, match="faces name row .* of 9 rows of attributes"):
            interpolate(attributes[:9], rast, faces)
    else:
        got = interpolate(attributes[:9], rast, faces)
        absent = (faces.long() >= 9).any(1)[rast[..., 3].long().clamp(min=1) - 1] & (
            rast[..., 3] > 0
        )
        assert (
            absent.any()
            and torch.equal(got.isnan().all(-1), absent)
            and not got[~absent].isnan().any()
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attributes": torch.zeros(5)}, r"attributes must be \[N, C\], not \[5\]"),
        (
            {"attributes": torch.zeros(5, 1, dtype=torch.int32)},
            "attributes must be floating point, not torch.int32",
        ),
        ({"rast": torch.zeros(1, 4, 4, 3)}, r"rast must be \[V, H, W, 4\], not \[1, 4, 4, 3\]"),
        ({"rast": torch.zeros(2, 4, 4, 4)}, "rast has 2 views, the table 1"),
        ({"faces": torch.zeros(2, 2, dtype=torch.int32)}, r"faces must be \[F, 3\], not \[2, 2\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_says_what_is_wrong(change, message):
    args = {
        "attributes": torch.zeros(5, 2),
        "rast": torch.zeros(1, 4, 4, 4),
        "faces": torch.zeros(2, 3, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        interpolate(**(args | change))


def test_wrong_vertices_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"vertices must be \[N, 3\], not \[5, 2\]"):
        flat_normals(
            torch.zeros(5, 2), torch.zeros(1, 4, 4, 4), torch.zeros(2, 3, dtype=torch.int32)
        )
