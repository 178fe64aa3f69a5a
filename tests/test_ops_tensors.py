"""Tensors out of the ordinary: misaligned memory, negated views, one tensor in two roles, subclasses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnn import cross_entropy, linear, log_softmax, scaled_dot_product_attention, softmax
from fastnn.testing import assert_within_budget, policy, targets

T, HEADS = torch.tensor([0, 3, 6, -100, 2]), (1, 1, 5, 7)
W = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))


def right(x):
    """All ops on float32 x (5, 7), against the same values in ordinary memory."""
    plain = torch.empty(x.shape).copy_(x)
    for ours, theirs in (
        (lambda t: softmax(t, -1), lambda t: torch.softmax(t, -1)),
        (lambda t: log_softmax(t, 0), lambda t: torch.log_softmax(t, 0)),
        (lambda t: linear(t, W.to(t.dtype)), lambda t: F.linear(t, W.to(t.dtype))),
        (lambda t: linear(W.to(t.dtype), t), lambda t: F.linear(W.to(t.dtype), t)),
        (lambda t: cross_entropy(t, T), lambda t: F.cross_entropy(t, T)),
        (lambda t: cross_entropy(t, t, t[0]), lambda t: F.cross_entropy(t, t, t[0])),
        (
            lambda t: scaled_dot_product_attention(*[t.view(HEADS)] * 3, t[:, :5]),
            lambda t: F.scaled_dot_product_attention(*[t.view(HEADS)] * 3, t[:, :5]),
        ),
    ):
        found = ours(x)
        assert_within_budget(found, theirs(plain.double()), theirs(plain), torch.float32, policy.FORWARD_FACTOR)


@pytest.mark.parametrize("target", targets(), ids=str)
@pytest.mark.parametrize("bytes_off", [1, 2, 3])
def test_memory_not_aligned_to_its_elements(bytes_off, target):
    buffer = bytearray(4 * 35 + bytes_off)
    x = torch.frombuffer(buffer, dtype=torch.float32, offset=bytes_off, count=35).view(5, 7)
    x.copy_(torch.randn(5, 7))
    assert x.data_ptr() % 4
    with target.forced():
        right(x)


def test_negated_view():
    """The imaginary part of a conjugate: torch flips the sign lazily, on who reads the memory."""
    x = torch.randn(5, 7, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    right(x)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: cross_entropy(x, T, reduction="none"), lambda x: F.cross_entropy(x, T, reduction="none")),
        (
            lambda x: scaled_dot_product_attention(*[x.view(HEADS)] * 3),
            lambda x: F.scaled_dot_product_attention(*[x.view(HEADS)] * 3),
        ),
    ],
    ids=["cross_entropy", "attention"],
)
def test_negated_grad_output_of_losses_and_attention(ours, theirs):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = ours(x)
    grad = torch.randn(y.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(2)).conj().imag
    assert grad.is_neg()
    (found,) = torch.autograd.grad(y, x, grad)
    (truth,) = torch.autograd.grad(theirs(x.double()), x, grad.double())
    (rival,) = torch.autograd.grad(theirs(x), x, grad)
    assert_within_budget(found, truth.double(), rival, torch.float32, policy.GRADIENT_FACTOR)


def test_negated_grad_output():
    x = torch.randn(5, 7, requires_grad=True)
    grad = torch.randn(5, 7, dtype=torch.complex64).conj().imag
    (ours,) = torch.autograd.grad(softmax(x, -1), x, grad)
    (truth,) = torch.autograd.grad(torch.softmax(x.double(), -1), x, grad.double())
    (rival,) = torch.autograd.grad(torch.softmax(x, -1), x, grad)
    assert_within_budget(ours, truth.double(), rival, torch.float32, policy.GRADIENT_FACTOR)


def test_one_tensor_in_all_roles():
    def gradient(call, dtype):
        t = torch.randn(5, 5, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        return torch.autograd.grad(call(t, t, t[0]).square().sum(), t)[0]

    found = (gradient(linear, torch.float32), gradient(F.linear, torch.float64), gradient(F.linear, torch.float32))
    assert_within_budget(*found, torch.float32, policy.GRADIENT_FACTOR)


class Marked(torch.Tensor):
    pass


def test_subclasses_come_back():
    x = torch.randn(5, 7).as_subclass(Marked)
    for leaf in (x, x.clone().requires_grad_()):
        assert type(softmax(leaf, -1)) is Marked
        assert type(linear(leaf, W)) is Marked
        assert type(cross_entropy(leaf, T)) is Marked
        assert type(scaled_dot_product_attention(*[leaf[None, None]] * 3)) is Marked


def test_result_of_an_op_as_input_of_the_next():
    """Contiguous, of its own memory: never a view of the input, even where nothing is to be computed."""
    x = torch.randn(5, 7)
    for y in (softmax(x, -1), linear(x, torch.eye(7)), softmax(x[:, :1], -1), softmax(torch.empty(0, 3), -1)):
        assert y._base is None and y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
