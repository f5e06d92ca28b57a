"""How often a block passes over memory: what every launch and every product reads and writes,
counted in N x C numbers.
"""

from collections import Counter
from unittest.mock import patch

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kernels import backend
from models.layers import Block, block_windows
from tests.helpers.models import batch, randomize

C = 32
LAUNCH = backend.launch
FREE = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "unbind",
    "slice",
    "select",
    "detach",
    "empty_like",
    "new_empty",
}
PRODUCTS = {"mm", "addmm", "addmm_", "linear"}


class Passes(TorchDispatchMode):
    """Numbers that belong to rows, read and written, in units of N x C, by kernel or function;
    views and weights are free.
    """

    def __init__(self, N: int):
        super().__init__()
        self.N = N
        self.units = Counter()

    def size(self, *given) -> float:
        tensors = [t for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, torch.Tensor)]
        return sum(t.numel() / (self.N * C) for t in tensors if t.numel() >= self.N * C)

    def launch(self, kernel, grid, *args, **constants) -> None:
        self.units[kernel.fn.__name__] += round(self.size(args))
        with _disable_current_modes():  # what the interpreter does is not the kernel's
            LAUNCH(kernel, grid, *args, **constants)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if function.namespace == "trislat":
            with self:
                return OPDEFS[function.name()]._init_fn(*args, **kwargs)
        out = function(*args, **kwargs)
        if name not in FREE:
            self.units["product" if name in PRODUCTS else name] += round(
                self.size(args, kwargs, out)
            )
        return out


def given(kernel_device):
    """A block, and a stream, a bias and voxels for it whose windows are made."""
    x = batch([150, 200], kernel_device, channels=C)
    block = randomize(Block(C, 2, 4.0, block_windows("swin", 4, 0), False, False)).to(kernel_device)
    stream, bias = (
        torch.randn(*shape, device=kernel_device, requires_grad=True)
        for shape in ((len(x), C), (C,))
    )
    block.on_a_copy(stream, bias, x.cache)
    return block, stream, bias, x.cache


def count(kernel_device) -> tuple[Counter, Counter]:
    """Forward and backward of a block that is neither the first nor the last."""
    block, stream, bias, cache = given(kernel_device)
    copy = stream.clone()
    with Passes(len(stream)) as passes, patch.object(backend, "launch", passes.launch):
        out = block(copy, bias, cache)
        forward = +passes.units
    upstream = [torch.ones_like(t) for t in out]
    with Passes(len(stream)) as passes, patch.object(backend, "launch", passes.launch):
        torch.autograd.grad(out, [copy, bias, *block.parameters()], upstream)
    return forward, +passes.units


def test_a_block_reads_and_writes_no_more_than_it_must(kernel_device):
    """Of the products: inputs, outputs and their gradients, 1 + 3, 1 + 1, 1 + 4, 4 + 1, and the
    stream that two of them add to. No copy, no cast, no sum of its own.
    """
    forward, backward = count(kernel_device)
    assert forward == {
        "product": 16 + 2,
        "_layer_norm_fwd": 2 * 2,
        "_attention_short": 4,
        "_gelu_fwd": 8,
    }
    biases = {"sum": 3}  # of qkv; the others come with GELU's and the norms' gradients
    assert backward == biases | {
        "product": 2 * 16,
        "_layer_norm_bwd": 2 * 4,
        "_attention_short_backward": 8,
        "_gelu_bwd": 12,
    }


def test_a_block_keeps_no_residual_stream_for_its_backward_pass(kernel_device):
    """Two norms, qkv (3), attention's output, the hidden layer before and after GELU (4 + 4); the
    stream would be 2 more.
    """
    block, stream, bias, cache = given(kernel_device)
    copy = stream.clone()
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() / (4 * len(stream) * C)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = block(copy, bias, cache)
    assert sum(size for size in kept.values() if size >= 1) == 14
    assert out[0].data_ptr() == copy.data_ptr() and copy.untyped_storage().data_ptr() not in kept
