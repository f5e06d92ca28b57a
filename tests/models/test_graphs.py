"""Trunks run by CUDA graphs give what they give without; on a CPU a stand-in repeats what was
recorded on the same memory.
"""

import io
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models
from kernels import backend
from kernels.voxels.cache import SpatialCache
from models import graphs
from models.graphs import LEAST, bucket, made_up
from tests.helpers.compare import assert_close
from tests.helpers.device_waits import watch_waits
from tests.helpers.hardware import GPU
from tests.helpers.models import batch, randomize, small_decoder, small_encoder
from tests.helpers.runs import fresh


class Tape(TorchDispatchMode):
    """Functions and the tensors they were called with and made, in order."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """As a graph does it: the same functions of the same memory, results where they were."""
        leaves = torch.utils._pytree.tree_leaves
        for function, args, kwargs, out in self.calls:
            for before, now in zip(leaves(out), leaves(function(*args, **kwargs)), strict=True):
                if isinstance(now, torch.Tensor) and now.data_ptr() != before.data_ptr():
                    before.copy_(now)


class Fields(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.trunk(x.feats, x.cache)


class CPURecorder:
    """What `Recorder` is on a GPU. Nothing is computed while it records, so results hold NaN until
    the first replay.
    """

    def __init__(self, device: torch.device):
        self.warm_ups = self.records = 0

    def warm_up(self, run) -> None:
        self.warm_ups += 1
        run()

    def record(self, run):
        self.records += 1
        with Tape() as tape:
            result = run()
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                tensor.detach().fill_(float("nan"))
        return tape.replay, result


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small sizes, and on a machine without a GPU a recorder of its own."""
    monkeypatch.setattr(graphs, "LEAST", 64)
    if not GPU:
        monkeypatch.setattr(graphs, "Recorder", CPURecorder)


@pytest.fixture
def device():
    """The kernels on a GPU; on a CPU the torch path, for the interpreter has a test of its own."""
    return torch.device("cuda" if GPU else "cpu")


def gradients(model, x, up) -> list[torch.Tensor]:
    """The output, and gradients of the features and of every parameter that has one."""
    for p in model.parameters():
        p.grad = None
    feats = x.feats.detach().requires_grad_(True)
    out = model.trunk(feats, x.cache)
    out.backward(up)
    return [out.detach(), feats.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def both(device, **trunk):
    """A model with graphs, and the same without."""
    eager = randomize(small_encoder(**trunk)).to(device)
    graphed = deepcopy(eager)
    graphed.use_graphs(256)
    return graphed, eager


def check(graphed, eager, x, seed=5, tolerance=2e-5) -> None:
    """The same output and gradients but for rounding, and memory of the caller's own."""
    up = torch.randn(len(x), 32, generator=torch.Generator().manual_seed(seed)).to(x.feats.device)
    ours, theirs = gradients(graphed, x, up), gradients(eager, x, up)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, tolerance)
    if graphed.graphs.recordings:
        kept = graphed.graphs.gradients.untyped_storage().data_ptr()
        assert kept not in {t.untyped_storage().data_ptr() for t in ours}


@pytest.mark.parametrize(
    "trunk", [{}, {"pe_mode": "rope", "qk_rms_norm": True}, {"use_checkpoint": True}], ids=str
)
def test_graphs_change_nothing(device, trunk):
    """Batches of one size that differ in all else, weights that move, other sizes, and a run
    without gradients between.
    """
    graphed, eager = both(device, **trunk)
    sizes = [[60, 40], [30, 71], [1, 99], [9, 0], [110]]
    for seed, counts in enumerate(sizes):
        check(graphed, eager, batch(counts, device, seed=seed))
        with torch.no_grad():
            for a, b in zip(graphed.parameters(), eager.parameters(), strict=True):
                for p in (a, b):  # in place, as an optimiser does
                    p.mul_(0.9)
            x = batch(counts[::-1], device, seed=seed + 10)
            assert_close(graphed.trunk(x.feats, x.cache), eager.trunk(x.feats, x.cache), 2e-5)
    # (rows, samples), each with and without a backward pass
    assert len(graphed.graphs.recordings) == 2 * 3


def test_graphs_of_a_model_that_changes_its_type(device):
    graphed, eager = both(device)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for model in (graphed, eager):
            model.set_activation_dtype(dtype)
        check(
            graphed,
            eager,
            batch([60, 40], device),
            tolerance=2e-5 if dtype == torch.float32 else 2e-2,
        )
    assert len(graphed.graphs.recordings) == 3


def test_graphs_of_kernels(kernel_device):
    graphed, eager = both(kernel_device)
    for seed, counts in enumerate([[40, 17], [1, 60]]):
        check(graphed, eager, batch(counts, kernel_device, seed=seed))
    assert len(graphed.graphs.recordings) == 1


