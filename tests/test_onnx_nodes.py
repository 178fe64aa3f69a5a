"""What stands in for quantised layers in an export: operators that compute what ONNX and onnxruntime say they do.

Needs neither of them: the operators are computed here, as their specifications say. tests/test_to_onnx.py runs files.
"""

from __future__ import annotations

import pytest
import torch

from fastnn import nn, to_onnx
from fastnn.ops.groups import unpack_nibbles


def _values(data, options, scale, zeros=None):
    """What blocks of codes (rows, blocks, bytes of a block) stand for."""
    size = options["block_size"]
    codes = data if options["bits"] == 8 else unpack_nibbles(data, size)
    middle = torch.tensor(float(1 << (options["bits"] - 1))) if zeros is None else zeros[..., None]
    return ((codes.float() - middle) * scale[..., None]).flatten(1)


def _symbolic(name, inputs, attributes=None, *, dtype, shape, version=None):
    """The operators, and that what the graph says of the result is true."""
    kind, (first, second, *rest) = name.split("::")[-1], inputs
    if kind == "QuantizeLinear":
        found = ((first / second).round() + rest[0]).clamp(0, 255).to(torch.uint8)
    elif kind == "MatMulInteger":
        assert first.dtype == torch.uint8 and second.dtype == torch.int8
        found = ((first.double() - rest[0].double()) @ second.double()).int()
    elif kind == "MatMulNBits":
        assert (attributes["N"], attributes["K"]) == (len(second), first.shape[-1])
        found = first @ _values(second, attributes, *rest).t()
    else:
        assert kind == "GatherBlockQuantized" and (attributes["gather_axis"], attributes["quantize_axis"]) == (0, 1)
        blocks = first.reshape(len(first), -1, attributes["block_size"] * attributes["bits"] // 8)
        found = _values(blocks, attributes, *rest)[second]
    assert (found.dtype, tuple(found.shape)) == (dtype, tuple(shape)), kind
    return found


@pytest.fixture(autouse=True)
def operators(monkeypatch, extension):
    monkeypatch.setattr(torch.onnx.ops, "symbolic", _symbolic)
    torch.manual_seed(0)


def _bias(outputs):
    return torch.nn.Parameter(torch.randn(outputs))


def test_int8_has_the_bits_of_the_layer():
    x = (
        torch.randn(2, 7, 48) * 10.0 ** torch.arange(-3, 4)[:, None]
    )  # one scale for all would leave the first rows none
    x[1, 2] = 0
    for bias, activation in ((_bias(40), None), (None, "relu")):
        layer = nn.Int8Linear.from_float(torch.randn(40, 48), bias, activation=activation)
        assert torch.equal(to_onnx._node(layer)(x), layer(x))


LAYERS = {
    "int4": lambda w, b: nn.Int4Linear.from_float(w, b, group_size=16),
    "int4, offsets": lambda w, b: nn.Int4Linear.from_float(w, b, group_size=32, symmetric=False),
    "int8": lambda w, b: nn.Int8WeightOnlyLinear.from_float(w, b, group_size=32),
    "int4, silu": lambda w, b: nn.Int4Linear.from_float(w, b, group_size=64, activation="silu"),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_groups_have_the_numbers_of_the_layer(make):
    weight, x = torch.randn(24, 64), torch.randn(3, 5, 64)
    weight[3, :32] = 0
    layer = make(weight, _bias(24))
    assert torch.allclose(to_onnx._node(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_int8_inputs_are_asked_for():
    level = [
        to_onnx._node(nn.Int4Linear.from_float(torch.randn(8, 32), group_size=32, int8_input=rounds)).options
        for rounds in (True, False)
    ]
    assert level[0]["accuracy_level"] == 4 and "accuracy_level" not in level[1]


def test_tables_give_their_rows():
    ids = torch.tensor([[0, 9], [3, 3]])
    for kind in (nn.Int4Embedding, nn.Int8Embedding):
        table = kind.from_float(torch.randn(10, 64), group_size=32)
        assert torch.equal(to_onnx._node(table)(ids), table(ids))


def test_what_has_no_operator():
    weight = torch.randn(8, 48)
    constant = torch.full((8, 48), 0.5)  # a scale of zero and an offset: no zero point stands for it
    for layer in (
        nn.Int4Linear.from_float(weight, group_size=24),
        nn.Int4Linear.from_float(weight, group_size=8),
        nn.Int4Linear.from_float(weight, group_size=32),
        nn.Int4Linear.from_float(constant, group_size=16, symmetric=False),
        nn.Int4Embedding.from_float(weight, group_size=16, symmetric=False),
        nn.Int4Embedding.from_float(weight.bfloat16(), group_size=16),
        torch.nn.Linear(48, 8),
    ):
        assert to_onnx._node(layer) is None, layer


def test_differences_are_seen():
    one = torch.tensor([1.0, -4.0])
    nan, inf = torch.tensor([float("nan"), 0.0]), float("inf")
    assert to_onnx._error([one, one + 0.04], [one, one]) == pytest.approx(0.01)
    for found in ([one], [one, one[:1]], [one, nan], [nan, one]):
        assert to_onnx._error(found, [one, one]) == inf
