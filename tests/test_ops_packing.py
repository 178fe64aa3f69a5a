"""A frozen layer's packed weight is never stale, never used while a gradient of it may be wanted, and never copied."""

from __future__ import annotations

import contextlib
import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn.testing import assert_within_budget, policy


@pytest.fixture
def layer(extension):
    torch.manual_seed(0)
    return fastnn.nn.Linear(33, 50, activation="relu").freeze().eval()


X = torch.randn(7, 33, generator=torch.Generator().manual_seed(1))


def kernels(layer, x=X):
    with fastnn.record() as runs:
        layer(x)
    return [run.kernel for run in runs]


def right(layer, x=X):
    """The layer's result is that of its weights as they are now."""
    ours = layer(x)
    w, b = layer.weight.detach(), layer.bias.detach()
    truth = F.relu(F.linear(x.double(), w.double(), b.double()))
    assert_within_budget(ours.detach(), truth, F.relu(F.linear(x, w, b)), x.dtype, policy.FORWARD_FACTOR)


@torch.no_grad()
def test_packs_once_and_reads_the_copy(layer):
    assert kernels(layer) == ["linear_pack", "linear_packed_fwd"]
    assert kernels(layer) == ["linear_packed_fwd"]
    assert layer.packed.nbytes >= layer.weight.nbytes
    right(layer)


@torch.no_grad()
def test_layer_that_is_not_frozen_never_packs(extension):
    layer = fastnn.nn.Linear(33, 50, activation="relu").eval()
    assert kernels(layer) == ["linear_fwd"]


def in_place(layer):
    layer.weight.mul_(2)


def by_data(layer):
    layer.weight.data = layer.weight.data * 2


def by_set(layer):
    layer.weight.set_((layer.weight * 2).detach())


def new_parameter(layer):
    layer.weight = torch.nn.Parameter(layer.weight * 2)


def load_state(layer):
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})


def load_state_assign(layer):
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()}, assign=True)


def copied_into(layer):
    layer.weight.copy_(torch.ones(50, 33))


def view_written(layer):
    layer.weight[3].fill_(1.0)


def optimizer_step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


