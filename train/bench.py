"""What `python -m kernels.bench` measures beyond single ops: a transformer block and a Gaussian training step.

They need models and the training loop, which kernels may not import: the registry of kernels.bench names this module,
and it is looked up only when one of its ops is asked for.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kernels.bench_attention import WINDOW, Layout, attention_work, flash, one_by_one, sizes, voxels
from kernels.bench_passes import eager_gelu, eager_layer_norm
from kernels.cache import SpatialCache
from kernels.camera import Camera
from kernels.measure import DTYPES, Case, Impl, Work
from kernels.peers import compiled
from models import SparseTensor
from models.layers import Block, Trunk, shifted_windows
from train import gaussian
from train.data import Batch
from train.loop import Objective
from train.losses import GradClipper, Pictures
from train.optimizer import LossScale, Optimizer


def block_work(N: int, squares: int, H: int, D: int, width: int) -> tuple[list[Work], list[Work]]:
    """The stages of a fully fused block, forward and backward, one after another.

    Forward: norm (2 passes over N C), qkv, attention, out, norm with residual (2), MLP. Products count as flops alone
    (their operands stay in flight); 24 N C^2 flops forward in all, twice that backward.
    """
    C = H * D
    forward, backward = attention_work(N, squares, H, D, width)
    passes = Work(2 * N * C * width)
    product = lambda factor: Work(flops=factor * N * C * C)
    stages = [passes, product(6), forward, product(2), passes, product(16)]
    reverse = [product(32), Work(4 * N * C * width), product(4), backward, product(12), Work(4 * N * C * width)]
    return stages, reverse


def published_block(block: Block, attend: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The published forward pass over the same weights: `attend` takes qkv [N, 3, H, D]."""
    to_qkv, to_out, (up, down) = block.attn.to_qkv, block.attn.to_out, block.mlp.mlp.values()

    def run(x: Tensor) -> Tensor:
        qkv = to_qkv(eager_layer_norm(x)).view(len(x), 3, block.attn.heads, -1)
        x = x + to_out(attend(qkv).flatten(1))
        return x + down(eager_gelu(up(eager_layer_norm(x))))

    return run


def block_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """x [N, C] -> x [N, C], gradients of x and of every weight, which is fp32."""
    H, D = sizes(size)
    for name, coords in voxels(size).items():
        cache = SpatialCache(coords.to(device))
        windows = cache.get(shifted_windows, WINDOW, 0)
        layout, N = Layout(windows), len(cache)
        torch.manual_seed(0)
        block = Trunk(8, H * D, num_blocks=1, num_heads=H, window_size=WINDOW).blocks[0].to(device)
        attend = layout.padded().run if device.type == "cpu" else layout.published(flash).run
        published = published_block(block, attend)
        what = "published path on torch ops, " + ("padded attention" if device.type == "cpu" else "varlen_attn")
        fused, naive = compiled(published, device), published_block(block, layout.published(one_by_one).run)

        def ours(x: Tensor, block=block, cache=cache) -> Tensor:
            x, addend = block(x, None, cache)
            return x + addend

        for dtype in dtypes:
            squares = int(windows.lengths.long().square().sum())
            forward, backward = block_work(N, squares, H, D, DTYPES[dtype].itemsize)

            def inputs(seed: int, N=N, dtype=dtype) -> tuple[Tensor]:
                x = torch.randn(N, H * D, generator=torch.Generator().manual_seed(seed))
                return (x.to(device, DTYPES[dtype]).requires_grad_(),)

            yield Case(
                op="block", size=f"{name}, N = {N}", dtype=dtype, inputs=inputs, ours=ours, forward=forward, backward=backward,
                peers={what: Impl(published), "torch.compile of it": fused if isinstance(fused, str) else Impl(fused)},
                reference=naive, naive=size == "small", parameters=list(block.parameters()),
            )  # fmt: skip


def _batch(coords: Tensor, channels: int, edge: int, device: torch.device) -> Batch:
    """Objects with random features and pictures, one view each: what a step computes on does not change its time."""
    generator = torch.Generator().manual_seed(0)
    B = int(coords[-1, 0]) + 1
    camera = Camera.orbit([0.3 + b for b in range(B)], [0.2] * B, width=edge)
    features = torch.randn(len(coords), channels, generator=generator)
    picture = torch.rand(B, 4, edge, edge, generator=generator)
    return Batch(features, coords, B, camera, list(range(B)), picture, [f"object {b}" for b in range(B)]).to(device)


def train_step_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """One micro-batch of two objects, forward, backward and optimiser, with the demo's or the published sizes.

    The floor is that of the transformer blocks alone, which is most of the work: 3 passes of the encoder's and decoder's.
    """
    config = gaussian.DEMO if size == "small" else gaussian.BASE
    shells = list(voxels(size).values())
    coords = shells[-1] if size == "small" else torch.cat([shells[0], shells[1] + torch.tensor([1, 0, 0, 0], dtype=torch.int32)])
    channels = 16 if size == "small" else 1024
    for dtype in dtypes:
        config = replace(config, precision=dtype, resolution=16 if size == "small" else 64)
        torch.manual_seed(0)
        vae = gaussian.build(config, channels)
        vae.set_activation_dtype(DTYPES[dtype])
        vae = vae.to(device)
        batch = _batch(coords, channels, config.image_size, device)
        weights = {name: weight for name, weight in vars(config.weights).items() if name != "lpips"}
        objective = Objective(vae, Pictures(None), weights)
        scale = LossScale() if dtype == "fp16" else LossScale(0, 0, 0)
        optimizer = Optimizer(vae.named_parameters(), GradClipper(config.max_norm), scale)
        noise = torch.randn(len(coords), config.model.latent, generator=torch.Generator().manual_seed(0)).to(device)
        background = torch.ones(batch.batch_size, 3, device=device)

        def step(noise: Tensor, objective=objective, optimizer=optimizer, batch=batch, background=background) -> Tensor:
            x = SparseTensor(batch.features, batch.coords, batch.batch_size)
            loss, _ = objective(x, noise, batch, background)
            optimizer.backward(loss)
            optimizer.step(1e-4)
            return loss.detach()

        H, D = config.model.heads, config.model.channels // config.model.heads
        windows = SpatialCache(coords).get(shifted_windows, config.model.window, 0)
        squares = int(windows.lengths.long().square().sum())
        forward, backward = block_work(len(coords), squares, H, D, DTYPES[dtype].itemsize)
        yield Case(
            op="train_step", size=f"{batch.batch_size} objects, N = {len(coords)}, {config.image_size}^2", dtype=dtype,
            inputs=lambda seed, noise=noise: (noise,), ours=step, forward=2 * config.model.blocks * (forward + backward),
            forward_name="step",
        )  # fmt: skip
