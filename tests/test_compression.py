"""fastnn.compress: what it promises of the metric, of the model when something fails, and of what it says."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import math

import pytest
import torch
from torch import nn

import fastnn
from fastnn import CompressError, Int4Int8Dynamic, Int8Dynamic, Int8WeightOnly, Shrink, compress
from fastnn.compression import look, search
from fastnn.compression.moves import Move, gain, moves
from fastnn.compression.state import State, copy_tensors, tensor_bytes
from fastnn.compression.units import Option, Unit
from fastnn.compression.within import agreement, spearman
from fastnn.nn import BlockSparseLinear, Int4Embedding, Int8Linear

X = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def agrees(model):
    """How often a model chooses what `mlp()` chooses."""
    return (model(X).argmax(1) == mlp().eval()(X).argmax(1)).float().mean()


def nbytes(model):
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time goes with bytes: what a search does is then the same everywhere. `clock.undo()` gives the real one back."""

    def medians(calls, input):
        return tuple(float(nbytes(call.layer)) for call in calls)

    def milliseconds(model, states, example_inputs, rounds):
        found = []
        for state in states:
            state.put()
            found.append([float(nbytes(model))] * rounds)
        return found

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(look, "medians", medians)
        patch.setattr(search, "milliseconds", milliseconds)
        patch.setattr(search, "memory", lambda *_: None)
        yield patch
    torch.set_num_threads(threads)


def compressed(model, evaluate=agrees, **options):
    given = {"calib": [X], "example_inputs": X, "max_drop": 0.05, "reserve": 0.0, "accelerate": False, **options}
    return compress(model, evaluate=evaluate, **given)


def touched(model):
    """Everything by which one could tell that a model was touched."""
    modules = [
        (name, type(m), m.training, {k: repr(v) for k, v in vars(m).items()}) for name, m in model.named_modules()
    ]
    held = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(n, id(t), t.data_ptr(), t.shape, t.requires_grad, t.detach().clone().tolist()) for n, t in held]
    return modules, tensors, [None if t.grad is None else (id(t.grad), t.grad.tolist()) for _, t in held]


# ---- what comes out


def test_the_metric_stays_within_the_budget_and_the_report_says_what_is_true():
    model = mlp()
    same, before = list(model.modules()), nbytes(model)
    report = compressed(model, lambda m: {"agreement": agrees(m), "other": 3}, target="size")
    assert list(model.modules()) == same and model.training and all(m.training for m in model.modules())
    model.eval()
    assert report.metric == "agreement" and report.before.metrics == {"agreement": 1.0, "other": 3.0}
    assert report.after.metrics["agreement"] == pytest.approx(float(agrees(model))) and report.drop <= 0.05
    assert (report.before.nbytes, report.after.nbytes) == (before, nbytes(model)) and nbytes(model) < 0.4 * before
    layers = {entry.name: entry for entry in report.entries if entry.kind == "layer"}
    assert list(layers) == ["0", "2", "4"]
    for name, entry in layers.items():
        kind = type(model.get_submodule(name)).__name__
        assert entry.was == "Linear" and entry.became == (None if kind == "Linear" else kind)
        assert len(entry.tried) == 4 and all(one.verdict for one in entry.tried)
        assert [one.verdict for one in entry.tried].count("taken") == (entry.became is not None)
    last = [point for point in report.points if point.accepted][-1]
    assert last.changed == len(report.compressed) and last.metrics == report.after.metrics
    assert last.nbytes == nbytes(model) and report.evaluations == len(report.points) + 2
    text = str(report)
    for words in ("Compressed", "Points tried", "rolled back", "may fall by 0.05", "peak of a call unknown", "tensors"):
        assert words in text, words
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["after"]["nbytes"] == nbytes(model)
    assert "| name | kind |" in report.to_markdown()


def test_a_layer_that_costs_too_much_is_rolled_back_and_no_other():
    def evaluate(model):
        return 1.0 - isinstance(model[2], Int8Linear)

    model = mlp()
    report = compressed(model, evaluate, candidates=[Int8Dynamic()], max_drop=0.5)
    assert [type(model[i]) for i in (0, 2, 4)] == [Int8Linear, nn.Linear, Int8Linear]
    (left,) = report.left
    assert left.name == "2" and left.reason == "Int8Dynamic: rolled back: metric falls by 1"
    assert {entry.became for entry in report.compressed} == {"Int8Linear"}


@pytest.mark.parametrize(("reserve", "became"), [(0.2, "Int8Linear"), (0.3, None)])
def test_no_plan_uses_the_reserve_up(reserve, became):
    def evaluate(model):
        return 1.0 - 0.03 * isinstance(model[2], Int8Linear)

    report = compressed(mlp(), evaluate, candidates=[Int8Dynamic()], max_drop=0.04, reserve=reserve)
    assert {entry.name: entry.became for entry in report.entries}["2"] == became
    assert f"may fall by 0.04, for a plan by {0.04 * (1 - reserve):.4g}, fell by" in str(report)
    with pytest.raises(ValueError, match=r"reserve must be in \[0, 1\), got 1"):
        compressed(mlp(), reserve=1)


