"""The losses of meshes against the published trainer's numbers; empty meshes, absent surfaces."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import models
from kernels.camera import Camera, Image
from kernels.mesh.render import face_camera, render_mesh
from models import MeshScene
from tests.helpers.compare import assert_close
from tests.helpers.golden import golden
from train.data.batch import Meshes
from train.losses.geometry import LAMP, SurfaceLoss, score_surfaces, shaded, tsdf
from train.mesh import BASE

SIZE = 24


def test_signed_distances_match_published():
    meta, t = golden("loss_mesh_trainer")
    losses, values = [], []
    for i in range(2):
        get = lambda name, i=i: t[f"obj{i}/{name}"]
        camera = Camera(get("extrinsics")[None], get("intrinsics")[None], 48, 48)
        uv, z = camera.project(get("tsdf_v"))
        assert (uv[0] - get("project_cv_uv")).abs().max() < 1e-5 and (
            z[0] - get("project_cv_depth")
        ).abs().max() < 1e-5
        values.append(get("tsdf_s").clone().requires_grad_())
        losses.append(tsdf(get("tsdf_v"), values[-1], get("depth")[None], camera, meta["res"])[0])
        assert losses[-1].item() == pytest.approx(get("tsdf_loss").item(), rel=1e-5)
    mean = torch.stack(losses).mean()
    assert mean.item() == pytest.approx(t["tsdf_loss_mean"].item(), rel=1e-5)
    for i, grad in enumerate(torch.autograd.grad(mean, values)):
        # in float64 ours is 2.9e-5 from the published one, which is fp32 of a sample of a rough
        # depth picture
        assert_close(grad, t[f"obj{i}/grad_tsdf_s"], 4e-5, f"gradient {i}")


def test_normals_are_turned_and_compared_as_published():
    meta, t = golden("loss_mesh_trainer")
    matrices = [
        torch.stack([t[f"obj{i}/{name}"] for i in range(2)])
        for name in ("extrinsics", "intrinsics")
    ]
    camera = Camera(*matrices, 48, 48)
    assert (face_camera(t["normal_in"].float(), camera) - t["normal_flipped"]).abs().max() < 1e-5
    terms = SurfaceLoss().reconstruction(t["perc_pred"].float(), t["perc_gt"].float())
    assert terms["l1"].item() == pytest.approx(t["perc_terms/normal_loss"].item(), abs=1e-5)
    assert terms["ssim"].item() == pytest.approx(t["perc_terms/normal_loss_ssim"].item(), abs=1e-5)


def test_the_sum_of_a_rendered_mesh_matches_published():
    """Every picture term with its weight, but LPIPS; and gradients of vertices and colours."""
    note, t = golden("mesh_m_losses_40")
    size = note["resolution"]
    camera = Camera(t["extrinsics"][None], t["intrinsics"][None], size, size)
    draw = lambda v, f, a: render_mesh(v, f, a, [0, len(v)], [0, len(f)], camera, [0])
    vertices = t["pred_vertices"].clone().requires_grad_()
    colors = t["pred_vertex_attrs"].clone().requires_grad_()
    image = draw(vertices, t["pred_faces"], colors)
    true = draw(t["gt_vertices"], t["gt_faces"], None)
    true = Image(None, true.alpha, true.depth, face_camera(true.normal, camera))
    terms = SurfaceLoss().pictures(image, true, t["image"].float() * t["alpha"], note["rep_res"])
    weights = BASE.weights
    published = {
        "mask_loss": terms["mask"],
        "depth_loss": terms["depth"],
        "normal_loss_perceptual": weights.normal_l1 * terms["normal_l1"]
        + weights.normal_ssim * terms["normal_ssim"],
        "color_loss": weights.l1 * terms["l1"] + weights.ssim * terms["ssim"],
    }
    for name, value in published.items():
        assert value.item() == pytest.approx(note["terms"][name], rel=1e-4), name
    total = sum(getattr(weights, name) * value for name, value in terms.items())
    for got, name in zip(
        torch.autograd.grad(total, (vertices, colors)), ("vertices", "vertex_attrs"), strict=True
    ):
        want = t[f"grad_{name}"]
        assert (got - want).norm() <= 1e-3 * want.norm(), name


def box(size: float) -> tuple[torch.Tensor, torch.Tensor]:
    corners = torch.cartesian_prod(*[torch.tensor([-size, size])] * 3)
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    return corners, torch.tensor(
        [f for a, b, c, d in quads for f in ([a, b, c], [a, c, d])], dtype=torch.int32
    )


def scene(size: float | None) -> MeshScene:
    vertices, faces = (
        box(size) if size else (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int32))
    )
    vertices = vertices.requires_grad_()
    color = torch.full_like(vertices, 0.5)
    corner = torch.tensor([[0.0, 0.29, 0.0], [0.0, 0.32, 0.0]])  # in front of a box of 0.3
    return MeshScene(
        vertices,
        faces,
        color,
        color,
        corner,
        torch.tensor([-0.2, 0.1], requires_grad=True),
        torch.tensor(0.3),
        16,
    )


def batch(sizes: list[float]):
    views = len(sizes)
    parts = [box(size) for size in sizes]
    meshes = Meshes(
        torch.cat([v for v, _ in parts]),
        torch.cat([f for _, f in parts]),
        [8 * i for i in range(views + 1)],
        [12 * i for i in range(views + 1)],
    )
    camera = Camera.orbit(torch.arange(views) * 0.7, torch.full((views,), 0.3), width=SIZE)
    image = torch.rand(views, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(meshes=meshes, camera=camera, view_scene=list(range(views)), image=image)


def test_the_true_mesh_has_no_geometric_error():
    terms, _ = SurfaceLoss()([scene(0.3)], batch([0.3]), torch.ones(1, 3))
    for name in ("mask", "depth", "normal_l1", "normal_ssim"):
        assert abs(terms[name].item()) < 1e-6, name
    score = score_surfaces(lambda b: [scene(0.3)], [batch([0.3])])
    assert score.iou == 1 and score.depth == 0 and score.normal == float("inf")


def test_an_empty_mesh_adds_nothing_to_pictures_alone():
    together, _ = SurfaceLoss()([scene(0.2), scene(None)], batch([0.3, 0.3]), torch.zeros(2, 3))
    alone, _ = SurfaceLoss()([scene(0.2)], batch([0.3]), torch.zeros(1, 3))
    for name in ("mask", "depth", "normal_l1", "normal_ssim", "l1", "ssim"):
        # means over both views
        assert together[name].item() == pytest.approx(alone[name].item() / 2, rel=1e-5), name
    assert together["regularization"].item() == pytest.approx(0.3)
    assert together["tsdf"] > 0
    nothing = [scene(None), scene(None)]
    terms, psnr = SurfaceLoss()(nothing, batch([0.3, 0.3]), torch.zeros(2, 3))
    assert terms["mask"] == terms["depth"] == terms["l1"] == 0 and psnr.isfinite()
    sum(terms.values()).backward()
    # the distances still say where the surface should be
    assert nothing[0].tsdf_value.grad.abs().sum() > 0


def test_shading_follows_the_lamp_and_not_the_world():
    """A wall that faces the camera is equally bright from everywhere; the background is white."""
    brightness = []
    for yaw in (0.0, 1.3):
        camera = Camera.orbit([yaw], [0.4], width=SIZE)
        normal = F.normalize(camera.center, dim=1)[:, :, None, None].expand(1, 3, SIZE, SIZE)
        alpha = torch.ones(1, 1, SIZE, SIZE)
        alpha[..., 0] = 0
        picture = shaded(Image(None, alpha, None, (normal + 1) / 2), camera)
        assert (picture[..., 0] == 1).all()
        brightness.append(picture[0, :, 5, 5])
    towards = LAMP[2] / sum(x * x for x in LAMP) ** 0.5
    for value in brightness:
        assert value.tolist() == pytest.approx([0.2 + 0.75 * towards] * 3, rel=1e-5)


def test_no_corner_in_reach_of_the_surface_gives_zero():
    camera = Camera.orbit([0.0], [0.0], width=SIZE)
    value = torch.tensor([0.5], requires_grad=True)
    # background behind everything
    loss = tsdf(torch.zeros(1, 3), value, torch.zeros(1, 1, SIZE, SIZE), camera, 64)
    assert loss.tolist() == [0.0]
    loss.sum().backward()
    assert value.grad == 0
    assert SurfaceLoss().distances([], SimpleNamespace(view_scene=[]), torch.zeros(0, 1, 4, 4)) == 0


def test_base_weighs_the_colours_as_the_published_sum_does():
    weights = BASE.weights
    assert (weights.l1, weights.ssim, weights.lpips) == (
        1.1,
        pytest.approx(0.1 * 0.2),
        pytest.approx(0.1 * 0.2),
    )
    assert (weights.mask, weights.depth, weights.tsdf, weights.regularization, weights.kl) == (
        1,
        10,
        0.01,
        1,
        1e-6,
    )
    assert (weights.normal_l1, weights.normal_ssim, weights.normal_lpips) == (1, 0.2, 0.2)
    assert (BASE.steps, BASE.batch_size, BASE.views, BASE.lr, BASE.weight_decay) == (
        290_000,
        256,
        1,
        1e-4,
        0.0,
    )
    assert models.MeshDecoder.NAME == "SLatMeshDecoder"
