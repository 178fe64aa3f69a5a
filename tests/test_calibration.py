"""quantize_ with a calibration: GPTQ, SmoothQuant, blocks one at a time, going on after a stop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastnn
from fastnn.ops.groups import dequantize_groups, quantize_groups
from fastnn.quant import checkpoint
from fastnn.quant import gptq as gptq_module
from fastnn.quant.gptq import factor, gptq, output_error
from fastnn.quant.smooth import scales
from fastnn.testing import same_bits

GPTQ4 = fastnn.Int4WeightOnly(8, rounding=fastnn.Gptq())
SMOOTH = fastnn.Int8Dynamic(smooth=fastnn.SmoothQuant())


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows, columns, seed=0):
    """Inputs that go together, with columns of unlike sizes."""
    mixed = randn(rows, 6, seed=seed) @ randn(6, columns, seed=seed + 1) + 0.2 * randn(rows, columns, seed=seed + 2)
    return mixed * torch.linspace(0.2, 3, columns)


# ---- GPTQ itself


@pytest.mark.parametrize("symmetric", (True, False), ids=("symmetric", "offsets"))
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("group_size", (16, 12, 100))
def test_gptq_beats_rounding_to_nearest(bits, symmetric, group_size):
    """On the inputs and on others like them; 12 leaves a group of 4 at the end, 100 is one group."""
    if bits == 8 and not symmetric:
        pytest.skip("codes of 8 bits have no offset")
    weight, data = randn(24, 40, seed=9), correlated(450, 40)
    x, others = data[:300], data[300:]
    found = {}
    for ordered in (True, False):
        done = gptq(weight, x.t() @ x, group_size, bits, symmetric, fastnn.Gptq(activation_order=ordered))
        values = dequantize_groups(*done.parts, 40, group_size, torch.float32)
        near = quantize_groups(weight, group_size, bits=bits, symmetric=symmetric)
        nearest = dequantize_groups(*near, 40, group_size, torch.float32)
        assert torch.equal(done.parts[1], near[1]) and done.remark == ""
        for rows in (x, others):
            truth = rows @ weight.t()
            lost, most = ((rows @ one.t() - truth).norm() / truth.norm() for one in (values, nearest))
            assert lost < 0.8 * most
            if rows is x:
                assert float(lost) == pytest.approx(done.error, rel=1e-2)
                assert float(most) == pytest.approx(done.nearest, rel=1e-2)
        found[ordered] = done
    assert found[True].error < found[False].error, "columns of unlike sizes: the order matters"


def test_blocks_of_columns_do_not_change_the_result():
    weight, x = randn(10, 40, seed=3), correlated(200, 40)
    codes = [gptq(weight, x.t() @ x, 16, 4, True, fastnn.Gptq(block_size=n)).parts[0] for n in (1, 7, 40, 128)]
    assert all(torch.equal(codes[0], other) for other in codes[1:])


def test_the_last_column_takes_what_is_best_for_it():
    """The definition, for two columns: the second makes up for the first's error as least squares would have it."""
    weight, x = torch.tensor([[0.4, -7.0]]), randn(50, 2) @ torch.tensor([[3.0, 2.0], [0.0, 0.5]])
    gram = x.t() @ x
    done = gptq(weight, gram, 2, 4, True, fastnn.Gptq(activation_order=False, damping=1e-9))
    step = done.parts[1].float().item()
    first = round(weight[0, 0].item() / step) * step
    best = weight[0, 1] + (weight[0, 0] - first) * gram[0, 1] / gram[1, 1]
    wanted = torch.tensor([[first, float((best / step).round().clamp(-8, 7) * step)]])
    assert torch.allclose(dequantize_groups(*done.parts, 2, 2, torch.float32), wanted)


