"""Which layers of a model a verb takes: patterns of their paths, and the caller's own say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch.nn import Module

FilterFn = Callable[[Module, str], bool]
"""Called with a layer and its path; False leaves it alone."""
Patterns = str | Sequence[str]
"""One pattern of paths or several (`*`, `?`, as in fnmatch)."""


def matching(verb: str, argument: str, patterns: Patterns, paths: Iterable[str]) -> tuple[str, ...]:
    """The patterns, each of which matches a path.

    Raises:
        ValueError: one that matches none, in the words of `fastnn.<verb>`.
    """
    found, paths = (patterns,) if isinstance(patterns, str) else tuple(patterns), list(paths)
    for one in found:
        if not any(fnmatchcase(path, one) for path in paths):
            raise ValueError(f"fastnn.{verb}: {argument} pattern {one!r} matches no layer with a weight")
    return found


def left_out(
    name: str, module: Module, filter_fn: FilterFn | None, include: Sequence[str], exclude: Sequence[str]
) -> str:
    """Why the caller's choice leaves a layer alone; empty where it takes it. Without `include` all are included."""
    if include and not any(fnmatchcase(name, one) for one in include):
        return "not among those included"
    if any(fnmatchcase(name, one) for one in exclude):
        return "excluded"
    if filter_fn is not None and not filter_fn(module, name):
        return "filter_fn said no"
    return ""
