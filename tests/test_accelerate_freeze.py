"""Frozen weights: used where they may be, never stale, owned by the layer alone."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate_models import accelerated, assert_same_answers, entry, mlp, x
from torch import nn
from torch.func import functional_call

import fastnn

pytestmark = pytest.mark.usefixtures("extension")


@pytest.fixture
def model():
    return mlp().eval()


def kernels(model, *args):
    with torch.no_grad(), fastnn.record() as runs:
        model(*args)
    return [run.kernel for run in runs if run.kernel.startswith("linear")]


def test_packed_once_and_used(model):
    ours, report = accelerated(model, example_inputs=x(), freeze=True)
    assert report.packed_bytes >= sum(4 * m.weight.numel() for m in model if isinstance(m, nn.Linear))
    assert "packed weights" in str(report)
    assert {e.kernel for e in report.entries if e.was == "Linear"} == {"linear_packed_fwd"}
    assert kernels(ours, x()) == ["linear_packed_fwd"] * 3
    with torch.no_grad():
        assert_same_answers(ours, model, x())


def test_not_frozen_unless_asked(model):
    ours, report = accelerated(model)
    assert report.packed_bytes == 0 and kernels(ours, x()) == ["linear_fwd"] * 3
    again = fastnn.accelerate(ours, freeze=True)
    assert [e.name for e in again.accelerated] == ["0", "2", "4"] and kernels(ours, x()) == ["linear_packed_fwd"] * 3
    again.restore()
    assert kernels(ours, x()) == ["linear_fwd"] * 3 and type(ours[0]) is fastnn.nn.Linear


def test_not_used_where_a_gradient_of_the_weight_is_wanted(model):
    ours, _ = accelerated(model, freeze=True)
    with fastnn.record() as runs:
        ours(x())
    assert "linear_packed_fwd" not in [run.kernel for run in runs]
    assert_same_answers(ours, model, x())


def in_place(model):
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[2].bias.add_(1)


def loaded(model):
    torch.manual_seed(5)
    model.load_state_dict(mlp().state_dict())


def assigned(model):
    torch.manual_seed(5)
    model.load_state_dict(mlp().state_dict(), assign=True)


def trained(model):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)  # does not move the weight's version
    model(x()).square().sum().backward()
    optimizer.step()
    model.eval()


def swapped(model):
    model[0].weight.data = torch.full((16, 8), 0.25)


def replaced(model):
    model[0].weight = nn.Parameter(torch.full((16, 8), 0.25))


def to_half_and_back(model):
    model.to(torch.bfloat16).to(torch.float32)


CHANGES = [in_place, loaded, assigned, trained, swapped, replaced, to_half_and_back]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_never_stale(change, model):
    ours, _ = accelerated(model, example_inputs=x(), freeze=True)
    for _ in range(3):
        for changed in (ours, model):
            change(changed)
        with torch.no_grad():
            truth = copy.deepcopy(model).double()(x().double())
            torch.testing.assert_close(ours(x()).double(), truth, rtol=1e-3, atol=1e-4)
    assert kernels(ours, x()) == ["linear_packed_fwd"] * 3


def test_another_type_after_freezing(model):
    ours, _ = accelerated(model, example_inputs=x(), freeze=True)
    ours, model = ours.bfloat16(), model.bfloat16()
    with torch.no_grad():
        assert_same_answers(ours, model, x().bfloat16())
    assert ours.double()(x().double()).dtype == torch.float64


def test_weights_that_get_an_old_ones_address():
    layer = fastnn.nn.Linear(64, 64, bias=False).eval().freeze()
    with torch.no_grad():
        for value in range(20):
            layer.weight.data = torch.empty(0)  # gives the memory back, and the next weight may get it
            layer.weight.data = torch.full((64, 64), float(value))
            assert torch.equal(layer(torch.ones(1, 64)), torch.full((1, 64), 64.0 * value))
            weight = torch.full((64, 64), -float(value))
            assert torch.equal(
                functional_call(layer, {"weight": weight}, (torch.ones(1, 64),)), torch.full((1, 64), -64.0 * value)
            )


def test_in_no_state_dict_copy_or_pickle(model):
    ours, report = accelerated(model, freeze=True)
    assert report.packed_bytes
    assert list(ours.state_dict()) == list(model.state_dict())
    other = copy.deepcopy(ours)
    assert other[0].packed is not ours[0].packed and other[0].packed.nbytes == 0
    assert kernels(other, x()) == ["linear_pack", "linear_packed_fwd"] * 3


def test_restore_frees_the_copies(model):
    report = fastnn.accelerate(model, freeze=True)
    assert report.packed_bytes
    report.restore()
    assert report.packed_bytes == 0 and "packed" not in vars(model[0])


def test_a_training_model_is_frozen_for_later(model):
    ours, report = accelerated(model.train(), example_inputs=x(), freeze=True)
    assert report.verified and report.packed_bytes == 0
    assert entry(report, "0").kernel == "linear_fwd"
    assert kernels(ours.eval(), x()) == ["linear_pack", "linear_packed_fwd"] * 3 and report.packed_bytes
