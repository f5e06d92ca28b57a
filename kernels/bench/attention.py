"""Attention in windows and in segments: C = H D channels, n rows in a window.

Forward flops are 4 C sum n^2 (two products), backward 10 C sum n^2 (five). Compulsory bytes of one
pass over qkv [N, 3C], out [N, C] and the fp32 log-sum-exp [N, H]: forward (3 + 1) N C, backward (3
+ 1 + 1 + 3) N C elements, N H numbers each.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from kernels import (
    Windows,
    segment_attention,
    serialized_windows,
    window_attention,
    window_partition,
)
from kernels.attention.reference import segment_attention_reference, window_attention_reference
from kernels.bench.case import DTYPES, Case, Impl, Work, compiled, optional
from kernels.bench.shells import batch, shell

WINDOW = 8
# q, k, v [rows, H, D], starts [M + 1] int32, longest
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


@cache
def voxels(size: str) -> dict[str, Tensor]:
    """Make the coordinate sets of attention, norms and blocks: [N, 4] by name."""
    if size == "small":
        return {"sphere 32^3": batch(shell("sphere", 32)), "blobs 16^3": batch(shell("blobs", 16))}
    uneven = batch(*map(shell, ("noisy sphere", "rough sphere", "rotated box", "small sphere")))
    single = ("sphere", "noisy sphere", "rough sphere", "blobs")
    return {name: batch(shell(name)) for name in single} | {"batch of 4": uneven}


def sizes(size: str) -> tuple[int, int]:
    """Give heads and channels per head: of the published models, or few for a CPU."""
    return (2, 32) if size == "small" else (12, 64)


def attention_work(N: int, squares: int, H: int, D: int, width: int) -> tuple[Work, Work]:
    """Count the work of both passes.

    `squares` is the sum of n^2 over the windows, `width` the bytes of an element.
    """
    C = H * D
    lse = 4 * N * H
    return Work(4 * N * C * width + lse, 4 * C * squares), Work(
        8 * N * C * width + lse, 10 * C * squares
    )


def _squares(windows: Windows) -> int:
    return int(windows.lengths.long().square().sum())


def flash(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Run torch's own kernel for segments of uneven length, FlashAttention-2.

    Raises NotImplementedError on a CPU.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, starts, starts, longest, longest)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Run the naive reference: one window after the other."""
    return segment_attention_reference(q, k, v, starts, starts)


def _varlen(device: torch.device) -> Attend | str:
    """Choose torch's own kernel where it runs, or say why not."""
    return "absent: torch's varlen_attn needs a GPU" if device.type == "cpu" else flash


def _flash_attn() -> Attend | str:
    """Choose the flash_attn package where it is installed, or say why not."""
    module = optional("flash_attn")
    if isinstance(module, str):
        return module
    return lambda q, k, v, starts, longest: module.flash_attn_varlen_func(
        q, k, v, starts, starts, longest, longest
    )


