"""CUDA graphs of a trunk: its launches are recorded once for each size and replayed: N voxels, R
rows, C channels.

A block is about forty launches from Python, forward and backward; with few voxels the GPU is done
before its host has issued the next. A graph is one launch, but of fixed sizes. So a batch is filled
up to R rows, one of eight sizes per doubling, with voxels of made-up samples. Samples do not see
each other, so these change nothing, and their outputs and gradients are dropped. Position
embeddings, windows and tile lists are made inside the graph from the coordinates: their sizes
follow from R, the number of samples and the resolution. Graphs of one trunk share the memory of
what they compute, so only what was run last can be differentiated; features, output and the
gradients of both are kept for every size.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import SpatialCache

LEAST = 1024  # rows of the smallest size
STEPS = 8  # sizes per doubling: above LEAST at most an eighth of the rows is made up
WARM_UPS = 3  # runs before a recording: kernels are compiled, libraries choose their algorithms


def bucket(N: int) -> int:
    """N rounded up to one of STEPS sizes per doubling, at least LEAST."""
    step = max(LEAST, 1 << (N - 1).bit_length()) // (2 * STEPS)
    return max(LEAST, -(-N // step) * step)


def made_up(R: int, resolution: int, sample: int, device: torch.device) -> Tensor:
    """R distinct voxels [R, 4] int32 of as many samples as that takes, the first of number
    `sample`.
    """
    row = torch.arange(R, dtype=torch.int32, device=device)
    cells = resolution**3
    voxel = [row % cells // resolution**axis % resolution for axis in (2, 1, 0)]
    return torch.stack([sample + row // cells, *voxel], 1)


class Recorder:
    """Records what is launched on one GPU. Raises ValueError for another device."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(
                f"CUDA graphs are recorded on a GPU; the model is on {device} (use_graphs(0) "
                "does without)"
            )
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

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
        current = torch.cuda.current_stream(self.stream.device)
        try:
            # "thread_local": the threads that load data may allocate meanwhile
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                result = run()
        finally:
            torch.cuda.set_stream(current)  # where a recording fails, torch may leave its own
        return graph.replay, result


class Size(NamedTuple):
    """What a recording is made for."""

    R: int
    B: int
    channels: int
    dtype: torch.dtype
    # whether there is a backward pass, and whether it reaches the features
    differentiable: tuple[bool, bool]
    activation: torch.dtype
    recompute: bool


class _Compute(nn.Module):
    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk

    def forward(self, feats: Tensor, cache: SpatialCache) -> Tensor:
        return self.trunk.compute(feats, cache)


class Graphs:
    """The graphs of one trunk, for up to `most` voxels.

    `trunk.compute(feats, cache)` must launch the same for every input of the same sizes.
    """

    def __init__(self, trunk: nn.Module, most: int):
        Recorder(next(trunk.parameters()).device)  # raises early
        self.__setstate__((trunk, most))

    def __getstate__(self) -> tuple:
        return self.trunk, self.most

    def __setstate__(self, state: tuple) -> None:
        """Recordings are neither copied nor pickled."""
        self.trunk, self.most = state
        self.turn = 0  # counts replays: memory holds what the last one computed
        self.slots: list[tuple[nn.Module, str]] = []
        self.seen: list | None = None
        self.recordings: dict[Size, _Recording] = {}

    def _weights(self) -> list[Tensor | None]:
        """What the trunk computes with now, in the order of `slots`."""
        return [module._parameters.get(name) for module, name in self.slots]

    def _start(self, device: torch.device) -> None:
        """Forget what was recorded of other weights: a graph knows its own by their addresses."""
        inside = [
            (path, m)
            for path, m in self.trunk.named_modules()
            if path.split(".")[0] in ("input_layer", "blocks")
        ]
        weights = {
            f"trunk.{path}.{name}": (m, name)
            for path, m in inside
            for name, p in m._parameters.items()
            if p is not None
        }
        self.slots = list(weights.values())
        with torch.inference_mode(False):
            # tensors of the same memory, but unknown to whoever differentiates the weights outside,
            # on other streams
            self.aliases = {
                path: p.detach().requires_grad_(p.requires_grad)
                for path, p in zip(weights, self._weights(), strict=True)
            }
            self.shapes = [t.shape for t in self.aliases.values() if t.requires_grad]
            # of all trained weights, one after another: every recording writes them here
            self.gradients = (
                next(iter(self.aliases.values()))
                .detach()
                .new_empty(sum(shape.numel() for shape in self.shapes))
            )
        self.recordings = {}
        self.recorder = Recorder(device)

    def split(self, flat: Tensor) -> Iterator[Tensor]:
        """What belongs to each trained weight, in its shape."""
        parts = flat.split([shape.numel() for shape in self.shapes]) if self.shapes else ()
        return (part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))

    def run(self, feats: Tensor, cache: SpatialCache) -> Tensor:
        """What is recorded: the trunk with the aliases of its weights."""
        return torch.func.functional_call(_Compute(self.trunk), self.aliases, (feats, cache))

    def __call__(
        self, feats: Tensor, cache: SpatialCache, activation: torch.dtype, recompute: bool
    ) -> Tensor:
        """trunk.compute(feats, cache), by a graph. Raises ValueError under torch.autocast, which a
        recording would freeze.
        """
        if torch.is_autocast_enabled(feats.device.type):
            raise ValueError(
                "graphs do not follow torch.autocast: choose the type with set_activation_dtype"
            )
        where = lambda: [
            None if p is None else (p.data_ptr(), p.requires_grad) for p in self._weights()
        ]
        if self.seen is None or self.seen != where():
            self._start(feats.device)
            self.seen = where()
        backward = torch.is_grad_enabled() and (feats.requires_grad or len(self.shapes) > 0)
        reach = backward, backward and feats.requires_grad
        size = Size(
            bucket(len(feats)),
            cache.batch_size,
            feats.shape[1],
            feats.dtype,
            reach,
            activation,
            recompute,
        )
        if size not in self.recordings:
            self.turn += 1  # recording uses the same memory
            with torch.inference_mode(False):  # its tensors are for all modes
                self.recordings[size] = _Recording(self, size, feats, cache)
        recording = self.recordings[size]
        if not backward:
            return recording.forward(feats.detach(), cache)
        return _Replay.apply(recording, cache, feats, *self._weights())


