"""export: the file runs without torch, with the operators that it should have and the model's numbers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy
import pytest
import torch
from torch import nn

import fastnn
from fastnn import Int4Int8Dynamic, Int4WeightOnly, Int8Dynamic, Int8WeightOnly, to_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow  # seconds each, and only where the extra is installed, as make test-slow does


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.norm = fastnn.nn.RMSNorm(64)
        self.head = fastnn.nn.Linear(64, 40, activation="silu")

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


IDS = torch.arange(12).reshape(2, 6)

RUN = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
ids = numpy.arange(12).reshape(2, 6)
numpy.save(sys.argv[2], session.run(None, {session.get_inputs()[0].name: ids})[0])
assert "torch" not in sys.modules
"""


GROUPS = {
    "embed": Int4WeightOnly(32),
    "up": Int4WeightOnly(32, symmetric=False),
    "down": Int8WeightOnly(16),
    "head": Int4WeightOnly(64),
}
OTHERS = {"embed": Int8WeightOnly(16), "up": Int4Int8Dynamic(32), "down": Int4WeightOnly(24), "head": None}


@pytest.mark.parametrize(
    ("config", "ops", "int8", "grouped", "floating", "limit"),
    [
        (None, {"Gather", "MatMul"}, (), (), (), 1e-5),
        (Int8Dynamic(), {"Gather", "QuantizeLinear", "MatMulInteger"}, ("up", "down", "head"), (), (), 1e-5),
        (GROUPS, {"GatherBlockQuantized", "MatMulNBits"}, (), ("up", "down", "head", "embed"), (), 1e-5),
        (OTHERS, {"GatherBlockQuantized", "MatMulNBits", "MatMul"}, (), ("up", "embed"), ("down",), 0.02),
    ],
    ids=["float", "int8", "groups", "others"],
)
def test_a_file_runs_without_torch(tmp_path, config, ops, int8, grouped, floating, limit):
    torch.manual_seed(0)
    model = Net().eval()
    if config is not None:
        fastnn.quantize_(model, config)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = fastnn.export(model, tmp_path / "m.onnx", IDS)
    kinds = {node.op_type for node in onnx.load(found.path).graph.node}
    assert kinds >= ops
    assert (found.int8, found.grouped, found.floating) == (int8, grouped, floating)
    assert found.nbytes == found.path.stat().st_size and found.error <= limit
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    out = tmp_path / "out.npy"
    subprocess.run([sys.executable, "-c", RUN, str(found.path), str(out)], check=True)
    with torch.no_grad():
        expected = model(IDS)
    assert (torch.from_numpy(numpy.load(out)) - expected).abs().max() <= limit * expected.abs().max()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_rows_of_int8_are_rounded_alone(tmp_path):
    torch.manual_seed(0)
    model = fastnn.nn.Int8Linear.from_float(torch.randn(40, 64), torch.nn.Parameter(torch.randn(40)))
    fastnn.export(model, tmp_path / "m.onnx", torch.randn(3, 64), dynamic_shapes=({0: "rows"},))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    more = (
        torch.randn(7, 64) * 10.0 ** torch.arange(-3, 4)[:, None]
    )  # one scale for all would leave the first rows none
    more[2] = 0
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: more.numpy()})[0])
    assert torch.equal(found, model(more))


def test_a_file_with_other_numbers_is_not_written(tmp_path, monkeypatch):
    model = nn.Linear(8, 8)
    monkeypatch.setattr(to_onnx, "_run", lambda path, inputs: [model(inputs[0]) * 1.01])
    with pytest.raises(RuntimeError, match=r"off by 0\.01 of its largest magnitude, more than 0\.001"):
        fastnn.export(model, tmp_path / "m.onnx", torch.randn(2, 8))
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else there(name))
    with pytest.raises(ImportError, match=r"needs onnxruntime; install with:  pip install 'fastnn\[onnx\]'"):
        fastnn.export(nn.Linear(8, 8), tmp_path / "m.onnx", torch.randn(2, 8))
