"""What torch.compile traces for a device that is not the CPU, on any machine: one graph, in which
nothing is copied there.
"""

import copy
from collections.abc import Callable
from types import CellType, FunctionType
from unittest.mock import patch

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

import models
from kernels import backend
from tests.helpers.decoders import LATENT, ONE_GRAPH, small_vae
from tests.helpers.models import batch, cameras
from tests.helpers.random_inputs import DRAWS
from tests.helpers.random_inputs.choices import Draw

ELSEWHERE = torch.device("meta")


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch):
    """Which torch does not know there."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)


def moved(value):
    """The same with its tensors elsewhere, those that a function encloses too."""
    if isinstance(value, FunctionType):
        if value.__closure__ is None:
            return value
        cells = tuple(CellType(moved(cell.cell_contents)) for cell in value.__closure__)
        return FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
        )
    move = lambda t, memo: t.detach().to(ELSEWHERE).requires_grad_(t.requires_grad)
    with patch.object(Tensor, "__deepcopy__", move):
        return copy.deepcopy(value)


def graph_of(function: Callable, *args) -> fx.Graph:
    """What is traced of the function and its gradient, which are not run."""
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        outputs = [
            out.meta["val"] if isinstance(out, fx.Node) else out
            for out in module.graph.output_node().args[0]
        ]
        return make_boxed_func(lambda *_: outputs)

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(*args)
    return graphs[0]


def device_of(value) -> str | None:
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return known.device.type if isinstance(known, Tensor) else None


def copies(graph: fx.Graph) -> list[fx.Node]:
    """From the host: it would wait for each."""
    made = [
        node
        for node in graph.nodes
        if node.op == "call_function" and device_of(node) == ELSEWHERE.type
    ]
    return [node for node in made if "cpu" in map(device_of, node.all_input_nodes)]


@pytest.mark.parametrize("name", [name for name in DRAWS if name != "coordinates"])
def test_ops(name):
    with backend.use("interpreter"):
        case = DRAWS[name](Draw(5, torch.device("cpu")))
    graph = graph_of(moved(case.op), *moved(case.tensors))
    assert any(
        node.target.namespace == "trislat" for node in graph.nodes if node.op == "call_function"
    ) and not copies(graph)


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_decoders(name):
    """From latents to a loss of pictures."""
    decoder = small_vae(name, blocks=2).decoder.to(ELSEWHERE)
    z = moved(batch([5, 0, 3], torch.device("cpu"), channels=LATENT))
    view = cameras(2, ELSEWHERE, 16)
    light = torch.zeros(2, 3, device=ELSEWHERE)

    def loss(feats):
        scenes = decoder(z.replace(feats))
        image = models.render(scenes, view, [0, 2], light)
        return image.color.square().mean() + sum(models.penalties(scenes).values())

    assert not copies(graph_of(loss, z.feats.requires_grad_()))


def test_what_it_looks_for():
    """What waits for a GPU in a graph, and what cannot be in one."""
    x = torch.zeros(3, device=ELSEWHERE, requires_grad=True)
    assert copies(graph_of(lambda x: x * torch.ones(3).to(x.device), x))
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="pin_memory"):
        graph_of(lambda x: x * torch.ones(3).pin_memory().to(x.device, non_blocking=True), x)
