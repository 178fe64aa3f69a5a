"""fastnn.nn: torch's constructors, keys and answers."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from accelerate_models import assert_same_answers, x
from torch import nn

import fastnn
from fastnn.ops.linear import ACTIVATIONS

OWN = {
    "GroupwiseEmbedding", "GroupwiseLinear", "Int4Embedding", "Int4Linear", "Int8Embedding", "Int8Linear",
    "Int8WeightOnlyLinear", "MLP", "QKVLinear", "QuantizedLinear",
    "QuantizedModule", "RotaryEmbedding", "SwiGLU",
}  # torch has none  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(fastnn.nn.__all__) - OWN))
def test_is_torchs_class_with_torchs_arguments_first(name):
    if not hasattr(nn, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    ours, theirs = getattr(fastnn.nn, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    known = list(inspect.signature(theirs).parameters.values())
    given = list(inspect.signature(ours).parameters.values())
    assert [p.name for p in given[: len(known)]] == [p.name for p in known]
    assert all(p.kind is p.KEYWORD_ONLY for p in given[len(known) :])


class Plain(nn.Module):
    """What a layer with an activation stands for."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias, self.activation = layer.weight, layer.bias, layer.activation

    def forward(self, input):
        return ACTIVATIONS[self.activation](nn.functional.linear(input, self.weight, self.bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_with_activation(activation, bias):
    layer = fastnn.nn.Linear(8, 5, bias, activation=activation)
    assert list(layer.state_dict()) == list(nn.Linear(8, 5, bias).state_dict())
    assert_same_answers(layer, Plain(layer), x(2, 3, 8))
    assert (f"activation={activation!r}" in repr(layer)) is (activation is not None)


def test_linear_takes_torchs_state_and_device_and_dtype():
    layer = fastnn.nn.Linear(8, 5, True, "meta", torch.bfloat16)
    assert layer.weight.is_meta and layer.weight.dtype == torch.bfloat16
    theirs = nn.Linear(8, 5)
    ours = fastnn.nn.Linear(8, 5)
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_answers(ours, theirs, x())


def test_linear_draws_the_same_weights_as_torch():
    torch.manual_seed(3)
    theirs = nn.Linear(8, 5)
    torch.manual_seed(3)
    ours = fastnn.nn.Linear(8, 5, activation="relu")
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"Linear: activation must be one of .*'gelu_tanh'.*; got 'mish'"):
        fastnn.nn.Linear(8, 5, activation="mish")


@pytest.mark.parametrize("dim", [None, -1, 0, 1])
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_softmax_layers(name, dim):
    for shape in [(4, 5), (2, 3, 4), (2, 3, 4, 5)]:
        theirs, ours = getattr(nn, name)(dim), getattr(fastnn.nn, name)(dim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about dim=None
            assert_same_answers(ours, theirs, x(*shape))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norm_layers(name):
    theirs, ours = getattr(nn, name)(8, eps=1e-3), getattr(fastnn.nn, name)(8, eps=1e-3)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert repr(ours) == repr(theirs)
    assert_same_answers(ours, theirs, x(2, 3, 8))


@pytest.mark.parametrize("arguments", [(), ("tanh",)])
@pytest.mark.parametrize("name", ["GELU", "SiLU", "ReLU", "Hardswish", "Sigmoid", "Tanh"])
def test_activation_layers(name, arguments):
    if arguments and name != "GELU":
        arguments = (False,) if name in ("SiLU", "ReLU", "Hardswish") else ()
    theirs, ours = getattr(nn, name)(*arguments), getattr(fastnn.nn, name)(*arguments)
    assert repr(ours) == repr(theirs)
    assert_same_answers(ours, theirs, x(2, 3, 8))


@pytest.mark.parametrize("name", ["SiLU", "ReLU", "Hardswish"])
def test_activation_layers_are_never_in_place(name):
    with pytest.raises(ValueError, match=rf"fastnn\.nn\.{name}: inplace must be False, got True"):
        getattr(fastnn.nn, name)(inplace=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize(
    "make", [lambda: fastnn.nn.Linear(8, 8, activation="gelu").freeze(), lambda: fastnn.nn.Softmax(-1)]
)
def test_copies(make, copied):
    layer = make().eval()
    other = copied(layer)
    assert type(other) is type(layer) and torch.equal(other(x()), layer(x()))
