"""The class of a module whose forward is fused: the user's own class, with the plan tried first."""

from __future__ import annotations

import abc
import copy
import copyreg
import functools
import types
from typing import Any

import torch
from torch.nn import Module

from .fuse import Plan, make_plan
from .trace import Fused, original_class

STATE = "_fastnn_fusion"
"""The attribute that holds a fused module's `Fusion`."""


class Fusion:
    """A fused module's plans, by mode. Copies of the module copy them; a pickle makes them anew when it is loaded."""

    def __init__(self) -> None:
        self.plans: dict[bool, Plan | None] = {}

    def make(self, module: Module) -> None:
        """Plans the module's forward in both modes. Made ahead: torch.fx must not trace while other threads run."""
        for training in (True, False):
            if training not in self.plans:
                self.plans[training] = make_plan(module, training)

    def __reduce__(self) -> tuple[type[Fusion], tuple[()]]:
        return Fusion, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        other = Fusion()
        other.plans = copy.deepcopy(self.plans, memo)
        return other


class _FusedModule(Fused):  # without __slots__: instances must have the layout of a Module's
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Ends here: a registry of subclasses kept by the user's class must not learn of this one."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        fusion = vars(self).get(STATE)
        if fusion is not None:
            fusion.make(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is copyreg.__newobj__ and reduced[1] == (type(self),):  # type: ignore[attr-defined]
            return (_new_fused, (original_class(self),), *reduced[2:])  # type: ignore[arg-type]
        return reduced


def _new_fused(base: type[Module]) -> Module:
    kind = fused_class(base)
    return kind.__new__(kind)


def why_not_fused(module: Module) -> str:
    """Why the module's class cannot be stood in for, in words; empty where it can."""
    base = original_class(module)
    if type(base) not in (type, abc.ABCMeta):
        return f"the metaclass of {base.__name__} is {type(base).__name__}"
    if any(vars(kind).get("__slots__") for kind in base.__mro__):
        return f"instances of {base.__name__} have a fixed layout"
    return ""


def fused_class(base: type[Module]) -> type[Module]:
    """The stand-in for `base`: same name and module, same forward but for the fused calls."""
    for existing in base.__subclasses__():
        if existing.__bases__ == (_FusedModule, base):
            return existing

    @functools.wraps(base.forward)
    def forward(self: Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # the compiler fuses by itself, and guards what it reads
            plan = vars(self)[STATE].plans.get(self.training)
            if plan is not None and plan.holds():
                tensors = plan.arguments(args, kwargs)
                if tensors is not None:
                    return plan.run(self, *tensors)
        return base.forward(self, *args, **kwargs)

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(
            forward=forward, __module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__
        )

    return types.new_class(base.__name__, (_FusedModule, base), {}, body)
