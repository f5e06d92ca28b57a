"""The published mesh renderer: its face ids, images, blended pairs and gradients."""

import pytest
import torch

from kernels import backend
from kernels.camera import Camera
from kernels.mesh.antialias import antialias, antialias_op, opposite_vertices
from kernels.mesh.attributes import flat_normals, interpolate
from kernels.mesh.packing import single_table
from kernels.mesh.rasterize import rasterize
from kernels.mesh.render import face_camera, render_mesh
from kernels.similarity import ssim
from tests.helpers.golden import golden
from tests.helpers.hardware import COMPILED, implementation

SMALLEST = ["h_behind_20", "c_dense3_20", "d_huge2_26", "f_degen2_28"]
CASES = [
    "a_soup_40",
    "a_soup_rect_33x43",
    "b_ico1_48",
    "b_ico2_40",
    "b_ico3_48",
    "c_dense3_20",
    "d_huge2_26",
    "d_huge_40",
    "e_pixgrid_32",
    "f_degen2_28",
    "f_degen_40",
    "g_nonman2_30",
    "g_nonman_40",
    "h_behind_20",
]
NAMES = ["mask", "depth", "normal", "color"]
CHANNELS = dict(zip(NAMES, (1, 1, 3, 3), strict=True))


def cases(slow_on_kernels):
    """All cases on the torch path, those named also on kernels, the others there with -m slow."""
    on_torch = [pytest.param("torch", case, id=f"torch-{case}") for case in CASES]
    marks = {case: [] if case in SMALLEST else [pytest.mark.slow] for case in CASES}
    return on_torch + [
        pytest.param("kernels", case, id=f"kernels-{case}", marks=marks[case])
        for case in slow_on_kernels
    ]


@pytest.fixture
def here(request):
    """The device of one implementation: "torch" or "kernels"."""
    if COMPILED and request.param == "torch":
        pytest.skip("on a GPU the kernels run")
    with implementation("torch" if request.param == "torch" else "interpreter") as device:
        yield device


def close(got, want, limit, what):
    difference = (got.detach().cpu().double() - want.double()).norm()
    assert difference <= limit * want.double().norm() + 1e-12, (
        f"{what}: {difference / want.double().norm():.1e}"
    )


def image_close(got, want, what):
    worst = (got.detach().cpu() - want).abs().max()
    assert worst <= 2e-5 * want.abs().max(), f"{what}: {worst:.1e}"


@pytest.mark.parametrize("here, case", cases(CASES), indirect=["here"])
def test_published_ids_images_and_gradients(here, case):
    _, t = golden(f"mesh_{case}")
    faces = t["faces"].to(here)
    H, W = t["rast"].shape[1:3]
    E = t["extrinsics"].to(here)
    vertices = t["vertices"].to(here).requires_grad_()
    attributes = t["vertex_attrs"][:, :3].to(here).requires_grad_()
    z = vertices.detach() @ E[2, :3] + E[2, 3]
    z = z[:, None].requires_grad_()
    clip = t["clip"][0].to(here).requires_grad_()

    rast = rasterize(clip, faces, H, W)
    ids = rast[..., 3].detach().cpu().long()
    want_ids = t["rast"][..., 3].long()
    other = ids != want_ids
    if other.any():  # only the same face with its corners in another order, of equal depth
        assert (
            (t["ambiguous"][None][other] & 1).all()
            and (ids[other] > 0).all()
            and (want_ids[other] > 0).all()
        )
        a, b = (t["faces"][i[other] - 1].sort(1).values for i in (ids, want_ids))
        assert torch.equal(a, b)
    difference = (rast.detach().cpu() - t["rast"]).abs()[~other]
    assert difference[:, :2].max() <= 2e-5 and difference[:, 2].max() <= 1e-6

    parts = {
        "mask": (rast[..., 3:].detach() > 0).float(),
        "depth": interpolate(z, rast, faces),
        "normal": flat_normals(vertices, rast, faces),
        "color": interpolate(attributes, rast, faces),
    }
    for name in NAMES[1:]:
        image_close(parts[name], t[f"interp_{name}"], name)
    picture = antialias(torch.cat([parts[name] for name in NAMES], -1), rast, clip, faces)
    blended = dict(zip(NAMES, picture.split(list(CHANNELS.values()), -1), strict=True))
    for name in NAMES:
        image_close(blended[name], t[f"aa_{name}"], f"antialiased {name}")
    check_pairs(t, rast, clip, faces, other)
    if case == "h_behind_20":
        assert not rast.any()

    shown = {name: (blended[name] + 1) / 2 if name == "normal" else blended[name] for name in NAMES}
    losses = {name: (shown[name] * t[f"up_{name}"].to(here).float()).sum() for name in NAMES}
    # one backward for all where it is slow
    groups = [[name] for name in NAMES] if backend.is_torch(clip) else [NAMES]
    matrix = torch.linalg.lstsq(
        torch.nn.functional.pad(t["vertices"], (0, 1), value=1).double(), t["clip"][0].double()
    ).solution
    for group in groups:
        leaves = [clip, vertices, z, attributes]
        total = sum(losses[name] for name in group)
        grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        g_clip, g_vertices, g_z, g_attributes = (
            torch.zeros(leaf.shape) if g is None else g.cpu()
            for g, leaf in zip(grads, leaves, strict=True)
        )
        want = lambda key, group=group: sum(t[f"chain_{name}_{key}"] for name in group)
        close(g_clip, want("gclip")[0], 1e-4, f"{group} clip")
        every = (
            g_clip.double() @ matrix[:3].T
            + g_vertices.double()
            + g_z.double() * E[2, :3].cpu().double()
        )
        close(every, want("gvert"), 1e-4, f"{group} vertices")
        if "depth" in group:
            close(g_z, t["chain_depth_gzcam"][0], 1e-4, "depth of vertices")
        if "color" in group:
            close(g_attributes, t["chain_color_gattr"], 1e-4, "attributes")


