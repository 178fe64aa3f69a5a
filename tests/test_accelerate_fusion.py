"""Which linear + activation pairs are fused, which are not and why, and when a fused forward steps aside."""

from __future__ import annotations

import copy
import gc
import random

import pytest
import torch
import torch.nn.functional as F
from accelerate_models import Block, Functional, accelerated, assert_same_answers, entry, fused_calls, mlp, x
from torch import nn

import fastnn

EAGER = {
    "F.relu": (F.relu, "relu"),
    "F.relu inplace": (lambda h: F.relu(h, inplace=True), "relu"),
    "torch.relu": (torch.relu, "relu"),
    ".relu()": (lambda h: h.relu(), "relu"),
    ".relu_()": (lambda h: h.relu_(), "relu"),
    "F.gelu": (F.gelu, "gelu"),
    "F.gelu tanh": (lambda h: F.gelu(h, approximate="tanh"), "gelu_tanh"),
    "F.silu": (F.silu, "silu"),
    "torch.sigmoid": (torch.sigmoid, "sigmoid"),
    "F.sigmoid": (F.sigmoid, "sigmoid"),
    ".sigmoid()": (lambda h: h.sigmoid(), "sigmoid"),
    "torch.tanh": (torch.tanh, "tanh"),
    ".tanh()": (lambda h: h.tanh(), "tanh"),
}


class WithFunction(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.function = function

    def forward(self, x):
        return self.function(self.dense(x))


@pytest.mark.parametrize("name", EAGER)
def test_functional_activations(name, monkeypatch):
    function, activation = EAGER[name]
    model = WithFunction(function).eval()
    ours, report = accelerated(model, example_inputs=x())
    assert entry(report, "dense").activation == activation and report.verified
    with fused_calls(monkeypatch) as calls:
        assert_same_answers(ours, model, x(3, 2, 8))
    assert set(calls) == {activation}


class TanhGelu(nn.Module):
    def forward(self, input):
        return 0.5 * input * (1 + torch.tanh(0.7978845608028654 * (input + 0.044715 * input**3)))


class Swish(nn.Module):
    def forward(self, input):
        return input * torch.sigmoid(input)


MODULES = {
    "relu": (nn.ReLU(), "relu"),
    "relu inplace": (nn.ReLU(inplace=True), "relu"),
    "gelu": (nn.GELU(), "gelu"),
    "gelu tanh": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "silu": (nn.SiLU(), "silu"),
    "sigmoid": (nn.Sigmoid(), "sigmoid"),
    "tanh": (nn.Tanh(), "tanh"),
    "written out": (TanhGelu(), "gelu_tanh"),
    "swish": (Swish(), "silu"),
}


@pytest.mark.parametrize("name", MODULES)
def test_activation_modules_by_what_they_compute(name, monkeypatch):
    act, activation = MODULES[name]
    model = Block(copy.deepcopy(act)).eval()
    ours, report = accelerated(model, example_inputs=x())
    assert entry(report, "dense").activation == activation and report.verified
    assert entry(report, "act").became == "in dense"
    with fused_calls(monkeypatch) as calls:
        assert_same_answers(ours, model, x(3, 2, 8))
    assert set(calls) == {activation}


class StraightThrough(nn.Module):
    """ReLU's values with another slope."""

    def forward(self, input):
        return input + (F.relu(input) - input).detach()


class OneDimensional(nn.Module):
    """ReLU, but along rows of a matrix something else."""

    def forward(self, input):
        return F.relu(input) if input.dim() == 1 else F.relu(input).cumsum(-1)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, input):
        self.calls += 1
        return F.relu(input)


class Logging(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, input):
        self.log.append(input.mean())
        return F.relu(input)


class Noisy(nn.Module):
    def forward(self, input):
        return F.relu(input) + 0 * torch.rand_like(input)


class ByMode(nn.Module):
    def forward(self, input):
        return F.relu(input) if self.training else torch.tanh(input)


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input):
        return F.relu(input) * self.scale


class Raising(nn.Module):
    def forward(self, input):
        raise type("OddError", (Exception,), {})("cannot")


