"""Models that look at the type of a layer's weight: what codes would do to them."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import Module

from .. import nn


@cache
def _attributes(forward: Callable[..., Any] | None) -> tuple[str | None, ...]:
    """The names of attributes that a function reads, in its code's order; None for other instructions."""
    code = None if forward is None else getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return ()
    return tuple(
        one.argval if one.opname in ("LOAD_ATTR", "LOAD_METHOD") else None
        for one in dis.get_instructions(code)
        if one.opname not in ("CACHE", "EXTENDED_ARG")
    )


def why_no_codes(model: Module, path: str, made: nn.QuantizedModule) -> str:
    """Why a layer cannot become `made`, as a report says it: what reads its weight's type; empty where nothing does."""
    kind = reader_of_type(model, path, made)
    return kind and f"{kind} reads its weight's type, to convert its input to it: no codes of such a type"


def reader_of_type(model: Module, path: str, made: nn.QuantizedModule) -> str:
    """The class of the module around a layer whose forward reads the type of the layer's weight; empty where none does.

    It does so to convert the layer's input to that type, and codes have a type that would cut it down to whole numbers.
    T5's blocks spare int8 weights: where the forward names int8, too, codes of that type may stay.
    """
    parts = path.split(".")
    for depth in range(len(parts)):
        kind = type(model.get_submodule(".".join(parts[:depth])))
        names, wanted = _attributes(getattr(kind, "forward", None)), (*parts[depth:], "weight", "dtype")
        spared = made.code_dtype == torch.int8 and "int8" in names
        if not spared and any(names[i : i + len(wanted)] == wanted for i in range(len(names))):
            return kind.__name__
    return ""
