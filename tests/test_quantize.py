"""quantize_: which layers, what is said of each, and that the model lives on; dequantize_."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import fastnn
from fastnn.nn import Int8Linear
from fastnn.ops.linear_int8 import linear_int8_reference, quantize_rows_reference
from fastnn.quant import measure, quantize
from fastnn.quant.measure import Times
from fastnn.testing import same_bits

INT8 = fastnn.Int8Dynamic()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """An embedding, dense layers of many kinds, a head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), fastnn.nn.Linear(32, 16, activation="relu"))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.unused = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.body(self.embed(ids))
        return self.head(x + self.attention(x, x, x)[0])


IDS = torch.arange(30).view(3, 10)


@pytest.fixture
def net(extension):
    return Net().eval()


def entry(report, name):
    return next(e for e in report.entries if e.name == name)


def test_every_layer_is_named(net):
    report = fastnn.quantize_(net, INT8)
    assert [e.name for e in report.entries] == [
        "embed", "body.0", "body.2", "attention.out_proj", "unused", "head",
    ]  # fmt: skip
    assert [e.name for e in report.quantized] == ["body.0", "body.2", "unused"]
    assert {type(net.body[0]), type(net.body[2]), type(net.unused)} == {Int8Linear}
    assert "takes no Embedding" in entry(report, "embed").reason
    assert "subclass of Linear" in entry(report, "attention.out_proj").reason
    assert "shares its weight with embed" in entry(report, "head").reason
    first = entry(report, "body.0")
    assert (first.was, first.became, first.bytes_before, first.bytes_after) == (
        "Linear", "Int8Linear", 32 * 16 * 4, 32 * 16 + 32 * 4,
    )  # fmt: skip
    assert entry(report, "head").bytes_before == entry(report, "head").bytes_after == 0, "counted with the embedding"
    left = (40 * 16 + 16 * 16) * 4
    assert report.bytes_before == left + 4 * (2 * 32 * 16 + 16 * 16)
    assert report.bytes_after == left + 2 * 32 * 16 + 16 * 16 + 4 * (32 + 16 + 16)
    text = str(report)
    assert all(e.name in text for e in report.entries) and "Int8Dynamic()" in text and "3 of 6" in text
    assert fastnn.quantize_(net, INT8).quantized == ()
    assert entry(fastnn.quantize_(net, INT8), "body.0").reason == "is quantised already"


def test_results_are_those_of_the_op(net):
    x, weight, bias = randn(7, 16), net.body[0].weight.detach().clone(), net.body[0].bias.detach()
    fastnn.quantize_(net, INT8)
    expected = linear_int8_reference(x, *quantize_rows_reference(weight), bias, None)
    assert same_bits(net.body[0](x).detach(), expected)
    assert net.body[2].activation == "relu" and bool((net.body[2](randn(5, 32)) >= 0).all())


def test_names_choose(net):
    report = fastnn.quantize_(copy.deepcopy(net), INT8, include="body.*")
    assert [e.name for e in report.quantized] == ["body.0", "body.2"]
    assert entry(report, "unused").reason == "not among those included"
    report = fastnn.quantize_(copy.deepcopy(net), INT8, exclude=["body.*", "unus?d"])
    assert [e.name for e in report.quantized] == [] and entry(report, "unused").reason == "excluded"
    report = fastnn.quantize_(copy.deepcopy(net), INT8, lambda module, name: module.in_features == 32)
    assert [e.name for e in report.quantized] == ["body.2"]
    assert entry(report, "body.0").reason == "filter_fn said no"
    for options in ({"include": "bodi.*"}, {"exclude": ["body.*", "no.such"]}):
        with pytest.raises(ValueError, match=r"(bodi|no\.such).*matches no layer"):
            fastnn.quantize_(net, INT8, **options)
    assert isinstance(net.body[0], nn.Linear)


def test_tied_head_is_untied_only_by_name(net):
    report = fastnn.quantize_(net, INT8, include=["head"])
    assert isinstance(net.head, Int8Linear) and isinstance(net.embed.weight, nn.Parameter)
    assert "no longer tied to embed" in entry(report, "head").reason and report.bytes_after > report.bytes_before


