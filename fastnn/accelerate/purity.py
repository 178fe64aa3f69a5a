"""Whether a trace of Python code may stand for the code: what it reads must stay, and it must write nothing.

torch.fx runs a forward once on symbols and keeps the tensor operations. Whatever else the code looked at is then a
constant of the trace. `examine` lists what that was: things that can change become guards, and code that looks at
what no guard can hold (the type of an argument, the grad mode) or that has effects (an attribute written, a context
manager entered) is refused, in words.
"""

from __future__ import annotations

import dis
import functools
import os
import sysconfig
from collections.abc import Iterable, Mapping
from enum import Enum
from types import BuiltinFunctionType, BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from ..nn import hooks

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = (os.path.dirname(__file__) + os.sep, hooks.__file__)
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
# What tracing itself runs, and Python functions that take a symbol as one operation.
_TRANSPARENT = tuple(
    _TORCH + path.replace("/", os.sep)
    for path in (
        "fx/",
        "nn/modules/module.py",
        "nn/modules/container.py",
        "nn/functional.py",
        "nn/parameter.py",
        "functional.py",
        "overrides.py",
        "_jit_internal.py",
        "jit/__init__.py",
        "_tensor.py",
        "utils/_pytree.py",
        "_utils_internal.py",
        "compiler/__init__.py",
    )
)
_CONTEXT_MANAGERS = _STDLIB + "contextlib.py"

# What cannot be guarded or has effects: built-in functions, and functions by their name in whatever module.
_BUILTINS = frozenset(
    "isinstance issubclass type hasattr getattr setattr delattr callable vars globals locals id print open exec eval "
    "input next".split()
)
_FUNCTIONS = frozenset(
    "is_tensor is_grad_enabled is_inference_mode_enabled is_autocast_enabled get_autocast_dtype is_compiling "
    "is_dynamo_compiling is_torchdynamo_compiling warn".split()
)
_EFFECTS = {
    "STORE_ATTR": "writes an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_SUBSCR": "writes to an element",
    "STORE_SLICE": "writes to an element",
    "DELETE_SUBSCR": "deletes an element",
    "STORE_GLOBAL": "writes a global name",
    "DELETE_GLOBAL": "deletes a global name",
    "SETUP_WITH": "enters a context manager",
    "BEFORE_WITH": "enters a context manager",
    "LOAD_SPECIAL": "enters a context manager",
    "SETUP_FINALLY": "catches exceptions",
    "PUSH_EXC_INFO": "catches exceptions",
}
_IMMUTABLE = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size, Enum)
_CALLABLE = (FunctionType, BuiltinFunctionType, BuiltinMethodType, MethodType, ModuleType, type)


class Reads(NamedTuple):
    """What a code object looks at and does, from its bytecode."""

    attributes: frozenset[str]
    globals: frozenset[str]
    effect: str


class ABSENT:
    """Stands for an attribute that is not there; a class, because copies of a class are the class."""


class Guard(NamedTuple):
    """The module's own attribute `key` must be `value`, the same object; `ABSENT` where there must be none."""

    module: Module
    key: str
    value: Any


@functools.lru_cache(maxsize=4096)
def _read(code: CodeType) -> Reads:
    attributes, names, effect = set(), set(), ""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(str(step.argval))
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(str(step.argval))
        elif step.opname == "STORE_DEREF" and step.argval in code.co_freevars:
            effect = effect or "writes a name of an outer function"
        effect = effect or _EFFECTS.get(step.opname, "")
    for inner in code.co_consts:  # lambdas and comprehensions
        if isinstance(inner, CodeType):
            deeper = _read(inner)
            attributes |= deeper.attributes
            names |= deeper.globals
            effect = effect or deeper.effect
    return Reads(frozenset(attributes), frozenset(names), effect)


def code_of(function: FunctionType) -> tuple[CodeType, dict[str, Any]]:
    """A function's code and the names it may see from outside."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return function.__code__, names_of(
        function.__code__, function.__globals__, {k: _content(cell) for k, cell in cells}
    )


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def names_of(code: CodeType, module: dict[str, Any], local: Mapping[str, Any]) -> dict[str, Any]:
    """The names a code object may see from outside: its module's, and those of the functions around it."""
    return {**module, **{name: local.get(name) for name in code.co_freevars}} if code.co_freevars else module


def is_transparent(code: CodeType) -> bool:
    """Whether the code belongs to tracing, to torch's functional layer or to Python's library, which need no check."""
    path = code.co_filename
    if path.startswith(_TORCH):
        return path.startswith(_TRANSPARENT)
    return path.startswith(_HERE) or (is_library(code) and path != _CONTEXT_MANAGERS)


def is_library(code: CodeType) -> bool:
    """Whether the code is torch's or Python's."""
    path = code.co_filename
    return path.startswith((_TORCH, "<frozen ")) or (path.startswith(_STDLIB) and "-packages" not in path)


def is_constant(value: Any) -> bool:
    """Whether a value cannot change without being replaced."""
    if isinstance(value, (tuple, frozenset)):
        return all(is_constant(item) for item in value)
    if isinstance(value, functools.partial):
        return is_constant(value.func) and is_constant(value.args) and all(map(is_constant, value.keywords.values()))
    return isinstance(value, _IMMUTABLE) or isinstance(value, _CALLABLE)


def examine(codes: Iterable[tuple[CodeType, dict[str, Any]]], owner: Module) -> tuple[list[Guard], str]:
    """What must stay as it is for a trace of `codes` (with their globals), methods of `owner`, to stand for them.

    Returns:
        Guards on the attributes of the owner and the modules below it, and an objection in words, empty where there
        is none. Which modules are below is left to the caller.
    """
    guards: dict[tuple[int, str], Guard] = {}
    for code, scope in codes:
        if is_transparent(code):
            continue
        reads = _read(code)
        objection = _objection(code, scope, reads, owner)
        if objection:
            return [], f"{code.co_name} {objection}"
        for module in owner.modules():
            state = vars(module)
            for name in reads.attributes & state.keys() if module is not owner else reads.attributes:
                if name in state or _class_attribute(owner, name) is not ABSENT:
                    guards[id(module), name] = Guard(module, name, state.get(name, ABSENT))
    return list(guards.values()), ""


def _class_attribute(owner: Module, name: str) -> Any:
    for base in type(owner).__mro__:
        if name in vars(base):
            return vars(base)[name]
    return ABSENT


def _objection(code: CodeType, scope: dict[str, Any], reads: Reads, owner: Module) -> str:
    if code.co_filename.startswith(_TORCH):
        return f"of torch.{os.path.splitext(code.co_filename[len(_TORCH) :])[0].replace(os.sep, '.')} is called"
    if code.co_filename == _CONTEXT_MANAGERS:
        return "of contextlib is called"
    if reads.effect:
        return reads.effect
    asked = (reads.globals & (_BUILTINS | _FUNCTIONS)) | (reads.attributes & _FUNCTIONS)
    if asked:
        return f"calls {min(asked)}()"
    for name in reads.attributes:
        value = vars(owner).get(name, _class_attribute(owner, name))
        fixed = value is ABSENT or is_constant(value) or hasattr(type(value), "__get__")
        if not fixed and not isinstance(value, (Tensor, Module)):
            return f"reads self.{name}, a {type(value).__name__}, which may change"
    for name in (reads.globals | set(code.co_freevars)) & scope.keys():
        if not callable(scope[name]) and not is_constant(scope[name]):
            return f"reads {name}, a {type(scope[name]).__name__} from outside, which may change"
    return ""