def test_nan_counts_as_beyond_any_budget():
    model = mlp()
    report = compressed(
        model, lambda m: math.nan if isinstance(m[0], Int8Linear) else 1.0, candidates=[Int8Dynamic()], max_drop=1e9
    )
    (left,) = report.left
    assert left.name == "0" and left.reason == "Int8Dynamic: rolled back: metric is NaN" and len(report.compressed) == 2
    with pytest.raises(CompressError, match="NaN for the model as it is"):
        compressed(mlp(), lambda m: math.nan)


def test_structure_and_blocks_come_before_codes():
    model, trained = mlp(), []

    def recover(model):
        trained.append([type(model[0]), model[0].out_features, torch.is_grad_enabled()])
        model(X).sum().backward()
        with torch.no_grad():
            model[4].bias.add_(1)

    report = compressed(
        model,
        lambda m: 1.0,
        candidates=[Int8Dynamic(), Shrink(0.5, multiple_of=16), fastnn.Sparsify(0.5)],
        exclude="4",
        target="size",
        recover=recover,
    )
    chosen = {(entry.name, entry.kind): entry.became for entry in report.compressed}
    assert chosen["0", "neurons"] == chosen["2", "neurons"] == "32 neurons"
    assert isinstance(model[2], (Int8Linear, BlockSparseLinear)) and model[2].in_features == model[2].out_features == 32
    assert len(trained) == 1 and trained[0][1:] == [32, True]
    assert torch.equal(model[4].bias, mlp()[4].bias + 1) and all(p.grad is None for p in model.parameters())
    assert report.shapes["tensors"]["0.weight"] == [32, 48]


def test_times_of_a_real_clock_and_fastnns_kernels(clock):
    clock.undo()
    model = mlp().eval()
    try:
        report = compressed(model, accelerate=True, target="size", candidates=[Int8Dynamic()])
    finally:
        clock.undo()
    median, low, high = report.speedup
    assert 0 < low <= median <= high and report.before.ms > 0 and report.after.packed > 0
    assert all(one.ms_before > 0 and one.ms_after > 0 for entry in report.compressed for one in entry.tried)
    assert report.before.peak is None or report.before.peak >= report.before.nbytes
    assert report.points[0].changed == 0 and report.points[0].ms > 0


def test_what_is_slower_is_not_taken_for_latency(clock):
    clock.setattr(look, "medians", lambda calls, input: (1e5, 2e5))
    model = mlp()
    known = touched(model)
    with pytest.raises(CompressError, match="no candidate gains anything") as caught:
        compressed(model, candidates=[Int8Dynamic()])
    assert touched(model) == known
    (entry, *_) = caught.value.report.left
    assert entry.reason == "Int8Dynamic: no gain here: 2e+05 ms, 1e+05 ms as it is"
    assert not caught.value.report.compressed


def test_a_model_that_is_not_faster_in_the_end_is_put_back(clock):
    clock.setattr(search, "milliseconds", lambda model, states, example, rounds: [[1.0] * rounds for _ in states])
    model = mlp()
    known = touched(model)
    with pytest.raises(CompressError, match=r"not faster \(1.00x\)"):
        compressed(model)
    assert touched(model) == known


def test_layers_that_share_a_weight_are_treated_alike():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    ids = torch.arange(32)
    options = {
        "calib": [ids],
        "example_inputs": ids,
        "target": "size",
        "candidates": [Int8Dynamic(), Int4Int8Dynamic()],
    }
    model = Tied()
    report = compressed(model, lambda m: 1.0, **options)
    (entry,) = report.compressed
    assert isinstance(model.embed, Int4Embedding) and model.head.weight is model.embed.weight
    assert "with head" in entry.reason and "Int8Dynamic takes no Embedding" in entry.reason
    model = Tied()
    known = touched(model)
    with pytest.raises(ValueError, match="embed and head share one weight: choose all of them or none"):
        compressed(model, lambda m: 1.0, include="head", **options)
    assert touched(model) == known


# ---- what fails


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_leaves_the_model_as_it_was(call, error):
    model, calls = mlp(), itertools.count()
    model[2].eval()
    model[0].register_forward_hook(lambda *_: None)
    model(X).sum().backward()
    known = touched(model)

    def evaluate(model):
        with torch.no_grad():
            model[4].weight.add_(1)  # what it must not do; the caller's memory is out of its reach even then
        if next(calls) == call:
            raise error
        return 1.0

    kind, words = (
        (CompressError, "evaluate failed on .*: RuntimeError: no") if str(error) else (KeyboardInterrupt, None)
    )
    with pytest.raises(kind, match=words):
        compressed(model, evaluate, candidates=[Int8Dynamic(), Shrink(0.5)], max_drop=0.0)
    assert touched(model) == known


