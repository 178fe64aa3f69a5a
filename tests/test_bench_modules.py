"""What fastnn.explain counts, and the column that follows from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastnn
from fastnn.bench import limits
from fastnn.bench.machine import OthersLoad
from fastnn.bench.modules import work_of_call
from fastnn.testing.bench_cases import EXP_OPERATIONS, Work


@pytest.fixture
def quick(monkeypatch, tmp_path, extension):
    """Limits measured in no time, into a cache folder of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("_PEAK_SECONDS", "_CACHE_SECONDS", "_MEMORY_SECONDS"):
        monkeypatch.setattr(limits, name, 0.001)
    return tmp_path / "fastnn"


def work(module: nn.Module, x: torch.Tensor) -> Work | None:
    return work_of_call(module, x, module(x))


def test_work_of_layers():
    x = torch.randn(2, 5, 8)
    assert work(nn.Linear(8, 3), x) == Work(4 * (80 + 24 + 3), 4 * 30, 2 * 10 * 8 * 3)
    assert work(nn.Linear(8, 3, bias=False).bfloat16(), x.bfloat16()) == Work(2 * 104, 2 * 30, 480, "bf16")
    assert work(nn.Softmax(-1), x) == Work(320, 320, 80 * EXP_OPERATIONS)
    assert work(fastnn.nn.Softmax(-1), x) == work(nn.Softmax(-1), x)
    assert work(fastnn.nn.Linear(8, 3, activation="gelu"), x) == work(nn.Linear(8, 3), x)
    assert work(nn.GELU(), x) == Work(320, 320, 80)
    assert work(nn.LayerNorm(8), x) == Work(320 + 64, 320, 80)
    assert work(nn.Identity(), x) is None
    assert work(nn.Linear(8, 3).double(), x.double()) is None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down, self.softmax = (
            nn.Linear(256, 1024),
            nn.GELU(),
            nn.Linear(1024, 256),
            nn.Softmax(-1),
        )

    def forward(self, x):
        return self.softmax(self.down(self.act(self.up(x))))


def test_explain_says_how_much_of_the_limit_each_layer_reaches(quick):
    explanation = fastnn.explain(Model().eval(), example_inputs=torch.randn(64, 256))
    shares = {part.name: part.limit_share for part in explanation.parts}
    assert shares.pop("") is None
    assert all(0 < share < 20 for share in shares.values())  # measured in no time, the limits are far off
    assert "of limit" in str(explanation) and "bench limits" in str(explanation)
    assert any(line.rstrip().split("  ")[-2:] and " %" in line for line in str(explanation).splitlines())


def test_the_first_explain_measures_in_haste_and_bench_measures_again(quick, monkeypatch):
    monkeypatch.setattr(OthersLoad, "share", lambda self: 0.0)
    fastnn.explain(Model().eval(), example_inputs=torch.randn(2, 256))
    kept = limits._kept()
    assert kept is not None and kept.load == {"1": 1.0} and list(kept.peak["1"]) == [fastnn._extension._C.isa()]
    measured = limits.measure
    monkeypatch.setattr(limits, "measure", lambda *a, **k: pytest.fail("measured again"))
    fastnn.explain(Model().eval(), example_inputs=torch.randn(2, 256))
    monkeypatch.setattr(limits, "measure", measured)
    found = limits.machine_limits(threads=[1])
    assert found.load == {"1": 0.0} and next(iter(found.peak["1"])) == kept.isa and len(found.peak["1"]) > 1


def test_without_the_extension_the_column_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(limits, "_kept", lambda: None)
    monkeypatch.setattr(limits._extension, "_C", None)
    explanation = fastnn.explain(Model().eval(), example_inputs=torch.randn(2, 256))
    assert all(part.limit_ms is None for part in explanation.parts)
    assert "of limit" not in str(explanation)
