"""Memory of a training step: what it takes, and how it is made to fit what there is.

The largest object of the data goes forward and backward once, then half of its voxels: that gives
the bytes of a voxel and of a view at the moment in which a pass holds most. Several objects take at
most what each would alone. On a GPU the allocator says how many bytes there are; elsewhere every
allocation of torch is counted. Where nothing is limited, as by default on a CPU, the object goes
forward once: the bytes are then those that the pass keeps for its backward pass. Nothing is trained
and no random number of the run is used up.
"""

import json
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

# what an op of ours calls: torch shows a mode such an op as a whole, not what it allocates inside
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import VAE, SparseTensor
from models.files import write_whole
from train.data.batch import Item, collate
from train.losses import Loss
from train.parts import sizes

GB = 1e9
USED = 0.9  # of the memory there is, for tensors: the rest is for libraries and between tensors


class Counted(TorchDispatchMode):
    """Count the bytes of all tensors made inside the block that are alive, and the most there were.

    Tensors that share memory count once.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        own = OPDEFS.get(func._schema.name)
        if own is None:
            result = func(*args, **kwargs)
        else:
            with self:
                result = own._init_fn(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._add(made.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = storage.nbytes()
        if key in self._known:
            return

        def freed(_):
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak(work: Callable[[], None], device: torch.device) -> float:
    """Count the most bytes that `work` holds beside what there was; inf where they do not fit."""
    if device.type != "cuda":
        with Counted() as counted:
            work()
        return counted.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        work()
    except torch.OutOfMemoryError:
        return math.inf
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class Activations:
    """Bytes of a forward and a backward pass beside weights and gradients."""

    voxel: float
    view: float  # with what depends on nothing

    def total(self, voxels: Sequence[int], views: int) -> float:
        """Bytes of objects with so many voxels, and `views` views each."""
        return self.voxel * sum(voxels) + self.view * views * len(voxels)


def _forward(vae: VAE, loss: Loss, item: Item, device: torch.device, between=None) -> Tensor:
    """Go forward with an object; returns the sum of its loss terms."""
    batch = collate([item]).to(device)
    noise = torch.zeros(len(batch.coords), vae.decoder.latent_channels, device=device)
    # a VAE without an encoder takes latents
    x = SparseTensor(noise if vae.encoder is None else batch.features, batch.coords, 1)
    _, scenes = vae(x, noise)
    if between:
        between()
    terms, _ = loss(scenes, batch, noise.new_zeros(len(batch.camera), 3))
    return sum(terms.values())


def kept(vae: VAE, loss: Loss, item: Item, device: torch.device) -> Activations:
    """Count what a forward pass keeps for its backward pass: the VAE a voxel, the loss a view."""
    weights = {p.untyped_storage().data_ptr() for p in vae.parameters()}
    found: dict[int, int] = {}  # bytes of each storage, which stay until the end
    of_vae = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        total = _forward(vae, loss, item, device, lambda: of_vae.append(sum(found.values())))
    del total
    rest = sum(found.values()) - of_vae[0]
    return Activations(of_vae[0] / len(item.coords), rest / len(item.image))


def activations(
    vae: VAE,
    loss: Loss,
    item: Item,
    device: torch.device,
    backward: Callable[[Tensor], None],
) -> Activations:
    """Measure a forward and backward pass of an object, then of half of its voxels.

    There must be no gradients yet, and there are none afterwards.
    """

    def held(voxels: int) -> float:
        part = replace(item, coords=item.coords[:voxels], features=item.features[:voxels])
        return peak(lambda: backward(_forward(vae, loss, part, device)), device)

    trained = [p for p in vae.parameters() if p.requires_grad]
    whole = len(item.coords)
    half = max(whole // 2, 1)
    try:
        for p in trained:  # as in every pass but the first one of a step
            p.grad = torch.zeros_like(p)
        fewer = held(half)
        most = held(whole)
    finally:
        for p in trained:
            p.grad = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if math.isinf(most):
        return Activations(0.0, math.inf)
    voxel = min(max(most - fewer, 0) / max(whole - half, 1), most / whole)
    return Activations(voxel, (most - voxel * whole) / len(item.image))


def split(need: Activations, voxels: Sequence[int], views: int, room: float) -> int:
    """The fewest parts of a micro-batch of which the largest fits `room` bytes; 0 where none does.

    `voxels` are those of each object, the most first.
    """
    for parts in range(1, len(voxels) + 1):
        if need.total(voxels[: sizes(len(voxels), parts)[0]], views) <= room:
            return parts
    return 0


@dataclass(frozen=True)
class Plan:
    """The bytes that a step takes, and the choices that make it fit."""

    parameters: float
    gradients: float
    optimizer: float
    need: Activations
    voxels: list[int]  # of the largest objects, as many as a micro-batch has
    views: int  # of each
    limit: float | None  # bytes; None: nothing is limited
    recompute: bool
    parts: int
    measured: bool  # by the device's allocator, rather than counted

    @property
    def activations(self) -> float:
        """Bytes of the largest part of the largest micro-batch."""
        largest = sizes(len(self.voxels), self.parts)[0]
        return self.need.total(self.voxels[:largest], self.views)

    @property
    def weights(self) -> float:
        """Bytes that do not depend on the batch."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.weights + self.activations

    def how(self) -> str:
        """Say what goes through at once, and whether blocks are recomputed."""
        objects = len(self.voxels)
        text = f"micro-batches of {objects} objects"
        if self.parts > 1:
            text += f" in {self.parts} parts of at most {sizes(objects, self.parts)[0]}"
        return f"{text}, blocks {'recomputed' if self.recompute else 'kept'}"

    def __str__(self) -> str:
        gb = lambda size: f"{size / GB:.3g} GB"
        limit = "no limit" if self.limit is None else f"limit {gb(self.limit)}"
        source = "measured" if self.measured else "counted"
        if self.limit is None:
            source = "as a forward pass keeps them"
        lines = [
            f"{gb(self.total)} in a step ({limit}): {self.how()}",
            f"parameters {gb(self.parameters)}, gradients {gb(self.gradients)}, optimiser "
            f"{gb(self.optimizer)}, activations {gb(self.activations)}",
            f"activations of an object of {self.voxels[0]:,} voxels, {source}: "
            f"{self.need.voxel / 1e3:,.3g} kB a voxel, {self.need.view / 1e6:,.3g} MB a view",
        ]
        return "\n".join(f"{'' if i else 'memory':<11}{line}" for i, line in enumerate(lines))

    def write(self, folder: Path) -> None:
        """Record it in the folder of a run, as memory.json."""
        values = asdict(self) | {"activations": self.activations, "total": self.total}
        write_whole(folder / "memory.json", json.dumps(values, indent=2) + "\n")


