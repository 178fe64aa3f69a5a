"""Cases and invalid calls of linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops.cross_entropy import LossOptions
from ...ops.linear_cross_entropy import linear_cross_entropy as typed_linear_cross_entropy
from ...ops.linear_cross_entropy import linear_cross_entropy_reference
from ..cases import Case, Inputs, InvalidCall
from ..inputs import Fill, arrange, expanded, fill

Arrange = Callable[[Tensor], Tensor]

linear_cross_entropy: Callable[..., Tensor] = typed_linear_cross_entropy  # called wrongly too

IGNORED = -100


@dataclass(frozen=True)
class _Shape:
    """What the tensors of a case look like: x (*lead, k), w (n, k), b (n,) or none, a target, a weight per class."""

    lead: tuple[int, ...] = (7,)
    k: int = 24
    n: int = 50
    bias: bool = True
    weight: bool = False
    ignored: int = IGNORED
    """Value of ignore_index."""
    every: int = 3
    """Every so manieth row has it; 1 for all rows, 0 for none."""
    kind: Fill = "normal"
    input_memory: str | Arrange = "contiguous"
    weight_memory: str | Arrange = "contiguous"
    target_memory: str | Arrange = "contiguous"
    vector_memory: str | Arrange = "contiguous"
    """Of the bias and the class weights."""

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def tensor(shape: Sequence[int], memory: str | Arrange, scale: float = 1.0) -> Tensor:
            return _arranged(fill(shape, dtype, generator, self.kind) * scale, memory)

        found = {
            "input": tensor((*self.lead, self.k), self.input_memory),
            # Logits stay around 2.
            "linear_weight": tensor((self.n, self.k), self.weight_memory, 2 / max(self.k, 1) ** 0.5),
        }
        if self.bias:
            found["linear_bias"] = tensor((self.n,), self.vector_memory)
        target = torch.randint(self.n, self.lead, generator=generator)
        if self.every and target.numel():
            target.view(-1)[self.every - 1 :: self.every] = self.ignored
        found["target"] = _arranged(target, self.target_memory)
        if self.weight:
            found["weight"] = _arranged((torch.rand(self.n, generator=generator) + 0.1).to(dtype), self.vector_memory)
        return found


def _arranged(t: Tensor, memory: str | Arrange) -> Tensor:
    return arrange(t, memory) if isinstance(memory, str) else memory(t)


def _call(options: dict[str, Any], inputs: Inputs) -> Tensor:
    return linear_cross_entropy(**inputs, **options)


def _reference(options: LossOptions, inputs: Inputs) -> Tensor:
    """Of rows, as the public function takes them apart."""
    x, w, target = inputs["input"], inputs["linear_weight"], inputs["target"]
    loss = linear_cross_entropy_reference(
        x.reshape(target.numel(), x.shape[-1]),
        w,
        target.reshape(-1),
        inputs.get("linear_bias"),
        inputs.get("weight"),
        options,
        x.dtype,
    )
    return loss.reshape(target.shape) if options.reduction == "none" else loss


def _shifted_reference(options: LossOptions, inputs: Inputs) -> Tensor:
    parts = {"input": inputs["input"][..., :-1, :], "target": inputs["target"][..., 1:]}
    return _reference(options, {**inputs, **parts})


def _case(
    name: str,
    layout: str,
    shape: _Shape,
    *,
    wide: bool = False,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    bites: bool = True,
    shift: bool = False,
    **asked: Any,
) -> Case:
    options = LossOptions(**{**LossOptions("mean", shape.ignored, 0.0, 0.0, 0.0)._asdict(), **asked})
    reduced = options.reduction != "none"
    return Case(
        op="linear_cross_entropy",
        name=name,
        layout=layout,
        make=make or shape.make,
        call=partial(_call, {**options._asdict(), "shift": shift}),
        reference=partial(_shifted_reference if shift else _reference, options),
        forward_kernel="linear_cross_entropy_fwd",
        # The gradients of a reduced loss are forward's.
        backward_kernel="linear_cross_entropy_fwd" if reduced else "linear_cross_entropy_bwd",
        differentiable=("input", "linear_weight", "linear_bias") if shape.bias else ("input", "linear_weight"),
        wide=wide,
        bites=bites,
    )


EVERYTHING: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}


def _nonfinite(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """NaN and infinities in rows that count, one each, so that the others' losses stay finite."""
    found = _Shape((9,), 19, 37, every=0).make(dtype, generator)
    x = found["input"].clone()
    x[0, 0], x[3, 18], x[5, 7] = float("nan"), float("inf"), -float("inf")
    return {**found, "input": x}


