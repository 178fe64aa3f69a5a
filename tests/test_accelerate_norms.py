"""Norms in whole models: as layers, and together with the sum before them."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate_models import accelerated, assert_same_answers, entry, state_of, x
from torch import nn

import fastnn
from fastnn.accelerate import residual
from fastnn.testing import same_bits


class Output(nn.Module):
    """As BERT's: the sum of a layer's result after dropout and what went in, normalized."""

    def __init__(self, norm):
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.1)
        self.norm = norm

    def forward(self, hidden, given):
        hidden = self.dropout(self.dense(hidden))
        return self.norm(hidden + given)


class Added(Output):
    def forward(self, hidden, given):
        return self.norm(torch.add(self.dense(hidden), given))


class TwiceUsed(Output):
    def forward(self, hidden, given):
        total = self.dense(hidden) + given
        return total + self.norm(total)


class Scaled(Output):
    def forward(self, hidden, given):
        return self.norm(torch.add(self.dense(hidden), given, alpha=2))


class Shifted(Output):
    def forward(self, hidden, given):
        return self.norm(self.dense(hidden + given) + 1.0)


class Block(nn.Module):
    """No linear layer of its own."""

    def __init__(self):
        super().__init__()
        self.part, self.norm = nn.Sequential(nn.Linear(8, 8)), nn.RMSNorm(8)
        self.other, self.last = Output(nn.LayerNorm(8)), nn.LayerNorm(8)

    def forward(self, given):
        given = self.norm(given + self.part(given))
        return self.last(given + self.other(given, given))


def fused_sums(monkeypatch, run):
    """How many sums `run` takes in one kernel with their norm."""
    calls = []
    for name in ("add_layer_norm", "add_rms_norm"):
        real = getattr(residual, name)
        monkeypatch.setattr(residual, name, lambda *a, real=real: calls.append(1) or real(*a))
    run()
    monkeypatch.undo()
    return len(calls)


def norms():
    weights = torch.Generator().manual_seed(4)
    for norm in (nn.LayerNorm(8), nn.RMSNorm(8, eps=0.1), nn.LayerNorm(8, elementwise_affine=False)):
        for parameter in norm.parameters():
            nn.init.normal_(parameter, generator=weights)
        yield pytest.param(norm, id=repr(norm))


@pytest.mark.parametrize("kind", [Output, Added])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", list(norms()))
def test_a_sum_and_its_norm(norm, training, kind, monkeypatch):
    model = kind(copy.deepcopy(norm)).train(training)
    given = x(5, 8), x(5, 8, seed=1)
    before = state_of(model)
    ours, report = accelerated(model, example_inputs=given)
    found = entry(report, "norm")
    assert found.became == f"fastnn.{type(norm).__name__} + sum" and found.kernel == "norm_fwd" and found.verified
    assert found.reason == f"fused with the sum before it in {kind.__name__}.forward"
    assert fused_sums(monkeypatch, lambda: ours(*given)) == 1
    assert_same_answers(ours, model, x(2, 3, 8), x(2, 3, 8, seed=1))
    report.restore()
    assert type(ours) is kind and type(ours.norm) is type(norm) and state_of(model) == before


@pytest.mark.parametrize("kind", [TwiceUsed, Scaled, Shifted])
def test_other_sums_are_left_as_they_are(kind, monkeypatch):
    model = kind(nn.LayerNorm(8)).eval()
    given = x(5, 8), x(5, 8, seed=1)
    ours, report = accelerated(model, example_inputs=given)
    assert entry(report, "norm").became == "fastnn.LayerNorm" and report.verified
    assert fused_sums(monkeypatch, lambda: ours(*given)) == 0
    assert_same_answers(ours, model, *given)


@pytest.mark.parametrize("shape", [(1, 8), (8,)])
def test_summands_that_differ_are_added_first(shape, monkeypatch):
    model = Output(nn.LayerNorm(8)).eval()
    ours, _ = accelerated(model)
    assert fused_sums(monkeypatch, lambda: ours(x(), x(*shape))) == 0
    assert_same_answers(ours, model, x(), x(*shape, seed=1))


def test_hooks_on_the_norm_run(monkeypatch):
    ours, _ = accelerated(Output(nn.LayerNorm(8)).eval())
    seen = []
    ours.norm.register_forward_hook(lambda *a: seen.append(1))
    assert fused_sums(monkeypatch, lambda: ours(x(), x())) == 0 and seen == [1]


def test_inner_and_outer_modules(monkeypatch):
    model = Block().eval()
    ours, report = accelerated(model, example_inputs=x())
    assert [entry(report, name).became for name in ("norm", "other.norm", "last")] == [
        "fastnn.RMSNorm + sum",
        "fastnn.LayerNorm + sum",
        "fastnn.LayerNorm + sum",
    ]
    assert fused_sums(monkeypatch, lambda: ours(x())) == 3
    assert_same_answers(ours, model, x(2, 3, 8))
    again = fastnn.accelerate(ours)
    assert not again.accelerated


def test_a_norm_over_two_dimensions_is_swapped_and_not_fused(monkeypatch):
    model = Output(nn.LayerNorm((5, 8))).eval()
    ours, report = accelerated(model, example_inputs=(x(5, 8), x(5, 8)))
    assert entry(report, "norm").became == "fastnn.LayerNorm"
    assert fused_sums(monkeypatch, lambda: ours(x(5, 8), x(5, 8))) == 0
    assert_same_answers(ours, model, x(5, 8), x(5, 8, seed=1))


def test_subclasses_are_left_alone():
    class Mine(nn.LayerNorm):
        pass

    model = Output(Mine(8)).eval()
    report = fastnn.accelerate(model)
    assert type(model.norm) is Mine and "Mine is a subclass" in entry(report, "norm").reason
    model(x(), x())


def test_copies_keep_the_fused_sum(monkeypatch):
    ours, _ = accelerated(Output(nn.LayerNorm(8)).eval())
    other = copy.deepcopy(ours)
    given = x(), x(seed=1)
    assert fused_sums(monkeypatch, lambda: other(*given)) == 1 and same_bits(other(*given), ours(*given))


def test_explain_names_the_kernel():
    parts = {part.name: part for part in fastnn.explain(Block().eval(), example_inputs=x()).parts}
    assert parts["last"].kernel == "norm_fwd + sum" and parts["norm"].kernel == "norm_fwd + sum"
