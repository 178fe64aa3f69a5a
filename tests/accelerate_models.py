"""Models and checks shared by the tests of accelerate and explain."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fastnn
from fastnn.accelerate import fuse
from fastnn.testing import assert_within_budget
from fastnn.testing.policy import FORWARD_FACTOR, GRADIENT_FACTOR


class Functional(nn.Module):
    """Functional activations, an option, dropout by mode."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)
        self.rate = 0.5

    def forward(self, x, mask=None, *, features=False):
        x = F.relu(self.first(x))
        x = F.dropout(x, self.rate, self.training)
        if mask is not None:
            x = x * mask
        x = F.gelu(self.second(x), approximate="tanh")
        return x if features else self.last(x)


class Block(nn.Module):
    """What transformers' feed-forward blocks look like."""

    def __init__(self, activation=None, width=8):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.act = nn.GELU() if activation is None else activation

    def forward(self, states):
        states = self.dense(states)
        return self.act(states)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4), nn.Softmax(-1))


def x(*shape, seed=0):
    return torch.randn(*(shape or (5, 8)), generator=torch.Generator().manual_seed(seed))


def entry(report, name):
    (found,) = [e for e in report.entries if e.name == name]
    return found


def state_of(model):
    """Everything by which one could tell that a model was touched."""
    found = []
    for name, module in model.named_modules():
        found.append((name, type(module), list(vars(module)), [id(v) for v in vars(module).values()]))
        tensors = {**module._parameters, **module._buffers}
        found += [(key, id(tensor), tensor._version) for key, tensor in tensors.items() if tensor is not None]
    return found


def assert_same_answers(ours, original, *args, **kwargs):
    """Output and parameter gradients of `ours` are within the error policy, torch's `original` being the rival."""
    truth = copy.deepcopy(original).double()
    results = []
    for model in (ours, original, truth):
        given = pytree.tree_map_only(torch.Tensor, torch.Tensor.double if model is truth else copy.copy, (args, kwargs))
        torch.manual_seed(0)
        output = model(*given[0], **given[1])
        wanted = [p for p in model.parameters() if p.requires_grad]
        gradients = (
            torch.autograd.grad(output.square().sum(), wanted, allow_unused=True) if output.requires_grad else []
        )
        results.append((output, [g for g in gradients if g is not None]))
    (y, gy), (r, gr), (t, gt) = results
    assert_within_budget(y, t, r, r.dtype, FORWARD_FACTOR, where="output")
    assert len(gy) == len(gr)
    for ours_g, rival_g, true_g in zip(gy, gr, gt, strict=True):
        assert_within_budget(ours_g, true_g, rival_g, rival_g.dtype, GRADIENT_FACTOR, where="gradient")


@contextmanager
def fused_calls(monkeypatch):
    """The activations that run fused inside the block, in order."""
    calls = []
    real = fuse.linear_maybe_packed

    def spy(input, weight, bias, activation, packed):
        calls.append(activation)
        return real(input, weight, bias, activation, packed)

    with monkeypatch.context() as patch:
        patch.setattr(fuse, "linear_maybe_packed", spy)
        yield calls


def accelerated(model, *args, **kwargs):
    """(accelerated copy, its report)."""
    ours = copy.deepcopy(model)
    return ours, fastnn.accelerate(ours, *args, **kwargs)
