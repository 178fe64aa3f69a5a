"""The matrix: op x dtype x instruction set x layout x {forward, each gradient}, and that no cell of it is empty."""

from __future__ import annotations

import inspect
import re
from itertools import product
from pathlib import Path

import pytest

import fastnn
from fastnn import _dispatch, _extension, testing
from fastnn.testing import (
    LAYOUTS,
    MATRIX_LAYOUTS,
    REFERENCE_DTYPES,
    cases,
    matrix_cells,
    op_names,
    targets,
    unavailable,
)

OPS_DEF = Path(__file__).resolve().parent.parent / "csrc/ops.def"
# The functions that together have every tensor argument of an op; the others are called as their op.
PUBLIC = {
    "activation": ("gelu", "swiglu"),
    "attention": ("scaled_dot_product_attention", "attention_varlen"),
    "linear": ("linear", "block_sparse_linear"),
    "mlp": ("mlp", "swiglu_mlp"),
    "norm": ("add_layer_norm",),
}
# Gradients that plain PyTorch computes (tests/test_ops_<op>.py), and tensors that have none.
PLAIN = {
    "attention": {"attn_mask", "cu_seqlens_q", "cu_seqlens_k"},
    "cross_entropy": {"target", "weight"},
    "linear": {"columns", "starts"},
    "linear_cross_entropy": {"target", "weight"},
    "masked_softmax": {"mask"},
    "rope": {"cos", "sin", "positions"},
}


def rows():
    """(op, dtype, target, layout) for every one; those that this machine cannot run are skipped with the reason."""
    reasons = unavailable()
    everywhere = (*targets(), *reasons)
    # Targets innermost: rows that are compared with the same truth follow each other.
    for op, dtype, layout, target in product(op_names(), REFERENCE_DTYPES, LAYOUTS, everywhere):
        marks = [pytest.mark.skip(reason=reasons[target])] if target in reasons else []
        if dtype in target.dtypes:
            yield pytest.param(op, dtype, target, layout, id=f"{op}-{dtype}-{target}-{layout}", marks=marks)


ROWS = list(rows())


@pytest.mark.parametrize(("op", "dtype", "target", "layout"), ROWS)
def test_cell(op, dtype, target, layout):
    found = [case for case in cases(op) if case.layout == layout and not case.wide]
    assert found, f"{op} has no case of layout {layout}"
    testing.check_row(op, dtype, target, layout, found)


def test_no_cell_is_empty():
    """Each cell is one that a row above demands to be filled when it runs."""
    rows = {row.values for row in ROWS}
    for op in op_names():
        for target in targets():
            cells = matrix_cells(op, [target], LAYOUTS)
            assert {(op, cell.dtype, target, cell.layout) for cell in cells} <= rows
            assert {cell.dtype for cell in cells} == set(target.dtypes)
            assert {cell.layout for cell in cells} == set(LAYOUTS)


def test_matrix_spans_what_was_promised():
    """The axes come from the op list, the dispatcher and the extension, not from whatever cases there happen to be."""
    assert list(op_names()) == sorted(re.findall(r"^FASTNN_OP\((\w+)\)", OPS_DEF.read_text(), re.MULTILINE))
    assert set(MATRIX_LAYOUTS) >= {"contiguous", "strided", "expanded", "offset", "empty", "tail"}
    assert set(testing.DTYPES.values()) == set(_dispatch.KERNEL_DTYPES)
    if _extension._C is not None:
        assert sorted(op_names()) == sorted(_extension._C.ops())
        spanned = {target.isa for target in (*targets(), *unavailable()) if target.backend == "cpu"}
        assert spanned == set(_extension._C.isa_compiled())


@pytest.mark.parametrize("op", op_names())
def test_every_tensor_argument_has_its_gradient_checked(op):
    functions = [getattr(fastnn, name) for name in PUBLIC.get(op, (op,))]
    parameters = [p for function in functions for p in inspect.signature(function).parameters.values()]
    tensors = {p.name for p in parameters if re.match(r"Tensor\b", str(p.annotation))} - PLAIN.get(op, set())
    assert {f"grad_{name}" for name in tensors} | {"forward"} == {part for case in cases(op) for part in case.parts}


@pytest.mark.parametrize("op", op_names())
def test_every_layout_has_all_parts(op):
    parts = {part for case in cases(op) for part in case.parts}
    for layout in MATRIX_LAYOUTS:
        covered = {part for case in cases(op) if case.layout == layout and not case.wide for part in case.parts}
        assert covered == parts, f"{op}: layout {layout} lacks {sorted(parts - covered)}"
