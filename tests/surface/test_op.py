"""Surface extraction as an op of torch: dtypes, compilation, wrong input."""

import pytest
import torch

from kernels.surface.isosurface import Surfaces, isosurface
from kernels.voxels.cache import SpatialCache
from tests.helpers.surfaces import grads
from tests.helpers.voxels import voxels


def test_sixteen_bit_fields_are_converted(device):
    coords = voxels([40], (4, 4, 4)).to(device)
    half = (
        torch.randn(40, 53, generator=torch.Generator().manual_seed(8))
        .half()
        .to(device)
        .requires_grad_()
    )
    full = half.detach().float().requires_grad_()
    a, b = isosurface(coords, half, 4, True), isosurface(coords, full, 4, True)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    g, h = grads(a, half), grads(b, full)
    assert g.dtype == torch.float16 and torch.equal(g, h.half())


def test_registered_with_torch_and_compiles_to_one_graph(device):
    coords = voxels([20, 9], (4, 4, 4)).to(device)
    fields = (
        torch.randn(29, 101, generator=torch.Generator().manual_seed(9)).to(device).requires_grad_()
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.trislat.isosurface.default, (fields, coords, [20, 9], 4, True), test_utils=checks
    )
    cache = SpatialCache(coords)
    run = lambda f: isosurface(cache, f, 4, True)
    torch._dynamo.reset()  # a graph remembers which implementation it was traced for
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(fields)
    assert isinstance(compiled, Surfaces) and all(
        torch.equal(a, b) for a, b in zip(compiled, run(fields), strict=True)
    )
    assert torch.equal(grads(compiled, fields), grads(run(fields), fields))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fields": torch.zeros(2, 60)}, r"\[N, 53\] \(no color\) or \[N, 101\], not \[2, 60\]"),
        ({"fields": torch.zeros(2)}, r"\[N, 53\] .* not \[2\]"),
        ({"fields": torch.zeros(3, 53)}, "fields have 3 rows for 2 coords"),
        ({"fields": torch.zeros(2, 53, dtype=torch.int32)}, "floating point, not torch.int32"),
        ({"resolution": 0}, "resolution 0 must be at least 1"),
        ({"resolution": 3}, r"row 1 of coords is \[0, 2, 3, 1\]: beyond the resolution 3"),
        ({"voxels": torch.zeros(2, 3, dtype=torch.int32)}, "batch column is missing"),
        (
            {"voxels": torch.zeros(2, 4, dtype=torch.int32)},
            "rows 0 and 1 of coords are the same voxel",
        ),
    ],
    ids=str,
)
def test_wrong_input_says_what_is_wrong(change, message):
    coords = torch.tensor([[0, 1, 1, 1], [0, 2, 3, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        isosurface(
            **(
                {"voxels": coords, "fields": torch.zeros(2, 53), "resolution": 4, "training": True}
                | change
            )
        )


def test_kernels_take_no_float64(kernel_device):
    coords = torch.zeros(1, 4, dtype=torch.int32, device=kernel_device)
    with pytest.raises(ValueError, match="fp32: float64 is for the torch path only"):
        isosurface(coords, torch.zeros(1, 53, dtype=torch.float64, device=kernel_device), 4, True)
