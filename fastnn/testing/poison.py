"""NaN in every buffer that kernels are given, so that memory read before it is written shows in the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .. import _extension


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills outputs and scratch of the kernels with NaN on allocation inside the block.

    Both what the extension's bindings allocate (`FASTNN_POISON=1` does that for a process) and what Python code gets
    from torch's `empty` functions, as the wrappers of Triton kernels do. Not for blocks that torch.compile traces.
    """
    with ExitStack() as stack:
        stack.enter_context(_extension_poisoned())
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
            stack.enter_context(_filled(owner, name))
        yield


@contextmanager
def _extension_poisoned() -> Iterator[None]:
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


@contextmanager
def _filled(owner: Any, name: str) -> Iterator[None]:
    """Replaces a function that gives unwritten memory by one that fills it; `Tensor`'s are inherited, so deleted."""
    original: Callable[..., Tensor] = getattr(owner, name)
    inherited = name not in vars(owner)

    @wraps(original)
    def filled(*arguments: Any, **options: Any) -> Tensor:
        return spoil(original(*arguments, **options))

    setattr(owner, name, filled)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@torch.no_grad()
def spoil(t: Tensor) -> Tensor:
    """`t`, with every element NaN, -7 in integers (which is no index), True in masks."""
    if t.dtype == torch.bool:
        return t.fill_(True)
    if t.is_floating_point() or t.is_complex():
        return t.fill_(float("nan"))
    return t.fill_(-7 % 256 if t.dtype == torch.uint8 else -7)
