"""The optimiser step on fp32 master weights.

Loss scale, finite check, clipping, AdamW or Muon, averaged weights. The published recipe
("inflat_all" of microsoft/TRELLIS) keeps fp16 activations and gradients in range by multiplying the
loss by 2^s: s starts at 20, grows by 0.001 with every good step and falls by 1 where a gradient is
not finite. Such a step is skipped: no weight moves, but the average of the weights and the
learning-rate schedule go on. Unlike there, s ends at -40, where overflow of fp16 can no longer be
why, and the gradients of several micro-batches are summed in fp32; one micro-batch's still pass
through fp16 and can overflow there.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.reading import entry, shown
from train.muon import Muon

# what an optimiser remembers of a parameter once it has moved
KEPT = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}
LEAST_LOG2 = -40.0  # below it no fp16 gradient is left


@dataclass
class LossScale:
    """The exponent of the factor on the loss.

    Other precisions than fp16 need none: `LossScale(0, 0, 0)` stays at 1.
    """

    log2: float = 20.0
    growth: float = 1e-3
    backoff: float = 1.0

    @property
    def least(self) -> bool:
        """True where it can fall no further.

        Where gradients are still not finite then, fp16 is not why.
        """
        return not self.backoff or self.log2 <= LEAST_LOG2

    def update(self, finite: bool) -> None:
        self.log2 = max(self.log2 + (self.growth if finite else -self.backoff), LEAST_LOG2)


def _is_hidden_matrix(name: str, p: nn.Parameter) -> bool:
    return p.ndim == 2 and ".blocks." in f".{name}"


class Optimizer:
    """AdamW over named fp32 parameters with everything that surrounds a step.

    `clip(parameters) -> norm` clips their gradients in place and returns the norm before (a tensor
    or a float). `muon` gives the matrices inside blocks orthogonal steps instead (train.muon), as
    large as AdamW's would be, so that one learning rate serves all. Raises ValueError for
    parameters that are not fp32: eps = 1e-8 is zero in fp16, and the first step would give NaN.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        clip: Callable[[list[nn.Parameter]], Tensor | float],
        scale: LossScale,
        weight_decay: float = 0.0,
        ema: float = 0.9999,
        muon: bool = False,
    ):
        self.parameters = dict(parameters)
        if low := [name for name, p in self.parameters.items() if p.dtype != torch.float32]:
            raise ValueError(
                f"{low[0]} is {self.parameters[low[0]].dtype}: master weights are fp32; "
                "precision is of activations"
            )
        self.clip = clip
        self.scale = scale
        self.decay = ema
        hidden = [p for name, p in self.parameters.items() if muon and _is_hidden_matrix(name, p)]
        others = [
            p for name, p in self.parameters.items() if not (muon and _is_hidden_matrix(name, p))
        ]
        self.methods: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, weight_decay=weight_decay, foreach=True)
        ]
        if hidden:
            self.methods.append(Muon(hidden, weight_decay))
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.steps = self.skipped = 0
        self.stuck = 0  # the last steps in a row that were skipped at the least loss scale
        self.moving = False  # whether a step is under way: an error then leaves it half done

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times 2^s, whose gradients `step` expects."""
        return loss * 2.0**self.scale.log2

    def backward(self, loss: Tensor) -> None:
        """Add the scaled gradients of `loss`; a step may have several."""
        self.scaled(loss).backward()

    def step(self, lr: float) -> float:
        """Apply and clear the gradients; returns their norm before clipping.

        It is NaN or inf where the step was skipped.
        """
        parameters = list(self.parameters.values())
        if without := [name for name, p in self.parameters.items() if p.grad is None]:
            raise ValueError(
                f"{without[0]} and {len(without) - 1} other parameters got no gradient"
            )
        self.moving = True
        torch._foreach_mul_([p.grad for p in parameters], 2.0**-self.scale.log2)
        norm = float(self.clip(parameters))
        finite = math.isfinite(norm)
        for method in self.methods if finite else ():
            for group in method.param_groups:
                group["lr"] = lr
            method.step()
        self.stuck = 0 if finite or not self.scale.least else self.stuck + 1
        self.scale.update(finite)
        self.skipped += not finite
        average = list(self.average.values())
        torch._foreach_mul_(average, self.decay)
        torch._foreach_add_(average, [p.detach() for p in parameters], alpha=1 - self.decay)
        for p in parameters:
            p.grad = None
        self.steps += 1
        self.moving = False
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the parameters hold the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            kept = p.clone()
            p.copy_(self.average[name])
            self.average[name].copy_(kept)

    @property
    def initial_weight(self) -> float:
        """The weight that the untrained model still has in the average."""
        return self.decay**self.steps

    def bytes(self) -> int:
        """Bytes of the averages, and of what is remembered once every parameter has moved."""
        size = sum(t.nbytes for t in self.average.values())
        for method in self.methods:
            moments = len(set(KEPT[type(method)]) - {"step"})
            owned = (p for group in method.param_groups for p in group["params"])
            size += moments * sum(p.nbytes for p in owned)
        return size

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint beside the weights.

        They are average.NAME and optimizer.NAME.{step, exp_avg, ...}.
        """
        states = {p: state for method in self.methods for p, state in method.state.items()}
        moments = {
            f"optimizer.{name}.{key}": value
            for name, p in self.parameters.items()
            for key, value in states.get(p, {}).items()
        }
        return {f"average.{name}": t for name, t in self.average.items()} | moments

    def state(self) -> dict:
        counts = {"steps": self.steps, "skipped": self.skipped, "stuck": self.stuck}
        return counts | {"log2_scale": self.scale.log2}

    def load(self, tensors: Mapping[str, Tensor], state: Mapping) -> None:
        """Continue from `tensors()` and `state()`.

        Raises ValueError that names what is absent, of another type or shape, or of other steps.
        """
        state = {"stuck": 0} | dict(state)  # earlier versions did not count them
        for name in ("steps", "skipped", "stuck"):
            setattr(self, name, _count(state, name))
        self.scale.log2 = entry(state, "log2_scale", float, "the optimizer's state")
        owner = {
            p: method
            for method in self.methods
            for group in method.param_groups
            for p in group["params"]
        }
        moved = self.steps - self.skipped
        for name, p in self.parameters.items():
            self.average[name].copy_(_like(p, tensors, f"average.{name}"))
            if not moved:
                continue  # none before the first step that was not skipped
            moments = {}
            for key in KEPT[type(owner[p])]:
                kept = _like(p, tensors, f"optimizer.{name}.{key}", key == "step")
                # AdamW keeps its count of steps on the host
                moments[key] = kept.to("cpu" if key == "step" else p.device, copy=True)
            count = moments["step"].item() if "step" in moments else moved
            if count != moved:
                raise ValueError(
                    f"the optimizer's state: {name} has moved {count:g} times, the run "
                    f"{shown(moved)}"
                )
            owner[p].state[p] = moments