OTHERS = [nn.LeakyReLU(), nn.ReLU6(), nn.Identity(), nn.Dropout(), nn.LayerNorm(8), StraightThrough(), OneDimensional()]
OTHERS += [Counting(), Logging(), Noisy(), ByMode(), Learned()]


@pytest.mark.parametrize("act", OTHERS, ids=lambda act: type(act).__name__)
def test_what_is_no_activation_of_ours_is_not_fused(act):
    model = Block(copy.deepcopy(act))
    report = fastnn.accelerate(model, example_inputs=x())
    assert report.fused == 0 and entry(report, "dense").became == "fastnn.Linear"
    assert getattr(model.act, "calls", 0) == 0 and type(model) is Block
    assert report.verified


def test_probing_leaves_a_module_as_it_was():
    model = nn.Sequential(Block(Logging()), Block(Counting()), Block(Raising()))
    fastnn.accelerate(model)
    assert model[0].act.log == [] and model[1].act.calls == 0 and model[0].act.training


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        h = self.dense(x)
        return self.act(h) * h


def test_a_result_with_two_users_is_not_fused():
    model = UsedTwice()
    ours, report = accelerated(model, example_inputs=x())
    assert report.fused == 0 and "2 users" in entry(report, "dense").reason
    assert "2 users" in entry(report, "act").reason
    assert_same_answers(ours, model, x())


def test_one_activation_module_for_several_layers(monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.a(x)) + self.act(self.b(x)) + self.act(x + self.c(x))

    model = Model()
    ours, report = accelerated(model, example_inputs=x())
    assert [entry(report, name).activation for name in "abc"] == ["relu", "relu", None]
    with fused_calls(monkeypatch) as calls:
        assert_same_answers(ours, model, x())
    assert calls == ["relu", "relu"]


def test_one_layer_with_and_without_activation(monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(8, 8)

        def forward(self, x):
            return torch.tanh(self.dense(x)) + self.dense(x)

    model = Model()
    ours, report = accelerated(model, example_inputs=x())
    assert entry(report, "dense").activation == "tanh"
    assert_same_answers(ours, model, x())


def test_across_nested_sequentials_and_lists(monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
            self.inner = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8)))

        def forward(self, x):
            for layer in self.layers:
                x = F.relu(layer(x))
            return F.silu(self.inner(x))

    model = Model().eval()
    ours, report = accelerated(model, example_inputs=x())
    assert {e.name: e.activation for e in report.entries if e.was == "Linear"} == {
        "layers.0": "relu",
        "layers.1": "relu",
        "inner.0.0": "tanh",
        "inner.1.0": "silu",
    }
    with fused_calls(monkeypatch) as calls:
        assert_same_answers(ours, model, x())
    assert calls == ["relu", "relu", "tanh", "silu"]
    ours.inner[1].register_forward_hook(lambda m, a, y: y * 0)
    with fused_calls(monkeypatch) as calls:
        assert not ours(x()).any(), "a hook on a container that the trace looked through fires"
    assert calls == ["tanh"]


class DataDependent(Block):
    def forward(self, x):
        h = self.act(self.dense(x))
        return h if h.sum() > 0 else -h


class AsksType(Block):
    def forward(self, x):
        return self.act(self.dense(x[0] if isinstance(x, tuple) else x))


class Remembers(Block):
    def forward(self, x):
        self.last = self.act(self.dense(x))
        return self.last


class NoGrad(Block):
    def forward(self, x):
        with torch.no_grad():
            return self.act(self.dense(x))


class DecoratedNoGrad(Block):
    @torch.no_grad()
    def forward(self, x):
        return self.act(self.dense(x))


class Rolls(Block):
    def forward(self, x):
        return self.act(self.dense(x)) * random.random()


class MakesNoise(Block):
    def forward(self, x):
        return self.act(self.dense(x)) + torch.randn(8)


class Prints(Block):
    def forward(self, x):
        print("called")
        return self.act(self.dense(x))


class Configured(Block):
    def __init__(self):
        super().__init__()
        self.config = {"scale": 2}

    def forward(self, x):
        return self.act(self.dense(x)) * self.config["scale"]