def check_pairs(t, rast, clip, faces, other):
    """The pairs of pixels that blend, their edges and their alpha."""
    table = single_table(len(faces), len(clip), faces.device)
    opposite = opposite_vertices(faces, table, len(clip))
    image = torch.zeros_like(rast[..., :1])
    none = torch.empty(0, dtype=torch.int64, device=faces.device)
    _, alpha, code = antialias_op(image, rast.detach(), clip.detach(), faces, table, opposite, none)
    alpha = alpha.cpu()
    code = code.cpu().long()
    ids = t["rast"][0, ..., 3].long()
    corners = t["faces"]
    ours = rast[0, ..., 3].detach().cpu().long()

    def edge(ids, x, y, down, second, m):
        face = corners[ids[y + (down & second), x + (second & (1 - down))] - 1].tolist()
        return tuple(sorted((face[m - 2], face[m - 1])))

    got = {}
    want = {}
    for d, _, y, x in code.nonzero().tolist():
        c = int(code[d, 0, y, x]) - 1
        got[x, y, d] = (c // 3, edge(ours, x, y, d, c // 3, c % 3), float(alpha[d, 0, y, x]))
    for (x, y, d, second, m), a in zip(t["aa_items"].tolist(), t["aa_alpha"].tolist(), strict=True):
        want[x, y, d] = (second, edge(ids, x, y, d, second, m), a)
    assert got.keys() == want.keys()
    for key, (second, where, a) in want.items():
        assert got[key][:2] == (second, where) and abs(got[key][2] - a) <= 3e-5


@pytest.mark.parametrize("here, case", cases(CASES), indirect=["here"])
def test_published_backward_of_each_op(here, case):
    """From the published pictures, so each backward alone is compared."""
    _, t = golden(f"mesh_{case}")
    faces = t["faces"].to(here)
    H, W = t["rast"].shape[1:3]
    clip = t["clip"][0].to(here).requires_grad_()
    rast = t["rast"].to(here).requires_grad_()
    upstream = {name: t[f"up_{name}"].to(here).float() for name in NAMES}

    own = rasterize(clip, faces, H, W)
    if torch.equal(own[..., 3].detach().cpu(), t["rast"][..., 3]):
        (g,) = torch.autograd.grad((own[..., :2] * t["up_rast_uv"].to(here).float()).sum(), clip)
        close(g.cpu(), t["rast_gpos"][0], 1e-4, "rasterize")
    attributes = t["vertex_attrs"][:, :3].to(here).requires_grad_()
    g_attributes, g_rast = torch.autograd.grad(
        (interpolate(attributes, rast, faces) * upstream["color"]).sum(), (attributes, rast)
    )
    close(g_attributes, t["interp_color_gattr"], 1e-4, "interpolate")
    close(g_rast[..., :2], t["interp_color_grast_uv"], 1e-4, "interpolate to (u, v)")
    assert not g_rast[..., 2:].any()
    if "interp_normal_gattr" in t:  # faces with corners of their own
        split = torch.arange(3 * len(faces), device=here).view(-1, 3)
        normals = torch.zeros(3 * len(faces), 3, device=here, requires_grad=True)
        (g,) = torch.autograd.grad(
            (interpolate(normals, rast, split) * upstream["normal"]).sum(), normals
        )
        close(g.view(-1, 3, 3), t["interp_normal_gattr"], 1e-4, "interpolate split corners")
    image = t["interp_color"].to(here).requires_grad_()
    g_image, g_clip = torch.autograd.grad(
        (antialias(image, rast, clip, faces) * upstream["color"]).sum(), (image, clip)
    )
    close(g_image, t["aa_color_gcolor"], 1e-4, "antialias")
    close(g_clip, t["aa_color_gpos"][0], 1e-4, "antialias to positions")


def test_published_evaluation_picture(device):
    """Four times as wide and high, shrunk; the far plane at 100."""
    note, t = golden("mesh_m_ssaa4_24")
    size = note["resolution"]
    camera = Camera(t["extrinsics"][None], t["intrinsics"][None], size, size).to(device)
    mesh = (t["vertices"].to(device), t["faces"].to(device), t["vertex_attrs"].to(device))
    image = render_mesh(
        *mesh,
        [0, len(mesh[0])],
        [0, len(mesh[1])],
        camera,
        [0],
        note["near"],
        note["far"],
        note["ssaa"],
    )
    pairs = {
        "mask": image.alpha,
        "depth": image.depth,
        "normal": image.normal,
        "color": image.color,
    }
    for name, value in (pairs | {"normal_map": image.normal_map}).items():
        image_close(value.view(t[f"out_{name}"].shape), t[f"out_{name}"], name)


@pytest.mark.parametrize(
    "here", ["torch", pytest.param("kernels", marks=pytest.mark.slow)], indirect=True
)
def test_published_training_pictures_and_gradients(here):
    """Ground truth with turned normals, the prediction, and the gradient of the published loss."""
    note, t = golden("mesh_m_losses_40")
    size = note["resolution"]
    camera = Camera(t["extrinsics"][None], t["intrinsics"][None], size, size).to(here)
    split = lambda kind: (t[f"{kind}_vertices"].to(here), t[f"{kind}_faces"].to(here))
    vertices, faces = split("gt")
    truth = render_mesh(vertices, faces, None, [0, len(vertices)], [0, len(faces)], camera, [0])
    assert truth.color is None and truth.normal_map is None
    image_close(truth.alpha, t["gt_mask"], "mask")
    image_close(truth.depth, t["gt_depth"], "depth")
    image_close(face_camera(truth.normal, camera), t["gt_normal_flipped"], "normal")
    vertices, faces = split("pred")
    vertices.requires_grad_()
    colors = t["pred_vertex_attrs"].to(here).requires_grad_()
    image = render_mesh(vertices, faces, colors, [0, len(vertices)], [0, len(faces)], camera, [0])
    for name, value in (
        ("mask", image.alpha),
        ("depth", image.depth),
        ("normal", image.normal),
        ("color", image.color),
    ):
        image_close(value, t[f"pred_{name}"], name)
    image_close(image.normal_map, t["pred_normal_map"], "normal map")

    mask = t["gt_mask"].to(here)
    target = t["image"].to(here).float() * t["alpha"].to(here)
    l1 = lambda a, b: (a - b).abs().mean()
    perceptual = lambda a, b: l1(a, b) + note["lambdas"]["ssim"] * (1 - ssim(a, b).mean())
    beta = 1 / (2 * note["rep_res"])
    depth = torch.nn.functional.smooth_l1_loss(
        image.depth * mask, t["gt_depth"].to(here) * mask, beta=beta
    )
    normal = perceptual(image.normal * mask, t["gt_normal_flipped"].to(here) * mask)
    color = l1(image.color, target) + note["lambdas"]["color"] * perceptual(image.color, target)
    parts = {
        "mask_loss": l1(image.alpha, mask),
        "depth_loss": depth,
        "normal_loss_perceptual": normal,
        "color_loss": color,
    }
    for name, value in parts.items():
        assert abs(value.item() - note["terms"][name]) <= 1e-4 * note["terms"][name], name
    total = parts["mask_loss"] + note["lambdas"]["depth"] * depth + normal + color
    for got, name in zip(
        torch.autograd.grad(total, (vertices, colors)), ("vertices", "vertex_attrs"), strict=True
    ):
        close(got, t[f"grad_{name}"], 1e-3, name)
