"""An optimiser step against traces of the published loop (golden train_*), and its state."""

import math
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.helpers.golden import golden
from train.muon import Muon
from train.optimizer import LEAST_LOG2, GradClipper, LossScale, Optimizer


def norm_of(parameters):
    return torch.nn.utils.get_total_norm([p.grad for p in parameters])


def optimizer(clip=norm_of, scale=None, **kwargs):
    torch.manual_seed(0)
    parameters = {"a": nn.Parameter(torch.randn(5)), "blocks.0.b": nn.Parameter(torch.randn(2, 3))}
    return Optimizer(parameters.items(), clip, scale or LossScale(0, 0, 0), **kwargs)


def traced(case: str, clip, ema_index: int = 0):
    """Replay the scripted gradients of a case.

    w1 computes in fp16 where the case does, w2 (the output layer) in fp32.
    """
    config, t = golden(case)
    w1, w2 = nn.Parameter(t["init/w1"].clone()), nn.Parameter(t["init/w2"].clone())
    fp16 = config["fp16_mode"] is not None
    scale = (
        LossScale(config["initial_log_scale"], config["fp16_scale_growth"])
        if fp16
        else LossScale(0, 0, 0)
    )
    decay = config["optimizer"]["args"]["weight_decay"]
    run = Optimizer(
        {"w1": w1, "w2": w2}.items(),
        clip,
        scale,
        weight_decay=decay,
        ema=config["ema_rate"][ema_index],
    )
    for step, (g1, g2) in enumerate(zip(t["g1"], t["g2"], strict=True)):
        # once a step: the published fp16 weights sum their micro-batches in fp16
        used = w1.half() if fp16 else w1
        loss = sum((used * a).sum() + (w2 * b).sum() for a, b in zip(g1, g2, strict=True)) / len(g1)
        run.backward(loss)
        assert loss.item() == pytest.approx(
            t["trace/loss"][step].item(), rel=1e-4, abs=1e-6, nan_ok=True
        )
        norm = run.step(float(t["trace/lr"][step]))
        yield step, run, norm, t
        assert math.isfinite(norm) != bool(t["trace/skipped"][step])
        assert run.scale.log2 == t["trace/log_scale_f64"][step]
        master = torch.cat([w1, w2]).detach()
        average = torch.cat(list(run.average.values()))
        assert (master - t["trace/master"][step]).abs().max() <= 1e-6
        assert (average - t[f"trace/ema{ema_index}"][step]).abs().max() <= 1e-6
    assert run.skipped == t["trace/skipped"].sum() and run.steps == len(t["g1"])


def test_agrees_with_published_fp16_loop_without_clipping():
    for _ in traced("train_inflat_all_noclip_growth", norm_of):
        pass


def test_agrees_with_published_fp16_loop_with_adaptive_clipping():
    for ema_index in (0, 1):
        clipper = GradClipper(1.0, 95, buffer=8)
        for step, _, norm, t in traced("train_inflat_all", clipper, ema_index):
            assert clipper.limit == pytest.approx(t["trace/max_norm"][step].item(), rel=1e-6)
            if math.isfinite(norm):
                assert norm == pytest.approx(t["trace/grad_norm"][step].item(), rel=1e-6)


def test_agrees_with_published_fp32_loop_with_fixed_clipping():
    for step, _, norm, t in traced(
        "train_fp32_floatclip", lambda p: torch.nn.utils.clip_grad_norm_(p, 0.05)
    ):
        if math.isfinite(norm):
            assert norm == pytest.approx(t["trace/grad_norm"][step].item(), rel=1e-6)


def test_skipped_step_moves_no_weight_but_the_average():
    run = optimizer(scale=LossScale(), ema=0.5)
    start = {name: p.detach().clone() for name, p in run.parameters.items()}
    run.average["a"].zero_()
    for bad in (math.inf, math.nan):
        run.backward(sum((p * bad).sum() for p in run.parameters.values()))
        assert not math.isfinite(run.step(0.1))
    assert all(torch.equal(p, start[name]) for name, p in run.parameters.items())
    assert torch.allclose(run.average["a"], 0.75 * start["a"]) and (
        run.skipped,
        run.scale.log2,
    ) == (2, 18.0)
    assert all(p.grad is None for p in run.parameters.values())


