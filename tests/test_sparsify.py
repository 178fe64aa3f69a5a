"""sparsify_: which units go, what is said of each layer, masks, the schedule, files; advise."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastnn
from fastnn import GradualSparsifier, Sparsify
from fastnn.nn import BlockSparseLinear, Int8BlockSparseLinear
from fastnn.quant.container import FormatError
from fastnn.sparse import breakeven, layers
from fastnn.testing import same_bits


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """An embedding whose weight the head shares, dense layers, attention, a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.body = nn.Sequential(nn.Linear(16, 36), nn.GELU(), fastnn.nn.Linear(36, 16, activation="relu"))
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


def state_of(model):
    return {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}


def untouched(model, before):
    after = model.state_dict(keep_vars=True)
    return before.keys() == after.keys() and all(
        id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items()
    )


# ---- which units


def blocks_by_hand(weight, depth, norm=None):
    """Worth of each block, by the definition."""
    weight = weight.double() * (1 if norm is None else norm)
    n, k = weight.shape
    return torch.tensor(
        [
            [weight[i : i + 16, j : j + depth].square().sum().sqrt().item() for j in range(0, k, depth)]
            for i in range(0, n, 16)
        ]
    )


@pytest.mark.parametrize("depth", [2, 4])
def test_the_weakest_blocks_go(extension, depth):
    layer, weight = nn.Linear(37, 50), randn(50, 37)
    weight[:16, :9] *= 0.01
    layer.weight.data.copy_(weight)
    worth = blocks_by_hand(weight, depth)
    count = round(0.7 * worth.numel())
    report = fastnn.sparsify_(layer, Sparsify(0.7, depth=depth))
    assert isinstance(layer, BlockSparseLinear) and layer.blocks == worth.numel() - count
    kept = worth > worth.flatten().sort().values[count - 1]
    every = kept.repeat_interleave(16, 0).repeat_interleave(depth, 1)[:50, :37]
    assert torch.equal(layer.dense(), weight * every)
    (found,) = report.entries
    assert (found.units, found.kept, found.became) == (worth.numel(), layer.blocks, "BlockSparseLinear")
    assert found.bytes_before == 50 * 37 * 4 and found.bytes_after == layer.blocks * (depth * 16 * 4 + 4) + 5 * 4
    assert found.speedup is None and "not measured" in found.reason


def test_amounts_count_or_part(extension):
    def kept(amount, **options):
        layer = nn.Linear(32, 32)
        layer.weight.data.copy_(randn(32, 32))
        fastnn.sparsify_(layer, Sparsify(amount, **options))
        return layer

    assert kept(3).blocks == 16 - 3 and kept(0.5).blocks == 8 and kept(0.999).blocks == 1, "the best block stays"
    per_strip = kept(6, scope="output")
    assert per_strip.starts.tolist() == [0, 2, 4]
    rows = kept(0.75, unit="weight", scope="output")
    assert (rows.weight != 0).sum(1).tolist() == [8] * 32
    for amount in (1.0, -0.1, -1, True, float("nan"), "0.5", None):
        with pytest.raises(ValueError, match="amount must be a fraction"):
            Sparsify(amount)
    for wrong in ({"unit": "row"}, {"importance": "l1"}, {"scope": "model"}, {"depth": 3}):
        with pytest.raises(ValueError, match=f"fastnn.Sparsify: {next(iter(wrong))} must be one of"):
            Sparsify(**wrong)
    with pytest.raises(ValueError, match="cannot take 16 of the 16 blocks"):
        kept(16)
    assert json.loads(json.dumps(Sparsify(5).to_json()))["amount"] == 5


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_single_weights_are_those_that_torch_takes(extension, scope):
    ours = nn.Sequential(nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 7))
    ours[2].weight.data *= 0.9
    theirs = copy.deepcopy(ours)
    report = fastnn.sparsify_(ours, Sparsify(0.6, unit="weight", scope=scope))
    if scope == "global":
        prune.global_unstructured([(theirs[0], "weight"), (theirs[2], "weight")], prune.L1Unstructured, amount=0.6)
    else:
        for layer in (theirs[0], theirs[2]):
            prune.l1_unstructured(layer, "weight", 0.6)
    for a, b in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    x = randn(5, 24)
    assert torch.equal(ours(x), theirs(x))
    first = entry(report, "0")
    assert "no faster, no smaller" in first.reason and first.became == "Linear, masked" and first.speedup is None
    assert first.bytes_after == 2 * first.bytes_before, "the mask is counted"