def _count(state: Mapping, name: str) -> int:
    """Look up a whole number from 0 up; ValueError for another value."""
    value = entry(state, name, int, "the optimizer's state")
    if value < 0:
        raise ValueError(f"the optimizer's state: {name} is {shown(value)}, below 0")
    return value


def _like(p: Tensor, tensors: Mapping[str, Tensor], name: str, number: bool = False) -> Tensor:
    """Look up a tensor of a parameter's shape, or one number; ValueError for another."""
    if name not in tensors:
        raise ValueError(f"the optimizer's state lacks {name}")
    found = tensors[name]
    shape = () if number else tuple(p.shape)
    if found.dtype != p.dtype:
        held, own = (str(t.dtype).removeprefix("torch.") for t in (found, p))
        raise ValueError(f"the optimizer's state: {name} holds {held}, not {own}")
    if found.shape != shape:
        raise ValueError(
            f"the optimizer's state: {name} has shape {shown(tuple(found.shape))}, not {shape}"
        )
    return found


class GradClipper:
    """Clip the global gradient norm at a percentile of the recent norms.

    The limit is the `percentile` of the last `buffer` norms, and never above `max_norm`. Until
    `buffer` norms are recorded, `max_norm` alone is the limit (None: no limit). What is recorded
    are the norms before clipping; those that are not finite leave no trace. Raises ValueError for
    values that cannot be.
    """

    def __init__(self, max_norm: float | None = 1.0, percentile: float = 95.0, buffer: int = 1000):
        if (max_norm is not None and not max_norm > 0) or not 0 <= percentile <= 100 or buffer < 1:
            raise ValueError(
                f"max_norm {max_norm} and buffer {buffer} must exceed 0, percentile "
                f"{percentile} lie in [0, 100]"
            )
        self.max_norm = max_norm
        self.percentile = percentile
        self.buffer = buffer
        self._norms: list[float] = []  # a ring once it is full
        self._next = 0

    @property
    def limit(self) -> float:
        """The norm that the next call clips to."""
        ceiling = math.inf if self.max_norm is None else self.max_norm
        if len(self._norms) < self.buffer:
            return ceiling
        return min(
            ceiling,
            torch.tensor(self._norms, dtype=torch.float64).quantile(self.percentile / 100).item(),
        )

    def __call__(self, parameters: Iterable[nn.Parameter]) -> float:
        """Clip in place; returns the norm before.

        It is read from the device: the one wait of an optimiser step.
        """
        norm = nn.utils.clip_grad_norm_(parameters, self.limit).item()
        if math.isfinite(norm):
            self._norms[self._next : self._next + 1] = [norm]
            self._next = (self._next + 1) % self.buffer
        return norm

    def state_dict(self) -> dict:
        """A copy of the recorded norms, JSON-able, exact to the bit."""
        return {"buffer": self.buffer, "norms": list(self._norms), "next": self._next}

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from `state_dict()`.

        Raises ValueError where that clipper remembered another number of norms, and for what is no
        such state.
        """
        where = "the clipper's state"
        if (buffer := entry(dict(state), "buffer", int, where)) != self.buffer:
            raise ValueError(f"this clipper remembers {self.buffer} norms, the saved one {buffer}")
        norms = entry(dict(state), "norms", list, where)
        following = entry(dict(state), "next", int, where)
        numbers = all(type(norm) is float and 0 <= norm < math.inf for norm in norms)
        # behind the last one, or in the place of the oldest of a full ring
        places = [len(norms)] if len(norms) < self.buffer else range(self.buffer)
        if not numbers or len(norms) > self.buffer or following not in places:
            raise ValueError(
                f"{where}: {shown(norms)} are not up to {self.buffer} norms, and "
                f"{shown(following)} the place of the next"
            )
        self._norms = list(norms)
        self._next = following