def test_tied_layers_share_their_codes(extension):
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in "abc"})
    model.b.weight = model.a.weight
    report = fastnn.quantize_(model, INT8)
    assert model.a.weight is model.b.weight and model.a.weight_scale is model.b.weight_scale
    assert model.a.bias is not model.b.bias and model.c.weight is not model.a.weight
    assert entry(report, "b").bytes_before == entry(report, "b").bytes_after == 0
    twin = copy.deepcopy(model)
    assert twin.a.weight is twin.b.weight
    assert fastnn.dequantize_(model) == ("a", "b", "c")
    assert model.a.weight is model.b.weight and isinstance(model.a.weight, nn.Parameter)


@pytest.fixture
def timed(monkeypatch):
    """Fixed times in place of measured ones: {in_features: (before, after)}."""
    times, asked = {}, []

    def compare(before, after, input):
        asked.append((before, after, tuple(input.shape)))
        return Times(*times.get(input.shape[-1], (1.0, 0.5)))

    monkeypatch.setattr(quantize, "compare", compare)
    return times, asked


def test_slower_layers_are_left_alone_and_said_so(net, timed):
    times, asked = timed
    times[32] = (1.0, 1.5)
    report = fastnn.quantize_(net, INT8, example_inputs=IDS)
    assert [shape for _, _, shape in asked] == [(3, 10, 16), (3, 10, 32)]
    assert isinstance(net.body[0], Int8Linear) and type(net.body[2]) is fastnn.nn.Linear
    slow, fast = entry(report, "body.2"), entry(report, "body.0")
    assert "1.50 times as long" in slow.reason and (slow.ms_before, slow.ms_after) == (1.0, 1.5)
    assert fast.speedup == 2 and fast.input_shape == (3, 10, 16)
    assert entry(report, "unused").became and entry(report, "unused").reason == "not run by the example"
    assert "1.5" in str(report) and "3x10x16" in str(report)


def test_max_slowdown_allows_it(net, timed):
    timed[0][32] = (1.0, 1.5)
    fastnn.quantize_(net, INT8, example_inputs=IDS, max_slowdown=2.0)
    assert isinstance(net.body[2], Int8Linear)


def test_equal_layers_are_measured_once(extension, timed):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    fastnn.quantize_(model, INT8, example_inputs=randn(5, 16))
    assert len(timed[1]) == 1


def test_measuring_leaves_the_model_as_it_was(net):
    calls = []
    net.body[0].register_forward_hook(lambda *_: calls.append(1))
    net.register_buffer("runs", torch.zeros(()))
    net.register_forward_pre_hook(lambda module, _: module.runs.add_(1) and None)
    state = torch.random.get_rng_state()
    report = fastnn.quantize_(net, INT8, example_inputs=IDS, max_slowdown=1e9)
    assert net.runs.item() == 0 and torch.equal(torch.random.get_rng_state(), state)
    assert len(calls) == 1, "the example's own call; timing goes past the hooks"
    measured = entry(report, "body.0")
    assert measured.ms_before > 0 and measured.ms_after > 0
    net(IDS)
    assert len(calls) == 2, "hooks stay"


def test_a_failing_example_changes_nothing(net):
    with pytest.raises(IndexError):
        fastnn.quantize_(net, INT8, example_inputs=torch.tensor([[99]]))
    assert isinstance(net.body[0], nn.Linear)


def test_the_model_lives_on(net):
    fastnn.quantize_(net, INT8)
    expected = net(IDS).detach()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert same_bits(other(IDS).detach(), expected)
    fresh = Net().eval()
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fastnn.quantize_(fresh, INT8)
    fresh.load_state_dict(net.state_dict())
    assert same_bits(fresh(IDS).detach(), expected)


