"""Block-sparse weights, and making a model sparse where that makes it faster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .form import Blocks, Int8Blocks, block_grid, to_blocks, to_dense, to_int8_blocks

if TYPE_CHECKING:
    from .breakeven import Advice, Point, advise
    from .config import Sparsify
    from .masks import strip_
    from .report import Entry, Report
    from .schedule import GradualSparsifier
    from .sparsify import sparsify_

__all__ = [
    "Advice",
    "Blocks",
    "Entry",
    "GradualSparsifier",
    "Int8Blocks",
    "Point",
    "Report",
    "Sparsify",
    "advise",
    "block_grid",
    "sparsify_",
    "strip_",
    "to_blocks",
    "to_dense",
    "to_int8_blocks",
]

_LATER = {
    "Advice": "breakeven",
    "Entry": "report",
    "GradualSparsifier": "schedule",
    "Point": "breakeven",
    "Report": "report",
    "Sparsify": "config",
    "advise": "breakeven",
    "sparsify_": "sparsify",
    "strip_": "masks",
}
"""Public name -> the module that it comes from, loaded where it is first asked for: `import fastnn` stays quick."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