CHANGES = [
    in_place,
    by_data,
    by_set,
    new_parameter,
    load_state,
    load_state_assign,
    copied_into,
    view_written,
    optimizer_step,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_changed_weight_is_packed_again(layer, change):
    layer(X)
    change(layer)
    assert kernels(layer) == ["linear_pack", "linear_packed_fwd"]
    right(layer)


@torch.no_grad()
def test_other_dtype_is_packed_again(layer):
    layer(X)
    layer.to(torch.bfloat16)
    right(layer, X.bfloat16())
    layer.to(torch.float32)
    right(layer)


@torch.no_grad()
def test_other_instruction_set_is_packed_again(layer, extension):
    before = extension.isa()
    try:
        for isa in extension.isa_supported():
            extension.set_isa(isa)
            right(layer)
            assert kernels(layer) == ["linear_packed_fwd"]
    finally:
        extension.set_isa(before)


class TestTraining:
    def test_never_used_while_a_gradient_of_the_weight_may_be_wanted(self, layer):
        with torch.no_grad():
            layer(X)
        assert layer.packed.nbytes > 0
        assert kernels(layer) == ["linear_fwd"]
        assert layer.packed.nbytes == 0, "a packed copy is kept while the weight trains"
        layer(X).sum().backward()
        assert layer.weight.grad.abs().max() > 0.1

    @torch.no_grad()
    def test_never_used_in_training_mode(self, layer):
        layer(X)
        layer.train()
        assert kernels(layer) == ["linear_fwd"] and layer.packed.nbytes == 0
        layer.eval()
        assert kernels(layer) == ["linear_pack", "linear_packed_fwd"]

    def test_fused_optimizer(self, layer):
        """torch's fused optimizers write to the weight without moving its version."""
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        with torch.no_grad():
            layer(X)
        layer.train()
        layer(X).sum().backward()
        optimizer.step()
        layer.eval()
        with torch.no_grad():
            right(layer)

    def test_fused_optimizer_without_training_mode(self, layer):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        with torch.no_grad():
            layer(X)
        layer(X).sum().backward()
        optimizer.step()
        with torch.no_grad():
            right(layer)

    def test_frozen_parameters_use_it_under_grad_mode(self, layer):
        layer.requires_grad_(False)
        assert kernels(layer) == ["linear_pack", "linear_packed_fwd"]
        x = X.clone().requires_grad_()
        layer(x).sum().backward()
        assert x.grad.abs().max() > 0.1


@torch.no_grad()
def test_reference_and_other_dtypes_do_without(layer):
    with fastnn.use_backend("reference"):
        assert kernels(layer) == ["linear_fwd"]
    layer.to(torch.float64)
    assert kernels(layer, X.double()) == ["linear_fwd"]
    assert layer.packed.nbytes == 0


def test_weight_that_counts_no_changes_is_never_packed(extension):
    with torch.inference_mode():
        layer = fastnn.nn.Linear(33, 50).freeze().eval()
        with pytest.warns(RuntimeWarning, match="created in torch.inference_mode"):
            before = layer(X)
        assert layer.packed.nbytes == 0
        layer.weight.mul_(2)
        with pytest.warns(RuntimeWarning, match="created in torch.inference_mode"):
            after = layer(X)
        assert torch.allclose(after - layer.bias, 2 * (before - layer.bias), atol=1e-5)


QUANTIZED = {
    "int8": lambda w: fastnn.nn.Int8Linear.from_float(w),
    "int4": lambda w: fastnn.nn.Int4Linear.from_float(w, group_size=16, int8_input=True),
    "int8_only": lambda w: fastnn.nn.Int8WeightOnlyLinear.from_float(w, group_size=16),
    "int8_blocks": lambda w: fastnn.nn.Int8BlockSparseLinear.from_dense(w),
}


@pytest.mark.parametrize("make", QUANTIZED.values(), ids=QUANTIZED)
def test_codes_count_changes_wherever_the_layer_is_made(extension, make):
    weight, x = torch.randn(48, 32), torch.randn(3, 32)
    expected = make(weight)(x)
    with torch.inference_mode():
        layer = make(weight.clone()).eval()  # an inference tensor
        assert torch.equal(layer(x), expected)
        kept = layer.packed._packed
        layer(x)
        assert kept is not None and layer.packed._packed is kept
        layer.weight_scale.mul_(2)
        assert torch.allclose(layer(x), 2 * expected)
    assert torch.allclose(layer(x), 2 * expected)
    assert not any(b.is_inference() for b in layer.buffers())


@torch.no_grad()
def test_in_no_state_dict_copy_or_pickle(layer):
    layer(X)
    assert list(layer.state_dict()) == ["weight", "bias"]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.packed is not layer.packed and other.packed.nbytes == 0
        assert torch.equal(other(X), layer(X))
        other.weight.zero_()
        right(layer)
        right(other)


@torch.no_grad()
def test_drop_frees_it(layer):
    layer(X)
    layer.packed.drop()
    assert layer.packed.nbytes == 0
    right(layer)


def test_freed_with_the_layer(extension):
    layer = fastnn.nn.Linear(33, 50).freeze().eval()
    with torch.no_grad():
        layer(X)
    alive = weakref.ref(layer.packed._packed)
    del layer
    assert alive() is None


@pytest.mark.parametrize("activation", ["relu", None])
def test_compiled_layer(extension, activation):
    layer = fastnn.nn.Linear(33, 50, activation=activation).freeze().eval()
    with torch.no_grad():
        expected = layer(X)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert_within_budget(compiled(X), expected.double(), expected, torch.float32, policy.FORWARD_FACTOR)
        layer.weight.mul_(2)
        expected = layer(X)
        assert_within_budget(compiled(X), expected.double(), expected, torch.float32, policy.FORWARD_FACTOR)


def test_layer_takes_torchs_state_and_constructor():
    ours, theirs = fastnn.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5)
    assert_within_budget(ours(x).detach(), theirs.double()(x.double()), theirs.float()(x), torch.float32, 2.0)
    assert fastnn.nn.Linear(5, 4, False, "cpu", torch.bfloat16).weight.dtype == torch.bfloat16
    assert "activation='gelu'" in repr(fastnn.nn.Linear(5, 4, activation="gelu"))
    with pytest.raises(ValueError, match="activation"):
        fastnn.nn.Linear(5, 4, activation="swish")


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_softmax_layers(name, shape):
    x = torch.randn(shape)
    for dim in (None, 0, -1):
        ours, theirs = getattr(fastnn.nn, name)(dim), getattr(torch.nn, name)(dim)
        with pytest.warns(UserWarning, match="Implicit dimension") if dim is None else contextlib.nullcontext():
            rival, truth = theirs(x), theirs(x.double())
        assert_within_budget(ours(x), truth, rival, torch.float32, policy.FORWARD_FACTOR)
        assert repr(ours) == repr(theirs)
