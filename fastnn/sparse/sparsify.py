"""Making a model's dense layers sparse, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import Module

from ..accelerate.isolate import check_model
from ..quant.measure import first_inputs
from ..selection import FilterFn, Patterns
from .config import text_of
from .layers import Layer, choose, commit, decide, entries_of, layers_of, measure, mind_readers, prepare
from .report import Entry, Report


@torch.inference_mode(False)
def sparsify_(
    model: Module,
    config: object,
    filter_fn: FilterFn | None = None,
    *,
    include: Patterns = (),
    exclude: Patterns = (),
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    max_slowdown: float = 1.0,
) -> Report:
    """Takes blocks, or single weights, out of the model's dense layers in place, and says of each what became of it.

    Layers that lose blocks become `fastnn.nn.BlockSparseLinear`: the same objects with their hooks and their bias,
    whose class changes and whose weight becomes `values`, `columns` and `starts`; they train, the pattern staying. With
    `values="int8"` they become `fastnn.nn.Int8BlockSparseLinear`, whose codes do not train. Sparsify before an
    optimizer takes the parameters. Layers that lose single weights get a mask in the form of `torch.nn.utils.prune`; it
    makes them neither faster nor smaller, also after `fastnn.strip_`. What masks of torch's have taken already stays
    taken, and counts. Layers that share a weight share what becomes of it.

    Args:
        model: any module; it may be a layer itself.
        config: a `fastnn.Sparsify`, or a mapping of patterns of paths (as in `include`) to them, or None, of which the
            first that matches a layer holds for it. They take torch's and fastnn's Linear and Hugging Face's Conv1D.
        filter_fn: called with each layer and its path; False leaves it alone.
        include: patterns of paths (`*`, `?`, as in fnmatch), at least one of which must match, where any are given. A
            layer whose weight some other layer keeps needs them too.
        exclude: patterns of which none may match.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments. The model is run on them
            once, leaving it as it was, and each layer is measured before and after on inputs of the shapes it got.
            Without them nothing is measured, and nothing said of speed.
        calibration: for importance "wanda": samples, each as `example_inputs`. The model is run on them, in evaluation
            mode, as it is, leaving it as it was.
        max_slowdown: a layer whose blocks would take more than so many times as long as it does is left alone.

    Returns:
        The report. A layer is left alone, with the reason, where it cannot be made sparse, is not chosen, loses
        nothing, or would be slower; also one that shares its weight with a layer that stays as it is, unless `include`
        names it.

    Raises:
        TypeError: `model` is no module, `config` no configuration.
        ValueError: a pattern that matches no layer, an amount that leaves nothing, `max_slowdown` not above zero, a
            calibration that is missing, or that nothing asks for, or without inputs; layers that share a weight but not
            a configuration. The model is as it was.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU())
        >>> fastnn.sparsify_(model, fastnn.Sparsify(0.8))
        >>> model[0].blocks
        819
    """
    check_model("sparsify_", model, changes_weights=True)
    layers = layers_of(model, config)
    choose(layers, filter_fn, include, exclude)
    decide(model, layers, calibration)
    return Report(apply(model, layers, example_inputs, max_slowdown), text_of(config))


def apply(model: Module, layers: Sequence[Layer], example_inputs: Any, max_slowdown: float) -> tuple[Entry, ...]:
    """Measures what was decided, and does it; all that can fail comes before the change."""
    if not max_slowdown > 0:
        raise ValueError(f"fastnn.sparsify_: max_slowdown must be above 0, got {max_slowdown}")
    if example_inputs is not None:
        chosen = [layer for layer in layers if not layer.reason]
        inputs = first_inputs(model, [layer.module for layer in chosen], example_inputs)
        for layer in chosen:
            layer.input = inputs.get(layer.module)
    prepare(layers)
    mind_readers(model, layers)
    measure(layers, max_slowdown)
    entries = entries_of(layers)
    commit(model, layers)
    return entries
