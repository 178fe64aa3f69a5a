"""How sparse a model is to become: a frozen dataclass with a JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..ops.block_sparse import DEPTHS
from ..ops.block_sparse_int8 import CODE_DEPTHS

Unit = Literal["block", "weight"]
Importance = Literal["magnitude", "wanda"]
Scope = Literal["layer", "output", "global"]
Values = Literal["float", "int8"]


@dataclass(frozen=True)
class Sparsify:
    """Take the least important blocks, or single weights, out of dense layers."""

    amount: float | int = 0.8
    """A fraction in [0, 1) of the units that are gone afterwards, or their number; those that a mask of
    `torch.nn.utils.prune` has taken already are among them."""
    unit: Unit = "block"
    """Blocks of 16 outputs times `depth` columns, or single weights. Only blocks make a layer faster and smaller."""
    importance: Importance = "magnitude"
    """A weight is worth |W| (Han et al. 2015, arXiv 1506.02626), or |W_ij| * ||x_j|| with the norm of its input over
    the calibration (Wanda, Sun et al. 2024, arXiv 2306.11695); a block the root of the sum of its weights' squares."""
    scope: Scope = "layer"
    """Whose units are ranked together, and have the amount taken out: a layer's; those of one output, or of one strip
    of 16 outputs, as Wanda does it; or those of all layers."""
    depth: int = 4
    """Columns of a block: 2, 4, 8 or 16."""
    values: Values = "float"
    """What blocks hold: values of the layer's type, which train on, or int8 codes with a scale for each output
    (`fastnn.nn.Int8BlockSparseLinear`), which do not; those round the inputs, too, and need a depth of 4, 8 or 16."""

    def __post_init__(self) -> None:
        for name, allowed in (("unit", Unit), ("importance", Importance), ("scope", Scope), ("values", Values)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"fastnn.Sparsify: {name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}"
                )
        whole = type(self.amount) is int and self.amount >= 0
        if not whole and not (isinstance(self.amount, float) and 0 <= self.amount < 1):
            raise ValueError(
                f"fastnn.Sparsify: amount must be a fraction in [0, 1) or a count of at least 0, got {self.amount!r}"
            )
        if type(self.depth) is not int or self.depth not in DEPTHS:
            known = ", ".join(map(str, DEPTHS))
            raise ValueError(f"fastnn.Sparsify: depth must be one of {known}; got {self.depth!r}")
        if self.values == "int8" and (self.unit != "block" or self.depth not in CODE_DEPTHS):
            raise ValueError(
                f'fastnn.Sparsify: values="int8" needs unit="block" and a depth of {", ".join(map(str, CODE_DEPTHS))}; '
                f"got {self.unit!r} and {self.depth}"
            )

    def to_json(self) -> dict[str, Any]:
        """Name and fields, for a file's header."""
        return {"config": type(self).__name__, **asdict(self)}


Configs = list[tuple[str, Sparsify | None]]


def configs_of(config: object) -> Configs:
    """(pattern of paths, configuration) of one, or of a mapping of patterns to them or to None.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(config, Sparsify):
        return [("*", config)]
    if not isinstance(config, Mapping) or not all(isinstance(pattern, str) for pattern in config):
        got = config.__name__ if isinstance(config, type) else type(config).__name__
        raise TypeError(f"fastnn.sparsify_: config must be a Sparsify, or a mapping of patterns to them, got {got}")
    if strange := [one for one in config.values() if one is not None and not isinstance(one, Sparsify)]:
        raise TypeError(f"fastnn.sparsify_: config must map to Sparsify or None, got {type(strange[0]).__name__}")
    return list(config.items())


def text_of(config: object) -> str:
    """A configuration, or a mapping of them, in words."""
    return repr(dict(config) if isinstance(config, Mapping) else config)