def test_back_to_floats(net):
    before = {name: (type(m), sorted(vars(m))) for name, m in net.named_modules()}
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.unused.weight.requires_grad_(False)
    fastnn.quantize_(net, INT8)
    assert fastnn.dequantize_(net) == ("body.0", "body.2", "unused")
    assert {name: (type(m), sorted(vars(m))) for name, m in net.named_modules()} == before
    assert [name for name, _ in net.named_parameters()] == list(weights)
    assert not net.unused.weight.requires_grad and net.body[0].weight.requires_grad
    for name, p in net.named_parameters():
        step = weights[name].abs().amax(-1, keepdim=True) / 127
        assert ((p - weights[name]).abs() <= 0.501 * step).all(), name
    assert fastnn.dequantize_(net) == ()
    assert type(Int8Linear(3, 4)) is Int8Linear
    alone = Int8Linear(3, 4, activation="relu")
    fastnn.dequantize_(alone)
    assert isinstance(alone, fastnn.nn.Linear)


def test_conv1d_of_hugging_face(extension):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(24, 16)
    with torch.no_grad():
        layer.weight.copy_(randn(16, 24))
    model, x = nn.Sequential(layer), randn(5, 16)
    expected = linear_int8_reference(x, *quantize_rows_reference(layer.weight.t()), layer.bias.detach(), None)
    weight = layer.weight.detach().clone()
    report = fastnn.quantize_(model, INT8, example_inputs=x, max_slowdown=1e9)
    assert report.entries[0].was == "Conv1D" and same_bits(model(x).detach(), expected)
    fastnn.dequantize_(model)
    assert type(model[0]) is pytorch_utils.Conv1D and model[0].weight.shape == (16, 24)
    assert (model[0].weight - weight).abs().max() < weight.abs().max() / 127


def test_a_layer_is_a_model(extension):
    layer = nn.Linear(8, 4)
    assert len(fastnn.quantize_(layer, INT8).quantized) == 1 and isinstance(layer, Int8Linear)


def test_what_cannot_be_quantised_says_why(extension):
    model = nn.ModuleDict(
        {
            "nan": nn.Linear(4, 4),
            "doubles": nn.Linear(4, 4, dtype=torch.float64),
            "meta": nn.Linear(4, 4, device="meta"),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "replaced": nn.Linear(4, 4),
            "empty": nn.Linear(1, 1),
        }
    )
    model["nan"].weight.data[0, 0] = float("nan")
    model["replaced"].forward = lambda x: x
    model["empty"].weight = nn.Parameter(torch.empty(4, 0))
    reasons = {e.name: e.reason for e in fastnn.quantize_(model, INT8).skipped}
    words = {
        "nan": "NaN", "doubles": "float64", "meta": "meta", "normed": "", "replaced": "replaced", "empty": "not empty",
    }  # fmt: skip
    assert {name: word in reasons[name] for name, word in words.items()} == dict.fromkeys(words, True)


def test_wrong_arguments():
    model = nn.Linear(3, 4)
    for config in ("int8", fastnn.Int8Dynamic, None):
        with pytest.raises(TypeError, match=r"config must be one of Int8Dynamic\(\)"):
            fastnn.quantize_(model, config)
    with pytest.raises(TypeError, match=r"quantize_: model must be a torch\.nn\.Module"):
        fastnn.quantize_([model], INT8)
    for slowdown in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="max_slowdown"):
            fastnn.quantize_(model, INT8, max_slowdown=slowdown)
    with pytest.raises(TypeError, match="dequantize_"):
        fastnn.dequantize_("model")


def test_config_has_a_json_form():
    assert json.loads(json.dumps(INT8.to_json())) == {"config": "Int8Dynamic"}


