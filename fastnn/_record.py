"""Asking what ran: a log of kernel calls, off unless asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from . import _extension


class KernelRun(NamedTuple):
    """One kernel call."""

    kernel: str
    """Operator and pass, e.g. `softmax_fwd`."""
    backend: str
    """`cpu`, `cuda`, `triton` or `reference`."""
    isa: str
    """Instruction set of the CPU code that ran, as its compiler saw it; empty elsewhere."""


_runs: list[KernelRun] | None = None


@contextmanager
def record() -> Iterator[list[KernelRun]]:
    """Records every fastnn kernel that runs inside the block, in all threads; the list is complete when it ends.

    Calls on Triton and on the reference are listed after the extension's. Blocks do not nest (RuntimeError).

    Example:
        >>> with fastnn.record() as runs:
        ...     fastnn.softmax(torch.randn(4, 8), -1)
        >>> runs[0].kernel, runs[0].backend
        ('softmax_fwd', 'cpu')
    """
    global _runs
    if _runs is not None:
        raise RuntimeError("fastnn.record: a recording is already on; blocks do not nest")
    runs: list[KernelRun] = []
    _runs = runs
    if _extension._C is not None:
        _extension._C.record_start()
    try:
        yield runs
    finally:
        if _extension._C is not None:
            runs[:0] = [
                KernelRun(kernel, "cuda", "") if isa == "cuda" else KernelRun(kernel, "cpu", isa)
                for kernel, isa in _extension._C.record_stop()
            ]
        _runs = None


def note_reference(kernel: str) -> None:
    """Called where an op runs on the reference."""
    if _runs is not None and not torch.compiler.is_compiling():
        _runs.append(KernelRun(kernel, "reference", ""))


def note_triton(kernel: str) -> None:
    """Called where a Triton kernel is launched."""
    if _runs is not None:
        _runs.append(KernelRun(kernel, "triton", ""))
