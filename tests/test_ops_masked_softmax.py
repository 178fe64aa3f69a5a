"""What the matrix does not see of masked_softmax: what masks hide, what is saved and written, gradients of masks."""

from __future__ import annotations

import pytest
import torch
from operators import Calls, tensor

import fastnn
from fastnn import masked_softmax
from fastnn.testing import assert_within_budget, policy, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_mask_it_is_softmax(dtype):
    x = tensor(7, 67, dtype=dtype)
    assert same_bits(masked_softmax(x), fastnn.softmax(x, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_takes_part(causal, dtype):
    """Zeros with gradient zero, whether a mask or the input itself made it so."""
    x, hidden = tensor(3, 5, 33, dtype=dtype), torch.ones(5, 33, dtype=torch.bool)
    hidden[2] = False
    for mask in (hidden, torch.zeros(5, 33, dtype=dtype).masked_fill(~hidden, -torch.inf), None):
        leaf = (x if mask is not None else x.masked_fill(~hidden, -torch.inf)).clone().requires_grad_()
        y = masked_softmax(leaf, mask, 0.5, causal)
        (dx,) = torch.autograd.grad(y, leaf, tensor(*x.shape, dtype=dtype, seed=1))
        assert not y[:, 2].any() and not dx[:, 2].any()
        assert ((y.detach().float().sum(-1) - 1).abs() < 1e-2).sum() == 3 * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_hidden_may_be_anything(value):
    x, visible = tensor(6, 40), tensor(6, 40, seed=1) > 0
    assert same_bits(masked_softmax(x.masked_fill(~visible, value), visible), masked_softmax(x, visible))
    later = torch.ones(6, 40, dtype=torch.bool).triu(1)
    assert same_bits(masked_softmax(x.masked_fill(later, value), causal=True), masked_softmax(x, causal=True))


def test_it_is_one_operator_and_masks_are_not_expanded(extension):
    x, padding = tensor(2, 3, 5, 34).requires_grad_(), (tensor(2, 34) > 0)[:, None, None]
    with Calls() as forward:
        y = masked_softmax(x, padding, 0.3, True)
    grad = tensor(2, 3, 5, 34, seed=1)
    with Calls() as backward:
        torch.autograd.grad(y, x, grad)
    for ran, name in ((forward, "masked_softmax_fwd"), (backward, "masked_softmax_bwd")):
        assert [one for one in ran.names if "detach" not in one] == [f"fastnn.{name}.default"]


def test_backward_keeps_the_result_and_nothing_else(extension):
    x, kept = tensor(5, 8).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = masked_softmax(x, tensor(5, 8, seed=1))
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]


@pytest.mark.parametrize("shape", [(4, 9), (1, 9), (4, 1)])
def test_gradient_of_a_mask(shape):
    """Plain PyTorch's, of a call that then runs there as a whole."""
    x, mask, grad = tensor(2, 4, 9), tensor(*shape, seed=1), tensor(2, 4, 9, seed=2)

    def gradients(dtype, call):
        leaves = [t.to(dtype).requires_grad_() for t in (x, mask)]
        return torch.autograd.grad(call(*leaves), leaves, grad.to(dtype))

    ours = gradients(torch.float32, lambda x, m: masked_softmax(x, m, 0.3))
    truth = gradients(torch.float64, lambda x, m: torch.softmax(0.3 * x + m, -1))
    rival = gradients(torch.float32, lambda x, m: torch.softmax(0.3 * x + m, -1))
    for mine, true, theirs in zip(ours, truth, rival, strict=True):
        assert_within_budget(mine, true, theirs, torch.float32, policy.GRADIENT_FACTOR)
    with fastnn.use_backend("cpu"), pytest.raises(NotImplementedError, match="gradient of the mask"):
        masked_softmax(x, mask.clone().requires_grad_())


def test_what_runs_on_the_reference():
    x = tensor(5, 9)
    deep = x.view(5, *(1,) * 8, 9)
    for given, mask in ((x.double(), None), (x, x.double()), (deep, deep > 0)):
        with fastnn.record() as runs:
            assert masked_softmax(given, mask).dtype == given.dtype
        assert [(run.kernel, run.backend) for run in runs] == [("masked_softmax_fwd", "reference")]


def test_a_mask_of_many_dimensions_is_walked(extension):
    """Eight strides that nothing merges."""
    x = tensor(*(2,) * 8, 5)
    mask = (tensor(*(2,) * 8, 5, seed=1) > -1).permute(7, 6, 5, 4, 3, 2, 1, 0, 8)
    with fastnn.use_backend("reference"):
        expected = masked_softmax(x, mask)
    with fastnn.use_backend("cpu"):
        torch.testing.assert_close(masked_softmax(x, mask), expected)
