"""What to quantise to: frozen dataclasses with a JSON form, and the recipe that each stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch.nn import Module


@dataclass(frozen=True)
class Config:
    """Base of the configurations."""

    def to_json(self) -> dict[str, Any]:
        """Name and fields, for a file's header."""
        return {"config": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Int8Dynamic(Config):
    """Weights as int8 codes, a scale for each output; inputs rounded to int8 on the way, a scale for each row.

    Both symmetric, the scale being the largest magnitude / 127. Products of codes are summed exactly in int32
    (`fastnn.linear_int8`).
    """


@dataclass(frozen=True)
class Recipe:
    """How a configuration treats one layer."""

    op: str
    """The op that runs the quantised layer, as `fastnn._dispatch` knows it."""
    made: type[Module]
    """The class that layers become."""
    why_not: Callable[[Module], str]
    """Why a layer cannot be quantised, in words; empty where it can."""
    quantized: Callable[[Module], Module]
    """A quantised layer that does what the given one does; the given one stays as it is."""


RECIPES: dict[type[Config], Callable[[Config], Recipe]] = {}
"""Configuration -> its recipe."""


def register(config: type[Config], recipe: Callable[[Config], Recipe]) -> None:
    """Adds a configuration."""
    RECIPES[config] = recipe


def recipe_of(config: object) -> Recipe:
    """The recipe of a configuration.

    Raises:
        TypeError: it is none.
    """
    for kind, recipe in RECIPES.items():
        if type(config) is kind:
            return recipe(config)
    known = ", ".join(f"{kind.__name__}()" for kind in RECIPES)
    got = config.__name__ if isinstance(config, type) else type(config).__name__
    raise TypeError(f"fastnn.quantize_: config must be one of {known}; got {got}")