def test_wanda_ranks_by_weight_and_input(extension):
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 33))
    batches = [randn(9, 12, seed=1) * torch.arange(12), {"input": randn(2, 5, 12, seed=2)}]
    rows = torch.cat([batches[0], batches[1]["input"].reshape(-1, 12)])
    norms = {"0": rows.norm(dim=0), "2": model[1](model[0](rows)).norm(dim=0).detach()}
    twin = copy.deepcopy(model).train()
    before = state_of(twin)
    for name, layer in (("0", model[0]), ("2", model[2])):
        masked = copy.deepcopy(twin)
        fastnn.sparsify_(
            masked, {name: Sparsify(0.5, "weight", "wanda", "output")}, calibration=(batch for batch in batches)
        )
        assert all(module.training for module in masked.modules())
        worth = (layer.weight * norms[name]).abs()
        expected = (
            worth >= worth.median(1, keepdim=True).values
            if worth.shape[1] % 2
            else worth > worth.sort(1)[0][:, worth.shape[1] // 2 - 1 : worth.shape[1] // 2]
        )
        assert torch.equal(masked.get_submodule(name).weight_mask.bool(), expected)
        assert not torch.equal(expected, layer.weight.abs() > layer.weight.abs().median(1, keepdim=True).values)
        blocks = copy.deepcopy(twin)
        fastnn.sparsify_(blocks, {name: Sparsify(4, importance="wanda")}, calibration=batches)
        by_hand = blocks_by_hand(layer.weight.detach(), 4, norms[name])
        kept = by_hand > by_hand.flatten().sort().values[3]
        assert torch.equal(
            blocks.get_submodule(name).dense() != 0,
            kept.repeat_interleave(16, 0).repeat_interleave(4, 1)[: worth.shape[0], : worth.shape[1]],
        )
    assert untouched(twin, before) and twin.training


def test_global_ranks_layers_together_and_leaves_each_something(extension):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight.data *= 1e-3
    report = fastnn.sparsify_(model, {"2": None, "*": Sparsify(0.5, scope="global")})
    assert [e.kept for e in report.entries] == [15, 1, 0] and type(model[2]) is nn.Linear
    with pytest.raises(ValueError, match=r"cannot take 31 of the 32 blocks of all layers, 2 of which must stay"):
        fastnn.sparsify_(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), Sparsify(31, scope="global"))


# ---- which layers


def test_every_layer_is_named(net):
    report = fastnn.sparsify_(net, Sparsify(0.5))
    assert [e.name for e in report.entries] == [
        "embed", "body.0", "body.2", "attention.out_proj", "unused", "head",
    ]  # fmt: skip
    assert [e.name for e in report.sparsified] == ["body.0", "body.2", "unused"]
    assert "takes no Embedding" in entry(report, "embed").reason
    assert "subclass of Linear" in entry(report, "attention.out_proj").reason
    assert "shares its weight with embed" in entry(report, "head").reason
    assert net.body[2].activation == "relu" and bool((net.body[2](randn(5, 36)) >= 0).all())
    text = str(report)
    assert all(e.name in text for e in report.entries) and "amount=0.5" in text and "3 of 6" in text
    held = (40 * 16 + 16 * 16 + 2 * 16 * 36 + 16 * 16) * 4
    assert report.bytes_before == held and report.bytes_after < held
    again = fastnn.sparsify_(net, Sparsify(0.5))
    assert again.sparsified == () and entry(again, "body.0").reason == "is block-sparse already"
    assert again.bytes_before == again.bytes_after == report.bytes_after


