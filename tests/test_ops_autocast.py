"""Under autocast the ops take and give the dtypes that torch's own take and give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn import cross_entropy, layer_norm, linear, log_softmax, rms_norm, scaled_dot_product_attention, softmax
from fastnn.testing import assert_within_budget, policy

HALVES = [torch.bfloat16, torch.float16]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def operands(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 12), (7, 12), (7,))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize("given", TYPES)
def test_linear_dtypes(cast, given):
    with torch.autocast("cpu", dtype=cast):
        ours, theirs = linear(*operands(given), activation="gelu"), F.gelu(F.linear(*operands(given)))
    assert ours.dtype == theirs.dtype
    leaves = operands(given)
    with torch.autocast("cpu", dtype=cast):
        y = linear(*leaves, activation="gelu")
    y.sum().backward()
    assert {leaf.grad.dtype for leaf in leaves} == {given}


@pytest.mark.parametrize("cast", HALVES)
def test_linear_of_mixed_operands(cast):
    x, w, b = operands(torch.float32)
    with torch.autocast("cpu", dtype=cast):
        ours = linear(x, w.detach().half(), b.detach().bfloat16())
        assert ours.dtype == F.linear(x, w.detach().half(), b.detach().bfloat16()).dtype == cast


@pytest.mark.parametrize("cast", HALVES)
def test_linear_values(cast):
    x, w, b = (t.detach() for t in operands(torch.float32))
    with torch.autocast("cpu", dtype=cast):
        ours, rival = linear(x, w, b, activation="silu"), F.silu(F.linear(x, w, b))
    rounded = [t.to(cast).double() for t in (x, w, b)]
    assert_within_budget(ours, F.silu(F.linear(*rounded)), rival, cast, policy.FORWARD_FACTOR)


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize("given", TYPES)
@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_softmax_dtypes(function, given, cast):
    theirs = getattr(torch, function.__name__)
    x = torch.randn(3, 8).to(given).requires_grad_()
    with torch.autocast("cpu", dtype=cast):
        y = function(x, -1)
        assert y.dtype == theirs(x, -1).dtype
        assert function(x, -1, torch.float32).dtype == theirs(x, -1, dtype=torch.float32).dtype
    y.sum().backward()
    assert x.grad.dtype == given


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize("given", TYPES)
@pytest.mark.parametrize("rms", [False, True])
def test_norm_dtypes(rms, given, cast):
    """The input's type, which torch's CPU autocast leaves as it is; parameters may be float32 beside half precision."""
    x, w, _ = operands(given)
    weight = w[0].detach().to(torch.float64 if given == torch.float64 else torch.float32)
    with torch.autocast("cpu", dtype=cast):
        ours = rms_norm(x, (12,), weight) if rms else layer_norm(x, (12,), weight, weight)
        theirs = F.rms_norm(x, (12,), weight) if rms else F.layer_norm(x, (12,), weight, weight)
    assert ours.dtype == theirs.dtype == given
    ours.sum().backward()
    assert x.grad.dtype == given
    plain = x.detach().double(), (12,), weight.double()
    truth = F.rms_norm(*plain) if rms else F.layer_norm(*plain, weight.double())
    assert_within_budget(ours, truth, theirs, given, policy.FORWARD_FACTOR)


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize("given", TYPES)
def test_activation_dtypes(given, cast):
    """The input's type, which torch's autocast leaves as it is; of gate and up that differ, the wider one."""
    x, w, _ = operands(given)
    bias = w[0].detach().to(torch.float64 if given == torch.float64 else torch.float32)
    with torch.autocast("cpu", dtype=cast):
        ours, theirs = fastnn.gelu(x, bias=bias), F.gelu(x)
        product, torchs = fastnn.swiglu(x, bias.expand_as(x)), F.silu(x) * bias
    assert ours.dtype == theirs.dtype == given
    assert product.dtype == torchs.dtype == bias.dtype
    (ours.sum() + product.sum()).backward()
    assert x.grad.dtype == given


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize("given", TYPES)
def test_masked_softmax_dtypes(given, cast):
    """The input's type, as torch's softmax on a CPU."""
    x, _, _ = operands(given)
    with torch.autocast("cpu", dtype=cast):
        ours = fastnn.masked_softmax(x, x.detach() > -0.5, 0.3)
        assert ours.dtype == torch.softmax(x, -1).dtype == given
    ours.square().sum().backward()
    assert x.grad.dtype == given


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize("given", TYPES)
def test_dropout_add_dtypes(given, cast):
    """Of two types the wider one, as torch's addition, which autocast leaves alone."""
    x, _, _ = operands(given)
    with torch.autocast("cpu", dtype=cast):
        assert fastnn.dropout_add(x, x.detach()).dtype == given
        y = fastnn.dropout_add(x, x.detach().float())
        assert y.dtype == (x + x.float()).dtype
    y.sum().backward()
    assert x.grad.dtype == given


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize("given", TYPES)
def test_rope_dtypes(given, cast):
    """The type of query and key, whatever the tables have: autocast leaves products of tensors alone."""
    x, _, _ = operands(given)
    tables = [t.to(given) for t in fastnn.rope_tables(5, 12)]
    with torch.autocast("cpu", dtype=cast):
        query, key = fastnn.rope(x[None], 2 * x[None], *tables, 0, rotary_dim=12)
    assert query.dtype == key.dtype == given
    (query.sum() + key.sum()).backward()
    assert x.grad.dtype == given


