"""The splat as an op of torch: dtypes, autocast, compilation, wrong input."""

import pytest
import torch

from kernels.gaussian.binning import bin_tiles
from kernels.gaussian.records import Packed
from kernels.gaussian.splat import _pack, splat
from tests.helpers.gaussians import both, camera, colors, grads, scene


def test_sixteen_bit_inputs_are_converted(device):
    half = scene(20, device, dtype=torch.float16)
    full = [t.detach().float().requires_grad_() for t in half]
    view = camera(1, 20, 20, device)
    light = colors(1, device)
    a = splat(*half, [0, 20], view, [0], light.half().float())
    b = splat(*full, [0, 20], view, [0], light.half().float())
    assert a.color.dtype == torch.float32 and torch.equal(a.color, b.color)
    for g, h in zip(grads(a, half), grads(b, full), strict=True):
        assert g.dtype == torch.float16 and torch.equal(g, h.half())


def test_autocast_changes_nothing(device):
    inputs = scene(20, device)
    view = camera(1, 20, 20, device)
    light = colors(1, device)
    image = splat(*inputs, [0, 20], view, [0], light)
    want = grads(image, inputs)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = splat(*inputs, [0, 20], view, [0], light)
        got = grads(mixed, inputs)
    assert torch.equal(mixed.color, image.color) and all(
        torch.equal(a, b) for a, b in zip(got, want, strict=True)
    )


def test_registered_with_torch(device):
    inputs = torch.cat([t.detach().flatten(1) for t in scene(12, device)], 1).requires_grad_()
    view = _pack(camera(2, 18, 16, device), torch.float32)
    args = (inputs, view, colors(2, device), [0, 5, 12], [1, 0], 18, 16, 0.1, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.trislat.splat.default, args, test_utils=checks)


def test_torch_compile_keeps_one_graph(device):
    inputs = scene(12, device)
    view = camera(2, 18, 16, device)
    light = colors(2, device)
    run = lambda *x: both(splat(*x, [0, 5, 12], view, [1, 0], light))
    torch._dynamo.reset()  # a graph remembers which implementation it was traced for
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(*inputs), strict=True))
    upstream = [torch.ones_like(t) for t in compiled]
    got, want = (torch.autograd.grad(out, inputs, upstream) for out in (compiled, run(*inputs)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"center": torch.zeros(4, 2)}, r"center must be \[4, 3\], not \[4, 2\]"),
        ({"scale": torch.zeros(5, 3)}, r"scale must be \[4, 3\], not \[5, 3\]"),
        ({"rotation": torch.zeros(4, 3)}, r"rotation must be \[4, 4\], not \[4, 3\]"),
        ({"opacity": torch.zeros(4)}, r"opacity must be \[4, 1\], not \[4\]"),
        ({"sh": torch.zeros(4, 3)}, r"sh must be \[4, 1, 3\], not \[4, 3\]"),
        (
            {"sh": torch.zeros(4, 4, 3)},
            "sh has 4 coefficients per channel: only degree 0, 1 coefficient",
        ),
        ({"starts": [0, 3]}, r"from 0 to the 4 Gaussians, not be \[0, 3\]"),
        ({"starts": torch.tensor([1, 4])}, r"from 0 to the 4 Gaussians, not be \[1, 4\]"),
        ({"starts": [0, 3, 2, 4]}, r"from 0 to the 4 Gaussians, not be \[0, 3, 2, 4\]"),
        ({"starts": []}, r"from 0 to the 4 Gaussians, not be \[\]"),
        ({"view_scene": [0]}, "view_scene names 1 scenes for 2 views"),
        ({"view_scene": [0, 1]}, "view_scene names scene 1 of 1"),
        ({"view_scene": [0, -1]}, "view_scene names scene -1 of 1"),
        ({"background": torch.zeros(3)}, r"background must be \[2, 3\], not \[3\]"),
        ({"kernel_size": float("nan")}, "kernel_size must be finite and at least 0, not nan"),
        ({"kernel_size": -0.1}, "kernel_size must be finite and at least 0, not -0.1"),
        ({"rotation": torch.zeros(4, 4, dtype=torch.int32)}, "floating point, not torch.int32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_says_what_is_wrong(change, message):
    names = ("center", "scale", "rotation", "opacity", "sh")
    args = dict(zip(names, scene(4, "cpu"), strict=True)) | {
        "starts": [0, 4],
        "camera": camera(2, 8, 8),
    }
    args |= {"view_scene": [0, 0], "background": colors(2)}
    with pytest.raises(ValueError, match=message):
        splat(**(args | change))


def test_too_many_instances_are_refused(kernel_device):
    tiles = torch.full((3,), 30000**2, dtype=torch.int32, device=kernel_device)
    p = Packed(torch.zeros(3, 16), torch.ones(3, device=kernel_device), tiles, tiles, parts=1)
    with pytest.raises(ValueError, match="2700000000 instances .* more than 2147483647"):
        bin_tiles(p, 1, 480000, 480000)


def test_kernels_take_no_float64(kernel_device):
    inputs = scene(4, kernel_device, dtype=torch.float64)
    with pytest.raises(ValueError, match="fp32: float64 is for the torch path only"):
        splat(*inputs, [0, 4], camera(1, 8, 8, kernel_device), [0], colors(1, kernel_device))
