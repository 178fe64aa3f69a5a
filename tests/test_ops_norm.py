"""What the matrix does not see of the norms: values that torch gets wrong, mixed types, who asks for which gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn import add_layer_norm, add_rms_norm, layer_norm, rms_norm, testing
from fastnn.testing import assert_within_budget, policy, same_bits

KERNELS = [target for target in testing.targets() if target.isa]
HALVES = [torch.bfloat16, torch.float16]


def tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def answers(call, x, grad):
    leaf = x.detach().requires_grad_()
    y = call(leaf)
    return [y.detach(), *torch.autograd.grad(y, leaf, grad)]


@pytest.mark.parametrize("target", KERNELS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "scale", "eps"),
    [
        (torch.float32, 1e30, 1e-5),
        (torch.bfloat16, 1e30, 1e-5),
        (torch.float32, 1e-25, 0.0),
        (torch.bfloat16, 1e-25, 0.0),
    ],
)
def test_squares_out_of_range(dtype, scale, eps, target):
    """Torch's own float32 gives NaN, 0 or infinity here: held to the rounding of the true result."""
    for norm in (F.layer_norm, F.rms_norm):
        ours = {F.layer_norm: layer_norm, F.rms_norm: rms_norm}[norm]
        x, w, grad = (tensor(5, 77).double() * scale).to(dtype), tensor(77, seed=1, dtype=dtype), tensor(5, 77, seed=2)
        grad = (grad.double() * scale).to(dtype)  # the gradient is of the order of grad / x
        with target.forced():
            found = answers(lambda x, w=w, ours=ours: ours(x, (77,), w, eps=eps), x, grad)
        truth = answers(lambda x, w=w, norm=norm: norm(x, (77,), w.double(), eps=eps), x.double(), grad.double())
        for mine, true, factor in zip(found, truth, (policy.FORWARD_FACTOR, policy.GRADIENT_FACTOR), strict=True):
            assert_within_budget(mine, true, true.to(dtype), dtype, factor, where=norm.__name__)


@pytest.mark.parametrize("target", KERNELS, ids=str)
@pytest.mark.parametrize("noise", [1.0, 0.01])
def test_rows_far_from_zero(noise, target):
    x = 1e4 + noise * tensor(6, 768)
    with target.forced():
        found = layer_norm(x, (768,))
    truth = F.layer_norm(x.double(), (768,))
    assert_within_budget(found, truth, truth.float(), torch.float32, policy.FORWARD_FACTOR)