def test_names_choose(net):
    report = fastnn.sparsify_(copy.deepcopy(net), Sparsify(), include="body.*", exclude="*.2")
    assert [e.name for e in report.sparsified] == ["body.0"]
    report = fastnn.sparsify_(copy.deepcopy(net), Sparsify(), lambda module, name: module.in_features == 36)
    assert [e.name for e in report.sparsified] == ["body.2"]
    before = state_of(net)
    for wrong in ({"include": "bodi.*"}, {"exclude": ["no.such"]}):
        with pytest.raises(ValueError, match=r"matches no layer"):
            fastnn.sparsify_(net, Sparsify(), **wrong)
    for config in ("0.5", {"body.*": 0.5}, Sparsify):
        with pytest.raises(TypeError, match="config must"):
            fastnn.sparsify_(net, config)
    with pytest.raises(ValueError, match="max_slowdown must be above 0"):
        fastnn.sparsify_(net, Sparsify(), max_slowdown=0)
    with pytest.raises(ValueError, match="needs calibration="):
        fastnn.sparsify_(net, Sparsify(importance="wanda"))
    with pytest.raises(ValueError, match="nothing in the configuration asks"):
        fastnn.sparsify_(net, Sparsify(), calibration=[IDS])
    with pytest.raises(ValueError, match="calibration has no inputs"):
        fastnn.sparsify_(net, Sparsify(importance="wanda"), calibration=[])
    with pytest.raises(IndexError):  # the model's own
        fastnn.sparsify_(net, Sparsify(), example_inputs=IDS + 100)
    with pytest.raises(TypeError, match="must be a torch"):
        fastnn.sparsify_([net], Sparsify())
    assert untouched(net, before)


def test_what_cannot_be_made_sparse_says_why(extension):
    model = nn.ModuleDict(
        {
            "wide": nn.Linear(16, 16, dtype=torch.float64),
            "empty": nn.Linear(16, 16, device="meta"),
            "nan": nn.Linear(16, 16),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
            "int8": nn.Linear(16, 16),
            "conv": nn.Conv2d(3, 3, 3),
            "biased": nn.Linear(16, 16),
        }
    )
    model["nan"].weight.data[0, 0] = float("nan")
    prune.l1_unstructured(model["biased"], "bias", 0.5)
    fastnn.quantize_(model, fastnn.Int8Dynamic(), include="int8")
    report = fastnn.sparsify_(model, Sparsify())
    assert report.sparsified == ()
    reasons = {e.name: e.reason for e in report.entries if "parametrizations" not in e.name}
    said = ("float64", "on meta", "NaN", "computed", "quantised", "takes no Conv2d", "bias is computed")
    assert all(part in reasons[name] for part, name in zip(said, model, strict=True)), reasons
    unasked = fastnn.sparsify_(nn.Linear(16, 16), Sparsify(importance="wanda"), lambda *_: False, calibration=[0])
    assert unasked.sparsified == ()
    net = Net()
    report = fastnn.sparsify_(net, Sparsify(importance="wanda"), calibration=[IDS])
    assert entry(report, "unused").reason == "not run by the calibration"
    assert entry(fastnn.sparsify_(net.unused, Sparsify(0.01)), "").reason == "the amount takes nothing of it"


def test_a_layer_that_would_be_slower_stays(net, monkeypatch):
    """By the times that were measured: as it is, packed, with blocks."""
    monkeypatch.setattr(layers, "medians", lambda calls, x: (1.0, 0.5, 2.0 if x.shape[-1] == 36 else 0.8))
    held = net.body[2].weight
    report = fastnn.sparsify_(net, Sparsify(), example_inputs=IDS)
    assert net.body[2].weight is held and "2.00 times as long" in entry(report, "body.2").reason
    first = entry(report, "body.0")
    assert (first.ms_before, first.ms_packed, first.ms_after, first.input_shape) == (1.0, 0.5, 0.8, (3, 10, 16))
    assert first.speedup == 1 / 0.8 and "packed dense layer is faster" in first.reason
    assert entry(report, "unused").reason == "not run by the example" and entry(report, "body.2").ms_after == 2.0
    assert fastnn.sparsify_(net, Sparsify(), example_inputs=IDS, max_slowdown=2.0).sparsified


