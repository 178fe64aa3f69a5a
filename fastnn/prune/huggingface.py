"""Keeping a transformers configuration true to the model, as far as it can say what the model is."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from ..accelerate.isolate import Attempt
from .apply import Changes, Removed

_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
_HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads")


def configure(changes: Changes, model: Module, removed: Removed) -> str:
    """Sets in `model.config` the widths and numbers of heads that all layers have now.

    Returns:
        What the configuration cannot say, in words; empty where it says everything.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return ""
    left = [_widths(changes, config, removed), _heads(changes, config, removed)]
    return "; ".join(filter(None, left))


def _widths(changes: Changes, config: Any, removed: Removed) -> str:
    pairs = [(g.units, g.units - len(units)) for g, units in removed if g.kind == "neurons"]
    unsaid = [pair for pair in pairs if pair[0] != pair[1]]
    for name in _WIDTHS:
        before = _number(config, name)
        if name == "n_inner" and before is None and hasattr(config, name):
            before = 4 * config.hidden_size  # what GPT-2 takes None for
        mine = {after for width, after in pairs if width == before}
        if len(mine) == 1 and mine != {before} and _accepts(changes, config, {name: mine.pop()}):
            unsaid = [pair for pair in unsaid if pair[0] != before]
    return "layers of several widths" if unsaid else ""


def _heads(changes: Changes, config: Any, removed: Removed) -> str:
    pairs = {(g.units, g.units - len(units)) for g, units in removed if g.kind == "heads"}
    if all(before == after for before, after in pairs):
        return ""
    if len(pairs) > 1:
        return "layers of several numbers of heads"
    ((units, after),) = pairs
    numbers = {name: n for name in _HEADS if (n := _number(config, name)) is not None and n % units == 0}
    new = {name: n // units * after for name, n in numbers.items()}
    said = _number(config, "head_dim") is not None and _accepts(changes, config, new)
    return "" if said else "heads whose width is not the model's divided by their number"


def _accepts(changes: Changes, config: Any, values: dict[str, int]) -> bool:
    """Sets attributes of a configuration, unless it says of itself that it is not valid then."""
    start = len(changes.attributes)
    for name, value in values.items():
        changes.set(config, name, value)
    with Attempt() as attempt:
        getattr(config, "validate", lambda: None)()
    if attempt.failure:
        for owner, name, value in reversed(changes.attributes[start:]):
            setattr(owner, name, value)
        del changes.attributes[start:]
    return not attempt.failure


def _number(config: Any, name: str) -> int | None:
    found = getattr(config, name, None)
    return found if type(found) is int else None
