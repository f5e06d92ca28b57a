"""Time a transformer block, a transformer and a training step, beside the published ones.

    python -m train.bench [OP ...]

The flags, tables and results are those of `python -m kernels.bench`, which measures single ops; see
kernels.bench.command.
"""

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kernels import Camera, SpatialCache, window_partition
from kernels.bench.attention import (
    WINDOW,
    Attend,
    WindowLayout,
    attention_work,
    flash,
    one_by_one,
    sizes,
    voxels,
)
from kernels.bench.case import DTYPES, Case, Cases, Impl, Work, compiled, optional
from kernels.bench.command import main
from kernels.bench.shells import batch, shell
from models import VAE, Encoder, SparseTensor
from models.layers import Trunk, shifted_windows
from train import gaussian
from train.data.batch import Batch
from train.losses.objective import Objective
from train.losses.pictures import PictureLoss
from train.optimizer import GradClipper, LossScale, Optimizer
from train.published import Rasterize, gsplat_view, one_view, published_block, published_loss


def block_work(N: int, squares: int, H: int, D: int, width: int) -> tuple[list[Work], list[Work]]:
    """List the stages of a fully fused block, forward and backward, one after another.

    Forward: norm (2 passes over N C), qkv, attention, out, norm with residual (2), MLP. Products
    count as flops alone (their operands stay in flight); 24 N C^2 flops forward in all, twice that
    backward.
    """
    C = H * D
    forward, backward = attention_work(N, squares, H, D, width)
    passes = Work(2 * N * C * width)
    product = lambda factor: Work(flops=factor * N * C * C)
    stages = [passes, product(6), forward, product(2), passes, product(16)]
    reverse = [
        product(32),
        Work(4 * N * C * width),
        product(4),
        backward,
        product(12),
        Work(4 * N * C * width),
    ]
    return stages, reverse


def block_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure x [N, C] -> x [N, C], with gradients of x and of every weight, which is fp32."""
    H, D = sizes(size)
    for name, coords in voxels(size).items():
        cache = SpatialCache(coords.to(device))
        windows = cache.get(shifted_windows, WINDOW, 0)
        layout = WindowLayout(windows.order, windows.lengths)
        N = len(cache)
        torch.manual_seed(0)
        block = Trunk(8, H * D, num_blocks=1, num_heads=H, window_size=WINDOW).blocks[0].to(device)
        attend = layout.padded().run if device.type == "cpu" else layout.published(flash).run
        published = published_block(block, attend)
        kernel = "padded attention" if device.type == "cpu" else "varlen_attn"
        fused = compiled(published, device)
        naive = published_block(block, layout.published(one_by_one).run)

        for dtype in dtypes:
            squares = int(windows.lengths.long().square().sum())
            forward, backward = block_work(N, squares, H, D, DTYPES[dtype].itemsize)

            def inputs(seed: int, N=N, dtype=dtype) -> tuple[Tensor]:
                x = torch.randn(N, H * D, generator=torch.Generator().manual_seed(seed))
                return (x.to(device, DTYPES[dtype]).requires_grad_(),)

            yield Case(
                op="block",
                size=f"{name}, N = {N}",
                dtype=dtype,
                inputs=inputs,
                ours=partial(block, cache=cache),
                forward=forward,
                backward=backward,
                baselines={
                    f"published path on torch ops, {kernel}": Impl(published),
                    "torch.compile of it": fused if isinstance(fused, str) else Impl(fused),
                },
                reference=naive,
                naive=size == "small",
                parameters=list(block.parameters()),
            )


def trunk_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure a transformer on so few voxels that a GPU may wait for its host.

    The device's time, then that of the host, which issues the work and does not wait for it.
    Windows are made in every call, as for every batch of a training.
    """
    H, D = sizes(size)
    blocks = 2 if size == "small" else 12
    for resolution in (16,) if size == "small" else (16, 32, 64):
        coords = batch(shell("sphere", resolution)).to(device)
        N = len(coords)
        squares = int(window_partition(coords, 1, WINDOW).lengths.long().square().sum())
        torch.manual_seed(0)
        model = Encoder(resolution, 8, H * D, 8, blocks, num_heads=H, window_size=WINDOW).to(device)

        def inputs(seed: int, N=N) -> tuple[Tensor]:
            return (torch.randn(N, 8, generator=torch.Generator().manual_seed(seed)).to(device),)

        def step(
            model: Encoder, dtype: str, feats: Tensor, coords=coords, extent=(resolution,) * 3
        ) -> tuple[Tensor, ...]:
            model.set_activation_dtype(DTYPES[dtype])
            out = model.trunk(feats, SpatialCache.unread(coords, 1, extent))
            weights = [*model.input_layer.parameters(), *model.blocks.parameters()]
            return out.detach(), *torch.autograd.grad(out, weights, torch.ones_like(out))

        for dtype in dtypes:
            forward, backward = block_work(N, squares, H, D, DTYPES[dtype].itemsize)
            for on_host in (False, True):
                yield Case(
                    op="trunk",
                    size=f"sphere {resolution}^3, N = {N}, {blocks} blocks"
                    + (", host" if on_host else ""),
                    dtype=dtype,
                    inputs=inputs,
                    ours=partial(step, model, dtype),
                    forward=[] if on_host else blocks * (forward + backward),
                    on_host=on_host,
                    forward_name="both passes",
                )


