"""Compressing a model within a budget of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from ..accelerate.isolate import check_model, kept_random_state, plain_inputs, tensors
from ..progress import progress as shown_progress
from ..selection import FilterFn, Patterns
from .judge import Judge, check_devices
from .memo import Memo
from .moves import Target
from .options import CANDIDATES, Options
from .report import Report
from .search import Search
from .state import State


@torch.inference_mode(False)
def compress(
    model: Module,
    *,
    calib: Iterable[Any],
    evaluate: Callable[[Module], Any],
    example_inputs: Any,
    max_drop: float = 0.01,
    reserve: float = 0.25,
    target: Target = "latency",
    metric: str | None = None,
    candidates: Sequence[object] = CANDIDATES,
    filter_fn: FilterFn | None = None,
    include: Patterns = (),
    exclude: Patterns = (),
    recover: Callable[[Module], object] | None = None,
    accelerate: bool = True,
    max_evaluations: int = 20,
    save: str | PathLike[str] | None = None,
    resume: str | PathLike[str] | None = None,
    progress: bool = False,
) -> Report:
    """Makes a model smaller and faster, in place, as far as the caller's metric allows, and says what became of what.

    Every candidate for every layer (for structure: every group of neurons, heads or channels) is looked at apart: how
    far the model's outputs on `calib` are from what they were, how long the layer takes on what `example_inputs` gives
    it, how many bytes it holds. Steps are ordered by what they gain for what they lose (`moves`); then plans are tried:
    all steps, and where the metric falls too far, the better half, and so on, each time with the rest of the steps
    halved until single ones are rolled back or the evaluations are used up. The last plan within the budget is
    evaluated once more. Layers that stay floating run on fastnn's kernels (`accelerate`).

    The model is compressed for inference on the CPU it is measured on. Until the end every change is made in memory of
    its own: whatever fails, an interrupt too, the model is as it was, its modules the same objects and its tensors the
    same bits in the same place. It takes the memory of two to three models meanwhile.

    Args:
        model: any module on the CPU; it is evaluated and measured in evaluation mode.
        calib: inputs like `example_inputs`, a handful: the model runs on all of them for every candidate.
        evaluate: called with the model; gives a number, or a mapping of names to numbers. Larger is better (negate a
            loss). It is called without gradients, always with the same random state, and must not change the model.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments: what times are taken on.
        max_drop: by how much the metric may fall, at least 0.
        reserve: the part of `max_drop`, in [0, 1), that no plan may use up: what is chosen because the metric shows
            little loses more on data that `evaluate` does not have.
        target: "latency" or "size": what a step must gain; a tenth of the other counts beside it.
        metric: which of the mapping's counts; the first unless named.
        candidates: `fastnn.quantize_`'s configurations (SmoothQuant apart, which changes other layers, too),
            `fastnn.Sparsify` and `fastnn.Shrink`; floating and whole is always one.
        filter_fn: called with each layer and its path; False leaves it alone.
        include, exclude: patterns of paths, as `fastnn.quantize_` takes them.
        recover: called with a floating model that has lost structure or blocks, to train it; it may change nothing but
            values, and is called once for each such plan that is tried, with the same random state.
        accelerate: whether layers that stay floating run on fastnn's kernels.
        max_evaluations: of plans; three more are needed, of the model before, as it is on fastnn's kernels, and after.
        save: the file that `fastnn.save` writes the compressed model to; `fastnn.load` gives it to a fresh one.
        resume: a file that keeps every measurement: the same call goes on after a stop. It is checked against the
            model, the inputs, the options, and what `evaluate` says of the model before.
        progress: whether a bar is shown (needs rich).

    Returns:
        The report: every layer's fate and why, every point tried, size, peak memory, time and metrics before and after.

    Raises:
        TypeError: no module, an `evaluate` that cannot be called, a candidate that is none.
        ValueError: no calibration, a budget below 0 or NaN, an unknown target, a pattern that matches no layer or only
            some that share a weight, a state file of something else.
        CompressError: (a ValueError) `evaluate` fails, is not the same twice, or gives NaN; the model or an input is
            not on the CPU; nothing gains anything within the budget. Its `report` has what was tried.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)).eval()
        >>> x, y = torch.randn(256, 784), torch.randint(0, 10, (256,))
        >>> accuracy = lambda model: (model(x).argmax(1) == y).float().mean()
        >>> report = fastnn.compress(model, calib=[x[:64]], evaluate=accuracy, example_inputs=x[:64], max_drop=0.02)
    """
    check_model("compress", model, changes_weights=True)
    if not callable(evaluate):
        raise TypeError(f"fastnn.compress: evaluate must be callable, got {type(evaluate).__name__}")
    options = Options(
        [plain_inputs(sample) for sample in calib],
        example_inputs,
        max_drop,
        reserve,
        target,
        tuple(candidates),
        filter_fn,
        include,
        exclude,
        recover,
        accelerate,
        max_evaluations,
        None if save is None else Path(save),
    )
    options.check()
    check_devices(model, {"calib": options.calib, "example_inputs": plain_inputs(example_inputs)}, tensors)
    memo = Memo(None if resume is None else Path(resume), options.fingerprint(model, metric) if resume else "")
    return _kept_or_restored(model, options, Judge(evaluate, metric), memo, progress)


def _kept_or_restored(model: Module, options: Options, judge: Judge, memo: Memo, shown: bool) -> Report:
    original, done = State(model), False
    try:
        with kept_random_state(), shown_progress(shown) as bar:
            report = Search(model, original, options, judge, memo, bar).go()
        done = True
        return report
    finally:
        if not done:
            original.put()
