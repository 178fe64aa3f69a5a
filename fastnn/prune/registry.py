"""Which rule says how channels pass through an ATen operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = Callable[[Any, Any, tuple[Any, ...], dict[str, Any], Any], None]
"""(tracer, operator, its arguments, its keyword arguments, its result): labels the result, ties and freezes."""

_RULES: dict[str, Rule] = {}
_KINDS: list[tuple[Callable[[Any, str], bool], Rule]] = []


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operators of the aten namespace; `name` is also `name_`, in place."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def rule_where(fits: Callable[[Any, str], bool]) -> Callable[[Rule], Rule]:
    """Registers a rule for operators of which `fits(operator, name)` holds and that have none of their own."""

    def register(function: Rule) -> Rule:
        _KINDS.append((fits, function))
        return function

    return register


def rule_of(func: Any) -> Rule:
    """The rule of an operator."""
    name = func._schema.name.removeprefix("aten::")
    for one in (name, name.removesuffix("_")):
        if one in _RULES:
            return _RULES[one]
    return next(function for fits, function in (*_KINDS, (_any, unknown)) if fits(func, name))


def _any(func: Any, name: str) -> bool:
    return True


def unknown(t: Any, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """What no rule knows keeps every channel that goes into it."""
    for tensor in t.tensors_of(args, kwargs):
        for atoms in t.labels(tensor):
            t.freeze(atoms, f"{func._schema.name} has no rule and is called")
