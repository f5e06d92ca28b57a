"""The words for the first thing in a step that is not finite."""

import pytest
import torch
from torch import nn

from train.run.diagnose import diagnose

SCALE = 2.0**10


class Stack(nn.Module):
    """Two linear layers and a root."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4)
        self.act = Root()

    def forward(self, x):
        return self.act(self.second(self.first(x)))


class Root(nn.Module):
    """A layer whose derivative at 0 is infinite."""

    def forward(self, x):
        return x.abs().sqrt()


def said(
    model: Stack,
    x: torch.Tensor,
    term=lambda y: y.square().mean(),
    weight: float = 1.0,
    parts: int = 1,
) -> str:
    def objective(x):
        l1 = term(model(x))
        return weight * l1, {
            "loss": weight * l1,
            "l1": l1,
            "ssim": torch.zeros(()),
            "psnr": torch.tensor(torch.inf),
        }

    before = {name: p.clone() for name, p in model.named_parameters()}
    text = diagnose(model, objective, lambda loss: loss * SCALE, [(x,)] * parts)
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks
    assert all(
        p.grad is None and torch.equal(p.nan_to_num(), before[name].nan_to_num())
        for name, p in model.named_parameters()
    )
    return text


@pytest.fixture
def model():
    return Stack()


X = torch.ones(5, 3)


def test_a_step_that_is_finite_has_nothing_to_say(model):
    assert said(model, X) == ""


def test_the_layer_whose_weights_are_not_finite(model):
    with torch.no_grad():
        model.second.weight[1, :2] = torch.nan
    assert said(model, X) == (
        "loss terms not finite: l1; the first layer that is not finite is second: "
        "its output has 5 of 20 values not finite, its weight has 2 of 16 values not finite"
    )


def test_the_layer_that_overflows(model):
    with torch.no_grad():
        model.first.weight.fill_(3e38)
    assert said(model, X).endswith(
        "layer that is not finite is first: "
        "its output has 20 of 20 values not finite, its weights and its input are finite"
    )


def test_an_input_that_is_not_finite(model):
    x = X.clone()
    x[0, 0] = torch.inf
    assert said(model, x).endswith(
        "is first: its output has 4 of 20 values not finite, its input is not finite"
    )


def test_a_layer_that_alters_its_input_is_not_told_that_it_came_so(model):
    model.act.forward = lambda x: x.detach().div_(torch.zeros(()))
    assert said(model, X).endswith(
        "is act: its output has 20 of 20 values not finite, its weights and its input are finite"
    )


def test_a_term_after_finite_layers(model):
    assert (
        said(model, X, lambda y: y.mean().neg().log())
        == "loss terms not finite: l1; every layer's output is finite"
    )


def test_a_sum_of_finite_terms(model):
    text = said(model, X, weight=float("inf"))
    assert (
        text
        == "every loss term is finite, their weighted sum is not; every layer's output is finite"
    )


def test_the_first_gradient_of_the_backward_pass(model):
    with torch.no_grad():
        model.second.weight.zero_()
        model.second.bias[:] = torch.tensor([0.0, 1.0, 1.0, 1.0])
    text = said(model, X, lambda y: y.mean())
    assert text == (
        "the loss is finite, the gradient of second.bias is the first that is not: "
        "1 of 4 values not finite"
    )


def test_gradients_whose_sum_or_norm_overflows(model):
    with torch.no_grad():
        for p in (model.first.weight, model.first.bias, model.second.weight):
            p.zero_()
        model.second.bias.fill_(1.0)
    slope = lambda factor: lambda y: (y[:, 0].mean() - 1) * factor  # of the root at 1: a half
    one = said(model, X, slope(3e38 / SCALE))
    largest = "the largest is 1.5e+38, of second.bias"
    assert one == f"every gradient is finite, their norm is not: {largest}"
    three = said(model, X, slope(3e38 / SCALE), parts=3)
    assert three == (
        "the gradients of every micro-batch are finite, their sum for second.bias is not: "
        "1 of 4 values not finite"
    )
