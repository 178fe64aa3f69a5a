"""Trying plans: sets of steps, best ratio first, each kept or rolled back by what the caller's metric says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module

from ..accelerate import accelerate
from ..accelerate.isolate import kept_random_state
from ..progress import Step
from ..prune import PruneError, Shrink
from ..prune.shrink import shapes_of, take_out
from ..quant.config import Config
from ..quant.files import save
from ..sparse.config import Sparsify
from .judge import CompressError, Judge, Metrics, memory, milliseconds, ratio_of
from .look import Look
from .memo import Memo
from .moves import Move, gain, moves
from .options import Options
from .report import Entry, Figures, Point, Report, Tried
from .state import State, copy_tensors, packed_bytes, tensor_bytes, tensors_of
from .units import Choices, Option, Unit, convert, group_units, label, layer_units, plan_key, removal, trained_part

_TRIAL_ROUNDS, _FINAL_ROUNDS = 3, 9


@dataclass
class _Trained:
    """A model that has lost structure or blocks, trained again, on fastnn's kernels: what codes are made of."""

    state: State
    shapes: dict[str, Any]
    lacks: str


class Search:
    """One search. The model is in any of its states between calls."""

    def __init__(
        self,
        model: Module,
        original: State,
        options: Options,
        judge: Judge,
        memo: Memo,
        bar: Callable[[int], Step],
    ) -> None:
        self.model, self.original, self.options, self.judge, self.memo = model, original, options, judge, memo
        self.bar = bar
        self.training = {module: module.training for module in model.modules()}
        copy_tensors(model)
        _evaluating(model)
        self.plain = State(model)
        self.units: list[Unit] = []
        self.trained: dict[str, _Trained] = {}
        self.choices: dict[str, tuple[Unit, Option]] = {}
        self.best: tuple[str, State] | None = None
        self.points: dict[str, Point] = {}
        """Those of all plans tried, in their order."""
        self.evaluations = 0
        self.before: Metrics = {}

    # ---- the way

    def go(self) -> Report:
        """Looks, tries, and leaves the best model in place."""
        options, model = self.options, self.model
        self.before = self._judged("the model as it is")
        judged = self.before[str(self.judge.metric)]
        if math.isnan(judged):
            raise CompressError(f"fastnn.compress: evaluate gives {self.judge.metric} = NaN for the model as it is")
        if self.memo.get("before", lambda: self.before) != self.before:
            raise ValueError(
                "fastnn.compress: evaluate says something else of the model than it did when the state file was written"
            )
        base = self._trained({})
        base.state.put()
        nbytes = tensor_bytes(model)
        ms = self.memo.get("base", lambda: milliseconds(model, [base.state], options.example_inputs, 3)[0])

        def worth(option: Option) -> float:
            return gain(option, options.target, statistics.median(ms), nbytes)

        given = options.calib, options.example_inputs, options.accelerate
        look = Look(model, self.plain, base.state, *given, worth, self.memo)
        self._find_units()
        look.prepare(self.units)
        self._look(look)
        steps = moves(self.units, options.target, worth)
        self._check_repeats()
        self._try(steps)
        if not self.choices:
            why = "no candidate keeps the metric within the budget" if steps else "no candidate gains anything here"
            raise self._failed(why, base.state)
        return self._finish(self._state(self.choices))

    def _find_units(self) -> None:
        options = self.options
        self.plain.put()
        shrinks = [one for one in options.candidates if isinstance(one, Shrink)]
        others: list[Any] = [one for one in options.candidates if not isinstance(one, Shrink)]
        layers = layer_units(self.model, options.filter_fn, options.include, options.exclude)
        out = {name for unit in layers if unit.reason for name in unit.names}
        groups = group_units(self.model, shrinks, options.example_inputs, options.calib)
        for unit in groups:
            if unit.name in out:
                unit.reason = "its layer is left out"
        for unit in layers:
            unit.options += [] if unit.reason else [Option(config, label(config)) for config in others]
        self.units = [*groups, *layers]

    def _look(self, look: Look) -> None:
        units = [unit for unit in self.units if not unit.reason]
        step = self.bar(len(units))
        for unit in units:
            look.at(unit)
            step(f"measuring {unit.name}")

    def _check_repeats(self) -> None:
        """The model on fastnn's kernels computes the same; so must say `evaluate`."""
        point = self._point({})
        if self.judge.drop(self.before, point.metrics) > self.options.max_drop:
            name = str(self.judge.metric)
            raise CompressError(
                f"fastnn.compress: the budget is impossible: evaluate gives {name} = {self.before[name]} for the model "
                f"and {point.metrics[name]} for the same before anything was compressed, which is more than max_drop = "
                f"{self.options.max_drop:g} apart"
            )

    def _try(self, steps: list[Move]) -> None:
        """Takes what fits, best ratio first: a set of steps that does not fit is halved."""
        step, most = self.bar(self.options.max_evaluations), self.options.max_evaluations
        pending = [steps] if steps else []
        while pending:
            chunk = pending.pop()
            wanted = {**self.choices, **{move.unit.key: (move.unit, move.option) for move in chunk}}
            if plan_key(wanted) not in self.points and len(self.points) > most:
                for move in chunk:
                    move.option.verdict = f"not tried: max_evaluations = {most}"
                continue
            problem = self._attempt(wanted)
            step(f"{len(wanted)} changed: {problem or 'kept'}")
            if not problem:
                for option in (*(one for _, one in self.choices.values()), *(move.option for move in chunk)):
                    option.verdict = "another candidate went further"
                self.choices = wanted
            elif len(chunk) == 1:
                chunk[0].option.verdict = f"rolled back: {problem}"
            else:
                half = len(chunk) // 2
                pending += [chunk[half:], chunk[:half]]

    def _attempt(self, wanted: Choices) -> str:
        """Evaluates a plan and keeps it where it fits; what is wrong with it otherwise."""
        try:
            point = self._point(wanted)
        except PruneError as error:
            return str(error).removeprefix("fastnn.shrink_: ")
        lost = self.judge.drop(self.before, point.metrics)
        if point.accepted:
            return ""
        return f"{self.judge.metric} falls by {lost:.4g}" if math.isfinite(lost) else f"{self.judge.metric} is NaN"

    # ---- plans

    def _trained(self, choices: Choices) -> _Trained:
        """The floating model that a plan's codes are made of; the last one and the one without changes are kept."""
        key = plan_key(choices)
        if key not in self.trained:
            self.plain.put()
            shapes, lacks = {}, ""
            if choices:
                copy_tensors(self.model)
                if plan := removal(choices):
                    changes, lacks, _ = take_out(self.model, plan, self.options.example_inputs)
                    shapes = shapes_of(self.model, changes)
                convert(self.model, choices, self.options.calib, Sparsify)
                self._recover()
            if self.options.accelerate:
                accelerate(self.model, example_inputs=self.options.example_inputs, freeze=True)
            self.trained = {k: v for k, v in self.trained.items() if not k}
            self.trained[key] = _Trained(State(self.model), shapes, lacks)
        return self.trained[key]

    def _recover(self) -> None:
        if self.options.recover is None:
            return
        with kept_random_state(), torch.enable_grad():
            torch.manual_seed(0)
            self.options.recover(self.model)
        for tensor in tensors_of(self.model):
            tensor.grad = None
        _evaluating(self.model)

    def _state(self, choices: Choices) -> State:
        """The model with a plan; the last one that fits is kept."""
        key = plan_key(choices)
        if self.best is None or self.best[0] != key:
            self._trained(trained_part(choices)).state.put()
            convert(self.model, choices, self.options.calib, Config)
            return State(self.model)
        return self.best[1]

    def _point(self, choices: Choices) -> Point:
        """Evaluates a plan, or remembers what came of it."""
        key, states = plan_key(choices), []
        if key in self.points:
            return self.points[key]

        def find() -> dict[str, Any]:
            states.append(self._state(choices))
            times = milliseconds(self.model, [self.plain, *states], self.options.example_inputs, _TRIAL_ROUNDS)
            metrics = self._judged("a plan" if choices else "the model on fastnn's kernels")
            states[0].put()
            return {"metrics": metrics, "times": times, "bytes": tensor_bytes(self.model)}

        found = self.memo.get(f"plan {key}", find)
        ms_before, ms = (statistics.median(each) for each in found["times"])
        fits = self.judge.drop(self.before, found["metrics"]) <= self.options.allowed
        if fits and states:
            self.best = key, states[0]
        self.points[key] = Point(key, len(choices), found["metrics"], ms, ms_before, found["bytes"], fits)
        return self.points[key]

    def _judged(self, what: str) -> Metrics:
        self.evaluations += 1
        return self.judge(self.model, what)

    # ---- the end

    def _finish(self, best: State) -> Report:
        """Evaluates and measures the best plan's model once more, and leaves it in place."""
        options, judge = self.options, self.judge
        best.put()
        metrics = self._judged("the compressed model")
        lost = judge.drop(self.before, metrics)
        if not lost <= options.max_drop:
            raise CompressError(
                f"fastnn.compress: {judge.metric} fell by {lost:.4g} in the last evaluation, by less when the plan was "
                "tried: evaluate, or recover, does not give the same twice"
            )
        report = self._report(best, metrics)
        if options.target == "latency" and report.speedup[0] <= 1:
            raise self._failed(f"the compressed model is not faster ({report.speedup[0]:.2f}x)", best)
        best.put()
        for module in self.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                vars(module)["training"] = self.training.get(module, False)
        if options.save is not None:
            save(self.model, options.save, shapes=report.shapes)
        return report

    def _report(self, last: State, metrics: Metrics) -> Report:
        options, trained = self.options, self._trained(trained_part(self.choices))
        example = options.example_inputs
        times = milliseconds(self.model, [self.plain, last], example, _FINAL_ROUNDS)
        before = self._figures(self.plain, times[0], self.before)
        after = self._figures(last, times[1], metrics)
        remarks = [f"the model's configuration cannot say: {trained.lacks}"] if trained.lacks else []
        return Report(
            tuple(self._entry(unit) for unit in self.units),
            tuple(self.points.values()),
            str(self.judge.metric),
            options.max_drop,
            options.allowed,
            options.target,
            before,
            after,
            ratio_of(times),
            torch.get_num_threads(),
            self.evaluations,
            trained.shapes,
            tuple(remarks),
        )

    def _figures(self, state: State, times: list[float], metrics: Metrics) -> Figures:
        peak = memory(self.model, state, self.options.example_inputs)
        state.put()
        return Figures(metrics, statistics.median(times), tensor_bytes(self.model), packed_bytes(self.model), peak)

    def _entry(self, unit: Unit) -> Entry:
        _, option = self.choices.get(unit.key, (unit, None))
        if option is not None:
            option.verdict = "taken"
        tried = [
            Tried(
                label(one.config),
                one.error,
                one.ms_before,
                one.ms_after,
                one.bytes_before,
                one.bytes_after,
                one.reason or one.verdict or "not tried",
            )
            for one in unit.options
        ]
        why = unit.reason or "; ".join(f"{one.candidate}: {one.verdict}" for one in tried if one.verdict != "taken")
        also = f"with {', '.join(unit.names[1:])}" if len(unit.names) > 1 else ""
        became = None if option is None else option.became
        return Entry(unit.name, unit.kind, unit.was, became, "; ".join(filter(None, [also, why])), tuple(tried))

    def _failed(self, why: str, state: State) -> CompressError:
        """An error that says how near the budget was, with a report of what was tried."""
        name, judged = str(self.judge.metric), [p for p in self.points.values() if p.changed]
        near = min((self.judge.drop(self.before, p.metrics) for p in judged), default=None)
        text = "" if near is None else f": the smallest fall of {name} was {near:.4g}"
        text += f"; max_drop is {self.options.max_drop:g}, of which {self.options.reserve:.0%} is kept in reserve"
        self.choices = {}
        state.put()
        error = CompressError(f"fastnn.compress: {why}{text}; the model is as it was")
        error.report = self._report(state, self.points[""].metrics)
        return error


def _evaluating(model: Module) -> None:
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            vars(module)["training"] = False
