"""Other people's packages are called as their functions are declared, and agree with ours."""

from dataclasses import replace

import pytest
import torch

from kernels.bench import measure
from kernels.bench.attention import attention_case
from kernels.bench.case import Case, Impl
from kernels.bench.conv import _flex_gemm, _spconv
from kernels.bench.gaussian import gaussians, gsplat
from kernels.bench.measure import evaluate
from kernels.bench.mesh import nvdiffrast
from kernels.bench.ops import OPS
from kernels.bench.shells import batch, shell
from kernels.bench.voxels import _flex_gemm_map, _spconv_map
from kernels.camera import Camera
from kernels.conv.op import sparse_conv
from kernels.voxels.cache import SpatialCache
from kernels.voxels.hash import neighbours
from tests.helpers import fake_peers
from tests.helpers.compare import assert_close

CPU = torch.device("cpu")


def small(op: str) -> Case:
    (case,) = OPS[op]("small", ["fp32"], CPU)
    return replace(case, naive=False)


def test_gsplat_agrees_but_along_the_quaternion(monkeypatch):
    fake_peers.install(monkeypatch, gsplat=fake_peers.GSPLAT)
    case = small("splat")
    baseline = case.baselines["gsplat"]
    inputs = case.inputs(0)
    assert measure.agreement(case, inputs) == ({measure.OURS: True, "gsplat": True}, [])
    # what is left out is most of the gradient, and only there is it left out
    whole = replace(case, baselines={"gsplat": replace(baseline, compared=Impl.compared)})
    agrees, (row,) = measure.agreement(whole, inputs)
    assert agrees["gsplat"] is False and "disagrees" in row["why"]
    grads = evaluate(case, Impl(case.ours), inputs)[1]
    compared = baseline.compared(inputs, grads)
    assert [a is b for a, b in zip(grads, compared, strict=True)] == [True, True, False, True, True]
    along = (compared[2] * inputs[2].detach()).sum(1)
    assert_close(along, torch.zeros_like(along), 1e-5, least=float(grads[2].abs().max()))
    assert float((grads[2] - compared[2]).norm() / grads[2].norm()) > 0.5


def test_gsplat_is_called_with_the_same_scene(monkeypatch):
    camera = Camera.orbit([0.3], [0.2], 2.0, 0.7, 32, 16)
    background = torch.tensor([[0.2, 0.4, 0.6]])
    scene = gaussians("small", 0)
    seen = []

    def rasterization(*args, **options):
        seen.append((args, options))
        return fake_peers.rasterization(*args, **options)

    fake_peers.install(monkeypatch, gsplat=dict(rasterization=rasterization))
    baseline = gsplat(camera, background)
    color, alpha = baseline.restore(baseline.run(*scene))
    assert color.shape == (1, 3, 16, 32) and alpha.shape == (1, 1, 16, 32)
    (((means, *_, Ks, width, height), options),) = seen
    assert options["eps2d"] == 0.1 and torch.equal(options["backgrounds"], background)
    assert (width, height) == (32, 16) and torch.equal(means, scene[0])
    # a point straight ahead lands in the middle of the picture, in pixels
    assert_close(Ks[0] @ torch.tensor([0.0, 0.0, 1.0]), torch.tensor([16.0, 8.0, 1.0]), 1e-6)


def test_nvdiffrast_draws_the_same_picture(monkeypatch):
    fake_peers.install(monkeypatch, nvdiffrast__torch=fake_peers.NVDIFFRAST)
    case = small("render_mesh")
    assert measure.agreement(case, case.inputs(0)) == ({measure.OURS: True, "nvdiffrast": True}, [])
    vertices, colors = case.inputs(0)
    faces = torch.tensor([[0, 1, 2]])
    camera = Camera.orbit([0.3], [0.2], 2.0, 0.7, 24, 16)
    color, alpha = nvdiffrast(len(vertices), faces, camera).run(vertices, colors)  # int64, oblong
    assert color.shape == (1, 3, 16, 24) and alpha.shape == (1, 1, 16, 24)


@pytest.mark.parametrize("package", ["spconv", "spconv_triton", "flex_gemm"])
def test_other_convolutions_get_our_weights_and_make_their_map_once(monkeypatch, package):
    cache = SpatialCache(batch(shell("sphere", 8)))
    generator = torch.Generator().manual_seed(0)
    fake_peers.install(monkeypatch, flex_gemm__ops__spconv=fake_peers.FLEX_GEMM)
    fake_peers.install(monkeypatch, **{f"{package}__pytorch": fake_peers.SPCONV})
    monkeypatch.setattr(fake_peers.SubMConv3d, "made", 0)
    spconv = lambda: _spconv(package, cache, 4, 6, "fp32", CPU)
    baseline = _flex_gemm(cache) if package == "flex_gemm" else spconv()
    near = neighbours(cache.coords, 3)
    for _ in range(2):
        shapes = (272, 4), (6, 3, 3, 3, 4), (6,)
        random = lambda shape: torch.randn(shape, generator=generator, requires_grad=True)
        x, weight, bias = map(random, shapes)
        got = baseline.run(x, weight, bias)
        expected = sparse_conv(x, weight, bias, near)
        assert torch.equal(got, expected)
        wrt = x, weight, bias
        grads = lambda out, wrt=wrt: torch.autograd.grad(out.square().sum(), wrt)
        assert all(map(torch.equal, grads(got), grads(expected)))
    assert fake_peers.SubMConv3d.made == 1


@pytest.mark.parametrize("package", ["spconv", "spconv_triton"])
def test_spconv_is_asked_for_the_same_neighbours(monkeypatch, package):
    coords = batch(shell("sphere", 8))
    fake_peers.install(monkeypatch, **{f"{package}__pytorch": fake_peers.SPCONV})
    fake_peers.install(monkeypatch, **{f"{package}__core": fake_peers.SPCONV_CORE})
    baseline = _spconv_map(package, 8)
    assert torch.equal(baseline.restore(baseline.run(coords)), neighbours(coords, 3).sort(1).values)


@pytest.mark.parametrize("module", fake_peers.FLEX_GEMM_MAPS, ids=lambda name: name.split("__")[-1])
def test_either_flex_gemm_is_asked_for_the_same_neighbours(monkeypatch, module):
    coords = batch(shell("sphere", 8))
    fake_peers.install(monkeypatch, **{module: fake_peers.FLEX_GEMM_MAPS[module]})
    baseline = _flex_gemm_map(8)
    assert torch.equal(baseline.restore(baseline.run(coords)), neighbours(coords, 3).sort(1).values)


def test_fused_ssim_is_called_with_our_pictures(monkeypatch):
    fake_peers.install(monkeypatch, fused_ssim=fake_peers.FUSED_SSIM)
    case = small("ssim")
    agrees, missing = measure.agreement(case, case.inputs(0))
    assert agrees == {measure.OURS: True, "fused_ssim": True}
    assert [row["impl"] for row in missing] == ["torch.compile of the conv2d form"]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_flash_attn_gets_segments_of_16_bit_numbers(monkeypatch, dtype):
    fake_peers.install(monkeypatch, flash_attn=fake_peers.FLASH_ATTN)
    name = "flash_attn, rows gathered before"
    coords = batch(shell("sphere", 8))
    case = attention_case("window_attention", "sphere", dtype, coords, 2, 16, CPU)
    case = replace(case, baselines={name: case.baselines[name]}, naive=False)
    agrees, missing = measure.agreement(case, case.inputs(0))
    if dtype == "bf16":
        assert agrees[name] is True and missing == []
    else:
        assert name not in agrees and "only support fp16 and bf16" in missing[0]["why"]
