"""Where rounding must agree: lanes with copies of one number, passes that count and write."""

import pytest
import torch

from kernels import backend
from kernels.attention.op import window_attention
from kernels.radiance.raymarch import _pack, raymarch
from kernels.radiance.segments import find_segments
from kernels.views import make_view_table
from kernels.voxels.window import Windows
from tests.helpers.radiance import camera, colors, grads, outputs, voxels


def fused(run) -> dict[str, bool]:
    """Whether each kernel that `run` launches may be compiled with fused products."""
    seen = {}

    def note(kernel, grid, args, constants):
        seen[kernel.fn.__name__] = constants.get("enable_fp_fusion", True)

    with backend.observe(note):
        run()
    return seen


def test_the_ray_march_is_not_fused(kernel_device):
    position, tensors, starts = voxels([2], 16, 2, 4, kernel_device)

    def run():
        view = camera(1, 6, 5, 16, kernel_device)
        image = raymarch(position, *tensors, starts, view, [0], colors(1, kernel_device), 16)
        grads(image, tensors)

    assert fused(run) == {"_segments": False, "_march": False, "_march_backward": False}


@pytest.mark.parametrize(
    "rows, kernels", [(20, ["short_backward"]), (300, ["long_dq", "long_dkv"])]
)
def test_the_backward_pass_of_attention_is_not_fused(kernel_device, rows, kernels):
    qkv = torch.randn(rows, 3, 1, 16, device=kernel_device, requires_grad=True)
    starts = torch.tensor([0, rows], dtype=torch.int32, device=kernel_device)
    order = torch.arange(rows, dtype=torch.int32, device=kernel_device)

    seen = fused(lambda: window_attention(qkv, Windows(order, starts, rows)).sum().backward())
    backward = {name for name, may in seen.items() if not may}
    assert {f"_attention_{kernel}" for kernel in kernels} <= backward


def test_a_pass_that_finds_other_hits_than_were_counted_keeps_to_its_slots(
    kernel_device, monkeypatch
):
    """Two compilations may round differently: here the count of one pair is too low, of another too
    high.
    """
    # a pair finds its last hits after the next pair wrote its first
    few = {"PAIRS": 8, "PIXELS": 16}
    monkeypatch.setattr("kernels.radiance.segments._tiles", lambda target: few)
    position, tensors, starts = voxels([5], 16, 2, 4, kernel_device)
    view = camera(1, 24, 18, 16, kernel_device)
    offset = torch.full((1, 18, 24), 0.5, device=kernel_device)
    args = position, _pack(view).float(), offset, make_view_table(starts, [0], kernel_device), 16, 4
    fine, _ = find_segments(*args, torch.zeros(2, dtype=torch.int64, device=kernel_device))
    launch = backend.launch
    change = torch.tensor([0, -2, 0, 3, 0], device=kernel_device)

    def miscounted(kernel, grid, *args, **constants):
        launch(kernel, grid, *args, **constants)
        if constants.get("WRITE") is False:
            args[4].add_(change)

    monkeypatch.setattr(backend, "launch", miscounted)
    other, _ = find_segments(*args, torch.zeros(2, dtype=torch.int64, device=kernel_device))
    listed = other.order[: other.bounds[-1]]
    assert fine.start.diff().min() > 2 and torch.equal(
        other.start.diff(), fine.start.diff() + change
    )
    assert sorted(listed.tolist()) == (other.samples > 0).nonzero()[:, 0].tolist()
    for pair, more in enumerate(change.tolist()):
        first, old = other.start[pair], fine.start[pair]
        kept = int(fine.start.diff()[pair]) + min(more, 0)
        for name in "ray", "samples", "voxel", "path":
            now = getattr(other, name)[first : first + kept]
            before = getattr(fine, name)[old : old + kept]
            assert torch.equal(now, before), (pair, name)
        assert not other.samples[first + kept : other.start[pair + 1]].any()
    image = raymarch(position, *tensors, starts, view, [0], colors(1, kernel_device), 16, offset)
    assert all(t.isfinite().all() for t in (*outputs(image), *grads(image, tensors)))
