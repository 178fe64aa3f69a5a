"""NaN in every buffer the bindings allocate, so that memory read before it is written shows in the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .. import _extension


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills outputs and scratch of the kernels with NaN on allocation inside the block.

    `FASTNN_POISON=1` does the same for a process. Where there is no extension there is nothing to fill.
    """
    extension = _extension._C
    if extension is None:
        yield
        return
    before = extension.poison()
    extension.set_poison(True)
    try:
        yield
    finally:
        extension.set_poison(before)
