"""Random choices from one seed, and the cases that are made of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.voxels.cache import SpatialCache
from tests.helpers.voxels import voxels

# of fp32: where upstream gradients nearly cancel the torch path too is off by up to 2.4e-5
RENDERED = 5e-5


# the size of terms that cancel to nothing, such as in the gradient of the score of an only key
CANCELLED = 0.25


class Case(NamedTuple):
    """`op` and `reference` of the same tensors, which require gradients; without tensors both
    return what must be equal.
    """

    op: Callable
    reference: Callable
    tensors: list[Tensor]
    tolerance: float | None = None
    least: float = 1e-3  # as in `assert_close`


class Draw:
    """Random choices from one seed. A case is small where Triton's interpreter computes it."""

    def __init__(self, seed: int, device: torch.device):
        self.rng = torch.Generator().manual_seed(seed)
        self.device = device
        self.seed = seed
        self.fast = backend.name(torch.empty(0, device=device)) != "interpreter"
        self.compiled = not backend.is_torch(torch.empty(0, device=device))

    def number(self, low: int, high: int) -> int:
        """low and low + 1 come often."""
        top = min(high, low + 1) if self.pick(0, 0, 0, 1) else high
        return int(torch.randint(low, top + 1, (), generator=self.rng))

    def pick(self, *choices):
        return choices[int(torch.randint(len(choices), (), generator=self.rng))]

    def width(self, drawn, *few):
        """What kernels are compiled for, such as channels: one of a few, as other tests; on the
        torch path `drawn`.
        """
        return self.pick(*few) if self.compiled else drawn

    def lengths(self, most: int, pieces: int = 5) -> list[int]:
        """Of up to `pieces` samples or segments, in all up to about `most`; none at all and empty
        ones among them.
        """
        return [self.number(0, most // pieces) for _ in range(self.number(0, pieces))]

    def starts(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0
    ) -> Tensor:
        x = torch.randn(shape, generator=self.rng, dtype=torch.float64) * spread
        return x.to(self.device, dtype).requires_grad_()

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (
            torch.rand(shape, generator=self.rng, dtype=torch.float64)
            .to(self.device, dtype)
            .requires_grad_()
        )

    def dtype(self) -> torch.dtype:
        """bf16 is wrong in the interpreter, whatever the kernel."""
        return self.pick(torch.float32, torch.float16, *[torch.bfloat16] * self.fast)

    def exact(self) -> torch.dtype:
        """Of ops that decide by comparing numbers: where they can, in float64, in which reference
        and op decide alike.
        """
        return (
            torch.float64 if backend.is_torch(torch.empty(0, device=self.device)) else torch.float32
        )

    def cache(self, most: int, extent: int = 6) -> SpatialCache:
        counts = [min(n, extent**3) for n in self.lengths(most)] or [0]
        return SpatialCache(voxels(counts, (extent,) * 3, self.seed).to(self.device), len(counts))

    def strided(self, op: Callable) -> Callable:
        """`op` of copies that lie in memory otherwise (strides, offset, NaN between rows), its
        first output transposed: the gradient that comes back to it is strided too.
        """
        ways = [self.pick(0, 1, 2, 3) for _ in range(4)]

        def lay(t: Tensor, way: int) -> Tensor:
            if way == 1 and t.ndim:
                return torch.nn.functional.pad(t, (1, 2), value=float("nan"))[..., 1:-2]
            if way == 2:
                return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
            if way == 3 and t.ndim > 1:
                return t.transpose(0, -1).contiguous().transpose(0, -1)
            return t

        def run(*tensors: Tensor):
            out = op(*(lay(t, ways[i % 3]) for i, t in enumerate(tensors)))
            outputs = (
                [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)]
            )
            if ways[3] % 2 and outputs[0].ndim > 1:
                outputs[0] = outputs[0].mT.clone(memory_format=torch.contiguous_format).mT
            return outputs

        return run