def _batch(coords: Tensor, channels: int, edge: int, device: torch.device) -> Batch:
    """Make objects with random features and pictures, one view each.

    The values a step computes with do not change its time.
    """
    generator = torch.Generator().manual_seed(0)
    B = int(coords[-1, 0]) + 1
    camera = Camera.orbit([0.3 + b for b in range(B)], [0.2] * B, width=edge)
    features = torch.randn(len(coords), channels, generator=generator)
    picture = torch.rand(B, 4, edge, edge, generator=generator)
    return Batch(
        features, coords, B, camera, list(range(B)), picture, [f"object {b}" for b in range(B)]
    ).to(device)


def _trainer(
    vae: VAE, precision: str, max_norm: float, loss: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Make a training step over weights of its own; it returns the loss.

    A step is loss(vae, *args), its gradients and the optimiser.
    """
    vae = deepcopy(vae)
    scale = LossScale() if precision == "fp16" else LossScale(0, 0, 0)
    optimizer = Optimizer(vae.named_parameters(), GradClipper(max_norm), scale)

    def step(*args) -> Tensor:
        value = loss(vae, *args)
        optimizer.backward(value)
        optimizer.step(1e-4)
        return value.detach()

    return step


def _published(
    attend: Attend | None, rasterize: Rasterize, batch: Batch, background: Tensor, weights: dict
) -> Callable:
    def loss(vae: VAE, noise: Tensor) -> Tensor:
        x = SparseTensor(batch.features, batch.coords, batch.batch_size)
        return published_loss(vae, weights, attend, rasterize, x, noise, batch, background)

    return loss


def train_step_cases(size: str, dtypes: list[str], device: torch.device) -> Iterator[Case]:
    """Measure a training step: a micro-batch of two objects, with the demo's or published sizes.

    Each implementation trains a model of its own from the same weights; the first losses are
    compared. The floor is that of the transformer blocks alone, which is most of the work: 3 passes
    of the encoder's and decoder's.
    """
    config = gaussian.DEMO if size == "small" else gaussian.BASE
    shells = list(voxels(size).values())
    one, other = (shells[-1], shells[-1]) if size == "small" else shells[:2]
    coords = torch.cat([one, other + torch.tensor([1, 0, 0, 0], dtype=torch.int32)])
    channels = 16 if size == "small" else 1024
    attend, where = (None, "padded attention") if device.type == "cpu" else (flash, "varlen_attn")
    for dtype in dtypes:
        config = replace(config, precision=dtype, resolution=16 if size == "small" else 64)
        torch.manual_seed(0)
        vae = gaussian.build(config, channels)
        # zero at the start: no loss would depend on what is compared
        for part in (vae.encoder, vae.decoder):
            torch.nn.init.xavier_uniform_(part.out_layer.weight, gain=0.3)
        vae.set_activation_dtype(DTYPES[dtype])
        vae = vae.to(device)
        batch = _batch(coords, channels, config.image_size, device)
        weights = {name: weight for name, weight in vars(config.weights).items() if name != "lpips"}
        compare = PictureLoss(None)
        background = torch.ones(batch.batch_size, 3, device=device)

        def inputs(seed: int, coords=coords, latent=config.model.latent) -> tuple[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            return (torch.randn(len(coords), latent, generator=generator).to(device),)

        def ours(
            vae: VAE,
            noise: Tensor,
            batch=batch,
            weights=weights,
            compare=compare,
            background=background,
        ) -> Tensor:
            # its windows are made in every step
            x = SparseTensor(batch.features, batch.coords, batch.batch_size)
            return Objective(vae, compare, weights)(x, noise, batch, background)[0]

        train = lambda loss, vae=vae, config=config: _trainer(
            vae, config.precision, config.max_norm, loss
        )
        common = batch, background, weights
        name = f"published composition, {where}, "
        ours_by_view = Impl(train(_published(attend, one_view, *common)))
        gsplat_by_view = optional("gsplat")
        if not isinstance(gsplat_by_view, str):
            loss = _published(attend, gsplat_view, *common)
            gsplat_by_view = Impl(train(loss), tolerance=5e-2)
        baselines = {
            name + "our splat a view at a time": ours_by_view,
            name + "gsplat a view at a time": gsplat_by_view,
        }
        H = config.model.heads
        D = config.model.channels // config.model.heads
        windows = SpatialCache(coords).get(shifted_windows, config.model.window, 0)
        squares = int(windows.lengths.long().square().sum())
        forward, backward = block_work(len(coords), squares, H, D, DTYPES[dtype].itemsize)
        yield Case(
            op="train_step",
            size=f"{batch.batch_size} objects, N = {len(coords)}, {config.image_size}^2",
            dtype=dtype,
            inputs=inputs,
            ours=train(ours),
            forward=2 * config.model.blocks * (forward + backward),
            baselines=baselines,
            forward_name="step",
        )


OPS: dict[str, Cases] = {
    "block": block_cases,
    "trunk": trunk_cases,
    "train_step": train_step_cases,
}

if __name__ == "__main__":
    sys.exit(main(OPS, "python -m train.bench"))
