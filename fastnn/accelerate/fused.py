"""The class of a module whose forward is fused: the user's own class, with the plan tried first."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from .fuse import Plan, make_plan
from .standin import StandIn, stand_in, why_no_stand_in
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


class _FusedModule(StandIn, Fused):
    @classmethod
    def _forward_for(cls, base: type[Module]) -> Callable[..., Any]:
        @functools.wraps(base.forward)
        def forward(self: Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():  # the compiler fuses by itself, and guards what it reads
                plan = vars(self)[STATE].plans.get(self.training)
                if plan is not None and plan.holds():
                    tensors = plan.arguments(args, kwargs)
                    if tensors is not None:
                        return plan.run(self, *tensors)
            return base.forward(self, *args, **kwargs)

        return forward

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        fusion = vars(self).get(STATE)
        if fusion is not None:
            fusion.make(self)


def why_not_fused(module: Module) -> str:
    """Why the module's class cannot be stood in for, in words; empty where it can."""
    return why_no_stand_in(original_class(module))


def fused_class(base: type[Module]) -> type[Module]:
    """The stand-in for `base`: same name and module, same forward but for the fused calls."""
    return stand_in(_FusedModule, base)
