"""The matrix on interpreted Triton kernels: op x dtype x layout x {forward, each gradient}, and that no cell is empty.

Each layout of an op in one type (the types take turns), in every type with `slow`.
"""

from __future__ import annotations

import pytest

from fastnn import _dispatch, testing
from fastnn.testing import DTYPES, INTERPRETED, LAYOUTS, cases, matrix_cells, op_names

OPS = [op for op in op_names() if not _dispatch.why_no_kernel(op, "triton")]
GROUPS = [(op, layout) for op in OPS for layout in LAYOUTS]


def rows():
    """(op, dtype, layout) for every one."""
    for position, (op, layout) in enumerate(GROUPS):
        for number, dtype in enumerate(DTYPES):
            marks = [] if number == position % len(DTYPES) else [pytest.mark.slow]
            yield pytest.param(op, dtype, layout, id=f"{op}-{dtype}-{layout}", marks=marks)


ROWS = list(rows())


@pytest.mark.parametrize(("op", "dtype", "layout"), ROWS)
def test_cell(op, dtype, layout):
    found = [case for case in cases(op) if case.layout == layout and not case.wide and INTERPRETED.takes(case)]
    # Packed weights are the CPU kernels' own.
    found = [case for case in found if case.forward_kernel == f"{op}_fwd"]
    assert found, f"{op} has no case of layout {layout}"
    testing.check_row(op, dtype, INTERPRETED, layout, found)


def test_no_cell_is_empty():
    """Each cell is one that a row above demands to be filled when it runs."""
    rows = {row.values for row in ROWS}
    for op in OPS:
        cells = matrix_cells(op, [INTERPRETED], LAYOUTS)
        assert {(op, cell.dtype, cell.layout) for cell in cells} == {row for row in rows if row[0] == op}
        assert {cell.dtype for cell in cells} == set(DTYPES)
        assert {cell.layout for cell in cells} == set(LAYOUTS)


def test_every_op_is_seen_in_every_type():
    """The rows that are not slow: each op in each type, in some layout."""
    quick = {row.values[:2] for row in ROWS if not row.marks}
    assert quick == {(op, dtype) for op in OPS for dtype in DTYPES}
