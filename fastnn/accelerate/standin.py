"""Classes that stand in for a user's class while one of its instances is changed: a subclass under the same name."""

from __future__ import annotations

import abc
import copyreg
import types
from collections.abc import Callable
from typing import Any

from torch.nn import Module


class StandIn:  # without __slots__: instances must have the layout of a Module's
    """Base of the mixins. A copy or a pickle of an instance is one of the stand-in again."""

    @classmethod
    def _forward_for(cls, base: type[Module]) -> Callable[..., Any]:
        """The forward that takes the place of `base`'s."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Ends here: a registry of subclasses kept by the user's class must not learn of this one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is copyreg.__newobj__ and reduced[1] == (type(self),):  # type: ignore[attr-defined]
            return (_new, type(self).__bases__, *reduced[2:])
        return reduced


def _new(mixin: type[StandIn], base: type[Module]) -> Module:
    kind = stand_in(mixin, base)
    return kind.__new__(kind)


def why_no_stand_in(base: type[Module]) -> str:
    """Why the class cannot be stood in for, in words; empty where it can."""
    if type(base) not in (type, abc.ABCMeta):
        return f"the metaclass of {base.__name__} is {type(base).__name__}"
    if any(vars(kind).get("__slots__") for kind in base.__mro__):
        return f"instances of {base.__name__} have a fixed layout"
    return ""


def stand_in(mixin: type[StandIn], base: type[Module]) -> type[Module]:
    """The one stand-in of that kind for `base`: same name and module, the mixin's forward."""
    for existing in base.__subclasses__():
        if existing.__bases__ == (mixin, base):
            return existing

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(
            forward=mixin._forward_for(base),
            __module__=base.__module__,
            __qualname__=base.__qualname__,
            __doc__=base.__doc__,
        )

    made = types.new_class(base.__name__, (mixin, base), {}, body)
    for kind in base.__mro__:
        if checkpoints(vars(kind).get("forward")):  # transformers wraps each class's forward as the class is made
            base.__init_subclass__.__func__(made)  # type: ignore[attr-defined]
            break
    return made


def checkpoints(forward: Any) -> bool:
    """Whether it is the wrapper by which transformers' layers do gradient checkpointing, where it is the outermost."""
    return isinstance(forward, types.FunctionType) and forward.__code__.co_name == "forward_with_checkpointing"
