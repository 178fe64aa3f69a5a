"""What the matrix does not see of linear_cross_entropy: torch's form, what backward gives, memory, rows left out."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from fastnn import linear_cross_entropy
from fastnn.testing import assert_within_budget, policy, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(rows=9, features=12, classes=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, features), (classes, features), (classes,))
    )
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), torch.arange(rows) % classes


class Calls(TorchDispatchMode):
    """The raw operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("fastnn."):
            self.names.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")
def test_signature_and_answers_are_torchs():
    ours, theirs = (inspect.signature(f).parameters for f in (linear_cross_entropy, F.linear_cross_entropy))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].kind == theirs[name].kind and ours[name].default == theirs[name].default for name in theirs)
    x, w, b, t = operands()
    options = torch.nn.LinearCrossEntropyOptions()
    for given in ({}, {"linear_bias": b}, {"reduction": "sum", "weight": torch.rand(20)}, {"options": options}):
        torch.testing.assert_close(linear_cross_entropy(x, w, t, **given), F.linear_cross_entropy(x, w, t, **given))


def test_other_forms_run_on_the_reference():
    """Probabilities, more dimensions of classes, float64: what F.cross_entropy gives of the logits."""
    x, w, b, t = operands()
    shares = torch.softmax(torch.randn(9, 20), 1)
    outer = torch.arange(9 * 5).view(9, 5) % 4
    with fastnn.record() as runs:
        found = [
            linear_cross_entropy(x, w, shares, linear_bias=b, reduction="none"),
            linear_cross_entropy(x, w.view(4, 5, 12), outer, linear_bias=b.view(4, 5), reduction="none"),
            linear_cross_entropy(x.double(), w.double(), t),
        ]
    assert {run.backend for run in runs} == {"reference"}
    logits = F.linear(x, w, b)
    torch.testing.assert_close(found[0], F.cross_entropy(logits, shares, reduction="none"))
    torch.testing.assert_close(found[1], F.cross_entropy(logits.view(9, 4, 5), outer, reduction="none"))
    torch.testing.assert_close(found[2], F.cross_entropy(F.linear(x, w).double(), t, reduction="mean").double())
    with fastnn.use_backend("cpu"), pytest.raises(NotImplementedError, match="probabilities"):
        linear_cross_entropy(x, w, shares)


