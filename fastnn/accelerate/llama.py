"""What transformers' models of Llama's kind have of their own: RMS norms and rotary position embedding.

Some fifty models each bring a copy of the same norm and of the same function. What a copy computes is not read off
its name but tried on numbers, so one that differs (a weight that counts from 1, neighbours for halves) is left alone.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from .. import _dispatch
from ..ops.norm import rms_norm
from ..ops.rope import rope
from .isolate import Attempt
from .standin import StandIn, why_no_stand_in

_EPSILONS = ("variance_epsilon", "eps")
_ROTATE = "apply_rotary_pos_emb"


# ---- RMS norms


class TheirRMSNorm(StandIn):
    """transformers' norm on fastnn's kernel, for rows of the weight's type; others as before."""

    weight: Tensor

    @classmethod
    def _forward_for(cls, base: type[Module]) -> Callable[..., Any]:
        @functools.wraps(base.forward)
        def forward(self: Any, hidden_states: Any) -> Any:
            if self.takes(hidden_states):
                return rms_norm(hidden_states, self.weight.shape, self.weight, self.epsilon())
            return base.forward(self, hidden_states)

        return forward

    def takes(self, hidden_states: Any) -> bool:
        """Whether these are rows for our kernel."""
        weight = self.weight
        return (
            isinstance(hidden_states, Tensor)
            and hidden_states.dtype == weight.dtype
            and hidden_states.dtype in _dispatch.KERNEL_DTYPES
            and hidden_states.shape[-1:] == weight.shape
        )

    def epsilon(self) -> float:
        """Added to the mean of the squares."""
        found: float = getattr(self, _epsilon(self))  # type: ignore[arg-type]
        return found


def is_their_norm(module: Module) -> bool:
    """Whether it is named like an RMS norm and comes from transformers."""
    kind = type(module)
    named = kind.__name__.endswith("RMSNorm") or kind.__name__ == "T5LayerNorm"
    return named and kind.__module__.startswith("transformers.")


def why_not_our_norm(module: Module) -> str:
    """Why the norm cannot run on our kernel, in words; empty where it can."""
    kind = type(module)
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not epsilon:
        return f"{kind.__name__} has no weight of one dimension, or no epsilon"
    if len(list(inspect.signature(kind.forward).parameters)) != 2:
        return f"{kind.__name__}'s forward takes more than its input"
    return why_no_stand_in(kind) or ("" if _is_rms_norm(module, epsilon) else f"{kind.__name__} is another function")


def _epsilon(module: Module) -> str:
    return next((name for name in _EPSILONS if isinstance(getattr(module, name, None), float)), "")


def _is_rms_norm(module: Module, epsilon: str) -> bool:
    """Whether the module computes x / sqrt(mean(x^2) + epsilon) * weight, tried on a copy with other numbers."""
    state = {name: value for name, value in vars(module).items() if name != "_parameters"}
    other = type(module).__new__(type(module))
    vars(other).update(copy.deepcopy(state), _parameters={})
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 8, generator=generator), torch.randn(8, generator=generator)
    other.weight = nn.Parameter(weight)
    setattr(other, epsilon, 0.25)
    found = None
    with Attempt(), torch.no_grad():  # whatever it fails for, it is not that function
        found = other.forward(x)
    wanted = torch.nn.functional.rms_norm(x.double(), (8,), weight.double(), 0.25)
    return isinstance(found, Tensor) and found.shape == x.shape and torch.allclose(found.double(), wanted, 1e-5, 1e-6)


# ---- rotary position embedding


class Rotating(StandIn):
    """transformers' attention layer whose queries and keys are rotated by fastnn's kernel."""

    @classmethod
    def _forward_for(cls, base: type[Module]) -> Callable[..., Any]:
        """The same code with one of its globals replaced: the rest of the program keeps transformers' function."""
        forward = base.forward
        names = {**forward.__globals__, _ROTATE: _rotate(forward.__globals__[_ROTATE])}
        ours = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        ours.__kwdefaults__ = forward.__kwdefaults__
        return functools.wraps(forward)(ours)


def calls_rotary(module: Module) -> bool:
    """Whether the module's forward calls transformers' function on half-split features."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or _ROTATE not in forward.__code__.co_names:
        return False
    theirs = forward.__globals__.get(_ROTATE)
    return callable(theirs) and not why_no_stand_in(type(module)) and _is_rotation(theirs)


def _rotate(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 4 and not kwargs and _takes(*args):
            return rope(*args)
        return theirs(*args, **kwargs)

    return apply_rotary_pos_emb


def _takes(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    if not all(isinstance(t, Tensor) and t.dtype in _dispatch.KERNEL_DTYPES for t in (q, k, cos, sin)):
        return False
    tables = cos.dim() == 3 and cos.shape == sin.shape and cos.shape[-1] == q.shape[-1] == k.shape[-1]
    return bool(tables and q.dim() == k.dim() == 4 and cos.dtype == q.dtype == k.dtype)


@functools.lru_cache(maxsize=256)
def _is_rotation(theirs: Callable[..., Any]) -> bool:
    """Whether `theirs(q, k, cos, sin)` is `rope(q, k, cos, sin)`, tried on numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)
    given = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    found = None
    with Attempt():  # whatever it fails for, it is not that function
        found = theirs(*given)
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(t, Tensor) for t in found):
        return False
    with _dispatch.use_backend("reference"):
        wanted = rope(given[0], given[1], given[2], given[3])
    return all(
        b is not None and a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, wanted, strict=True)
    )