def _large(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Logits of some hundreds: all the weight is on one class, the target's or another's."""
    found = _Shape((9,), 19, 37, every=0).make(dtype, generator)
    return {**found, "input": found["input"] * 100}


def _option_cases() -> Iterator[Case]:
    for reduction in ("mean", "sum", "none"):
        yield _case(reduction, "contiguous", _Shape(), reduction=reduction)
        yield _case(f"weight_{reduction}", "contiguous", _Shape(weight=True), reduction=reduction)
        yield _case(f"everything_{reduction}", "contiguous", _Shape(weight=True), reduction=reduction, **EVERYTHING)
        yield _case(f"no_bias_{reduction}", "contiguous", _Shape(bias=False), reduction=reduction)
    yield _case("smoothing", "contiguous", _Shape(weight=True), label_smoothing=0.3)
    yield _case("smoothing_1", "contiguous", _Shape(), label_smoothing=1.0, reduction="none")
    yield _case("z_loss", "contiguous", _Shape(weight=True), z_loss=0.05)
    yield _case("softcap", "contiguous", _Shape(), softcap=3.0)
    yield _case("nothing_ignored", "contiguous", _Shape(every=0))
    yield _case("ignore_index_0", "contiguous", _Shape((9,), n=7, ignored=0))
    yield _case("ignore_index_last", "contiguous", _Shape((9,), n=7, weight=True, ignored=6), reduction="none")
    yield _case("all_ignored_sum", "contiguous", _Shape(every=1), reduction="sum", bites=False)
    yield _case("all_ignored_none", "contiguous", _Shape(every=1), reduction="none", bites=False)
    yield _case("all_ignored_mean", "nonfinite", _Shape(every=1), bites=False)
    yield _case("outliers", "contiguous", _Shape((8,), kind="outliers"), reduction="none")
    # More rows than a chunk has and more classes than a block has.
    yield _case("chunks_and_blocks", "contiguous", _Shape((530,), 8, 1101, every=7))
    yield _case("chunks_of_neighbours", "contiguous", _Shape((530,), 8, 33, every=0), reduction="none")


def _matrix_cases() -> Iterator[Case]:
    yield from _option_cases()
    both: Any = {"input_memory": "strided", "weight_memory": "strided"}
    rest: Any = {"target_memory": "strided", "vector_memory": "strided"}
    yield _case("columns_2_apart", "strided", _Shape((6,), n=37, **both))
    yield _case("all_2_apart", "strided", _Shape((6,), n=37, weight=True, **both, **rest), **EVERYTHING)
    stretched: Any = {"input_memory": "expanded", "target_memory": "expanded", "vector_memory": "expanded"}
    yield _case("rows_stride_0", "expanded", _Shape((6,), n=33, every=5, weight=True, **stretched), reduction="none")
    along = _Shape((6,), n=33, weight_memory=partial(expanded, dim=1))
    yield _case("along_stride_0", "expanded", along)
    apart: Any = {name: "offset" for name in ("input_memory", "weight_memory", "target_memory", "vector_memory")}
    yield _case("unaligned", "offset", _Shape(n=33, weight=True, **apart))
    yield _case("unaligned_none", "offset", _Shape(n=33, weight=True, **apart), reduction="none", **EVERYTHING)
    for reduction in ("sum", "none"):
        yield _case(f"no_rows_{reduction}", "empty", _Shape((0,)), bites=False, reduction=reduction)
        yield _case(f"no_rows_2x0_{reduction}", "empty", _Shape((2, 0)), bites=False, reduction=reduction)
        yield _case(f"no_features_{reduction}", "empty", _Shape(k=0), reduction=reduction)
    yield _case("no_rows_mean", "empty", _Shape((0,)), bites=False)
    for classes in (2, 3, 15, 16, 17, 31, 33, 65):
        yield _case(f"classes_{classes}", "tail", _Shape((5,), 13, classes), reduction="none")
        yield _case(f"classes_{classes}_everything", "tail", _Shape((5,), 16, classes, weight=True), **EVERYTHING)
    for features in (1, 2, 3, 7, 17, 33, 65):
        yield _case(f"features_{features}", "tail", _Shape((6,), features, 21))
    for rows in (1, 2, 3, 4, 5, 8, 17, 129):
        yield _case(f"rows_{rows}", "tail", _Shape((rows,), 9, 21, every=0))
    rows_apart: Any = {"input_memory": "padded_rows", "weight_memory": "padded_rows"}
    yield _case("rows_apart", "padded_rows", _Shape(weight=True, **rows_apart))
    turned: Any = {"input_memory": "transposed", "weight_memory": "transposed"}
    yield _case("transposed", "transposed", _Shape((19,), **turned))
    yield _case("2x5", "leading_dims", _Shape((2, 5), weight=True), reduction="none")
    yield _case("2x3x2", "leading_dims", _Shape((2, 3, 2), weight=True), **EVERYTHING)
    for reduction in ("mean", "none"):
        yield _case(f"shift_{reduction}", "leading_dims", _Shape((3, 7)), shift=True, reduction=reduction)
        yield _case(f"shift_rows_{reduction}", "leading_dims", _Shape((7,)), shift=True, reduction=reduction)
    yield _case("vector", "one_row", _Shape((), 65, every=0))
    yield _case("vector_none", "one_row", _Shape((), 65, every=0), reduction="none", **EVERYTHING)
    yield _case("one_long_row", "one_row", _Shape((1,), 24, 4097, every=0))
    yield _case("large", "large_magnitude", _Shape(), make=_large, reduction="none", bites=False)
    yield _case("specials", "nonfinite", _Shape(), make=_nonfinite, reduction="none", bites=False)


def _wide_cases() -> Iterator[Case]:
    for classes in (4, 7, 64, 100, 1000, 4099):
        yield _case(f"wide_{classes}", "tail", _Shape((9,), 48, classes), wide=True)
        yield _case(f"wide_{classes}_none", "tail", _Shape((9,), 48, classes), wide=True, reduction="none")
    yield _case("wide_many_rows", "contiguous", _Shape((1201,), 33, 65, weight=True), wide=True)
    yield _case("wide_many_rows_none", "contiguous", _Shape((1201,), 34, 64), wide=True, reduction="none")
    yield _case("wide_blocks", "contiguous", _Shape((300,), 65, 3001, weight=True), wide=True, **EVERYTHING)
    yield _case("wide_50257", "one_row", _Shape((4,), 17, 50257), wide=True)


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _x(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape or (5, 3), **options)


def _t(*values: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.tensor(values or (0, 1, 2, 3, 0), dtype=dtype)


def _public(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("linear_cross_entropy", name, call, error, ("linear_cross_entropy", *words))


def _public_calls() -> Iterator[InvalidCall]:
    x, w, t, f = _x(), _x(4, 3), _t(), linear_cross_entropy
    both = (TypeError, ValueError)
    yield _public("input_list", lambda: f([1.0], w, t), TypeError, "input", "list")
    yield _public("linear_weight_none", lambda: f(x, None, t), TypeError, "linear_weight", "NoneType")
    yield _public("target_list", lambda: f(x, w, [1]), TypeError, "target", "list")
    yield _public("bias_list", lambda: f(x, w, t, linear_bias=[1.0]), TypeError, "linear_bias", "list")
    yield _public("weight_list", lambda: f(x, w, t, weight=[1.0] * 4), TypeError, "weight", "list")
    yield _public("reduction", lambda: f(x, w, t, reduction="avg"), ValueError, "reduction", "'avg'")
    yield _public("smoothing_high", lambda: f(x, w, t, label_smoothing=1.1), ValueError, "label_smoothing", "1.1")
    nan = float("nan")
    yield _public("smoothing_nan", lambda: f(x, w, t, label_smoothing=nan), ValueError, "label_smoothing", "nan")
    yield _public("softcap_negative", lambda: f(x, w, t, softcap=-1.0), ValueError, "softcap", "-1")
    yield _public("input_integer", lambda: f(x.int(), w.int(), t), TypeError, "input", "int32")
    yield _public("input_scalar", lambda: f(torch.ones(()), w, t), ValueError, "input")
    yield _public("weight_dtype_differs", lambda: f(x, w.double(), t), TypeError, "linear_weight", "float64")
    yield _public("bias_dtype", lambda: f(x, w, t, linear_bias=_x(4).half()), TypeError, "linear_bias", "float16")
    yield _public("features", lambda: f(x, _x(4, 2), t), ValueError, "linear_weight", "3", "(4, 2)")
    yield _public("weight_1d", lambda: f(x, _x(3), t), ValueError, "linear_weight", "(3,)")
    yield _public("outer_of_vector", lambda: f(_x(3), _x(4, 2, 3), t), ValueError, "linear_weight", "(4, 2, 3)")
    yield _public("bias_shape", lambda: f(x, w, t, linear_bias=_x(5)), ValueError, "linear_bias", "(4,)", "(5,)")
    yield _public("target_length", lambda: f(x, w, t[:4]), ValueError, "target", "(5,)", "(4,)")
    yield _public("target_of_vector", lambda: f(_x(3), w, t[:1]), ValueError, "target", "()", "(1,)")
    yield _public("target_int32", lambda: f(x, w, t.int()), TypeError, "target", "int32")
    yield _public("probabilities_shape", lambda: f(x, w, _x(5, 3)), ValueError, "target", "(5, 4)", "(5, 3)")
    yield _public("probabilities_ignore", lambda: f(x, w, _x(5, 4), ignore_index=1), ValueError, "ignore_index")
    yield _public("class_weight_length", lambda: f(x, w, t, weight=_x(5)), ValueError, "weight", "(4,)", "(5,)")
    yield _public("class_weight_dtype", lambda: f(x, w, t, weight=_x(4).double()), both, "weight", "float64")
    yield _public("target_device", lambda: f(x, w, t.to("meta")), both, "target", "meta")
    yield _public("linear_weight_device", lambda: f(x, w.to("meta"), t), both, "linear_weight", "meta")
    yield _public("sparse", lambda: f(x.to_sparse(), w, t), (TypeError, NotImplementedError), "sparse")
    yield _public("shift_of_vector", lambda: f(_x(3), w, torch.tensor(1), shift=True), ValueError, "shift", "(3,)")
    yield _public("shift_of_nothing", lambda: f(_x(2, 0, 3), w, t[:0].view(2, 0), shift=True), ValueError, "shift")
    for index in (4, -1, -101, 2**62):
        yield InvalidCall(
            "linear_cross_entropy",
            f"target_is_{index}".replace("-", "m"),
            lambda index=index: f(x, w, _t(0, 1, 2, 3, index)),  # type: ignore[misc]
            IndexError,
            (str(index),),  # torch's own words where the reference runs it
        )


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("linear_cross_entropy", name, call, error, ("linear_cross_entropy", *words), raw=True)


def _given(tensors: dict[str, Any], *names: str) -> tuple[Any, ...]:
    right = {"grad": torch.ones(()), "input": _x(), "linear_weight": _x(4, 3), "target": _t(), "stats": _x(5, 2)}
    return tuple({**right, **tensors}.get(name) for name in names)


_OPERANDS = ("input", "linear_weight", "linear_bias", "target", "weight")


def _fwd(*options: float, mask: Sequence[bool] = (True, True, False), **tensors: Tensor) -> object:
    given = (*options, *(1, IGNORED, 0.0, 0.0, 0.0)[len(options) :])
    return torch.ops.fastnn.linear_cross_entropy_fwd(*_given(tensors, *_OPERANDS), *given, list(mask), True)


def _bwd(*options: float, mask: Sequence[bool] = (True, True, False), **tensors: Tensor) -> object:
    given = (*options, *(1, IGNORED, 0.0, 0.0, 0.0)[len(options) :])
    operands = _given(tensors, "grad", *_OPERANDS, "stats")
    return torch.ops.fastnn.linear_cross_entropy_bwd(*operands, *given, list(mask), True)


_TYPES = (TypeError, NotImplementedError)


def _raw_shared_calls() -> Iterator[InvalidCall]:
    """What forward and backward refuse alike."""
    wrong: Sequence[tuple[str, dict[str, Any], Any, tuple[str, ...]]] = (
        ("rank_1", {"input": _x(3)}, ValueError, ("input", "(3,)")),
        ("rank_3", {"input": _x(5, 3, 1)}, ValueError, ("input", "(5, 3, 1)")),
        ("input_int32", {"input": _x(dtype=torch.int32)}, _TYPES, ("input", "int32")),
        ("input_float64", {"input": _x(dtype=torch.float64)}, _TYPES, ("input", "float64")),
        ("features", {"linear_weight": _x(4, 2)}, ValueError, ("input", "2", "(5, 3)")),
        ("weight_rank", {"linear_weight": _x(4, 3, 1)}, ValueError, ("linear_weight", "(4, 3, 1)")),
        ("weight_half", {"linear_weight": _x(4, 3).half()}, _TYPES, ("linear_weight", "float16")),
        ("no_classes", {"linear_weight": _x(0, 3)}, IndexError, ("target",)),
        ("bias_long", {"linear_bias": _x(5)}, ValueError, ("linear_bias", "(4,)", "(5,)")),
        ("bias_half", {"linear_bias": _x(4).half()}, _TYPES, ("linear_bias", "float16")),
        ("target_short", {"target": _t(0, 1)}, ValueError, ("(5,)", "(2,)")),
        ("target_long", {"target": torch.zeros(10**6, dtype=torch.long)}, ValueError, ("(5,)", "(1000000,)")),
        ("target_2d", {"target": _t()[:, None]}, ValueError, ("(5,)", "(5, 1)")),
        ("target_int32", {"target": _t(dtype=torch.int32)}, _TYPES, ("target", "int32")),
        ("probabilities", {"target": _x(5, 4)}, _TYPES, ("target", "float32")),
        ("class_weight_long", {"weight": _x(5)}, ValueError, ("weight", "(4,)", "(5,)")),
        ("class_weight_half", {"weight": _x(4).half()}, (ValueError, *_TYPES), ("weight", "float16")),
        ("mask_short", {"mask": [True]}, (ValueError, RuntimeError), ()),
        ("mask_of_no_bias", {"mask": [True, True, True]}, ValueError, ("linear_bias",)),
        ("index_high", {"target": _t(0, 1, 2, 3, 4)}, IndexError, ("target", "4")),
        ("index_low", {"target": _t(0, 1, 2, 3, -1)}, IndexError, ("target", "-1")),
        ("index_huge", {"target": _t(0, 1, 2, 3, 2**62)}, IndexError, ("target",)),
    )
    calls: tuple[tuple[str, Callable[..., object]], ...] = (("fwd", _fwd), ("bwd", _bwd))
    for side, call in calls:
        for name, tensors, error, words in wrong:
            yield _raw(f"{side}_{name}", partial(call, **tensors), error, *((side, *words) if words else ()))
        for code in (-1, 3, 2**40):
            yield _raw(f"{side}_reduction_{code}", partial(call, code), ValueError, side, "reduction", str(code))
        yield _raw(f"{side}_smoothing", partial(call, 1, IGNORED, 1.5), ValueError, side, "label_smoothing")
        yield _raw(f"{side}_softcap", partial(call, 1, IGNORED, 0.0, 0.0, -1.0), ValueError, side, "softcap")


def _raw_calls() -> Iterator[InvalidCall]:
    yield from _raw_shared_calls()
    yield _raw("fwd_gradients_of_none", lambda: _fwd(0), ValueError, "unreduced")
    yield _raw("bwd_stats_short", lambda: _bwd(stats=_x(4, 2)), ValueError, "stats", "(4, 2)")
    yield _raw("bwd_stats_half", lambda: _bwd(stats=_x(5, 2).half()), (ValueError, *_TYPES), "stats")
    yield _raw("bwd_stats_strided", lambda: _bwd(stats=_x(5, 4)[:, ::2]), ValueError, "stats")
    yield _raw("bwd_grad_rows", lambda: _bwd(grad=_x(5)), ValueError, "grad", "(5,)")
    yield _raw("bwd_grad_of_none", lambda: _bwd(0, grad=_x(4)), ValueError, "grad", "(4,)")
    yield _raw("bwd_grad_half", lambda: _bwd(grad=torch.ones(()).half()), _TYPES, "grad", "float16")
    yield _raw("fwd_wants_gradient", _wants_gradient, RuntimeError, "linear_cross_entropy_fwd", "grad")


def _wants_gradient() -> object:
    operands = _given({"input": _x(requires_grad=True)}, *_OPERANDS)
    return torch.ops.fastnn.linear_cross_entropy_fwd(*operands, 1, IGNORED, 0.0, 0.0, 0.0, [False] * 3)


INVALID: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
