"""Cross-entropy beyond the matrix: gradients that plain PyTorch computes, deprecated arguments, ignored rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn import cross_entropy, testing
from fastnn.ops.cross_entropy import LossOptions, cross_entropy_reference
from fastnn.testing import assert_within_budget, policy, same_bits, targets


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, T = tensor(6, 9), torch.tensor([0, 3, -100, 8, 5, 3])
SHARES, WEIGHT = torch.softmax(tensor(6, 9, seed=1), 1), torch.rand(9, generator=torch.Generator().manual_seed(2)) + 0.1


@pytest.mark.parametrize("target", [target for target in targets() if target.isa], ids=str)
def test_logits_of_any_size(target):
    """Exponents of 2 are fused up to 2^20: about there, far beyond, and where 1.44 times a logit is out of range."""
    spread = torch.linspace(-3, 3, 70).repeat(3, 1)
    for offset in (0.0, 1000.0, 2.0**20 - 2, 2.0**20 + 2, 1e30, 3e38, -1000.0, -(2.0**20) - 2, -1e30, -3e38):
        for scale in (1.0, 2.0**18, 2.0**20, 1e30):
            x, labels = (scale * spread + offset).clamp(-3.4e38, 3.4e38), torch.tensor([69, 68, 0])

            def results(call, dtype, x=x, labels=labels):
                leaf = x.to(dtype, copy=True).requires_grad_()
                loss = call(leaf, labels, reduction="none")
                return loss, torch.autograd.grad(loss.sum(), leaf)[0]

            with target.forced():
                ours = results(cross_entropy, torch.float32)
            truth, rival = results(F.cross_entropy, torch.float64), results(F.cross_entropy, torch.float32)
            factors = policy.FORWARD_FACTOR, policy.GRADIENT_FACTOR
            for a, b, c, factor in zip(ours, truth, rival, factors, strict=True):
                assert_within_budget(a, b, c, torch.float32, factor)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wanted", ["target", "weight", "input target weight"])
def test_gradients_of_probabilities_and_weights(wanted, reduction):
    """The reference's, in plain PyTorch; in torch's own op too they are the exception."""

    def gradients(call, dtype):
        values = {"input": X, "target": SHARES, "weight": WEIGHT}
        leaves = {name: t.to(dtype, copy=True).requires_grad_(name in wanted) for name, t in values.items()}
        loss = call(*leaves.values(), reduction=reduction, label_smoothing=0.1)
        return torch.autograd.grad(loss.sum(), [leaves[name] for name in wanted.split()])

    ours = gradients(cross_entropy, torch.float32)
    truth, rival = gradients(F.cross_entropy, torch.float64), gradients(F.cross_entropy, torch.float32)
    for found in zip(ours, truth, rival, strict=True):
        assert_within_budget(*found, torch.float32, policy.GRADIENT_FACTOR)


@pytest.mark.parametrize(("target", "weight"), [(SHARES.clone().requires_grad_(), None), (T, WEIGHT.clone())])
def test_what_only_the_reference_can_run_is_refused_where_a_backend_is_forced(target, weight, extension):
    weight = None if weight is None else weight.requires_grad_()
    with fastnn.use_backend("cpu"), pytest.raises(NotImplementedError, match=r"cross_entropy.*requires grad"):
        cross_entropy(X, target, weight)
    with fastnn.use_backend("cpu"), torch.no_grad():
        cross_entropy(X, target, weight)
    with fastnn.use_backend("cpu"), pytest.raises(NotImplementedError, match=r"cross_entropy.*float64"):
        cross_entropy(X, SHARES.double())


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_deprecated_arguments(size_average, reduce):
    with pytest.warns(UserWarning) if (size_average, reduce) != (None, None) else _nothing():
        theirs = F.cross_entropy(X, T, None, size_average, -100, reduce)
    ours = cross_entropy(X, T, None, size_average, -100, reduce)
    assert_within_budget(ours, theirs.double(), theirs, torch.float32, policy.FORWARD_FACTOR)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_bytes_as_class_indices():
    expected = F.cross_entropy(X, T.clamp(0))
    assert_within_budget(
        cross_entropy(X, T.clamp(0).to(torch.uint8)), expected.double(), expected, torch.float32, policy.FORWARD_FACTOR
    )


@pytest.mark.parametrize("target", targets(), ids=str)
def test_ignored_rows_have_neither_loss_nor_gradient(target):
    """Exactly; on the kernels even a row of NaN, of which torch makes a NaN gradient."""
    x = X.clone()
    if target.isa:
        x[2] = float("nan")
    x.requires_grad_()
    with target.forced():
        loss = cross_entropy(x, T, reduction="none", z_loss=0.1, label_smoothing=0.1)
        (dx,) = torch.autograd.grad(loss.sum(), x)
    assert loss[2] == 0 and not dx[2].any() and dx[[0, 1, 3, 4, 5]].abs().min() > 0


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.2}])
def test_all_rows_ignored(options):
    """The mean of nothing is NaN, its sum 0; the gradients are 0 or NaN as torch's."""
    nothing = torch.full((6,), -100)
    x = X.clone().requires_grad_()
    assert cross_entropy(x, nothing, **options).isnan()
    total = cross_entropy(x, nothing, reduction="sum", **options)
    assert total == 0
    assert not torch.autograd.grad(total, x)[0].any()