def enclosed():
    factor = [1.0]

    class Enclosed(Block):
        def forward(self, x):
            return self.act(self.dense(x)) * factor[0]

    return Enclosed


TABLE = {"factor": 1.0}


class ReadsGlobal(Block):
    def forward(self, x):
        return self.act(self.dense(x)) * TABLE["factor"]


class AsksGradMode(Block):
    def forward(self, x):
        return self.act(self.dense(x)) * (2 if torch.is_grad_enabled() else 1)


class Catches(Block):
    def forward(self, x):
        try:
            return self.act(self.dense(x))
        except RuntimeError:
            return x


UNTRACEABLE = {
    DataDependent: "torch.fx cannot trace it",
    AsksType: "calls isinstance()",
    Remembers: "writes an attribute",
    NoGrad: "context manager",
    DecoratedNoGrad: "torch.utils._contextlib",
    Rolls: "not the same each time",
    MakesNoise: "would become a constant",
    Prints: "calls print()",
    Configured: "self.config, a dict",
    enclosed(): "reads factor, a list",
    ReadsGlobal: "reads TABLE, a dict",
    AsksGradMode: "calls is_grad_enabled()",
    Catches: "catches exceptions",
}


@pytest.mark.parametrize("kind", UNTRACEABLE, ids=lambda kind: kind.__name__)
def test_a_forward_that_a_trace_cannot_stand_for_is_left_alone(kind, capsys):
    model = kind().eval()
    before = list(vars(model))
    report = fastnn.accelerate(model)
    assert report.fused == 0 and type(model) is kind and list(vars(model)) == before
    assert type(model.dense) is fastnn.nn.Linear
    for name in ("dense", "act"):
        assert UNTRACEABLE[kind] in entry(report, name).reason
    assert model(x()).shape == (5, 8)
    assert capsys.readouterr().out == ("called\n" if kind is Prints else "")


def test_a_call_that_the_trace_does_not_cover_runs_the_original(monkeypatch):
    model = Functional().eval()
    ours, _ = accelerated(model)
    mask = x(5, 16, seed=3)
    with fused_calls(monkeypatch) as calls:
        assert_same_answers(ours, model, x(), mask)
        assert_same_answers(ours, model, x(), mask=mask)
        assert_same_answers(ours, model, x(), features=True)
        assert not calls
        assert_same_answers(ours, model, x=x())
        assert_same_answers(ours, model, x(), None, features=False)
        assert_same_answers(ours, model, x(2, 3, 8))
        assert len(calls) == 6
    for wrong in ((), (x(), None, None), (x(), x(), x())):
        with pytest.raises(TypeError, match="forward"):
            ours(*wrong)


def test_overridden_train_is_not_called():
    class Merges(Block):
        """As LoRA layers do: the weight depends on the mode."""

        def train(self, mode=True):
            if mode != self.training:
                self.dense.weight.data.mul_(2 if mode else 0.5)
            return super().train(mode)

    model = Merges()
    before = model.dense.weight.clone()
    assert fastnn.accelerate(model, example_inputs=x()).fused == 1
    assert torch.equal(model.dense.weight, before)


def test_a_garbage_collection_during_the_trace_is_not_taken_for_the_forward():
    seen, threshold = [], gc.get_threshold()

    def callback(phase, details):
        seen.append(phase)
        callback.attribute = 1

    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        assert fastnn.accelerate(ReadsChildren(), example_inputs=x()).fused == 1
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)
    assert seen and gc.isenabled()


def test_children_named_like_functions(monkeypatch):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.next, self.id = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)

        def forward(self, x):
            return self.id(self.next(self.input(x)))

    assert fastnn.accelerate(Named(), example_inputs=x()).fused == 1


def test_fixed_layouts_are_left_alone():
    class Slotted(Block):
        __slots__ = ("extra",)

    report = fastnn.accelerate(Slotted(), example_inputs=x())
    assert report.fused == 0 and "fixed layout" in entry(report, "act").reason