def test_the_loss_scale_has_an_end_and_only_what_is_skipped_there_counts():
    run = optimizer(scale=LossScale(LEAST_LOG2 + 2))

    def step(factor: float) -> tuple[float, int]:
        run.backward(sum((p * factor).sum() for p in run.parameters.values()))
        run.step(0.1)
        return run.scale.log2 - LEAST_LOG2, run.stuck

    assert [step(math.nan) for _ in range(5)] == [(1, 0), (0, 0), (0, 1), (0, 2), (0, 3)]
    assert step(1.0) == (pytest.approx(1e-3), 0)
    assert step(math.nan) == (0, 0) and step(math.nan) == (0, 1)
    run = optimizer()
    assert [step(factor)[1] for factor in (math.nan, math.inf, 1.0, math.nan)] == [1, 2, 0, 1]
    assert run.scale.log2 == 0 and run.state()["stuck"] == 1
    again = optimizer()
    again.load(run.tensors(), run.state())
    assert again.stuck == 1
    earlier = {name: value for name, value in run.state().items() if name != "stuck"}
    again.load(run.tensors(), earlier)
    assert again.stuck == 0


def test_a_step_that_fails_half_way_is_known_for_it():
    for broken in ("clip", "method", None):
        run = optimizer()
        run.backward(sum(p.sum() for p in run.parameters.values()))
        fail = lambda *_: (_ for _ in ()).throw(RuntimeError("half way"))
        if broken == "clip":
            run.clip = fail
        elif broken == "method":
            run.methods[0].step = fail
        with pytest.raises(RuntimeError, match="half way") if broken else nullcontext():
            run.step(0.1)
        assert run.moving == (broken is not None) and run.steps == (broken is None)


def test_scale_does_not_change_the_step():
    results = []
    for scale in (LossScale(0, 0, 0), LossScale(20.0)):
        run = optimizer(scale=scale)
        run.backward(sum(p.square().sum() for p in run.parameters.values()))
        results.append(
            (run.step(0.1), torch.cat([p.detach().flatten() for p in run.parameters.values()]))
        )
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("muon", [False, True])
def test_state_continues_to_the_bit(muon):
    def go(run, steps):
        for step in steps:
            run.backward(sum((p.square() * (step + 1)).sum() for p in run.parameters.values()))
            run.step(0.1 / (step + 1))
        return torch.cat(
            [t.detach().flatten() for t in (*run.parameters.values(), *run.average.values())]
        )

    straight = go(optimizer(scale=LossScale(20.0, 0.001), ema=0.9, muon=muon), range(6))
    first = optimizer(scale=LossScale(20.0, 0.001), ema=0.9, muon=muon)
    go(first, range(3))
    first.steps, first.skipped = 5, 2
    second = optimizer(scale=LossScale(20.0, 0.001), ema=0.9, muon=muon)
    with torch.no_grad():
        for name, p in second.parameters.items():
            p.copy_(first.parameters[name])
    second.load({name: t.clone() for name, t in first.tensors().items()}, first.state())
    assert torch.equal(go(second, range(3, 6)), straight) and second.scale.log2 == pytest.approx(
        20.006
    )
    assert (second.steps, second.skipped) == (8, 2)


def test_what_an_optimiser_cannot_go_on_from_is_named():
    run = optimizer()
    run.backward(sum(p.sum() for p in run.parameters.values()))
    run.step(0.1)
    tensors, state = run.tensors(), run.state()
    moment = next(name for name in tensors if name.endswith(".exp_avg"))
    for changed, counts, message in (
        ({moment: None}, {}, f"the optimizer's state lacks {moment}"),
        ({moment: tensors[moment].half()}, {}, f"{moment} holds float16, not float32"),
        ({moment: tensors[moment][None]}, {}, f"{moment} has shape "),
        ({}, {"steps": 2}, "has moved 1 times, the run 2"),
        ({}, {"skipped": 2}, "has moved 1 times, the run -1"),
    ):
        kept = {name: t for name, t in (tensors | changed).items() if t is not None}
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer().load(kept, state | counts)
    optimizer().load(tensors, state)


