"""The ops inside what torch offers: its own checks of registrations, compilation, functional calls,
autocast, checkpointing.
"""

from functools import cache

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import models
from kernels import backend
from kernels.mesh.render import render_mesh
from tests.helpers.compare import assert_close
from tests.helpers.decoders import ONE_GRAPH, small_vae
from tests.helpers.hardware import GPU
from tests.helpers.meshes import cameras, pictures, scenes
from tests.helpers.models import batch, randomize, small_encoder
from tests.helpers.models import cameras as orbit
from tests.helpers.random_inputs import DRAWS
from tests.helpers.random_inputs.choices import Draw

pytestmark = pytest.mark.usefixtures("few_programs")
OPS = sorted(name for name in OPDEFS if name.startswith("trislat::"))
SEEDS = range(4, 10)
DEVICE = torch.device("cuda" if GPU else "cpu")
BACKEND = "inductor" if GPU else "aot_eager"


class Calls(TorchDispatchMode):
    """The arguments that each of our ops is called with: of the call with the most numbers."""

    def __init__(self):
        super().__init__()
        self.made: dict[str, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "trislat":
            size = lambda given: sum(
                t.numel()
                for t in torch.utils._pytree.tree_leaves(given)
                if isinstance(t, torch.Tensor)
            )
            if size(args) >= size(self.made.get(function.name(), ())):
                copy = lambda t: t.detach().clone().requires_grad_(t.requires_grad)
                self.made[function.name()] = torch.utils._pytree.tree_map_only(
                    torch.Tensor, copy, args
                )
        return function(*args, **(kwargs or {}))


def tensors_of(result) -> list[torch.Tensor]:
    return [
        t
        for t in ([result] if isinstance(result, torch.Tensor) else result)
        if isinstance(t, torch.Tensor)
    ]


def differentiate(op, tensors) -> list[torch.Tensor]:
    """Outputs, then the gradients of a fixed loss."""
    out = [t for t in tensors_of(op(*tensors)) if t.requires_grad]
    up = [torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape).to(t.dtype) for t in out]
    return [*out, *torch.autograd.grad(out, tensors, up)]


@cache
def calls() -> dict[str, tuple]:
    with Calls() as found:
        for draw in DRAWS.values():
            for seed in SEEDS:
                case = draw(Draw(seed, DEVICE))
                differentiate(case.op, case.tensors) if case.tensors else case.op()
        vertices, faces, colors, *starts = scenes(DEVICE)
        view = cameras(2, 9, 7).to(DEVICE)
        differentiate(
            lambda v, c: pictures(render_mesh(v, faces, c, *starts, view, [2, 0])),
            [vertices, colors],
        )
    return found.made


def test_every_op_is_called():
    assert sorted(calls()) == OPS


@pytest.mark.parametrize("name", OPS)
def test_registration(name):
    args = calls()[name]
    if name.endswith("_backward"):  # ops are differentiable once
        args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
    torch.library.opcheck(getattr(torch.ops.trislat, name.removeprefix("trislat::")).default, args)


class Holder(torch.nn.Module):
    """An op of parameters."""

    def __init__(self, op, tensors):
        super().__init__()
        self.op = op
        self.values = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros_like(t)) for t in tensors
        )

    def forward(self):
        return self.op(*self.values)


def held(op, tensors):
    module = Holder(op, tensors)
    return torch.func.functional_call(module, {f"values.{i}": t for i, t in enumerate(tensors)}, ())


def cast(dtype):
    def run(op, tensors):
        with torch.autocast(DEVICE.type, dtype):
            return op(*tensors)

    return run