def test_disabled_autocast_changes_nothing():
    leaves = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert linear(*leaves).dtype == torch.float32


@pytest.mark.parametrize("frozen", [False, True])
def test_layer(frozen):
    layer = fastnn.nn.Linear(12, 7, activation="relu")
    if frozen:
        layer.freeze().eval()
        with torch.no_grad():
            layer(torch.randn(5, 12))  # packs in float32
    x = torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        ours, rival = layer(x), F.relu(F.linear(x, layer.weight, layer.bias))
    rounded = [t.detach().bfloat16().double() for t in (x, layer.weight, layer.bias)]
    assert_within_budget(ours, F.relu(F.linear(*rounded)), rival, torch.bfloat16, policy.FORWARD_FACTOR)


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize("given", TYPES)
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy_dtypes(probabilities, given, cast):
    """float32, as torch's; the gradient of the logits' own type."""
    x, w, _ = operands(given)
    target = torch.softmax(x.detach(), 1) if probabilities else torch.arange(5)
    weight = w[0].detach().abs()
    with torch.autocast("cpu", dtype=cast):
        ours = cross_entropy(x, target, weight, label_smoothing=0.1)
        theirs = F.cross_entropy(x, target, weight, label_smoothing=0.1)
    assert ours.dtype == theirs.dtype == (torch.float64 if given == torch.float64 else torch.float32)
    ours.backward()
    assert x.grad.dtype == given
    plain = [t.detach().double() if t.is_floating_point() else t for t in (x, target, weight)]
    truth = F.cross_entropy(*plain, label_smoothing=0.1)
    assert_within_budget(ours, truth, theirs, ours.dtype, policy.FORWARD_FACTOR)


@pytest.mark.parametrize("cast", HALVES)
@pytest.mark.parametrize("given", TYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_dtypes(masked, given, cast):
    """The type of autocast but for float64, as torch's."""
    q, k, _ = operands(given)
    mask = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(given) if masked else None
    with torch.autocast("cpu", dtype=cast):
        ours = scaled_dot_product_attention(q[None], k[None], k[None], mask)
        theirs = F.scaled_dot_product_attention(q[None], k[None], k[None], mask)
    ran_in = torch.float64 if given == torch.float64 else cast
    assert ours.dtype == theirs.dtype == ran_in
    ours.sum().backward()
    assert {q.grad.dtype, k.grad.dtype} == {given}
    rounded = [t.detach().to(ran_in).double()[None] for t in (q, k, k)]
    truth = F.scaled_dot_product_attention(*rounded, None if mask is None else mask.to(ran_in).double())
    assert_within_budget(ours, truth, theirs, ran_in, policy.FORWARD_FACTOR)


def test_attention_of_mixed_operands():
    q, k, _ = (t.detach() for t in operands(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scaled_dot_product_attention(q.bfloat16(), k, k.bfloat16()).dtype == torch.bfloat16
