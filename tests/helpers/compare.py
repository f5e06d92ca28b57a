"""Comparison of tensors, and of an op with its reference."""

import torch

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    tolerance: float,
    what: str = "tensor",
    least: float = 1e-3,
) -> None:
    """max |difference| <= tolerance * max |expected| (at least `least` of it), NaN never equal."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    )
    if expected.numel() == 0:
        return
    difference = (
        (actual.detach().double().cpu() - expected.detach().double().cpu()).abs().max().item()
    )
    limit = tolerance * max(expected.detach().double().abs().max().item(), least)
    assert difference <= limit, f"{what}: differs by {difference:.3e}, allowed {limit:.3e}"


def outputs(result) -> list[torch.Tensor]:
    return (
        [result]
        if isinstance(result, torch.Tensor)
        else [t for t in result if isinstance(t, torch.Tensor)]
    )


def handing_on(op):
    """`op`, and nothing of every tensor: all have a gradient where the op needs none of one, such
    as keys without a query.
    """
    return lambda *tensors: [*outputs(op(*tensors)), *(0 * t for t in tensors)]


def assert_same(
    op, reference, *args, tolerance: float | None = None, least: float = 1e-3, **kwargs
) -> None:
    """`op` and `reference` agree in every output and in the gradient of every floating-point
    argument that requires one.

    The reference runs in float64 on the CPU. The upstream gradient is random, so no term can
    cancel.
    """

    def prepare(value, exact: bool):
        if not isinstance(value, torch.Tensor):
            return value
        copy = value.detach().clone()
        if exact:
            copy = copy.cpu().double() if copy.is_floating_point() else copy.cpu()
        return copy.requires_grad_(value.requires_grad)

    ours = [prepare(a, False) for a in args]
    exact = [prepare(a, True) for a in args]
    got = outputs(op(*ours, **kwargs))
    want = outputs(reference(*exact, **{k: prepare(v, True) for k, v in kwargs.items()}))
    assert len(got) == len(want), f"{len(got)} outputs instead of {len(want)}"
    dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, limit, f"output {i}", least)
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if b.requires_grad]
    if not pairs:
        return
    # the same numbers for both: rounded as ours takes them
    upstream = [torch.randn(b.shape, dtype=torch.float64).to(a.dtype).double() for a, b in pairs]
    wrt = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]
    grads = torch.autograd.grad(
        [a for a, _ in pairs],
        [ours[i] for i in wrt],
        [g.to(a) for g, (a, _) in zip(upstream, pairs, strict=True)],
    )
    exact_grads = torch.autograd.grad([b for _, b in pairs], [exact[i] for i in wrt], upstream)
    for i, a, b in zip(wrt, grads, exact_grads, strict=True):
        assert_close(a, b, limit, f"gradient of argument {i}", least)