def test_times_are_those_of_the_layers(net):
    """The three that are compared, on the input that the layer gets."""
    found = entry(fastnn.sparsify_(net, Sparsify(), example_inputs=IDS, max_slowdown=1e9), "body.0")
    assert found.input_shape == (3, 10, 16) and min(found.ms_before, found.ms_packed, found.ms_after) > 0


def test_tied_layers_share_what_becomes_of_them(extension):
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in "abc"})
    model.b.weight = model.a.weight
    report = fastnn.sparsify_(model, Sparsify(0.5))
    assert model.a.values is model.b.values and model.a.columns is model.b.columns
    assert model.a.bias is not model.b.bias and model.c.values is not model.a.values
    assert entry(report, "b").bytes_before == entry(report, "b").bytes_after == 0
    tied = nn.ModuleDict({name: nn.Linear(32, 32) for name in "ab"})
    tied.b.weight = tied.a.weight
    with pytest.raises(ValueError, match="a and b share a weight, but not a configuration"):
        fastnn.sparsify_(tied, {"a": Sparsify(0.5), "b": Sparsify(0.6)})
    prune.l1_unstructured(tied.b, "weight", 0.5)
    assert fastnn.sparsify_(tied, Sparsify(0.5)).sparsified == ()


def test_tied_head_is_untied_only_by_name(net):
    table = net.embed.weight.detach().clone()
    report = fastnn.sparsify_(net, Sparsify(0.5), include="head")
    assert isinstance(net.head, BlockSparseLinear) and "no longer tied to embed" in entry(report, "head").reason
    assert torch.equal(net.embed.weight, table)


def test_a_parameter_of_the_model_is_a_tie_too(net):
    net.table = net.body[0].weight
    report = fastnn.sparsify_(net, Sparsify(0.5))
    assert "shares its weight with table" in entry(report, "body.0").reason and net.body[0].weight is net.table


def test_tied_head_stripped_of_its_mask_leaves_the_table(net):
    table = net.embed.weight.detach().clone()
    fastnn.sparsify_(net, Sparsify(0.5, "weight"), include="head")
    assert fastnn.strip_(net) == ("head.weight",)
    assert torch.equal(net.embed.weight, table) and int((net.head.weight == 0).sum()) == 320


# ---- the model lives on


def test_sparse_layers_are_copied_pickled_and_run(net):
    calls = []
    net.body[0].register_forward_hook(lambda *_: calls.append(1))
    bias, module = net.body[0].bias, net.body[0]
    fastnn.sparsify_(net, Sparsify(0.5))
    assert net.body[0] is module and module.bias is bias and not module.training
    expected = net(IDS)
    assert len(calls) == 1
    module._forward_hooks.clear()
    fast = copy.deepcopy(net)
    fastnn.accelerate(fast)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fast):
        assert torch.allclose(other(IDS), expected, atol=1e-5)
    net(IDS).sum().backward()
    assert module.values.grad is not None and bias.grad is not None


def test_accelerated_models_become_sparse(net):
    fastnn.accelerate(net)
    fastnn.sparsify_(net, Sparsify(0.5))
    first, last, x = net.body[0], net.body[2], randn(3, 16)
    middle = nn.functional.gelu(nn.functional.linear(x, first.dense(), first.bias))
    assert torch.allclose(net.body(x), nn.functional.linear(middle, last.dense(), last.bias).relu(), atol=1e-5)
    assert "packed" not in vars(net.body[0])


def test_torchs_encoder_layer_runs(extension):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = randn(2, 5, 16)
    fastnn.sparsify_(encoder, Sparsify(0.01), include="*.linear?")
    expected = encoder(x)
    fastnn.sparsify_(encoder, Sparsify(1), include="*.linear?")
    with torch.inference_mode():
        assert not torch.equal(encoder(x), expected)
    assert sum(isinstance(m, BlockSparseLinear) for m in encoder.modules()) == 4


