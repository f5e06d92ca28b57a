"""CUDA graphs of a trunk: its launches are recorded once for each size and replayed: N voxels, R rows, C channels.

A block is about forty launches from Python, forward and backward; with few voxels the GPU is done before its host has
issued the next. A graph is one launch, but of fixed sizes. So a batch is filled up to R rows, one of eight sizes per
doubling, with voxels of made-up samples. Samples do not see each other, so these change nothing, and their outputs and
gradients are dropped. Position embeddings, windows and tile lists are made inside the graph from the coordinates: their
sizes follow from R, the number of samples and the resolution. Graphs of one trunk share the memory of what they compute, so
only what was run last can be differentiated; features, output and the gradients of both are kept for every size.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.cache import SpatialCache

LEAST = 1024  # rows of the smallest size
STEPS = 8  # sizes per doubling: at most an eighth of the rows is made up
WARM_UPS = 3  # runs before a recording: kernels are compiled, libraries choose their algorithms


def bucket(N: int) -> int:
    """N rounded up to one of STEPS sizes per doubling, at least LEAST."""
    step = max(LEAST, 1 << (N - 1).bit_length()) // (2 * STEPS)
    return max(LEAST, -(-N // step) * step)


def made_up(R: int, resolution: int, sample: int, device: torch.device) -> Tensor:
    """R distinct voxels [R, 4] int32 of as many samples as that takes, the first of number `sample`."""
    row = torch.arange(R, dtype=torch.int32, device=device)
    cells = resolution**3
    voxel = [row % cells // resolution**axis % resolution for axis in (2, 1, 0)]
    return torch.stack([sample + row // cells, *voxel], 1)


class Recorder:
    """Records what is launched on one GPU. Raises ValueError for another device."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs are recorded on a GPU; the model is on {device}")
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run it a few times outside the current stream, as must be before a recording."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(self.stream)

    def record(self, run: Callable[[], object]) -> tuple[Callable[[], None], object]:
        """What repeats its launches, and its result, whose memory that fills."""
        graph = torch.cuda.CUDAGraph()
        # "thread_local": the threads that load data may allocate meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


class Size(NamedTuple):
    """What a recording is made for."""

    R: int
    B: int
    channels: int
    dtype: torch.dtype
    differentiable: tuple[bool, bool]  # whether there is a backward pass, and whether it reaches the features
    activation: torch.dtype
    recompute: bool


class Graphs:
    """The graphs of one trunk, for up to `most` voxels.

    `run(feats, cache)` computes [N, C] from features and voxels whose coordinates are below `resolution`; it must launch the
    same for every input of the same sizes, and reads `parameters`, which it computes gradients for.
    """

    def __init__(self, most: int, resolution: int, run: Callable, parameters: Sequence[nn.Parameter]):
        self.most, self.resolution, self.run, self.parameters = most, resolution, run, list(parameters)
        self.recordings: dict[Size, _Recording] = {}
        self.turn = 0  # counts replays: memory holds what the last one computed
        self.seen = self._where()
        self.recorder = Recorder(self.parameters[0].device)
        self.gradients: Tensor | None = None  # of all weights, one after another: every recording writes them here

    def __deepcopy__(self, memo: dict) -> "Graphs":
        return Graphs(self.most, self.resolution, *deepcopy((self.run, self.parameters), memo))  # recordings are not copied

    def _where(self) -> list[tuple[int, bool]]:
        return [(p.data_ptr(), p.requires_grad) for p in self.parameters]

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters if p.requires_grad]

    def split(self, flat: Tensor) -> list[Tensor]:
        """What belongs to each trained weight, in its shape."""
        parts = flat.split([p.numel() for p in self.trained])
        return [part.view_as(p) for part, p in zip(parts, self.trained, strict=True)]

    def __call__(self, feats: Tensor, cache: SpatialCache, activation: torch.dtype, recompute: bool) -> Tensor:
        """run(feats, cache), by a graph. Raises ValueError under torch.autocast, which a recording would freeze."""
        if torch.is_autocast_enabled(feats.device.type):
            raise ValueError("graphs do not follow torch.autocast: choose the type with set_activation_dtype")
        if self.seen != self._where():  # a graph knows its weights by their addresses
            self.recordings, self.gradients, self.recorder, self.seen = {}, None, Recorder(feats.device), self._where()
        inside = feats.requires_grad
        backward = torch.is_grad_enabled() and (inside or len(self.trained) > 0)
        reach = backward, backward and inside
        size = Size(bucket(len(feats)), cache.batch_size, feats.shape[1], feats.dtype, reach, activation, recompute)
        if size not in self.recordings:
            self.turn += 1  # recording uses the same memory
            self.recordings[size] = _Recording(self, size, feats, cache)
        recording = self.recordings[size]
        if not backward:
            return recording.forward(feats.detach(), cache)
        return _Replay.apply(recording, cache, feats, *self.parameters)


