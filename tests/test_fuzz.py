"""Every op against its reference on random inputs (tests.helpers.random_inputs).

Outputs and gradients are compared, then computed again: the same bits. A failure prints the seed of
its case; `DRAWS[name](Draw(seed, device))` draws it again.
"""

import pytest
import torch

from kernels import backend
from tests.helpers.compare import assert_same, handing_on, outputs
from tests.helpers.random_inputs import DRAWS
from tests.helpers.random_inputs.choices import Case, Draw

pytestmark = pytest.mark.usefixtures("few_programs")
MANY = 200
FEWER = {  # of slow references
    "surfaces": 20,
    "rasters": 20,
    "silhouettes": 20,
    "mesh_pictures": 20,
    "radiance": 40,
    "coordinates": 20,
}


def check(case: Case, draw: Draw) -> None:
    if not case.tensors:
        assert case.op() == case.reference()
        return
    op = handing_on(draw.strided(case.op))
    reference = handing_on(case.reference)
    dtype = next(t.dtype for t in case.tensors)
    # places of samples and edges are rounded, then divided by
    tolerance = 1e-7 if dtype == torch.float64 else case.tolerance
    assert_same(op, reference, *case.tensors, tolerance=tolerance, least=case.least)


def fuzz(name: str, device: torch.device, seeds: range) -> None:
    for seed in seeds:
        print(f"\r{name}, seed {seed}", end="")  # shown where it fails
        torch.manual_seed(seed)  # of the upstream gradients
        draw = Draw(seed, device)
        check(DRAWS[name](draw), draw)


@pytest.mark.sanitizer
@pytest.mark.parametrize("name", DRAWS)
def test_random_inputs(device, name, request):
    # a kernel is built anew for most of the sizes
    few = not backend.is_torch(torch.empty(0, device=device))
    fuzz(
        name,
        device,
        range(request.config.getoption("cases") or (10 if few else FEWER.get(name, MANY))),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWS)
def test_many_random_inputs(device, name):
    fuzz(name, device, range(1000, 1000 + MANY))


@pytest.mark.parametrize("name", [name for name in DRAWS if name != "coordinates"])
def test_the_same_bits_again(device, name):
    for seed in range(3):
        print(f"{name}, seed {seed}")
        runs = []
        for _ in range(2):
            case = DRAWS[name](Draw(seed, device))
            out = [t for t in outputs(case.op(*case.tensors)) if t.requires_grad]
            # upstream of stride 0
            runs.append([*out, *torch.autograd.grad([t.sum() for t in out], case.tensors)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