def test_mode_is_followed(monkeypatch):
    model = Functional().eval()
    ours, _ = accelerated(model)
    for training in (True, False, True):
        assert_same_answers(ours.train(training), model.train(training), x())
    torch.manual_seed(0)
    first = ours(x())
    assert not torch.equal(ours(x()), first), "dropout drops"


class ReadsChildren(nn.Module):
    """Takes numbers and modes from its children."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.scale = 2.0
        self.helper = lambda h: h

    def forward(self, x):
        h = F.dropout(F.relu(self.dense(x)), self.drop.p, self.drop.training)
        return self.scaled(self.helper(h))

    def scaled(self, h):
        return h * self.scale


def set_submodule(name, module):
    return lambda model: setattr(model, name, module)


CHANGES = {
    "an attribute": lambda m: setattr(m, "scale", 3.0),
    "a function": lambda m: setattr(m, "helper", lambda h: h + 1),
    "a method": lambda m: setattr(m, "scaled", lambda h: h * 5),
    "a child's attribute": lambda m: setattr(m.drop, "p", 0.0),
    "a child's mode": lambda m: m.drop.eval(),
    "a child": lambda m: setattr(m, "drop", nn.Dropout(0.0)),
    "another child added": lambda m: setattr(m, "extra", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_trace_took_for_granted_may_change(change, monkeypatch):
    model = ReadsChildren()
    ours, report = accelerated(model, example_inputs=x())
    assert report.fused == 1, report.entries
    with fused_calls(monkeypatch) as calls:
        assert_same_answers(ours, model, x())
    assert calls == ["relu"]
    for changed in (ours, model):
        CHANGES[change](changed)
    with fused_calls(monkeypatch) as calls:
        assert_same_answers(ours, model, x())
    assert not calls


LAYER_CHANGES = {
    "other activation": set_submodule("act", nn.Tanh()),
    "other layer": lambda m: setattr(m, "dense", nn.Sequential(m.dense, nn.Linear(8, 8))),
    "other formula": lambda m: setattr(m.act, "approximate", "tanh"),
    "hook on the layer": lambda m: m.dense.register_forward_hook(lambda m, a, y: y + 1),
    "pre-hook on the activation": lambda m: m.act.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "forward of the layer": lambda m: setattr(m.dense, "forward", lambda input: input * 3),
}


@pytest.mark.parametrize("change", LAYER_CHANGES)
def test_the_pair_may_change(change):
    torch.manual_seed(0)
    model = Block().eval()
    ours, report = accelerated(model)
    assert report.fused == 1
    for changed in (ours, model):
        torch.manual_seed(1)
        LAYER_CHANGES[change](changed)
    assert_same_answers(ours, model, x())


def test_hooks_on_the_parent_fire_and_see_its_arguments():
    model = Block().eval()
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(len(args)))
    model.register_forward_hook(lambda m, args, y: y * 0)
    report = fastnn.accelerate(model)
    assert report.fused == 1
    assert not model(x()).any() and seen == [1]


def test_global_hooks_see_every_layer():
    model = Block().eval()
    fastnn.accelerate(model)
    seen = []
    with torch.no_grad():
        hook = torch.nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m).__name__))
        try:
            model(x())
        finally:
            hook.remove()
    assert seen == ["Linear", "GELU", "Block"]


def test_signature_and_super_survive():
    import inspect

    class Derived(Block):
        def forward(self, states, *, scale=1.0):
            return super().forward(states) * scale

    model = Derived().eval()
    ours, report = accelerated(model, example_inputs=x())
    assert inspect.signature(ours.forward) == inspect.signature(model.forward)
    assert report.fused == 1
    assert_same_answers(ours, model, x(), scale=2.0)
    assert_same_answers(ours, model, x())


def test_the_layer_alone_is_still_the_layer():
    model = Block().eval()
    ours, _ = accelerated(model)
    assert_same_answers(ours.dense, model.dense, x())


def test_float64_input_of_a_fused_float32_model_fails_as_in_torch():
    model = mlp()
    ours, _ = accelerated(model)
    for each in (model, ours):
        with pytest.raises((RuntimeError, TypeError), match=r"dtype|float"):
            each(x().double())