class _Recording:
    """The graphs of one size."""

    def __init__(self, owner: Graphs, size: Size, feats: Tensor, cache: SpatialCache):
        self.owner, device, extent = owner, feats.device, [owner.resolution] * 3
        backward, self.inside = size.differentiable
        self.feats = feats.new_zeros(size.R, size.channels).requires_grad_(self.inside)
        self.spare = made_up(size.R, owner.resolution, size.B, device)
        self.coords, samples = self.spare.clone(), size.B + -(-size.R // owner.resolution**3)
        self._fill(feats.detach(), cache)
        run = lambda: owner.run(self.feats, SpatialCache.unread(self.coords, samples, extent))
        wanted = [*([self.feats] if self.inside else []), *owner.trained]
        with torch.set_grad_enabled(backward):
            trial = (lambda: torch.autograd.grad(run().sum(), wanted)) if backward else run
            owner.recorder.warm_up(trial)
            self._forward, self.out = owner.recorder.record(run)
            if not backward:
                return
            self.grad, self.dfeats = torch.zeros_like(self.out), torch.empty_like(self.feats) if self.inside else None
            if owner.gradients is None:
                owner.gradients = self.grad.new_empty(sum(p.numel() for p in owner.trained), dtype=owner.parameters[0].dtype)
            kept = [*([self.dfeats] if self.inside else []), *owner.split(owner.gradients)]

            def back() -> None:
                torch._foreach_copy_(kept, torch.autograd.grad(self.out, wanted, self.grad))

            self._backward, _ = owner.recorder.record(back)
        self.out = self.out.detach()  # lets go of what the backward pass read

    @torch.no_grad()
    def _fill(self, feats: Tensor, cache: SpatialCache) -> None:
        N = len(feats)
        self.feats[:N].copy_(feats)
        self.feats[N:].zero_()
        self.coords[:N].copy_(cache.coords)
        self.coords[N:].copy_(self.spare[: len(self.spare) - N])

    def forward(self, feats: Tensor, cache: SpatialCache) -> Tensor:
        self._fill(feats, cache)
        self.owner.turn += 1
        self._forward()
        return self.out[: len(feats)].clone()

    @torch.no_grad()
    def backward(self, grad: Tensor, turn: int) -> tuple[Tensor | None, list[Tensor]]:
        if since := self.owner.turn - turn:
            raise ValueError(
                f"the trunk's graphs have run {since} time{'s' * (since > 1)} since this output was made, and keep what the last "
                "run needs for one backward pass: differentiate before the next run, or do without graphs"
            )
        self.owner.turn += 1  # the pass overwrites what it reads
        N = len(grad)
        self.grad[:N].copy_(grad)
        self.grad[N:].zero_()
        self._backward()
        return self.dfeats[:N].clone() if self.inside else None, self.owner.split(self.owner.gradients.clone())


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording: _Recording, cache: SpatialCache, feats: Tensor, *parameters: Tensor) -> Tensor:
        out = recording.forward(feats, cache)
        ctx.recording, ctx.turn = recording, recording.owner.turn
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        dfeats, gradients = ctx.recording.backward(grad, ctx.turn)
        gradients = iter(gradients)
        return None, None, dfeats, *(next(gradients) if p.requires_grad else None for p in ctx.recording.owner.parameters)
