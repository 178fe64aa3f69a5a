"""What to take out of a model: a frozen dataclass with a JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from .groups import Group, Kept, Kind

Importance = Literal["norm", "activation", "taylor"]
Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Shrink:
    """Take out the least important units of each layer, or of all layers together."""

    amount: float | int = 0.5
    """A fraction in [0, 1) of the units, or their number: of each layer, or of all with scope="global"."""
    importance: Importance = "norm"
    """How a unit is judged (fastnn.prune.importance): by its weights, on calibration inputs, or by the loss."""
    scope: Scope = "layer"
    """Whether each layer loses the same amount, or all are ranked together."""
    multiple_of: int = 1
    """The width that is left is a multiple of this; rather less is taken out, or nothing."""

    def __post_init__(self) -> None:
        _check(self, "importance", get_args(Importance))
        _check(self, "scope", get_args(Scope))
        whole = type(self.amount) is int and self.amount >= 0
        if not whole and not (isinstance(self.amount, float) and 0 <= self.amount < 1):
            raise ValueError(
                f"fastnn.Shrink: amount must be a fraction in [0, 1) or a count of at least 0, got {self.amount!r}"
            )
        if type(self.multiple_of) is not int or self.multiple_of < 1:
            raise ValueError(f"fastnn.Shrink: multiple_of must be a positive int, got {self.multiple_of!r}")

    def to_json(self) -> dict[str, Any]:
        """Name and fields, for a file's header."""
        return {"config": type(self).__name__, **asdict(self)}


def _check(config: Shrink, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(f"fastnn.Shrink: {name} must be one of {allowed}, got {getattr(config, name)!r}")


class PruneError(ValueError):
    """A model, or a part of it, cannot be pruned; the message names the module and says why. The model is as it was."""


Assignment = list[tuple[Shrink, list[Group]]]


def assigned(config: object, groups: list[Group], kept: list[Kept]) -> Assignment:
    """Which groups each configuration is for: the first whose key is the group's kind or matches its name.

    Raises:
        TypeError: `config` is neither a Shrink nor a mapping to Shrink or None.
        ValueError: a pattern that matches no group.
        PruneError: one that matches nothing but layers that cannot be pruned.
    """
    if isinstance(config, Shrink):
        return [(config, list(groups))]
    if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
        raise TypeError(f"fastnn.shrink_: config must be a Shrink, or a mapping to them, got {type(config).__name__}")
    if strange := [one for one in config.values() if one is not None and not isinstance(one, Shrink)]:
        raise TypeError(f"fastnn.shrink_: config must map to Shrink or None, got {type(strange[0]).__name__}")
    left, found = list(groups), []
    for key, one in config.items():
        if not any(_fits(key, group) for group in groups):
            for one_kept in kept:
                if fnmatchcase(one_kept.name, key):
                    raise PruneError(f"fastnn.shrink_: {one_kept.name} cannot be pruned: {one_kept.reason}")
            raise ValueError(f"fastnn.shrink_: {key!r} is no kind and no pattern of any of {[g.name for g in groups]}")
        mine = [group for group in left if _fits(key, group)]
        left = [group for group in left if not _fits(key, group)]
        if one is not None:
            found.append((one, mine))
    return found


def _fits(key: str, group: Group) -> bool:
    return key == group.kind if key in get_args(Kind) else fnmatchcase(group.name, key)
