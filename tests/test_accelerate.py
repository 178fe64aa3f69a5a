"""fastnn.accelerate: what changes, what stays, what is left alone and why, and the way back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from accelerate_models import Block, Functional, accelerated, assert_same_answers, entry, fused_calls, mlp, state_of, x
from torch import nn

import fastnn


def test_layers_change_class_and_nothing_else():
    model = mlp()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    model[0].weight.requires_grad_(False)
    before["0.weight"] = (before["0.weight"][0], False)
    report = fastnn.accelerate(model)
    assert type(model[0]) is fastnn.nn.Linear and isinstance(model[0], nn.Linear)
    assert type(model[5]) is fastnn.nn.Softmax and isinstance(model[5], nn.Softmax)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert isinstance(model, nn.Sequential) and type(model).__name__ == "Sequential"
    assert [e.name for e in report.entries] == ["0", "1", "2", "3", "4", "5"]
    assert len(report.accelerated) == 6 and report.fused == 2 and not report.skipped


def test_answers_are_within_the_policy_and_kernels_ran(extension):
    model = mlp().eval()
    ours, _ = accelerated(model)
    assert_same_answers(ours, model, x())
    with torch.no_grad(), fastnn.record() as runs:
        ours(x(2, 3, 8))
    assert [run.kernel for run in runs] == ["linear_fwd"] * 3 + ["softmax_fwd"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [mlp, Functional, Block])
def test_training_and_evaluation_agree_with_torch(make, training):
    model = make().train(training)
    ours, report = accelerated(model, example_inputs=x())
    assert report.verified and report.fused
    assert_same_answers(ours, model, x(7, 8, seed=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = mlp().to(dtype).eval()
    ours, report = accelerated(model, example_inputs=x().to(dtype))
    assert report.verified and len(report.accelerated) == 6
    assert ours(x().to(dtype)).dtype == dtype


def test_restore_gives_everything_back_and_twice_does_no_harm():
    model = nn.ModuleDict({"a": mlp(), "b": Functional(), "c": Block()})
    before = state_of(model)
    report = fastnn.accelerate(model, freeze=True)
    assert state_of(model) != before and not report.restored
    report.restore()
    assert state_of(model) == before and report.restored
    report.restore()
    assert state_of(model) == before
    assert "restored" in str(report)


def test_context_manager_restores_also_after_an_error():
    model = mlp()
    before = state_of(model)
    with pytest.raises(KeyError), fastnn.accelerate(model, example_inputs=x()) as report:
        assert report.accelerated
        raise KeyError
    assert state_of(model) == before


def test_restore_leaves_a_layer_alone_whose_class_was_changed_since():
    model = mlp()
    report = fastnn.accelerate(model)
    nn.utils.parametrizations.weight_norm(model[2])
    kind = type(model[2])
    report.restore()
    assert type(model[2]) is kind and type(model[0]) is nn.Linear
    assert model(x()).shape == (5, 4)


def test_second_call_finds_nothing_new():
    model = mlp()
    first = fastnn.accelerate(model)
    before = state_of(model)
    second = fastnn.accelerate(model, example_inputs=x())
    assert not second.accelerated and "nothing new" in str(second)
    assert {e.reason for e in second.entries} == {"is fastnn's already", "is fused already"}
    second.restore()
    assert state_of(model) == before
    first.restore()
    assert type(model[0]) is nn.Linear


def test_a_model_that_is_one_layer():
    layer = nn.Linear(8, 4)
    report = fastnn.accelerate(layer, example_inputs=x())
    assert type(layer) is fastnn.nn.Linear and report.verified
    assert "(the model)" in str(report)
    report.restore()
    assert type(layer) is nn.Linear


def test_shared_layers_are_handled_once_and_ties_hold():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.block = Block()
            self.again = self.block
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.again(self.block(self.embed(tokens))))

    model = Tied()
    tokens = torch.arange(6).view(2, 3)
    ours, report = accelerated(model, example_inputs=tokens)
    assert [e.name for e in report.entries] == ["block.dense", "block.act", "head"]
    assert ours.again is ours.block and ours.head.weight is ours.embed.weight
    assert report.verified
    assert torch.equal(copy.deepcopy(ours)(tokens), ours(tokens))


def test_hooks_keep_firing_on_every_layer():
    model = mlp().eval()
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda m, a, y: seen.append(m))
        module.register_forward_pre_hook(lambda m, a: seen.append(m))
    report = fastnn.accelerate(model)
    model(x())
    assert len(seen) == 14
    assert report.fused == 0 and "hooks" in entry(report, "0").reason


def test_backward_hooks_keep_firing():
    model = mlp()
    seen = []
    model[0].register_full_backward_hook(lambda m, gi, go: seen.append(m))
    fastnn.accelerate(model)
    model(x().requires_grad_()).sum().backward()
    assert seen == [model[0]]


def test_subclasses_are_left_alone():
    class Mine(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    class MySoftmax(nn.Softmax):
        pass

    model = nn.Sequential(Mine(8, 8), nn.ReLU(), nn.Linear(8, 8), MySoftmax(-1), nn.MultiheadAttention(8, 2))
    report = fastnn.accelerate(model)
    assert type(model[0]) is Mine and type(model[3]) is MySoftmax
    assert "Mine is a subclass" in entry(report, "0").reason and "MySoftmax is a subclass" in entry(report, "3").reason
    assert "NonDynamicallyQuantizableLinear" in entry(report, "4.out_proj").reason
    assert entry(report, "1").became is None and entry(report, "2").became


def test_parametrized_layers_are_left_alone_and_weight_norm_hooks_work():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normed = nn.utils.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), normed, nn.Tanh()).eval()
    report = fastnn.accelerate(model, example_inputs=x(), freeze=True)
    assert "parametrize" in entry(report, "0").reason
    assert report.verified and type(normed) is fastnn.nn.Linear
    assert normed.packed is None, "the weight is made anew at each call: there is nothing to freeze"
    with torch.no_grad():
        model(x())
        normed.weight_g.mul_(2)
        ours = model(x())
        report.restore()
        torch.testing.assert_close(ours, model(x()))


def test_layers_that_cannot_be_changed_say_why():
    model = mlp()
    model[0].activation = "mine"
    model[2].forward = lambda input: input
    report = fastnn.accelerate(model)
    assert "'activation'" in entry(report, "0").reason and model[0].activation == "mine"
    assert "replaced on the instance" in entry(report, "2").reason
    assert "plain layer" in entry(report, "1").reason


@pytest.mark.parametrize(
    ("change", "word"), [(lambda m: m.double(), "float64"), (lambda m: m.to("meta"), "meta")], ids=["float64", "meta"]
)
def test_other_types_and_devices_are_left_alone(change, word):
    model = change(mlp())
    before = state_of(model)
    report = fastnn.accelerate(model)
    assert not report.accelerated and state_of(model) == before
    for name in ("0", "5"):
        assert (word if fastnn.info()["backends"]["cpu"]["available"] else "extension") in entry(report, name).reason


def test_activations_without_a_kernel_are_reported():
    model = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 8), nn.Mish(), nn.PReLU())
    report = fastnn.accelerate(model)
    assert [entry(report, name).reason for name in ("1", "3", "4")] == [
        f"no fastnn kernel for {kind} yet" for kind in ("LeakyReLU", "Mish", "PReLU")
    ]


def test_deepcopy_is_accelerated_and_independent(monkeypatch):
    model = nn.ModuleList([Functional(), mlp()]).eval()
    fastnn.accelerate(model)
    other = copy.deepcopy(model)
    assert type(other[1][0]) is fastnn.nn.Linear
    with fused_calls(monkeypatch) as calls:
        for ours, theirs in zip(model, other, strict=True):
            assert torch.equal(ours(x()), theirs(x()))
    assert calls == ["relu", "gelu_tanh"] * 2 + ["gelu", "relu"] * 2
    before = model[0](x())
    with torch.no_grad():
        other[0].first.weight.zero_()
        other[0].rate = 0.1
    assert torch.equal(model[0](x()), before)


def test_pickle_keeps_the_acceleration(monkeypatch):
    model = nn.ModuleList([Functional(), mlp(), Block()]).eval()
    fastnn.accelerate(model, freeze=True)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        with fused_calls(monkeypatch) as calls:
            for ours, theirs in zip(model, other, strict=True):
                assert torch.equal(ours(x()), theirs(x()))
        assert calls == ["relu", "gelu_tanh"] * 2 + ["gelu", "relu"] * 2 + ["gelu"] * 2


def test_state_dicts_go_both_ways():
    model = mlp()
    ours, _ = accelerated(mlp(), freeze=True)
    assert ours.load_state_dict(model.state_dict(), strict=True)
    plain = mlp()
    assert plain.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(plain(x()), model(x()))


def test_only_this_model_is_touched():
    ours, other = mlp(), mlp()
    forward = nn.Sequential.forward, nn.Linear.forward, nn.Softmax.forward, nn.Module.__call__
    before = state_of(other)
    fastnn.accelerate(ours, example_inputs=x())
    assert state_of(other) == before
    assert (nn.Sequential.forward, nn.Linear.forward, nn.Softmax.forward, nn.Module.__call__) == forward


def test_a_registry_of_subclasses_learns_nothing():
    class Registered(Block):
        known = ()

        def __init_subclass__(cls, **kwargs):
            Registered.known += (cls,)

    model = Registered()
    report = fastnn.accelerate(model)
    assert report.fused == 1 and Registered.known == ()


def test_a_dropped_model_is_freed():
    model = Functional()
    fastnn.accelerate(model, freeze=True)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_autocast():
    model = mlp().eval()
    ours, _ = accelerated(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert ours(x()).dtype == model(x()).dtype


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training):
    model = nn.Sequential(mlp(), nn.Linear(4, 8), Functional()).train(training)
    model[2].rate = 0.0
    ours, _ = accelerated(model, freeze=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same_answers(compiled, model, x())


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch\.nn\.Module, got str"):
        fastnn.accelerate("model")
    with pytest.raises(ValueError, match="without a shape yet"):
        fastnn.accelerate(nn.Sequential(nn.LazyLinear(3)))


def test_report_is_readable():
    from rich.console import Console

    model = nn.ModuleList([mlp() for _ in range(3)])
    report = fastnn.accelerate(model, freeze=True)
    text = str(report)
    assert "*.0  x3" in text and "unverified: no example_inputs" in text
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(report)
    assert "fastnn.Linear + gelu" in console.export_text()
    assert report.max_difference is None and not report.verified
    assert all(e.verified is None for e in report.entries)