def test_blocks_of_codes(net, tmp_path):
    """The blocks that floating values would have kept, rounded; files, and back to floating weights."""
    tied = nn.Linear(16, 36)
    tied.weight = net.body[0].weight
    net.add_module("tied", tied)
    floats, x = copy.deepcopy(net), randn(3, 16)
    fastnn.sparsify_(floats, Sparsify(0.7), include=["body.*", "tied"])
    original = copy.deepcopy(net)
    report = fastnn.sparsify_(
        net, Sparsify(0.7, values="int8"), include=["body.*", "tied"], example_inputs=IDS, max_slowdown=1e9
    )
    first = net.body[0]
    assert isinstance(first, Int8BlockSparseLinear) and first.bias is not None
    assert same_bits(first.weight, Int8BlockSparseLinear.from_float(floats.body[0]).weight)
    assert first.weight is net.tied.weight and first.columns is net.tied.columns
    found = entry(report, "body.0")
    assert (found.became, found.kept) == ("Int8BlockSparseLinear", first.blocks) and found.speedup is not None
    assert found.bytes_after == first.blocks * (64 + 4) + 4 * len(first.starts) + 4 * 36
    assert entry(report, "tied").bytes_after == 0 and "not run by the example" in entry(report, "tied").reason
    again = fastnn.sparsify_(net, Sparsify(0.9), include="body.0")
    assert entry(again, "body.0").reason == "is block-sparse already"
    fastnn.save(net, tmp_path / "codes")
    for model in (original, copy.deepcopy(net)):
        fastnn.load(tmp_path / "codes", model)
        assert isinstance(model.body[0], Int8BlockSparseLinear) and model.body[0].weight is model.tied.weight
        assert same_bits(model.body(x), net.body(x)) and same_bits(model.tied(x), net.tied(x))
        assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), net.state_dict().values(), strict=True))
    expected = first.dequantized()
    assert set(fastnn.dequantize_(net)) == {"body.0", "body.2", "tied"}
    assert isinstance(net.body[0], nn.Linear) and same_bits(net.body[0].weight.detach(), expected)


def test_blocks_of_codes_that_cannot_be(extension, monkeypatch):
    for wrong in ({"depth": 2}, {"unit": "weight"}):
        with pytest.raises(ValueError, match='values="int8" needs unit="block" and a depth of 4, 8, 16'):
            Sparsify(values="int8", **wrong)
    with pytest.raises(ValueError, match="values must be one of"):
        Sparsify(values="int4")
    deep = nn.Linear(131073, 1)
    assert "may not fit 32 bits" in fastnn.sparsify_(deep, Sparsify(0.9, values="int8")).entries[0].reason

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.wo = nn.Linear(16, 16)

        def forward(self, x):
            return self.wo(x.to(self.wo.weight.dtype))

    model = Reader()
    (found,) = fastnn.sparsify_(model, Sparsify(0.5, values="int8")).entries
    assert found.became is None and "reads its weight's type" in found.reason and type(model.wo) is nn.Linear
    monkeypatch.setattr("fastnn.sparse.layers.medians", lambda calls, x: (1.0, 0.5, 1.5))
    layer = nn.Linear(16, 16)
    (slow,) = fastnn.sparsify_(layer, Sparsify(0.5, values="int8"), example_inputs=randn(2, 16)).entries
    assert slow.became is None and "would take 1.50 times as long" in slow.reason and type(layer) is nn.Linear


