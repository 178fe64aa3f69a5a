"""The test policy's cases on interpreted Triton kernels: every case in one type, or in every type with `slow`."""

from __future__ import annotations

from collections import defaultdict

import pytest

from fastnn import testing
from fastnn.testing import DTYPES, INTERPRETED, LAYOUTS, cases, matrix_cells, op_names

# Packed weights are the CPU kernels' own.
CASES = [c for op in op_names() for c in cases(op) if not c.wide and c.forward_kernel != "linear_packed_fwd"]
PAIRS = [(case, dtype) for case in CASES for dtype in DTYPES]
RAN: set[testing.Cell] = set()


def _rotating(position: int) -> str:
    return list(DTYPES)[position % len(DTYPES)]


def _of(case: testing.Case, dtype: str) -> pytest.param:
    marks = [] if dtype == _rotating(CASES.index(case)) else [pytest.mark.slow]
    return pytest.param(case, dtype, id=f"{case.op}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("case", "dtype"), [_of(*pair) for pair in PAIRS])
def test_case(case, dtype):
    RAN.update(testing.check(case, dtype, INTERPRETED).cells)


def test_no_cell_is_empty(request):
    selected = sum(item.name.startswith("test_case[") for item in request.session.items)
    if selected < len(PAIRS):
        pytest.skip(f"only {selected} of {len(PAIRS)} cases were selected")
    wanted = {cell for op in op_names() for cell in matrix_cells(op, [INTERPRETED], LAYOUTS)}
    empty = defaultdict(list)
    for cell in sorted(wanted - RAN, key=str):
        empty[f"{cell.op}-{cell.layout}"].append(str(cell))
    assert not empty, f"{sum(map(len, empty.values()))} of {len(wanted)} cells are empty: {dict(empty)}"