class WindowLayout:
    """Windows in the forms that other packages take, made before anything is timed.

    Empty windows are left out.
    """

    # rows [N] in window order, rows of each window [M]; int32
    def __init__(self, order: Tensor, lengths: Tensor):
        lengths = lengths[lengths > 0]
        self.order = order.long()
        self.longest = int(lengths.max())
        self.starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        self.inverse = torch.empty_like(self.order).scatter_(
            0, self.order, torch.arange(len(self.order)).to(self.order)
        )
        self.segment = torch.repeat_interleave(
            torch.arange(len(lengths)).to(self.order), lengths.long()
        )
        self.place = (
            self.segment * self.longest
            + torch.arange(len(self.order)).to(self.order)
            - self.starts[self.segment]
        )

    def gathered(self, attend: Attend | str) -> Impl | str:
        """Time the attention alone: rows are gathered before and scattered after.

        A string says why it is absent.
        """
        if isinstance(attend, str):
            return attend
        return Impl(
            lambda q, k, v: attend(q, k, v, self.starts, self.longest),
            prepare=lambda qkv: tuple(x.contiguous() for x in qkv[self.order].unbind(1)),
            restore=lambda out: out[self.inverse],
        )

    def published(self, attend: Attend | str) -> Impl | str:
        """Time what the published model runs: gather, attention, scatter.

        A string says why it is absent.
        """
        if isinstance(attend, str):
            return attend
        return Impl(
            lambda qkv: attend(*qkv[self.order].unbind(1), self.starts, self.longest)[self.inverse]
        )

    def padded(self) -> Impl:
        """Pad every window to the longest and run scaled_dot_product_attention with a mask."""
        M = len(self.starts) - 1
        mask = torch.zeros(M * self.longest, dtype=torch.bool, device=self.order.device)
        mask[self.place] = True
        mask = mask.view(M, 1, 1, self.longest)

        def run(qkv):
            _, _, H, D = qkv.shape
            padded = qkv.new_zeros(M * self.longest, 3, H, D).index_copy(
                0, self.place, qkv[self.order]
            )
            q, k, v = padded.view(M, self.longest, 3, H, D).permute(2, 0, 3, 1, 4)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return out.transpose(1, 2).reshape(M * self.longest, H, D)[self.place][self.inverse]

        return Impl(run)

    def block_mask(self, block: int = 128):
        """List the key blocks of each query block for FlexAttention, from the window bounds.

        The N^2 evaluation of the mask is avoided.
        """
        from torch.nn.attention.flex_attention import BlockMask

        N = len(self.order)
        first = torch.arange(0, N, block, device=self.order.device)
        last = (first + block).clamp(max=N) - 1
        low = self.starts[self.segment[first]] // block
        high = (self.starts[self.segment[last] + 1] - 1) // block + 1
        columns = torch.arange(len(first), dtype=torch.int32, device=self.order.device)
        indices = (low[:, None] + columns).clamp(max=len(first) - 1)
        segment = self.segment
        same = lambda b, h, i, j: segment[i] == segment[j]
        counts = (high - low).int()[None, None]
        return BlockMask.from_kv_blocks(
            counts,
            indices[None, None].int().contiguous(),
            BLOCK_SIZE=block,
            mask_mod=same,
            seq_lengths=(N, N),
        )

    def flex(self, compile: Callable) -> Impl | str:
        """Time FlexAttention over gathered rows.

        `compile` turns the eager function into the fused one, or says why not.
        """
        from torch.nn.attention.flex_attention import flex_attention

        attend = compile(flex_attention)
        if isinstance(attend, str):
            return attend
        mask = self.block_mask()
        return Impl(
            lambda q, k, v: attend(q, k, v, block_mask=mask),
            prepare=lambda qkv: tuple(
                x.transpose(0, 1)[None].contiguous() for x in qkv[self.order].unbind(1)
            ),
            restore=lambda out: out[0].transpose(0, 1)[self.inverse],
        )


def _random(shape: tuple, dtype: str, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, DTYPES[dtype]).requires_grad_()


def attention_case(
    op: str,
    name: str,
    dtype: str,
    coords: Tensor,
    H: int,
    D: int,
    device: torch.device,
    window: int = WINDOW,
) -> Case:
    """Make the case of one coordinate set and type, with every baseline."""
    coords = coords.to(device)
    windows = window_partition(coords, int(coords[-1, 0]) + 1, window, 0)
    layout = WindowLayout(windows.order, windows.lengths)
    N = len(coords)
    forward, backward = attention_work(N, _squares(windows), H, D, DTYPES[dtype].itemsize)
    common = dict(
        op=op, size=f"{name}, N = {N}", dtype=dtype, forward=[forward], backward=[backward]
    )
    varlen = _varlen(device)
    if op == "segment_attention":  # q, k, v as three tensors in window order
        starts = windows.starts
        run = lambda q, k, v: varlen(q, k, v, layout.starts, layout.longest)
        baselines = {"torch varlen_attn": varlen if isinstance(varlen, str) else Impl(run)}
        return Case(
            inputs=lambda seed: tuple(
                _random((N, H, D), dtype, device, 3 * seed + i) for i in range(3)
            ),
            ours=lambda q, k, v: segment_attention(q, k, v, starts, starts),
            baselines=baselines,
            reference=lambda q, k, v: segment_attention_reference(q, k, v, starts, starts),
            **common,
        )
    baselines = {
        "torch varlen_attn, rows gathered before": layout.gathered(varlen),
        "published path: gather + varlen_attn + scatter": layout.published(varlen),
        "flash_attn, rows gathered before": layout.gathered(_flash_attn()),
        "FlexAttention, block mask, rows gathered before": layout.flex(
            lambda f: compiled(f, device)
        ),
        "padded scaled_dot_product_attention": layout.padded(),
    }
    return Case(
        inputs=lambda seed: (_random((N, 3, H, D), dtype, device, seed),),
        ours=lambda qkv: window_attention(qkv, windows),
        baselines=baselines,
        reference=layout.published(one_by_one).run,
        **common,
    )