def test_files_keep_blocks(net, tmp_path):
    net.body[2].weight.requires_grad_(False)
    tied = nn.Linear(16, 36)
    tied.weight = net.body[0].weight
    net.add_module("tied", tied)
    fastnn.sparsify_(net, Sparsify(0.7), include=["body.*", "tied"])
    fastnn.save(net, tmp_path / "net.safetensors")
    other = Net().eval()
    other.add_module("tied", nn.Linear(16, 36))
    other.body[2].weight.requires_grad_(False)
    before = state_of(other)
    data = bytearray((tmp_path / "net.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(FormatError):
        fastnn.load(tmp_path / "bad", other)
    wrong = Net()
    wrong.add_module("tied", nn.Linear(16, 35))
    with pytest.raises(RuntimeError, match=r"tied.weight is \(36, 16\) in the file, \(35, 16\) in the model"):
        fastnn.load(tmp_path / "net.safetensors", wrong)
    assert untouched(other, before)
    fastnn.load(tmp_path / "net.safetensors", other)
    assert same_bits(other(IDS), net(IDS)) and other.tied.values is other.body[0].values
    assert [p.requires_grad for p in (other.body[0].values, other.body[2].values)] == [True, False]
    assert other.body[2].activation == "relu"
    fastnn.load(tmp_path / "net.safetensors", other)  # into one that is sparse already
    assert same_bits(other(IDS), net(IDS))
    half = Net().bfloat16()
    half.add_module("tied", nn.Linear(16, 36).bfloat16())
    assert fastnn.load(tmp_path / "net.safetensors", half).body[0].values.dtype == torch.bfloat16
    sparser = fastnn.load(tmp_path / "net.safetensors")
    assert sparser["body.0.columns"].dtype == torch.int32


# ---- masks


def test_masks_of_torchs_are_read(extension):
    layer, twin = nn.Linear(32, 32), nn.Linear(32, 32)
    mask = torch.ones(32, 32)
    mask[:16, :12] = 0  # three blocks, and a part of one that is worth much
    mask[0, 12] = 0
    for one in (layer, twin):
        one.weight.data.copy_(randn(32, 32))[:16, :16] *= 100
        prune.custom_from_mask(one, "weight", mask)
    fastnn.sparsify_(twin, Sparsify(2))
    assert twin.blocks == 16 - 3, "what is gone stays gone"
    weight = layer.weight.detach().clone()
    report = fastnn.sparsify_(layer, Sparsify(5))
    assert layer.blocks == 16 - 5 and not hasattr(layer, "weight_orig") and not layer._forward_pre_hooks
    left = layer.dense() != 0
    assert torch.equal(layer.dense(), weight * left) and not left[:16, :12].any() and left[1:16, 12:16].all()
    assert "1 weights that a mask had taken" in report.entries[0].reason
    assert set(dict(layer.named_parameters())) == {"values", "bias"} and set(dict(layer.named_buffers())) == {
        "columns",
        "starts",
    }


def test_masks_add_up_and_are_stripped(extension):
    layer = nn.Linear(8, 8)
    held = layer.weight
    prune.random_unstructured(layer, "weight", 20)
    gone = layer.weight_mask == 0
    fastnn.sparsify_(layer, Sparsify(40, "weight"))
    assert layer.weight_orig is held and int((layer.weight_mask == 0).sum()) == 40
    assert not layer.weight_mask[gone].any() and torch.equal(layer.weight, held * layer.weight_mask)
    prune.l1_unstructured(layer, "weight", 4)  # theirs goes on where ours stopped
    assert int((layer.weight_mask == 0).sum()) == 44
    prune.l1_unstructured(layer, "bias", 2)
    x, before = randn(3, 8), layer.weight_mask.clone()
    expected = layer(x)
    assert sorted(fastnn.strip_(layer)) == ["bias", "weight"]
    assert layer.weight is held and torch.equal(layer.weight != 0, before.bool()) and torch.equal(layer(x), expected)
    assert sorted(layer.state_dict()) == ["bias", "weight"] and not layer._forward_pre_hooks
    assert fastnn.strip_(layer) == ()


def test_shared_masks_are_stripped_together(extension):
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "ab"})
    held = model.b.weight = model.a.weight
    fastnn.sparsify_(model, Sparsify(0.5, "weight"))
    fastnn.strip_(model)
    assert model.a.weight is model.b.weight is held and int((held == 0).sum()) == 32


# ---- while training