def test_medians_are_of_both_in_turns():
    order = []

    class Counting(nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label = label

        def forward(self, x):
            order.append(self.label)
            return x

    found = measure.compare(Counting("a"), Counting("b"), torch.zeros(1))
    assert found.before > 0 and found.after > 0
    assert order[4:8] == ["a", "b", "a", "b"] and order.count("a") == order.count("b")


def test_explain_and_accelerate_know_the_layers(net):
    fastnn.quantize_(net, INT8)
    expected = net(IDS).detach()
    packed = net.body[0].packed._packed
    explained = {part.name: part for part in fastnn.explain(net, IDS).parts}
    assert explained["body.0"].kernel == "linear_int8_fwd + gelu" and explained["body.0"].limit_ms > 0
    assert net.body[0].packed._packed is packed, "running it aside does not cost the packed copy"
    report = fastnn.accelerate(net, example_inputs=IDS)
    assert next(e.reason for e in report.entries if e.name == "body.2") == "is fastnn's already"
    assert (
        next(e.became for e in report.entries if e.name == "body.0") == "fastnn.Int8Linear + gelu" and report.verified
    )
    assert type(net.body[0]) is type(net.body[2]) is Int8Linear
    report.restore()
    assert same_bits(net(IDS).detach(), expected)


@pytest.mark.parametrize("config", (INT8, fastnn.Int4Int8Dynamic(8)), ids=str)
def test_activations_stay_fused_in_either_order(extension, config):
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU()).eval()
    x, plain = randn(5, 16), copy.deepcopy(model)
    fastnn.quantize_(plain, config)
    with torch.no_grad():
        expected = plain(x)
        fastnn.accelerate(plain)
        fastnn.accelerate(model, example_inputs=x, freeze=True)
        fastnn.quantize_(model, config)
        for each in (plain, model):
            with fastnn.record() as runs:
                found = each(x)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6) and not torch.equal(found, each[0](x))
            assert sum("fwd" in run.kernel for run in runs) == 1, "no kernel of the activation's own"
    handle = model[0].register_forward_hook(lambda module, args, output: output * 0)
    assert not model(x).any(), "hooks run, so the layer runs by itself"
    handle.remove()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_torchs_encoder_layer_runs_its_codes(extension, tmp_path):
    """Without gradients torch's fast path would read the codes as weights."""

    def make():
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2).eval()

    model, x = make(), randn(2, 5, 16)
    with torch.no_grad():
        floats = model(x)
        fastnn.quantize_(model, INT8)
        found = model(x)
        assert 0 < (found - floats).norm() < 0.05 * floats.norm()
        fastnn.save(model, tmp_path / "encoder.safetensors")
        assert same_bits(fastnn.load(tmp_path / "encoder.safetensors", make())(x), found)
        config = fastnn.Int4WeightOnly(8, rounding=fastnn.Gptq())
        report = fastnn.quantize_(other := make(), config, calibration=[x])
        assert "along layers (2)" in report.calibration and (other(x) - floats).norm() < 0.2 * floats.norm()
    fastnn.dequantize_(model)
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 1]
    assert sorted(vars(model.layers[0])) == sorted(vars(make().layers[0]))


# ---- codes in groups


