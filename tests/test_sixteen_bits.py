"""Every op in fp16 and in bf16 against float64, outputs and every gradient.

Triton's interpreter computes bf16 wrongly, whatever the kernel: those cases run on the torch path,
on a GPU, and with `--emulate`. Ops that compute in fp32 whatever they are given take 16-bit inputs.
"""

import inspect

import pytest
import torch

import kernels
from kernels import backend
from tests.helpers.compare import assert_same, handing_on
from tests.helpers.hardware import COMPILED
from tests.helpers.random_inputs import DRAWS
from tests.helpers.random_inputs.choices import Draw

CASES = 1 if COMPILED else 3  # a compiled kernel is built anew for most of the sizes
# roundings to the type that may add up: of inputs' copies, of sums handed on, and of the result
ROUNDINGS = 8
# the draw (tests.helpers.random_inputs) that has each op; a list has several of them
OPS = {
    "window_attention": "attention",
    "segment_attention": "segments",
    "sparse_conv": "convolution",
    "subdivide_conv": "convolution",
    "splat": "gaussians",
    "antialias": "silhouettes",
    "flat_normals": "attributes",
    "interpolate": "attributes",
    "rasterize": "rasters",
    "render_mesh": "mesh_pictures",
    "gelu": "norms",
    "group_norm": "group_norms",
    "add_layer_norm": "norms",
    "layer_norm": "norms",
    "raymarch": "radiance",
    "ssim": "similarity",
    "isosurface": "surfaces",
    "pool": "scales",
    "unpool": "scales",
}
# of integers, or no ops: nothing is rounded
WITHOUT = {
    "make_index",
    "to_device",
    "octant_order",
    "tap_order",
    "conv_tables",
    "octant_tables",
    "opposite_vertices",
    "make_mesh_layout",
    "face_camera",
    "serialized_windows",
    "build_table",
    "lookup",
    "neighbours",
    "pooling",
    "full_windows",
    "window_partition",
}


class Narrow(Draw):
    """Draws whose tensors all have one type of 16 bits."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype):
        super().__init__(seed, device)
        self.narrow = dtype

    def pick(self, *choices):
        types = [c for c in choices if isinstance(c, torch.dtype) and c.is_floating_point]
        return self.narrow if types else super().pick(*choices)

    def exact(self) -> torch.dtype:
        return self.narrow


def test_every_op_is_here():
    public = {name for name, value in vars(kernels).items() if inspect.isfunction(value)}
    assert public == set(OPS) | WITHOUT
    assert set(OPS.values()) <= set(DRAWS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", sorted(set(OPS.values())))
def test_op(device, name, dtype, request):
    if dtype == torch.bfloat16 and backend.name(torch.empty(0, device=device)) == "interpreter":
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    rounding = torch.finfo(dtype).eps / 2
    for seed in range(request.config.getoption("cases") or CASES):
        print(f"\r{name}, seed {seed}", end="")  # shown where it fails
        torch.manual_seed(seed)  # of the upstream gradients
        draw = Narrow(seed, device, dtype)
        case = DRAWS[name](draw)
        tolerance = max(case.tolerance or 0, ROUNDINGS * rounding)
        op = handing_on(draw.strided(case.op))
        assert_same(
            op, handing_on(case.reference), *case.tensors, tolerance=tolerance, least=case.least
        )
