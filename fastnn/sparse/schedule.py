"""Growing sparse while training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Module

from ..accelerate.isolate import check_model
from ..selection import FilterFn, Patterns
from .config import Sparsify, configs_of, text_of
from .layers import Layer, choose, commit, decide, layers_of
from .masks import add_mask, masked_weight, strip
from .report import Report
from .sparsify import apply


class GradualSparsifier:
    """Takes units out of a model while it trains, fast at first, in any loop: call it after each optimizer step.

    The cubic schedule of Zhu & Gupta 2017 (To prune, or not to prune, arXiv 1710.01878): after n steps, begin <= n <=
    end, amount * (1 - (1 - (n - begin) / (end - begin))^3) is gone, found anew every `every` steps among what is left;
    what is gone stays gone. Until `strip_` the layers are dense ones with masks of `torch.nn.utils.prune`: the
    parameters stay the same objects, and training is not faster.

    Args:
        model: as `fastnn.sparsify_` takes it.
        config: a `fastnn.Sparsify` or a mapping to them; `amount` is what is gone at the end.
        filter_fn, include, exclude: as `fastnn.sparsify_` takes them.
        end: the step after which all of `amount` is gone.
        begin: the step before which nothing is.
        every: steps from one update to the next.
        calibration: for importance "wanda"; is kept, and run at each update.

    Raises:
        TypeError, ValueError: as `fastnn.sparsify_`, for all of `amount`; the model is as it was. Steps that are not
            0 <= begin < end, `every` below 1.

    Example:
        >>> gradual = fastnn.GradualSparsifier(model, fastnn.Sparsify(0.9), end=1000, every=50)
        >>> optimizer.register_step_post_hook(gradual)  # or gradual.step() after each optimizer.step()
        >>> ...
        >>> report = gradual.strip_(example_inputs=x)
    """

    def __init__(
        self,
        model: Module,
        config: object,
        filter_fn: FilterFn | None = None,
        *,
        end: int,
        begin: int = 0,
        every: int = 1,
        include: Patterns = (),
        exclude: Patterns = (),
        calibration: Iterable[Any] | None = None,
    ) -> None:
        check_model("GradualSparsifier", model, changes_weights=True)
        numbers = {"begin": begin, "end": end, "every": every}
        for name, value in numbers.items():
            if type(value) is not int:
                raise TypeError(f"fastnn.GradualSparsifier: {name} must be an int, got {value!r}")
        if not 0 <= begin < end or every < 1:
            raise ValueError(
                "fastnn.GradualSparsifier: steps must have 0 <= begin < end and every >= 1, "
                f"got begin={begin}, end={end}, every={every}"
            )
        self.steps = 0
        """Steps so far."""
        self._model, self._begin, self._end, self._every = model, begin, end, every
        self._config, self._choice = config, (filter_fn, include, exclude)
        self._calibration = None if calibration is None else list(calibration)
        self._stripped = False
        layers = self._layers(config)
        decide(model, layers, self._calibration)
        self._modules = [layer.module for layer in layers if not layer.reason]
        for module in self._modules:  # from the start, so that a state_dict of later fits
            add_mask(module, torch.ones_like(masked_weight(module), dtype=torch.bool))

    @property
    def progress(self) -> float:
        """The part of `amount` that the last update has taken out."""
        since = min(self.steps, self._end) - self._begin
        if self.steps < self._end:
            since -= since % self._every
        part = max(since / (self._end - self._begin), 0.0)
        return 1.0 - (1.0 - part) ** 3

    def step(self) -> None:
        """Counts a step, and takes units out where one is due. Does nothing after `strip_`."""
        if self._stripped:
            return
        self.steps += 1
        due = self.steps == self._end or (self.steps - self._begin) % self._every == 0
        if due and self._begin < self.steps <= self._end:
            self._update()

    def __call__(self, *_: object) -> None:
        """`step`, as a hook that `torch.optim.Optimizer.register_step_post_hook` takes."""
        self.step()

    @torch.inference_mode(False)
    @torch.no_grad()
    def strip_(self, example_inputs: Any = None, max_slowdown: float = 1.0) -> Report:
        """Makes what is gone permanent: layers that lost blocks become `fastnn.nn.BlockSparseLinear`, masks zeros.

        A layer whose blocks would be slower stays dense, with zeros. Later steps do nothing.

        Args:
            example_inputs, max_slowdown: as `fastnn.sparsify_` takes them.

        Returns:
            The report, of the change from masked layers.
        """
        layers = self._layers(self._now(of_masks=True))
        for layer in layers:
            layer.permanent = True
        decide(self._model, layers, None)
        report = Report(apply(self._model, layers, example_inputs, max_slowdown), text_of(self._config))
        strip(self._model, self._modules)
        self._stripped = True
        return report

    def state_dict(self) -> dict[str, int]:
        """How many steps there were; the masks are in the model's."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where another one was."""
        self.steps = state["steps"]

    def _layers(self, config: object) -> list[Layer]:
        layers = layers_of(self._model, config)
        choose(layers, *self._choice)
        return layers

    @torch.inference_mode(False)
    @torch.no_grad()
    def _update(self) -> None:
        layers = self._layers(self._now())
        decide(self._model, layers, self._calibration)
        commit(self._model, layers)

    def _now(self, of_masks: bool = False) -> dict[str, Sparsify | None]:
        """The configuration for what is to be gone by now; by the masks alone, where that is wanted."""

        def scaled(config: Sparsify) -> Sparsify:
            amount = config.amount * self.progress
            config = replace(config, amount=round(amount) if type(config.amount) is int else amount)
            return replace(config, importance="magnitude") if of_masks else config

        return {pattern: None if one is None else scaled(one) for pattern, one in configs_of(self._config)}