def test_a_failure_at_the_end_leaves_the_model_as_it_was(tmp_path):
    model, calls = mlp(), itertools.count()
    known = touched(model)
    with pytest.raises(OSError):
        compressed(model, lambda m: 1.0, save=tmp_path / "none" / "file", recover=_train, candidates=[Shrink(0.5)])
    assert touched(model) == known
    with pytest.raises(CompressError, match="does not give the same twice"):
        compressed(model, lambda m: (1.0, 1.0, 1.0, 0.0)[next(calls)])
    assert touched(model) == known


def _train(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().mean().backward()
    optimizer.step()


def test_impossible_budgets():
    model = mlp()
    known = touched(model)

    def fussy(model):
        return 1.0 - any(not isinstance(layer, nn.Linear) for layer in model if hasattr(layer, "weight"))

    with pytest.raises(
        CompressError, match=r"no candidate keeps the metric.* the smallest fall of metric was 1"
    ) as caught:
        compressed(model, fussy, candidates=[Int8Dynamic(), Int8WeightOnly()], max_evaluations=4)
    report = caught.value.report
    assert len(report.points) == 5 and not any(point.accepted for point in report.points[1:])
    assert "not tried: max_evaluations = 4" in str([entry.reason for entry in report.left])
    values = iter((1.0, 0.5))
    with pytest.raises(CompressError, match=r"budget is impossible.*before anything was compressed"):
        compressed(model, lambda m: next(values))
    for drop in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="max_drop must be"):
            compressed(model, max_drop=drop)
    assert touched(model) == known


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"calib": []}, ValueError, "calib has no inputs"),
        ({"calib": [X.to("meta")]}, CompressError, "a tensor of calib on meta"),
        ({"calib": [X[:, :3]]}, ValueError, r"does not run on calib\[0\]: RuntimeError"),
        ({"example_inputs": {"input": X.to("meta")}}, CompressError, "a tensor of example_inputs on meta"),
        ({"evaluate": 3}, TypeError, "evaluate must be callable"),
        ({"evaluate": lambda m: "good"}, CompressError, "must give a number or a mapping"),
        ({"evaluate": lambda m: {}}, CompressError, "evaluate gave"),
        ({"metric": "f1", "evaluate": lambda m: {"f2": 1.0}}, CompressError, r"evaluate gave \['f2'\], wanted is 'f1'"),
        ({"target": "speed"}, ValueError, "target must be"),
        ({"max_evaluations": 0}, ValueError, "max_evaluations must be"),
        ({"candidates": [Int8Dynamic]}, TypeError, "got Int8Dynamic"),
        ({"candidates": [Int8Dynamic(smooth=fastnn.SmoothQuant())]}, ValueError, "SmoothQuant changes other layers"),
        ({"candidates": [Shrink(0.5, scope="global")]}, ValueError, "Shrink must have"),
        ({"candidates": [fastnn.Sparsify(0.5, unit="weight")]}, ValueError, "Sparsify must have"),
        ({"include": "7"}, ValueError, "include pattern '7' matches no layer"),
    ],
)
def test_errors_name_the_culprit_and_leave_the_model(options, kind, words):
    model = mlp()
    known = touched(model)
    with pytest.raises(kind, match=words):
        compressed(model, **options)
    assert touched(model) == known


def test_a_model_elsewhere_is_refused():
    with pytest.raises(CompressError, match=r"0\.weight is on meta"):
        compressed(mlp().to("meta"))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        compressed(3)


def test_evaluate_gets_the_same_random_state_and_no_gradients():
    seen = []

    def evaluate(model):
        seen.append((float(torch.rand(())), torch.is_grad_enabled(), model.training))
        return 1.0

    model = mlp()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    compressed(model, evaluate, candidates=[Int8Dynamic()])
    assert len(seen) > 2 and set(seen) == {(seen[0][0], False, False)} and torch.equal(torch.get_rng_state(), state)


# ---- going on