def window_attention_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure windows on every coordinate set."""
    for name, coords in voxels(size).items():
        for dtype in dtypes:
            yield attention_case("window_attention", name, dtype, coords, *sizes(size), device)


def segment_attention_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure segments on the first coordinate set: no row order is read."""
    name, coords = next(iter(voxels(size).items()))
    for dtype in dtypes:
        yield attention_case("segment_attention", name, dtype, coords, *sizes(size), device)


def serialized_attention_cases(
    size: str, dtypes: list[str], device: torch.device
) -> Iterator[Case]:
    """Measure overlapping runs of 512 voxels (64 on a CPU) along a space-filling curve.

    Keys are an index list, in which rows repeat.
    """
    name, coords = next(iter(voxels(size).items()))
    coords = coords.to(device)
    H, D = sizes(size)
    run = 64 if size == "small" else 512
    windows = serialized_windows(coords, int(coords[-1, 0]) + 1, run)
    N = len(coords)
    scores = int((windows.lengths.long() * windows.key_starts.diff()).sum())
    for dtype in dtypes:
        forward, backward = attention_work(N, scores, H, D, DTYPES[dtype].itemsize)
        yield Case(
            op="serialized_attention",
            size=f"{name}, N = {N}, runs of {run}",
            dtype=dtype,
            forward=[forward],
            backward=[backward],
            inputs=lambda seed, d=dtype: (_random((N, 3, H, D), d, device, seed),),
            ours=lambda qkv: window_attention(qkv, windows),
            reference=lambda qkv: window_attention_reference(qkv, windows),
        )


def rotary_attention_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure windows whose queries and keys are rotated and RMS-normed as they are loaded.

    Phases and gammas are too small to count.
    """
    name, coords = next(iter(voxels(size).items()))
    coords = coords.to(device)
    H, D = sizes(size)
    windows = window_partition(coords, int(coords[-1, 0]) + 1, WINDOW, 0)
    N = len(coords)
    frequency = 10.0 ** -torch.arange(D // 2, device=device)
    angle = coords[:, 1:].float() @ torch.ones(3, D // 2, device=device) * frequency
    phases = torch.polar(torch.ones_like(angle), angle)

    def gamma(seed: int) -> Tensor:
        noise = torch.randn(H, D, generator=torch.Generator().manual_seed(seed))
        return (1 + 0.1 * noise).to(device).requires_grad_()

    def normed_and_rotated(attend: Callable) -> Callable:
        def run(qkv: Tensor, q_gamma: Tensor, k_gamma: Tensor) -> Tensor:
            if qkv.dtype == torch.float64:
                q_gamma = q_gamma.to(qkv)
                k_gamma = k_gamma.to(qkv)
            return attend(qkv, windows, q_gamma=q_gamma, k_gamma=k_gamma, phases=phases)

        return run

    for dtype in dtypes:
        forward, backward = attention_work(N, _squares(windows), H, D, DTYPES[dtype].itemsize)

        def inputs(seed: int, dtype=dtype) -> tuple[Tensor, Tensor, Tensor]:
            qkv = _random((N, 3, H, D), dtype, device, seed)
            return qkv, gamma(seed), gamma(seed + 1)

        yield Case(
            op="rotary_attention",
            size=f"{name}, N = {N}",
            dtype=dtype,
            forward=[forward],
            backward=[backward],
            inputs=inputs,
            ours=normed_and_rotated(window_attention),
            reference=normed_and_rotated(window_attention_reference),
        )