def test_a_step_of_a_vae(device):
    """Encoder and decoder have graphs of their own; gradients of two micro-batches add up."""
    vaes = [
        models.GaussianVAE(randomize(small_encoder()), randomize(small_decoder())).to(device)
        for _ in range(2)
    ]
    vaes[0].use_graphs(256)
    for vae in vaes:
        for seed in range(2):
            x = batch([50, 20 + seed], device, seed=seed)
            noise = torch.randn(len(x), 4, generator=torch.Generator().manual_seed(seed)).to(device)
            posterior, scenes = vae(x, noise)
            (
                sum(s.opacity.sum() + s.center.square().sum() for s in scenes)
                + posterior.logvar.sum()
            ).backward()
    for a, b in zip(*(vae.parameters() for vae in vaes), strict=True):
        assert_close(a.grad, b.grad, 5e-5)
    assert all(len(part.graphs.recordings) == 1 for part in (vaes[0].encoder, vaes[0].decoder))


def test_what_a_batch_leaves_behind_does_not_reach_the_next(device):
    graphed, eager = both(device)
    x = batch([60, 40], device)
    x.feats.fill_(float("nan"))
    for feats in (x.feats, x.feats.clone().requires_grad_()):
        graphed.trunk(feats, x.cache).sum().backward()
    check(graphed, eager, batch([30, 68], device, seed=1))
    assert len(graphed.graphs.recordings) == 2  # with and without a gradient of the features


def test_above_the_limit_and_without_voxels_there_is_no_graph(device):
    graphed, eager = both(device)
    for counts in ([200, 57], [0, 0]):
        check(graphed, eager, batch(counts, device))
    assert not graphed.graphs.recordings


def test_weights_that_are_replaced_are_recorded_again(device):
    graphed, eager = both(device)
    x = batch([60, 40], device)
    check(graphed, eager, x)
    weights = {name: 2 * p.detach() for name, p in eager.named_parameters()}
    for model in (graphed, eager):
        model.load_state_dict(weights, assign=True)
    check(graphed, eager, x)
    for _ in range(2):  # other tensors in their place, for one call
        given = {name: (p.detach() / 3).requires_grad_() for name, p in eager.named_parameters()}
        swap = {f"model.{name}": p for name, p in given.items()}
        outs = [torch.func.functional_call(Fields(model), swap, x) for model in (graphed, eager)]
        assert_close(*outs, 2e-5)
        inside = [p for name, p in given.items() if name.startswith(("blocks", "input_layer"))]
        for a, b in zip(
            *(torch.autograd.grad(out.square().sum(), inside) for out in outs), strict=True
        ):
            assert_close(a, b, 2e-5)
    check(graphed, eager, x)
    for model in (graphed, eager):
        for p in model.parameters():
            p.data = p.data * 1.5
        model.blocks[0].attn.to_qkv.weight.requires_grad_(False)
    check(graphed, eager, x)
    for model in (graphed, eager):
        model.blocks[0].attn.to_qkv.weight.requires_grad_(True)
    check(graphed, eager, x)


def test_weights_that_change_between_the_passes_are_noticed(device):
    graphed, _ = both(device)
    x = batch([60, 40], device)
    out = graphed.trunk(x.feats, x.cache)
    with torch.no_grad():
        graphed.blocks[0].attn.to_out.bias.add_(1)
    with pytest.raises(ValueError, match="weights were changed after the forward pass"):
        out.sum().backward()


def test_hooks_of_weights_run_once_a_pass_and_are_not_recorded(device):
    """Nothing that is known outside is differentiated in a recording: on a GPU that would tie other
    streams to it.
    """
    graphed, eager = both(device)
    calls = []
    for model in (graphed, eager):
        hook = lambda grad: calls.append(grad.clone()) or 2 * grad
        model.blocks[0].attn.to_qkv.weight.register_hook(hook)
    x = batch([60, 40], device)
    nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in graphed.parameters()]
    for node in nodes:  # kept by whoever differentiated them before, as a DDP reducer does
        node.register_prehook(lambda grads: calls.append(None))
    graphed.trunk(x.feats, x.cache)
    assert not calls
    for passes in (1, 2):
        check(graphed, eager, x)
        assert len([call for call in calls if call is not None]) == 2 * passes


