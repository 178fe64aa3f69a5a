"""What the matrix does not see of the activations: what is saved and written, mixed types, who asks for what."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators import Calls, tensor

import fastnn
from fastnn import geglu, gelu, reglu, relu, relu2, silu, swiglu
from fastnn.ops.activation import ACTIVATIONS
from fastnn.testing import assert_within_budget, policy, same_bits
from fastnn.testing.ops.activation import FUNCTIONS, GLUS


def test_every_activation_has_a_function():
    assert set(FUNCTIONS) == set(ACTIVATIONS) - {None} and set(GLUS) < set(FUNCTIONS)


@pytest.mark.parametrize("function", [swiglu, geglu, reglu])
def test_packed_is_the_pair(function):
    """The same bits, and halves of one gradient."""
    gate, up, grad = tensor(7, 33), tensor(7, 33, seed=1), tensor(7, 33, seed=2)
    apart = [t.clone().requires_grad_() for t in (gate, up)]
    packed = torch.cat((gate, up), -1).requires_grad_()
    with fastnn.use_backend("cpu"):
        y, z = function(*apart), function(packed)
        found = torch.autograd.grad(y, apart, grad)
        (both,) = torch.autograd.grad(z, packed, grad)
    assert same_bits(y, z) and same_bits(torch.cat(found, -1), both) and both.is_contiguous()


@pytest.mark.parametrize("shape", [(6, 40), (3, 4, 34)])
def test_packed_copies_nothing(shape, extension):
    """Forward and backward are one operator each: no chunk, no cat, no copy."""
    x = tensor(*shape).requires_grad_()
    grad = tensor(*shape[:-1], shape[-1] // 2)
    with Calls() as forward:
        y = swiglu(x)
    with Calls() as backward:
        torch.autograd.grad(y, x, grad)
    assert forward.names == ["fastnn.activation_fwd.default"]
    assert [name for name in backward.names if "detach" not in name] == ["fastnn.activation_bwd.default"]


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_only_the_wanted_gradients_are_computed(wanted, extension):
    gate, up = tensor(5, 9), tensor(5, 9, seed=1)
    leaves = [t.clone().requires_grad_(w) for t, w in zip((gate, up), wanted, strict=True)]
    every = [t.clone().requires_grad_() for t in (gate, up)]
    found = torch.autograd.grad(swiglu(*leaves).sum(), [t for t in leaves if t.requires_grad])
    full = torch.autograd.grad(swiglu(*every).sum(), every)
    asked = [t for t, w in zip(full, wanted, strict=True) if w]
    assert all(same_bits(a, b) for a, b in zip(found, asked, strict=True))
    bias, x = tensor(9, seed=2).requires_grad_(), tensor(5, 9)
    (db,) = torch.autograd.grad(gelu(x, bias=bias).sum(), bias)
    truth = torch.autograd.grad(F.gelu(x.double() + bias.double()).sum(), bias)[0]
    assert_within_budget(db, truth, truth.float(), torch.float32, policy.GRADIENT_FACTOR)


def saved(function, *leaves):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(*leaves)
    return kept


def test_backward_keeps_the_inputs_and_nothing_else(extension):
    x, up, bias = tensor(5, 8).requires_grad_(), tensor(5, 8, seed=1).requires_grad_(), tensor(8, seed=2)
    for function, leaves in (
        (gelu, [x]),
        (lambda x, b: silu(x, bias=b), [x, bias]),
        (swiglu, [x, up]),
        (swiglu, [x]),
    ):
        kept = saved(function, *leaves)
        assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in leaves]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_gate_and_up_of_two_types(dtypes):
    """As torch's product: in the wider type; each gradient of its operand's own."""
    gate, up = tensor(5, 9, dtype=dtypes[0]).requires_grad_(), tensor(5, 9, dtype=dtypes[1], seed=1).requires_grad_()
    y = swiglu(gate, up)
    assert y.dtype == (F.silu(gate) * up).dtype == torch.float32
    y.sum().backward()
    assert (gate.grad.dtype, up.grad.dtype) == dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_float32_bias_is_not_rounded(dtype):
    """Sums of what is not rounded, in float32, beside half precision."""
    x, bias, grad = tensor(3001, 33, dtype=dtype), tensor(33, seed=1), tensor(3001, 33, dtype=dtype, seed=2)
    leaf = bias.clone().requires_grad_()
    (found,) = torch.autograd.grad(silu(x, bias=leaf), leaf, grad)
    wide = bias.double().requires_grad_()
    (truth,) = torch.autograd.grad(F.silu(x.double() + wide), wide, grad.double())
    assert found.dtype == torch.float32
    assert_within_budget(found, truth, truth.float(), torch.float32, policy.GRADIENT_FACTOR)


@pytest.mark.parametrize("function", [relu, relu2])
def test_infinite_gradients_stop_where_the_activation_is_cut_off(function):
    """0 times infinity is no number; torch gives 0 here, and so does the kernel."""
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0] * 9, requires_grad=True)
    (found,) = torch.autograd.grad(function(x), x, torch.full((36,), float("inf")))
    assert found.tolist() == [0.0, 0.0, 0.0, float("inf")] * 9


def test_an_expanded_gradient_of_a_packed_input():
    x = tensor(6, 8).requires_grad_()
    swiglu(x).sum().backward()
    wide = x.detach().double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    (F.silu(gate) * up).sum().backward()
    assert_within_budget(x.grad, wide.grad, wide.grad.float(), torch.float32, policy.GRADIENT_FACTOR)


def test_other_floating_types_run_on_the_reference():
    x = tensor(4, 6).double()
    with fastnn.record() as runs:
        assert torch.equal(swiglu(x), F.silu(x[:, :3]) * x[:, 3:])
    assert [(run.kernel, run.backend) for run in runs] == [("activation_fwd", "reference")]