@pytest.mark.parametrize("target", targets(), ids=str)
def test_z_loss_and_softcap_are_what_the_docstring_says(target):
    """Against the formulas, not against the reference."""
    capped = 4 * torch.tanh(X.double() / 4)
    lse = capped.exp().sum(1).log()
    counts = T != -100
    rows = torch.where(counts, WEIGHT.double()[T.clamp(0)] * (lse - capped[range(6), T.clamp(0)]), 0.0)
    z = torch.where(counts, 0.3 * lse.square(), 0.0)
    expected = {
        "none": rows + z,
        "sum": (rows + z).sum(),
        "mean": rows.sum() / WEIGHT.double()[T[counts]].sum() + z.sum() / counts.sum(),
    }
    for reduction, truth in expected.items():
        options = LossOptions(reduction, -100, 0.0, 0.3, 4.0)
        rival = cross_entropy_reference(X, T, WEIGHT, options)
        with target.forced():
            ours = cross_entropy(X, T, WEIGHT, reduction=reduction, z_loss=0.3, softcap=4.0)
        assert_within_budget(ours, truth, rival, torch.float32, policy.FORWARD_FACTOR)
        assert_within_budget(rival, truth, rival, torch.float32, policy.FORWARD_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_logits_give_log_of_the_classes(dtype):
    for classes in (2, 10, 1000, 50257):
        loss = cross_entropy(torch.full((3, classes), 7.0, dtype=dtype), torch.tensor([0, 1, classes - 1]))
        assert abs(loss.item() - math.log(classes)) < policy.FLOOR[dtype] * math.log(classes)


@pytest.mark.parametrize("target", targets(), ids=str)
def test_an_index_out_of_range_is_refused_in_backward_too(target, extension):
    """A target that changed since forward cannot send the kernel out of bounds: autograd sees the change."""
    x, t = X.clone().requires_grad_(), T.clone()
    with target.forced():
        loss = cross_entropy(x, t)
        t[1] = 10**9
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestInPlaceChanges:
    """Between forward and backward, of what backward reads: RuntimeError."""

    @pytest.mark.parametrize("changed", ["input", "target", "weight", "probabilities"])
    def test_operand(self, changed):
        tensors = {"input": X.clone().requires_grad_(), "target": T.clone(), "weight": WEIGHT.clone()}
        if changed == "probabilities":
            tensors["target"] = SHARES.clone()
        loss = cross_entropy(**tensors)
        with torch.no_grad():
            tensors["target" if changed == "probabilities" else changed].mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_loss_may_change(self):
        x = X.clone().requires_grad_()
        loss = cross_entropy(x, T)
        loss.mul_(2)
        loss.backward()
        y = X.clone().requires_grad_()
        (cross_entropy(y, T) * 2).backward()
        assert same_bits(x.grad, y.grad)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"reduction": "sum"}, {}])
def test_gradient_is_a_tensor_of_its_own(options):
    x = X.clone().requires_grad_()
    loss = cross_entropy(x, T, **options)
    grad = torch.rand(loss.shape)
    before = grad.clone()
    first = torch.autograd.grad(loss, x, grad, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x, grad)[0]
    assert same_bits(first, second) and same_bits(grad, before) and same_bits(x.detach(), X)
    assert len({t.untyped_storage().data_ptr() for t in (first, second, x)}) == 3


def test_no_kernel_runs_backward_for_gradients_nobody_asked_for(extension):
    bias = torch.zeros(9, requires_grad=True)
    with fastnn.record() as runs:
        loss = cross_entropy(X, T)
    assert [run.kernel for run in runs] == ["cross_entropy_fwd"] and not loss.requires_grad
    with fastnn.record() as runs:
        (cross_entropy(X, T) + bias.sum()).backward()
    assert [run.kernel for run in runs] == ["cross_entropy_fwd"]


def test_bits_do_not_depend_on_other_rows():
    with testing.best().forced():
        alone = cross_entropy(X[3:4], T[3:4], reduction="none")
        assert same_bits(cross_entropy(X, T, reduction="none")[3:4], alone)