def test_uint8_targets_and_vectors():
    x, w, b, t = operands()
    assert same_bits(linear_cross_entropy(x, w, t.byte()), linear_cross_entropy(x, w, t))
    one = linear_cross_entropy(x[2], w, t[2], linear_bias=b, reduction="none")
    assert one.shape == ()
    torch.testing.assert_close(one, F.cross_entropy(F.linear(x[2], w, b), t[2]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shift_is_the_next_token(reduction):
    x, w, _, _ = operands(24)
    x, t = x.detach().view(3, 8, 12).requires_grad_(), torch.arange(24).view(3, 8) % 20
    t[1, 3] = -100
    ours = linear_cross_entropy(x, w, t, shift=True, reduction=reduction)
    theirs = F.cross_entropy(F.linear(x[:, :-1], w).flatten(0, 1), t[:, 1:].flatten(), reduction=reduction)
    torch.testing.assert_close(ours, theirs.view(3, 7) if reduction == "none" else theirs)
    gradients = [torch.autograd.grad(loss.sum(), (x, w)) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][0][:, -1].any()
    shares = torch.softmax(torch.randn(3, 8, 20), -1)
    of_shares = linear_cross_entropy(x, w, shares, shift=True, reduction=reduction)
    theirs = F.cross_entropy(F.linear(x[:, :-1], w).flatten(0, 1), shares[:, 1:].flatten(0, 1), reduction=reduction)
    torch.testing.assert_close(of_shares, theirs)


def test_forward_finds_the_gradients_and_backward_only_scales(extension):
    x, w, b, t = operands()
    with Calls() as calls:
        loss = linear_cross_entropy(x, w, t, linear_bias=b)
        torch.autograd.grad(loss, (x, w, b))
    assert calls.names == ["linear_cross_entropy_fwd"]
    with Calls() as calls:
        loss = linear_cross_entropy(x, w, t, reduction="none")
        torch.autograd.grad(loss.sum(), (x, w))
    assert calls.names == ["linear_cross_entropy_fwd", "linear_cross_entropy_bwd"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_backward_finds_them_again(dtype):
    """Also where the first asked for one of them alone, with another gradient, and wrote to what it got."""
    x, w, b, t = operands(dtype=dtype)
    expected = torch.autograd.grad(linear_cross_entropy(x, w, t, linear_bias=b), (x, w, b))
    loss = linear_cross_entropy(x, w, t, linear_bias=b)
    (first,) = torch.autograd.grad(loss, w, torch.full_like(loss, 4.0), retain_graph=True)
    torch.testing.assert_close(first, expected[1] * 4)
    first.zero_()
    again = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    assert all(same_bits(*pair) for pair in zip(again, expected, strict=True))
    loss.backward()
    assert all(same_bits(leaf.grad, g) for leaf, g in zip((x, w, b), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [2.0**16, 1.0 / 3])
def test_incoming_gradients(dtype, scale):
    x, w, b, t = operands(64, 12, 500, dtype)

    def gradients(dtype, call):
        leaves = [v.detach().to(dtype).requires_grad_() for v in (x, w, b)]
        loss = call(*leaves)
        return torch.autograd.grad(
            loss, leaves, torch.tensor(scale if dtype != torch.float16 else min(scale, 6e4), dtype=loss.dtype)
        )

    def reference(x, w, b):
        return F.cross_entropy(F.linear(x, w, b).to(torch.promote_types(x.dtype, torch.float32)), t)

    with torch.no_grad():
        scale = torch.tensor(min(scale, 6e4)).to(dtype).item()
    ours = gradients(dtype, lambda x, w, b: linear_cross_entropy(x, w, t, linear_bias=b))
    truth, rival = (
        gradients(torch.float64, reference),
        gradients(dtype, lambda x, w, b: F.cross_entropy(F.linear(x, w, b), t)),
    )
    for found in zip(ours, truth, rival, strict=True):
        assert_within_budget(*found, dtype, policy.GRADIENT_FACTOR)


def test_loss_scale_reaches_float16_gradients_before_they_underflow():
    x, w, _, t = operands(64, 12, 500, torch.float16)
    x, scale = (x * 2**-17).detach(), 2.0**15

    def gradient(dtype, call):
        leaf = w.detach().to(dtype).requires_grad_()
        return torch.autograd.grad(call(x.to(dtype), leaf), leaf, torch.tensor(scale, dtype=dtype))[0]

    truth = gradient(torch.float64, lambda x, w: F.cross_entropy(F.linear(x, w), t))
    ours = gradient(torch.float16, lambda x, w: linear_cross_entropy(x, w, t))
    assert truth.abs().max() / scale < 2**-20  # beside steps of 2^-24
    assert (ours - truth).abs().max() < 2**-9 * truth.abs().max()


def test_rows_that_do_not_count_are_not_read():
    x, w, b, t = operands(30)
    t[::3] = -100
    expected = torch.autograd.grad(linear_cross_entropy(x, w, t, linear_bias=b), (x, w, b))
    with torch.no_grad():
        spoilt = x.clone()
        spoilt[::3] = torch.nan
    found = torch.autograd.grad(linear_cross_entropy(spoilt.requires_grad_(), w, t, linear_bias=b), (spoilt, w, b))
    assert all(same_bits(*pair) for pair in zip(found, expected, strict=True))
    assert not found[0][::3].any()


def test_no_row_counts():
    x, w, b, t = operands()
    t[:] = -100
    for reduction, loss in (("mean", torch.nan), ("sum", 0.0)):
        found = linear_cross_entropy(x, w, t, linear_bias=b, reduction=reduction)
        torch.testing.assert_close(found, torch.tensor(loss), equal_nan=True)
        assert not any(g.any() for g in torch.autograd.grad(found, (x, w, b)))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast(cast):
    x, w, b, t = operands()
    with torch.autocast("cpu", dtype=cast), fastnn.record() as runs:
        loss = linear_cross_entropy(x, w, t, linear_bias=b, weight=torch.rand(20) + 0.1)
        rival = F.cross_entropy(F.linear(x, w, b), t)
    assert loss.dtype == rival.dtype == torch.float32
    assert {run.backend for run in runs} == {"cpu"} or not fastnn._extension._C
    loss.backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32


MEMORY = """
import resource, sys, torch, fastnn
dtype, reduction = getattr(torch, sys.argv[1]), sys.argv[2]
rows, features, classes = 4096, 16, 20000
x = torch.randn(rows, features, dtype=dtype).requires_grad_()
w = torch.randn(classes, features, dtype=dtype).requires_grad_()
t = torch.arange(rows) % classes
fastnn.linear_cross_entropy(x[:8], w, t[:8]).backward()
x.grad = w.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastnn.linear_cross_entropy(x, w, t, reduction=reduction).sum().backward()
given = sum(p.grad.nbytes for p in (x, w)) + (classes * features * 4 if dtype != torch.float32 else 0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before * 1024 - given)
"""


@pytest.mark.parametrize(("dtype", "reduction"), [("float32", "mean"), ("bfloat16", "none")])
def test_logits_are_never_all_in_memory(dtype, reduction, extension):
    """4096 x 20000: the logits would be 328 MB in float32, 164 MB in bfloat16, their gradient as much."""
    command = [sys.executable, "-c", MEMORY, dtype, reduction]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) <= 64e6


class TestLayer:
    def test_answers_and_keys(self):
        layer = fastnn.nn.LinearCrossEntropyLoss(12, 20, bias=True, weight=torch.rand(20), label_smoothing=0.1)
        assert set(layer.state_dict()) == {"linear.weight", "linear.bias", "weight"}
        x, _, _, t = operands()
        expected = F.cross_entropy(layer.linear(x), t, layer.weight, label_smoothing=0.1)
        torch.testing.assert_close(layer(x, t), expected)
        assert "label_smoothing=0.1" in repr(layer)

    def test_outer_dimensions_and_tied_weights(self):
        layer = fastnn.nn.LinearCrossEntropyLoss(12, 4, out_features=(5,), bias=True)
        x, t = torch.randn(9, 12), torch.arange(45).view(9, 5) % 4
        torch.testing.assert_close(layer(x, t), F.cross_entropy(layer.linear(x).view(9, 4, 5), t))
        embedding = torch.nn.Embedding(20, 12)
        layer = fastnn.nn.LinearCrossEntropyLoss(12, 20, shift=True)
        layer.linear.weight = embedding.weight
        tokens = torch.arange(9) % 20
        layer(embedding(tokens), tokens).backward()
        assert embedding.weight.grad.abs().max() > 0