def test_factor_is_that_of_the_inverse():
    x = correlated(60, 20).double()
    gram = x.t() @ x
    upper, damping = factor(gram, 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    assert damping == 0.01 and torch.equal(upper, upper.triu())
    assert torch.allclose(upper.t() @ upper @ damped, torch.eye(20, dtype=torch.float64), atol=1e-8)


def test_more_damping_and_none_are_said():
    weight = randn(4, 16)
    bad = randn(40, 16).t() @ randn(40, 16)
    bad = bad - 0.2 * bad.diagonal().mean() * torch.eye(16)  # as rounding may leave it: not positive definite
    done = gptq(weight, bad, 8, 4, True, fastnn.Gptq())
    assert done.remark.startswith("damping ") and float(done.remark.split()[1]) > 0.01
    zero = gptq(weight, torch.zeros(16, 16), 8, 4, True, fastnn.Gptq())
    assert "no damping" in zero.remark and torch.equal(zero.parts[0], quantize_groups(weight, 8)[0])


def test_never_worse_than_nearest(monkeypatch):
    weight, x = randn(4, 16), randn(40, 16)
    monkeypatch.setattr(gptq_module, "_codes", lambda *args: torch.zeros(4, 16))
    done = gptq(weight, x.t() @ x, 8, 4, True, fastnn.Gptq())
    assert "did not better" in done.remark and done.error == done.nearest
    assert torch.equal(done.parts[0], quantize_groups(weight, 8)[0])
    assert output_error(weight, weight, x.t() @ x) == 0


# ---- models


class Block(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.norm, self.up, self.down = norm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gate = nn.Linear(width, 2 * width)

    def forward(self, x, scale, bias=None):
        y = self.norm(x)
        return x + scale * self.down(torch.relu(self.up(y)) * self.gate(y)), bias


class Net(nn.Module):
    """Embedding, blocks that take a second argument and give a tuple, a norm and a head."""

    def __init__(self, norm=nn.LayerNorm, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(Block(16, norm) for _ in range(blocks))
        self.norm, self.head, self.unused = norm(16), nn.Linear(16, 8), nn.Linear(16, 16)
        with torch.no_grad():
            for module in self.modules():
                if type(module) is norm:
                    module.weight.copy_(torch.linspace(0.05, 8, 16)[torch.randperm(16)])
                    if norm is nn.LayerNorm:
                        module.bias.copy_(randn(16))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x, _ = block(x, 0.5, bias=None)
        return self.head(self.norm(x))


SAMPLES = [(torch.arange(30).view(3, 10) * (i + 3) + i) % 40 for i in range(4)]


@pytest.fixture
def net(extension):
    return Net().eval()


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def entry(report, name):
    return next(e for e in report.entries if e.name == name)


def test_every_layer_is_decided_on_and_named(net):
    before = net(SAMPLES[0]).detach()
    near = copy.deepcopy(net)
    fastnn.quantize_(near, fastnn.Int4WeightOnly(8))
    report = fastnn.quantize_(net, GPTQ4, calibration=iter(SAMPLES))
    assert "4 samples, block by block along blocks (3)" in report.calibration and report.calibration in str(report)
    for e in report.quantized:
        if e.name in ("embed", "unused"):
            assert e.error is None
        else:
            assert 0 < e.error < e.error_nearest < 0.5, e.name
    assert "not run by the calibration" in entry(report, "unused").reason and "error, nearest" in str(report)
    assert entry(report, "blocks.1.up").bytes_after == near.blocks[1].up.code_bytes
    assert torch.equal(net.embed.weight, near.embed.weight) and torch.equal(net.unused.weight, near.unused.weight)
    assert not torch.equal(net.blocks[1].up.weight, near.blocks[1].up.weight)
    lost, most = ((m(SAMPLES[0]).detach() - before).norm() / before.norm() for m in (net, near))
    assert lost < most


def inputs_of(model, name):
    """All rows that a layer gets from the samples."""
    gathered = []
    with model.get_submodule(name).register_forward_pre_hook(lambda _, args: gathered.append(args[0].detach())):
        for sample in SAMPLES:
            model(sample)
    return [x.reshape(-1, x.shape[-1]) for x in gathered]


@pytest.mark.parametrize("blocks", (None, ""), ids=("by block", "at once"))
def test_what_a_layer_is_decided_on(net, blocks):
    """GPTQ on the layer's own inputs: in the quantised model, or in one where all but the embedding is floating."""
    floats = copy.deepcopy(net)
    fastnn.quantize_(floats, fastnn.Int4WeightOnly(8), include="embed")
    fastnn.quantize_(net, GPTQ4, calibration=fastnn.Calibration(SAMPLES, blocks))
    for name in ("blocks.0.up", "blocks.2.up", "head"):
        gram = sum(x.t() @ x for x in inputs_of(net if blocks is None else floats, name))
        weight = floats.get_submodule(name).weight
        wanted = gptq(weight, gram, 8, 4, True, fastnn.Gptq())
        assert torch.equal(wanted.parts[0], net.get_submodule(name).weight), name


@pytest.mark.parametrize(
    "config",
    (fastnn.Int8WeightOnly(8, rounding=fastnn.Gptq()), fastnn.Int4Int8Dynamic(8, False, fastnn.Gptq()), SMOOTH),
    ids=str,
)
def test_saved_and_loaded_and_back_to_floats(net, config, tmp_path):
    floats = net(SAMPLES[1]).detach()
    fastnn.quantize_(net, config, calibration=SAMPLES)
    after = net(SAMPLES[1]).detach()
    assert 0 < (after - floats).norm() < 0.2 * floats.norm()
    fastnn.save(net, tmp_path / "net.safetensors")
    fresh = Net(blocks=3).eval()
    fastnn.load(tmp_path / "net.safetensors", fresh)
    assert same_bits(fresh(SAMPLES[1]).detach(), after)
    fastnn.dequantize_(net)
    assert (net(SAMPLES[1]).detach() - after).norm() < 0.05 * floats.norm()


@pytest.mark.parametrize("config", (GPTQ4, SMOOTH), ids=("gptq", "smooth"))
def test_going_on_after_a_stop_gives_the_same_bits(net, config, tmp_path, monkeypatch):
    whole, stopped = copy.deepcopy(net), state(net)
    first = fastnn.quantize_(whole, config, calibration=SAMPLES)
    stores = []

    def store(self, tensors, decided, original=checkpoint.Folder.store):
        if len(stores) == 2:
            raise KeyboardInterrupt
        stores.append(1)
        original(self, tensors, decided)

    options = fastnn.Calibration(SAMPLES, folder=tmp_path / "parts")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Folder, "store", store)
        with pytest.raises(KeyboardInterrupt):
            fastnn.quantize_(net, config, calibration=options)
    assert equal(state(net), stopped) and type(net.head) is nn.Linear, "untouched"
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["part-0000.safetensors", "part-0001.safetensors"]
    looked = []
    monkeypatch.setattr(checkpoint.Folder, "store", lambda self, *args: looked.append(self._file.name))
    second = fastnn.quantize_(net, config, calibration=options)
    assert looked == ["part-0002.safetensors", "part-0003.safetensors"]
    assert equal(state(net), state(whole)) and second.entries == first.entries


def test_another_runs_folder_is_refused(net, tmp_path):
    options = fastnn.Calibration(SAMPLES, folder=tmp_path)
    fastnn.quantize_(copy.deepcopy(net), GPTQ4, calibration=options)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.blocks[0].up.weight[0, 0] += 1
    cases = (
        (net, fastnn.Int4WeightOnly(16, rounding=fastnn.Gptq()), options),
        (net, GPTQ4, fastnn.Calibration(SAMPLES[1:], folder=tmp_path)),
        (other, GPTQ4, options),
    )
    for model, config, given in cases:
        before = state(model)
        with pytest.raises(ValueError, match="another model, configuration or calibration"):
            fastnn.quantize_(model, config, calibration=given)
        assert equal(state(model), before)


class Skipping(Net):
    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, 0.5)[0] + x
        return self.head(self.norm(x))


class Collecting(Net):
    def forward(self, ids):
        x = total = self.embed(ids)
        for block in self.blocks:
            x, _ = block(x, 0.5)
            total = total + x
        return self.head(self.norm(total))


def test_arguments_that_count_no_changes(extension):
    """A buffer made in inference mode: that a block writes to it would not be seen."""

    class Shifting(Net):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x, _ = block(x, 0.5, bias=self.shift)
            return self.head(self.norm(x))

    model = Shifting().eval()
    with torch.inference_mode():
        model.shift = torch.zeros(16)
    report = fastnn.quantize_(model, GPTQ4, calibration=SAMPLES)
    assert "all layers at once (blocks: a block is given an inference tensor" in report.calibration
    assert entry(report, "blocks.2.down").error < entry(report, "blocks.2.down").error_nearest


def test_a_model_without_a_chain_is_seen_at_once(extension):
    report = fastnn.quantize_(Collecting().eval(), GPTQ4, calibration=SAMPLES)
    assert "all layers at once (blocks: what a block gives is used elsewhere, too)" in report.calibration
    model = Skipping().eval()
    report = fastnn.quantize_(copy.deepcopy(model), GPTQ4, calibration=SAMPLES)
    assert "all layers at once (blocks: a block does not take what the one before gave)" in report.calibration
    assert entry(report, "blocks.2.down").error < entry(report, "blocks.2.down").error_nearest
    asked = fastnn.Calibration(SAMPLES, blocks="")
    report = fastnn.quantize_(Net().eval(), GPTQ4, calibration=asked)
    assert report.calibration.endswith("all layers at once")
    with pytest.raises(ValueError, match=r"cannot go along blocks = 'blocks': .*does not take"):
        fastnn.quantize_(model, GPTQ4, calibration=fastnn.Calibration(SAMPLES, blocks="blocks"))
    assert type(model.head) is nn.Linear
    mlp = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    report = fastnn.quantize_(mlp, GPTQ4, calibration=[(randn(5, 16),), {"input": randn(5, 16, seed=1)}])
    assert "along the model (3)" in report.calibration and len(report.quantized) == 2
    alone = nn.Linear(16, 16)
    assert fastnn.quantize_(alone, GPTQ4, calibration=[randn(9, 16)]).entries[0].error is not None


def test_calibration_leaves_the_rest_of_the_model_as_it_was(net):
    net.train()
    calls = []
    net.blocks[0].norm.register_forward_hook(lambda *_: calls.append(1))
    attributes = {name: sorted(vars(m)) for name, m in net.named_modules() if name in ("blocks", "blocks.0", "norm")}
    fastnn.quantize_(net, GPTQ4, calibration=SAMPLES)
    assert net.training and net.blocks[1].training and net.blocks[1].up.training and calls
    assert {name: sorted(vars(net.get_submodule(name))) for name in attributes} == attributes
    net(SAMPLES[0]).sum().backward()


def test_inference_mode_changes_nothing(net):
    other = copy.deepcopy(net)
    fastnn.quantize_(net, GPTQ4, calibration=SAMPLES)
    with torch.inference_mode():
        fastnn.quantize_(other, GPTQ4, calibration=[sample.clone() for sample in SAMPLES])
    assert equal(state(net), state(other))


def test_bad_samples_and_arguments_change_nothing(net):
    before = state(net)
    nan = fastnn.quantize_(copy.deepcopy(nn.Sequential(nn.Linear(4, 4))), GPTQ4, calibration=[randn(2, 4) / 0])
    assert "NaN or infinities" in nan.entries[0].reason
    for given, words in (([], "no inputs"), (None, "needs calibration=")):
        with pytest.raises(ValueError, match=words):
            fastnn.quantize_(net, GPTQ4, calibration=given)
    with pytest.raises(ValueError, match="nothing in the configuration asks"):
        fastnn.quantize_(net, fastnn.Int8Dynamic(), calibration=SAMPLES)
    with pytest.raises(IndexError):
        fastnn.quantize_(net, GPTQ4, calibration=[SAMPLES[0], torch.tensor([[99]])])
    assert equal(state(net), before) and type(net.head) is nn.Linear
    for wrong in ({"damping": 0}, {"damping": 1.0}, {"block_size": 0}, {"activation_order": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fastnn.Gptq(**wrong)
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            fastnn.SmoothQuant(alpha)
    with pytest.raises(TypeError, match=r"rounding must be a fastnn\.Gptq"):
        fastnn.Int4WeightOnly(rounding="gptq")
    with pytest.raises(TypeError, match=r"smooth must be a fastnn\.SmoothQuant"):
        fastnn.Int8Dynamic(smooth=0.5)


def test_progress_is_shown_when_asked(net, capsys):
    pytest.importorskip("rich")
    fastnn.quantize_(copy.deepcopy(net), GPTQ4, calibration=SAMPLES)
    assert capsys.readouterr().out == ""
    fastnn.quantize_(net, GPTQ4, calibration=fastnn.Calibration(SAMPLES, progress=True))
    assert "100%" in capsys.readouterr().out


def test_layers_that_share_codes_are_rounded_to_nearest(extension):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    report = fastnn.quantize_(model, GPTQ4, calibration=[randn(9, 16)])
    assert model[0].weight is model[1].weight
    assert all("other layers share its codes" in e.reason for e in report.entries)


# ---- SmoothQuant


def test_scales_are_the_papers():
    x, weights = (
        torch.tensor([8.0, 2.0, 0.0, 4.0]),
        [torch.tensor([[1.0, -4.0, 1.0, 0.0]]), torch.tensor([[2.0, 1, 1, 0]])],
    )
    assert torch.allclose(scales(x, weights, 0.5), torch.tensor([2.0, 0.5**0.5, 1.0, 1.0]))
    assert torch.allclose(scales(x, weights, 1.0), torch.tensor([8.0, 2.0, 1.0, 1.0]))
    assert torch.allclose(scales(x, weights, 0.0), torch.tensor([0.5, 0.25, 1.0, 1.0]))


@pytest.mark.parametrize("norm", (nn.LayerNorm, nn.RMSNorm))
def test_smoothing_leaves_the_function_and_betters_the_rounding(extension, norm):
    model = Net(norm).eval()
    plain, smooth = copy.deepcopy(model), copy.deepcopy(model)
    fastnn.quantize_(plain, fastnn.Int8Dynamic())
    norm_weight = smooth.blocks[0].norm.weight
    report = fastnn.quantize_(smooth, SMOOTH, calibration=SAMPLES)
    assert entry(report, "blocks.1.up").reason == entry(report, "blocks.1.gate").reason == "smoothed with blocks.1.norm"
    assert entry(report, "head").reason == "smoothed with norm"
    assert "not a norm's output" in entry(report, "blocks.0.down").reason
    assert "not run" in entry(report, "unused").reason
    assert smooth.blocks[0].norm.weight is norm_weight, "the same parameter"
    before, after = model.blocks[0].norm.weight, norm_weight
    for layer in ("up", "gate"):
        old = getattr(model.blocks[0], layer).weight
        new = getattr(smooth.blocks[0], layer).dequantized()
        assert ((after * new - before * old).abs() <= after * new.abs().amax(1, keepdim=True) / 253).all()
    truth = model(SAMPLES[0])
    lost, most = ((m(SAMPLES[0]) - truth).norm() for m in (smooth, plain))
    assert lost < 0.9 * most


def test_what_has_a_vector_is_no_norm_by_that(extension):
    """PReLU, with one slope or as many as there are columns: scaling these is no scaling of what it gives."""
    for slopes in (1, 16):
        model = nn.Sequential(nn.PReLU(slopes), nn.Linear(16, 16)).eval()
        report = fastnn.quantize_(model, SMOOTH, calibration=[randn(20, 16)])
        assert report.entries[0].reason.startswith("not smoothed") and model[0].weight.tolist() == [0.25] * slopes


def test_a_norm_that_others_use_is_left_alone(extension):
    class Post(nn.Module):
        """The norm's output is also what the next sum takes, as in BERT."""

        def __init__(self):
            super().__init__()
            self.norm, self.dense, self.last = nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16)

        def forward(self, x):
            y = self.norm(x)
            return self.last(y + self.dense(y))

    torch.manual_seed(0)
    model = Post()
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(0.1, 4, 16))
    before = model.norm.weight.detach().clone()
    report = fastnn.quantize_(model, SMOOTH, calibration=[randn(20, 16)])
    assert report.entries[0].reason == "not smoothed: what norm gives is used elsewhere, too"
    assert torch.equal(model.norm.weight, before)

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.gate = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.norm.weight.data.copy_(before)

        def forward(self, x):
            y = self.norm(x)
            return self.up(y) * self.gate(y)

    report = fastnn.quantize_(Gated(), {"up": SMOOTH, "*": None}, calibration=[randn(20, 16)])
    assert "used elsewhere" in entry(report, "up").reason, "the gate stays a float layer, and would be scaled"


def test_transformers_models_go_block_by_block(extension):
    """Blocks with masks, tables and (unless told not to) caches; weights that lie the other way round (Conv1D)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    cases = (
        (transformers.LlamaForCausalLM(llama), "model.layers (2)", "model.layers.1.mlp.up_proj"),
        (transformers.GPT2Model(gpt2), "h (2)", "h.1.mlp.c_fc"),
    )
    samples = [{"input_ids": (torch.arange(24).view(2, 12) * (i + 5)) % 60} for i in range(4)]
    for model, path, name in cases:
        model.eval()
        with torch.no_grad():
            for module in model.modules():
                if type(module).__name__ in ("LlamaRMSNorm", "LayerNorm"):
                    module.weight.copy_(torch.linspace(0.1, 4, 32))
            floats = model(**samples[0])[0]
            rounded, smoothed = copy.deepcopy(model), copy.deepcopy(model)
            report = fastnn.quantize_(rounded, GPTQ4, calibration=samples)
            assert f"block by block along {path}" in report.calibration
            assert entry(report, name).error < 0.9 * entry(report, name).error_nearest
            report = fastnn.quantize_(smoothed, SMOOTH, calibration=samples)
            assert entry(report, name).reason.startswith("smoothed with")
            for made, near in ((rounded, 0.3), (smoothed, 0.05)):
                assert (made(**samples[0])[0] - floats).norm() < near * floats.norm()
