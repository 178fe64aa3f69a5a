"""Distillation: a student learns from what a teacher says (logits) and thinks (hidden states)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from .accelerate.isolate import plain_inputs
from .ops import cross_entropy, layer_norm, masked_softmax

Reduction = Literal["none", "mean", "sum", "batchmean"]
_REDUCTIONS = ("none", "mean", "sum", "batchmean")
HiddenKind = Literal["mse", "cosine"]


def distillation_loss_reference(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), of each row, in plain PyTorch."""
    p, q = torch.log_softmax(teacher / temperature, -1), torch.log_softmax(student / temperature, -1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
    target: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) along the last dimension (Hinton et al. 2015).

    A composition of fastnn's row operators: the teacher's probabilities (`masked_softmax`, temperature in the same
    pass), the cross-entropy of the student against them, whose gradient is the exact T * (softmax(student / T) -
    softmax(teacher / T)), less their entropy. The factor T^2 keeps gradients of one size for every temperature.

    Args:
        student: logits (*, classes), any floating type; half precision is computed in float32.
        teacher: logits of the same shape, of any floating type; no gradient goes there.
        temperature: above 0; both are divided by it.
        reduction: "mean" over the rows that count, "sum", "none" (zeros where a row does not count), or "batchmean",
            the sum over the size of the first dimension, as torch's kl_div.
        mask: (*), boolean or numbers: rows where it is False or 0 do not count; they may hold anything, NaN too.
        target: class indices (*), of which rows with `ignore_index` do not count; a language model's labels, say.
        ignore_index: see `target`.

    Returns:
        A scalar, or (*) for "none", of the student's type. The mean of no rows is NaN, as torch's. It is a difference
        of sums: below about 1e-6 of the entropy it is rounding, of either sign; its gradient is not.

    Raises:
        TypeError, ValueError: types, shapes or options that do not fit.
    """
    name = "distillation_loss"
    _check_pair(name, student, teacher, reduction)
    if student.shape != teacher.shape:
        raise ValueError(
            f"fastnn.{name}: teacher must be {tuple(student.shape)} as student, got {tuple(teacher.shape)}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"fastnn.{name}: temperature must be a finite number above 0, got {temperature}")
    shape = student.shape[:-1]
    counts = _counts(name, mask, shape, "mask")
    if target is not None:
        labels = _counts(name, target, shape, "target", ignore_index)
        counts = labels if counts is None else counts & labels  # type: ignore[operator]
    wide = torch.promote_types(student.dtype, torch.float32)  # the difference of two sums needs the digits
    x, y = _rows(student, counts).to(wide), _rows(teacher.detach(), counts).to(wide)
    probabilities = masked_softmax(y, scale=1.0 / temperature)
    soft = cross_entropy(x if temperature == 1.0 else x * (1.0 / temperature), probabilities, reduction="none")
    rows = (soft - torch.special.entr(probabilities).sum(-1)) * temperature**2
    return _reduced(rows, counts, shape, reduction).to(student.dtype)


def hidden_state_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: HiddenKind = "mse",
    projection: Module | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    """How far a student's hidden states are from a teacher's, row by row along the last dimension.

    Args:
        student: states (*, width).
        teacher: states (*, width of the teacher's); no gradient goes there.
        kind: "mse", the mean of squared differences (TinyBERT, Jiao et al. 2020), or "cosine", one minus the cosine
            (DistilBERT, Sanh et al. 2019).
        projection: a module that brings the student's states to the teacher's width, to be trained along with it.
        normalize: for "mse", whether both are first normalised over the width (`fastnn.layer_norm`, no parameters), so
            that their scale does not matter.
        reduction: as `distillation_loss`'s.
        mask: (*), boolean or numbers: rows where it is False or 0 (padding) do not count and may hold anything.

    Returns:
        A scalar, or (*) for "none", of the student's type.

    Raises:
        TypeError, ValueError: types, shapes or options that do not fit.
    """
    name = "hidden_state_loss"
    _check_pair(name, student, teacher, reduction)
    if kind not in ("mse", "cosine"):
        raise ValueError(f"fastnn.{name}: kind must be 'mse' or 'cosine', got {kind!r}")
    shape = student.shape[:-1]
    counts = _counts(name, mask, shape, "mask")
    x = _rows(student, counts)
    x = x if projection is None else projection(x)
    if x.shape[-1] != teacher.shape[-1] or teacher.shape[:-1] != shape:
        raise ValueError(
            f"fastnn.{name}: states are {tuple(shape)} x {x.shape[-1]} and the teacher's {tuple(teacher.shape)}; "
            "projection= can change the width"
        )
    y = _rows(teacher.detach(), counts).to(x.dtype)
    if kind == "cosine":
        rows = 1 - torch.cosine_similarity(x, y, dim=-1)
    else:
        if normalize:
            x, y = layer_norm(x, x.shape[-1:]), layer_norm(y, y.shape[-1:])
        rows = (x - y).square().mean(-1)
    return _reduced(rows, counts, shape, reduction)


def _check_pair(name: str, student: object, teacher: object, reduction: object) -> None:
    for what, tensor in (("student", student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"fastnn.{name}: {what} must be a Tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"fastnn.{name}: {what} must be floating point, got {tensor.dtype}")
        if tensor.dim() == 0:
            raise ValueError(f"fastnn.{name}: {what} must have at least one dimension, got a scalar")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"fastnn.{name}: reduction must be one of {_REDUCTIONS}, got {reduction!r}")


def _counts(name: str, given: Tensor | None, shape: torch.Size, what: str, ignored: int = 0) -> Tensor | None:
    """Which rows count."""
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.shape != shape:
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"fastnn.{name}: {what} must be a Tensor of shape {tuple(shape)}, got {got}")
    return given != ignored


def _rows(tensor: Tensor, counts: Tensor | None) -> Tensor:
    """(rows that count, width): the others are never read, whatever they hold."""
    return tensor.reshape(-1, tensor.shape[-1]) if counts is None else tensor[counts]


def _reduced(rows: Tensor, counts: Tensor | None, shape: torch.Size, reduction: str) -> Tensor:
    if reduction == "none":
        if counts is None:
            return rows.reshape(shape)
        return rows.new_zeros(shape).masked_scatter(counts, rows)
    if reduction == "batchmean":
        return rows.sum() / (shape[0] if shape else 1)
    return rows.mean() if reduction == "mean" else rows.sum()


class Distilled(NamedTuple):
    """One step's losses."""

    loss: Tensor
    """What to call backward on: the weighted sum."""
    parts: dict[str, Tensor]
    """Every loss by its name, without its weight and detached."""
    output: Any
    """What the student gave."""


class Distiller:
    """A step of distillation for anyone's loop: both models on a batch, and the losses between them.

    The teacher runs in evaluation and without gradients, and is left in the mode it was in; the student runs as it is.

    Args:
        teacher: any module, other than the student.
        logits: takes a model's output to its logits, for `distillation_loss`; None for no such loss.
        hidden: path of a module of the student -> path of one of the teacher, whose outputs are compared with
            `hidden_state_loss`.
        weights: "logits", "hidden" or a student's path -> the factor of that loss; 1 unless given.
        temperature: of the logits' loss.
        mask: takes a batch to the mask of rows that count, for both losses; None for all rows.
        hidden_options: further arguments of `hidden_state_loss`, `projection` apart.
        projections: path of a module of the student -> module that brings its states to the teacher's width.

    Example:
        >>> step = fastnn.Distiller(teacher, logits=lambda out: out.logits, temperature=2.0)
        >>> for batch in loader:
        ...     step(student, batch).loss.backward()
        ...     optimizer.step(); optimizer.zero_grad()
    """

    def __init__(
        self,
        teacher: Module,
        *,
        logits: Callable[[Any], Tensor] | None = None,
        hidden: Mapping[str, str] | None = None,
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        mask: Callable[[Any], Tensor] | None = None,
        hidden_options: Mapping[str, Any] | None = None,
        projections: Mapping[str, Module] | None = None,
    ) -> None:
        self.teacher, self.logits, self.hidden = teacher, logits, dict(hidden or {})
        self.weights, self.temperature, self.mask = dict(weights or {}), temperature, mask
        self.hidden_options, self.projections = dict(hidden_options or {}), dict(projections or {})
        if logits is None and not self.hidden:
            raise ValueError("fastnn.Distiller: nothing to compare: give logits= or hidden=")
        known = {"logits", "hidden", *self.hidden}
        for what, names in (("weights", self.weights), ("projections", self.projections)):
            if strange := set(names) - known:
                raise ValueError(f"fastnn.Distiller: {what} for {sorted(strange)}, known are {sorted(known)}")
        for path in self.hidden.values():
            _submodule(teacher, path, "teacher")

    def __call__(self, student: Module, batch: Any) -> Distilled:
        """The losses of a batch: a tensor, a tuple of positional or a mapping of keyword arguments.

        Raises:
            ValueError: the student is the teacher, or lacks a module; a module gave no tensor.
        """
        if student is self.teacher:
            raise ValueError("fastnn.Distiller: the student is the teacher")
        mask = None if self.mask is None else self.mask(batch)
        with (
            _evaluating(self.teacher),
            torch.no_grad(),
            _outputs(self.teacher, self.hidden.values(), "teacher") as said,
        ):
            taught = _call(self.teacher, batch)
        with _outputs(student, self.hidden, "student") as learnt:
            output = _call(student, batch)
        parts: dict[str, Tensor] = {}
        if self.logits is not None:
            parts["logits"] = distillation_loss(
                self.logits(output), self.logits(taught), temperature=self.temperature, mask=mask
            )
        for mine, other in self.hidden.items():
            parts[mine] = hidden_state_loss(
                learnt[mine], said[other], projection=self.projections.get(mine), mask=mask, **self.hidden_options
            )
        total = torch.stack([self._weight(name) * loss for name, loss in parts.items()]).sum()
        return Distilled(total, {name: loss.detach() for name, loss in parts.items()}, output)

    def _weight(self, name: str) -> float:
        return self.weights.get(name, 1.0 if name == "logits" else self.weights.get("hidden", 1.0))


def _call(model: Module, batch: Any) -> Any:
    inputs = plain_inputs(batch)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if type(inputs) is tuple else model(inputs)


def _submodule(model: Module, path: str, whose: str) -> Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"fastnn.Distiller: the {whose} has no module {path!r}") from error


@contextmanager
def _evaluating(model: Module) -> Iterator[None]:
    """In evaluation inside; each module has its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _outputs(model: Module, paths: Any, whose: str) -> Iterator[dict[str, Tensor]]:
    """What the named modules give inside: their output, or the first tensor of one that is a tuple."""
    found: dict[str, Tensor] = {}

    def note(path: str) -> Callable[[Module, Any, Any], None]:
        def hook(_: Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if not isinstance(first, Tensor):
                raise ValueError(f"fastnn.Distiller: {path!r} of the {whose} gave {type(first).__name__}, not a tensor")
            found[path] = first

        return hook

    handles = [_submodule(model, path, whose).register_forward_hook(note(path)) for path in paths]
    try:
        yield found
        if missing := [path for path in paths if path not in found]:
            raise ValueError(f"fastnn.Distiller: the {whose} did not run {missing}")
    finally:
        for handle in handles:
            handle.remove()
