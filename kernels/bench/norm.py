"""Memory-bound passes of a block, and SSIM: N rows, C channels, `width` bytes an element.

Compulsory bytes: every input read once, every output written once. No matrix products, so no flops
are counted.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import add_layer_norm, gelu, layer_norm, ssim
from kernels.bench.attention import sizes, voxels
from kernels.bench.case import DTYPES, Case, Impl, Work, compiled, optional
from kernels.norm.gelu import gelu_reference
from kernels.norm.layer import add_layer_norm_reference, layer_norm_reference
from kernels.similarity import ssim_reference

EPS = 1e-6


def eager_layer_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """Norm as published: to fp32 (fp64 stays), norm, back."""
    return F.layer_norm(
        x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=eps
    ).to(x.dtype)


def eager_add_layer_norm(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Add the residual, then norm."""
    total = x + h
    return total, eager_layer_norm(total)


def eager_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute GELU in its tanh form."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _peers(eager: Callable, device: torch.device) -> dict[str, Impl | str]:
    fused = compiled(eager, device)
    return {
        "torch, eager": Impl(eager),
        "torch.compile": fused if isinstance(fused, str) else Impl(fused),
    }


def _rows(*shapes: tuple, dtype: str, device: torch.device) -> Callable[[int], tuple]:
    def make(seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(s, generator=generator).to(device, DTYPES[dtype]).requires_grad_()
            for s in shapes
        )

    return make


def _pass(
    op: str,
    ours: Callable,
    reference: Callable,
    eager: Callable,
    shapes: list[tuple],
    moved: tuple[int, int],
    size: str,
    dtypes: list[str],
    device: torch.device,
) -> Iterator[Case]:
    """Make the cases of one pass.

    `moved` counts tensors of the first shape that cross the memory bus, forward and backward.
    """
    elements = torch.Size(shapes[0]).numel()
    for dtype in dtypes:
        work = [Work(count * elements * DTYPES[dtype].itemsize) for count in moved]
        yield Case(
            op=op,
            size=f"{size}, {' x '.join(map(str, shapes[0]))}",
            dtype=dtype,
            forward=work[:1],
            backward=work[1:],
            inputs=_rows(*shapes, dtype=dtype, device=device),
            ours=ours,
            reference=reference,
            baselines=_peers(eager, device),
        )


def _row_count(size: str) -> tuple[str, int, int, int]:
    """Give name, N, H and D of the first coordinate set."""
    name, coords = next(iter(voxels(size).items()))
    return name, len(coords), *sizes(size)


def layer_norm_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the norm with a bias. Forward x -> y; backward y, dy -> dx."""
    name, N, H, D = _row_count(size)
    ours = lambda x, bias: layer_norm(x, EPS, bias)
    reference = lambda x, bias: layer_norm_reference(x, EPS, bias)
    eager = lambda x, bias: eager_layer_norm(x + bias)
    yield from _pass(
        "layer_norm", ours, reference, eager, [(N, H * D), (H * D,)], (2, 3), name, dtypes, device
    )


def add_layer_norm_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure sum and norm. Forward x, h -> sum, y; backward y, dsum, dy -> dx, which is dh too."""
    name, N, H, D = _row_count(size)
    ours = lambda x, h: add_layer_norm(x, h, EPS)
    reference = lambda x, h: add_layer_norm_reference(x, h, EPS)
    yield from _pass(
        "add_layer_norm",
        ours,
        reference,
        eager_add_layer_norm,
        [(N, H * D)] * 2,
        (4, 4),
        name,
        dtypes,
        device,
    )


def gelu_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the hidden layer of the MLP, four times the channels, with its bias.

    Forward x -> y; backward x, dy -> dx. The eager baseline adds the bias in a pass of its own; in
    a block the product before it does, see op `block`.
    """
    name, N, H, D = _row_count(size)
    shapes = [(N, 4 * H * D), (4 * H * D,)]
    yield from _pass("gelu", gelu, gelu_reference, eager_gelu, shapes, (2, 3), name, dtypes, device)


def ssim_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure the mean of a micro-batch of two pictures; fp32, as the loss computes.

    Forward a, b -> 1; backward a, b -> da.
    """
    V = 2
    edge = 128 if size == "small" else 512

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        truth = torch.rand(V, 3, edge, edge, generator=generator)
        rendered = (truth + 0.1 * torch.randn(truth.shape, generator=generator)).clamp(0, 1)
        return rendered.to(device).requires_grad_(), truth.to(device)

    picture = 4 * V * 3 * edge * edge
    fused = optional("fused_ssim")
    baselines = {"fused_ssim": fused if isinstance(fused, str) else Impl(fused.fused_ssim)}
    mean = lambda a, b: ssim_reference(a, b).mean()
    form = compiled(mean, device)
    baselines["torch.compile of the conv2d form"] = form if isinstance(form, str) else Impl(form)
    yield Case(
        op="ssim",
        size=f"{V} x 3 x {edge}^2",
        dtype="fp32",
        forward=[Work(2 * picture)],
        backward=[Work(3 * picture)],
        inputs=inputs,
        ours=lambda a, b: ssim(a, b).mean(),
        reference=mean,
        baselines=baselines,
    )
