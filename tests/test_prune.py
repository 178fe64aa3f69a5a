"""shrink_: what goes together, that what is left is the same function, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as masks

import fastnn
from fastnn import Shrink, shrink_
from fastnn.prune import PruneError, resize_
from fastnn.testing import assert_within_budget
from fastnn.testing.policy import FLOOR, FORWARD_FACTOR


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entry(report, name):
    (found,) = [one for one in report.entries if one.name == name]
    return found


def state_of(model):
    """Everything by which one could tell that a model was touched."""
    found = []
    for name, module in model.named_modules():
        found.append((name, type(module), {k: repr(v) for k, v in vars(module).items()}))
    held = [*model.named_parameters(), *model.named_buffers()]
    return found, [(n, id(t), t.shape, t.clone(), None if t.grad is None else t.grad.clone()) for n, t in held]


def assert_untouched(model, before):
    modules, tensors = state_of(model)
    assert modules == before[0]
    for (name, key, shape, value, grad), old in zip(tensors, before[1], strict=True):
        assert (name, key, shape) == old[:3] and torch.equal(value, old[3])
        assert (grad is None) == (old[4] is None) and (grad is None or torch.equal(grad, old[4]))


def assert_same_function(pruned, original, x):
    """`original` is hooked so that removed units contribute zero; both are held to the error policy."""
    with torch.no_grad():
        ours, rival, truth = pruned(x), original(x), copy.deepcopy(original).double()(x.double())
    assert truth.abs().max() > 1e-3
    assert_within_budget(ours, truth, rival, x.dtype, FORWARD_FACTOR, where="output")


class Random(nn.Module):
    """A random network of residual sums, branches, depthwise convolutions and a gate; it knows who makes what.

    `made` tells of each gate, an Identity before everything that reads its channels, which layer names the group.
    """

    ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.GELU, nn.Tanh)  # sigmoid(0) is not 0

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.draw = torch.Generator().manual_seed(seed)
        self.parts, self.plan, self.made = nn.ModuleDict(), [], {}
        width, current = self._convolution(3)
        for _ in range(self._pick(2, 4)):
            kind = ("plain", "residual", "depthwise", "branches")[self._pick(0, 3)]
            if kind == "residual":
                inner, _ = self._convolution(width)
                out = self._add(nn.Conv1d(inner, width, 1))
                norm = self._add(nn.BatchNorm1d(width))
                self.plan[-1] = ("residual", *self.plan[-1][1:], out, norm, self._gate(current))
            elif kind == "depthwise":
                layer = self._add(nn.Conv1d(width, width, 3, padding=1, groups=width))
                self.plan.append(("gated", (layer,), self._gate(current)))
            elif kind == "branches":
                ends = [self._convolution(width) for _ in range(2)]
                self.plan[-2:] = [("branches", *self.plan[-2:])]
                width, current = self._convolution(sum(end[0] for end in ends))
            else:
                width, current = self._convolution(width)
        hidden = self._pick(3, 6)
        self.flat = nn.Linear(width * 6, 2 * hidden)
        self.gated = nn.Identity()
        self.made["gated"] = "flat"
        self.head = nn.Linear(hidden, 4)
        for one in self.modules():
            if isinstance(one, nn.BatchNorm1d):
                for tensor in (one.weight, one.bias, one.running_mean):
                    nn.init.normal_(tensor, 0.5)
                nn.init.uniform_(one.running_var, 0.5, 2)

    def _pick(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.draw))

    def _add(self, module):
        name = f"p{len(self.parts)}"
        self.parts[name] = module
        return name

    def _gate(self, maker):
        name = self._add(nn.Identity())
        self.made[f"parts.{name}"] = maker
        return name

    def _convolution(self, into):
        width = self._pick(3, 7)
        layer = self._add(nn.Conv1d(into, width, 3, padding=1, bias=bool(self._pick(0, 1))))
        chain = (layer, self._add(nn.BatchNorm1d(width)), self._add(self.ACTIVATIONS[self._pick(0, 3)]()))
        self.plan.append(("gated", chain, self._gate(f"parts.{layer}")))
        return width, f"parts.{layer}"

    def _run(self, step, x):
        for name in (*step[1], step[2]):
            x = self.parts[name](x)
        return x

    def forward(self, x):
        for step in self.plan:
            if step[0] == "residual":
                _, chain, inner_gate, out, norm, gate = step
                y = self._run(("gated", chain, inner_gate), x)
                x = self.parts[gate](x + self.parts[norm](self.parts[out](y)))
            elif step[0] == "branches":
                x = torch.cat([self._run(step[1], x), self._run(step[2], x)], 1)
            else:
                x = self._run(step, x)
        a, b = self.flat(x.flatten(1)).chunk(2, -1)
        return self.head(self.gated(a * torch.sigmoid(b)))


def silence(model, report):
    """Multiplies every gate of a Random by which of its channels were kept."""
    for gate, maker in model.made.items():
        one = entry(report, maker)
        keep = torch.zeros(one.before).index_fill_(0, torch.tensor(one.kept), 1)
        model.get_submodule(gate).register_forward_hook(
            lambda _, __, y, keep=keep: y * keep.to(y.dtype).reshape(-1, *(1,) * (y.dim() - 2))
        )


@pytest.mark.parametrize("seed", range(24))
def test_random_networks_lose_contributions_and_nothing_else(seed):
    original, x = Random(seed).eval(), randn(3, 3, 6)
    pruned, fresh = copy.deepcopy(original), copy.deepcopy(original)
    report = shrink_(pruned, Shrink(0.2 + 0.1 * (seed % 5)), example_inputs=x)
    silence(original, report)
    assert_same_function(pruned, original, x)
    for one in report.shrunk:
        assert one.after == one.before - round((0.2 + 0.1 * (seed % 5)) * one.before)
    assert {entry(report, maker).kind for maker in original.made.values()} <= {"channels", "neurons"}
    assert entry(report, "head").reason == "it is an output of the model"
    resize_(fresh, json.loads(json.dumps(report.shapes)))
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh(x), pruned(x))
    assert str(fresh) == str(pruned)


def test_groups_lose_the_same_number_each():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 12, 1, groups=2)
            self.last = nn.Conv2d(12, 3, 1)

        def forward(self, x):
            return self.last(torch.relu(self.middle(torch.sigmoid(self.first(x)))))

    torch.manual_seed(0)
    original, x = Grouped(), randn(2, 2, 4, 4)
    pruned = copy.deepcopy(original)
    report = shrink_(pruned, Shrink(1), example_inputs=x)
    assert (entry(report, "first").before, entry(report, "middle").before) == (4, 6)
    assert (pruned.first.out_channels, pruned.middle.in_channels, pruned.middle.out_channels) == (6, 6, 10)
    for layer, gate, each in (("first", "middle", 4), ("middle", "last", 6)):
        kept = torch.tensor(entry(report, layer).kept)
        keep = torch.zeros(2, each).index_fill_(1, kept, 1).reshape(-1, 1, 1)
        original.get_submodule(gate).register_forward_pre_hook(lambda _, a, keep=keep: a[0] * keep.to(a[0]))
    assert_same_function(pruned, original, x)


class Attention(nn.Module):
    """Heads that share keys, written in the way of transformers, or with the number of heads in the shape."""

    def __init__(self, queries=6, keys=3, width=4, fixed=False):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim, self.fixed = queries, keys, width, fixed
        self.q, self.k, self.v = (nn.Linear(8, n * width) for n in (queries, keys, keys))
        self.o = nn.Linear(queries * width, 8)

    def forward(self, x):
        heads = [self.num_heads] + [self.num_key_value_heads] * 2 if self.fixed else [-1] * 3
        q, k, v = (
            layer(x).view(*x.shape[:2], n, self.head_dim).transpose(1, 2)
            for layer, n in zip((self.q, self.k, self.v), heads, strict=True)
        )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fixed", [False, True])
def test_heads_that_share_keys_go_together(fixed):
    torch.manual_seed(0)
    original, x = Attention(fixed=fixed), randn(2, 5, 8)
    pruned = copy.deepcopy(original)
    report = shrink_(pruned, Shrink(1), example_inputs=x)
    one = entry(report, "q")
    assert (one.kind, one.before, one.after) == ("heads", 3, 2)
    assert (pruned.num_heads, pruned.num_key_value_heads, pruned.head_dim) == (4, 2, 4)
    assert [m.weight.shape for m in (pruned.q, pruned.k, pruned.v, pruned.o)] == [(16, 8), (8, 8), (8, 8), (8, 16)]
    keep = torch.zeros(3, 2, 4).index_fill_(0, torch.tensor(one.kept), 1).flatten()
    original.o.register_forward_pre_hook(lambda _, a: a[0] * keep.to(a[0]))
    assert_same_function(pruned, original, x)


def test_tied_weights_stay_tied():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.back = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4, bias=False)
            self.again = self.second
            self.back.weight = nn.Parameter(self.first.weight.detach().t().clone())
            self.copy = nn.Linear(4, 6)
            self.copy.weight = self.first.weight

        def forward(self, x):
            y = torch.relu(self.first(x)) + torch.relu(self.copy(x))
            return self.back(self.again(torch.relu(self.second(y))))

    model, x = Twice(), randn(3, 4)
    report = shrink_(model, Shrink(2), example_inputs=x)
    assert model.copy.weight is model.first.weight and model.first.weight.shape == (4, 4)
    assert model.second.weight.shape == (4, 4) and model.copy.out_features == 4
    assert len(report.shrunk) == 1, "a layer that runs twice ties what it reads to what it makes"
    assert report.parameters_after == sum(p.numel() for p in model.parameters())


def test_parts_of_a_split_keep_one_size():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.left, self.right = nn.Linear(4, 12), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            a, b = torch.sigmoid(self.wide(x)).chunk(2, -1)
            return self.left(a) + self.right(b)

    torch.manual_seed(0)
    original, x = Halves(), randn(3, 4)
    pruned = copy.deepcopy(original)
    one = entry(shrink_(pruned, Shrink(2), example_inputs=x), "wide")
    assert (one.before, one.after, pruned.wide.out_features, pruned.right.in_features) == (6, 4, 8, 4)
    keep = torch.zeros(6).index_fill_(0, torch.tensor(one.kept), 1)
    for reader in (original.left, original.right):
        reader.register_forward_pre_hook(lambda _, a: a[0] * keep.to(a[0]))
    assert_same_function(pruned, original, x)


def test_the_width_of_an_embedding():
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(10, 8), nn.Tanh(), nn.Linear(8, 2)), torch.tensor([[1, 4, 9]])
    original = copy.deepcopy(model)
    one = entry(shrink_(model, Shrink(3), example_inputs=tokens), "0")
    assert model[0].embedding_dim == model[2].in_features == 5 and model[0].num_embeddings == 10
    with torch.no_grad():
        original[2].weight[:, [i for i in range(8) if i not in one.kept]] = 0
    torch.testing.assert_close(model(tokens), original(tokens))


# ---- importance and amounts


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def test_the_smallest_norms_go():
    model = mlp()
    with torch.no_grad():
        model[0].weight[[1, 7]] *= 1e-3
        model[2].weight[:, [1, 7]] *= 1e-3
    report = shrink_(model, {"0": Shrink(2)}, example_inputs=randn(2, 5))
    assert set(range(12)) - set(entry(report, "0").kept) == {1, 7}
    assert entry(report, "2").reason == "not asked for" and model[2].weight.shape == (8, 10)


def test_activation_ranks_by_what_a_unit_says():
    model, batches = mlp(), [randn(4, 5, seed=i) for i in range(3)]
    with torch.no_grad():
        hidden = torch.cat([model[:2](x) for x in batches]).double()
        strength = hidden.square().sum(0).sqrt() * model[2].weight.double().norm(dim=0)
    report = shrink_(
        model, {"0": Shrink(5, importance="activation")}, example_inputs=batches[0], calibration=iter(batches)
    )
    assert entry(report, "0").kept == tuple(strength.argsort()[5:].sort().values.tolist())


def test_taylor_is_the_derivative_of_a_gate():
    model, batches = mlp(), [(randn(4, 5, seed=i), randn(4, 3, seed=9 + i)) for i in range(3)]
    gate = torch.ones(12, requires_grad=True)
    total = torch.zeros(12)
    for x, y in batches:
        value = F.mse_loss(model[2:](model[:2](x) * gate), y)
        total += torch.autograd.grad(value, gate)[0].abs()
    report = shrink_(
        model,
        {"0": Shrink(5, importance="taylor")},
        example_inputs=batches[0][0],
        calibration=batches,
        loss=lambda m, batch: F.mse_loss(m(batch[0]), batch[1]),
    )
    assert entry(report, "0").kept == tuple(total.argsort()[5:].sort().values.tolist())
    assert all(p.grad is None for p in model.parameters())


def test_convolutions_rank_by_activation_too():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 4, 3, groups=2)), randn(2, 2, 7, 7)
    model.append(nn.Flatten()).append(nn.Linear(36, 2))
    with torch.no_grad():
        squares = model[:2](x).double().square().sum((0, 2, 3)).reshape(2, 3).sum(0)
        strength = squares.sqrt() * model[2].weight.double().square().sum((0, 2, 3)).sqrt()
    config = {"0": Shrink(1, importance="activation")}
    report = shrink_(model, config, example_inputs=x, calibration=[x])
    assert set(range(3)) - set(entry(report, "0").kept) == {int(strength.argmin())}


def test_global_amounts_rank_all_layers_together():
    model = mlp()
    with torch.no_grad():  # relative to its own mean every unit of 2 is the same, most of 0 are weaker
        model[0].weight[:10] *= 1e-3
        model[2].weight[:, :10] *= 1e-3
        for tensor, dim in ((model[2].weight, 1), (model[4].weight, 0)):
            tensor /= tensor.norm(dim=dim, keepdim=True)
    report = shrink_(model, Shrink(8, scope="global"), example_inputs=randn(2, 5))
    assert (entry(report, "0").after, entry(report, "2").after) == (4, 8)
    shrink_(model, Shrink(0.99, scope="global"), example_inputs=randn(2, 5))
    assert model[0].out_features >= 1 and model[2].out_features >= 1


@pytest.mark.parametrize(
    ("amount", "multiple", "left"),
    [(0.3, 16, 80), (0.3, 1, 70), (0.5, 16, 64), (97, 8, 8), (0, 16, 100), (0.01, 64, 100)],
)
def test_amounts_and_multiples(amount, multiple, left):
    model = nn.Sequential(nn.Linear(3, 100), nn.ReLU(), nn.Linear(100, 2))
    report = shrink_(model, Shrink(amount, multiple_of=multiple), example_inputs=randn(2, 3))
    assert model[0].out_features == model[2].in_features == left
    assert report.macs_before == 2 * 500 and report.macs_after == 2 * 5 * left
    assert (report.parameters_before, report.parameters_after) == (602, 6 * left + 2)
    assert bool(report.shrunk) == (left < 100) and "parameters" in str(report)


def test_heads_count_with_their_width():
    model = Attention(queries=8, keys=8, width=4)
    shrink_(model, Shrink(3, multiple_of=8), example_inputs=randn(1, 3, 8))
    assert model.q.out_features == 24 and model.num_heads == 6


# ---- what is left alone, and errors


def test_modes_gradients_buffers_and_randomness_stay():
    torch.manual_seed(0)
    model, x = Random(1).train(), randn(3, 3, 6)
    modes = [m.training for m in model.modules()]
    means = [b.clone() for n, b in model.named_buffers() if "mean" in n]
    state = torch.get_rng_state()
    shrink_(model, Shrink(0), example_inputs=x)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, means, [b for n, b in model.named_buffers() if "mean" in n]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    ids = [id(p) for p in model.parameters()]
    shrink_(model, Shrink(0.4), example_inputs=x)
    assert [id(p) for p in model.parameters()] == ids
    losses = []
    for _ in range(8):
        loss = model(x).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 1e-2 * gradient
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again.eval()(x), copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_training_goes_on_while_an_old_graph_lives(dtype):
    model, x = mlp().to(dtype), randn(3, 5).to(dtype)
    loss = model(x).sum()
    loss.backward()
    with torch.inference_mode():
        shrink_(model, Shrink(0.5), example_inputs=x)
    assert all(not p.is_inference() and p.dtype == dtype for p in model.parameters())
    assert model[0].weight.grad is None and torch.equal(model[4].bias.grad, torch.full((3,), 3.0, dtype=dtype))
    model(x).sum().backward()
    assert model[0].weight.grad.shape == (6, 5) and loss.grad_fn is not None


class Fixed(nn.Module):
    """Its own code says how wide a layer is."""

    def __init__(self):
        super().__init__()
        self.free, self.fixed, self.head = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.fixed(torch.relu(self.free(x)))
        return self.head(x.view(-1, 12) * 2)


def test_a_shape_fixed_by_code_is_an_error_that_names_the_layer():
    model, x = Fixed(), randn(2, 4)
    model(x).sum().backward()
    before = state_of(model)
    with pytest.raises(PruneError, match="fixed cannot be pruned"):
        shrink_(model, Shrink(0.5), example_inputs=x)
    assert_untouched(model, before)
    report = shrink_(model, {"fixed": None, "*": Shrink(0.5)}, example_inputs=x)
    assert [one.name for one in report.shrunk] == ["free"]


def test_results_that_silently_change_are_an_error_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(x * x.shape[-1])

    model = Scaled()
    before = state_of(model)
    with pytest.raises(PruneError, match=r"first cannot be pruned.*differs"):
        shrink_(model, Shrink(0.5), example_inputs=randn(2, 4))
    assert_untouched(model, before)


@pytest.mark.parametrize("where", [0, 1])
def test_a_model_that_raises_is_left_as_it_was(where):
    class Raises(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            Raises.calls += 1
            if Raises.calls > where * 2:
                raise KeyboardInterrupt
            return self.last(torch.relu(self.first(x)))

    model = Raises()
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        shrink_(model, Shrink(0.5), example_inputs=randn(2, 4))
    assert_untouched(model, before)


def test_what_cannot_be_pruned_is_told_with_its_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
            self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
            self.soft, self.head, self.unused = nn.Linear(8, 6), nn.Linear(6, 2), nn.Linear(3, 3)

        def forward(self, tokens):
            x = self.embed(tokens)
            x = x + self.narrow(F.silu(self.wide(self.norm(x))))
            return self.head(torch.softmax(self.soft(x), -1))

    model = Net()
    report = shrink_(model, Shrink(0.5), example_inputs=torch.tensor([[1, 2, 3]]))
    assert [one.name for one in report.shrunk] == ["wide"]
    for name, words in {
        "narrow": "normalised over in norm",
        "soft": "softmax over it",
        "head": "output of the model",
        "unused": "no product uses",
    }.items():
        assert words in entry(report, name).reason
    with pytest.raises(PruneError, match="soft cannot be pruned: a softmax over it"):
        shrink_(model, {"soft": Shrink(0.5)}, example_inputs=torch.tensor([[1, 2, 3]]))


def test_torchs_attention_keeps_its_heads_and_loses_neurons():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    report = shrink_(model, Shrink(0.5), example_inputs=randn(2, 3, 16))
    assert [(one.name, one.after) for one in report.shrunk] == [("linear1", 16)]

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.wide = nn.MultiheadAttention(16, 4, kdim=8, vdim=8, batch_first=True), nn.Linear(16, 3)

        def forward(self, x, y):
            return self.wide(self.attend(x, y, y, need_weights=False)[0])

    with pytest.raises(PruneError, match="MultiheadAttention, which has no form with fewer heads"):
        shrink_(Apart(), {"attend": Shrink(1)}, example_inputs=(randn(2, 3, 16), randn(2, 3, 8)))


def test_masks_of_torch_are_shrunk_with_the_weight():
    model, x = mlp(), randn(3, 5)
    masks.random_unstructured(model[2], "weight", 0.5)
    shrink_(model, {"0": Shrink(4), "2": Shrink(3)}, example_inputs=x)
    assert model[2].weight_mask.shape == model[2].weight_orig.shape == (5, 8)
    expected = model(x)
    masks.remove(model[2], "weight")
    assert torch.equal(model(x), expected) and model[2].weight.eq(0).any()


def test_accelerated_models_shrink():
    model, x = mlp(), randn(3, 5)
    fastnn.accelerate(model, example_inputs=x)
    report = shrink_(model, Shrink(0.5), example_inputs=x)
    assert model[0].out_features == 6 and model[2].weight.shape == (4, 6)
    assert report.max_difference <= 64 * FLOOR[torch.float32]
    assert model(x).shape == (3, 3)


def test_quantised_models_are_refused():
    model = mlp()
    fastnn.quantize_(model, fastnn.Int8Dynamic(), include="2")
    with pytest.raises(PruneError, match="2 is quantised: shrink first"):
        shrink_(model, Shrink(0.5), example_inputs=randn(2, 5))


def test_choosing():
    model, x = mlp(), randn(2, 5)
    seen = []
    report = shrink_(model, Shrink(0.5), lambda m, name: seen.append((type(m), name)) or name == "2", example_inputs=x)
    assert seen == [(nn.Linear, "0"), (nn.Linear, "2")] and [one.name for one in report.shrunk] == ["2"]
    assert len(shrink_(model, {"neurons": Shrink(1), "*": None}, example_inputs=x).shrunk) == 2
    with pytest.raises(PruneError, match="filter_fn said no"):
        shrink_(model, Shrink(0.5), lambda m, name: False, example_inputs=x)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "must be a torch.nn.Module", lambda m, x: shrink_(3, Shrink(), example_inputs=x)),
        (TypeError, "must be a Shrink", lambda m, x: shrink_(m, 0.5, example_inputs=x)),
        (TypeError, "must map to Shrink", lambda m, x: shrink_(m, {"*": 0.5}, example_inputs=x)),
        (ValueError, "no kind and no pattern", lambda m, x: shrink_(m, {"nosuch*": Shrink()}, example_inputs=x)),
        (ValueError, "cannot take 8 of the 8", lambda m, x: shrink_(m, {"2": Shrink(8)}, example_inputs=x)),
        (ValueError, "leave every layer one", lambda m, x: shrink_(m, Shrink(19, scope="global"), example_inputs=x)),
        (ValueError, "needs calibration=", lambda m, x: shrink_(m, Shrink(importance="taylor"), example_inputs=x)),
        (
            ValueError,
            "needs loss=",
            lambda m, x: shrink_(m, Shrink(importance="taylor"), example_inputs=x, calibration=[x]),
        ),
        (
            ValueError,
            "got none",
            lambda m, x: shrink_(m, Shrink(importance="activation"), example_inputs=x, calibration=[]),
        ),
        (ValueError, "amount must be", lambda m, x: Shrink(1.0)),
        (ValueError, "amount must be", lambda m, x: Shrink(-1)),
        (ValueError, "multiple_of must be", lambda m, x: Shrink(multiple_of=0)),
        (ValueError, "importance must be", lambda m, x: Shrink(importance="size")),
        (ValueError, "has no", lambda m, x: resize_(m, {"tensors": {"nosuch": [1]}, "attributes": {}})),
        (ValueError, "smaller than", lambda m, x: resize_(m, {"tensors": {"0.bias": [99]}, "attributes": {}})),
        (ValueError, "no module", lambda m, x: resize_(m, {"tensors": {}, "attributes": {"9": {"a": 1}}})),
    ],
)
def test_errors(error, words, call):
    model = mlp()
    before = state_of(model)
    with pytest.raises(error, match=words):
        call(model, randn(2, 5))
    assert_untouched(model, before)


CHANGES = {
    "shrink_": lambda model, x: shrink_(model, Shrink(0.5), example_inputs=x),
    "sparsify_": lambda model, x: fastnn.sparsify_(model, fastnn.Sparsify(0.5)),
    "GradualSparsifier": lambda model, x: fastnn.GradualSparsifier(model, fastnn.Sparsify(0.5), end=2),
    "compress": lambda model, x: fastnn.compress(model, calib=[x], evaluate=lambda m: 1.0, example_inputs=x),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("verb", CHANGES)
def test_a_model_made_in_inference_mode_is_refused(verb, inside):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    message = f"fastnn.{verb}: model was created in torch.inference_mode.*0.weight, 4 in all"
    with torch.inference_mode(inside), pytest.raises(ValueError, match=message):
        CHANGES[verb](model, torch.randn(3, 16))