def test_recordings_serve_every_mode_and_are_not_pickled(device):
    graphed, eager = both(device)
    x = batch([60, 40], device)
    file = io.BytesIO()
    with torch.inference_mode():
        first = graphed.trunk(x.feats, x.cache)
    with torch.no_grad():
        assert torch.equal(graphed.trunk(x.feats, x.cache), first)
    check(graphed, eager, x)
    torch.save(graphed, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert (
        graphed.graphs.recordings and not loaded.graphs.recordings and loaded.graphs.trunk is loaded
    )
    check(loaded, eager, x)


def test_only_the_last_run_is_differentiated_and_once(device):
    graphed, _ = both(device)
    x = batch([60, 40], device)
    other = batch([61, 41], device, seed=1)
    first = graphed.trunk(x.feats, x.cache)
    kept = first.detach().clone()
    graphed.trunk(other.feats, other.cache)
    assert torch.equal(first, kept)
    with torch.no_grad():
        graphed.trunk(other.feats, other.cache)  # recorded and run
    with pytest.raises(ValueError, match="graphs have run 3 times since this output was made"):
        first.sum().backward()
    out = graphed.trunk(x.feats, x.cache)
    out.sum().backward(retain_graph=True)
    with pytest.raises(ValueError, match="graphs have run 1 time since"):
        out.sum().backward()


def test_a_copied_model_has_graphs_of_its_own(device):
    graphed, eager = both(device)
    x = batch([60, 40], device)
    check(graphed, eager, x)
    copied = deepcopy(graphed)
    randomize(graphed).graphs.most = 0
    assert not copied.graphs.recordings
    check(copied, eager, x)
    assert copied.graphs.recordings and copied.graphs.trunk is copied


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_recorded_depends_on_sizes_alone(watched_device, backward):
    """Two batches of nothing alike but their rows: the same launches with the same numbers, and no
    wait for the device.
    """
    model = randomize(small_encoder()).to(watched_device)
    runs = []

    def note(kernel, grid, args, constants) -> None:
        sizes = [(a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
        runs[-1].append((kernel.fn.__name__, grid, sizes, constants))

    for counts, seed in (([60, 40], 0), ([3, 97], 7)):
        x = batch(counts, watched_device, seed=seed)
        coords = torch.cat([x.coords, made_up(128 - len(x), 16, 2, watched_device)])
        feats = torch.nn.functional.pad(x.feats, (0, 0, 0, 128 - len(x))).requires_grad_()
        runs.append([])
        with watch_waits() as reads, backend.observe(note):
            out = model.compute(feats, SpatialCache.unread(coords, 3, (16, 16, 16)))
            if backward:
                torch.autograd.grad(out.sum(), [feats, model.input_layer.weight])
        assert not reads
    assert runs[0] == runs[1] and len(runs[0]) > 10


def test_a_training_run(device, tmp_path, capsys):
    """Four steps of two micro-batches: the same losses with graphs and without."""
    flags = ["--device", device.type, "--steps", "4", "--sample-every", "2", "--micro-batch", "1"]
    straight = fresh(tmp_path / "straight", *flags)
    graphed = fresh(tmp_path / "graphed", *flags, "--cuda-graphs", "5000")
    assert "fp32 weights, CUDA graphs up to 5,000 voxels" in capsys.readouterr().out
    for one, other in zip(straight, graphed, strict=True):
        for name in ("loss", "kl", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_buckets(monkeypatch):
    monkeypatch.setattr(graphs, "LEAST", LEAST)
    found = [bucket(N) for N in range(1, 70_000)]
    assert all(N <= R for N, R in enumerate(found, 1)) and found == sorted(found)
    assert all(8 * (R - N) <= N + 7 for N, R in enumerate(found, 1) if N > LEAST)
    assert len(set(found)) == 1 + 8 * 6 + 1 and bucket(bucket(5000)) == bucket(5000)


def test_made_up_voxels_are_distinct_and_in_order(device):
    coords = made_up(200, 4, 3, device)
    cache = SpatialCache(coords)  # raises where they are not
    assert cache.counts == [0, 0, 0, 64, 64, 64, 8] and cache.extent == (4, 4, 4)


def test_wrong_uses_are_refused(device):
    graphed, eager = both(device)
    x = batch([60, 40], device)
    with (
        pytest.raises(ValueError, match="graphs do not follow torch.autocast"),
        torch.autocast(device.type, torch.bfloat16),
    ):
        graphed.trunk(x.feats, x.cache)
    with pytest.raises(
        ValueError, match="graphs need attn_mode swin and a resolution, not 'full' and 16"
    ):
        small_encoder(attn_mode="full").use_graphs(100)
    with pytest.raises(ValueError, match="at least 0, not -1"):
        eager.use_graphs(-1)
    graphed.use_graphs(0)
    assert graphed.graphs is None


def test_graphs_need_a_gpu(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="CUDA graphs are recorded on a GPU; the model is on cpu"):
        small_encoder().use_graphs(100)


def test_frozen_weights_and_features_that_are_not_differentiated(device):
    graphed, eager = both(device)
    x = batch([60, 40], device)
    for model in (graphed, eager):
        model.requires_grad_(False)
    check(graphed, eager, x)
    out = graphed.trunk(x.feats, x.cache)
    assert not out.requires_grad and torch.equal(out, graphed.trunk(x.feats, x.cache))
    graphed.requires_grad_(True)
    eager.requires_grad_(True)
    for model in (graphed, eager):
        model.trunk(x.feats, x.cache).square().sum().backward()
    for a, b in zip(graphed.blocks.parameters(), eager.blocks.parameters(), strict=True):
        assert_close(a.grad, b.grad, 2e-5)
