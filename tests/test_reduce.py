"""Sums of segments: as exact as fp32 allows at any length, and of the same bits alone and in a
batch.
"""

import pytest
import torch

from kernels.reduce import sum_segments
from kernels.surface.isosurface import isosurface
from tests.helpers.compare import assert_close

CUBES = (
    96**3
)  # added up one after the other in fp32, the magnitudes of so many weights are up to 2 % off


def uniform(*size):
    return torch.rand(size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("magnitudes", [False, True], ids=["plain", "magnitudes"])
def test_a_million_rows(device, magnitudes):
    wide = uniform(CUBES, 53).sub_(0.5 if magnitudes else 0.0)
    exact = wide[:, 32:52].double()
    exact = exact.abs() if magnitudes else exact
    got = sum_segments(wide.to(device)[:, 32:52], [0, CUBES], magnitudes)
    assert_close(got, exact.sum()[None].float(), 5e-7)


@pytest.mark.parametrize(
    "lengths", [[0], [1], [0, 3, 0, 1], [70000, 5, 0, 4096, 65537], []], ids=str
)
def test_segments_alone_and_in_a_batch(device, lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    values = (uniform(starts[-1], 3) - 0.3).to(device)
    sums = sum_segments(values, starts)
    assert sums.shape == (len(lengths),) and sums.dtype == torch.float32
    for b, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        alone = sum_segments(values[begin:end].clone(), [0, end - begin])
        assert torch.equal(sums[b : b + 1], alone)
        assert_close(alone, values[begin:end].double().sum().float()[None], 1e-6)


def test_what_is_no_number_stays_in_its_segment(device):
    values = uniform(20, 1).to(device)
    values[7] = float("nan")
    assert sum_segments(values, [0, 5, 10, 20]).isnan().tolist() == [False, True, False]


def test_the_regularizer_of_a_full_grid():
    """Its three terms at 96^3, of which that of the weights alone is not 0 here."""
    axis = torch.arange(96, dtype=torch.int32)
    coords = torch.nn.functional.pad(torch.cartesian_prod(axis, axis, axis), (1, 0))
    fields = torch.zeros(CUBES, 53)
    fields[:, :8] = 1.0
    fields[:, 32:52] = uniform(CUBES, 20) - 0.5
    size = fields[:, 32:52].double().abs().mean().float()
    assert_close(isosurface(coords, fields, 96, False).regularizer, 0.2 * size[None], 1e-6)
