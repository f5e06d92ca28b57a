"""A Gaussian training step as microsoft/TRELLIS composes it, over the weights of a model of ours.

Norms in fp32 between two casts, rows gathered before attention and scattered after it, windows by
argsort and bincount, residual sums and GELU of their own, one call of the rasteriser a view, SSIM
by five convolutions. Where the published code does more than that (a copy of segment bounds from
the host at every attention, a loop over objects in the decoder's activations), ours is used, in the
baseline's favour.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels import Camera, SpatialCache
from kernels.bench.attention import Attend, WindowLayout
from kernels.bench.gaussian import gsplat
from kernels.bench.norm import eager_gelu, eager_layer_norm, ssim_reference
from kernels.bench.voxels import published_partition
from models import VAE, GaussianScene, Posterior, SparseTensor, penalties
from models.layers import Block, Trunk, linear, position_embedding
from models.vae import OUTPUT_EPS
from train.data.batch import Batch
from train.losses.objective import weighted
from train.losses.pictures import composite, kl

# The scene of one object, one view of it and its background [1, 3] -> colour [1, 3, H, W]
Rasterize = Callable[[GaussianScene, Camera, Tensor], Tensor]


def published_block(block: Block, attend: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make the published forward pass over a block's weights: [N, C] -> [N, C].

    `attend` takes qkv [N, 3, H, D].
    """
    to_qkv = block.attn.to_qkv
    to_out = block.attn.to_out
    up, down = block.mlp.mlp

    def run(x: Tensor) -> Tensor:
        qkv = to_qkv(eager_layer_norm(x)).view(len(x), 3, block.attn.heads, -1)
        x = x + to_out(attend(qkv).flatten(1))
        hidden = linear(eager_layer_norm(x), up.weight, up.bias)
        return x + down(eager_gelu(hidden))

    return run


def _layout(cache: SpatialCache, window: int, shift: int) -> WindowLayout:
    return WindowLayout(*published_partition(cache.coords, window, shift))


def published_trunk(model: Trunk, x: SparseTensor, attend: Attend | None) -> Tensor:
    """Compute the features [N, C] before the output layer's norm, with shifted windows.

    `attend` None: padded windows.
    """
    h = model.input_layer(x.feats) + x.cache.get(position_embedding, model.model_channels)
    h = h.to(model.compute_dtype(x.feats))
    for block in model.blocks:
        _, window, shift = block.attn.windows
        layout = x.cache.get(_layout, window, shift)  # the published code keeps its windows as well
        h = published_block(block, (layout.published(attend) if attend else layout.padded()).run)(h)
    return h.to(x.feats.dtype)


def _output(model: Trunk, x: SparseTensor, attend: Attend | None) -> Tensor:
    return model.out_layer(eager_layer_norm(published_trunk(model, x, attend), OUTPUT_EPS))


def published_loss(
    vae: VAE,
    weights: Mapping[str, float],
    attend: Attend | None,
    rasterize: Rasterize,
    x: SparseTensor,
    noise: Tensor,
    batch: Batch,
    background: Tensor,
) -> Tensor:
    """Compute the loss of train.losses.objective.Objective."""
    mean, logvar = _output(vae.encoder, x, attend).chunk(2, dim=1)
    z = Posterior(mean, logvar, x).sample(noise=noise)
    scenes = vae.decoder.scenes(z.replace(_output(vae.decoder, z, attend)))
    views = [
        rasterize(scenes[b], batch.camera[v], background[v : v + 1])
        for v, b in enumerate(batch.view_scene)
    ]
    color = torch.cat(views)
    target = composite(batch.image, background)
    terms = {
        "l1": (color - target).abs().mean(),
        "ssim": 1 - ssim_reference(color, target).mean(),
        "kl": kl(mean, logvar),
    }
    return weighted(terms | penalties(scenes), weights)


def one_view(scene: GaussianScene, camera: Camera, background: Tensor) -> Tensor:
    """Render one view with our own rasteriser: [1, 3, H, W]."""
    return scene.render(camera, background).color


def gsplat_view(scene: GaussianScene, camera: Camera, background: Tensor) -> Tensor:
    """Render one view with gsplat, where it is installed: [1, 3, H, W]."""
    baseline = gsplat(camera, background)
    return baseline.restore(
        baseline.run(scene.center, scene.scale, scene.rotation, scene.opacity, scene.color)
    )[0]
