"""Layers whose input the model around them converts to the weight's type: codes would cut it down to whole numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastnn
from fastnn.nn import QuantizedLinear


class Casting(nn.Module):
    """As T5's feed-forward block: the second layer's input gets the type of its weight, unless that is int8."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        x = torch.relu(self.up(x))
        if x.dtype != self.down.weight.dtype and self.down.weight.dtype != torch.int8:
            x = x.to(self.down.weight.dtype)
        return self.down(x)


class CastingAll(Casting):
    def forward(self, x):
        return self.down(torch.relu(self.up(x)).to(self.down.weight.dtype))


@pytest.mark.parametrize(
    ("kind", "config", "left"),
    [
        (Casting, fastnn.Int8Dynamic(), ()),
        (Casting, fastnn.Int8WeightOnly(16), ()),
        (Casting, fastnn.Int4WeightOnly(16), ("1.down",)),
        (CastingAll, fastnn.Int8Dynamic(), ("1.down",)),
        (CastingAll, fastnn.Int4Int8Dynamic(16), ("1.down",)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_inputs_that_take_the_weights_type(kind, config, left, extension):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(32), kind()), torch.randn(5, 32)
    expected = model(x)
    report = fastnn.quantize_(model, config)
    assert tuple(entry.name for entry in report.entries if "reads its weight's type" in entry.reason) == left
    assert isinstance(model[1].up, QuantizedLinear) and isinstance(model[1].down, QuantizedLinear) == (not left)
    assert (model(x) - expected).norm() < 0.2 * expected.norm()


def test_t5_runs_on_4_bits(extension):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=50, **sizes)).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        report = fastnn.quantize_(model, {"*.wo": fastnn.Int8WeightOnly(32), "*": fastnn.Int4WeightOnly(32)})
        assert all(entry.became for entry in report.entries if entry.was == "Linear")
        found = model(input_ids=ids).last_hidden_state
    assert (found - expected).norm() < 0.2 * expected.norm()