WAYS = {
    "functional call": held,
    "autocast to bf16": cast(torch.bfloat16),
    "autocast to fp16": cast(torch.float16),
    "checkpoint": lambda op, tensors: checkpoint(op, *tensors, use_reentrant=False),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", [name for name in DRAWS if name != "coordinates"])
def test_changes_nothing(device, name, way):
    """An op computes in the type of its inputs, wherever it is called: the same bits."""
    fast = backend.name(torch.empty(0, device=device)) != "interpreter"
    for seed in SEEDS if fast else SEEDS[:1]:
        print(f"{name}, seed {seed}")
        case = DRAWS[name](Draw(seed, device))
        plain, other = (
            differentiate(op, case.tensors) for op in (case.op, lambda *t, op=case.op: way(op, t))
        )
        for i, (a, b) in enumerate(zip(plain, other, strict=True)):
            assert a.dtype == b.dtype and torch.equal(a, b), i


def vae(name):
    return small_vae(name, blocks=2).to(DEVICE)


DECODERS = pytest.mark.parametrize("decoder", ONE_GRAPH)


def loss(model, x, feats):
    """Of a batch of views, and every penalty."""
    posterior, scenes = model(
        x.replace(feats), torch.linspace(-1, 1, 4, device=DEVICE).expand(len(x), 4)
    )
    image = models.render(scenes, orbit(2, DEVICE, 16), [0, 2], torch.zeros(2, 3, device=DEVICE))
    return (
        image.color.square().mean()
        + sum(models.penalties(scenes).values())
        + posterior.logvar.mean()
    )


@DECODERS
def test_whole_models_compile_to_one_graph(decoder):
    model = vae(decoder).eval()
    x = batch([5, 0, 3], DEVICE)
    feats = x.feats.requires_grad_()
    torch.manual_seed(0)  # of the radiance field's offsets
    eager = loss(model, x, feats)
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = torch.compile(loss, fullgraph=True, backend=BACKEND)(model, x, feats)
    assert_close(compiled, eager, 1e-6)
    wanted = [feats, *model.parameters()]
    for a, b in zip(
        torch.autograd.grad(compiled, wanted), torch.autograd.grad(eager, wanted), strict=True
    ):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize(
    "mode, position", [("full", "rope"), ("swin", "ape"), ("shift_order", "rope")]
)
def test_the_trunk_compiles_to_one_graph(mode, position):
    model = randomize(
        models.Encoder(
            16,
            5,
            32,
            4,
            2,
            num_heads=2,
            window_size=4,
            attn_mode=mode,
            pe_mode=position,
            qk_rms_norm=True,
        )
    ).to(DEVICE)
    x = batch([20, 0, 7], DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)(x).mean
    assert_close(compiled, model(x).mean, 1e-6)


def test_a_trunk_that_recomputes_compiles_to_one_graph():
    model = randomize(small_encoder(use_checkpoint=True)).to(DEVICE).train()
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True, backend=BACKEND)):
        x = batch([20, 0, 7], DEVICE)  # whose windows are made on the way
        out = call(x).mean
        gradients.append(
            [out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))]
        )
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, 1e-5)


@DECODERS
def test_whole_models_by_functional_call(decoder):
    model = vae(decoder).eval()
    x = batch([5, 0, 3], DEVICE)
    weights = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            torch.manual_seed(0)
            return loss(self.model, x, x.feats)

    value = torch.func.functional_call(
        Loss(), {f"model.{name}": p for name, p in weights.items()}, ()
    )
    grads = torch.autograd.grad(value, list(weights.values()))
    with torch.no_grad():
        for p in model.parameters():
            p *= 2
    wanted = Loss()()
    assert torch.equal(value, wanted)
    assert all(map(torch.equal, grads, torch.autograd.grad(wanted, list(model.parameters()))))


@DECODERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_whole_models_under_autocast(decoder, dtype):
    model = vae(decoder).eval()
    x = batch([30, 0, 9], DEVICE)
    torch.manual_seed(0)
    exact = loss(model, x, x.feats)
    torch.manual_seed(0)
    with torch.autocast(DEVICE.type, dtype):
        rounded = loss(model, x, x.feats)
        scenes = model.decoder(model.encoder(x).mode())  # latents in another type than the weights
        assert all(
            t.isfinite().all() for t in vars(scenes[0]).values() if isinstance(t, torch.Tensor)
        )
    assert_close(rounded, exact, 0.1)
    assert all(g.isfinite().all() for g in torch.autograd.grad(rounded, list(model.parameters())))
