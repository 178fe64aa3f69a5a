"""The sum before the norm in decoder layers, where the sum is used again: one kernel gives the norm and the sum.

Layers of Llama's and GPT-2's kind say

    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)

torch.fx cannot trace them (they are called with caches and tables), so their source is read: these statements are
found in the syntax tree of forward and replaced, nothing else is, and the class gets a stand-in with that forward.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module

from ..nn import LayerNorm, RMSNorm
from ..nn.hooks import hooked
from ..ops.norm import add_layer_norm, add_rms_norm
from .llama import TheirRMSNorm
from .standin import StandIn, checkpoints, why_no_stand_in

_SUM, _TOTAL, _NORM = "_fastnn_sum", "_fastnn_total", "_fastnn_norm_and_sum"


class TwoSummands(NamedTuple):
    """A sum that is not taken yet."""

    input: Any
    residual: Any


def total(value: Any) -> Any:
    """The sum itself."""
    return value.input + value.residual if isinstance(value, TwoSummands) else value


def norm_and_sum(norm: Any, value: Any) -> tuple[Any, Any]:
    """`norm(total(value))` and `total(value)`, from one kernel where the norm is ours and the summands are alike."""
    if isinstance(value, TwoSummands) and are_rows_of(norm, value):
        if isinstance(norm, LayerNorm):
            return add_layer_norm(value.input, value.residual, norm.weight, norm.bias, norm.eps)
        if isinstance(norm, RMSNorm):
            return add_rms_norm(value.input, value.residual, norm.weight, norm.eps)
        return add_rms_norm(value.input, value.residual, norm.weight, norm.epsilon())
    taken = total(value)
    return norm(taken), taken


def are_rows_of(norm: Any, value: TwoSummands) -> bool:
    """Whether the norm is one of ours, over the last dimension, and the summands are of one kind that it takes."""
    a, b = value
    if not isinstance(norm, Module) or "forward" in vars(norm) or hooked(norm):
        return False
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.dtype.is_floating_point:
        return False
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if isinstance(norm, TheirRMSNorm):
        return norm.takes(a)
    if type(norm) not in (LayerNorm, RMSNorm):  # a subclass may have a forward of its own
        return False
    row = vars(norm)["normalized_shape"]
    return len(row) == 1 and a.shape[-1:] == row


class Summing(StandIn):
    """A decoder layer whose norm after a sum runs together with it."""

    @classmethod
    def _forward_for(cls, base: type[Module]) -> Callable[..., Any]:
        found = rewritten(base)  # type: ignore[arg-type]  # a class can be hashed
        if found is None:
            raise ValueError(f"fastnn.accelerate: {base.__name__}.forward has no norm after a sum")
        return found.forward


@dataclass(frozen=True)
class Rewritten:
    """A forward with its sums in its norms."""

    forward: Callable[..., Any]
    norms: tuple[str, ...]
    """Names of the norms, attributes of the module."""


def sums_of(module: Module) -> tuple[str, ...]:
    """Names of the module's norms that can run together with the sum before them."""
    base = type(module)
    if "forward" in vars(module) or issubclass(base, StandIn) or why_no_stand_in(base):
        return ()
    found = rewritten(base)  # type: ignore[arg-type]  # a class can be hashed
    return () if found is None else found.norms


@functools.lru_cache(maxsize=256)
def rewritten(base: type[Module]) -> Rewritten | None:
    """The class's forward, rewritten; None where there is no sum before a norm, or no source to read."""
    forward = inspect.unwrap(base.forward) if checkpoints(base.forward) else base.forward
    if not isinstance(forward, types.FunctionType) or forward.__closure__ or hasattr(forward, "__wrapped__"):
        return None
    if not base.__module__.startswith("transformers."):  # its modules are written in that one way
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    norms = _rewrite(function.body)
    if not norms:
        return None
    scope = {**forward.__globals__, _SUM: TwoSummands, _TOTAL: total, _NORM: norm_and_sum}
    code = compile(ast.fix_missing_locations(tree), f"<{base.__name__}.forward, sums in norms by fastnn>", "exec")
    made: dict[str, Any] = {}
    exec(code, scope, made)  # its own namespace: a global of the function's name stays what it was
    ours = made[function.name]
    ours.__defaults__, ours.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    return Rewritten(functools.wraps(forward)(ours), tuple(norms))


def _rewrite(body: list[ast.stmt]) -> list[str]:
    """Replaces the statements in place; the names of the norms."""
    norms = []
    for i in range(len(body) - 1):
        found = _kept_then_normed(body[i], body[i + 1])
        if found is None:
            continue
        value, kept, norm = found
        taken = _sum_before(body, i, value)
        if taken is None:
            continue
        at, a, b, branches = taken
        body[at] = _statement(f"{value} = {_SUM}({a}, {b})")
        for between in branches:
            for branch in (between.body, between.orelse):
                if any(_reads(statement, value) for statement in branch):
                    branch.insert(0, _statement(f"{value} = {_TOTAL}({value})"))
        body[i] = ast.Pass()
        body[i + 1] = _statement(f"{value}, {kept} = {_NORM}(self.{norm}, {value})")
        norms.append(norm)
    return norms


def _kept_then_normed(first: ast.stmt, second: ast.stmt) -> tuple[str, str, str] | None:
    """(x, kept, norm) of `kept = x` and then `x = self.norm(x)`."""
    kept, x = _assigned(first), _assigned(second)
    if kept is None or x is None or kept == x or not _is_name(first.value, x):  # type: ignore[attr-defined]
        return None
    call = second.value  # type: ignore[attr-defined]
    if not isinstance(call, ast.Call) or call.keywords or len(call.args) != 1 or not _is_name(call.args[0], x):
        return None
    norm = call.func
    if not isinstance(norm, ast.Attribute) or not _is_name(norm.value, "self"):
        return None
    return x, kept, norm.attr


def _sum_before(body: list[ast.stmt], end: int, name: str) -> tuple[int, str, str, list[ast.If]] | None:
    """Where `name = a + b` stands, a, b, and the branches after it; None where anything else comes between."""
    between: list[ast.If] = []
    for at in range(end - 1, -1, -1):
        statement = body[at]
        if isinstance(statement, ast.Assign) and _assigned(statement) == name:
            value = statement.value
            if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Add):
                return None
            if not isinstance(value.left, ast.Name) or not isinstance(value.right, ast.Name):
                return None
            return at, value.left.id, value.right.id, between
        if not isinstance(statement, ast.If) or _reads(statement.test, name):
            return None
        between.append(statement)
    return None


def _assigned(statement: ast.stmt) -> str | None:
    """The name that a plain assignment gives a value."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _reads(tree: ast.AST, name: str) -> bool:
    return any(_is_name(node, name) for node in ast.walk(tree))


def _statement(text: str) -> Any:
    return ast.parse(text).body[0]
