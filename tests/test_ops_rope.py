"""What the matrix does not see of rope: Hugging Face's form, memory order, what is saved, gradients of tables."""

from __future__ import annotations

import copy

import pytest
import torch
from operators import Calls, tensor

import fastnn
from fastnn import rope, rope_tables
from fastnn.nn import RotaryEmbedding
from fastnn.ops.rope import RopeOptions, rope_reference
from fastnn.testing import assert_within_budget, policy, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inside(b=2, h=3, s=5, d=8, dtype=torch.float32, seed=0):
    """Heads as a linear layer gives them."""
    return tensor(b, s, h, d, dtype=dtype, seed=seed).transpose(1, 2)


def full(tables, dtype=torch.float32, interleaved=False):
    return [(t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)).to(dtype) for t in tables]


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_hugging_faces_function(dtype):
    """Llama's, called with its arguments: within the policy of the same in float64."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = inside(d=16, dtype=dtype), inside(h=1, d=16, dtype=dtype, seed=1)
    cos, sin = (t[None].expand(2, 5, 16) for t in full(rope_tables(5, 16), dtype))
    found = rope(q, k, cos, sin)
    truth = llama.apply_rotary_pos_emb(*(t.double() for t in (q, k, cos, sin)))
    for ours, true, theirs in zip(found, truth, llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert ours.shape == theirs.shape and ours.stride() == theirs.stride()
        assert_within_budget(ours, true, theirs, dtype, policy.FORWARD_FACTOR)


def test_a_llama_runs_on_it(monkeypatch, extension):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokens = llama.LlamaForCausalLM(config).eval(), torch.arange(14).view(2, 7)
    expected = model(tokens, labels=tokens)
    expected.loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", rope)
    with fastnn.record() as runs:
        found = model(tokens, labels=tokens)
        found.loss.backward()
    assert [run.kernel for run in runs] == ["rope_fwd", "rope_fwd", "rope_bwd", "rope_bwd"]
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, gradient)


def test_it_is_one_operator_and_copies_nothing(extension):
    q, k = inside().requires_grad_(), inside(h=1, seed=1).requires_grad_()
    tables = rope_tables(9, 8)
    at = torch.tensor([4, 0, 8, 8, 1])
    with Calls() as forward:
        found = rope(q, k, *tables, rotary_dim=8, positions=at)
    grads = [torch.randn_like(t) for t in found]
    with Calls() as backward:
        torch.autograd.grad(found, (q, k), grads)
    assert forward.names == ["fastnn.rope_fwd.default"]
    assert [name for name in backward.names if "detach" not in name] == ["fastnn.rope_bwd.default"]


@pytest.mark.parametrize("heads_dim", [1, 2])
@pytest.mark.parametrize("by_positions", [False, True])
def test_memory_order_is_kept(heads_dim, by_positions, extension):
    """Of result and gradient, whatever the order of the gradient that comes in: no copy follows."""
    q = (inside() if by_positions else tensor(2, 3, 5, 8)).requires_grad_()
    given = q.transpose(1, 2) if heads_dim == 2 else q
    y, _ = rope(given, None, *rope_tables(5, 8), heads_dim, rotary_dim=8)
    assert y.stride() == given.stride()
    (dq,) = torch.autograd.grad(y, q, torch.ones(y.shape))
    assert dq.stride() == q.stride()


def test_backward_keeps_the_tables_and_nothing_else(extension):
    q, (cos, sin), at, kept = inside().requires_grad_(), rope_tables(9, 8), torch.arange(5), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rope(q, q, cos, sin, rotary_dim=8, positions=at)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (cos, sin, at)]


@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_is_the_rotation_back(interleaved):
    """The gradient of a rotated tensor, rotated: the tensor again."""
    q, tables = inside(d=12), rope_tables(5, 8)
    leaf = q.clone().requires_grad_()
    y, _ = rope(leaf, None, *tables, rotary_dim=8, interleaved=interleaved)
    (back,) = torch.autograd.grad(y, leaf, y.detach())
    torch.testing.assert_close(back, q)
    assert not torch.equal(y, q) and same_bits(y[..., 8:].contiguous(), q[..., 8:].contiguous())


def test_angles_depend_on_differences_of_positions_alone():
    """What rotary embedding is for: scores of query and key see how far apart they are."""
    q, k = tensor(1, 1, 1, 16), tensor(1, 1, 1, 16, seed=1)
    layer = RotaryEmbedding(16, 1000)

    def score(i, j):
        return (layer(q, None, torch.tensor([i]))[0] * layer(k, None, torch.tensor([j]))[0]).sum()

    torch.testing.assert_close(score(3, 10), score(903, 910), rtol=1e-4, atol=1e-4)
    assert (score(3, 10) - score(3, 11)).abs() > 1e-3


@pytest.mark.parametrize("only", ["query", "key"])
def test_one_of_both_gradients(only, extension):
    q, k, tables = inside(), inside(h=1, seed=1), rope_tables(5, 8)
    leaves = [t.clone().requires_grad_(name == only) for name, t in (("query", q), ("key", k))]
    wanted = next(t for t in leaves if t.requires_grad)
    found = rope(*leaves, *tables, rotary_dim=8)
    (ours,) = torch.autograd.grad(found[only == "key"].square().sum(), wanted)
    torch.testing.assert_close(ours, 2 * wanted.detach())  # a rotation keeps the sum of squares
    both = [t.clone().requires_grad_() for t in (q, k)]
    query, _ = rope(*both, *tables, rotary_dim=8)
    assert torch.autograd.grad(query.sum(), both, allow_unused=True)[1] is None


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 4])
def test_gradients_of_the_tables(width, interleaved):
    """Plain PyTorch's, of a call that then runs there as a whole."""
    q = inside().requires_grad_()
    tables = [tensor(5, width, seed=i).requires_grad_() for i in (1, 2)]
    options = RopeOptions(8, interleaved, 1)
    with fastnn.record() as runs:
        y, _ = rope(q, None, *tables, rotary_dim=8, interleaved=interleaved)
    assert {run.backend for run in runs} == {"reference"}
    found = torch.autograd.grad(y.square().sum(), (q, *tables))
    wide = [t.detach().double().requires_grad_() for t in (q, *tables)]
    truth = torch.autograd.grad(rope_reference(*wide, None, options).square().sum(), wide)
    for ours, true in zip(found, truth, strict=True):
        assert_within_budget(ours, true, true.float(), torch.float32, policy.GRADIENT_FACTOR)
    with fastnn.use_backend("cpu"), pytest.raises(NotImplementedError, match="gradient of cos or sin"):
        rope(q, None, *tables, rotary_dim=8, interleaved=interleaved)


