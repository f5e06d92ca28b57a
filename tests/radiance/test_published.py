"""`raymarch` against numbers of the published rasteriser."""

import math

import pytest
import torch

from kernels.camera import Camera
from kernels.radiance.raymarch import raymarch
from tests.helpers.golden import golden
from tests.helpers.hardware import with_long_cases

CASES = ["rf_inside_r4d4_res8_40", "rf_empty_32"]
ONE_RANK = ["rf_r1d8_res8_33"]
LONG_CASES = [
    "rf_axis_r4d8_res8_41",
    "rf_r16d8_res64_init_40",
    "rf_r16d8_res64_opaque_40",
    "rf_r16d8_res8_shell_40",
    "rf_r4d4_res16_shell_44",
    "rf_r4d8_res16_opaque_clamp_35",
]
INPUTS = ["trivec", "density", "features"]


def check_golden(case: str, device) -> None:
    note, tensors = golden(case)
    inputs = [tensors[name].to(device).requires_grad_() for name in INPUTS]
    view = Camera(
        tensors["extrinsics"][None], tensors["intrinsics"][None], note["W"], note["H"]
    ).to(device)
    position, background, offset = (tensors[n].to(device) for n in ("position", "bg", "xi"))
    image = raymarch(
        position,
        *inputs,
        [0, note["V"]],
        view,
        [0],
        background[None],
        2 ** note["tree_depth"],
        offset[None],
    )
    got = {"rgb": image.color[0], "alpha": image.alpha[0, 0], "depth": image.depth[0, 0]}
    for which, seen in note["grad_sets"].items():
        loss = sum((got[name] * tensors[f"dL_d{name}"].to(device)).sum() for name in seen)
        for name, g in zip(
            INPUTS, torch.autograd.grad(loss, inputs, retain_graph=True), strict=True
        ):
            got[f"{which}.d{name}"] = g
    if not note["num_rendered_pairs"]:  # published: black
        assert torch.equal(got.pop("rgb"), background[:, None, None].expand_as(image.color[0]))
    for name, value in got.items():
        want = tensors.get(f"f64_{name}", tensors[name]).double()
        difference = value.detach().cpu().double() - want
        limit = note["tolerance"][name]
        relative = limit["rel_l2_if_exact_derivative"]
        largest = limit["max_abs_if_exact_derivative"]
        assert difference.norm() <= relative * want.norm() + 1e-12, (
            f"{name}: {difference.norm() / want.norm():.2e}"
        )
        assert difference.abs().max() <= largest, (
            f"{name}: {difference.abs().max():.2e} > {largest:.2e}"
        )


@pytest.mark.parametrize(("device", "case"), with_long_cases(CASES, ONE_RANK), indirect=["device"])
def test_published_images_and_gradients(device, case):
    check_golden(case, device)


@pytest.mark.parametrize("case", LONG_CASES)
def test_more_published_images_and_gradients(case):
    check_golden(case, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG_CASES)
def test_more_published_images_and_gradients_in_kernels(kernel_device, case):
    check_golden(case, kernel_device)


def straight(y: float, device, size: int = 1) -> Camera:
    """Looking along -y from y = 2, through the middle of the voxel behind the least corner (0, .,
    0) at resolution 64.
    """
    view = Camera.orbit(0.0, 0.0, 2.0, 0.02, size, size)
    view.extrinsics[0, :3, 3] = -view.extrinsics[0, :3, :3] @ torch.tensor([1 / 128, y, 1 / 128])
    return view.to(device)


@pytest.mark.parametrize("density, alpha", [(10.0, 0.1446547), (0.0, 6.766725e-4)])
def test_pinned_numbers(device, density, alpha):
    position = torch.tensor([[32.5, 40.5, 32.5]], device=device) / 64
    inputs = torch.ones(1, 16, 3, 8), torch.full((1, 16), density), torch.zeros(1, 16, 1, 3)
    offset = torch.full((1, 1, 1), 0.5, device=device)
    light = torch.zeros(1, 3, device=device)
    image = raymarch(
        position,
        *(t.to(device) for t in inputs),
        [0, 1],
        straight(2.0, device),
        [0],
        light,
        64,
        offset,
    )
    through = 1 - image.alpha.item()
    assert math.isclose(through, (1 - alpha) ** 16, rel_tol=2e-6)
    if density:
        assert math.isclose(through, 0.0820850, rel_tol=2e-6)
    assert torch.allclose(image.color, 0.5 * image.alpha.expand(1, 3, 1, 1), rtol=1e-5, atol=1e-7)