@pytest.mark.parametrize("target", KERNELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rows_that_hardly_vary(dtype, target):
    """One element of a row is the next number: about zero nothing of the variance is left, and no epsilon hides it."""
    x = torch.linspace(0.7, 900.0, 5).to(dtype)[:, None].repeat(1, 768)
    x[:, 3] = torch.nextafter(x[:, 3], torch.full((5,), torch.inf, dtype=dtype))
    for scale in (1.0, 2.0**-4 if dtype == torch.float16 else 2.0**-45):
        with target.forced():
            found = layer_norm(x * scale, (768,), eps=0.0)
        truth = F.layer_norm((x * scale).double(), (768,), eps=0.0)
        assert_within_budget(found, truth, truth.to(dtype), dtype, policy.FORWARD_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_constant_rows_give_the_bias(dtype):
    bias = tensor(768, dtype=dtype)
    x = torch.linspace(-31.7, 1e4, 7).to(dtype)[:, None].expand(7, 768)
    assert same_bits(layer_norm(x, (768,), tensor(768, seed=1, dtype=dtype), bias), bias.expand(7, 768).contiguous())
    assert layer_norm(x, (768,)).count_nonzero() == 0


@pytest.mark.parametrize("dtype", HALVES)
def test_the_sum_is_rounded_before_it_is_normalized(dtype):
    x, r, w, b = tensor(9, 50, dtype=dtype), 64 * tensor(9, 50, seed=1, dtype=dtype), tensor(50, seed=2), tensor(50)
    for found, alone in (
        (add_layer_norm(x, r, w, b), layer_norm(x + r, (50,), w, b)),
        (add_rms_norm(x, r, w), rms_norm(x + r, (50,), w)),
    ):
        assert same_bits(found[0], alone) and same_bits(found[1], x + r)


@pytest.mark.parametrize(
    ("of_input", "of_residual"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
)
def test_summands_of_two_types_are_promoted(of_input, of_residual):
    x, r = tensor(4, 9, dtype=of_input).requires_grad_(), tensor(4, 9, seed=1, dtype=of_residual).requires_grad_()
    y, total = add_layer_norm(x, r)
    assert same_bits(total, x + r) and y.dtype == torch.float32
    (y.sum() + total.square().sum()).backward()
    assert (x.grad.dtype, r.grad.dtype) == (of_input, of_residual)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("use", ["output", "sum", "both"])
def test_gradients_of_output_and_sum(use, rms):
    function, plain = (add_rms_norm, F.rms_norm) if rms else (add_layer_norm, F.layer_norm)

    def gradients(dtype, ours):
        x, r, w = (t.to(dtype).requires_grad_() for t in (tensor(5, 40), tensor(5, 40, seed=1), tensor(40, seed=2)))
        if ours:
            y, total = function(x, r, w)
        else:
            total = x + r
            y = plain(total, (40,), w)
        loss = {"output": y, "sum": total, "both": y + 0.5 * total}[use]
        return torch.autograd.grad(loss.square().sum(), (x, r, w), allow_unused=True)

    found = gradients(torch.float32, True), gradients(torch.float64, False), gradients(torch.float32, False)
    for mine, true, rival in zip(*found, strict=True):
        assert (mine is None) == (rival is None)
        if mine is not None:
            assert_within_budget(mine, true, rival, torch.float32, policy.GRADIENT_FACTOR)


def test_only_the_wanted_gradients_are_computed(extension, monkeypatch):
    masks = []
    kernels = fastnn._dispatch.KERNELS["norm"]["cpu"]

    def spy(*arguments):
        masks.append(arguments[-2])
        return kernels.bwd(*arguments)

    monkeypatch.setitem(fastnn._dispatch.KERNELS["norm"], "cpu", kernels._replace(bwd=spy))
    for wanted in itertools.product([False, True], repeat=3):
        if any(wanted):
            x, w, b = (
                t.requires_grad_(wants)
                for t, wants in zip((tensor(4, 8), tensor(8), tensor(8, seed=1)), wanted, strict=True)
            )
            layer_norm(x, (8,), w, b).sum().backward()
            assert masks.pop() == list(wanted)
            assert [t.grad is not None for t in (x, w, b)] == list(wanted)


def test_summands_share_no_gradient():
    """One tensor is returned for both; each leaf must own its .grad."""
    x, r = tensor(4, 9).requires_grad_(), tensor(4, 9, seed=1).requires_grad_()
    add_layer_norm(x, r)[0].square().sum().backward()
    assert same_bits(x.grad, r.grad) and x.grad.data_ptr() != r.grad.data_ptr()


@pytest.mark.parametrize("given", [torch.float32, *HALVES])
def test_rms_norm_with_a_weight_of_another_type(given):
    x, weight = tensor(3, 8, dtype=given), tensor(8, dtype=torch.float64)
    with fastnn.record() as runs:
        found = rms_norm(x, (8,), weight)
    assert [run.backend for run in runs] == ["reference"]
    assert same_bits(found, F.rms_norm(x, (8,), weight))
    with fastnn.use_backend("cpu"), pytest.raises(NotImplementedError, match=r"weight must have .* got torch.float64"):
        rms_norm(x, (8,), weight)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64])
def test_default_epsilon_is_torchs(dtype):
    x = torch.full((2, 8), 1e-3, dtype=dtype)
    rival = F.rms_norm(x, (8,))
    assert_within_budget(rms_norm(x, (8,)), rival.double(), rival, dtype, policy.FORWARD_FACTOR)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("affine", [True, False])
def test_layers_hold_in_training(name, affine):
    theirs = getattr(nn, name)((3, 8), elementwise_affine=affine)
    ours = getattr(fastnn.nn, name)((3, 8), elementwise_affine=affine)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    x = tensor(5, 3, 8)
    assert_within_budget(ours(x), theirs.double()(x.double()), theirs.float()(x), torch.float32, policy.FORWARD_FACTOR)