def test_other_types_run_on_the_reference():
    """float64, and tables that are neither float32 nor of the query's type."""
    q, tables = inside(), rope_tables(5, 8, dtype=torch.float64)
    for x, given in ((q.double(), tables), (q, tables), (q.half(), [t.bfloat16() for t in tables])):
        with fastnn.record() as runs:
            y, _ = rope(x, None, *given, rotary_dim=8)
        assert y.dtype == x.dtype and [(run.kernel, run.backend) for run in runs] == [("rope_fwd", "reference")]
    with fastnn.use_backend("cpu"), pytest.raises(NotImplementedError, match="cos must have query's type"):
        rope(q, None, *tables, rotary_dim=8)


def test_without_a_batch_and_int32_positions():
    q, k, tables, at = inside(1), inside(1, h=1, seed=1), rope_tables(9, 8), torch.tensor([4, 0, 8, 8, 1])
    expected = rope(q, k, *tables, rotary_dim=8, positions=at)
    turned = rope(q[0].transpose(0, 1), k[0].transpose(0, 1), *tables, rotary_dim=8, positions=at)
    for found in (
        rope(q[0], k[0], *tables, 0, rotary_dim=8, positions=at.int()),
        rope(q[0], k[0], *tables, -3, rotary_dim=8, positions=at),
        [t.transpose(0, 1) for t in turned],
    ):
        assert all(same_bits(a.contiguous(), b[0].contiguous()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_of_far_positions_are_right(dtype):
    """In float32, angles of a million have two digits; here they have all."""
    at = torch.tensor([0, 1, 1000, 999_999])
    cos, sin = rope_tables(at, 64, 500_000.0, dtype=dtype)
    frequency = 500_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    truth = torch.polar(torch.ones((), dtype=torch.float64), at.double()[:, None] * frequency)
    assert cos.dtype == sin.dtype == dtype and cos.shape == (4, 32)
    bound = 2 * torch.finfo(dtype).eps
    assert (cos.double() - truth.real).abs().max() <= bound and (sin.double() - truth.imag).abs().max() <= bound
    assert all(same_bits(a, b) for a, b in zip(rope_tables(3, 64), rope_tables(torch.arange(3), 64), strict=True))


class TestLayer:
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_function(self, dtype, interleaved):
        q, k = inside(d=12, dtype=dtype), inside(h=1, d=12, dtype=dtype, seed=1)
        layer, at = RotaryEmbedding(8, 20, 100.0, interleaved=interleaved), torch.tensor([3, 19, 0, 0, 7])
        cos, sin = rope_tables(20, 8, 100.0)
        options = {"rotary_dim": 8, "interleaved": interleaved}
        for found, expected in (
            (layer(q, k), rope(q, k, cos[:5], sin[:5], **options)),
            (layer(q, k, at), rope(q, k, cos, sin, positions=at, **options)),
        ):
            assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in zip(found, expected, strict=True))
        assert layer(q)[1] is None
        swapped = RotaryEmbedding(8, 20, 100.0, interleaved=interleaved, unsqueeze_dim=2)
        assert torch.equal(swapped(q.transpose(1, 2))[0].transpose(1, 2), layer(q)[0])

    def test_tables_are_no_state_and_stay_float32(self):
        layer = RotaryEmbedding(8, 20)
        assert not layer.state_dict() and "8, 20" in repr(layer)
        before = layer.cos.clone()
        for other in (
            layer.half(),
            copy.deepcopy(layer).double(),
            RotaryEmbedding(8, 20, device="meta").to_empty(device="cpu"),
        ):
            assert other.cos.dtype == torch.float32 and same_bits(other.cos, before)

    def test_a_length_beyond_its_positions_is_refused(self):
        with pytest.raises(ValueError, match="max_positions 4"):
            RotaryEmbedding(8, 4)(inside())
        with pytest.raises(IndexError):
            RotaryEmbedding(8, 4)(inside(), None, torch.arange(5))
