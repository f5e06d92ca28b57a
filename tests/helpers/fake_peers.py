"""Modules that stand in for other people's packages.

Their functions have the names, arguments and checks of the real ones (gsplat 1.5, nvdiffrast 0.4,
spconv 2.3, FlexGEMM 1.0, fused_ssim, flash_attn 2), and compute with ops of ours what those do.
"""

import sys
import types

import torch
from torch import Tensor

from kernels.attention.reference import segment_attention_reference
from kernels.bench.gaussian import SH
from kernels.camera import Camera
from kernels.conv.op import sparse_conv
from kernels.gaussian.splat import splat
from kernels.mesh.antialias import antialias
from kernels.mesh.attributes import interpolate
from kernels.mesh.rasterize import rasterize
from kernels.similarity import ssim_reference
from kernels.voxels.hash import neighbours


def install(monkeypatch, **modules) -> None:
    """Make modules, by name with `__` for the dots, and their parents importable."""
    for name, attributes in modules.items():
        parts = name.split("__")
        for i in range(1, len(parts)):
            parent = ".".join(parts[:i])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, ".".join(parts), types.SimpleNamespace(**attributes))


def check(tensor: Tensor, shape: tuple, dtype: torch.dtype = torch.float32) -> None:
    """What an extension checks: a contiguous tensor of this type and shape; None: any length."""
    assert isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.is_contiguous()
    assert tensor.ndim == len(shape), f"{list(tensor.shape)} instead of {shape}"
    fits = (b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    assert all(fits), f"{list(tensor.shape)} instead of {shape}"


def rasterization(
    means,
    quats,
    scales,
    opacities,
    colors,
    viewmats,
    Ks,
    width,
    height,
    near_plane=0.01,
    far_plane=1e10,
    radius_clip=0.0,
    eps2d=0.3,
    sh_degree=None,
    packed=True,
    tile_size=16,
    backgrounds=None,
    render_mode="RGB",
    sparse_grad=False,
    absgrad=False,
    rasterize_mode="classic",
):
    """Of gsplat: normalises quaternions."""
    N, C = len(means), len(viewmats)
    shapes = (N, 3), (N, 4), (N, 3), (N,), (N, 3)
    for tensor, shape in zip((means, quats, scales, opacities, colors), shapes, strict=True):
        assert tensor.shape == shape and tensor.dtype == torch.float32
    check(viewmats, (C, 4, 4)), check(Ks, (C, 3, 3)), check(backgrounds, (C, 3))
    assert (near_plane, rasterize_mode, sh_degree, render_mode) == (0.2, "antialiased", None, "RGB")
    camera = Camera(viewmats, Ks / torch.tensor([width, height, 1.0])[:, None], width, height)
    turned = torch.nn.functional.normalize(quats)
    gaussians = means, scales, turned, opacities[:, None], (colors - 0.5)[:, None] / SH
    image = splat(*gaussians, [0, N], camera, [0] * C, backgrounds, eps2d)
    return image.color.permute(0, 2, 3, 1), image.alpha.permute(0, 2, 3, 1), {}


GSPLAT = dict(rasterization=rasterization)


class RasterizeCudaContext:
    """Of nvdiffrast."""

    def __init__(self, device=None):
        assert isinstance(device, torch.device)


def nv_rasterize(glctx, pos, tri, resolution, ranges=None, grad_db=True):
    """Instanced mode, one picture."""
    assert isinstance(glctx, RasterizeCudaContext) and ranges is None
    check(pos, (1, None, 4)), check(tri, (None, 3), torch.int32)
    rast = rasterize(pos[0], tri, *resolution)
    return rast, torch.zeros_like(rast)


def nv_interpolate(attr, rast, tri, rast_db=None, diff_attrs=None):
    """Without derivatives of attributes."""
    check(attr, (1, None, None)), check(rast, (1, None, None, 4))
    check(tri, (None, 3), torch.int32)
    return interpolate(attr[0], rast, tri), attr.new_zeros(*rast.shape[:3], 0)


def nv_antialias(color, rast, pos, tri, topology_hash=None, pos_gradient_boost=1.0):
    """All tensors as the functions before had them."""
    check(color, (1, *rast.shape[1:3], None)), check(rast, (1, None, None, 4))
    check(pos, (1, None, 4)), check(tri, (None, 3), torch.int32)
    return antialias(color, rast, pos[0], tri)


NVDIFFRAST = dict(
    RasterizeCudaContext=RasterizeCudaContext,
    rasterize=nv_rasterize,
    interpolate=nv_interpolate,
    antialias=nv_antialias,
)


class SparseConvTensor:
    """Of spconv."""

    def __init__(
        self,
        features,
        indices,
        spatial_shape,
        batch_size,
        grid=None,
        voxel_num=None,
        indice_dict=None,
    ):
        assert features.ndim == indices.ndim == 2 and indices.dtype == torch.int32
        assert batch_size > 0 and len(spatial_shape) == indices.shape[1] - 1
        assert (indices[:, 1:].amax(0) < torch.tensor(spatial_shape)).all()
        self.features = features
        self.indices = indices
        self.batch_size = batch_size
        self.indice_dict = {} if indice_dict is None else indice_dict


class SubMConv3d(torch.nn.Module):
    """Of spconv: the neighbours are kept under a key in a copy of the input's dictionary."""

    made = 0

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        indice_key=None,
        algo=None,
    ):
        super().__init__()
        assert (kernel_size, stride, dilation, groups, bias) == (3, 1, 1, 1, True)
        self.key = indice_key
        self.weight = torch.nn.Parameter(torch.zeros(out_channels, 3, 3, 3, in_channels))
        self.bias = torch.nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):
        assert isinstance(x, SparseConvTensor)
        known = dict(x.indice_dict)
        if self.key not in known:
            SubMConv3d.made += 1
            known[self.key] = neighbours(x.indices, 3)
        features = sparse_conv(x.features, self.weight, self.bias, known[self.key])
        return SparseConvTensor(features, x.indices, [1024] * 3, x.batch_size, indice_dict=known)