def test_muon_takes_orthogonal_steps_for_matrices_inside_blocks_alone():
    torch.manual_seed(0)
    shapes = {
        "encoder.blocks.0.w": (32, 48),
        "blocks.1.w": (24, 24),
        "blocks.0.bias": (7,),
        "out_layer.weight": (4, 6),
    }
    start = {name: torch.randn(shape) for name, shape in shapes.items()}
    upstream = {name: torch.randn(shape) for name, shape in shapes.items()}
    moved = []
    for muon in (False, True):
        run = Optimizer(
            [(n, nn.Parameter(t.clone())) for n, t in start.items()],
            norm_of,
            LossScale(0, 0, 0),
            muon=muon,
        )
        for _ in range(2):
            run.backward(sum((p * upstream[name]).sum() for name, p in run.parameters.items()))
            run.step(0.01)
        moved.append({name: p.detach() - start[name] for name, p in run.parameters.items()})
    for name in ("blocks.0.bias", "out_layer.weight"):
        assert torch.equal(moved[0][name], moved[1][name])
    for name in ("encoder.blocks.0.w", "blocks.1.w"):
        # a constant gradient U S V' moves the matrix along -U V', by 0.2 sqrt(larger side) each
        # step; Muon's five Newton-Schulz iterations bring every singular value to within about 0.3
        # of 1
        u, _, v = torch.linalg.svd(upstream[name], full_matrices=False)
        along = torch.diag(u.T @ moved[1][name] @ v.T) / -(
            2 * 0.01 * 0.2 * max(shapes[name]) ** 0.5
        )
        assert (along - 1).abs().max() < 0.4 and (
            moved[1][name] - moved[0][name]
        ).abs().max() > 1e-3


def test_muon_is_that_of_torch():
    """Muon takes torch's steps, but for the 8 bits that torch computes them with.

    Matrices of one shape are handled together.
    """
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 24), (24, 8), (16, 16)]
    start = [torch.randn(shape) for shape in shapes]
    upstream = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    ends, states = [], []
    for make in (
        lambda p: torch.optim.Muon(p, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        lambda p: Muon(p, 0.1),
    ):
        parameters = [nn.Parameter(t.clone()) for t in start]
        method = make(parameters)
        method.param_groups[0]["lr"] = 0.5
        for gradients in upstream:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
            method.step()
        ends.append(parameters)
        states.append([method.state[p] for p in parameters])
    for theirs, ours, before in zip(*ends, start, strict=True):
        assert (theirs - ours).norm() < 0.02 * (theirs - before).norm()
    for theirs, ours in zip(*states, strict=True):
        assert theirs.keys() == ours.keys() and torch.equal(
            theirs["momentum_buffer"], ours["momentum_buffer"]
        )


def test_averaged_weights_are_swapped_in_and_out():
    run = optimizer(ema=0.9)
    run.backward(sum(p.sum() for p in run.parameters.values()))
    run.step(0.5)
    live = run.parameters["a"].detach().clone()
    average = run.average["a"].clone()
    assert not torch.equal(live, average)
    with run.averaged():
        assert torch.equal(run.parameters["a"], average)
    assert torch.equal(run.parameters["a"], live) and torch.equal(run.average["a"], average)


def test_bad_parameters_are_named():
    with pytest.raises(ValueError, match="head is torch.float16"):
        Optimizer([("head", nn.Parameter(torch.zeros(2).half()))], norm_of, LossScale())
    run = optimizer()
    run.backward(run.parameters["a"].sum())
    with pytest.raises(ValueError, match="blocks.0.b and 0 other parameters got no gradient"):
        run.step(0.1)