def fit(run) -> None:
    """Measure a step of a train.trainer.Run, and choose what makes it fit its memory.

    The memory is --memory-gb, but on a GPU no more than it has free; without that flag what a GPU
    has free, and on a CPU nothing is limited. Blocks are recomputed first, then micro-batches
    split. Every rank chooses the same, by the least memory. Raises ValueError where one object does
    not fit.
    """
    config = run.config
    device = run.here.device
    index, voxels = run.objects.train.largest(config.micro_batch)
    item = run.objects.train[index]
    limit = None if config.memory_gb is None else config.memory_gb * GB
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        limit = min(limit or math.inf, free)
    weights = list(chain(run.local.parameters(), run.local.buffers()))
    if config.encoder:
        weights += run.encoder.parameters()
    gradients = sum(4 * p.numel() for p in run.vae.parameters() if p.requires_grad)
    plan = Plan(
        parameters=sum(t.nbytes for t in weights),
        # DistributedDataParallel has another copy, to exchange
        gradients=gradients * (1 if run.here.world == 1 else 2),
        optimizer=run.optimizer.bytes(),
        need=Activations(0.0, 0.0),
        voxels=voxels,
        views=config.views,
        limit=min((v for v in run.here.gather(limit) if v is not None), default=None),
        recompute=config.model.recompute,
        parts=1,
        measured=device.type == "cuda",
    )
    chosen = choose(plan, lambda on: _measured(run, item, on, plan.limit is not None))
    run.recompute(chosen.recompute)
    run.parts = chosen.parts
    run.memory = chosen


def _measured(run, item: Item, recompute: bool, limited: bool) -> Activations:
    """Measure an object on every rank; returns the largest."""
    run.recompute(recompute)
    run.vae.train()
    device = run.here.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if limited:
            own = activations(run.vae, run.loss, item, device, run.optimizer.backward)
        else:
            own = kept(run.vae, run.loss, item, device)
    found = run.here.gather((own.voxel, own.view))
    return Activations(*(max(values) for values in zip(*found, strict=True)))


def choose(plan: Plan, measured: Callable[[bool], Activations]) -> Plan:
    """Choose recomputation, then parts, so that a step fits the limit of a plan.

    `measured` gives the activations with and without recomputation. Raises ValueError where one
    object does not fit.
    """
    plan = replace(plan, need=measured(plan.recompute))
    if plan.limit is None:
        return plan
    room = USED * plan.limit - plan.weights
    parts = split(plan.need, plan.voxels, plan.views, room)
    if parts == 1:
        return plan
    if not plan.recompute:
        plan = replace(plan, recompute=True, need=measured(True))
        parts = split(plan.need, plan.voxels, plan.views, room)
    if not parts:
        least = replace(plan, parts=len(plan.voxels)).total
        taken = f"{least / GB:.3g} GB" if math.isfinite(least) else "more than the device has"
        raise ValueError(
            f"a step of one object of {plan.voxels[0]:,} voxels takes {taken} with blocks "
            f"recomputed, but {USED * plan.limit / GB:.3g} GB may be used, {USED:.0%} of "
            f"{plan.limit / GB:.3g}: fewer --views, a smaller --image-size or model take less"
        )
    return replace(plan, parts=parts)
