"""Which activation of the linear kernel a module or a call is: functions by identity, modules by what they compute."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.modules import activation as torch_activations

from ..ops.linear import ACTIVATIONS
from .isolate import Attempt, isolated
from .purity import code_of, examine

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    torch.special.expit: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
}
_METHODS = {name + suffix: name for name in ("relu", "sigmoid", "tanh") for suffix in ("", "_")}
_NOT_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)

_AGREEMENT = 1e-9
"""How near a module must be to an activation in float64, absolute and relative.

Ways to write one formula differ by rounding (1e-15) or by a rounded constant (1e-11); gelu's two forms by 5e-4.
"""


def of_function(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """The activation that a call of `target` with these arguments, beside the tensor, is; None where it is none."""
    name = _FUNCTIONS.get(target) if callable(target) else None
    if name == "gelu":
        approximate = args[0] if args else kwargs.get("approximate", "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    plain = len(args) <= 1 and set(kwargs) <= {"inplace"}  # the result is the same in place or not
    return name if plain else None


def of_method(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """The activation that calling the tensor's method `name` is; None where it is none."""
    return None if args or kwargs else _METHODS.get(name)


def is_torch_activation(module: Module) -> bool:
    """Whether the module's class is one of torch's activation layers."""
    return type(module).__module__ == torch_activations.__name__ and not isinstance(module, _NOT_ACTIVATIONS)


def of_module(module: Module) -> str | None:
    """The activation that a module computes, None where it is none.

    Found by trying: the module, without parameters, buffers, children or effects, is run on a grid in float64, in
    training and in evaluation, in one dimension and in three, values and slopes, and must agree with the same entry
    of `ACTIVATIONS` throughout.
    """
    state = vars(module)
    if state["_parameters"] or state["_buffers"] or state["_modules"] or "forward" in state:
        return None
    forward = type(module).forward
    if not is_torch_activation(module):
        if type(module).__module__.startswith("torch.nn."):
            return None
        if not inspect.isfunction(forward) or examine([code_of(forward)], module)[1]:
            return None
    with isolated(module), torch.inference_mode(False), torch.enable_grad():
        before = torch.random.get_rng_state()
        with Attempt() as attempt:
            results = _probe(lambda x: forward(module, x), module)
        if attempt.failure or not torch.equal(torch.random.get_rng_state(), before):
            return None
        for name, activation in ACTIVATIONS.items():
            if name is not None and _agree(results, _probe(activation, None)):
                return name
    return None


def _probe(function: Callable[[Tensor], Tensor], module: Module | None) -> list[Tensor]:
    """Values and slopes on the grid, in both shapes and both modes."""
    # Between -12 and 12 every activation leaves its asymptotes; the rest are the points where formulas overflow.
    inner = torch.linspace(-12, 12, 961, dtype=torch.float64)
    outer = torch.tensor([0.0, -0.0, 1e4, -1e4, 1e30, -1e30, float("inf"), float("-inf"), float("nan")]).double()
    found = []
    for training in (True, False) if module is not None else (False,):
        if module is not None:
            module.training = training
        for x in (inner.clone(), inner.view(31, 1, 31).clone()):
            x.requires_grad_()
            y = function(x * 1.0)  # in-place activations must not write to a leaf
            if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
                raise TypeError("not elementwise")
            (slope,) = torch.autograd.grad(y.sum(), x)
            found += [y.detach().flatten(), slope.flatten()]
        found.append(function(outer.clone()).detach())
    return found


def _agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        torch.allclose(a, b, rtol=_AGREEMENT, atol=_AGREEMENT, equal_nan=True)
        for a, b in zip(ours, theirs * (len(ours) // len(theirs)), strict=True)
    )
