"""The ray march as an op of torch: dtypes, autocast, compilation, wrong input."""

import pytest
import torch

from kernels.radiance.raymarch import _pack, raymarch
from tests.helpers.radiance import camera, colors, grads, outputs, simple, voxels


def test_sixteen_bit_inputs_are_converted(device):
    position, half, args = simple(device, dtype=torch.float16)
    full = [t.detach().float().requires_grad_() for t in half]
    a = raymarch(position, *half, *args)
    b = raymarch(position.float(), *full, *args)
    assert a.color.dtype == torch.float32 and torch.equal(a.color, b.color)
    for g, h in zip(grads(a, half), grads(b, full), strict=True):
        assert g.dtype == torch.float16 and torch.equal(g, h.half())


def test_autocast_changes_nothing(device):
    position, inputs, args = simple(device)
    image = raymarch(position, *inputs, *args)
    want = grads(image, inputs)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = raymarch(position, *inputs, *args)
        got = grads(mixed, inputs)
    assert torch.equal(mixed.color, image.color) and all(
        torch.equal(a, b) for a, b in zip(got, want, strict=True)
    )


def test_registered_with_torch(device):
    position, inputs, (starts, view, view_scene, light, resolution, offset) = simple(device)
    packed = (
        torch.cat([inputs[0].permute(0, 2, 3, 1).flatten(1), inputs[1], inputs[2].flatten(1)], 1)
        .detach()
        .requires_grad_()
    )
    args = (
        packed,
        position,
        _pack(view).float(),
        offset,
        light,
        starts,
        view_scene,
        resolution,
        2,
        4,
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.trislat.raymarch.default, args, test_utils=checks)


def test_torch_compile_keeps_one_graph(device):
    position, inputs, args = simple(device, sizes=(2, 1))
    run = lambda *x: outputs(raymarch(position, *x, *args))
    torch._dynamo.reset()  # a graph remembers which implementation it was traced for
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(*inputs), strict=True))
    upstream = [torch.ones_like(t) for t in compiled]
    got, want = (torch.autograd.grad(out, inputs, upstream) for out in (compiled, run(*inputs)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"position": torch.zeros(4, 2)}, r"position must be \[N, 3\], not \[4, 2\]"),
        ({"trivec": torch.zeros(5, 2, 3, 4)}, r"trivec must be \[4, R, 3, n\], not \[5, 2, 3, 4\]"),
        ({"trivec": torch.zeros(4, 2, 4, 4)}, r"trivec must be \[4, R, 3, n\], not \[4, 2, 4, 4\]"),
        ({"trivec": torch.zeros(4, 2, 3, 1)}, "at least 2 taps, not 2 and 1"),
        ({"density": torch.zeros(4, 3)}, r"density must be \[4, 2\], not \[4, 3\]"),
        ({"sh": torch.zeros(4, 2, 3)}, r"sh must be \[4, 2, 1, 3\], not \[4, 2, 3\]"),
        (
            {"sh": torch.zeros(4, 2, 4, 3)},
            "sh has 4 coefficients per channel: only degree 0, 1 coefficient",
        ),
        ({"starts": [0, 3]}, r"from 0 to the 4 voxels, not be \[0, 3\]"),
        ({"starts": torch.tensor([1, 4])}, r"from 0 to the 4 voxels, not be \[1, 4\]"),
        ({"starts": [0, 3, 2, 4]}, r"from 0 to the 4 voxels, not be \[0, 3, 2, 4\]"),
        ({"view_scene": [0]}, "view_scene names 1 scenes for 2 views"),
        ({"view_scene": [0, 1]}, "view_scene names scene 1 of 1"),
        ({"view_scene": [0, -1]}, "view_scene names scene -1 of 1"),
        ({"background": torch.zeros(3)}, r"background must be \[2, 3\], not \[3\]"),
        ({"resolution": -8}, "resolution must be a whole number, at least 1, not -8"),
        ({"resolution": 16.0}, "resolution must be a whole number, at least 1, not 16.0"),
        (
            {"resolution": 20},
            r"position 0 of 4 is \[.*\], not \(whole number \+ 0.5\) / resolution 20",
        ),
        (
            {"position": torch.tensor([[0.53125] * 3] * 3 + [[0.53125, 1.53125, 0.53125]])},
            r"position 3 of 4 is .*1.53125.*outside",
        ),
        (
            {"position": torch.tensor([[0.53125] * 3] * 3 + [[-0.03125] * 3])},
            r"position 3 of 4 is .*-0.03125.*outside \[0, 1\]",
        ),
        ({"position": torch.full((4, 3), float("nan"))}, "position 0 of 4 is .*nan.*outside"),
        ({"offset": torch.zeros(2, 8, 9)}, r"offset must be \[2, 8, 8\], not \[2, 8, 9\]"),
        (
            {"offset": torch.eye(8).expand(2, 8, 8)},
            r"offset must lie in \[0, 1\), not be 1.0 at view 0, row 0, column 0",
        ),
        ({"offset": -torch.eye(8).expand(2, 8, 8)}, r"offset must lie in \[0, 1\), not be -1.0"),
        ({"density": torch.zeros(4, 2, dtype=torch.int32)}, "floating point, not torch.int32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_says_what_is_wrong(device, change, message):
    position, inputs, starts = voxels([4], 16, 2, 4, device)
    args = dict(zip(("trivec", "density", "sh"), inputs, strict=True)) | {
        "position": position,
        "starts": starts,
    }
    args |= {
        "camera": camera(2, 8, 8, 16, device),
        "view_scene": [0, 0],
        "background": colors(2, device),
        "resolution": 16,
    }
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        raymarch(**(args | change))


def test_kernels_take_no_float64(kernel_device):
    position, inputs, args = simple(kernel_device, dtype=torch.float64)
    with pytest.raises(ValueError, match="fp32: float64 is for the torch path only"):
        raymarch(position, *inputs, *args)
