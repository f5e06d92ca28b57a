"""Find where a training step stops being finite: repeat it, and watch every layer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from models import VAE, SparseTensor
from models.finite import finite, portion


def _tensors(value: object) -> Iterator[Tensor]:
    """Tensors in what a layer takes or gives: containers, sparse tensors, posteriors, scenes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, SparseTensor):
        yield value.feats
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name))


def _first_bad(value: object) -> Tensor | None:
    return next((t for t in _tensors(value) if not finite(t)), None)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Inside the block, the list gets a clause about the first layer whose output is not finite."""
    found: list[str] = []
    # by layer, whether its input was finite: looked at before it runs, as a layer may alter it
    received: dict[str, bool] = {}

    def before(name: str) -> Callable:
        def hook(layer: nn.Module, inputs: tuple) -> None:
            received[name] = _first_bad(inputs) is None

        return hook

    def after(name: str) -> Callable:
        def hook(layer: nn.Module, inputs: tuple, output: object) -> None:
            if found or (bad := _first_bad(output)) is None:
                return
            if own := [own for own, p in layer.named_parameters() if not finite(p)]:
                blame = f"its {own[0]} has {portion(layer.get_parameter(own[0]))}"
            elif received[name]:
                blame = "its weights and its input are finite"
            else:
                blame = "its input is not finite"
            found.append(
                f"the first layer that is not finite is {name}: "
                f"its output has {portion(bad)}, {blame}"
            )

        return hook

    layers = [(name, layer) for name, layer in model.named_modules() if name]
    hooks = [layer.register_forward_pre_hook(before(name)) for name, layer in layers]
    hooks += [layer.register_forward_hook(after(name)) for name, layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def diagnose(
    vae: VAE,
    objective: Callable[..., tuple[Tensor, Mapping[str, Tensor]]],
    scaled: Callable[[Tensor], Tensor],
    inputs: Iterable[tuple],
) -> str:
    """Say what is not finite in a step: loss terms and the first layer, or else a gradient.

    `objective` gives the loss and its terms for each of `inputs`, the micro-batches of the step, by
    way of `vae`; `scaled` multiplies the loss as the training does. Nothing is trained, and nothing
    is exchanged between ranks. The gradient that is named is the first of the backward pass, which
    goes from the output to the input. "" where all is finite.
    """
    parameters = dict(reversed(list(vae.named_parameters())))
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for args in inputs:
        with _watched(vae) as layers:
            loss, terms = objective(*args)
        bad = [
            name
            for name, term in terms.items()
            if name not in ("loss", "psnr") and not finite(term)
        ]
        if layers or bad or not finite(loss):
            what = (
                f"loss terms not finite: {', '.join(bad)}" if bad else "every loss term is finite"
            )
            what += "" if bad or finite(loss) else ", their weighted sum is not"
            return "; ".join([what, *(layers or ["every layer's output is finite"])])
        grads = torch.autograd.grad(scaled(loss), list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is None:
                continue
            if not finite(grad):
                first = f"the gradient of {name} is the first that is not"
                return f"the loss is finite, {first}: {portion(grad)}"
            total[name] += grad
    for name, grad in total.items():
        if not finite(grad):
            whole = f"their sum for {name} is not: {portion(grad)}"
            return f"the gradients of every micro-batch are finite, {whole}"
    sizes = {name: grad.abs().max().item() for name, grad in total.items()}
    if not finite(torch.stack([grad.norm() for grad in total.values()]).norm()):
        name = max(sizes, key=sizes.get)
        largest = f"the largest is {sizes[name]:.1e}, of {name}"
        return f"every gradient is finite, their norm is not: {largest}"
    return ""