def train(model, optimizer, x, y):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("unit", ["block", "weight"])
def test_sparsity_grows_by_the_cubic_schedule(extension, unit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    held = model[0].weight
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    gradual = GradualSparsifier(model, Sparsify(0.75, unit), include="0", begin=2, end=12, every=4)
    optimizer.register_step_post_hook(gradual)
    x, y = randn(16, 64), randn(16, 8)
    units, gone, earlier = (64 if unit == "block" else 4096), [], torch.zeros(64, 64, dtype=torch.bool)
    for _ in range(14):
        train(model, optimizer, x, y)
        zeros = model[0].weight_mask == 0
        assert bool(zeros[earlier].all()), "what is gone stays gone"
        earlier = zeros
        gone.append(int(zeros.sum()) * units // 4096)
    parts = {2: 0.0, 6: 0.4, 10: 0.8, 12: 1.0}
    due = {n: round(0.75 * (1 - (1 - part) ** 3) * units) for n, part in parts.items()}
    assert gone == [0, 0, 0, 0, 0] + [due[6]] * 4 + [due[10]] * 2 + [due[12]] * 3
    assert gradual.progress == 1 and model[0].weight_orig is held
    expected, dense = model(x), model[0].weight.detach().clone()
    report = gradual.strip_(x, max_slowdown=1e9)
    assert torch.allclose(model(x), expected, atol=1e-5) and entry(report, "2").reason == "not among those included"
    if unit == "block":
        assert isinstance(model[0], BlockSparseLinear) and model[0].blocks == units - due[12]
        assert torch.equal(model[0].dense(), dense) and entry(report, "0").ms_after > 0
    else:
        assert model[0].weight is held and torch.equal(held, dense) and entry(report, "0").became == "Linear, zeros"
        assert entry(report, "0").bytes_before == 2 * entry(report, "0").bytes_after
    before = state_of(model)
    gradual.step()
    assert untouched(model, before)


def test_a_schedule_goes_on_after_a_stop(extension):
    x, y = randn(16, 32), randn(16, 32)

    def make():
        torch.manual_seed(0)
        model = nn.Linear(32, 32)
        return model, GradualSparsifier(model, Sparsify(12), end=8, every=2), torch.optim.SGD(model.parameters(), 0.1)

    def go(model, gradual, optimizer, steps):
        for _ in range(steps):
            train(model, optimizer, x, y)
            gradual.step()

    whole, first, second = make(), make(), make()
    go(*whole, 8)
    go(*first, 5)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    go(*second, 3)
    assert same_bits(whole[0].weight, second[0].weight) and int((second[0].weight_mask == 0).sum()) == 12 * 64
    early = make()
    go(*early, 5)
    early[1].strip_()
    assert early[0].blocks == 16 - round(12 * (1 - 0.5**3)), "what was gone by then"


def test_wanda_while_training_looks_at_the_inputs_of_now(extension):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    gradual = GradualSparsifier(
        model, Sparsify(2, importance="wanda"), include="1", end=1, calibration=iter([randn(4, 16)])
    )
    with torch.no_grad():
        model[0].weight[8:], model[0].bias[8:] = 0, 0  # only now its columns say nothing
    gradual.step()
    assert not model[1].weight_mask[:, 8:].any() and model[1].weight_mask[:, :8].all()
    gradual.strip_()
    assert model[1].columns.tolist() == [0, 1]


def test_slower_layers_stay_dense_with_zeros(extension, monkeypatch):
    monkeypatch.setattr(layers, "medians", lambda calls, x: (1.0, 1.0, 2.0))
    layer = nn.Linear(32, 32)
    held, gradual = layer.weight, GradualSparsifier(layer, Sparsify(8), end=1)
    gradual.step()
    report = gradual.strip_(randn(2, 32))
    assert "2.00 times" in report.entries[0].reason and layer.weight is held and int((held == 0).sum()) == 8 * 64


def test_schedules_that_cannot_be_are_refused(extension):
    model = nn.Linear(32, 32)
    before = state_of(model)
    for steps in ({"end": 0}, {"begin": -1, "end": 3}, {"begin": 3, "end": 3}, {"end": 3, "every": 0}):
        with pytest.raises(ValueError, match="0 <= begin < end and every >= 1"):
            GradualSparsifier(model, Sparsify(), **steps)
    with pytest.raises(TypeError, match="end must be an int"):
        GradualSparsifier(model, Sparsify(), end=2.5)
    with pytest.raises(ValueError, match="cannot take 16"):
        GradualSparsifier(model, Sparsify(16), end=2)
    with pytest.raises(TypeError, match="config must"):
        GradualSparsifier(model, 0.5, end=2)
    assert untouched(model, before)


# ---- advice


def test_advice_says_what_was_measured(extension, monkeypatch):
    shapes = []

    def times(calls, x):
        shapes.append((x.shape, [tuple(call(x).shape) for call in calls]))
        return ({1: 1.0, 3: 3.0, 5: 5.5}.get(len(shapes), 4.0), 5.0, 6.0) if x.shape[0] == 1 else (9.0, 5.0, 6.0)

    monkeypatch.setattr(breakeven, "medians", times)
    layer = fastnn.nn.Linear(40, 24, activation="gelu")
    found = fastnn.sparse.advise(layer, [1, 3], densities=[0.2, 0.5, 0.9, 1.0])
    assert shapes[:2] == [((1, 40), [(1, 24)] * 3), ((3, 40), [(3, 24)] * 3)]
    assert [(p.batch, p.density, p.ms_sparse) for p in found.points] == [
        (1, 0.2, 1.0), (1, 0.5, 3.0), (1, 0.9, 5.5), (1, 1.0, 4.0),
        (3, 0.2, 9.0), (3, 0.5, 9.0), (3, 0.9, 9.0), (3, 1.0, 9.0),
    ]  # fmt: skip
    assert found.break_even(1) == 0.5 and found.break_even(3) is None
    text = str(found)
    assert "up to 50% of the blocks" in text and "batch 3: faster than both dense layers at no density" in text
    with pytest.raises(ValueError, match="batch 2 was not measured"):
        found.break_even(2)
    made = BlockSparseLinear.from_dense(randn(24, 40))
    assert fastnn.sparse.advise(made, 1, densities=[0.5]).out_features == 24
    for wrong in ({"batch": 0}, {"batch": []}, {"densities": [0.0]}, {"depth": 5}):
        with pytest.raises(ValueError, match=r"batch must|densities must|depth must"):
            fastnn.sparse.advise(layer, **{"batch": 1, **wrong})
    with pytest.raises(TypeError, match="must be a dense layer, got ReLU"):
        fastnn.sparse.advise(nn.ReLU(), 1)
    for strange in (nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="no kernel for the layer"):
            fastnn.sparse.advise(strange, 1)


def test_advice_is_measured(extension):
    found = fastnn.sparse.advise(nn.Linear(64, 64), 2, densities=[0.25])
    (point,) = found.points
    assert point.density == 0.25 and min(point.ms_sparse, point.ms_packed, point.ms_torch) > 0
    assert found.threads == torch.get_num_threads() and "64 -> 64" in str(found)


class Conv1D(nn.Module):
    """As transformers', whose import takes seconds."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(randn(20, 36)), nn.Parameter(randn(36))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_conv1d_is_taken(extension):
    conv1d, masked, x = Conv1D(), Conv1D(), randn(4, 20)
    worth = blocks_by_hand(conv1d.weight.detach().t(), 4)
    fastnn.sparsify_(conv1d, Sparsify(7), example_inputs=x, max_slowdown=1e9)
    kept = worth > worth.flatten().sort().values[6]
    every = kept.repeat_interleave(16, 0).repeat_interleave(4, 1)[:36]
    assert torch.equal(conv1d.dense(), masked.weight.t() * every)
    assert torch.allclose(conv1d(x), x @ conv1d.dense().t() + conv1d.bias, atol=1e-5)
    fastnn.sparsify_(masked, Sparsify(10, "weight", scope="output"))
    assert (masked.weight_mask == 0).sum(0).tolist() == [10] * 36
    assert fastnn.sparse.advise(masked, 1, densities=[1.0]).out_features == 36
