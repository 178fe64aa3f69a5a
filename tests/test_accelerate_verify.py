"""The check of accelerate: catches what is wrong, undoes that alone, and leaves no trace of having run the model."""

from __future__ import annotations

import collections
import random

import numpy
import pytest
import torch
from accelerate_models import Block, Functional, assert_same_answers, entry, mlp, state_of, x
from torch import nn

import fastnn
from fastnn.accelerate import fuse
from fastnn.nn import linear as nn_linear
from fastnn.ops.linear import linear_maybe_packed


def break_fused(monkeypatch, activation, change):
    """Every fused call with this activation gives `change` of its result."""

    def broken(input, weight, bias, name, packed):
        result = linear_maybe_packed(input, weight, bias, name, packed)
        return change(result) if name == activation else result

    monkeypatch.setattr(fuse, "linear_maybe_packed", broken)


class Chain(nn.Module):
    def __init__(self, activations="gelu relu gelu tanh"):
        super().__init__()
        kinds = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}
        self.blocks = nn.Sequential(*(Block(kinds[name]()) for name in activations.split()))

    def forward(self, x):
        return self.blocks(x)


CHANGES = {
    "one part in a thousand": lambda y: y * 1.001,
    "one element": lambda y: torch.cat([y.flatten()[:-1], y.flatten()[-1:] + 0.01]).view_as(y),
    "a NaN": lambda y: torch.where(y == y.max(), torch.nan, y),
    "another shape": lambda y: y[..., None].squeeze(-1)[:1],
    "another type": lambda y: y.bfloat16().float(),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_broken_kernel_is_caught_and_only_its_pairs_are_undone(change, training, monkeypatch):
    model = Chain().train(training)
    expected = model(x())
    break_fused(monkeypatch, "gelu", CHANGES[change])
    report = fastnn.accelerate(model, example_inputs=x())
    assert report.verified and "2 changes undone" in report.verification
    assert [entry(report, f"blocks.{i}.dense").activation for i in range(4)] == [None, "relu", None, "tanh"]
    for i in (0, 2):
        assert "undone" in entry(report, f"blocks.{i}.act").reason and entry(report, f"blocks.{i}.act").became is None
        assert "undone" in entry(report, f"blocks.{i}.dense").reason
        assert type(model.blocks[i]) is Block and type(model.blocks[i].dense) is fastnn.nn.Linear
    torch.testing.assert_close(model(x()), expected)
    report.restore()
    assert type(model.blocks[1]) is Block and torch.equal(model(x()), expected)


def test_gelus_two_forms_are_told_apart(monkeypatch):
    def swapped(input, weight, bias, name, packed):
        return linear_maybe_packed(input, weight, bias, "gelu_tanh" if name == "gelu" else name, packed)

    monkeypatch.setattr(fuse, "linear_maybe_packed", swapped)
    report = fastnn.accelerate(Chain().eval(), example_inputs=x())
    assert report.fused == 2 and "2 changes undone" in report.verification


def test_one_broken_layer_among_many_is_found(monkeypatch):
    model = Chain().eval()
    culprit = model.blocks[2].dense.weight

    def broken(input, weight, bias, name, packed):
        result = linear_maybe_packed(input, weight, bias, name, packed)
        return result + 0.01 if weight is culprit else result

    monkeypatch.setattr(nn_linear, "linear_maybe_packed", broken)
    monkeypatch.setattr(fuse, "linear_maybe_packed", broken)
    report = fastnn.accelerate(model, example_inputs=x(), freeze=True)
    assert type(model.blocks[2].dense) is nn.Linear and "packed" not in vars(model.blocks[2].dense)
    assert [e.name for e in report.skipped] == ["blocks.2.dense", "blocks.2.act"]
    assert report.fused == 3 and report.verified


def test_a_wrong_gradient_is_caught_in_training(monkeypatch):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 0.5

    break_fused(monkeypatch, "relu", Halved.apply)
    model = Chain()
    report = fastnn.accelerate(model, example_inputs=x())
    assert "1 changes undone" in report.verification and "gradients" in entry(report, "blocks.1.act").reason
    assert report.fused == 3
    report.restore()
    assert fastnn.accelerate(model.eval(), example_inputs=x()).fused == 4, "in evaluation nothing is wrong"


def test_a_patch_that_raises_is_undone(monkeypatch):
    def refuses(input, weight, bias, name, packed):
        raise NotImplementedError("no such thing")

    monkeypatch.setattr(fuse, "linear_maybe_packed", refuses)
    model = Chain("gelu relu")
    report = fastnn.accelerate(model, example_inputs=x())
    assert report.fused == 0 and "no such thing" in entry(report, "blocks.0.act").reason
    assert_same_answers(model, model, x())


class Stateful(nn.Module):
    """Everything that a run of a model may move."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        x.mul_(1 + 0 * random.random() + 0 * numpy.random.rand())
        return self.drop(torch.relu(self.norm(self.dense(x))))


@pytest.mark.parametrize("function", [fastnn.accelerate, fastnn.explain])
def test_running_the_model_leaves_no_trace(function):
    model = Stateful()
    model(x()).sum().backward()
    gradients = [(id(p.grad), p.grad.clone()) for p in model.parameters()]
    model.dense.bias.grad = None
    gradients[1] = None
    before, values = state_of(model), [b.clone() for b in model.buffers()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    data = x()
    report = function(model, example_inputs=data)
    if function is fastnn.accelerate:
        assert report.verified
        report.restore()
    assert state_of(model) == before and model.calls == 1 and model.training
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), values, strict=True))
    for p, known in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) if known is None else (id(p.grad) == known[0] and torch.equal(p.grad, known[1]))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    assert torch.equal(data, x()), "the caller's input is not written to"


def test_batch_norm_statistics_do_not_depend_on_the_check():
    models = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fastnn.accelerate(models[0], example_inputs=x())
    for model in models:
        model(x())
    torch.testing.assert_close(models[0][2].running_mean, models[1][2].running_mean)
    assert models[0][2].num_batches_tracked == 1


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x, scale):
        return {"result": self.block(x) * scale, "extra": [scale, "text", None]}


KINDS = {
    "tensor": (mlp, lambda: x()),
    "tuple": (TwoInputs, lambda: (x(), torch.tensor(2.0))),
    "dict": (TwoInputs, lambda: {"x": x(), "scale": torch.tensor(2.0)}),
    "mapping": (TwoInputs, lambda: collections.UserDict(scale=torch.tensor(2.0), x=x())),
    "number beside": (TwoInputs, lambda: (x(), 2.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_example_inputs(kind):
    make, inputs = KINDS[kind]
    assert fastnn.accelerate(make(), example_inputs=inputs()).verified
    assert fastnn.explain(make(), example_inputs=inputs()).parts


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_any_grad_mode_of_the_caller(mode, training):
    model = mlp().train(training)
    with mode():
        report = fastnn.accelerate(model, example_inputs=x())
        assert torch.is_grad_enabled() is (mode is torch.enable_grad)
    assert report.verified and ("gradients" in report.verification) is training


def test_a_model_that_does_not_repeat_itself_is_not_verified():
    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.state = Block(), [0]

        def forward(self, x):
            self.state[0] += 1
            return self.block(x) * self.state[0]

    report = fastnn.accelerate(Drifting(), example_inputs=x())
    assert not report.verified and "two runs of the model itself disagree" in report.verification
    assert report.fused == 1 and entry(report, "block.dense").verified is None


def test_without_a_float64_run_a_broken_kernel_is_still_caught(monkeypatch):
    class Float32Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.table = Block(), torch.randn(8, 8)

        def forward(self, x):
            return self.block(x) @ self.table.float()

    model = Float32Only().eval()
    assert fastnn.accelerate(model, example_inputs=x()).fused == 1
    break_fused(monkeypatch, "gelu", CHANGES["one part in a thousand"])
    report = fastnn.accelerate(Float32Only(), example_inputs=x())
    assert report.fused == 0 and "undone" in report.verification


def test_a_model_without_tensors_in_its_output_is_not_verified():
    class Silent(Block):
        def forward(self, x):
            return [super().forward(x).shape[0]]

    report = fastnn.accelerate(Silent(), example_inputs=x())
    assert not report.verified and "no tensors" in report.verification


def test_whole_number_outputs_must_be_equal():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x).argmax(-1)

    report = fastnn.accelerate(Chooses(), example_inputs=x())
    assert report.verified and report.max_difference == 0


def test_what_the_model_raises_comes_through_and_nothing_is_patched():
    model = mlp()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fastnn.accelerate(model, example_inputs=torch.randn(2, 3))
    assert state_of(model) == before


def test_an_interrupt_during_the_check_undoes_everything(monkeypatch):
    model = Functional()
    before = state_of(model)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fuse, "linear_maybe_packed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastnn.accelerate(model, example_inputs=x())
    assert state_of(model) == before


def test_frozen_and_parameterless_models():
    model = mlp().requires_grad_(False)
    assert fastnn.accelerate(model, example_inputs=x()).verified
    report = fastnn.accelerate(nn.Softmax(-1), example_inputs=x())
    assert report.verified and entry(report, "").became == "fastnn.Softmax"
    report = fastnn.accelerate(nn.Flatten(), example_inputs=x())
    assert not report.entries and "nothing to check" in str(report)