def test_a_search_goes_on_after_a_stop(tmp_path):
    path, limit, counted = tmp_path / "state.json", math.inf, []

    def evaluate(model):
        if len(counted) >= limit:
            raise KeyboardInterrupt
        counted.append(float(agrees(model)))
        return counted[-1]

    whole = mlp()
    expected = compressed(whole, evaluate, target="size")
    calls, limit = len(counted), 5
    counted.clear()
    model = mlp()
    with pytest.raises(KeyboardInterrupt):
        compressed(model, evaluate, target="size", resume=path)
    limit, done = math.inf, len(counted)
    found = compressed(model, evaluate, target="size", resume=path)
    assert [(e.name, e.became, e.reason) for e in found.entries] == [
        (e.name, e.became, e.reason) for e in expected.entries
    ]
    assert found.points == expected.points and torch.equal(model(X), whole(X))
    assert len(counted) - done == found.evaluations == calls - done + 1  # the model as it is, again
    with pytest.raises(ValueError, match="of another model, calibration or options"):
        compressed(mlp(1), evaluate, target="size", resume=path)
    with pytest.raises(ValueError, match="of another model, calibration or options"):
        compressed(mlp(), evaluate, target="size", max_drop=0.04, resume=path)
    with pytest.raises(ValueError, match="something else of the model than it did"):
        compressed(mlp(), lambda m: 7.0, target="size", resume=path)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="no state of a search"):
        compressed(mlp(), evaluate, target="size", resume=path)
    assert [one.name for one in tmp_path.iterdir()] == ["state.json"]


# ---- files and pictures


def test_the_file_gives_the_model_back(tmp_path):
    path, model = tmp_path / "m.safetensors", mlp().eval()
    candidates = [Int8Dynamic(), Shrink(0.5), fastnn.Sparsify(0.5)]
    compressed(model, lambda m: 1.0, target="size", candidates=candidates, exclude="4", save=path)
    fresh = fastnn.load(path, mlp(3)).eval()
    assert torch.equal(fresh(X), model(X)) and fresh[2].out_features == 32
    narrow = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    known = touched(narrow)
    with pytest.raises(RuntimeError, match=r"the sizes in .* do not fit the model"):
        fastnn.load(path, narrow)
    assert touched(narrow) == known
    other = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8, bias=False))
    known = touched(other)
    with pytest.raises(RuntimeError, match=r"the model lacks 4\.bias"):
        fastnn.load(path, other)
    assert touched(other) == known


def test_a_plot_of_every_point(tmp_path, monkeypatch):
    report = compressed(mlp(), target="size", candidates=[Int8Dynamic()])
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", _missing)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            report.plot(tmp_path / "plot.png")
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "plot.svg")
    assert "rolled back" in (tmp_path / "plot.svg").read_text() or len(report.points) == 2


def _missing(name):
    raise ImportError(name)


# ---- the parts


def test_steps_are_those_of_the_best_plan_for_any_price():
    torch.manual_seed(0)
    units = []
    for name in "abcdefgh":
        options = [Option(Int8Dynamic(), error=float(torch.rand(())) ** 0.5, bytes_before=100) for _ in range(5)]
        for option in options:
            option.bytes_after = int(torch.randint(0, 120, ()))
        units.append(Unit(name, "layer", "Linear", options=options))
    steps = moves(units, "size", lambda option: gain(option, "size", 1.0, 800))
    assert [s.ratio for s in steps] == sorted((s.ratio for s in steps), reverse=True) and len(steps) >= 10
    for count in range(len(steps)):  # between two ratios lies a price, for which the plan so far is the best of all
        price = math.sqrt(steps[count].ratio * steps[count - 1].ratio) if count else steps[0].ratio * 2
        plan = {step.unit.name: step.option for step in steps[:count]}

        def worth(unit, option, price=price):
            return 0.0 if option is None else gain(option, "size", 1.0, 800) - price * option.error**2

        for unit in units:
            best = max(worth(unit, option) for option in (None, *unit.options))
            assert worth(unit, plan.get(unit.name)) == pytest.approx(best)
    assert all(isinstance(step, Move) for step in steps)


def test_a_state_is_put_back_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 4)).sum().backward()
    known, state, parameter = touched(model), State(model), model[0].weight
    copy_tensors(model)
    assert parameter is model[0].weight and touched(model)[1] != known[1]
    fastnn.quantize_(model, Int8Dynamic())
    model[1].eval()
    model[1] = nn.Identity()
    other = State(model)
    state.put()
    assert touched(model) == known and tensor_bytes(model) == nbytes(model)
    other.put()
    assert isinstance(model[0], Int8Linear) and isinstance(model[1], nn.Identity)


def test_tensors_that_share_memory_go_on_sharing_it():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].weight.data = model[0].weight.data
    copy_tensors(model)
    assert model[1].weight.data_ptr() == model[0].weight.data_ptr()


def test_agreement_and_spearman():
    model = copy.deepcopy(mlp()[0])
    measure = agreement(model, [{"input": X}])
    assert measure(model) == pytest.approx(1.0)
    with torch.no_grad():
        model.weight.neg_()
        model.bias.neg_()
    assert measure(model) == pytest.approx(-1.0)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    assert measure(model) == 0.0
    a = torch.tensor([1.0, 2.0, 2.0, 5.0])
    assert spearman(a, torch.tensor([0.1, 0.5, 0.5, 9.0])) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert spearman(a, torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.9486833)
