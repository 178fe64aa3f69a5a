"""What the matrix does not see of dropout_add: which elements are dropped, and that backward drops the same."""

from __future__ import annotations

import pytest
import torch
from operators import Calls, tensor
from torch.utils.checkpoint import checkpoint

import fastnn
from fastnn import dropout_add
from fastnn.ops.attention import dropout_mask
from fastnn.testing import same_bits, targets


def seeded(call, seed=3):
    torch.manual_seed(seed)
    return call()


@pytest.mark.parametrize("target", targets(), ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (3, 7, 131), (1003,)])
def test_what_is_dropped_is_a_function_of_seed_and_position(shape, target):
    """That of attention: Philox by rows, the same everywhere."""
    ones, zeros = torch.ones(shape), torch.zeros(shape)
    with target.forced():
        found = seeded(lambda: dropout_add(ones, zeros, 0.4))
    expected = dropout_mask(shape, seeded(lambda: torch.randint(0, 2**62, ())), 0.4)
    assert torch.equal(found != 0, expected)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_as_many_are_dropped_as_were_asked_for(p):
    """Within five standard deviations, and no row or column more than its neighbours."""
    kept = seeded(lambda: dropout_add(torch.ones(512, 512), torch.zeros(512, 512), p)) != 0
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.float().mean() - (1 - p)) < 5 * deviation
    for dim in (0, 1):
        assert (kept.float().mean(dim) - (1 - p)).abs().max() < 5 * (p * (1 - p) / 512) ** 0.5
    shifted = (kept[:, 1:] == kept[:, :-1]).float().mean()
    assert abs(shifted - (p * p + (1 - p) * (1 - p))) < 0.01


def test_two_calls_differ_and_a_seed_repeats():
    x, r = tensor(40, 50), tensor(40, 50, seed=1)
    first, second = seeded(lambda: (dropout_add(x, r), dropout_add(x, r)))
    assert not torch.equal(first, second)
    assert same_bits(seeded(lambda: dropout_add(x, r)), first)


def test_without_dropout_it_is_the_sum_and_the_generator_is_left_alone(extension):
    x, r = tensor(7, 33).requires_grad_(), tensor(7, 33, seed=1).requires_grad_()
    before = torch.get_rng_state()
    for found in (dropout_add(x, r, 0.0), dropout_add(x, r, 0.3, False), dropout_add(x, r, training=False)):
        assert torch.equal(found, x + r)
        grads = torch.autograd.grad(found, (x, r), 2 * torch.ones(7, 33))
        assert all(torch.equal(g, 2 * torch.ones(7, 33)) for g in grads)
    assert torch.equal(torch.get_rng_state(), before)


def test_everything_dropped():
    x, r = torch.full((5, 9), float("nan")).requires_grad_(), tensor(5, 9)
    y = dropout_add(x, r, 1.0)
    assert torch.equal(y, r)
    y.sum().backward()
    assert not x.grad.any()


def test_backward_keeps_the_seed_and_nothing_else(extension):
    x, r, kept = tensor(40, 50).requires_grad_(), tensor(40, 50, seed=1).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dropout_add(x, r, 0.3)
    assert [t.nbytes for t in kept] == [8]
    grad = torch.ones(40, 50)
    with Calls() as backward:
        torch.autograd.grad(y, (x, r), grad)
    assert [name for name in backward.names if "detach" not in name] == ["fastnn.dropout_add_bwd.default"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_drops_the_same(reentrant):
    r = tensor(40, 50, seed=1)

    def gradient(wrap):
        x = tensor(40, 50).requires_grad_()
        y = seeded(lambda: wrap(lambda t: dropout_add(t.sin(), r, 0.4), x))
        y.square().sum().backward()
        return y.detach(), x.grad

    plain = gradient(lambda call, x: call(x))
    again = gradient(lambda call, x: checkpoint(call, x, use_reentrant=reentrant))
    assert all(same_bits(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_input_and_residual_of_two_types(dtypes):
    x, r = tensor(5, 9, dtype=dtypes[0]).requires_grad_(), tensor(5, 9, dtype=dtypes[1], seed=1).requires_grad_()
    y = dropout_add(x, r)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert (x.grad.dtype, r.grad.dtype) == dtypes


def test_compiled_forward_and_backward_drop_the_same():
    x, r = tensor(40, 50).requires_grad_(), tensor(40, 50, seed=1)
    torch._dynamo.reset()
    y = torch.compile(lambda x, r: dropout_add(x, r, 0.4), backend="aot_eager", fullgraph=True)(x, r)
    kept = (y - r).abs() > 1e-6
    assert 0.5 < kept.float().mean() < 0.7
    y.sum().backward()
    assert torch.equal(x.grad != 0, kept)


def test_other_floating_types_run_on_the_reference():
    x = tensor(4, 6).double()
    with fastnn.record() as runs:
        found = seeded(lambda: dropout_add(x, x, 0.3))
    assert [(run.kernel, run.backend) for run in runs] == [("dropout_add_fwd", "reference")]
    kept = dropout_mask((4, 6), seeded(lambda: torch.randint(0, 2**62, ())), 0.3)
    torch.testing.assert_close(found, torch.where(kept, x / 0.7, 0.0) + x)