def get_indice_pairs_implicit_gemm(
    indices,
    batch_size,
    spatial_shape,
    algo,
    ksize,
    stride,
    padding,
    dilation,
    out_padding,
    subm=False,
    transpose=False,
    is_train=True,
    alloc=None,
):
    """Of spconv: the third value are the pairs [27, N], numbered from the other end than ours."""
    check(indices, (None, 4), torch.int32)
    assert (ksize, stride, dilation, algo, subm) == ([3] * 3, [1] * 3, [1] * 3, "masked", True)
    assert len(spatial_shape) == len(padding) == len(out_padding) == 3 and batch_size == 1
    assert (indices[:, 1:].amax(0) < torch.tensor(spatial_shape)).all()
    return indices, None, neighbours(indices, 3).flip(1).T.contiguous(), torch.Tensor()


SPCONV = dict(
    SubMConv3d=SubMConv3d,
    SparseConvTensor=SparseConvTensor,
    ops=types.SimpleNamespace(get_indice_pairs_implicit_gemm=get_indice_pairs_implicit_gemm),
)
SPCONV_CORE = dict(ConvAlgo=types.SimpleNamespace(MaskImplicitGemm="masked"))


def sparse_submanifold_conv3d(
    feats, coords, shape, weight, bias=None, neighbor_cache=None, dilation=(1, 1, 1)
):
    """Of FlexGEMM."""
    check(feats, (None, weight.shape[-1]), feats.dtype), check(coords, (None, 4), torch.int32)
    assert weight.ndim == 5 and isinstance(shape, torch.Size) and len(shape) == 5
    if neighbor_cache is None:
        SubMConv3d.made += 1
        neighbor_cache = neighbor_cache_of(coords, shape, tuple(weight.shape[1:4]), dilation)
    near = neighbor_cache["neighbor_map"].view(torch.int32)
    return sparse_conv(feats, weight, bias, near), neighbor_cache


def neighbor_cache_of(coords, shape, kernel_size, dilation):
    """Rows as unsigned numbers."""
    check(coords, (None, 4), torch.int32)
    assert isinstance(shape, torch.Size) and (coords[:, 1:].amax(0) < torch.tensor(shape[2:])).all()
    assert (kernel_size, dilation) == ((3, 3, 3), (1, 1, 1))
    return {"neighbor_map": neighbours(coords, 3).view(torch.uint32)}


FLEX_GEMM = dict(sparse_submanifold_conv3d=sparse_submanifold_conv3d)
FLEX_GEMM_MAPS = {  # where it is, by version
    "flex_gemm__ops__spconv__submanifold_conv3d": dict(
        SubMConv3dFunction=types.SimpleNamespace(_compute_neighbor_cache=neighbor_cache_of)
    ),
    "flex_gemm__ops__spconv__submanifold_conv": dict(
        _compute_neighbor_cache_kernel_dilation=neighbor_cache_of
    ),
}


def fused_ssim(img1, img2, padding="same", train=True):
    """The mean over pixels, channels and pictures; no gradient of the second picture."""
    check(img1, (None, 3, None, None)), check(img2, tuple(img1.shape))
    assert (padding, train) == ("same", True) and not img2.requires_grad
    return ssim_reference(img1, img2).mean()


FUSED_SSIM = dict(fused_ssim=fused_ssim)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    """16-bit numbers alone."""
    for tensor in (q, k, v):
        assert tensor.ndim == 3 and tensor.stride(-1) == 1
        assert tensor.shape[2] % 8 == 0 and tensor.shape[2] <= 256
        if tensor.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    for starts, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        check(starts, (None,), torch.int32)
        assert type(longest) is int and int(starts.diff().max()) == longest
        assert int(starts[-1]) == len(q)
    return segment_attention_reference(q, k, v, cu_seqlens_q, cu_seqlens_k)


FLASH_ATTN = dict(flash_attn_varlen_func=flash_attn_varlen_func)
