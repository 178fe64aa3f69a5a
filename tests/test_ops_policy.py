"""The judge itself: the error policy must fail what is wrong, and say where."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastnn
from fastnn import testing
from fastnn.testing import BudgetError, PromiseError, assert_within_budget, find_case, policy, same_bits
from fastnn.testing.inputs import ARRANGE, arrange, fill

NAN, INF = float("nan"), float("inf")


def judge(ours, truth, rival=None, dtype=torch.float32, factor=2.0):
    truth = torch.tensor(truth, dtype=torch.float64)
    rival = truth.to(dtype) if rival is None else torch.tensor(rival, dtype=dtype)
    return assert_within_budget(torch.tensor(ours, dtype=dtype), truth, rival, dtype, factor, where="case on isa")


def test_passes_within_factor_times_the_rivals_error():
    assert judge([1.0, 2.0002], [1.0, 2.0], [1.0, 2.0001]).error == pytest.approx(2e-4, rel=1e-2)


def test_fails_beyond_it_and_says_where():
    with pytest.raises(BudgetError) as failure:
        judge([[1.0, 2.0], [1.0, 2.5]], [[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0001], [1.0, 2.0]])
    for words in ("case on isa", "(1, 1)", "float32", "2.5", "1 of 4", "2 x torch's"):
        assert words in str(failure.value)


@pytest.mark.parametrize("dtype", policy.FLOOR)
def test_floor_is_relative_to_the_largest_truth(dtype):
    floor = policy.FLOOR[dtype]
    truth = torch.tensor([100.0, 0.0], dtype=torch.float64)
    for share, passes in ((0.9, True), (1.2, False)):
        ours = torch.tensor([100.0, 100 * floor * share], dtype=dtype)
        if passes:
            assert_within_budget(ours, truth, truth.to(dtype), dtype, 2.0)
        else:
            with pytest.raises(BudgetError):
                assert_within_budget(ours, truth, truth.to(dtype), dtype, 2.0)


@pytest.mark.parametrize(
    ("ours", "truth"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-INF, INF), (NAN, INF), (INF, NAN)]
)
def test_special_values_must_be_in_place(ours, truth):
    with pytest.raises(BudgetError, match="out of place"):
        judge([0.0, ours], [0.0, truth])
    judge([0.0, truth], [0.0, truth])


def test_overflow_of_the_narrow_type_is_no_error():
    judge([INF], [1e6], dtype=torch.float16)
    with pytest.raises(BudgetError, match="out of place"):
        judge([INF], [1e3], dtype=torch.float16)


def test_wrong_shape_and_dtype_fail():
    with pytest.raises(BudgetError, match="expected"):
        judge([[1.0]], [1.0])
    one = torch.ones(3)
    with pytest.raises(BudgetError, match="float16"):
        assert_within_budget(one.half(), one.double(), one, torch.float32, 2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_truncation_is_a_bias(dtype):
    truth = torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nearest = truth.to(dtype)
    bits = nearest.view(torch.int16)
    truncated = torch.where(nearest.double().abs() > truth.abs(), bits - 1, bits).view(dtype)
    assert_within_budget(truncated, truth, nearest, dtype, 2.0)  # which is why there is a test of the bias
    policy.assert_unbiased(nearest, truth, nearest)
    with pytest.raises(BudgetError, match=r"mean rounding error -0\.[45]"):
        policy.assert_unbiased(truncated, truth, nearest)


def test_dull_truth_is_refused():
    policy.assert_bites(torch.randn(100).double())
    policy.assert_bites(torch.empty(0).double())
    with pytest.raises(BudgetError, match="does not bite"):
        policy.assert_bites(torch.zeros(100).double())
    with pytest.raises(BudgetError, match="does not bite"):
        policy.assert_bites(torch.tensor([1.0] + [1e-9] * 99).double())


def test_same_bits_tells_signed_zeros_and_accepts_nan():
    assert same_bits(torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.ones(2), torch.ones(2).double())
    assert not same_bits(torch.ones(2), torch.ones(1, 2))


@pytest.mark.parametrize("layout", ARRANGE)
def test_layouts_are_what_they_say(layout):
    values = fill((4, 6, 5), torch.float32, torch.Generator().manual_seed(0))
    view = arrange(values, layout)
    if layout == "expanded":
        assert view.stride(0) == 0 and torch.equal(view[3], values[0])
    else:
        assert torch.equal(view, values)
    assert view.is_contiguous() == (layout in ("contiguous", "offset"))
    assert (view.storage_offset() == 1) == (layout == "offset")
    gaps = {"strided": 120, "padded_rows": 4 * 6 * 3, "offset": 4}
    memory = torch.empty(0).set_(view.untyped_storage())
    assert int(memory.isnan().sum()) == gaps.get(layout, 0)


def broken(**changes):
    return dataclasses.replace(find_case("softmax", "rows"), **changes)


def test_check_catches_a_wrong_result():
    with pytest.raises(BudgetError, match="softmax/rows fp32 on reference forward"):
        testing.check(broken(call=lambda i: fastnn.softmax(i["input"], -1) * 1.001), "fp32", testing.REFERENCE)


def test_check_catches_a_write_to_an_input():
    with pytest.raises(PromiseError, match="input was written to"):
        testing.check(
            broken(call=lambda i: torch.softmax(i["input"].detach().add_(1), -1), differentiable=()),
            "fp32",
            testing.REFERENCE,
        )


def test_check_catches_a_write_to_a_gap():
    def call(inputs):
        inputs["input"].as_strided((5, 50), (100, 2), 1).fill_(1.0)
        return torch.softmax(inputs["input"], -1)

    case = dataclasses.replace(find_case("softmax", "every_other"), call=call, differentiable=())
    with pytest.raises(PromiseError, match="input was written to"):
        testing.check(case, "fp32", testing.REFERENCE)


def test_check_catches_a_write_to_grad_output():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.mul_(1.5).clone()

    case = broken(call=lambda i: Bad.apply(i["input"]), reference=lambda i: i["input"] * 1.0)
    with pytest.raises(PromiseError, match="grad_output was written to"):
        testing.check(case, "fp32", testing.REFERENCE)


def test_check_catches_a_result_that_changes():
    noise = iter([0.0, 1e-9])

    def call(inputs):
        return torch.softmax(inputs["input"], -1) + next(noise)

    with pytest.raises(PromiseError, match="differs between two runs"):
        testing.check(broken(call=call, differentiable=()), "fp32", testing.REFERENCE)


def test_check_catches_what_did_not_run():
    with pytest.raises(PromiseError, match="softmax_fwd did not run"):
        testing.check(broken(call=lambda i: torch.softmax(i["input"], -1)), "fp32", testing.REFERENCE)


def test_check_catches_another_instruction_set(extension, monkeypatch):
    """`record` reports what the code says of itself, so a target that is not switched to is found out."""
    supported = [target for target in testing.targets() if target.isa]
    if len(supported) < 2:
        pytest.skip("this CPU runs only one instruction set")
    lowest = testing.Target("cpu", supported[0].isa)
    monkeypatch.setattr(testing.Target, "forced", lambda self: testing.poisoned())
    with pytest.raises(PromiseError, match="ran elsewhere"):
        testing.check(find_case("softmax", "rows"), "fp32", lowest)


def test_unknown_layout_and_double_names_are_refused():
    with pytest.raises(ValueError, match="unknown layout"):
        broken(layout="diagonal")
    from fastnn.testing.cases import _check_unique

    with pytest.raises(ValueError, match="twice"):
        _check_unique("softmax", ["a", "a"], ["softmax", "softmax"])