class _Recording:
    """The graphs of one size."""

    def __init__(self, owner: Graphs, size: Size, feats: Tensor, cache: SpatialCache):
        self.owner = owner
        device = feats.device
        resolution = owner.trunk.resolution
        backward, self.inside = size.differentiable
        self.feats = feats.new_zeros(size.R, size.channels).requires_grad_(self.inside)
        self.spare = made_up(size.R, resolution, size.B, device)
        self.coords = self.spare.clone()
        samples = size.B + -(-size.R // resolution**3)
        self._fill(feats.detach(), cache)
        run = lambda: owner.run(
            self.feats, SpatialCache.unread(self.coords, samples, [resolution] * 3)
        )
        with torch.set_grad_enabled(backward):
            if not backward:
                owner.recorder.warm_up(run)
                self._forward, self.out = owner.recorder.record(run)
                return
            wanted = [
                *([self.feats] if self.inside else []),
                *(t for t in owner.aliases.values() if t.requires_grad),
            ]
            self.grad, self.dfeats = (
                feats.new_zeros(size.R, owner.trunk.model_channels),
                torch.empty_like(self.feats),
            )
            kept = [*([self.dfeats] if self.inside else []), *owner.split(owner.gradients)]
            back = lambda out: torch._foreach_copy_(
                kept, torch.autograd.grad(out, wanted, self.grad)
            )
            owner.recorder.warm_up(lambda: back(run()))
            self._forward, out = owner.recorder.record(run)
            self._backward, _ = owner.recorder.record(lambda: back(out))
        self.out = out.detach()  # lets go of what the backward pass read

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
    def backward(self, grad: Tensor, turn: int) -> tuple[Tensor | None, Iterator[Tensor]]:
        if since := self.owner.turn - turn:
            raise ValueError(
                f"the trunk's graphs have run {since} time{'s' * (since > 1)} since this output "
                "was made, and keep what the last "
                "run needs for one backward pass: differentiate before the next run, or do "
                "without graphs"
            )
        self.owner.turn += 1  # the pass overwrites what it reads
        N = len(grad)
        self.grad[:N].copy_(grad)
        self.grad[N:].zero_()
        self._backward()
        return self.dfeats[:N].clone() if self.inside else None, self.owner.split(
            self.owner.gradients.clone()
        )


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, recording: _Recording, cache: SpatialCache, feats: Tensor, *weights: Tensor
    ) -> Tensor:
        out = recording.forward(feats, cache)
        ctx.recording = recording
        ctx.turn = recording.owner.turn
        ctx.weights = [(w, w._version, w.data_ptr()) for w in weights]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        if any(
            (w._version, w.data_ptr()) != (version, address) for w, version, address in ctx.weights
        ):
            raise ValueError(
                "weights were changed after the forward pass, and graphs read them again in the "
                "backward pass"
            )
        dfeats, gradients = ctx.recording.backward(grad, ctx.turn)
        return (
            None,
            None,
            dfeats,
            *(next(gradients) if needed else None for needed in ctx.needs_input_grad[3:]),
        )
