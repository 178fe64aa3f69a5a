"""What to quantise to: frozen dataclasses with a JSON form, and the recipe that each stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch.nn import Module

from .gptq import Gptq
from .smooth import SmoothQuant


@dataclass(frozen=True, repr=False)
class Config:
    """Base of the configurations."""

    def to_json(self) -> dict[str, Any]:
        """Name and fields, without those that are None, for a file's header."""
        return {"config": type(self).__name__, **{k: v for k, v in asdict(self).items() if v is not None}}

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given if value is not None)})"


def _check_method(config: Config, name: str, kind: type) -> None:
    method = getattr(config, name)
    if method is not None and type(method) is not kind:
        raise TypeError(
            f"fastnn.{type(config).__name__}: {name} must be a fastnn.{kind.__name__} or None, got {method!r}"
        )


@dataclass(frozen=True, repr=False)
class Int8Dynamic(Config):
    """Weights as int8 codes, a scale for each output; inputs rounded to int8 on the way, a scale for each row.

    Both symmetric, the scale being the largest magnitude / 127. Products of codes are summed exactly in int32
    (`fastnn.linear_int8`).
    """

    smooth: SmoothQuant | None = None
    """Whether the spread of activations moves into the weights first; needs a calibration."""

    def __post_init__(self) -> None:
        _check_method(self, "smooth", SmoothQuant)


def _check_groups(config: Config, group_size: object) -> None:
    if type(group_size) is not int or group_size < 1:
        raise ValueError(f"fastnn.{type(config).__name__}: group_size must be a positive int, got {group_size!r}")
    _check_method(config, "rounding", Gptq)


@dataclass(frozen=True, repr=False)
class Int8WeightOnly(Config):
    """Weights as int8 codes that share a float16 scale in groups along a row; inputs keep their precision.

    The scale is a group's largest magnitude / 127 (`fastnn.ops.quantize_groups`, `fastnn.linear_groupwise`).
    """

    group_size: int = 128
    """Columns that share a scale; the last group of a row may be shorter."""
    rounding: Gptq | None = None
    """How dense layers' codes are chosen: to nearest, or by a calibration. Embeddings are rounded to nearest."""

    def __post_init__(self) -> None:
        _check_groups(self, self.group_size)


@dataclass(frozen=True, repr=False)
class Int4WeightOnly(Config):
    """Weights as codes of 4 bits that share a float16 scale in groups along a row; inputs keep their precision.

    4.25 bits a weight with groups of 64, 4.5 with offsets (`fastnn.ops.quantize_groups`, `fastnn.linear_groupwise`).
    """

    group_size: int = 64
    """Columns that share a scale; the last group of a row may be shorter."""
    symmetric: bool = True
    """weight = scale * (code - 8); else each group has an offset, too: weight = scale * code + offset."""
    rounding: Gptq | None = None
    """How dense layers' codes are chosen: to nearest, or by a calibration. Embeddings are rounded to nearest."""

    def __post_init__(self) -> None:
        _check_groups(self, self.group_size)


@dataclass(frozen=True, repr=False)
class Int4Int8Dynamic(Config):
    """Weights as `Int4WeightOnly`'s, inputs rounded to int8 on the way, a scale for each row.

    Sums of a group are exact; results are the same bits on every instruction set (`fastnn.linear_groupwise`).
    """

    group_size: int = 64
    """Columns that share a scale; the last group of a row may be shorter."""
    symmetric: bool = True
    """As `Int4WeightOnly`'s."""
    rounding: Gptq | None = None
    """As `Int4WeightOnly`'s."""

    def __post_init__(self) -> None:
        _check_groups(self, self.group_size)


@dataclass(frozen=True)
class Recipe:
    """How a configuration treats one layer."""

    why_not: Callable[[Module], str]
    """Why a layer cannot be quantised, in words; empty where it can."""
    quantized: Callable[[Module], Module]
    """A quantised layer that does what the given one does; the given one stays as it is."""
    method: Gptq | SmoothQuant | None = None
    """What decides on a dense layer by a calibration."""


RECIPES: dict[type[Config], Callable[[Config], Recipe]] = {}
"""Configuration -> its recipe."""


def register(config: type[Config], recipe: Callable[[Config], Recipe]) -> None:
    """Adds a configuration."""
    RECIPES[config] = recipe


def recipes_of(config: object) -> list[tuple[str, Recipe | None]]:
    """(pattern of paths, recipe) of a configuration, or of a mapping of patterns to configurations or None.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(config, Mapping):
        return [("*", _recipe_of(config))]
    if not all(isinstance(pattern, str) for pattern in config):
        raise TypeError("fastnn.quantize_: a mapping of configurations must have patterns of paths as keys")
    return [(pattern, None if one is None else _recipe_of(one)) for pattern, one in config.items()]


def _recipe_of(config: object) -> Recipe:
    for kind, recipe in RECIPES.items():
        if type(config) is kind:
            return recipe(config)
    known = ", ".join(f"{kind.__name__}()" for kind in RECIPES)
    got = config.__name__ if isinstance(config, type) else type(config).__name__
    raise TypeError(f"fastnn.quantize_: config must be one of {known}, or a mapping of patterns to them; got {got}")
