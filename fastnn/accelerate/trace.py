"""One module's own forward as a torch.fx graph, with its children as single calls, or the reason why there is none."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn import Module

from ..nn.hooks import hooked
from .isolate import Attempt, isolated
from .purity import Guard, code_of, examine, is_library, names_of


class Fused:
    """Marks the classes that stand in for a user's class while one of its instances is fused (`fused.py`)."""


def original_class(module: Module) -> type[Module]:
    """The module's class, before it was fused."""
    kind = type(module)
    return kind.__bases__[1] if issubclass(kind, Fused) else kind


def is_container(module: Module) -> bool:
    """Whether a trace looks through the module: a plain Sequential without hooks, a ModuleList, a ModuleDict."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return True
    plain = original_class(module).forward is nn.Sequential.forward and "forward" not in vars(module)
    return plain and not hooked(module)


def containers(module: Module) -> Iterator[Module]:
    """The containers among a module's children that a trace looks through, and theirs."""
    for child in module.children():
        if is_container(child):
            yield child
            yield from containers(child)


@dataclass(frozen=True)
class Trace:
    """A graph and what must hold for it to stand for the forward."""

    graph: torch.fx.Graph
    tensors: tuple[str, ...]
    """The parameters that were symbols: at a call they must be tensors."""
    defaults: dict[str, Any]
    """The parameters that were fixed to their default."""
    guards: tuple[Guard, ...]

    @property
    def source(self) -> str:
        """The graph as Python code."""
        return self.graph.python_code("self").src


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True  # a buffer is read at each call, not frozen into the graph

    def __init__(self) -> None:
        super().__init__()
        self.codes: dict[CodeType, dict[str, Any]] = {}
        self.tensors: list[str] = []
        self.defaults: dict[str, Any] = {}

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return not is_container(m)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        positional: list[Any] = [self.root]
        by_keyword: dict[str, Any] = {}
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue  # nothing is passed there, and a call that does is not this trace's
            if parameter.default is parameter.empty:
                self.tensors.append(parameter.name)
                value: Any = self.create_proxy("placeholder", parameter.name, (), {})
            else:
                self.defaults[parameter.name] = value = parameter.default
            if parameter.kind is parameter.KEYWORD_ONLY:
                by_keyword[parameter.name] = value
            else:
                positional.append(value)
        return lambda *args: self._watched(root_fn, args, by_keyword), positional

    def _watched(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `function` and collects the code that runs; of the libraries' only what is called from outside them."""

        def watch(frame: FrameType, event: str, argument: object) -> None:
            inner = is_library(frame.f_code) and frame.f_back is not None and is_library(frame.f_back.f_code)
            if event == "call" and not inner and frame.f_code.co_name != "__del__":  # a finaliser may run any time
                self.codes.setdefault(frame.f_code, names_of(frame.f_code, frame.f_globals, frame.f_locals))

        before, collecting = sys.getprofile(), gc.isenabled()
        gc.disable()  # a collection calls back code that is not the forward's
        sys.setprofile(watch)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(before)
            if collecting:
                gc.enable()

    def create_arg(self, a: Any) -> Any:
        known = isinstance(a, nn.Parameter) or any(a is value for value in vars(self.root).values())
        if isinstance(a, Tensor) and not known and not any(a is b for b in self.root.buffers()):
            raise torch.fx.proxy.TraceError("a tensor made inside the forward would become a constant")
        return super().create_arg(a)


def trace(module: Module, training: bool) -> tuple[Trace | None, str]:
    """The module's forward in training or evaluation as a graph; otherwise None and the reason in words.

    The forward runs on symbols, so nothing is computed, and whatever it did to the module is taken back. Traced twice,
    to see that it is the same each time.
    """
    forward = inspect.unwrap(original_class(module).forward)
    if "forward" in vars(module) or not inspect.isfunction(forward):
        return None, "its forward was replaced on the instance"
    if isinstance(module, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        return None, f"a {type(module).__name__} has generated code"
    objection = examine([code_of(forward)], module)[1]
    if objection:
        return None, objection
    tracer, again = _Tracer(), _Tracer()
    with isolated(module), _unfused(module), Attempt() as attempt:
        for each in module.modules():
            each.training = training  # not by train(), which a class may override to do more
        graph = tracer.trace(module)
        repeated = again.trace(module)
        guards, objection = examine(tracer.codes.items(), module)
    if attempt.failure:
        return None, f"torch.fx cannot trace it ({attempt.failure})"
    if objection:
        return None, objection
    found = Trace(graph, tuple(tracer.tensors), tracer.defaults, tuple(guards))
    if repeated.python_code("self").src != found.source:
        return None, "its forward is not the same each time"
    return found, ""


@contextmanager
def _unfused(module: Module) -> Iterator[None]:
    kind = type(module)
    module.__class__ = original_class(module)
    try:
        yield
    finally:
        module.__class__ = kind
