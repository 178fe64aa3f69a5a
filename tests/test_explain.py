"""fastnn.explain: where the time goes, what would run, why not, and that the model is left alone."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from accelerate_models import Block, Functional, mlp, state_of, x
from rich.console import Console
from torch import nn

import fastnn
from fastnn import _extension
from fastnn.accelerate.explain import Explanation, Part, _note, copied_by_16_bytes
from fastnn.accelerate.table import Column, pattern, shortened


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width=8) for _ in range(3)])
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.0)
        self.head = nn.Sequential(nn.Linear(8, 3), nn.LogSoftmax(-1))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(self.norm(x)) @ torch.eye(8)
        return self.head(self.drop(x))


@pytest.fixture(scope="module")
def explanation():
    return fastnn.explain(Model().eval(), example_inputs=x())


def part(explanation, name):
    (found,) = [p for p in explanation.parts if p.name == name]
    return found


def test_every_module_that_ran_has_a_part(explanation):
    names = {name for name, module in Model().named_modules() if not isinstance(module, nn.ModuleList)}
    assert {p.name for p in explanation.parts} == names
    assert part(explanation, "norm").calls == 3 and part(explanation, "head.0").calls == 1
    assert [p.ms for p in explanation.parts] == sorted((p.ms for p in explanation.parts), reverse=True)


def test_shares_are_of_own_time_and_add_up(explanation):
    total = sum(p.share for p in explanation.parts)
    assert all(p.share >= 0 for p in explanation.parts) and abs(total - 1) < 1e-6
    assert abs(sum(p.ms for p in explanation.parts) - explanation.ms) < 1e-6 * explanation.ms + 1e-9
    assert 0 < explanation.covered < 1


def test_kernels_and_reasons(explanation):
    expected = {"blocks.0.dense": " + gelu", "norm": "", "head.0": "", "head.1": ""}
    op = {"blocks.0.dense": "linear_fwd", "norm": "norm_fwd", "head.0": "linear_fwd", "head.1": "softmax_fwd"}
    for name, suffix in expected.items():
        found = part(explanation, name)
        assert found.kernel in (op[name] + suffix, "reference" + suffix) and not found.why_not
    assert part(explanation, "blocks.1.act").kernel == "fused into dense"
    assert part(explanation, "drop").why_not == "no kernel yet"
    assert part(explanation, "").why_not == "its own code"


def test_backend_and_instruction_set(extension, explanation):
    found = part(explanation, "head.0")
    assert (found.backend, found.isa) == ("cpu", extension.isa())


def test_reasons_of_other_types():
    found = fastnn.explain(mlp().double(), example_inputs=x().double())
    assert ("float64" in part(found, "0").why_not or _extension.missing) and found.covered == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [Model, Functional, mlp])
def test_the_model_is_left_alone(make, training):
    model = make().train(training)
    model.register_forward_hook(lambda m, a, y: None)
    before = state_of(model)
    hooks = [list(m._forward_hooks.items()) + list(m._forward_pre_hooks.items()) for m in model.modules()]
    with torch.no_grad():
        fastnn.explain(model, example_inputs=x())
        assert not torch.is_grad_enabled()
    assert state_of(model) == before
    assert hooks == [list(m._forward_hooks.items()) + list(m._forward_pre_hooks.items()) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_hooks_are_gone_when_the_model_raises():
    model = mlp()
    with pytest.raises(RuntimeError):
        fastnn.explain(model, example_inputs=torch.randn(2, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_accelerated_model_can_be_explained():
    model = mlp().eval()
    fastnn.accelerate(model)
    found = fastnn.explain(model, example_inputs=x())
    assert found.covered > 0 and not part(found, "0").why_not


def test_tables_fit_and_say_the_same(explanation):
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(explanation)
    for text in (str(explanation), console.export_text()):
        assert "blocks.*.dense" in text and "x3" in text and "fused into dense" in text and "- no kernel yet" in text
        assert max(map(len, text.splitlines())) <= 100


def test_a_column_more_is_one_entry(explanation, monkeypatch):
    more = Column("width", lambda line: f"{line.part.calls} calls")
    module = sys.modules[fastnn.explain.__module__]
    monkeypatch.setattr(module, "COLUMNS", (*module.COLUMNS, more))
    assert "3 calls" in str(explanation)


def test_names_in_tables():
    assert pattern("encoder.layer.11.dense") == "encoder.layer.*.dense" and pattern("0.1.2") == "*.*.2"
    assert shortened("a.bb.ccc", 6) == "…ccc"
    assert shortened("a.bb", 10) == "a.bb"


def test_operands_that_the_cuda_kernels_read_by_elements():
    """As csrc/cuda/linear.cu decides: 16-byte boundaries, one dimension without gaps, the others of whole 16 bytes."""
    half = torch.zeros(64, 64, dtype=torch.bfloat16)
    for t in (half, half.t(), half[:, 8:], half[::3], half[:1, :5], half.view(4, 16, 64), half[:0]):
        assert copied_by_16_bytes(t), t.stride()
    for t in (half[:, 1:], half[:, ::2], half[:, :60].contiguous(), half[:, 1]):
        assert not copied_by_16_bytes(t), t.stride()


def test_what_gpu_kernels_do_with_operands_off_their_boundaries_is_said():
    layer, attention = torch.nn.Linear(3, 5), torch.nn.MultiheadAttention(80, 2)
    assert "one element at a time" in _note(layer, "linear_fwd", "cuda", True)
    assert "copied" in _note(layer, "linear_fwd + gelu", "triton", True)
    assert not _note(layer, "linear_fwd", "triton", False) and not _note(layer, "linear_fwd", "cpu", True)
    assert "16 features" in _note(attention, "attention_fwd", "triton", False)
    assert not _note(attention, "attention_fwd", "cuda", False)


def test_a_note_stands_beside_the_kernel():
    part = Part("a.b", "Linear", 1, 1.0, 1.0, "linear_fwd", "cuda", "", "", None, "read by elements")
    assert "linear_fwd (read by elements)" in " ".join(str(Explanation((part,), 1.0)).split())


def test_wrong_arguments():
    with pytest.raises(TypeError, match="explain: model must be"):
        fastnn.explain(None, example_inputs=x())
    with pytest.raises(ValueError, match="without a shape yet"):
        fastnn.explain(nn.LazyLinear(3), example_inputs=x())
