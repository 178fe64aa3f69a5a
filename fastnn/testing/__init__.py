"""One test policy, in one place: cases, error budget, poison. Used by the tests, the benchmarks and `verify`.

Needs neither pytest nor the compiled extension.

Example:
    >>> from fastnn import testing
    >>> case = testing.find_case("softmax", "rows")
    >>> testing.check(case, "bf16", testing.best()).measured["forward"].error < 0.01
    True
"""

from .cases import (
    DTYPES,
    LAYOUTS,
    MATRIX_LAYOUTS,
    REFERENCE_DTYPES,
    Case,
    Inputs,
    InvalidCall,
    cases,
    find_case,
    invalid_calls,
    op_names,
)
from .matrix import Cell, PromiseError, Verdict, check, check_row, matrix_cells
from .poison import poisoned
from .policy import BudgetError, assert_within_budget, same_bits
from .targets import INTERPRETED, REFERENCE, Target, best, targets, unavailable

__all__ = [
    "DTYPES",
    "INTERPRETED",
    "LAYOUTS",
    "MATRIX_LAYOUTS",
    "REFERENCE",
    "REFERENCE_DTYPES",
    "BudgetError",
    "Case",
    "Cell",
    "Inputs",
    "InvalidCall",
    "PromiseError",
    "Target",
    "Verdict",
    "assert_within_budget",
    "best",
    "cases",
    "check",
    "check_row",
    "find_case",
    "invalid_calls",
    "matrix_cells",
    "op_names",
    "poisoned",
    "same_bits",
    "targets",
    "unavailable",
]