CONFIGS = (
    fastnn.Int8WeightOnly(8),
    fastnn.Int4WeightOnly(8),
    fastnn.Int4WeightOnly(8, symmetric=False),
    fastnn.Int4Int8Dynamic(8),
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_groups_take_embeddings_and_keep_ties(net, config):
    """A tied head shares its codes with the table, is counted once, and both come back as one parameter."""
    before = net(IDS).detach()
    report = fastnn.quantize_(net, config)
    assert [e.name for e in report.quantized] == ["embed", "body.0", "body.2", "unused", "head"]
    assert all(getattr(net.head, n) is getattr(net.embed, n) for n in ("weight", "weight_scale", "weight_offset"))
    assert entry(report, "head").bytes_after == 0 and entry(report, "embed").bytes_after == net.embed.code_bytes
    assert net.embed.code_bytes == sum(b.nbytes for b in net.embed.buffers())
    if isinstance(config, fastnn.Int4WeightOnly):
        assert net.embed.code_bytes == 40 * (8 + 2 * 2 * (1 if config.symmetric else 2))
    assert same_bits(net.embed(IDS), net.embed.dequantized()[IDS])
    after = net(IDS).detach()
    assert 0 < (after - before).norm() < 0.3 * before.norm()
    assert same_bits(copy.deepcopy(net)(IDS).detach(), after)
    fastnn.dequantize_(net)
    assert type(net.embed) is nn.Embedding and net.head.weight is net.embed.weight and type(net.head) is nn.Linear
    assert type(net.body[2]) is fastnn.nn.Linear and net.body[2].activation == "relu"
    near = 0.05 if isinstance(config, fastnn.Int4Int8Dynamic) else 1e-5
    assert (net(IDS).detach() - after).norm() < near * before.norm()
    assert fastnn.quantize_(net, config).quantized == report.quantized


def test_configurations_by_name(net):
    config = {"body.0": INT8, "body.*": None, "embed": fastnn.Int8WeightOnly(), "*": fastnn.Int4WeightOnly()}
    report = fastnn.quantize_(net, config, exclude="unused")
    assert {e.name: e.became for e in report.entries} == {
        "embed": "Int8Embedding", "body.0": "Int8Linear", "body.2": None, "attention.out_proj": None, "unused": None,
        "head": "Int4Linear",
    }  # fmt: skip
    assert "no pattern of the configuration" in entry(report, "body.2").reason
    assert net.head.weight is not net.embed.weight and "Int8WeightOnly" in str(report)
    with pytest.raises(ValueError, match=r"config pattern 'bodi\.\*' matches no layer"):
        fastnn.quantize_(Net(), {"bodi.*": INT8})
    with pytest.raises(TypeError, match=r"a mapping of patterns to them; got int"):
        fastnn.quantize_(Net(), {"*": 4})
    with pytest.raises(TypeError, match="patterns of paths as keys"):
        fastnn.quantize_(Net(), {4: INT8})


def test_what_groups_cannot_take(extension):
    tables = {"norm": nn.Embedding(4, 4, max_norm=1.0), "good": nn.Embedding(4, 4)}
    model = nn.ModuleDict({"big": nn.Linear(4, 4), **tables})
    with torch.no_grad():
        model.big.weight[0, 0] = 1e5
    report = fastnn.quantize_(model, fastnn.Int4WeightOnly())
    assert "beyond what float16" in entry(report, "big").reason and "max_norm" in entry(report, "norm").reason
    assert [e.name for e in report.quantized] == ["good"]
    for kind in (fastnn.Int4WeightOnly, fastnn.Int8WeightOnly, fastnn.Int4Int8Dynamic):
        for size in (0, 2.5, True):
            with pytest.raises(ValueError, match="group_size"):
                kind(size)
    assert fastnn.Int4WeightOnly(32).to_json() == {"config": "Int4WeightOnly", "group_size": 32, "symmetric": True}


def test_embeddings_give_rows_of_their_type(extension):
    weight = randn(10, 7).bfloat16()
    for kind in (fastnn.nn.Int4Embedding, fastnn.nn.Int8Embedding):
        table = kind.from_float(weight, group_size=4)
        ids = torch.tensor([[9, 0], [3, 3]], dtype=torch.int32)
        for layer, dtype in ((table, torch.bfloat16), (copy.deepcopy(table).half(), torch.float16)):
            assert same_bits(layer(ids), table.dequantized(dtype)[ids.long()])
        assert table.weight_scale.dtype == torch.float16
        with pytest.raises(IndexError, match="10"):
            table(torch.tensor([10]))
        with pytest.raises(IndexError, match="-1"):
            table(torch.tensor([-1]))
        with pytest.raises(TypeError, match="float32"):
            table(torch.tensor([1.0]))
        with fastnn.use_backend("reference"):
            assert same_bits(table(ids), table.dequantized(torch.bfloat16)[ids.long()])
            with pytest.raises(IndexError, match="10"):
                table(torch.tensor([10]))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_explain_knows_codes_in_groups(net, config):
    fastnn.quantize_(net, config, include="body.*")
    explained = {part.name: part for part in fastnn.explain(net, IDS).parts}
    assert explained["body.0"].kernel == "linear_groupwise_fwd + gelu" and explained["body.0"].limit_ms > 0


@pytest.mark.parametrize("config", [fastnn.Int8Dynamic(), fastnn.Int4WeightOnly(16)], ids=["int8", "int4"])
@pytest.mark.parametrize("inside", [False, True])
def test_of_a_model_made_in_inference_mode(config, inside):
    x = torch.randn(5, 32)
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    expected = copy.deepcopy(model)
    with torch.inference_mode(inside):
        assert len(fastnn.quantize_(model, config, example_inputs=x, max_slowdown=1e9).quantized) == 2
    for where in (torch.no_grad(), torch.inference_mode()):
        with where:
            assert (model(x) - expected(x)).abs().max() < 0.2 * expected(x).abs().max()
